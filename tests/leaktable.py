"""Law: whatever the source, the target and the state of the NIC, the connection left as promised, or nothing left.

Each source x target x state of the NIC n1 is one case. It runs in a lab (``aiobind.lab``) under one of three routings,
settings of rp_filter and privileges, and is judged by the packets alone:

    right           it left by the NIC, and from an address, that the model names
    failed closed   it failed with the class and errno that the model names, in time, and no packet left
    leaked          a packet left by another NIC, from an address that the NIC does not hold, or in spite of a BindError
    wrong           anything else

A case has a port of its own, so that many run at once. Each connector connects once before the state changes: what it
remembers is put to the test. One environment (state, routing, rp_filter, privilege, loop) is one process. What must
happen ``leakmodel.py`` says, which knows nothing of aiobind's inside.

    python tests/leaktable.py                  each source x target x state once, all the rest pairwise
    python tests/leaktable.py --full           all of it
    python tests/leaktable.py -k 'no carrier'  only what has this text in its name
    python tests/leaktable.py --table          the promises, as a table; runs nothing

Beside it curl and aiohttp are asked to go by n1, and judged by the same packets.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import errno
import itertools
import json
import logging
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import leakmodel as model
import uvloop
from conftest import _CAP_SYS_ADMIN, _capabilities, _capset
from leakmodel import Case, Device, Environment, Failed, Left, Target

import aiobind
from aiobind import lab as aiobind_lab
from aiobind._platform import platform as aiobind_platform
from aiobind.lab import Lab, Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence

    from aiobind import SourceView

    Seen = Sequence[tuple[str, str]]  # by which NIC, from which address

PATIENCE, NO_ANSWER = 5.0, 2.0  # seconds: for what must end, and for what may stay unanswered

# --- how a case ends ----------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How one connect ended, as its caller sees it: "connected", "silent" or the class of the error."""

    kind: str
    errno: int = 0
    interface: str | None = None
    address: str = ""


class Result(NamedTuple):
    """How one case ended, as a line of JSON has it; *seen* is what left, by which NIC from which address."""

    case: str
    state: str
    client: str
    target: str
    verdict: str
    kind: str
    errno: int
    took: float
    seen: Seen
    expected: str
    note: str

    def __str__(self) -> str:
        ended = f"{self.kind} {model.errno_name(self.errno)}" if self.errno else self.kind
        seen = ", ".join(f"{nic} from {source}" for nic, source in self.seen) or "no packet"
        why = f"{self.verdict} ({self.note})" if self.note else self.verdict
        return f"{why}: {self.case}: expected {self.expected}; was {ended} after {self.took:.2f} s, {seen}"


# --- the verdict --------------------------------------------------------------------------------------------


#: How a connection ends that has left: by whether it is answered. A router may say that it knows no way to the target.
_LEFT = {
    True: ("connected",),
    False: ("silent", "ConnectError"),
    None: ("connected", "silent", "ConnectError"),
}


def _outcome(case: Case) -> Left | Failed:
    """Return what is expected of *case*: of a peer, that it leaves by n1 where aiobind does that as root."""
    environment = case.environment._replace(privilege="root") if case.client in model.PEERS else case.environment
    return model.expected(case._replace(environment=environment))


def _late(outcome: Left | Failed, ended: Ended, took: float) -> bool:
    """Return whether a failure took too long, or is one for the kernel to tell that it has not told."""
    return (
        isinstance(outcome, Failed)
        and took > outcome.within
        and (ended.kind != "silent" or (outcome.kind != "silent" and outcome.within >= model.NEIGHBOUR))
    )


def _judged(case: Case, outcome: Left | Failed, ended: Ended, took: float, seen: Seen) -> tuple[str, str]:
    """Return the verdict, and what to say about it."""
    if note := _leak(case, ended, seen):
        return "leaked", note
    peer = case.client in model.PEERS
    if isinstance(outcome, Failed) or (peer and not seen):
        if seen:
            return "wrong", "something left"
        if not peer and (ended.kind != outcome.kind or ended.errno not in outcome.errnos):
            return "wrong", "another error"
        return ("wrong", "late") if not peer and _late(outcome, ended, took) else ("failed closed", "")
    promised = [ip_network(address) for address in outcome.addresses]
    if not seen or not all(nic in outcome.nics and _among(source, promised) for nic, source in seen):
        return "wrong", "not as promised"
    if peer:
        return "right", ""
    if ended.kind not in _LEFT[outcome.answered]:
        return "wrong", "the answer"
    pins = {outcome.pinned, case.target.zone or outcome.pinned}  # the zone of the target pins by itself, said or not
    addresses = {source for _, source in seen}
    if ended.kind == "connected" and not (ended.interface in pins and ended.address in addresses):
        return "wrong", f"bound_source says {ended.interface}, {ended.address}"
    return "right", ""


