"""Law: the system calls of Linux, each with the kernel's own meaning. Nothing here blocks, nothing decides.

Man pages: socket(7) SO_BINDTODEVICE, ip(7), ipv6(7), netlink(7), rtnetlink(7).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import socket
import struct
import sys
from contextlib import ExitStack, closing, suppress
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from aiobind._binding import LinkAddress

from .base import AddressGone, AddressSeen, LinkGone, LinkSeen, ListEnd, sockaddr

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Iterator

    from aiobind._binding import IPAddress

    from .base import Record
    from .polled import Polled

__all__ = ["Linux"]

# Numbers of the kernel's UAPI headers; the socket module lacks some of them in Python 3.11.
SO_BINDTODEVICE = 25
SO_BINDTOIFINDEX = 62  # Linux 5.0
IP_FREEBIND = 15
IPV6_FREEBIND = 78
IP_BIND_ADDRESS_NO_PORT = 24  # Linux 4.2
IP_LOCAL_PORT_RANGE = 51  # Linux 6.3
_SIOCGIFCONF = 0x8912
_IFCONF = struct.Struct("@iP")  # struct ifconf of linux/if.h
# struct tcp_info of linux/tcp.h: tcpi_segs_out; and tcpi_state, tcpi_unacked, tcpi_bytes_acked, _received,
# tcpi_notsent_bytes, tcpi_bytes_sent and _retrans
_SEGS_OUT = struct.Struct("=136xI")
_TRAFFIC = struct.Struct("=B23xI92xQQ8xI52xQQ")  # Linux 4.19
_TRAFFIC_OLD = struct.Struct("=B23xI92xQQ8xI")  # Linux 4.6
_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _TIME_WAIT, _CLOSE, _CLOSE_WAIT, _LAST_ACK, _CLOSING = 1, 4, 5, 6, 7, 8, 9, 11
_CLOSES_FIRST = (_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSING)
_UNUSED = (0, 0, True, False)  # what `Linux.traffic` says of a connection that nobody has used
_SENDS_ON = (_ESTABLISHED, _CLOSE_WAIT, _FIN_WAIT1, _CLOSING, _LAST_ACK)
_PEER_CLOSED = (_CLOSE_WAIT, _LAST_ACK, _CLOSING, _TIME_WAIT)

#: The widest range; the kernel narrows it to net.ipv4.ip_local_port_range. With a range set it takes ports of both
#: parities from the start. Without one it looks for even ports only (odd ones are for bind), so that past half of the
#: range towards one destination each connect scans the whole half: 39 µs became 650 to 5,931 (Linux 6.18).
_ALL_PORTS = range(1, 65536)

#: How a system says that netlink is not for this process.
_REFUSED = (errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)
_log = logging.getLogger("aiobind")


class Linux:
    """The pins of Linux."""

    place = "network namespace"
    socket_flags = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

    def __init__(self) -> None:
        self._has_port_range = True
        self._has_bind_to_index: bool | None = None
        self._all_ports = _port_range(_ALL_PORTS)
        self._netlink_is_missed = False

    def pin(self, sock: socket.socket, device: str, ifindex: int = 0) -> None:
        """Set SO_BINDTODEVICE, which needs no privilege on a socket that has none yet (since Linux 5.7).

        With the index of the device it is SO_BINDTOIFINDEX, which means the same; Python takes 2 µs for an option of
        bytes, and a tenth of that for a number. Not every system that takes it heeds it (gVisor takes any option of
        this level), so it is read back the first time.

        Raises:
            OSError: ENODEV (no such interface), EPERM (an older kernel and no CAP_NET_RAW).
        """
        if ifindex and self._has_bind_to_index is not False:
            try:
                sock.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, ifindex)
                if self._has_bind_to_index is None:
                    self._has_bind_to_index = sock.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX) == ifindex
            except OSError as error:
                if error.errno != errno.ENOPROTOOPT:
                    raise
                self._has_bind_to_index = False
            if self._has_bind_to_index:
                return
        sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, os.fsencode(device) + b"\0")

    def bind(self, sock: socket.socket, ip: IPAddress, port: int | None, *, freebind: bool = False) -> None:
        """Bind *ip*. Without a port connect(2) chooses one, per destination (IP_BIND_ADDRESS_NO_PORT).

        Raises:
            OSError: EADDRNOTAVAIL (no interface of this network namespace holds *ip*, or it is still tentative),
                EADDRINUSE (the port is taken, or with 0 none is left), EACCES (a port below
                net.ipv4.ip_unprivileged_port_start), ENODEV (the zone of *ip* is no interface), EINVAL (the socket has
                a port already).
        """
        if freebind:
            if ip.version == 4:
                sock.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        if port is None:
            try:
                # At level SOL_IP for IPv6 sockets too: there is no IPV6_ twin, and the kernel takes it.
                sock.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            except OSError as error:
                if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
                    raise
        sock.bind(sockaddr(ip, port or 0))

    def recipe(self, ifindex: int) -> tuple[tuple[int, int, int], ...] | None:
        """Return the options of a connection whose kernel has them all (Linux 6.3)."""
        if not self._has_port_range or (ifindex and not self._has_bind_to_index):
            return None
        pin = ((socket.SOL_SOCKET, SO_BINDTOIFINDEX, ifindex),) if ifindex else ()
        return (
            (socket.SOL_IP, IP_LOCAL_PORT_RANGE, self._all_ports),
            *pin,
            (socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1),
        )

    def feed(self) -> Netlink | Polled:
        """Open a netlink socket for links and addresses, which needs no privilege, or look each second.

        Some sandboxes refuse netlink sockets, gVisor to subscribe, Android to ask.
        """
        with ExitStack() as opened:
            try:
                feed = opened.enter_context(closing(Netlink()))
                _ask(_RTM_GETLINK, _LINK.pack(socket.AF_UNSPEC, 0, 1, 0, 0))
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                refusal = error.strerror
            else:
                opened.pop_all()
                return feed
        if not self._netlink_is_missed:
            self._netlink_is_missed = True
            _log.warning("netlink is refused here (%s): the interfaces are looked at once a second instead", refusal)
        from .polled import Polled  # noqa: PLC0415 - seldom needed

        return Polled()

    def prepare(self, sock: socket.socket) -> None:
        """Let connect(2) take any ephemeral port (IP_LOCAL_PORT_RANGE), at a cost that does not grow with their use."""
        self._limit(sock, self._all_ports)

    def limit(self, sock: socket.socket, ports: range) -> None:
        """Set IP_LOCAL_PORT_RANGE, where the kernel has it; outside of the automatic range it would have no effect."""
        self._limit(sock, _port_range(ports))

    def _limit(self, sock: socket.socket, first_and_last: int) -> None:
        if self._has_port_range:
            try:
                sock.setsockopt(socket.SOL_IP, IP_LOCAL_PORT_RANGE, first_and_last)
            except OSError as error:
                # EOPNOTSUPP is the answer of this protocol alone (MPTCP, before it learned the option).
                if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
                    raise
                self._has_port_range = error.errno == errno.EOPNOTSUPP

    def has_address(self, version: int) -> bool:
        """Ask for the length of the list of IPv4 addresses (SIOCGIFCONF, netdevice(7)), or whether procfs lists any."""
        try:
            if version == 6:
                return bool(_procfs("thread-self/net/if_inet6"))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                length, _ = _IFCONF.unpack(fcntl.ioctl(sock, _SIOCGIFCONF, _IFCONF.pack(0, 0)))
                return bool(length)
        except OSError:
            return True

    def sent(self, sock: socket.socket) -> bool:
        """Return whether TCP_INFO (tcp(7)) counts any segments (tcpi_segs_out, Linux 4.2)."""
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SEGS_OUT.size)
        except OSError:  # no TCP socket
            return False
        return len(info) == _SEGS_OUT.size and _SEGS_OUT.unpack(info) != (0,)

    def silent_hop(self, ifindex: int, target: str, source: str) -> str | None:
        """Ask for the route, and for the state of the neighbour that it names (rtnetlink(7))."""
        try:
            return _silent_hop(ifindex, target, source)
        except OSError:  # no netlink here
            return None

    def abort(self, sock: socket.socket) -> None:
        """Connect it to nowhere (AF_UNSPEC): ``tcp_disconnect`` of Linux sends RST, sets ECONNRESET and wakes all.

        Who reads it then gets ECONNRESET once, as from a peer's RST, but not what had come before. A shutdown would
        show them the end of the stream instead, which is how many a body ends: a lie. Takes 6 µs.
        """
        nowhere = bytes(16)  # struct sockaddr, sa_family AF_UNSPEC, which Python's connect cannot say
        if libc().connect(sock.fileno(), nowhere, len(nowhere)):
            with suppress(OSError):  # it is closed, or a sandbox forbids to connect
                sock.shutdown(socket.SHUT_RDWR)

    def traffic(self, sock: socket.socket) -> tuple[int, int, bool, bool] | None:
        """Ask TCP_INFO (tcp(7)) of an outgoing connection once: 1 µs.

        tcpi_bytes_acked counts the SYN (not that of one that was accepted) and the FIN, and tcpi_bytes_sent less
        tcpi_bytes_retrans what was sent into the void as well: the lesser of the two is exact. tcpi_bytes_received
        counts the FIN. tcpi_unacked counts segments, the SYN of a connection that was refused as well. All measured on
        Linux 6.18. A close with bytes unread, or SO_LINGER of 0, sends RST, and leaves no TIME_WAIT whatever is said.
        """
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TRAFFIC.size)
        except OSError:  # no TCP socket, or closed
            return None
        if len(info) == _TRAFFIC.size:
            state, unacked, acked, received, unsent, sent, again = _TRAFFIC.unpack(info)
            if state == _ESTABLISHED and not (sent or received or unsent):
                return _UNUSED
            payload = sent - again
        elif len(info) >= _TRAFFIC_OLD.size:
            state, unacked, acked, received, unsent = _TRAFFIC_OLD.unpack_from(info)
            payload = acked - 1
        else:
            return None
        acked -= 1
        # The state after a FIN from both sides is that after a RST as well; but then ours was not acknowledged.
        if received and (state in _PEER_CLOSED or (state == _CLOSE and acked > payload)):
            received -= 1
        left = bool(unacked or unsent) and state in _SENDS_ON
        return max(0, min(acked, payload)), received, state in _CLOSES_FIRST, left

    def routed_here(self, ip: IPAddress) -> bool | None:
        """Ask for the route to *ip* (rtnetlink(7)): 16 µs. It must be a local one, in a table that packets go by.

        A rule may send arriving packets by other tables than those of this question (by their mark, interface or VRF):
        nobody can tell where one of those has a local route for *ip*.
        """
        family, host = socket.AF_INET if ip.version == 4 else socket.AF_INET6, ip.packed
        bits = len(host) * 8
        try:
            # Without this flag the kernel names its source address as well, for which it looks through all that the
            # host has: 4 ms where it has 10,000 of IPv6.
            question = _ROUTE.pack(family, bits, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
            answer = _ask(_RTM_GETROUTE, question + _attribute(_RTA_DST, host))
            if answer is not None and len(answer) >= _ROUTE.size and _ROUTE.unpack_from(answer)[7] == _RTN_LOCAL:
                return True
            return None if _routed_by_rule(family, int.from_bytes(host), bits) else False
        except OSError:  # no netlink here
            return None

    def keeps_to(self, ports: range) -> bool:
        """Return whether *ports* lie in the automatic range, and none of them is reserved (ip-sysctl).

        Reads two files of procfs, which never wait.
        """
        with socket.socket() as probe:  # the first socket of all may be the one that this is asked for
            self.limit(probe, ports)
        if not self._has_port_range or ports.step != 1:
            return False
        try:
            automatic, reserved = _automatic_ports()
        except (OSError, ValueError):  # no procfs here: then nothing is known of the range
            return False
        return (
            automatic[0] <= ports[0]
            and ports[-1] <= automatic[-1]
            and not any(span[0] <= ports[-1] and ports[0] <= span[-1] for span in reserved)
        )

    def port_count(self) -> int:
        """Return the size of the automatic range less the reserved ports (ip-sysctl).

        Reads two files of procfs, which never wait; if they cannot be read, it is the default, 28232.
        """
        try:
            automatic, reserved = _automatic_ports()
        except (OSError, ValueError):
            return 28232
        # The kernel writes the spans apart and in order (proc_do_large_bitmap).
        cut = sum(len(range(max(span[0], automatic[0]), min(span[-1], automatic[-1]) + 1)) for span in reserved)
        return len(automatic) - cut


def _port_range(ports: range) -> int:
    """Return what IP_LOCAL_PORT_RANGE takes, as the signed number of the same bits."""
    number: int = _I32.unpack(_U32.pack(ports[-1] << 16 | ports[0]))[0]
    return number


@functools.cache
def libc() -> ctypes.CDLL:
    """Return the C library, for calls that Python has no name for."""
    import ctypes  # noqa: PLC0415 - 4 ms that few need

    return ctypes.CDLL(None, use_errno=True)


def _automatic_ports() -> tuple[range, list[range]]:
    """Return the range that connect(2) chooses from, and those within or without it that are reserved."""
    low, high = map(int, _procfs("sys/net/ipv4/ip_local_port_range").split())
    reserved = _procfs("sys/net/ipv4/ip_local_reserved_ports").strip()
    spans = [range(int(first), int(last or first) + 1) for first, _, last in _spans(reserved)]
    return range(low, high + 1), spans


def _procfs(name: str) -> str:
    with open(f"/proc/{name}") as file:
        return file.read()


def _spans(text: str) -> list[tuple[str, str, str]]:
    return [span.partition("-") for span in text.split(",") if span]


# netlink(7), rtnetlink(7) and linux/{netlink,rtnetlink,if_link,if_addr,sock_diag}.h
_SOL_NETLINK, _NETLINK_NO_ENOBUFS, _NETLINK_GET_STRICT_CHK = 270, 5, 12  # the last: Linux 4.20
_SO_MEMINFO = 55  # Linux 4.12
_GROUPS = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_GETROUTE, _RTM_GETNEIGH, _RTM_GETRULE = 26, 30, 34
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_TABLE, _NDA_DST = 1, 2, 4, 5, 15, 1
_RTM_F_FIB_MATCH = 0x2000  # Linux 4.13
_RTN_LOCAL, _RT_TABLE_DEFAULT, _RT_TABLE_MAIN, _RT_TABLE_LOCAL = 2, 253, 254, 255
_FRA_TABLE, _FRA_L3MDEV = 15, 19
_NUD_INCOMPLETE, _NUD_FAILED = 0x01, 0x20
_IFLA_IFNAME, _IFLA_MASTER, _IFLA_WIRELESS, _IFLA_LINKINFO = 3, 10, 11, 18
_IFLA_EXT_MASK, _IFLA_PROP_LIST, _IFLA_ALT_IFNAME = 29, 52, 53
_IFLA_INFO_KIND = 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFF_UP, _IFF_LOOPBACK, _IFF_LOWER_UP = 0x1, 0x8, 0x10000
_IFA_F_DADFAILED, _IFA_F_DEPRECATED, _IFA_F_TENTATIVE, _IFA_F_OPTIMISTIC = 0x08, 0x20, 0x40, 0x04
_RTEXT_FILTER_SKIP_STATS = 8
_NLA_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg
_NEIGHBOUR = struct.Struct("=B3xiHBB")  # ndmsg: family, index, state, flags, type
_U32, _I32 = struct.Struct("=I"), struct.Struct("=i")
_MEMINFO = struct.Struct("=I28xI")  # of nine numbers the first, SK_MEMINFO_RMEM_ALLOC, and the last, SK_MEMINFO_DROPS

#: A list comes in pieces of at most this size: about 200 addresses, which take a millisecond.
_PIECE = 16384


class _Quiet(socket.socket):
    """Closes itself without the ResourceWarning: an owner that forgot to close is no fault of the caller."""

    __slots__ = ()

    def __del__(self) -> None:
        with suppress(AttributeError):  # the system refused to give one
            self.close()


class Netlink:
    """A netlink socket, subscribed to links and addresses.

    The answer to a list and the news come through the one queue of this socket, in the order in which they happened:
    applying them one after the other gives the present state.
    """

    announces = True

    def __init__(self) -> None:
        self._socket = _Quiet(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
            socket.NETLINK_ROUTE,
        )
        self._sequence = 0
        self._listing = 0  # what is being told: _RTM_GETLINK, then _RTM_GETADDR, then nothing
        self._whole = True
        self._lost = 0
        try:
            # libuv takes a pending error for the end of the descriptor: after one ENOBUFS uvloop never called the
            # reader again (0.23). So the kernel is to count what it drops, and raise no error.
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
            self._socket.bind((0, _GROUPS))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._socket.fileno()

    def quiet(self) -> bool:
        """Return whether the queue is empty and nothing was dropped: one system call, 0.5 µs."""
        waiting, lost = _MEMINFO.unpack(self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
        return not waiting and lost == self._lost

    def ask(self) -> None:
        """Ask for all links; when they have been told, `read` asks for all addresses.

        The kernel tells one list at a time (EBUSY), so one asked for meanwhile ends as not whole.
        """
        if self._listing:
            self._whole = False
            return
        skip_statistics = _ATTRIBUTE.pack(8, _IFLA_EXT_MASK) + _U32.pack(_RTEXT_FILTER_SKIP_STATS)
        self._request(_RTM_GETLINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + skip_statistics)
        self._whole = True

    def read(self) -> list[Record] | None:
        """Return the records of one datagram; None when there is none.

        Raises:
            OSError: ENOBUFS (the queue overflowed: records are lost), or the kernel's answer to the list.
        """
        _, lost = _MEMINFO.unpack(self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
        if lost != self._lost:
            self._lost = lost
            self._drop()
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        try:
            data, (sender, _) = self._socket.recvfrom(_PIECE)
        except BlockingIOError:
            return None
        return list(self._records(data)) if sender == 0 else []  # 0 is the kernel; nobody else has a say

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _drop(self) -> None:
        """Empty the queue: the kernel starts no list while it is full."""
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(1)
        self._listing = 0  # the list that was being told, if any, has been read to its end

    def _request(self, kind: int, body: bytes) -> None:
        self._sequence += 1
        length = _HEADER.size + len(body)
        header = _HEADER.pack(length, kind, _NLM_F_REQUEST | _NLM_F_DUMP, self._sequence, 0)
        self._socket.sendto(header + body, (0, 0))
        self._listing = kind

    def _records(self, data: bytes) -> Iterator[Record]:
        for kind, flags, sequence, body in messages(data):
            if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                if sequence == self._sequence:
                    yield from self._end(flags, body)
            else:
                if flags & _NLM_F_DUMP_INTR:
                    self._whole = False
                record = parse(kind, body)
                if record is not None:
                    yield record

    def _end(self, flags: int, body: bytes) -> Iterator[Record]:
        told, self._listing = self._listing, 0
        code = struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
        if code < 0:
            number = min(-code, 4095)  # MAX_ERRNO of linux/err.h: os.strerror takes no -INT_MIN
            raise OSError(number, os.strerror(number))
        if flags & _NLM_F_DUMP_INTR:
            self._whole = False
        if told == _RTM_GETLINK:
            self._request(_RTM_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        else:
            yield ListEnd(self._whole)


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Split a datagram into netlink messages: (type, flags, sequence, body). A cut or senseless rest is dropped."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            return
        yield kind, flags, sequence, data[at + _HEADER.size : at + length]
        at += -(-length // 4) * 4


def parse(kind: int, body: bytes) -> Record | None:
    """Return what a message says of a link or an address; None for what says nothing that aiobind uses."""
    if kind in (_RTM_NEWLINK, _RTM_DELLINK) and len(body) >= _LINK.size:
        family, _, index, flags, _ = _LINK.unpack_from(body)
        # AF_BRIDGE tells of a bridge's port: its "deleted" means that the port left the bridge, not that it is gone.
        if family != socket.AF_UNSPEC:
            return None
        return LinkGone(index) if kind == _RTM_DELLINK else _link(index, flags, body[_LINK.size :])
    if kind in (_RTM_NEWADDR, _RTM_DELADDR) and len(body) >= _ADDRESS.size:
        return _address(kind, body)
    return None


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            return
        yield kind & _NLA_TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += -(-length // 4) * 4


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value


def _ask(kind: int, body: bytes) -> bytes | None:
    """Return what the kernel answers to one question, which it does before it returns from it; None: an error."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0) as sock:
        sock.sendto(_HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST, 1, 0) + body, (0, 0))
        for answer, _, _, data in messages(sock.recv(_PIECE)):
            return None if answer == _NLMSG_ERROR else data
    return None


