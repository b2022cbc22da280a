"""Law: one source in the care of a connector: its open connections, its figures, and what it has failed at.

Nothing here decides: the roster chooses by this, the policies see some of it, ``stats()`` shows the rest.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
import time
import weakref
from collections import Counter, deque
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from ._sketch import LatencySketch
from ._sources import Prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._binding import Refusal, Target
    from ._health import Breaker
    from ._sockets import BoundSocket, Opening, Traffic
    from ._sources import Source

__all__ = ["Origin", "SourceStats"]

_log = logging.getLogger("aiobind")

#: TCP_TIMEWAIT_LEN (linux/net/tcp.h): for so many seconds a connection that this end closed first keeps its port.
_TIME_WAIT = 60.0


class SourceStats(NamedTuple):
    """The figures of one source.

    Attributes:
        source: the source.
        connections: open now, idle keep-alive ones included.
        in_use: those of them that are in use.
        idle: those of them that wait in a pool for the next request.
        connects: how many connections have been made in all.
        failures: how many attempts have failed, by the name of the errno (``"ECONNREFUSED"``); a name that could not
            be resolved counts as ``"EAI"``, an attempt that was given up after a second or more as ``"ETIMEDOUT"``.
        suspended_until: when the source is going to be tried again, by ``time.monotonic()``; ``math.inf`` while its
            interface is away; None: it is not suspended.
        latency_p50: how long half of the recent connects took at most, in seconds; None before the first.
        latency_p99: the same for 99 of 100.
        bytes_sent: payload that the peers have acknowledged, over all connections ever made; 0 where the system does
            not tell.
        bytes_received: payload that has arrived, likewise.
        ports: local ports that are taken, by destination (``"192.0.2.1:443"``): one for each open connection, and one
            for each that this end has closed first, for a minute (TIME_WAIT). Empty for ``net!``, whose addresses are
            new each time.
    """

    source: Source
    connections: int
    in_use: int
    idle: int
    connects: int
    failures: Mapping[str, int]
    suspended_until: float | None
    latency_p50: float | None
    latency_p99: float | None
    bytes_sent: int
    bytes_received: int
    ports: Mapping[str, int]


class Origin:
    """One source, with its live figures."""

    __slots__ = (
        "__weakref__",
        "_has_ports",
        "_lingering",
        "_pooled",
        "_sockets",
        "avoid",
        "breakers",
        "bytes_received",
        "bytes_sent",
        "connecting",
        "connections",
        "connects",
        "cut",
        "down",
        "errors",
        "failed_at",
        "failures",
        "held",
        "latency",
        "on_change",
        "openings",
        "ports",
        "removed",
        "scarce",
        "source",
        "stamp",
        "unpinned",
        "works",
    )

    def __init__(self, source: Source, *, pooled: bool) -> None:
        self.source = source
        self._pooled = pooled
        #: by descriptor; each tells of its end, also when it is collected
        self._sockets: dict[int, weakref.ref[BoundSocket]] = {}
        self.connections = 0
        self.connects = 0
        #: attempts under way
        self.connecting = 0
        #: connections that the pool, where there is one, has handed out
        self.held = 0
        self.failures = 0
        self.errors: Counter[str] = Counter()
        self.latency = LatencySketch()
        self.bytes_sent = self.bytes_received = 0
        #: local ports that are taken, by target; those in TIME_WAIT, with the time at which they are free again
        self.ports: dict[Target, int] = {}
        self._has_ports = not isinstance(source, Prefix)
        self._lingering: deque[tuple[float, Target]] = deque()
        #: told of every change of a figure that a policy sees
        self.on_change: Callable[[Origin], object] | None = None

        #: why its interface cannot serve it now
        self.down: OSError | None = None
        #: when it has failed last, of its own
        self.failed_at = 0.0
        #: what it has failed at of its own, by address family; and which families have worked since
        self.breakers: dict[int, Breaker] = {}
        self.works: set[int] = set()
        #: the hosts it is banned at, and the destinations for which it has no port left
        self.avoid: dict[str, Breaker] = {}
        #: destinations for which more than half of its ports are taken, with the target and that half
        self.scarce: dict[str, tuple[Target, int]] = {}
        #: it was taken from the list, and lives as long as its connections
        self.removed = False
        #: without letting them end
        self.cut = False
        #: a missing pin has been told of
        self.unpinned = False
        #: how its sockets are made, by target, or why not; worked out when `_plan`'s stamp was that
        self.openings: dict[Target, Opening | Refusal] = {}
        self.stamp = 0

    # ── connections ──

    @property
    def in_use(self) -> int:
        """Connections in use now: without a pool, all that are open."""
        return self.held if self._pooled else self.connections

    @property
    def sockets(self) -> list[BoundSocket]:
        """The sockets of its open connections; any thread may ask."""
        return [sock for reference in self._sockets.copy().values() if (sock := reference()) is not None]

    def opened(self, sock: BoundSocket) -> None:
        """Count a connection until *sock* ends."""
        self.connections += 1
        self.connects += 1
        self._sockets[sock.fileno()] = weakref.ref(sock)
        target = sock.target
        if self._has_ports and target is not None:
            if self._lingering and self._lingering[0][0] <= time.monotonic():
                self._purge()
            try:  # without a call between, amid which another thread may free one
                self.ports[target] += 1
            except KeyError:
                self.ports[target] = 1
        sock.register(self._ended)
        self.changed()

    def _ended(self, sock: BoundSocket, descriptor: int, traffic: Traffic | None) -> None:
        self.connections -= 1
        # The number may belong to another connection by now; of one that is being collected nothing refers to it.
        reference = self._sockets.get(descriptor)
        if reference is not None and ((other := reference()) is sock or other is None):
            del self._sockets[descriptor]
        keeps_port = False
        if traffic is not None:
            sent, received, keeps_port, _ = traffic
            if sent or received:
                self.bytes_sent += sent
                self.bytes_received += received
        target = sock.target
        if self._has_ports and target is not None:
            if keeps_port:
                self._lingering.append((time.monotonic() + _TIME_WAIT, target))
            else:
                self._free(target)
        self.changed()

    def begins(self) -> None:
        """Count an attempt to connect, or to get a connection from the pool."""
        self.connecting += 1
        self.changed()

    def has_ended(self) -> None:
        """Count an attempt as ended, whatever came of it."""
        self.connecting -= 1
        self.changed()

    def handed_out(self) -> None:
        """Count a connection that the pool has handed out."""
        self.held += 1
        self.changed()

    def given_back(self) -> None:
        """Count a connection that the pool has back."""
        self.held -= 1
        self.changed()

    def changed(self) -> None:
        """Tell the policy that wants to know."""
        if self.on_change is not None:
            try:
                self.on_change(self)
            except Exception:  # amid the end of a connection, or the cancellation of an attempt
                _log.exception("the policy failed at a change of %s", self.source)

    def ports_to(self, target: Target) -> int:
        """Return how many local ports are taken towards *target*."""
        self._purge()
        return self.ports.get(target, 0)

    def _purge(self) -> None:
        now = time.monotonic()
        with suppress(IndexError):  # two threads ask, and the other one took it
            while self._lingering and self._lingering[0][0] <= now:
                self._free(self._lingering.popleft()[1])

    def _free(self, target: Target) -> None:
        with suppress(KeyError):  # another thread has freed the last one
            self.ports[target] -= 1
            if self.ports[target] <= 0:
                del self.ports[target]

    # ── failures ──

    def failed(self, error: OSError) -> None:
        """Count an attempt that has failed."""
        name = "EAI" if isinstance(error, socket.gaierror) else errno.errorcode.get(error.errno or 0, str(error.errno))
        self.errors[name] += 1
        self.failures += 1
        self.changed()

    def suspended_until(self, now: float) -> float | None:
        """Return when it is going to be tried again; None: it is not suspended."""
        if self.down is not None:
            return math.inf
        ends = [breaker.until for breaker in self.breakers.values() if breaker.suspended(now)]
        failed = sum(breaker.failures > 0 for breaker in self.breakers.values())
        if len(ends) < failed or not ends or any(family not in self.breakers for family in self.works):
            return None  # a family that works, or whose time has ended, is not held up by the other one
        return min(ends)

    @property
    def is_being_probed(self) -> bool:
        """Whether somebody is finding out how it is now, and no family of it is known to work."""
        if any(family not in self.breakers for family in self.works):
            return False
        return any(breaker.probing for breaker in self.breakers.values())

    def is_short_of_ports(self, destination: str) -> bool:
        """Return whether more than half of its ports for *destination* are taken."""
        target, half = self.scarce.get(destination, (None, 0))
        if target is None:
            return False
        if self.ports_to(target) > half:
            return True
        del self.scarce[destination]
        return False

    def avoids(self, host: str, destination: str, now: float) -> float:
        """Return until when *host*, or *destination*, shall have another source; 0.0: it need not."""
        ends = [
            breaker.until for key in (host, destination) if (breaker := self.avoid.get(key)) and breaker.suspended(now)
        ]
        return max(ends, default=0.0)

    # ── figures ──

    def stats(self, idle: int = 0) -> SourceStats:
        """Return the figures; any thread may ask."""
        sent, received = self.bytes_sent, self.bytes_received
        for sock in self.sockets:
            traffic = sock.traffic()
            if traffic is not None:
                sent += traffic[0]
                received += traffic[1]
        self._purge()
        return SourceStats(
            self.source,
            self.connections,
            self.in_use,
            idle,
            self.connects,
            dict(self.errors),
            self.suspended_until(time.monotonic()),
            self.latency.quantile(0.5),
            self.latency.quantile(0.99),
            sent,
            received,
            {str(target): count for target, count in self.ports.copy().items() if count},
        )