def _among(source: str, promised: Sequence[IPv4Network | IPv6Network]) -> bool:
    return not promised or any(ip_address(source) in network for network in promised)


def _leak(case: Case, ended: Ended, seen: Seen) -> str:
    """Return what leaked, judged without the model of routes: another NIC, a foreign address, packets of a failure."""
    source, devices, peer = case.source, case.environment.devices, case.client in model.PEERS
    if seen and not peer and ended.kind not in _LEFT[None]:
        return "it failed, and a packet left"
    exempt = source.option == "not strict" and case.environment.privilege == "EPERM"
    for nic, address in seen:
        if source.local and not _among(address, [ip_network(each) for each in source.local]):
            return f"from {address}"
        if not source.devices or exempt or (peer and nic == "lo"):
            continue  # no device was promised; what a peer tells this host itself is no leak
        to_itself = [
            n for n in source.devices if n == "lo" or {*case.target.addresses} & {*devices.get(n, Device()).addresses}
        ]
        owners = to_itself if nic == "lo" else [name for name in source.devices if name == nic]
        if not owners:
            return f"by {nic}"
        if source.option != "borrow" and not any(address in devices.get(name, Device()).addresses for name in owners):
            return f"from {address}"
    return ""


# --- the stage ----------------------------------------------------------------------------------------------


class Leaving(Witness):
    """A witness of what leaves by any device of its namespace, lo among them, where the one in far cannot look."""

    def _parse(self, frame: bytes) -> aiobind_lab.Packet | None:
        outgoing = frame[42] == socket.PACKET_OUTGOING  # struct sockaddr_ll: sll_pkttype
        return super()._parse(frame[:42] + b"\0" + frame[43:]) if outgoing else None


_AUDIT_ARCH_AND_SETSOCKOPT = {"x86_64": (0xC000003E, 54), "aarch64": (0xC00000B7, 208)}
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38


