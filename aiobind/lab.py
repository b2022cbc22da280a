"""Law: several NICs in one process. A socket belongs to the network namespace in which it was created.

The lab is a *near* network namespace with NICs ``n0``, ``n1``, ... and a *far* one with their other ends:

    near                                     far
      n0   198.18.0.2   2001:db8::2     ──     f0   198.18.0.1     2001:db8::1
      n1   198.18.1.2   2001:db8:1::2   ──     f1   198.18.1.1     2001:db8:1::1
      ...                                      lo   203.0.113.80   2001:db8:ffff::80   (the targets)

Near has a default route by every NIC, ``n0``'s first: an unpinned connection leaves by ``n0``, a pinned one
by its own. No filter stops asymmetric paths: a leak is seen, not hidden. A server of the far side is a
listening socket created in ``with lab.far:`` (never await inside) and served by the same event loop; a
witness on the far side tells by which NIC each packet came:

    isolate()                                # not needed by root
    with Lab(nics=2) as lab, lab.witness() as witness:
        with lab.far:
            server = socket.create_server((lab.target_v4, 80))
        ...                                  # connect to (lab.target_v4, 80)
        print(Counter((packet.nic, packet.source) for packet in witness.packets() if packet.syn))

``python -m aiobind.lab COMMAND`` runs a program in such a place. All this needs Linux, the ``ip`` command,
and root or user namespaces; ``available()`` says what is missing. A thread stays in the namespace in which it
was started: a pool of threads that outlives a lab (a resolver's, uvloop's own) still looks at the old one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import errno
import functools
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["Lab", "Namespace", "Nic", "Packet", "Witness", "available", "isolate", "replace_file"]

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x1000, 0x4000, 0x40000, 2
_NET_OF_THREAD = "/proc/thread-self/ns/net"  # /proc/self would be the main thread's


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes | None) -> None:
    """Call libc's *name* (os.unshare and os.setns exist from Python 3.12 only, os.mount not at all)."""
    if getattr(_libc(), name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


# --- the process: a private base to build labs on -----------------------------------------------------------

#: What forbids user namespaces, by the file below /proc/sys and the value that does.
_FORBIDDING = {
    "kernel/apparmor_restrict_unprivileged_userns": "1",  # Ubuntu 23.10 and later
    "kernel/unprivileged_userns_clone": "0",  # Debian 10 and earlier, hardened kernels
    "user/max_user_namespaces": "0",  # RHEL 7, some containers
}
_isolated = False


def isolate() -> None:
    """Move this process to network and mount namespaces of its own, as root of a user namespace if need be.

    From then on it may build labs, set ``net.*`` sysctls and mount, and the host sees none of it. Call it
    early, and ``available()`` before it: when one step is refused, the steps before it are not undone.

    Raises:
        OSError: EINVAL when other threads are running (they would stay behind); EPERM, EACCES or ENOSPC when
            the kernel refuses, with the setting that forbids it; ENOENT when there is no ``ip`` command.
    """
    global _isolated  # noqa: PLW0603 - it is a fact about the process
    _ip_command()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise OSError(errno.EINVAL, f"isolate: {threads} threads are running; call it before they start")
    uid, gid = os.geteuid(), os.getegid()
    try:
        try:
            _call("unshare", _CLONE_NEWNET | _CLONE_NEWNS)
        except PermissionError:
            _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWNS)
            _write("/proc/self/setgroups", "deny")  # without this gid_map is refused
            _write("/proc/self/uid_map", f"0 {uid} 1")
            _write("/proc/self/gid_map", f"0 {gid} 1")
        _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    except OSError as exc:
        raise OSError(exc.errno, f"isolate: {exc.strerror}; {_what_forbids()}") from exc
    _isolated = True
    with contextlib.closing(Namespace.current()) as base:
        base.ip("link set lo up")


def _what_forbids() -> str:
    for name, value in _FORBIDDING.items():
        with contextlib.suppress(OSError):
            if Path("/proc/sys", name).read_text().strip() == value:
                return f"{name.replace('/', '.')}={value} forbids it: change that, or be root"
    return "it takes root with CAP_SYS_ADMIN, or user namespaces (containers often forbid both)"


def available() -> str | None:
    """Return why no lab can be made here, even after ``isolate()``, or None. It tries, in a child process."""
    if sys.platform != "linux":
        return "the lab needs Linux: network namespaces"
    command = [sys.executable, "-I", __file__, "--nics=1", "true"]
    trial = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if trial.returncode == 0:
        return None
    return (trial.stderr.splitlines() or [f"exit status {trial.returncode}"])[-1].removeprefix("aiobind.lab: ")


