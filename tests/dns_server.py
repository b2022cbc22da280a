"""A small real DNS server for tests: it answers, answers late, denies, or keeps silent, and counts the questions."""

from __future__ import annotations

import contextlib
import heapq
import math
import socket
import struct
import threading
import time
from collections import Counter
from ipaddress import ip_address
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

__all__ = ["NXDOMAIN", "REFUSED", "SERVFAIL", "DnsServer"]

SERVFAIL, NXDOMAIN, REFUSED = 2, 3, 5
_TYPES = {1: "A", 28: "AAAA"}


class _Record(NamedTuple):
    addresses: tuple[IPv4Address | IPv6Address, ...] = ()
    delay: float = 0.0
    rcode: int = NXDOMAIN


class _Waiting(NamedTuple):
    due: float
    order: int
    name: str
    question: bytes
    peer: tuple[str, int]


class DnsServer:
    """A DNS server on 127.0.0.1:53 of the calling thread's network namespace; it runs in a thread of its own::

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
    """

    resolv_conf = "nameserver 127.0.0.1\nsearch search.test\noptions timeout:30 attempts:1\n"

    def __init__(self) -> None:
        #: how often each (name, "A" or "AAAA") was asked for
        self.queries: Counter[tuple[str, str]] = Counter()
        self._records: dict[str, _Record] = {}
        self._waiting: list[_Waiting] = []  # a heap
        self._order = count()
        self._lock = threading.Lock()
        self._ended = False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._bell = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # non-blocking: it is rung from event loops
        self._bell.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name="dns-server", daemon=True)

    def add(self, name: str, *addresses: str, delay: float = 0.0, rcode: int = 0) -> None:
        """Answer for *name* with *addresses* (none: it exists without), or *rcode*, after *delay* seconds."""
        with self._lock:
            self._records[name] = _Record(tuple(map(ip_address, addresses)), delay, rcode)

    def release(self, name: str) -> None:
        """Answer whatever waits for *name* now, and further questions at once."""
        with self._lock:
            self._records[name] = self._records[name]._replace(delay=0.0)
            self._waiting = [entry._replace(due=0.0) if entry.name == name else entry for entry in self._waiting]
            heapq.heapify(self._waiting)
        self._wake()

    def __enter__(self) -> Self:
        try:
            self._socket.bind(("127.0.0.1", 53))
            self._thread.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._wake()
        self._thread.join()
        self._socket.connect(("127.0.0.1", 9))  # from now on whoever asks is told at once that nobody is here
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._ask(*self._socket.recvfrom(512))
        for entry in self._waiting:
            self._socket.sendto(_reply(entry.question, _Record(rcode=SERVFAIL)), entry.peer)
        self._close()

    def _close(self) -> None:
        self._socket.close()
        self._bell.close()

    def _wake(self) -> None:
        self._bell.sendto(b"", self._socket.getsockname())

    def _serve(self) -> None:
        while not self._ended:
            self._socket.settimeout(self._answer())
            try:
                question, peer = self._socket.recvfrom(512)
            except TimeoutError:
                continue
            self._ask(question, peer)

    def _ask(self, question: bytes, peer: tuple[str, int]) -> None:
        if not question:
            return  # it was rung
        name, kind, _ = _parse(question)
        with self._lock:
            self.queries[name, _TYPES.get(kind, str(kind))] += 1
            due = time.monotonic() + self._records.get(name, _Record()).delay
            heapq.heappush(self._waiting, _Waiting(due, next(self._order), name, question, peer))

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
                self._socket.sendto(_reply(entry.question, self._records.get(entry.name, _Record())), entry.peer)
        return None


def _parse(question: bytes) -> tuple[str, int, int]:
    """Return the name and type of a question (RFC 1035 section 4.1.2), and where it ends."""
    labels, at = [], 12
    while length := question[at]:
        labels.append(question[at + 1 : at + 1 + length].decode("latin-1").lower())
        at += 1 + length
    (kind,) = struct.unpack_from("!H", question, at + 1)
    return ".".join(labels), kind, at + 5


def _reply(question: bytes, record: _Record) -> bytes:
    _, kind, end = _parse(question)
    version = {1: 4, 28: 6}.get(kind)
    answers = [address.packed for address in record.addresses if address.version == version]
    flags = 0x8180 | record.rcode  # response, recursion desired and available
    header = question[:2] + struct.pack("!5H", flags, 1, len(answers), 0, 0)
    # 0xC00C points at the name of the question; the time to live is 0.
    records = (struct.pack("!HHHIH", 0xC00C, kind, 1, 0, len(packed)) + packed for packed in answers)
    return header + question[12:end] + b"".join(records)
