"""The lab tells the truth: what leaves by which NIC, and nothing of it stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop
from blockbuster import BlockingError

from aiobind import lab as aiobind_lab
from aiobind.lab import Lab, Namespace, available, replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiobind.lab import Nic, Packet, Witness

ROOT = Path(__file__).parent.parent
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
both_families = pytest.mark.parametrize("version", [4, 6])


def where() -> int:
    """Name the namespace of this thread."""
    return os.stat("/proc/thread-self/ns/net").st_ino


def addresses(lab: Lab, nic: Nic, version: int) -> tuple[str, str]:
    return (nic.v4, lab.target_v4) if version == 4 else (nic.v6, lab.target_v6)


@contextlib.contextmanager
def server(lab: Lab, address: str, port: int = 80) -> Iterator[socket.socket]:
    with lab.far:
        listener = socket.create_server((address, port), family=FAMILIES[6 if ":" in address else 4], backlog=512)
    with listener:
        yield listener


def connect(target: str, *, device: str = "", source: str = "", port: int = 80) -> str:
    """Connect once and return the source address that the kernel took."""
    with socket.socket(FAMILIES[6 if ":" in target else 4]) as sock:
        sock.settimeout(3)
        if device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        if source:
            sock.bind((source, 0))
        sock.connect((target, port))
        return str(sock.getsockname()[0])


def python(code: str) -> str:
    """Run *code* in a Python of its own, with the lab imported as ``lab``, and return what it prints."""
    preamble = "import asyncio, ctypes, encodings.idna, os, socket, sys, threading\nfrom aiobind import lab\n"
    run = subprocess.run([sys.executable, "-c", preamble + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


#: Lose all privilege. Linux then gives /proc/self to root, until the process is "dumpable" again.
NOBODY = "os.setgroups([]); os.setgid(65534); os.setuid(65534); ctypes.CDLL(None).prctl(4, 1)\n"


@pytest.fixture
def as_nobody(lab: Lab) -> Callable[[str], str]:
    if os.getuid() != 0 or len(Path("/proc/self/uid_map").read_text().split()[2]) < 5:
        pytest.skip("only root can become somebody else")
    return lambda code: python(NOBODY + code)


# --- namespaces ---------------------------------------------------------------------------------------------


def test_namespaces_nest_and_return(lab: Lab) -> None:
    near = where()
    with lab.far:
        far = where()
        assert far != near
        with lab.near, lab.near:
            assert where() == near
            with lab.far:
                assert where() == far
            assert where() == near
        assert where() == far
    assert where() == near


def test_a_namespace_is_left_by_an_exception_too(lab: Lab) -> None:
    before = where()
    with pytest.raises(ZeroDivisionError), lab.far:
        _ = 1 / 0
    assert where() == before


def test_only_the_calling_thread_moves_and_finds_its_own_way_back(lab: Lab) -> None:
    found: list[int] = []
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with lab.near:
            found.append(where())
            inside.set()
            leave.wait(5)
        found.append(where())

    near = where()
    with lab.far:
        far = where()
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(5)
        assert where() == far
    assert where() == near
    leave.set()
    thread.join()
    assert found == [near, far]


def test_what_is_no_namespace_is_refused(lab: Lab) -> None:
    no_namespace = Namespace(os.open("/dev/null", os.O_RDONLY))
    before = open_fds(), where()
    with pytest.raises(OSError, match="setns: Invalid argument"), no_namespace:
        pass
    assert before == (open_fds(), where())
    no_namespace.close()


def test_a_new_namespace_has_lo_up_and_nothing_else(lab: Lab) -> None:
    before = where()
    with contextlib.closing(Namespace.new()) as new:
        assert where() == before
        with new:
            assert [name for _, name in socket.if_nameindex()] == ["lo"]
            with socket.create_server(("127.0.0.1", 0)) as listener:
                socket.create_connection(listener.getsockname(), timeout=1).close()


def test_ip_returns_what_ip_prints_and_raises_what_it_says(lab: Lab) -> None:
    assert "n1" in lab.near.ip("link show n1")
    with pytest.raises(RuntimeError, match=r'Cannot find device "n9"(.|\n)*:2') as caught:
        lab.near.ip("link set n1 up", "link set n9 up")
    assert caught.value.__notes__ == ["link set n1 up\nlink set n9 up"]
    assert where() == os.fstat(lab.near.fileno()).st_ino


def test_a_sysctl_is_of_one_namespace(lab: Lab) -> None:
    ports = Path("/proc/sys/net/ipv4/ip_local_port_range")
    with lab.far:
        before = ports.read_text()
    lab.near.sysctl("ipv4.ip_local_port_range", "5000 5009")
    assert ports.read_text().split() == ["5000", "5009"]
    with lab.far:
        assert ports.read_text() == before


# --- which way ----------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("name", ["n0", "n1", "n2"])
def test_a_pinned_connection_leaves_by_its_nic(lab: Lab, witness: Witness, name: str, version: int) -> None:
    source, target = addresses(lab, lab.nic(name), version)
    with server(lab, target):
        assert connect(target, device=name) == source
    assert {(packet.nic, packet.source, packet.destination) for packet in witness.packets()} == {(name, source, target)}


@both_families
def test_an_unpinned_connection_leaves_by_n0(lab: Lab, witness: Witness, version: int) -> None:
    source, target = addresses(lab, lab.nic("n0"), version)
    with server(lab, target):
        assert connect(target) == source
    assert {(packet.nic, packet.source) for packet in witness.packets()} == {("n0", source)}


@both_families
def test_the_leak_of_an_address_without_a_device_is_seen(lab: Lab, witness: Witness, version: int) -> None:
    source, target = addresses(lab, lab.nic("n1"), version)
    with server(lab, target):
        assert connect(target, source=source) == source  # it succeeds, which is why nobody notices
    assert {(packet.nic, packet.source) for packet in witness.packets()} == {("n0", source)}


def test_link_local_addresses_are_usable_at_once(lab: Lab, witness: Witness) -> None:
    nic = lab.nic("n1")
    with server(lab, "::"):
        assert connect(nic.gateway_link_local, device="n1") == nic.link_local
    assert {packet.nic for packet in witness.packets()} == {"n1"}


def test_every_nic_of_many_works_at_once(make_lab: Callable[[int], Lab]) -> None:
    lab = make_lab(64)
    witness = lab.witness(syn_only=True)
    with server(lab, lab.target_v4), server(lab, lab.target_v6):
        for nic in lab.nics:
            connect(lab.target_v4, device=nic.name)
            connect(lab.target_v6, device=nic.name)
    seen = Counter((packet.nic, packet.source) for packet in witness.packets())
    assert seen == Counter((nic.name, source) for nic in lab.nics for source in (nic.v4, nic.v6))


@pytest.mark.parametrize("target", ["198.51.100.9", "2001:db8:fffe::9"])
def test_more_targets(lab: Lab, witness: Witness, target: str) -> None:
    with pytest.raises(OSError, match="assign"):
        server(lab, target).__enter__()
    lab.add_target(target)
    with server(lab, target):
        connect(target, device="n2")
    assert {(packet.nic, packet.destination) for packet in witness.packets()} == {("n2", target)}


def test_the_next_nic_takes_over_when_a_link_goes_down(lab: Lab, witness: Witness) -> None:
    lab.near.ip("link set n0 down")
    with server(lab, lab.target_v4):
        assert connect(lab.target_v4) == lab.nic("n1").v4
    assert {packet.nic for packet in witness.packets()} == {"n1"}


@pytest.mark.anyio
async def test_both_ends_share_one_event_loop(lab: Lab, witness: Witness) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    with lab.far:
        listener = socket.create_server((lab.target_v4, 80))
    async with await asyncio.start_server(echo, sock=listener):
        reader, writer = await asyncio.open_connection(lab.target_v4, 80)
        writer.write(b"hello")
        writer.write_eof()
        assert await reader.read() == b"hello"
        writer.close()
        await writer.wait_closed()
    assert [packet.nic for packet in witness.packets() if packet.syn] == ["n0"]


# --- the witness --------------------------------------------------------------------------------------------


def test_the_witness_reports_udp_and_the_ports(lab: Lab, witness: Witness) -> None:
    expected: list[Packet] = []
    for version in (4, 6):
        source, target = addresses(lab, lab.nics[0], version)
        with socket.socket(FAMILIES[version], socket.SOCK_DGRAM) as sock:
            sock.bind((source, 5555))
            sock.sendto(b"?", (target, 53))
        expected.append(aiobind_lab.Packet("n0", source, target, 5555, 53, "udp", syn=False))
    assert witness.packets() == expected
    assert witness.packets() == []


def test_the_witness_tells_the_syn_from_the_rest(lab: Lab, witness: Witness) -> None:
    syn_only = lab.witness(syn_only=True)
    for target in (lab.target_v4, lab.target_v6):
        with server(lab, target):
            connect(target)
            with socket.socket(FAMILIES[6 if ":" in target else 4], socket.SOCK_DGRAM) as sock:
                sock.sendto(b"?", (target, 53))
    everything = witness.packets()
    assert len([packet for packet in everything if not packet.syn]) > 2
    assert syn_only.packets() == [packet for packet in everything if packet.syn]
    assert len({packet.destination for packet in everything if packet.syn}) == 2


@both_families
def test_the_answer_to_a_syn_is_none(lab: Lab, witness: Witness, version: int) -> None:
    syn_only = lab.witness(syn_only=True)
    source, _ = addresses(lab, lab.nic("n1"), version)
    with socket.create_server((source, 80), family=FAMILIES[version]), lab.far:
        connect(source)  # from far to near
    answers = witness.packets()
    assert [packet.sport for packet in answers][:1] == [80]
    assert not any(packet.syn for packet in answers)
    assert syn_only.packets() == []


def test_what_the_far_side_sends_did_not_arrive_there(lab: Lab, witness: Witness) -> None:
    with lab.far, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"!", (lab.nic("n1").v4, 9))
    assert witness.packets() == []


def test_a_witness_that_missed_packets_says_so(lab: Lab, witness: Witness) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((lab.target_v4, 9))
        for _ in range((1 << 15) + 100):
            with contextlib.suppress(ConnectionRefusedError):
                sock.send(b"")
    with pytest.raises(RuntimeError, match=r"missed 1\d\d packets"):
        witness.packets()
    connect_refused = socket.socket()
    with connect_refused, pytest.raises(ConnectionRefusedError):
        connect_refused.connect((lab.target_v4, 9))
    assert [packet.syn for packet in witness.packets()] == [True]  # and goes on


def test_a_nic_that_comes_back_is_recognised(lab: Lab, witness: Witness) -> None:
    far = f"/proc/{os.getpid()}/fd/{lab.far.fileno()}"
    lab.near.ip(
        "link del n2",
        f"link add n2 type veth peer f2 netns {far}",
        "addr add 198.18.2.2/24 dev n2",
        "link set n2 up",
    )
    lab.far.ip("addr add 198.18.2.1/24 dev f2", "link set f2 up")
    with server(lab, "198.18.2.1"):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # the link needs a moment to come up
                connect("198.18.2.1")
                break
    assert {packet.nic for packet in witness.packets()} == {"n2"}


# --- nothing stays behind -----------------------------------------------------------------------------------


def open_fds() -> dict[str, str]:
    links: dict[str, str] = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return links


@pytest.mark.usefixtures("make_lab")  # for its skip
def test_everything_is_closed_and_undone() -> None:
    before = open_fds(), where(), Path("/proc/self/mounts").read_text()
    with Lab(2) as lab, lab.witness() as witness:
        lab.witness()  # closed with the lab
        connect_failed = socket.socket()
        with connect_failed, pytest.raises(ConnectionRefusedError):
            connect_failed.connect((lab.target_v4, 1))
        assert witness.packets()
        assert where() != before[1]
    assert before == (open_fds(), where(), Path("/proc/self/mounts").read_text())


@pytest.mark.usefixtures("make_lab")
@pytest.mark.parametrize("calls", range(6))
def test_a_lab_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    before = open_fds(), where()
    left, ip = iter(range(calls)), Namespace.ip

    def failing_ip(self: Namespace, *commands: str) -> str:
        if next(left, None) is None:
            raise RuntimeError("out of order")
        return ip(self, *commands)

    monkeypatch.setattr(Namespace, "ip", failing_ip)
    with pytest.raises(RuntimeError, match="out of order"), Lab(2):
        pass
    assert before == (open_fds(), where())


def test_too_many_nics() -> None:
    with pytest.raises(ValueError, match="256 NICs, not 257"):
        Lab(257)


# --- the process --------------------------------------------------------------------------------------------


def test_nobody_builds_a_lab_by_a_user_namespace(as_nobody: Callable[[str], str]) -> None:
    printed = as_nobody(
        "lab.isolate()\n"
        "with lab.Lab(2) as l, l.witness() as w:\n"
        "    with l.far: server = socket.create_server((l.target_v4, 80))\n"
        "    sock = socket.socket(); sock.setsockopt(1, 25, b'n1'); sock.connect((l.target_v4, 80))\n"
        "    print(w.packets()[0].nic, sock.getsockname()[0], sorted(os.listdir('/sys/class/net')))\n"
        "    with lab.replace_file('/etc/hosts', '192.0.2.1 somewhere.test'):\n"
        "        print(socket.gethostbyname('somewhere.test'))\n"
    )
    assert printed == "n1 198.18.1.2 ['lo', 'n0', 'n1']\n192.0.2.1\n"


def test_without_isolation_the_error_says_what_to_call(as_nobody: Callable[[str], str]) -> None:
    printed = as_nobody(
        "fds = os.listdir('/proc/self/fd')\n"
        "try: lab.Lab().__enter__()\n"
        "except PermissionError as exc: print(exc.strerror, os.listdir('/proc/self/fd') == fds)\n"
    )
    assert printed == "unshare: Operation not permitted; call aiobind.lab.isolate() first True\n"


def test_the_error_names_the_setting_that_forbids(as_nobody: Callable[[str], str]) -> None:
    printed = as_nobody(
        "lab.isolate()\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"  # of the user namespace, not the host
        "import struct\n"
        "ctypes.CDLL(None).capset(struct.pack('Ii', 0x20080522, 0), bytes(24))\n"
        "try: lab.isolate()\n"
        "except OSError as exc: print(exc.strerror)\n"
    )
    assert printed.startswith("isolate: unshare: ")
    assert "user.max_user_namespaces=0" in printed


def test_isolate_refuses_to_leave_threads_behind() -> None:
    printed = python(
        "before = os.stat('/proc/self/ns/net').st_ino, os.stat('/proc/self/ns/mnt').st_ino\n"
        "stop = threading.Event(); threading.Thread(target=stop.wait).start()\n"
        "try: lab.isolate()\n"
        "except OSError as exc: print(exc.errno, exc.strerror)\n"
        "print(before == (os.stat('/proc/self/ns/net').st_ino, os.stat('/proc/self/ns/mnt').st_ino))\n"
        "stop.set()\n"
    )
    assert printed == "22 isolate: 2 threads are running; call it before they start\nTrue\n"


@pytest.mark.usefixtures("make_lab")
def test_what_an_isolated_process_mounts_is_seen_by_no_other() -> None:
    printed = python(
        "lab._call('unshare', 0x20000)\n"
        "lab._call('mount', None, b'/', None, 0x104000, None)\n"  # MS_REC | MS_SHARED, as systemd has it
        "if os.fork(): os.wait(); os._exit(0)\n"
        "lab.isolate()\n"
        "with lab.replace_file('/etc/hosts', 'mine'):\n"
        "    for root in ('', f'/proc/{os.getppid()}/root'): print(open(f'{root}/etc/hosts').read() == 'mine')\n"
    )
    assert printed == "True\nFalse\n"


@pytest.mark.usefixtures("make_lab")
def test_available_tries_and_says_what_is_missing() -> None:
    assert available() is None
    with replace_file(aiobind_lab._ip_command(), ""):
        assert "ip command of iproute2" in str(available())
    assert available() is None


@pytest.mark.usefixtures("make_lab")
def test_a_file_is_replaced_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Path("/etc/hosts")
    before = hosts.read_text()
    with replace_file("/etc/hosts", "first"):
        with replace_file("/etc/hosts", "second"):
            assert subprocess.check_output(["cat", "/etc/hosts"]) == b"second"
        assert hosts.read_text() == "first"
    assert hosts.read_text() == before
    monkeypatch.setattr(aiobind_lab, "_isolated", False)
    with pytest.raises(PermissionError, match=r"isolate\(\) first"), replace_file("/etc/hosts", ""):
        pass


# --- the command --------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "aiobind.lab"]
FETCH = """
import http.client, socket, sys
for device in ("", "n1"):
    sock = socket.socket()
    if device: sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    sock.connect((socket.getaddrinfo("target.test", 80, socket.AF_INET)[0][4]))
    connection = http.client.HTTPConnection("target.test"); connection.sock = sock
    connection.request("GET", "/"); print(*connection.getresponse().read().decode().split()[0::4])