def _silent_hop(ifindex: int, target: str, source: str) -> str | None:
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    host, here = socket.inet_pton(family, target), socket.inet_pton(family, source)
    # By the source there may be a rule. But then the interface is no more than a wish to the routes of IPv6
    # (ip6_route_output_flags takes it for a condition only where no source is given).
    for bits in (len(host) * 8, 0):
        question = _ROUTE.pack(family, len(host) * 8, bits, 0, 0, 0, 0, 0, 0) + _attribute(_RTA_DST, host)
        question += _attribute(_RTA_SRC, here) if bits else b""
        answer = _ask(_RTM_GETROUTE, question + _attribute(_RTA_OIF, _U32.pack(ifindex)))
        route = dict(_attributes(answer[_ROUTE.size :])) if answer else {}
        if route.get(_RTA_OIF) == _U32.pack(ifindex):
            break
    else:
        return None
    hop = route.get(_RTA_GATEWAY, host)
    if len(hop) != len(host):
        return None
    neighbour = _ask(_RTM_GETNEIGH, _NEIGHBOUR.pack(family, ifindex, 0, 0, 0) + _attribute(_NDA_DST, hop))
    if neighbour is None or len(neighbour) < _NEIGHBOUR.size:
        return None
    state = _NEIGHBOUR.unpack_from(neighbour)[2]
    return socket.inet_ntop(family, hop) if state & (_NUD_INCOMPLETE | _NUD_FAILED) else None


