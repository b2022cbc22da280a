"""What does it cost to connect from a source, and to get something there, with aiobind and with its peers?

    python -m bench.compare [--quick] [--json FILE] [--only TABLE ...] [--peer LABEL ...]

Each peer (`bench.peers`) works in a process of its own, on each loop, and is measured from outside (`bench.meters`).
The server is another process, in the far namespace (`bench.server`).
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from aiobind.lab import Lab, replace_file
from bench import table
from bench.meters import BEYOND, CPU, FULL, INSTRUCTIONS, QUICK, SYSTEM_CALLS, Case, Meter
from bench.peers import AIOHTTP, HAND, WORKLOADS, Peer, Place
from bench.server import compiled, serving
from bench.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HOLD_PORT, HTTP_PORT = 8080, 8081
SECOND_TARGET = "203.0.113.81"
NAMES = ("one.bench.test", "two.bench.test")


# --- what is measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """A workload of `bench.peers`, and how many at once."""

    workload: str
    at_once: int = 1


@dataclass(frozen=True)
class Sheet:
    """A table to be filled: a load for each column."""

    title: str
    meter: Meter
    columns: dict[str, Load]
    baseline: str
    axis: str = ""
    note: str = ""
    #: what runs with ``--quick``, as (label, loop); none: all
    quick: tuple[tuple[str, str], ...] = ()


CONNECT = {"1": Load("connect"), "100": Load("connect", 100)}
BY_NAME = {"one address": Load("one address"), "two addresses": Load("two addresses")}
OURS = (("aiobind", "asyncio"), ("aiobind", "uvloop"))
#: What the costs are for: the peers do not all promise the same.
CONNECT_PROMISES = (
    "The C loop, the blocking socket, sock_connect by hand and aiobind pin the device and bind the address; the others "
    "bind the address alone."
)
GET_PROMISES = (
    "aiohttp's socket_factory, curl_cffi, pycurl and aiobind pin the device and bind the address; the others bind the "
    "address alone."
)
OF_AIOHTTP = ((AIOHTTP, "asyncio"), *OURS)


def requests(title: str, workload: str, note: str = "") -> Sheet:
    loads = {"1": Load(workload), "64": Load(workload, 64)}
    return Sheet(title, CPU, loads, AIOHTTP, axis="at once", note=note, quick=OF_AIOHTTP)


SHEETS = {
    "connect": Sheet("connect and close", CPU, CONNECT, HAND, axis="at once", note=CONNECT_PROMISES),
    "two-addresses": Sheet(
        "connect and close, by a name that is known", CPU, BY_NAME, "one address", note="The first of two answers."
    ),
    "get": requests("GET on a new connection", "get", GET_PROMISES),
    "keepalive": requests("GET on keep-alive", "keepalive"),
    "connect-syscalls": Sheet(
        "connect and close", SYSTEM_CALLS, {"all": Load("connect")}, HAND, note=BEYOND, quick=OURS
    ),
    "connect-instructions": Sheet(
        "connect and close", INSTRUCTIONS, CONNECT, HAND, axis="at once", quick=((HAND, "asyncio"),)
    ),
    "get-instructions": Sheet(
        "GET",
        INSTRUCTIONS,
        {"new": Load("get"), "keep-alive": Load("keepalive")},
        AIOHTTP,
        axis="connection",
        quick=((AIOHTTP, "asyncio"),),
    ),
}


# --- where --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """The lab, what the peers are told of it, and the programs there are, by language."""

    lab: Lab
    place: Place
    programs: dict[str, str]


@contextmanager
def setting(languages: Sequence[str] = ("c", "go")) -> Iterator[Setting]:
    with ExitStack() as stack:
        programs = compiled(stack.enter_context(tempfile.TemporaryDirectory(prefix="aiobind-bench-")), languages)
        lab = stack.enter_context(Lab(nics=2))
        for namespace in (lab.near, lab.far):
            # Whoever closes first would be left in TIME_WAIT for a minute, and 28,000 ports towards one destination are
            # soon used up at thousands of connects per second. Without any, a connection ends for all peers alike.
            namespace.sysctl("ipv4.tcp_max_tw_buckets", 0)
        lab.add_target(SECOND_TARGET)
        hosts = [("127.0.0.1", "localhost"), *((lab.target_v4, name) for name in NAMES), (SECOND_TARGET, NAMES[1])]
        text = "".join(f"{address} {name}\n" for address, name in hosts)
        stack.enter_context(replace_file("/etc/hosts", text))
        nic, crowd = lab.nics
        place = Place(
            device=nic.name,
            source=nic.v4,
            pin=f"ifhost!{nic.name}!{nic.v4}",
            crowd=crowd.name,
            host=lab.target_v4,
            port=HOLD_PORT,
            names=NAMES,
            keep=False,
        )
        lab.near.ip(*(f"address add {address}/32 dev {crowd.name}" for address in place.crowd_addresses))
        with lab.far:
            hold, http = (
                stack.enter_context(socket.create_server(("", port), backlog=4096)) for port in (HOLD_PORT, HTTP_PORT)
            )
        stack.enter_context(serving(programs.get("c"), hold, http))
        yield Setting(lab, place, programs)


def cases(
    here: Setting, columns: dict[str, Load], peers: Sequence[str] = (), meter: Meter = CPU
) -> tuple[list[Case], dict[str, str]]:
    """Return what fills *columns*, and why others cannot."""
    found: list[Case] = []
    skipped: dict[str, str] = {}
    for workload in dict.fromkeys(load.workload for load in columns.values()):
        port = HTTP_PORT if workload in ("get", "keepalive") else HOLD_PORT
        place = replace(here.place, port=port, keep=workload == "keepalive")
        loads = [(column, load.at_once) for column, load in columns.items() if load.workload == workload]
        for label, peer in WORKLOADS[workload].items():
            if peers and label not in peers:
                continue
            fills = tuple((column, at_once) for column, at_once in loads if peer.many or at_once == 1)
            for loop in peer.loops:
                if lacking := missing(peer, loop, here.programs, meter):
                    skipped[label] = lacking
                else:
                    found.append(Case(label, loop, command(here, peer, (workload, label, loop), place), fills))
    return found, skipped


def missing(peer: Peer, loop: str, programs: dict[str, str], meter: Meter) -> str:
    """Return why *peer* cannot run here, or nothing."""
    if peer.start == "go" and meter is INSTRUCTIONS:
        return "callgrind cannot run it: the stacks of Go are none that it knows"
    if isinstance(peer.start, str):
        return "" if peer.start in programs else f"{peer.start} was not compiled"
    needs = (*peer.needs, "uvloop") if loop == "uvloop" else peer.needs
    lacking = [module for module in needs if find_spec(module) is None]
    return f"{', '.join(lacking)} is not installed" if lacking else ""


def command(here: Setting, peer: Peer, names: tuple[str, str, str], place: Place) -> tuple[str, ...]:
    """Return the command of a worker, for (workload, label, loop)."""
    if isinstance(peer.start, str):
        return (here.programs[peer.start], names[0], place.device, place.source, place.host, str(place.port))
    return (sys.executable, "-m", "bench.peers", *names, json.dumps(asdict(place)))


# --- the tables ---------------------------------------------------------------------------------------------


def measure(quick: bool, only: Sequence[str] = (), peers: Sequence[str] = ()) -> Iterator[Table]:
    with setting(("c",) if quick else ("c", "go")) as here:  # Go may take half a minute to compile
        for name in only or SHEETS:
            result = filled(here, name, peers, quick=quick)
            yield result
            if name == "connect":
                yield replace(result, name="connect-floor", title=f"{result.title}, beside a C loop", baseline="C loop")


def filled(here: Setting, name: str, peers: Sequence[str], *, quick: bool) -> Table:
    sheet = SHEETS[name]
    note = sheet.note
    if "c" not in here.programs:
        note += " The server is in Python, for there is no C compiler."
    result = Table(
        name,
        sheet.title,
        sheet.meter.unit,
        list(sheet.columns),
        baseline=sheet.baseline,
        note=note.strip(),
        axis=sheet.axis,
    )
    found, result.skipped = cases(here, sheet.columns, peers, sheet.meter)
    if quick and sheet.quick and not peers:
        labels = {label for label, _ in sheet.quick}
        result.skipped |= {case.label: "left out by --quick" for case in found if case.label not in labels}
        found = [case for case in found if (case.label, case.loop) in sheet.quick]
    if reason := sheet.meter.unusable():
        result.skipped |= dict.fromkeys((case.label for case in found), reason)
    else:
        sheet.meter.measure(found, result, QUICK if quick else FULL)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", action="append", default=[], choices=SHEETS)
    parser.add_argument("--peer", action="append", default=[])
    options, others = parser.parse_known_args()

    def chosen(quick: bool) -> Iterator[Table]:
        return measure(quick, options.only, options.peer)

    table.main(chosen, others)