@contextlib.contextmanager
def replace_file(path: str, text: str) -> Generator[None]:
    """Show *text* to this process and its children as the content of *path*, such as ``/etc/resolv.conf``.

    Raises:
        OSError: EPERM when ``isolate()`` has not been called, because the whole host would see it; ENOENT
            when there is no such file.
    """
    if not _isolated:
        raise PermissionError(errno.EPERM, f"replace {path}: call aiobind.lab.isolate() first")
    with tempfile.NamedTemporaryFile("w", prefix="aiobind-lab-") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        with _mounted(file.name, path, flags=_MS_BIND):
            yield


@contextlib.contextmanager
def _mounted(source: str, target: str, kind: str = "", flags: int = 0) -> Generator[None]:
    _call("mount", source.encode(), target.encode(), kind.encode(), flags, None)
    try:
        yield
    finally:
        _call("umount2", target.encode(), _MNT_DETACH)


def _write(path: str, text: str) -> None:
    Path(path).write_bytes(text.encode())


# --- one network namespace ----------------------------------------------------------------------------------


class _CameFrom(threading.local):
    """The namespaces that this thread has left by ``with``, outermost first."""

    def __init__(self) -> None:
        self.fds: list[int] = []


_came_from = _CameFrom()


class Namespace:
    """A network namespace, held by a file descriptor; ``with namespace:`` moves the thread in and back.

    It lives until it is closed and its last socket and thread are gone.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def current(cls) -> Namespace:
        """Return the namespace of the calling thread."""
        return cls(os.open(_NET_OF_THREAD, os.O_RDONLY | os.O_CLOEXEC))

    @classmethod
    def new(cls) -> Namespace:
        """Return a new namespace, with ``lo`` up and nothing else; the calling thread stays where it is.

        Raises:
            OSError: EPERM without CAP_SYS_ADMIN, which ``isolate()`` gives.
        """
        with contextlib.closing(cls.current()) as here:
            try:
                _call("unshare", _CLONE_NEWNET)
            except PermissionError as exc:
                raise PermissionError(exc.errno, f"{exc.strerror}; call aiobind.lab.isolate() first") from exc
            try:
                namespace = cls.current()
            finally:
                _call("setns", here.fileno(), _CLONE_NEWNET)
        with contextlib.ExitStack() as undo:
            undo.callback(namespace.close)
            namespace.ip("link set lo up")
            undo.pop_all()
        return namespace

    def __enter__(self) -> Self:
        previous = os.open(_NET_OF_THREAD, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call("setns", self._fd, _CLONE_NEWNET)
        except BaseException:
            os.close(previous)
            raise
        _came_from.fds.append(previous)
        return self

    def __exit__(self, *_: object) -> None:
        previous = _came_from.fds.pop()
        try:
            _call("setns", previous, _CLONE_NEWNET)
        finally:
            os.close(previous)

    def fileno(self) -> int:
        """Return the file descriptor that holds the namespace."""
        return self._fd

    def ip(self, *commands: str) -> str:
        """Run each command as ``ip`` would (``"link set n1 down"``), in one process; return what they print.

        Raises:
            RuntimeError: at the first command that fails, with what ``ip`` says of it.
        """
        with self:
            batch, lines = [_ip_command(), "-batch", "-"], "\n".join(commands)
            run = subprocess.run(batch, input=lines, capture_output=True, text=True, check=False)
        if run.returncode:
            error = RuntimeError(f"ip: {run.stderr.strip()}")
            error.add_note(lines)
            raise error
        return run.stdout

    def sysctl(self, name: str, value: object) -> None:
        """Set ``net.NAME`` of this namespace: ``sysctl("ipv4.ip_local_port_range", "5000 5999")``."""
        with self:
            _write(f"/proc/sys/net/{name.replace('.', '/')}", str(value))

    def close(self) -> None:
        """Let go of the namespace."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@functools.cache
def _ip_command() -> str:
    found = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "the lab needs the ip command of iproute2")
    return found


# --- the lab ------------------------------------------------------------------------------------------------


class Nic(NamedTuple):
    """A NIC of the near namespace and the other end of its link, which is its gateway."""

    name: str
    v4: str
    v6: str
    link_local: str
    far_name: str
    gateway_v4: str
    gateway_v6: str
    gateway_link_local: str


