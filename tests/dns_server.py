"""A small real DNS server for tests: it answers, answers late, denies, or keeps silent, and counts the questions."""

from __future__ import annotations

import contextlib
import heapq
import math
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from functools import partial
from ipaddress import ip_address
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv4Address, IPv6Address

    from aiobind.lab import Namespace

__all__ = ["NXDOMAIN", "REFUSED", "SERVFAIL", "DnsServer"]

SERVFAIL, NXDOMAIN, REFUSED = 2, 3, 5
_TYPES = {1: "A", 28: "AAAA"}
_VERSIONS = {1: 4, 28: 6}


class _Record(NamedTuple):
    addresses: tuple[IPv4Address | IPv6Address, ...] = ()
    delay: float | dict[str, float] = 0.0
    rcode: int | dict[str, int] = NXDOMAIN
    ttl: int = 0
    cname: str = ""
    truncated: bool = False


class _Waiting(NamedTuple):
    due: float
    order: int
    name: str
    question: bytes
    send: Callable[[bytes], object]
    is_tcp: bool


class DnsServer:
    """A DNS server on port 53 of 127.0.0.1, or of *addresses*, by UDP and TCP; it runs in a thread of its own::

        with DnsServer() as dns:
            resolv_conf(dns.resolv_conf)  # the fixture
            dns.add("slow.test", "192.0.2.1", "2001:db8::1", delay=1.5)
            dns.add("held.test", "192.0.2.2", delay=math.inf)  # not before dns.release("held.test")
            ...
            assert dns.queries["slow.test", "A"] == 1

    Enter and leave it in a fixture, for leaving joins the thread; the rest may be called on an event loop. A name
    that was not added does not exist. getaddrinfo asks for A and AAAA at the same time, one question each; configured
    like this it neither repeats a question nor gives up while a test runs (but after NXDOMAIN it asks once more, for
    the name with ``.search.test`` behind it). At the end whatever is still unanswered gets SERVFAIL, so that no
    thread waits for it in vain.

    Args:
        addresses: where it listens, an IPv6 address with its zone if need be.
        namespace: the network namespace of its sockets, such as ``lab.far``; None: that of the calling thread.
    """

    resolv_conf = "nameserver 127.0.0.1\nsearch search.test\noptions timeout:30 attempts:1\n"

    def __init__(self, *addresses: str, namespace: Namespace | None = None) -> None:
        #: how often each (name, "A" or "AAAA") was asked for
        self.queries: Counter[tuple[str, str]] = Counter()
        #: each question: the server's address, "udp" or "tcp", the name, "A" or "AAAA"
        self.asked: list[tuple[str, str, str, str]] = []
        self._addresses = addresses or ("127.0.0.1",)
        self._namespace = namespace
        self._records: dict[str, _Record] = {}
        self._waiting: list[_Waiting] = []  # a heap
        self._order = count()
        self._lock = threading.Lock()
        self._ended = False
        self._selector = selectors.DefaultSelector()
        self._udp: list[socket.socket] = []
        self._tcp: list[socket.socket] = []
        self._bell, bell = socket.socketpair()  # non-blocking: it is rung from event loops
        self._bell.setblocking(False)
        self._selector.register(bell, selectors.EVENT_READ, partial(bell.recv, 512))
        self._thread = threading.Thread(target=self._serve, name="dns-server", daemon=True)

    def add(
        self,
        name: str,
        *addresses: str,
        delay: float | dict[str, float] = 0.0,
        rcode: int | dict[str, int] = 0,
        ttl: int = 0,
        cname: str = "",
        truncated: bool = False,
    ) -> None:
        """Answer for *name* with *addresses* (none: it exists without), or *rcode*, after *delay* seconds.

        Both may be given by type: ``{"AAAA": 1.0}``. *ttl* is that of each of its records, of which one can be
        a CNAME; by UDP the answer is *truncated* to nothing.
        """
        with self._lock:
            self._records[name] = _Record(tuple(map(ip_address, addresses)), delay, rcode, ttl, cname, truncated)

    def remove(self) -> None:
        """Forget all names: from now on none exists."""
        with self._lock:
            self._records.clear()

    def close_tcp(self) -> None:
        """Listen by UDP only, from now on."""
        for tcp in self._tcp:
            self._selector.unregister(tcp)
            tcp.close()

    def release(self, name: str) -> None:
        """Answer whatever waits for *name* now, and further questions at once."""
        with self._lock:
            self._records[name] = self._records[name]._replace(delay=0.0)
            self._waiting = [entry._replace(due=0.0) if entry.name == name else entry for entry in self._waiting]
            heapq.heapify(self._waiting)
        self._wake()

    def __enter__(self) -> Self:
        try:
            with self._namespace or contextlib.nullcontext():
                for address in self._addresses:
                    self._listen(address)
                self._thread.start()
        except BaseException:
            self._close()
            raise
        return self

    def _listen(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        text, _, zone = address.partition("%")
        local: Any = (text, 53, 0, socket.if_nametoindex(zone)) if zone else (text, 53)
        udp = socket.socket(family, socket.SOCK_DGRAM)
        self._udp.append(udp)
        self._selector.register(udp, selectors.EVENT_READ, partial(self._datagram, udp, address))
        udp.bind(local)
        tcp = socket.create_server(local, family=family)
        self._tcp.append(tcp)
        self._selector.register(tcp, selectors.EVENT_READ, partial(self._accept, tcp, address))

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._wake()
        self._thread.join()
        for udp in self._udp:
            # From now on whoever asks is told at once that nobody is here.
            with contextlib.suppress(OSError):
                udp.connect((udp.getsockname()[0], 9))
            udp.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._datagram(udp, "")
        for entry in self._waiting:
            with contextlib.suppress(OSError):
                entry.send(self._reply(entry.question, _Record(rcode=SERVFAIL), is_tcp=entry.is_tcp))
        self._close()

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._bell.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._bell.send(b"!")

    def _serve(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select(self._answer()):
                key.data()

    def _datagram(self, udp: socket.socket, address: str) -> None:
        question, peer = udp.recvfrom(512)
        self._ask(question, lambda answer: udp.sendto(answer, peer), address, "udp")

    def _accept(self, tcp: socket.socket, address: str) -> None:
        connection, _ = tcp.accept()
        self._selector.register(connection, selectors.EVENT_READ, partial(self._stream, connection, address))

    def _stream(self, connection: socket.socket, address: str) -> None:
        try:
            (length,) = struct.unpack("!H", connection.recv(2, socket.MSG_WAITALL))
            question = connection.recv(length, socket.MSG_WAITALL)
        except (OSError, struct.error):  # it has ended
            self._selector.unregister(connection)
            connection.close()
            return
        self._ask(question, lambda answer: connection.sendall(struct.pack("!H", len(answer)) + answer), address, "tcp")

    def _ask(self, question: bytes, send: Callable[[bytes], object], address: str, transport: str) -> None:
        name, kind, _ = _parse(question)
        text = _TYPES.get(kind, str(kind))
        with self._lock:
            self.queries[name, text] += 1
            self.asked.append((address, transport, name, text))
            delay = self._records.get(name, _Record()).delay
            due = time.monotonic() + (delay.get(text, 0.0) if isinstance(delay, dict) else delay)
            entry = _Waiting(due, next(self._order), name, question, send, transport == "tcp")
            heapq.heappush(self._waiting, entry)

    def _answer(self) -> float | None:
        """Answer what is due; return how long there is time until the next one."""
        with self._lock:
            while self._waiting:
                entry = self._waiting[0]
                if entry.due == math.inf:
                    return None
                if (left := entry.due - time.monotonic()) > 0:
                    return left
                heapq.heappop(self._waiting)
                record = self._records.get(entry.name, _Record())
                with contextlib.suppress(OSError):  # who asked has gone
                    entry.send(self._reply(entry.question, record, is_tcp=entry.is_tcp))
        return None

    def _reply(self, question: bytes, record: _Record, *, is_tcp: bool) -> bytes:
        _, kind, end = _parse(question)
        rcode = record.rcode.get(_TYPES.get(kind, ""), 0) if isinstance(record.rcode, dict) else record.rcode
        flags = 0x8180 | rcode  # response, recursion desired and available
        answers: list[bytes] = []
        if record.truncated and not is_tcp:
            flags |= 0x0200
        elif not rcode:
            owner = struct.pack("!H", 0xC00C)  # points at the name of the question
            while record.cname and len(answers) < 20:  # it may point at itself
                target = _encoded(record.cname)
                answers.append(owner + struct.pack("!HHIH", 5, 1, record.ttl, len(target)) + target)
                owner, record = target, self._records.get(record.cname, _Record())
            for address in record.addresses:
                if address.version == _VERSIONS.get(kind):
                    packed = address.packed
                    answers.append(owner + struct.pack("!HHIH", kind, 1, record.ttl, len(packed)) + packed)
        header = question[:2] + struct.pack("!5H", flags, 1, len(answers), 0, 0)
        return header + question[12:end] + b"".join(answers)


def _parse(question: bytes) -> tuple[str, int, int]:
    """Return the name and type of a question (RFC 1035 section 4.1.2), and where it ends."""
    labels, at = [], 12
    while length := question[at]:
        labels.append(question[at + 1 : at + 1 + length].decode("latin-1").lower())
        at += 1 + length
    (kind,) = struct.unpack_from("!H", question, at + 1)
    return ".".join(labels), kind, at + 5


def _encoded(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
