"""Law: the interfaces of Linux where netlink is refused: looked at anew when what is known is older than a second.

From procfs, sysfs and ioctls (netdevice(7)), none of which waits for a device. It tells less than netlink does: no
alternative names, and of IPv4 neither scope nor flags. A change is seen within the time to live, by the first who asks
or else by the timer.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import socket
import struct
import time
from contextlib import ExitStack, suppress
from ipaddress import IPv4Address, IPv6Address
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from .base import AddressGone, AddressSeen, LinkGone, LinkSeen, ListEnd
from .linux import libc, link_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aiobind._binding import LinkAddress

    from .base import Record

__all__ = ["Polled"]

_SIOCGIFCONF, _SIOCGIFFLAGS, _SIOCGIFINDEX = 0x8912, 0x8913, 0x8933
_IFCONF, _IFREQ_SIZE = struct.Struct("@iP"), 40 if struct.calcsize("P") == 8 else 32
_IFREQ_SHORT, _IFREQ_INT = struct.Struct("=16xH"), struct.Struct("=16xi")
_IFF_UP, _IFF_LOOPBACK, _IFF_RUNNING = 0x1, 0x8, 0x40
_SCOPES = {0x00: 0, 0x10: 254, 0x20: 253, 0x40: 200}  # of IPv6 (net/ipv6.h), as rtnetlink(7) has it
_NAME = re.compile(rb"^ *([^:\s]+):", re.MULTILINE)
_CLOCK_MONOTONIC, _TFD_NONBLOCK, _TFD_CLOEXEC = 1, os.O_NONBLOCK, os.O_CLOEXEC
_ITIMERSPEC = struct.Struct("@4l")

#: Records that one `read` returns at most, as a datagram of netlink has: a millisecond.
_PIECE = 200


class _Look(NamedTuple):
    """What was there in one moment: the links by index, and the addresses as the system writes them."""

    links: dict[int, LinkSeen]
    v6: frozenset[bytes]  # lines of /proc/net/if_inet6
    v4: frozenset[tuple[int, bytes]]  # the index of the link, and the address


class Polled:
    """A feed that needs no netlink.

    A look takes 0.3 ms with 5 links, and 13 ms with 10,000 addresses, in which the loop does nothing else, and is taken
    twice when something has changed; the records of that come in pieces.

    Args:
        ttl: for so many seconds a look holds.
    """

    announces = False

    def __init__(self, ttl: float = 1.0) -> None:
        self._ttl = ttl
        self._fresh_until = 0.0
        self._must_list = False
        self._pending: Iterator[Record] | None = None
        self._look = _NOTHING
        self._kinds: dict[tuple[int, bytes], str | None] = {}
        self._closing = ExitStack()
        with ExitStack() as opened:
            # Both belong to the network namespace in which they were opened, like a netlink socket.
            self._socket = opened.enter_context(
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            )
            self._files = [_open(f"/proc/thread-self/net/{name}", opened) for name in ("dev", "if_inet6")]
            self._timer = _timerfd()
            opened.callback(os.close, self._timer)
            self._closing = opened.pop_all()

    def fileno(self) -> int:
        """Return the descriptor of a timer that ends when it is time for the next look."""
        return self._timer

    def quiet(self) -> bool:
        """Return whether the last look still holds, and all of it has been read: no system call, 0.1 µs."""
        return self._pending is None and not self._must_list and time.monotonic() < self._fresh_until

    def ask(self) -> None:
        """Have the next `read` begin a list of everything."""
        self._must_list = True

    def read(self) -> list[Record] | None:
        """Return a piece of what has changed since the last look, or of the list; None when there is no more.

        Raises:
            OSError: the system refused.
        """
        due = time.monotonic() >= self._fresh_until
        with suppress(BlockingIOError):
            due = bool(os.read(self._timer, 8))
        if self._must_list:
            self._look = self._stable()
            self._must_list, self._pending = False, _everything(self._look)
        elif self._pending is None and due:
            before, self._look = self._look, self._stable()
            self._pending = _changes(before, self._look) if self._look != before else None
        piece = list(islice(self._pending or (), _PIECE))
        if not piece:
            self._pending = None
        return piece or None

    def close(self) -> None:
        """Close the descriptors."""
        self._closing.close()

    def __del__(self) -> None:
        self.close()  # without the ResourceWarning, as of a netlink socket

    def _stable(self) -> _Look:
        """Look until two looks agree: procfs is read in pages, and what comes or goes meanwhile shifts the rest."""
        began, before = time.monotonic(), self._look
        # First, so that there is a next time also when this one fails.
        _settime(self._timer, _ITIMERSPEC.pack(0, 0, int(self._ttl), int(self._ttl % 1 * 1e9)))
        for _ in range(4):
            look = self._once()
            if look == before:
                break
            before = look
        self._fresh_until = began + self._ttl
        return before

    def _once(self) -> _Look:
        dev, inet6 = (_contents(file) for file in self._files)
        v6, labelled = frozenset(inet6.splitlines()), list(self._v4())
        labels = {label for label, _ in labelled}
        # By the names of the addresses as well, for a sandbox may hide procfs.
        names = {*_NAME.findall(dev), *(line.rsplit(None, 1)[-1] for line in v6)}
        names.update(label.partition(b":")[0].rstrip(b"\0") for label in labels)
        links: dict[int, LinkSeen] = {}
        holders: dict[bytes, int] = {}
        kept = {(link.ifindex, os.fsencode(link.name)) for link in self._look.links.values()}
        self._kinds = {key: kind for key, kind in self._kinds.items() if key in kept}
        for name in names:
            with suppress(OSError):  # it is gone, or it was a label that is no name of an interface
                number = self._ioctl(_SIOCGIFINDEX, name, _IFREQ_INT)
                links[number] = self._link(number, name, self._ioctl(_SIOCGIFFLAGS, name, _IFREQ_SHORT))
                holders[name.ljust(16, b"\0")] = number
        for label in labels - holders.keys():
            # Any text that begins with the name of the interface (ip-address(8)): mostly eth0:1.
            held_by = [name for name in holders if label.startswith(name.rstrip(b"\0"))]
            if held_by:
                holders[label] = holders[max(held_by, key=lambda name: len(name.rstrip(b"\0")))]
        v4 = frozenset((holders[label], packed) for label, packed in labelled if label in holders)
        return _Look(links, v6, v4)

    def _ioctl(self, request: int, name: bytes, answer: struct.Struct) -> int:
        found: int = answer.unpack_from(fcntl.ioctl(self._socket, request, name.ljust(_IFREQ_SIZE, b"\0")))[0]
        return found

    def _v4(self) -> Iterator[tuple[bytes, bytes]]:
        # The kernel takes the lock of all changes for it, as it does for a list by netlink (rtnl_lock in dev_ioctl).
        length, _ = _IFCONF.unpack(fcntl.ioctl(self._socket, _SIOCGIFCONF, _IFCONF.pack(0, 0)))
        buffer = ctypes.create_string_buffer(length + 16 * _IFREQ_SIZE)
        conf = _IFCONF.pack(len(buffer), ctypes.addressof(buffer))
        length, _ = _IFCONF.unpack(fcntl.ioctl(self._socket, _SIOCGIFCONF, conf))
        raw = buffer.raw
        for at in range(0, length, _IFREQ_SIZE):
            yield raw[at : at + 16], raw[at + 20 : at + 24]  # ifr_name (the label), sin_addr

    def _link(self, number: int, name: bytes, flags: int) -> LinkSeen:
        if (number, name) not in self._kinds:
            self._kinds[number, name] = _kind(number, name)
        kind = self._kinds[number, name]
        master = b"" if kind is None else _sysfs(name, "master/ifindex")
        # An ifreq has no room for IFF_LOWER_UP; IFF_RUNNING says the same, but for a link that is dormant (802.1X).
        loopback, up, carrier = (bool(flags & flag) for flag in (_IFF_LOOPBACK, _IFF_UP, _IFF_RUNNING))
        return LinkSeen(number, os.fsdecode(name), loopback, kind or "", int(master or 0), (), up, carrier)


_NOTHING = _Look({}, frozenset(), frozenset())


def _everything(look: _Look) -> Iterator[Record]:
    yield from _changes(_NOTHING, look)
    yield ListEnd(whole=True)


def _changes(before: _Look, after: _Look) -> Iterator[Record]:
    """Yield what leads from one look to the next."""
    for number in before.links.keys() - after.links.keys():
        yield LinkGone(number)
    for number, link in after.links.items():
        if before.links.get(number) != link:
            yield link
    for number, packed in before.v4 - after.v4:
        yield AddressGone(number, IPv4Address(packed))
    gone = before.v6 - after.v6
    # With other flags it is the same address.
    still = {(number, address.ip) for number, address in _v6(after.v6 - before.v6)} if gone else set()
    for number, address in _v6(gone):
        if (number, address.ip) not in still:
            yield AddressGone(number, address.ip)
    for number, packed in after.v4 - before.v4:
        ip = IPv4Address(packed)
        yield AddressSeen(number, link_address(ip, 254 if ip.is_loopback else 0, 0))
    for number, address in _v6(after.v6 - before.v6):
        yield AddressSeen(number, address)


def _v6(lines: Iterable[bytes]) -> Iterator[tuple[int, LinkAddress]]:
    for line in lines:
        address, number, _, scope, flags, _ = line.split()
        ip = IPv6Address(int(address, 16))
        yield int(number, 16), link_address(ip, _SCOPES.get(int(scope, 16), 0), int(flags, 16))


def _open(path: str, opened: ExitStack) -> int | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:  # it is not there, or hidden
        return None
    opened.callback(os.close, file)
    return file


def _contents(file: int | None) -> bytes:
    if file is None:
        return b""
    os.lseek(file, 0, os.SEEK_SET)
    pages: list[bytes] = []
    while page := os.read(file, 1 << 16):
        pages.append(page)
    return b"".join(pages)


def _kind(number: int, name: bytes) -> str | None:
    """Return the kind of a link; None: /sys does not show it, perhaps because it is another namespace's."""
    about = {key: value for key, _, value in (line.partition(b"=") for line in _sysfs(name, "uevent").splitlines())}
    return os.fsdecode(about.get(b"DEVTYPE", b"")) if about.get(b"IFINDEX") == b"%d" % number else None


def _sysfs(name: bytes, attribute: str) -> bytes:
    with ExitStack() as opened:
        return _contents(_open(f"/sys/class/net/{os.fsdecode(name)}/{attribute}", opened))


def _timerfd() -> int:  # os.timerfd_create: Python 3.13
    descriptor: int = libc().timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor


def _settime(descriptor: int, value: bytes) -> None:
    if libc().timerfd_settime(descriptor, 0, value, None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