def refuse_device_pin() -> None:
    """Answer EPERM to SO_BINDTODEVICE and SO_BINDTOIFINDEX, in this thread and all that it starts, for good."""
    arch, setsockopt = _AUDIT_ARCH_AND_SETSOCKOPT[platform.machine()]
    program = (  # struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]
        (0x20, 0, 0, 4),  # ld arch
        (0x15, 0, 8, arch),  # jeq, else allow
        (0x20, 0, 0, 0),  # ld nr
        (0x15, 0, 6, setsockopt),
        (0x20, 0, 0, 24),  # ld level
        (0x15, 0, 4, socket.SOL_SOCKET),
        (0x20, 0, 0, 32),  # ld optname
        (0x15, 1, 0, 25),  # SO_BINDTODEVICE: refuse
        (0x15, 0, 1, 62),  # SO_BINDTOIFINDEX: refuse, else allow
        (0x06, 0, 0, 0x00050000 | errno.EPERM),  # SECCOMP_RET_ERRNO
        (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    )
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    fprog = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, fprog, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


class Stage:
    """A lab in which the cases of one environment run."""

    def __init__(self, lab: Lab, environment: Environment) -> None:
        self.lab, self.environment = lab, environment
        for namespace in (lab.near, lab.far):
            namespace.sysctl("ipv6.conf.default.addr_gen_mode", 1)  # a new NIC has the link-local address it is given
        # A gateway speaks ARP for itself alone, not for the hosts behind it, and far is both.
        lab.far.sysctl("ipv4.conf.all.arp_ignore", 1)
        lab.far.sysctl("ipv4.conf.all.arp_announce", 2)
        lab.near.sysctl("ipv4.conf.all.promote_secondaries", 1)
        lab.near.sysctl("ipv4.conf.all.rp_filter", environment.rp_filter)
        n0, n1 = lab.nics[:2]
        self.do(
            *(f"addr del {n1.link_local}/64 dev n1", f"addr add {model.LL}/64 dev n1 nodad"),
            *(f"far addr del {n1.gateway_link_local}/64 dev f1", f"far addr add {model.GATEWAY_LL}/64 dev f1 nodad"),
            *(f"route add local {prefix} dev lo" for prefix in (model.NET4, model.NET6)),
            *(f"far route add {model.NET4} via {n0.v4}", f"far route add {model.NET6} via {n0.v6}"),
        )
        if environment.routing != "metric":
            self.do("route del 0.0.0.0/0 dev n1 metric 1001", "route del ::/0 dev n1 metric 1001", *model.ROUTES)
            for family, address in (("-4", model.H4), ("-6", model.H6)):  # in a batch ip takes each rule for IPv4's
                rule = ["from", address] if environment.routing == "source rule" else ["oif", "n1"]
                subprocess.run(["ip", family, "rule", "add", *rule, "lookup", "101"], check=True)
        self.do(*environment.state.before)
        self.witnesses = [lab.witness(syn_only=True), Leaving({"wan": "n1", "br0": "n1"}, lab.near, syn_only=True)]

    def do(self, *commands: str) -> None:
        """Run the commands of a state."""
        for place, lines in itertools.groupby(map(self._spelled, commands), lambda line: line.split()[0]):
            if place == "sysctl":
                for line in lines:
                    self.lab.near.sysctl(*line.split()[1].split("="))
            else:
                namespace = self.lab.far if place == "far" else self.lab.near
                namespace.ip(*(line.removeprefix(f"{place} ") for line in lines))

    def _spelled(self, command: str) -> str:
        """Return *command* with its place in front, and the default routes of n1 in full."""
        place, _, rest = command.partition(" ")
        if place in ("far", "sysctl"):
            return command
        if place in ("+4", "+6", "-4", "-6"):
            table = "metric 1001" if self.environment.routing == "metric" else "table 101"
            way = "0.0.0.0/0 via 198.18.1.1" if place[1] == "4" else "::/0 via 2001:db8:1::1"
            command = f"route {'replace' if place[0] == '+' else 'del'} {way} dev {rest} onlink {table}"
        return "near " + command.replace("{far}", f"/proc/{os.getpid()}/fd/{self.lab.far.fileno()}")

    def change(self) -> None:
        """Bring n1 into its state, and wait until the kernel has told everybody so."""
        effective = _capabilities("CapEff")
        _capset(_capabilities("CapPrm"))  # in a user namespace it takes CAP_NET_ADMIN to set a sysctl of a NIC
        self.do(*self.environment.state.change)
        _capset(effective)
        meant = {name: (device.link, dict(device.addresses)) for name, device in self.environment.devices.items()}
        deadline = time.monotonic() + 5
        while (found := _devices()) != meant:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the state is not what the model says: {found}, not {meant}")
            time.sleep(0.05)
        for namespace in (self.lab.near, self.lab.far):
            namespace.ip("neigh flush all")  # what happens must not hang on what was asked before


def _devices() -> dict[str, tuple[str, dict[str, str]]]:
    """Return the link and the addresses of each device, as the ``ip`` command sees them."""
    text = subprocess.run(["ip", "-json", "addr"], capture_output=True, text=True, check=True).stdout
    found = {}
    for device in json.loads(text):
        held = {each["local"]: each for each in device["addr_info"]}
        kinds = {
            address: next((kind for kind in ("tentative", "deprecated") if each.get(kind)), "")
            or ("scope link" if each["scope"] == "link" and each["family"] == "inet" else "")
            for address, each in held.items()
            if address == model.LL or not address.startswith("fe80:")  # those of n0 and n2 are nobody's business
        }
        carrier = "LOWER_UP" in device["flags"] and device["operstate"] in ("UP", "UNKNOWN")
        settled = carrier or (device["operstate"] in ("DOWN", "LOWERLAYERDOWN") and "LOWER_UP" not in device["flags"])
        link = ("port" if "master" in device else "up") if carrier else "no carrier"
        link = "down" if "UP" not in device["flags"] else link if settled else "changing"
        found[device["ifname"]] = (link, kinds)
    return found


# --- the cases of one environment ---------------------------------------------------------------------------

_PORTS, _WARM_UP = 20_000, 19_999  # not ephemeral
_ANSWER = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


async def _serve(namespaces: Iterable[aiobind_lab.Namespace], ports: Iterable[int]) -> None:
    """Answer HTTP on *ports* of each namespace, for as long as the process lives."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(_ANSWER)
            await writer.drain()
        writer.close()

    for namespace, port in itertools.product(namespaces, ports):
        with namespace:
            sock = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        _kept.append(await asyncio.start_server(answer, sock=sock))


_kept: list[object] = []


class InOrder:
    """The policy of every connector here: the first source, then the next."""

    def order(self, sources: Sequence[SourceView], host: str) -> Sequence[SourceView]:
        return sources


def _connector(case: Case) -> aiobind.Connector:
    options: dict[str, Any] = {
        "": {},
        "borrow": {"borrow": True},
        "direct": {"direct": [case.target.host.partition("%")[0]]},
        "not strict": {"strict": False},
    }[case.source.option]
    return aiobind.Connector(*case.texts, policy=InOrder(), **options)


async def _connect(connector: aiobind.Connector, target: Target, port: int, patience: float) -> Ended:
    try:
        sock = await asyncio.wait_for(connector.connect(target.host, port), patience)
    except TimeoutError as error:  # that of wait_for has no errno
        return Ended("ConnectError", error.errno) if error.errno else Ended("silent")
    except aiobind.AiobindError as error:
        return Ended(type(error).__name__, error.errno or 0)
    with sock:
        return Ended("connected", 0, *aiobind.bound_source(sock)[1:3])


async def _curl(interface: str, target: Target, port: int) -> Ended:
    url = f"http://{_in_url(target)}:{port}/"
    command = ["curl", "--silent", "--noproxy", "*", "--max-time", "3.5", "--interface", interface, url]
    process = await asyncio.create_subprocess_exec(*command)
    status = await process.wait()
    return Ended("connected") if status == 0 else Ended("silent" if status == 28 else f"exit status {status}")


async def _aiohttp(address: str, target: Target, port: int) -> Ended:
    connector = aiohttp.TCPConnector(local_addr=(address, 0))
    timeout = aiohttp.ClientTimeout(total=3.5)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.get(f"http://{_in_url(target)}:{port}/"),
        ):
            return Ended("connected")
    except TimeoutError:
        return Ended("silent")
    except (OSError, aiohttp.ClientError) as error:
        return Ended(type(error).__name__, getattr(error, "errno", 0) or 0)


def _in_url(target: Target) -> str:
    return f"[{target.host.replace('%', '%25')}]" if ":" in target.host else target.host


def _asked(case: Case, port: int, connector: aiobind.Connector | None) -> Callable[[float], Coroutine[Any, Any, Ended]]:
    """Return the function that makes the connection of *case*, with the patience that it is given."""
    environment, client, target = case
    if connector is not None:
        return lambda patience: _connect(connector, target, port, patience)
    address = model.H4 if model.version_of(target.addresses[-1]) == 4 else model.H6
    if client == "aiohttp local_addr":
        return lambda _: _aiohttp(address, target, port)
    interface = f"if!{environment.state.called}" if client == "curl if!" else address
    return lambda _: _curl(interface, target, port)


async def _run(stage: Stage, cases: Sequence[Case]) -> list[Result]:
    ports = {case: _PORTS + number for number, case in enumerate(cases)}
    await _serve((stage.lab.far, stage.lab.near), (*ports.values(), _WARM_UP))
    outcomes = {case: _outcome(case) for case in cases}
    connects: dict[Case, Callable[[float], Coroutine[Any, Any, Ended]]] = {}
    ended: dict[Case, tuple[Ended, float]] = {}
    warm_up = []
    for case, port in ports.items():
        connector = None
        if case.client not in model.PEERS:
            try:
                connector = _connector(case)
            except aiobind.InvalidSource:
                ended[case] = Ended("InvalidSource"), 0.0
                continue
            warm_up.append(_connect(connector, case.target, _WARM_UP, 0.3))
        connects[case] = _asked(case, port, connector)

    async def timed(case: Case) -> None:
        outcome = outcomes[case]
        unanswered = outcome.kind == "silent" if isinstance(outcome, Failed) else not outcome.answered
        started = time.monotonic()
        end = await connects[case](NO_ANSWER if unanswered else PATIENCE)
        ended[case] = end, time.monotonic() - started

    await asyncio.gather(*warm_up)
    stage.change()
    await asyncio.gather(*map(timed, connects))  # nobody has had a turn of the loop to read the news
    for _ in range(3):  # many at once on a busy machine: what was slow is timed again, in less company
        late = [case for case in connects if case.client not in model.PEERS and _late(outcomes[case], *ended[case])]
        await asyncio.gather(*map(timed, late))
    await asyncio.sleep(0.2)
    packets = [packet for witness in stage.witnesses for packet in witness.packets()]
    results = []
    for case, port in ports.items():
        seen = sorted({(packet.nic, packet.source) for packet in packets if packet.dport == port})
        (end, took), outcome = ended[case], outcomes[case]
        verdict, note = _judged(case, outcome, end, took, seen)
        results.append(Result(str(case), *case.names, verdict, end.kind, end.errno, took, seen, str(outcome), note))
    return results


# --- the command --------------------------------------------------------------------------------------------


def _process(cases: Sequence[Case], broken: str) -> list[Result]:
    """Run the cases of one environment; the process is good for nothing afterwards."""
    environment = cases[0].environment
    aiobind_lab.isolate()
    logging.getLogger("aiobind").setLevel(logging.ERROR)  # strict=False says what it does
    if broken:
        setattr(aiobind_platform, broken, lambda *_, **__: None)
    hosts = f"{model.V6} dual.test\n{model.V4} dual.test\n{model.H4} nic1.test\n{model.H6} nic1.test\n"
    with contextlib.ExitStack() as stack:
        stage = Stage(stack.enter_context(Lab(3)), environment)
        for path, text in {"/etc/hosts": hosts, "/etc/resolv.conf": "", "/etc/nsswitch.conf": "hosts: files\n"}.items():
            if os.path.exists(path):
                stack.enter_context(aiobind_lab.replace_file(path, text))
        if environment.privilege == "EPERM":
            refuse_device_pin()
        elif environment.privilege == "no capabilities":
            _capset(_capabilities("CapEff") & 1 << _CAP_SYS_ADMIN)  # `with lab.far:` takes it, and no socket does
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if environment.loop == "uvloop" else None) as runner:
            return runner.run(_run(stage, cases))


def run(cases: Iterable[Case], jobs: int, broken: str = "") -> Iterator[Result]:
    """Run each environment in a process of its own, *jobs* at once; yield the results as they come."""
    groups: dict[tuple[Environment, bool], list[Case]] = {}
    for case in cases:  # peers apart: to start a process holds up the loop, and whoever is being timed on it
        groups.setdefault((case.environment, case.client in model.PEERS), []).append(case)
    waiting, running = deque(groups.values()), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            group = waiting.popleft()
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                status = 1
                signal.alarm(120)  # no environment takes a quarter of that
                try:
                    json.dump(_process(group, broken), output)
                    output.flush()
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            running[pid] = group, output
        pid, status = os.wait()
        group, output = running.pop(pid)
        with output:
            if status:
                dead = ("wrong", "not run", 0, 0.0, [], "to run", f"its process ended with status {status}")
                yield from (Result(str(case), *case.names, *dead) for case in group)
            else:
                output.seek(0)
                yield from (Result(*row) for row in json.load(output))


def figures(results: Iterable[Result]) -> str:
    """Return a table with one row for each client."""
    rows = {"aiobind": [], **{peer: [] for peer in model.PEERS}}
    for result in results:
        rows[result.client if result.client in model.PEERS else "aiobind"].append(result)
    lines = [f"{'':<20}{'cases':>8}{'right':>8}{'failed closed':>15}{'leaked':>8}{'wrong':>8}  longest failure"]
    for name, each in rows.items():
        if each:
            count = Counter(result.verdict for result in each)
            longest = max((r.took for r in each if r.kind not in ("connected", "silent")), default=0.0)
            lines.append(
                f"{name:<20}{len(each):>8}{count['right']:>8}{count['failed closed']:>15}{count['leaked']:>8}"
                f"{count['wrong']:>8}{longest:>14.2f} s"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the leak table."""
    parser = argparse.ArgumentParser(prog="leaktable.py", description=main.__doc__)
    parser.add_argument("--full", action="store_true", help="the full product")
    parser.add_argument("--jobs", type=int, default=4 * (os.cpu_count() or 1), help="processes at once (they sleep)")
    parser.add_argument("-k", default="", metavar="TEXT", help="only the cases with TEXT in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each result as a line of JSON")
    parser.add_argument("--table", action="store_true", help="print what is promised, and run nothing")
    parser.add_argument("--no-peers", action="store_true", help="aiobind alone")
    parser.add_argument("--broken", choices=("pin", "bind"), default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.table:
        print(model.table())
        return 0
    if reason := aiobind_lab.available():
        parser.error(f"no lab: {reason}")
    clients = model.PEERS
    if shutil.which("curl") is None:
        if os.environ.get("CI") == "true":
            parser.error("there is no curl to compare with")
        print("no curl here: its rows are left out", file=sys.stderr)
        clients = model.PEERS[2:]
    cases = model.selection(full=options.full) + ([] if options.no_peers else model.peers(clients))
    started, results = time.monotonic(), []
    with options.json.open("w") if options.json else contextlib.nullcontext() as file:
        for result in run((case for case in cases if options.k in str(case)), options.jobs, options.broken):
            results.append(result)
            if file:
                file.write(json.dumps(result._asdict()) + "\n")
    print(figures(results), f"{time.monotonic() - started:.0f} s", sep="\n")
    bad = [result for result in results if result.verdict in ("leaked", "wrong") and result.client not in model.PEERS]
    print(*bad[:100], *([f"... and {len(bad) - 100} more"] if len(bad) > 100 else []), sep="\n")
    return 1 if bad or not results else 0


if __name__ == "__main__":
    sys.exit(main())