def _list(kind: int, body: bytes) -> Iterator[bytes]:
    """Yield what the kernel lists of what *body* names, and of nothing else.

    Raises:
        OSError: the system refused.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0) as sock:
        # Without it the kernel would list all routes of all tables, which may be a million.
        sock.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        header = _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
        sock.sendto(header + body, (0, 0))
        while True:
            for answer, _, _, data in messages(sock.recv(_PIECE)):
                if answer in (_NLMSG_DONE, _NLMSG_ERROR):
                    return
                yield data


def _routed_by_rule(family: int, host: int, bits: int) -> bool:
    """Return whether another table than the usual ones, to which a rule may lead, may have a local route to *host*."""
    tables: set[int] = set()
    for rule in _list(_RTM_GETRULE, _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
        attributes = dict(_attributes(rule[_ROUTE.size :]))
        if _FRA_L3MDEV in attributes:  # a VRF, whichever it may be
            return True
        tables.add(int.from_bytes(attributes.get(_FRA_TABLE, b""), sys.byteorder))
    for table in tables - {0, _RT_TABLE_DEFAULT, _RT_TABLE_MAIN, _RT_TABLE_LOCAL}:
        question = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, _RTN_LOCAL, 0) + _attribute(_RTA_TABLE, _U32.pack(table))
        for route in _list(_RTM_GETROUTE, question):
            rest = bits - route[1]  # of the address, behind the prefix
            prefix = dict(_attributes(route[_ROUTE.size :])).get(_RTA_DST, b"")
            if int.from_bytes(prefix) >> rest == host >> rest:
                return True
    return False


def _text(value: bytes) -> str:
    return os.fsdecode(value.rstrip(b"\0"))


def _link(index: int, flags: int, data: bytes) -> LinkSeen | None:
    attributes = dict(_attributes(data))
    # Wireless events come as links with a name and nothing else (rtnetlink_ifinfo_prep in net/wireless/wext-core.c).
    if _IFLA_IFNAME not in attributes or _IFLA_WIRELESS in attributes:
        return None
    info = dict(_attributes(attributes.get(_IFLA_LINKINFO, b"")))
    master = attributes.get(_IFLA_MASTER, b"")
    return LinkSeen(
        index,
        _text(attributes[_IFLA_IFNAME]),
        bool(flags & _IFF_LOOPBACK),
        _text(info.get(_IFLA_INFO_KIND, b"")),
        _U32.unpack(master)[0] if len(master) == 4 else 0,
        tuple(
            _text(value)
            for kind, value in _attributes(attributes.get(_IFLA_PROP_LIST, b""))
            if kind == _IFLA_ALT_IFNAME
        ),
        bool(flags & _IFF_UP),
        bool(flags & _IFF_LOWER_UP),
    )


def _address(kind: int, body: bytes) -> AddressSeen | AddressGone | None:
    _, length, flags, scope, index = _ADDRESS.unpack_from(body)
    attributes = dict(_attributes(body[_ADDRESS.size :]))
    # On a point-to-point link IFA_ADDRESS is the peer and IFA_LOCAL is ours; IPv6 without a peer has no IFA_LOCAL.
    packed = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS, b"")
    ip: IPAddress
    entry = b""
    if len(packed) == 4:
        ip = IPv4Address(packed)
        # 192.0.2.1/24, 192.0.2.1/32 and 192.0.2.1 with a peer may all be there, and go one by one (__inet_insert_ifa).
        entry = bytes((length,)) + attributes.get(_IFA_ADDRESS, b"")
    elif len(packed) == 16:
        ip = IPv6Address(packed)
    else:
        return None
    if kind == _RTM_DELADDR:
        return AddressGone(index, ip, entry)
    wide = attributes.get(_IFA_FLAGS, b"")
    if len(wide) == 4:
        flags = _U32.unpack(wide)[0]
    return AddressSeen(index, link_address(ip, scope, flags), entry)


def link_address(ip: IPAddress, scope: int, flags: int) -> LinkAddress:
    """Return what the flags of if_addr.h say of an address."""
    # RFC 4429: an optimistic address may be used while it is still being checked, as the last choice, like a
    # deprecated one (measured: the kernel takes another interface's instead); a failed one may not.
    tentative = flags & _IFA_F_DADFAILED or (flags & _IFA_F_TENTATIVE and not flags & _IFA_F_OPTIMISTIC)
    deprecated = flags & (_IFA_F_DEPRECATED | _IFA_F_OPTIMISTIC)
    return LinkAddress(ip, scope, bool(tentative), bool(deprecated))