class Lab:
    """A near and a far namespace, connected by NICs; entering builds them and moves the thread into near.

    Args:
        nics: how many, up to 256.

    Attributes:
        near: the namespace with the NICs; ``near.ip("link set n1 down")`` changes their state.
        far: the namespace of the targets.
        nics: the NICs, in the order of preference of their routes.
        target_v4: an address of far that every NIC reaches.
        target_v6: the same for IPv6.
    """

    target_v4 = "203.0.113.80"
    target_v6 = "2001:db8:ffff::80"
    near: Namespace
    far: Namespace
    nics: tuple[Nic, ...]

    def __init__(self, nics: int = 3) -> None:
        if not 0 <= nics <= 256:
            raise ValueError(f"a lab has up to 256 NICs, not {nics}")
        self._count = nics
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.far = stack.enter_context(contextlib.closing(Namespace.new()))
            self.near = stack.enter_context(contextlib.closing(Namespace.new()))
            self._connect()
            stack.enter_context(self.near)
            if _isolated:  # /sys/class/net shows the namespace in which /sys was mounted
                with contextlib.suppress(OSError):
                    stack.enter_context(_mounted("sysfs", "/sys", "sysfs"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _connect(self) -> None:
        for namespace in (self.near, self.far):
            # A new namespace inherits the IPv4 settings of the host, and distributions set rp_filter=2.
            for scope in ("all", "default"):
                namespace.sysctl(f"ipv4.conf.{scope}.rp_filter", 0)
            # Duplicate address detection would leave every address tentative, hence unusable, for a second.
            namespace.sysctl("ipv6.conf.default.accept_dad", 0)
        self.far.sysctl("ipv4.ip_unprivileged_port_start", 0)  # servers on port 80 without capabilities
        far_fd = f"/proc/{os.getpid()}/fd/{self.far.fileno()}"
        ends = [(i, f"198.18.{i}.", str(ip_address(f"2001:db8:{i:x}::"))) for i in range(self._count)]
        self.near.ip(
            *(f"link add n{i} type veth peer name f{i} netns {far_fd}" for i, _, _ in ends),
            *(f"addr add {v4}2/24 dev n{i}" for i, v4, _ in ends),
            *(f"addr add {v6}2/64 dev n{i} nodad" for i, _, v6 in ends),
        )
        self.far.ip(
            *(f"addr add {v4}1/24 dev f{i}" for i, v4, _ in ends),
            *(f"addr add {v6}1/64 dev f{i} nodad" for i, _, v6 in ends),
            *(f"link set f{i} up" for i, _, _ in ends),
        )
        self.near.ip(
            *(f"link set n{i} up" for i, _, _ in ends),
            *(f"route add default via {v4}1 dev n{i} metric {1000 + i}" for i, v4, _ in ends),
            *(f"route add default via {v6}1 dev n{i} metric {1000 + i}" for i, _, v6 in ends),
        )
        self.add_target(self.target_v4)
        self.add_target(self.target_v6)
        near, far = self._link_locals(self.near), self._link_locals(self.far)
        self.nics = tuple(
            Nic(f"n{i}", f"{v4}2", f"{v6}2", near[f"n{i}"], f"f{i}", f"{v4}1", f"{v6}1", far[f"f{i}"])
            for i, v4, v6 in ends
        )

    def _link_locals(self, namespace: Namespace) -> dict[str, str]:
        """Wait for the link-local address of every NIC: once it is there the link carries packets."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with namespace:
                lines = Path("/proc/thread-self/net/if_inet6").read_text().splitlines()
            found = {
                name: str(ip_address(bytes.fromhex(address)))
                for address, _, _, scope, flags, name in map(str.split, lines)
                if scope == "20" and not int(flags, 16) & 0x40  # link scope; not tentative
            }
            if len(found) == self._count:
                return found
            time.sleep(0.001)
        raise TimeoutError(errno.ETIMEDOUT, "the links of the lab did not come up (is IPv6 disabled?)")

    def nic(self, name: str) -> Nic:
        """Return the NIC of that name."""
        return next(nic for nic in self.nics if nic.name == name)

    def add_target(self, address: str) -> None:
        """Give the far namespace one more address, reachable by every NIC."""
        self.far.ip(f"addr add {address} dev lo" + (" nodad" if ":" in address else ""))

    def witness(self, *, syn_only: bool = False) -> Witness:
        """Watch what arrives at the far end, from now on; closed with the lab at the latest."""
        with self.far:
            witness = Witness({nic.far_name: nic.name for nic in self.nics}, self.far, syn_only=syn_only)
        return self._stack.enter_context(contextlib.closing(witness))


# --- the witness --------------------------------------------------------------------------------------------


class Packet(NamedTuple):
    """A TCP or UDP packet that arrived at the far end of *nic*; ``syn``: it opens a connection."""

    nic: str
    source: str
    destination: str
    sport: int
    dport: int
    protocol: str
    syn: bool


_SOL_PACKET, _PACKET_RX_RING, _PACKET_STATISTICS, _PACKET_VERSION, _TPACKET_V2 = 263, 5, 6, 10, 1
_SO_ATTACH_FILTER, _ETH_P_ALL, _TP_STATUS_USER = 26, 0x0003, 1
_FRAME, _FRAMES, _BLOCK, _BLOCKS = 256, 1 << 15, 1 << 16, 1 << 7  # 32,768 packets in 8 MiB
_TRANSPORTS = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}

#: Classic BPF, in the words of bpf(4): let pass what has SYN and not ACK, in TCP over IPv4 or IPv6.
_SYN_ONLY = (
    (0x30, 0, 0, 0),  # ldb [0]
    (0x74, 0, 0, 4),  # rsh #4: the IP version
    (0x15, 0, 5, 4),  # jeq #4, next, IPv6
    (0x30, 0, 0, 9),  # ldb [9]: the protocol
    (0x15, 0, 9, 6),  # jeq #TCP, next, drop
    (0xB1, 0, 0, 0),  # ldx 4*([0]&0xf)
    (0x50, 0, 0, 13),  # ldb [x + 13]: the flags
    (0x05, 0, 0, 4),  # ja to the test of the flags
    (0x15, 0, 5, 6),  # jeq #6, next, drop
    (0x30, 0, 0, 6),  # ldb [6]: the next header
    (0x15, 0, 3, 6),  # jeq #TCP, next, drop
    (0x30, 0, 0, 53),  # ldb [53]: the flags
    (0x54, 0, 0, 0x12),  # and #SYN|ACK
    (0x15, 1, 0, 2),  # jeq #SYN, keep, next
    (0x06, 0, 0, 0),  # ret #0
    (0x06, 0, 0, 0xFFFF),  # ret all
)


class Witness:
    """A capture of the TCP and UDP packets that arrive in the namespace in which it was made (``packet(7)``).

    It captures to a ring shared with the kernel: with the usual net.core.rmem_max of 212992 a plain packet
    socket held 754 small packets (Linux 6.18), and SO_RCVBUFFORCE is refused in user namespaces.
    """

    def __init__(self, near_names: dict[str, str], namespace: Namespace, *, syn_only: bool = False) -> None:
        self._near_names, self._namespace = near_names, namespace
        self._names: dict[int, str] = {}
        self._frame = 0
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        try:
            if syn_only:
                program = b"".join(struct.pack("HBBI", *line) for line in _SYN_ONLY)
                buffer = ctypes.create_string_buffer(program)
                fprog = struct.pack("HP", len(_SYN_ONLY), ctypes.addressof(buffer))
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V2)
            # This also forgets what came before the filter was in place.
            ring = struct.pack("4I", _BLOCK, _BLOCKS, _FRAME, _FRAMES)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_RX_RING, ring)
            self._ring = mmap.mmap(self._socket.fileno(), _BLOCK * _BLOCKS)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the capture."""
        self._ring.close()
        self._socket.close()

    def packets(self) -> list[Packet]:
        """Return what arrived since the last call, in order; a SYN that was sent twice is there twice.

        Raises:
            RuntimeError: packets were lost because 32,768 were waiting, so that no count would be right.
        """
        arrived: list[Packet] = []
        while True:
            start = self._frame * _FRAME
            (status,) = struct.unpack_from("I", self._ring, start)
            if not status & _TP_STATUS_USER:
                break
            packet = self._parse(self._ring[start : start + _FRAME])
            if packet is not None:
                arrived.append(packet)
            struct.pack_into("I", self._ring, start, 0)  # the frame is the kernel's again
            self._frame = (self._frame + 1) % _FRAMES
        _, lost = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        if lost:
            raise RuntimeError(f"the witness missed {lost} packets: call packets() more often")
        return arrived

    def _parse(self, frame: bytes) -> Packet | None:
        """Read a frame: struct tpacket2_hdr, struct sockaddr_ll at 32, and the IP header at tp_net."""
        (net,) = struct.unpack_from("H", frame, 14)
        index, kind = struct.unpack_from("4xi2xB", frame, 32)
        if kind == socket.PACKET_OUTGOING:
            return None
        ip = frame[net:]
        if ip[0] >> 4 == 4:
            protocol, addresses, transport = ip[9], ip[12:20], ip[(ip[0] & 15) * 4 :]
        elif ip[0] >> 4 == 6:
            protocol, addresses, transport = ip[6], ip[8:40], ip[40:]
        else:
            return None  # ARP
        if protocol not in _TRANSPORTS:
            return None
        half = len(addresses) // 2
        source, destination = str(ip_address(addresses[:half])), str(ip_address(addresses[half:]))
        sport, dport, flags = struct.unpack_from("!HH9xB", transport)
        syn = protocol == socket.IPPROTO_TCP and flags & 0x12 == 2  # not SYN|ACK
        return Packet(self._name(index), source, destination, sport, dport, _TRANSPORTS[protocol], syn)

    def _name(self, index: int) -> str:
        if index not in self._names:
            with self._namespace:
                names = socket.if_nameindex()
            self._names |= {number: self._near_names.get(name, name) for number, name in names}
        return self._names.setdefault(index, f"#{index}")  # deleted before it was ever seen


# --- the command --------------------------------------------------------------------------------------------


class _Board:
    """What the command has done so far: the SYNs by NIC and source, and by which NIC each connection came."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self.syns: Counter[tuple[str, str]] = Counter()
        self._came_by: dict[tuple[str, int], str] = {}

    def look(self) -> None:
        for packet in self._witness.packets():
            self._came_by[packet.source, packet.sport] = packet.nic
            self.syns[packet.nic, packet.source] += 1

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer any HTTP request with the address and the NIC that it came from."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            await reader.readuntil(b"\r\n\r\n")
            self.look()
            host, port = writer.get_extra_info("peername")[:2]
            body = f"{host} port {port} by {self._came_by.get((host, port), '?')}\n"
            head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(f"{head}{body}".encode())
            await writer.drain()
        writer.close()


async def _run(command: list[str], lab: Lab, board: _Board) -> int:
    """Run *command* with a web server on the targets; return its exit status as the shell would."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the terminal sends it to the command as well
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    families = (socket.AF_INET, socket.AF_INET6)
    with lab.far:
        listeners = [socket.create_server(("", 80), family=family, backlog=1024) for family in families]
    servers = [await asyncio.start_server(board.serve, sock=listener) for listener in listeners]
    process = await asyncio.create_subprocess_exec(*command)

    async def pass_on() -> None:
        await ended.wait()
        process.terminate()

    passing_on = loop.create_task(pass_on())
    status = await process.wait()
    passing_on.cancel()
    for server in servers:
        server.close()
    board.look()
    return status if status >= 0 else 128 - status


def main(arguments: list[str] | None = None) -> int:
    """Run a command in a lab; print by which NIC and from which source it has connected."""
    parser = argparse.ArgumentParser(prog="python -m aiobind.lab", description=main.__doc__)
    parser.add_argument("--nics", type=int, default=3, metavar="N", help="how many NICs (default: 3)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the program to run (default: $SHELL)")
    options = parser.parse_args(arguments)
    command: list[str] = options.command[1:] if options.command[:1] == ["--"] else options.command
    hosts = f"127.0.0.1 localhost\n::1 localhost\n{Lab.target_v4} target.test\n{Lab.target_v6} target.test\n"
    try:
        isolate()
        with Lab(options.nics) as lab, replace_file("/etc/hosts", hosts):
            board = _Board(lab.witness(syn_only=True))
            targets = f"http://target.test/ http://{lab.target_v4}/ http://[{lab.target_v6}]/"
            print(f"lab: {options.nics} NICs from n0 on; {targets}", file=sys.stderr)
            status = asyncio.run(_run(command or [os.environ.get("SHELL", "/bin/sh")], lab, board))
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError, ValueError) as exc:
        print(f"aiobind.lab: {exc}", file=sys.stderr)
        return 1
    print(f"{'nic':<8}{'source':<40}SYNs", file=sys.stderr)
    for (nic, source), count in sorted(board.syns.items()) or [(("none", "no connection has left"), 0)]:
        print(f"{nic:<8}{source:<40}{count}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