sys.exit(7)
"""


@pytest.mark.usefixtures("make_lab")
def test_the_command_runs_a_program_between_two_nics() -> None:
    command = [*COMMAND, "--nics", "2", "--", sys.executable, "-c", FETCH]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (7, "198.18.0.2 n0\n198.18.1.2 n1\n"), run.stderr
    table = [line.split() for line in run.stderr.splitlines()[-3:]]
    assert table == [["nic", "source", "SYNs"], ["n0", "198.18.0.2", "1"], ["n1", "198.18.1.2", "1"]]


@pytest.mark.usefixtures("make_lab")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 128 + signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_the_command_outlives_its_program(number: signal.Signals, status: int) -> None:
    command = [*COMMAND, "sh", "-c", "echo ready; exec sleep 20"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as the terminal does at Ctrl-C
        else:
            process.send_signal(number)  # to the command, which passes it on
        _, errors = process.communicate(timeout=10)
    assert process.returncode == status
    assert b"SYNs" in errors
    assert b"Traceback" not in errors


@pytest.mark.usefixtures("make_lab")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nics=300"], "a lab has up to 256 NICs, not 300"),
        (["/no/such/program"], "No such file or directory"),
    ],
)
def test_the_command_says_what_went_wrong(arguments: list[str], message: str) -> None:
    run = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("aiobind.lab: ")
    assert message in run.stderr
    assert "Traceback" not in run.stderr


# --- what conftest.py gives to every test -------------------------------------------------------------------


def test_without_capabilities_a_pin_cannot_be_changed(no_capabilities: None, lab: Lab) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"n1")  # the first one is free since Linux 5.7
        with pytest.raises(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"n2")
    with lab.far, socket.create_server((lab.target_v4, 80)):
        pass
    with pytest.raises(PermissionError):
        lab.near.sysctl("ipv4.ip_forward", 1)


def test_capabilities_come_back(lab: Lab) -> None:
    with socket.socket() as sock:
        for name in (b"n1", b"n2"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name)


@pytest.mark.anyio
async def test_the_loop_is_the_one_that_is_named(request: pytest.FixtureRequest) -> None:
    loop, name = asyncio.get_running_loop(), request.node.callspec.id
    assert isinstance(loop, uvloop.Loop) == (name == "uvloop")
    if name == "eager":
        assert loop.get_task_factory() is asyncio.eager_task_factory


@pytest.mark.anyio
@pytest.mark.parametrize(
    "call", [lambda: time.sleep(0), lambda: socket.getaddrinfo("localhost", 1)], ids=["sleep", "getaddrinfo"]
)
async def test_blocking_on_the_loop_fails_a_test(call: Callable[[], object]) -> None:
    with pytest.raises(BlockingError):
        call()
    await asyncio.to_thread(call)


@pytest.mark.anyio
async def test_names_are_looked_up_as_the_test_says(resolv_conf: Callable[..., None]) -> None:
    resolv_conf("nameserver 192.0.2.53\n", hosts="192.0.2.1 somewhere.test\n")
    found = await asyncio.get_running_loop().getaddrinfo("somewhere.test", 80, type=socket.SOCK_STREAM)
    assert found[0][4] == ("192.0.2.1", 80)


GUARDED = """
import asyncio, pytest, socket, threading
pytestmark = pytest.mark.anyio
kept = []
async def test_fd(): kept.append(socket.socket())
async def test_task(): kept.append(asyncio.create_task(asyncio.sleep(9)))
async def test_thread(): threading.Thread(target=threading.Event().wait, daemon=True).start()
async def test_failed(): kept.append(socket.socket()); raise KeyError
def test_lab(lab): pass
"""


def run_guarded(path: Path, *names: str, ci: str = "") -> str:
    """Run some of GUARDED in a pytest of its own, under our conftest.py."""
    (path / "test_guarded.py").write_text(GUARDED)
    (path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(path)]
    command = [sys.executable, "-m", "pytest", *options, *(f"{path}/test_guarded.py::{name}" for name in names)]
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "CI": ci}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False).stdout


def test_a_leak_fails_a_test(tmp_path: Path) -> None:
    printed = run_guarded(tmp_path, "test_fd[asyncio]", "test_task[asyncio]", "test_thread[uvloop]")
    for what in ("file descriptors", "tasks", "threads"):
        assert f"Failed: {what} left behind" in printed
    assert "3 passed, 3 errors" in printed


def test_a_failed_test_is_not_accused_of_leaks_as_well(tmp_path: Path) -> None:
    printed = run_guarded(tmp_path, "test_failed[asyncio]")
    assert "KeyError" in printed
    assert "left behind" not in printed


@pytest.mark.usefixtures("make_lab")
@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_a_missing_lab_skips_a_test_and_fails_it_in_ci(tmp_path: Path, ci: str, outcome: str) -> None:
    with replace_file(aiobind_lab._ip_command(), ""):
        printed = run_guarded(tmp_path, "test_lab", ci=ci)
    assert outcome in printed
    assert "no lab: " in printed
    assert "the lab needs the ip command of iproute2" in printed
