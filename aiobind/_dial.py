"""Law: the story of one connect, from a destination and a source to a connected socket or one clear error.

    route      the policy orders the sources; a pinned one stands alone
    targets    the destination's addresses (a literal asks nobody)
    plan       for each target, what its socket is bound to; what the source cannot serve is dropped
    race       attempts by RFC 8305: open, pin, bind, connect
    verify     the source keeps its promise, in the moment before the SYN and again before a first byte
    count      the connection belongs to its source until it ends

The edges call ``route``, ``targets`` and ``dial``; whatever they wrap around, the story is told here only.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
import time
import weakref
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, TypeAlias

from ._binding import Binding, Exempt, Refusal, Target, zoneless
from ._errors import AiobindError, BindError, ResolveError
from ._events import Journal
from ._faults import (
    ANSWERS,
    NO_ANSWER,
    NoPortError,
    bare,
    combined,
    destination_of,
    place_of,
    plain,
    suspended,
    unresolved,
    with_context,
)
from ._interfaces import LinkGoneError
from ._limits import Limits
from ._plan import Planner
from ._platform import platform
from ._ports import ANY_PORT, LocalPorts
from ._race import interleave, race
from ._resolve import SystemLookup, literal
from ._roster import Roster, Route
from ._scope import pinned
from ._sockets import ANY_KIND, BoundSocket, BoundSource, connect, open_bound
from ._sources import parse_source

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from ._events import Event
    from ._interfaces import InterfaceTable
    from ._origin import Origin, SourceStats
    from ._policy import Policy
    from ._resolve import Lookup, Resolved
    from ._roster import Turn
    from ._sockets import SocketOption
    from ._sources import Source

__all__ = ["Dialer", "Reach"]

#: How a look-up gets a socket to ask with: `Dialer.reach`.
Reach: TypeAlias = "Callable[[Source | None, Target, int], Awaitable[BoundSocket]]"

#: Local ports that one turn of the loop tries at most: 1 ms.
_TRIES_PER_TURN = 50

#: An attempt that is given up after so many seconds without an answer has waited in vain.
_SILENCE = 1.0
#: What ``direct`` decides: all is left to the routing table.
_EXEMPT = Binding()


def _weakly(reach: Reach) -> Reach:
    # A look-up that held its dialer would keep it until the collector runs, with its policy and its netlink socket.
    method = weakref.WeakMethod(reach)

    async def ask(source: Source | None, target: Target, kind: int) -> BoundSocket:
        alive = method()
        if alive is None:
            raise RuntimeError("the connector is gone")
        return await alive(source, target, kind)

    return ask


class Dialer:
    """Makes connections from a set of sources, on one event loop."""

    def __init__(
        self,
        sources: Sequence[str | Source],
        *,
        policy: Policy | None,
        socket_options: Iterable[SocketOption],
        ttl: float | None,
        pooled: bool = False,
        local_ports: range | None = None,
        lookup: Callable[[Reach], Lookup] | None = None,
        strict: bool = True,
        borrow: bool = False,
        sticky_prefix: bool = False,
        direct: Iterable[str] = (),
        limits: Limits[Origin] | None = None,
        abort_on_link_down: bool = False,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        self._journal = Journal(on_event)
        #: stands for this dialer in `_scope`, without holding it
        self.scope = object()
        self.limits: Limits[Origin] = Limits() if limits is None else limits
        self._options = tuple((level, name, value) for level, name, value in socket_options)
        self._ports = LocalPorts(local_ports) if local_ports is not None else ANY_PORT
        self._strict = strict
        self._borrow = borrow
        self._direct = Exempt(direct) if direct else None
        self._system = SystemLookup(ttl)
        self._lookup: Lookup = self._system if lookup is None else lookup(_weakly(self.reach))
        self._planner = Planner(lookup=self._lookup, borrow=borrow, sticky_prefix=sticky_prefix)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._port_count: int | None = None
        self._aborts = abort_on_link_down
        #: whether anybody is going to be there to hear of the interfaces, which costs 0.3 ms once
        self.listens = True
        #: is told which sockets' interface or address has gone, and whether they are going to be cut
        self.on_lost: Callable[[list[BoundSocket], bool], object] | None = None
        #: whether any such socket is left, which may stand again
        self._fallen = False
        #: each serves one loop and one set of sources; the last to be made, for it takes the policy
        self.roster = Roster(sources, policy, self._journal, pooled=pooled)

    def enter(self) -> asyncio.AbstractEventLoop:
        """Return the running loop, which must be the one of the first use.

        Raises:
            RuntimeError: this is another loop, or the connector is closed.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise RuntimeError("this connector belongs to another event loop: make one for each loop")
            self._loop = loop
            self._listen()
        if self._closed:
            raise RuntimeError("the connector is closed")
        return loop

    def _listen(self) -> None:
        if self.listens:
            self._planner.listen(self)

    def close(self) -> None:
        """Refuse new connections, and let go of the loop's interface watch."""
        self._closed = True
        self.limits.close()
        self.roster.close()
        self._lookup.close()
        self._planner.close()

    def forget(self, host: str | None = None) -> None:
        """Drop the addresses of names that are kept for this dialer's sources."""
        self._lookup.forget(host)

    def stats(self, idle: Mapping[Source, int]) -> tuple[SourceStats, ...]:
        """Return the figures of each source, and of those from outside the list that still have connections.

        Args:
            idle: how many of its connections lie idle in a pool, for each source.
        """
        return tuple(origin.stats(idle.get(origin.source, 0)) for origin in self.roster.all)

    def links_changed(self, table: InterfaceTable, *, lost: bool) -> None:
        """Have the roster take notice, and see to the connections whose interface or address has gone."""
        if self._closed:
            return
        if self.roster.links_changed(table, borrow=self._borrow):
            self.limits.reconsider()
        if not lost and not self._fallen:
            return
        gone: list[BoundSocket] = []
        self._fallen = False
        for origin in self.roster.all:
            for sock in origin.sockets:
                stood, sock.stood = sock.stood, self._planner.stands(sock)
                if not sock.stood:
                    self._fallen = True
                    if stood:
                        sock.lost = True
                        gone.append(sock)
                elif not sock.cut:
                    sock.lost = False
        if not gone:
            return
        # The kernel tells an established connection nothing. Those that are idle are of no use any more.
        self._let_go(gone, cut=self._aborts)

    def _let_go(self, gone: list[BoundSocket], *, cut: bool) -> None:
        if self.on_lost is not None:
            self.on_lost(gone, cut)
        for sock in gone:
            if cut or sock.unfinished:
                sock.abort()

    # ── the list of sources ──

    def add(self, source: str | Source) -> None:
        """Choose from *source* as well."""
        self.roster.add(source)
        self.limits.reconsider()
        if self._loop is not None and not self._closed:
            self._listen()

    def remove(self, source: str | Source, *, drain: bool) -> Origin:
        """Choose *source* no more; unless *drain*, cut its connections."""
        origin = self.roster.remove(source)
        self.limits.forget(origin)
        self.limits.reconsider()
        if not drain:
            origin.cut = True
            self._let_go(origin.sockets, cut=True)
        return origin

    def report(self, source: str | Source, host: str, *, ok: bool, seconds: float | None) -> None:
        """Let other sources go to *host* for a while, or this one again."""
        if not isinstance(host, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the host must be a text, not {type(host).__name__}")
        if not host or "/" in host:
            raise ValueError(f"the host must be a name or an address, not {host!r}")
        origin = self.roster.find(source, guests=True)
        if ok:
            self.roster.accept(origin, place_of(host))
        else:
            if seconds is not None and not isinstance(seconds, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"seconds is a number, as in seconds=60, not {seconds!r}")
            if seconds is not None and not 0 <= seconds < math.inf:
                raise ValueError(f"seconds is how long the ban lasts, 0 or more, not {seconds}")
            error = OSError(errno.EACCES, "reported as banned there")
            self.roster.shun(origin, place_of(host), error, banned=True, seconds=seconds)

    # ── route ──

    def route(
        self, host: str, port: int, source: str | Source | None = None, *, towards: tuple[str, int] | None = None
    ) -> Route:
        """Return the sources to try for *host*: the pinned one alone, or all in the order of the policy.

        Args:
            host: the destination.
            port: its port.
            source: the pin of this one call; it wins over ``use_source``.
            towards: the host and port that are connected to, where they are others (a proxy's).
        """
        pin, place = pinned(self.scope) if source is None else parse_source(source), place_of(host)
        if pin is not None:
            order = partial(self.roster.only, pin)
        else:
            order = partial(self.roster.order, place, towards or (host, port))
        return Route(order, self.limits, place)

    # ── targets ──

    async def find(
        self, origin: Origin, host: str, port: int, *, family: int = 0, flags: int = 0
    ) -> Sequence[Resolved]:
        """Return the addresses of a name, asked for as *origin* asks.

        Args:
            origin: whose connection it is for.
            host: a name.
            port: the port of the destination; for messages.
            family: ``AF_INET``, ``AF_INET6``, or 0 for both.
            flags: ``AI_*`` flags of getaddrinfo(3).

        Raises:
            ResolveError: the name has no address; with a ``source`` when it is the source that could not ask, or whose
                own name could not be resolved.
            BindError: the source can reach no name server.
        """
        lookup = self._system if self._direct is not None and self._direct.names(host) else self._lookup
        began = time.monotonic()
        # Each name is a target of its own: of one whose servers are dead nobody hears, and that is no source's fault.
        asked = f"name server for {place_of(host)}"
        try:
            found = await lookup.find(host, via=origin.source, family=family, flags=flags)
        except (BindError, ResolveError) as error:  # it is the source that failed
            origin.failed(error)
            for each in (socket.AF_INET, socket.AF_INET6):
                self.roster.fails(origin, each, error)
            raise with_context(error, origin.source, destination_of(host, port)) from error.__cause__
        except socket.gaierror as error:
            if lookup.by_source and error.errno == socket.EAI_AGAIN:
                origin.failed(error)
                for each in (socket.AF_INET, socket.AF_INET6):
                    self.roster.waits_in_vain(origin, each, asked, began, error)
            text = f"the destination's name cannot be resolved: {error.strerror}"
            # Of what no name server has answered from here, another source may hear.
            source = origin.source if lookup.by_source and error.errno == socket.EAI_AGAIN else None
            raise unresolved(host, port, text, error.errno, source) from error
        if lookup.by_source:
            self.roster.reaches(origin, 0, asked)
        return found

    async def targets(
        self, origin: Origin, host: str, port: int, *, family: int = 0, flags: int = 0, first_family_count: int = 1
    ) -> list[Target]:
        """Return the addresses of the destination in the order to try them, their families interleaved.

        Args:
            origin: whose connection it is for.
            host: a name or a literal address.
            port: its port.
            family: ``AF_INET``, ``AF_INET6``, or 0 for both.
            flags: ``AI_*`` flags of getaddrinfo(3).
            first_family_count: RFC 8305's First Address Family Count.

        Raises:
            ResolveError: the name has no address, or none of *family*.
            BindError: the source can reach no name server.
        """
        try:
            address = literal(host)
        except OSError as error:
            raise unresolved(host, port, error.strerror or "") from error
        found = (address,) if address else await self.find(origin, host, port, family=family, flags=flags)
        version = 6 if family == socket.AF_INET6 else 4
        targets = [Target.of(ip, port, zone) for ip, zone in found if not family or ip.version == version]
        if not targets:
            raise unresolved(host, port, f"the destination has no IPv{version} address")
        return interleave(targets, first_family_count)

    # ── plan, race, verify, count ──

    async def dial(
        self,
        turn: Turn,
        host: str,
        targets: Sequence[Target],
        *,
        delay: float | None,
        begun: list[Target] | None = None,
    ) -> BoundSocket:
        """Return a socket connected to one of *targets* from the source whose *turn* it is, and counted there.

        Args:
            turn: whence.
            host: what the caller calls the destination.
            targets: its addresses, in the order to try.
            delay: RFC 8305's Connection Attempt Delay in seconds; None: one attempt after the other.
            begun: is filled with the targets that were tried, for a caller whose deadline may come before the last one.

        Raises:
            BindError: the source itself failed, and nothing was sent.
            ResolveError: the name of the source could not be resolved.
            ConnectError: no target answered.
        """
        origin = turn.origin
        if not origin.breakers or turn.forced or self._exempt(host, targets):
            return await self._dial(origin, host, targets, delay=delay, begun=begun)
        families, probes = self.roster.allowed(turn, {target.family for target in targets})
        if not families:
            breaker = origin.breakers[targets[0].family]
            error = suspended(breaker.error, breaker.until - time.monotonic())
            raise with_context(error, origin.source, destination_of(host, targets[0].port))
        allowed = [target for target in targets if target.family in families]
        # A family that works waits for nobody.
        patience = self.roster.patience(origin) if len(probes) == len(families) else None
        deadline, began = asyncio.timeout(patience), time.monotonic()
        try:
            async with deadline:
                return await self._dial(origin, host, allowed, delay=delay, begun=begun)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            reason = f"it has failed before, and gets no answer within {patience:.1f} s"
            destination = destination_of(host, targets[0].port)
            failure = with_context(BindError(errno.ETIMEDOUT, reason), origin.source, destination)
            if time.monotonic() - began < _SILENCE:  # else the attempts have told so themselves
                origin.failed(failure)
            for target in allowed:
                failed = origin.breakers.get(target.family)  # None: it has been answered meanwhile
                if failed is not None and failed.failures:
                    self.roster.fails(origin, target.family, failure)
                elif failed is not None:  # its link is back, and nothing is known against it yet
                    self.roster.waits_in_vain(origin, target.family, target, began, failure)
            raise failure from error
        finally:
            for breaker in probes:
                breaker.probing = False

    async def _dial(
        self,
        origin: Origin,
        host: str,
        targets: Sequence[Target],
        *,
        delay: float | None,
        begun: list[Target] | None,
    ) -> BoundSocket:
        loop, source, destination = self.enter(), origin.source, destination_of(host, targets[0].port)
        try:
            decisions = await self._plan(source, host, targets)
        except (BindError, ResolveError) as error:
            origin.failed(error)
            for family in {target.family for target in targets}:
                self.roster.fails(origin, family, error)
            raise with_context(error, source, destination) from error.__cause__
        bindings: dict[Target, Binding] = {}
        refusals: list[Refusal] = []
        for target, decision in zip(targets, decisions, strict=True):
            if isinstance(decision, Refusal):
                refusals.append(decision)
            else:
                bindings[target] = decision
        attempts = [
            partial(self._attempt, loop, origin, *planned, destination=destination, begun=begun)
            for planned in bindings.items()
        ]
        sock, errors = await race(attempts, delay)
        if sock is None:
            # To lack an address of the target's family is no failure, unless the source has lost it.
            if not bindings and (origin.down is not None or any(no.errno != errno.EADDRNOTAVAIL for no in refusals)):
                origin.failed(BindError(*refusals[0]))
                origin.failed_at = time.monotonic()
            raise combined(source, destination, list(zip(bindings, errors, strict=True)), refusals)
        if origin.cut:
            sock.close()
            raise with_context(BindError(errno.ENETDOWN, "it was removed meanwhile"), source, destination)
        sock.stood = self._planner.stands(sock)
        origin.opened(sock)
        assert sock.target is not None
        self._mind_ports(origin, sock.target, destination)
        return sock

    def _mind_ports(self, origin: Origin, target: Target, destination: str) -> None:
        """Past half of the ports for a target another source shall go first, for as long as it takes to free some."""
        if len(self.roster) > 1:
            if self._port_count is None:
                self._port_count = len(self._ports)
            if origin.ports[target] > self._port_count // 2:
                origin.scarce[destination] = target, self._port_count // 2

    async def reach(self, source: Source | None, target: Target, kind: int) -> BoundSocket:
        """Return a socket of *kind* connected to *target* from *source*, which no figure counts.

        Args:
            source: whence; None leaves that to the routing table.
            target: whither. ``direct`` exempts it from nothing.
            kind: ``SOCK_STREAM`` or ``SOCK_DGRAM``.

        Raises:
            BindError: the source cannot serve *target*, and nothing was sent.
            ResolveError: the name of the source could not be resolved.
            OSError: the system's answer.
        """
        loop = self.enter()
        (decision,) = await self._planner.plan(source, (target,))
        if isinstance(decision, Refusal):
            raise BindError(*decision)
        return await self._open(loop, target, decision, kind)

    def _exempt(self, host: str, targets: Sequence[Target]) -> bool:
        """Return whether all of *targets* are exempt from the source, and nothing that they do says anything of it."""
        return self._direct is not None and all(self._direct.covers(host, target) for target in targets)

    async def _plan(self, source: Source, host: str, targets: Sequence[Target]) -> Sequence[Binding | Refusal]:
        if self._direct is None:
            return await self._planner.plan(source, targets, host=host)
        pinned = [target for target in targets if not self._direct.covers(host, target)]
        decided = dict(zip(pinned, await self._planner.plan(source, pinned, host=host) if pinned else (), strict=True))
        return [decided.get(target, _EXEMPT) for target in targets]

    async def _attempt(
        self,
        loop: asyncio.AbstractEventLoop,
        origin: Origin,
        target: Target,
        binding: Binding,
        *,
        destination: str,
        begun: list[Target] | None,
    ) -> BoundSocket:
        """Try one target, and draw the conclusions about the source."""
        if begun is not None:
            begun.append(target)
        source, began = origin.source, time.monotonic()
        exempt = binding == _EXEMPT  # what becomes of it says nothing about the source

        def failed(error: OSError) -> None:
            origin.failed(error)
            if self._journal.reads_attempts:
                self._journal.failed(source, str(target), error, time.monotonic() - began)
            if not exempt:
                self._judge(origin, target, destination, error, began)

        try:
            sock = await self._open(loop, target, binding)
        except asyncio.CancelledError:
            # Given up by a caller whose patience had an end, or because another target has answered. The first SYN is
            # repeated after a second (RFC 6298): from then on the silence means something.
            if time.monotonic() - began >= _SILENCE:
                failed(TimeoutError(errno.ETIMEDOUT, "no answer"))
            raise
        except OSError as error:
            failed(error)
            raise
        seconds = time.monotonic() - began
        sock.target = target
        sock.bound = BoundSource(source, sock.interface, *sock.name)
        if binding.owner is not None:
            sock.ifindex = binding.owner.index
        origin.latency.add(seconds)
        if not exempt:
            self.roster.works(origin, target.family, target)
        if self._journal.reads_attempts:
            self._journal.connected(source, str(target), seconds)
        if binding.device is not None and sock.interface is None and not origin.unpinned:
            origin.unpinned = True
            self._journal.unpinned(source, str(target))
        return sock

    def _judge(self, origin: Origin, target: Target, destination: str, error: OSError, began: float) -> None:
        """Draw the conclusions from an attempt that has failed."""
        if isinstance(error, LinkGoneError):
            return  # the roster hears of that by itself
        if isinstance(error, NoPortError):
            self.roster.shun(origin, destination, error)
        elif isinstance(error, BindError):
            self.roster.fails(origin, target.family, error)
        elif error.errno in NO_ANSWER:
            self.roster.waits_in_vain(origin, target.family, target, began, error)
        elif error.errno in ANSWERS:
            self.roster.works(origin, target.family, target)

    async def _open(
        self, loop: asyncio.AbstractEventLoop, target: Target, binding: Binding, kind: int = socket.SOCK_STREAM
    ) -> BoundSocket:
        """Return a connected socket; where the system finds no free port for one, try the next way to get one."""
        stream = kind == socket.SOCK_STREAM
        # A mark may choose the route, so that a query is to have it too.
        options = self._options if stream else [option for option in self._options if option[0] in ANY_KIND]
        ports = self._ports if stream else ANY_PORT
        failure: OSError | None = None
        for turn, port in enumerate(ports.ways()):
            if turn % _TRIES_PER_TURN == _TRIES_PER_TURN - 1:
                await asyncio.sleep(0)
            try:
                sock = open_bound(
                    binding, target, kind=kind, options=options, strict=self._strict, ports=ports, port=port
                )
            except BindError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                failure = failure or bare(error)
                continue
            try:
                await self._connect(loop, sock, target, binding)
            except BaseException as error:
                sent = platform.sent(sock)
                sock.close()
                if isinstance(error, AiobindError) or not isinstance(error, OSError):
                    raise
                if error.errno != errno.EADDRNOTAVAIL:
                    raise plain(error, sent=sent) from bare(error)
                failure = failure or bare(error)
            else:
                return sock
        assert failure is not None
        try:
            # One errno for that, the one of connect(2), whichever call it was that found none.
            reason = f"no source address or {ports} is left for this destination"
            raise NoPortError(errno.EADDRNOTAVAIL, reason) from failure
        finally:
            del failure  # which would hold this very frame

    async def _connect(
        self, loop: asyncio.AbstractEventLoop, sock: BoundSocket, target: Target, binding: Binding
    ) -> None:
        """Connect *sock*, and hold what became of it against the promise, before and after."""
        guard = self._planner.guard(sock, binding, target)
        if guard is None:
            await connect(loop, sock, target)
        else:
            with guard:
                await guard.confirm()
                try:
                    await connect(loop, sock, target)
                except OSError as error:
                    if not guard.aborted:
                        raise
                    await guard.confirm(bare(error))  # it was the guard that ended it
                await guard.confirm()
        sock.name = address, port = sock.getsockname()[:2]
        if sock.name == (target.host, target.port) and sock.type == socket.SOCK_STREAM:
            # TCP connects a port to itself where nobody listens and connect(2) happens to choose that very port
            # (simultaneous open, RFC 9293 section 3.5).
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        promised = None if sock.local is None else zoneless(sock.local)
        # The text of ::/96 differs between Python and C.
        if promised is not None and promised != address and ip_address(promised) != ip_address(address):
            reason = f"the system connected from {address} instead of {promised}; no data was sent"
            raise BindError(errno.EADDRNOTAVAIL, reason)
        if port not in self._ports and sock.type == socket.SOCK_STREAM:
            self._ports.doubt()
            reason = f"the system connected from {port}, which is no {self._ports}; no data was sent"
            raise BindError(errno.EADDRNOTAVAIL, reason)
