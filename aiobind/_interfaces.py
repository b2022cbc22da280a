"""Law: one table of this host's interfaces for each event loop, and none is decided from it but what the news bear out.

A decision is taken when there are no news to read. It is kept, and trusted for a moment, while the loop reads what
comes; what is made by it is held against the news that have come meanwhile, before it is used.

The table is kept by the system's own news (`_platform.base.Feed`), read on the loop in small pieces that never block.
The kernel queues the news before the call that makes the change returns, so that a table whose queue is empty is as
fresh as a list told anew: that is one system call, 0.5 µs. It tells late of two things only: of a carrier, by a second,
and of a new IPv6 address, by some milliseconds (addrconf's work queue).

The table lives as long as somebody holds it: the connectors of the loop share it, and the last one takes it along,
whether it was closed or merely forgotten.
"""

from __future__ import annotations

import asyncio
import errno
import math
import socket
import time
import weakref
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias, cast

from ._binding import Binding, Link, Refusal, bind_on_link, listed, zoneless
from ._errors import BindError
from ._loops import PerLoop
from ._platform import platform
from ._platform.base import AddressGone, AddressSeen, LinkGone, LinkSeen, ListEnd
from ._sources import Address, Interface

if TYPE_CHECKING:
    from ._binding import IPAddress, LinkAddress, Target
    from ._platform.base import Feed, Record
    from ._sockets import BoundSocket
    from ._sources import Source

__all__ = ["Guard", "InterfaceTable", "InterfaceWatch", "Interfaces", "LinkGoneError", "Listener", "NoNeighbourError"]

#: Datagrams that one turn of the loop reads at most, so that a host with 10,000 addresses stalls nobody.
_PIECES_PER_TURN = 2

#: For so many seconds the table is trusted without a look, while the loop reads what comes. Should it be wrong, that is
#: found out after the connect, for the news have been read by then: a SYN may have gone, but no byte.
_TRUST = 0.002

#: After so many seconds the kernel has asked for a neighbour in vain (neighbour discovery: 3 times, one second each).
_NEIGHBOUR_TIMEOUT = 3.08


_changes = count(1)
_Watched: TypeAlias = "tuple[Link | None, Target, bool]"

_Question: TypeAlias = "tuple[str, int, str, tuple[IPAddress, ...] | None, bool]"


class InterfaceTable:
    """The links of this host and their addresses, as the records told them. Pure."""

    def __init__(self) -> None:
        self._links: dict[int, Link] = {}
        self._names: dict[str, Link] = {}
        #: every address of this host, as text, and the entries of the links that hold it
        self.own: dict[str, dict[tuple[int, bytes], LinkAddress]] = {}
        self._decisions: dict[_Question, Binding | Refusal] = {}
        #: another number after each change, and no two tables have the same; and how often something has gone that a
        #: connection may stand on
        self.changes, self.losses = next(_changes), 0

    def apply(self, record: Record) -> None:
        """Take one record in."""
        match record:
            case LinkSeen():
                self._link(record)
            case LinkGone(index):
                self.changes = next(_changes)
                self.losses += 1
                self._gone(index)
            case AddressSeen(index, address, entry) if index in self._links:
                text = str(address.ip)
                entries = self.own.setdefault(text, {})
                if entries.get((index, entry)) == address:
                    return  # a router's advertisement has made it younger
                self.changes = next(_changes)
                self._links[index].addresses[text] = address
                entries[index, entry] = address
            case AddressGone(index, ip, entry) if index in self._links:
                self.changes = next(_changes)
                self.losses += 1
                other = self._disown(index, str(ip), entry)
                if other is not None:
                    self._links[index].addresses[str(ip)] = other
                else:
                    self._links[index].addresses.pop(str(ip), None)
            case _:
                pass
        self._decisions.clear()

    def _link(self, seen: LinkSeen) -> None:
        old = self._links.get(seen.ifindex)
        link = Link(
            seen.ifindex,
            seen.name,
            loopback=seen.loopback,
            kind=seen.kind,
            master=seen.master,
            altnames=seen.altnames,
            up=seen.up,
            carrier=seen.carrier,
        )
        self.changes = next(_changes)
        if old is not None:
            lost = (old.up and not link.up) or (old.carrier and not link.carrier)
            self.losses += lost or (old.name, old.altnames) != (link.name, link.altnames)
            link.addresses = old.addresses
            self._unname(old)
        self._links[seen.ifindex] = link
        for name in (seen.name, *seen.altnames):
            self._names[name] = link

    def _gone(self, index: int) -> None:
        link = self._links.pop(index, None)
        if link is not None:
            self._unname(link)
            for text in link.addresses:
                for holder, entry in tuple(self.own[text]):
                    if holder == index:
                        self._disown(index, text, entry)

    def _unname(self, link: Link) -> None:
        for name in (link.name, *link.altnames):
            # The name may be another link's by now: a rename and a new link under the old name cross.
            if self._names.get(name) is link:
                del self._names[name]

    def _disown(self, index: int, text: str, entry: bytes) -> LinkAddress | None:
        """Drop one entry; return another one of the link with the same address."""
        entries = self.own.get(text, {})
        entries.pop((index, entry), None)
        if not entries:
            self.own.pop(text, None)
        return next((address for (holder, _), address in entries.items() if holder == index), None)

    def link(self, name: str) -> Link | None:
        """Return the link with this name or alternative name."""
        return self._names.get(name)

    def name_of(self, ifindex: int) -> str | None:
        """Return the present name of the link with this index."""
        link = self._links.get(ifindex)
        return link.name if link is not None else None

    def bind(
        self, name: str, target: Target, local: tuple[IPAddress, ...] | None = None, *, borrow: bool = False
    ) -> Binding | Refusal:
        """Decide how interface *name* serves *target*; constant time while nothing changes."""
        key = (name, target.family, target.reach, local, borrow)
        cacheable = not target.scope_id and target.host not in self.own
        if cacheable and (known := self._decisions.get(key)) is not None:
            return known
        link = self._names.get(name)
        if link is None:
            return Refusal(errno.ENODEV, self._no_such_link(name))
        master = self._links.get(link.master)
        decision = bind_on_link(link, target, self.own, local, master=master, borrow=borrow)
        if cacheable:
            self._decisions[key] = decision
        return decision

    def trouble(self, source: Source, *, borrow: bool = False) -> Refusal | None:
        """Return why *source* can serve nobody at present: its interface is away, or its address; None: nothing is.

        A literal address stands and falls with the interface that holds it. That of a name, or of a prefix, is not
        known here.
        """
        match source:
            case Interface(name, local):
                link = self._names.get(name)
                if link is None:
                    return Refusal(errno.ENODEV, self._no_such_link(name))
                if not (link.up and link.carrier):
                    return _away(link)
                if borrow or link.kind == "vrf":
                    return None
                if isinstance(local, Address):
                    if self._holds(link, zoneless(local.ip)):
                        return None
                    return Refusal(errno.EADDRNOTAVAIL, f"{local} is not an address of {name}")
                if not any(_serves(address) for address in link.addresses.values()):
                    return Refusal(errno.EADDRNOTAVAIL, f"{name} has no address")
                return None
            case Address(ip):
                text, _, zone = str(ip).partition("%")
                if zone:
                    return self.trouble(Interface(zone, local=source), borrow=borrow)
                if self.stands(None, 0, text) or (ip.is_loopback and ip.version == 4):
                    return None
                holders = [self._links[index] for index, _ in self.own.get(text, ())]
                if holders:
                    return _away(holders[0])
                return Refusal(errno.EADDRNOTAVAIL, f"no interface holds {text}")
            case _:
                return None

    def stands(self, name: str | None, ifindex: int, local: str, *, borrow: bool = False) -> bool:
        """Return whether a connection can still get through, as far as this host goes.

        Args:
            name: the interface that it is pinned to.
            ifindex: the index of that: under the same name there may be another one by now.
            local: its local address, without a zone.
            borrow: the address need not be that interface's.
        """
        if name is not None:
            link = self._names.get(name)
            if link is None or link.index != ifindex or not (link.up and link.carrier):
                return False
            return self._holds(link, local) or ((borrow or link.kind == "vrf") and local in self.own)
        holders = [self._links[index] for index, _ in self.own.get(local, ())]
        return any(link.up and link.carrier for link in holders)

    def _holds(self, link: Link, local: str) -> bool:
        # The whole of 127.0.0.0/8 is local to the loopback interface, which lists 127.0.0.1 alone.
        return local in link.addresses or (link.loopback and local.startswith("127."))

    def _no_such_link(self, name: str) -> str:
        same = [known for known in self._names if known.casefold() == name.casefold()]
        hint = f"; did you mean {same[0]!r}?" if same else ""
        return f"no interface named {name!r} (have: {listed(sorted(self._names))}){hint}"


def _away(link: Link) -> Refusal:
    if not link.up:
        return Refusal(errno.ENETUNREACH, f"{link.name} is down")
    return Refusal(errno.EHOSTUNREACH, f"{link.name} has no carrier")


def _serves(address: LinkAddress) -> bool:
    # An interface that has lost its addresses still has the link-local one that the kernel gives it.
    return not address.tentative and not (address.ip.version == 6 and address.ip.is_link_local)


class Listener(Protocol):
    """Who wants to know what becomes of the interfaces."""

    def links_changed(self, table: InterfaceTable, *, lost: bool) -> None:
        """Take notice of *table*; *lost*: something has gone that a connection may stand on."""
        ...


class Interfaces:
    """The table and the feed that keeps it. Reads what there is; never waits."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._listing: InterfaceTable | None = None
        self._must_ask = True
        #: None until everything has been told once
        self.table: InterfaceTable | None = None

    def quiet(self) -> bool:
        """Return whether the table is true in this moment."""
        return self.told and self._feed.quiet()

    @property
    def told(self) -> bool:
        """Whether the table is there, and no list is due that will replace it."""
        return self.table is not None and self._listing is None and not self._must_ask

    def doubt(self) -> None:
        """Have everything told anew, by the next `read`."""
        self._must_ask = True

    def read(self) -> bool:
        """Take in one piece of news, or ask for everything if that is due; return whether there may be more.

        While everything is told anew, decisions are still taken from the old table.

        Raises:
            OSError: the system refused to tell everything; the next call asks again.
        """
        try:
            records = self._feed.read()
        except OSError as error:
            self._listing, self._must_ask = None, True
            if error.errno != errno.ENOBUFS:
                raise
            self._ask()  # news were lost
            return True
        if records is None and self._must_ask:
            self._ask()
            return True
        for record in records or ():
            self._take(record)
        return records is not None

    def _ask(self) -> None:
        self._listing, self._must_ask = None, True
        self._feed.ask()
        self._listing, self._must_ask = InterfaceTable(), False

    def _take(self, record: Record) -> None:
        if not isinstance(record, ListEnd):
            for table in (self.table, self._listing):
                if table is not None:
                    table.apply(record)
        elif self._listing is not None:  # else it is the end of a list that was given up
            if record.whole:
                self.table, self._listing = self._listing, None
            else:
                self._ask()

    def caught_up(self) -> InterfaceTable:
        """Return the table after all news, the first time after everything has been told; for use without a loop.

        The kernel tells a list while it is read, so this takes the time of the reading: 0.2 ms for a few interfaces
        and addresses, 60 ms for 10,000; and two system calls, 2 µs, when there are no news.

        Raises:
            OSError: the system refused to tell.
        """
        while self.read() or not self.told:
            pass
        assert self.table is not None
        return self.table


class InterfaceWatch(PerLoop):
    """Keeps the interfaces of one loop true. Get it by ``of``; hold it while it is needed."""

    @classmethod
    def _open(cls, loop: asyncio.AbstractEventLoop) -> Self:
        return cls(loop, platform.feed())

    def __init__(self, loop: asyncio.AbstractEventLoop, feed: Feed) -> None:
        super().__init__(loop, feed)
        self._loop = loop
        self._interfaces = Interfaces(feed)
        self._announces = feed.announces
        #: the table's number of changes; 0 while there may be more to read
        self.stamp = 0
        #: when that was true, by ``time.monotonic()``
        self._true_at = -math.inf
        self._waiting: list[asyncio.Future[OSError | None]] = []
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._heard: tuple[InterfaceTable | None, int, int] = (None, 0, 0)
        #: attempts under way; and those of them that have a guard already
        self._attempts: dict[BoundSocket, tuple[_Watched, float]] = {}
        self._guarded: dict[BoundSocket, Guard] = {}
        self.guards: set[Guard] = set()
        self._sweep_is_due = False

    def listen(self, listener: Listener) -> None:
        """Tell *listener*, which is held weakly, of the interfaces now or soon, and whenever they change.

        Raises:
            OSError: the system refused to tell.
        """
        self._listeners.add(listener)
        if self._interfaces.told:
            assert self._interfaces.table is not None
            listener.links_changed(self._interfaces.table, lost=True)
        else:
            self.stamp = 0
            self._interfaces.read()  # asks for them; the answer comes by the reader

    @property
    def last(self) -> InterfaceTable | None:
        """The table as it was last read, if it has been; there may be news."""
        return self._interfaces.table

    def look(self) -> InterfaceTable | None:
        """Return the table if it is true in this moment; if not, `caught_up` makes it so.

        Raises:
            OSError: the system refused to tell.
        """
        return self._interfaces.table if self._interfaces.quiet() else None

    def trusted(self, now: float) -> int:
        """Return the stamp if it was true a moment ago, which costs nothing while connects follow each other.

        Args:
            now: by ``time.monotonic()``.

        Raises:
            OSError: the system refused to tell.
        """
        if not self.stamp or now - self._true_at > _TRUST:
            table = self.look()
            if table is None:
                return 0
            self.stamp, self._true_at = table.changes, now
        return self.stamp

    def has_waited(self, since: float) -> None:
        """Take note that somebody has waited for an event of the loop since then, by ``time.monotonic()``.

        The loop looks at all descriptors at once, and reads the news before whoever waited goes on.
        """
        if self._announces and self.stamp and since > self._true_at:
            self._true_at = since

    async def caught_up(self) -> InterfaceTable:
        """Return the table after all news that the system has sent.

        Raises:
            OSError: the system refused to tell.
        """
        while True:
            refusal: asyncio.Future[OSError | None] = self._loop.create_future()
            self._waiting.append(refusal)
            # Others run between the pieces, and may be the ones who read that the system refused.
            while self.on_readable() and not (refusal.done() and refusal.result()):  # noqa: ASYNC110 - see above
                await asyncio.sleep(0)
            error = await refusal
            if error is not None:
                raise OSError(error.errno, error.strerror) from error
            if self._interfaces.told and self._interfaces.table is not None:
                return self._interfaces.table

    async def told_anew(self) -> InterfaceTable:
        """Return the table after the system has told everything anew.

        Raises:
            OSError: the system refused to tell.
        """
        self._interfaces.doubt()
        self.stamp = 0
        return await self.caught_up()

    def begin(self, sock: BoundSocket, watched: _Watched, began: float) -> None:
        """Watch over an attempt whose guard is made when there is something to guard against: seldom.

        Args:
            sock: which begins to connect.
            watched: the link that it stands and falls with, its target, and whether it borrows its address.
            began: by ``time.monotonic()``.
        """
        self._attempts[sock] = watched, began
        if not self._sweep_is_due:
            self._sweep_in(_NEIGHBOUR_TIMEOUT)

    def end(self, sock: BoundSocket) -> Guard | None:
        """End `begin`; return the guard, if there was something to guard against."""
        attempt = self._attempts.pop(sock, None)
        if attempt is not None:
            self.has_waited(attempt[1])
            return None
        guard = self._guarded.pop(sock)
        self.guards.discard(guard)
        return guard

    def _guard(self, sock: BoundSocket, watched: _Watched, began: float) -> None:
        link, target, borrow = watched
        guard = self._guarded[sock] = Guard(self, sock, link, sock.local, target, borrow=borrow)
        guard.began = began

    def _guard_all(self, due: float = math.inf) -> None:
        """Make the guards of all attempts that have begun by then."""
        for sock, (watched, began) in tuple(self._attempts.items()):
            if began <= due:
                del self._attempts[sock]
                self._guard(sock, watched, began)

    def enter(self, guard: Guard) -> float:
        """Watch over an attempt; return the time, by ``time.monotonic()``."""
        self.guards.add(guard)
        if not self._sweep_is_due:
            self._sweep_in(_NEIGHBOUR_TIMEOUT)
        return time.monotonic()

    def _sweep_in(self, seconds: float) -> None:
        # One timer for all attempts, the oldest one's: none of them pays for one of its own.
        self._sweep_is_due = True
        self._loop.call_later(seconds, _on_sweep, cast("weakref.ref[InterfaceWatch]", weakref.ref(self)))

    def _sweep(self) -> None:
        """Have the attempts that are old enough look for their neighbour."""
        self._sweep_is_due = False
        due = time.monotonic() - _NEIGHBOUR_TIMEOUT
        self._guard_all(due)
        # A neighbour may be lost later as well, and nobody would tell of that either.
        again = [1.0 if guard.look_for_neighbour(due) else guard.began - due for guard in self.guards]
        again += [began - due for _, began in self._attempts.values()][:1]  # they are in the order of their time
        if again:
            self._sweep_in(min(again))

    def on_readable(self) -> bool:
        """Take in a few pieces of news, and tell those who wait; return whether there may be more."""
        self.stamp, more = 0, True
        try:
            for _ in range(_PIECES_PER_TURN):
                more = self._interfaces.read()
                if not more:
                    break
        except OSError as error:
            self._tell(error)
            return False
        if self._interfaces.told:
            if not more and self._interfaces.table is not None:
                self.stamp = self._interfaces.table.changes
            self._tell(None)
            self._tell_listeners()
        if (self.guards or self._attempts) and self._interfaces.table is not None:
            self._guard_all()
            for guard in tuple(self.guards):
                guard.check(self._interfaces.table)
        return more

    def _tell_listeners(self) -> None:
        table = self._interfaces.table
        assert table is not None
        last, changes, losses = self._heard
        if table is last and table.changes == changes:
            return
        self._heard = table, table.changes, table.losses
        for listener in tuple(self._listeners):
            listener.links_changed(table, lost=table is not last or table.losses != losses)

    def _tell(self, refusal: OSError | None) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(refusal)


class LinkGoneError(BindError):
    """The interface of an attempt has gone, or its address, since it began."""


class NoNeighbourError(OSError):
    """Nobody answers for the next hop of an attempt."""


class Guard:
    """Aborts an attempt whose interface goes down, goes away or loses the address while it is connecting.

    The kernel tells a socket in SYN_SENT nothing of that (no event within 4.5 s, Linux 6.18), and ``shutdown`` ends
    the attempt on every loop: connect fails with ECONNRESET, and `confirm` says why. Nor does it tell a pinned socket
    that nobody answers for an IPv6 neighbour, or for any when its address is borrowed: the error comes to it by the
    loopback interface, which is not the one that it is pinned to. So that is looked up as well.
    """

    __slots__ = (
        "_borrow",
        "_link",
        "_local",
        "_looked",
        "_sock",
        "_target",
        "_watch",
        "began",
        "refusal",
        "silent_hop",
    )

    def __init__(
        self,
        watch: InterfaceWatch,
        sock: socket.socket,
        link: Link | None,
        local: IPAddress | None,
        target: Target,
        *,
        borrow: bool = False,
    ) -> None:
        # Without a link it is whichever holds the address.
        self._watch = watch  # which lives as long as it is needed, also when the connector is closed meanwhile
        self._sock = sock
        self._link = link
        self._local = local
        self._target = target
        self._borrow = borrow
        self._looked = -math.inf
        self.refusal: Refusal | None = None
        self.silent_hop: str | None = None
        self.began = watch.enter(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.guards.discard(self)

    async def confirm(self, cause: OSError | None = None) -> None:
        """Hold the attempt against the present state of the interface.

        Args:
            cause: what the attempt has ended with, if it has.

        Raises:
            BindError: the interface can no longer serve it.
            NoNeighbourError: EHOSTUNREACH, nobody answers for the next hop.
            OSError: the host's interfaces cannot be read.
        """
        if self.silent_hop is not None:
            assert self._link is not None
            reason = f"no route to host: nobody answers for {self.silent_hop} on {self._link.name}"
            raise NoNeighbourError(errno.EHOSTUNREACH, reason) from cause
        if self.refusal is None:
            self.check(self._watch.look() or await self._watch.caught_up())
        if self.refusal is not None:
            raise LinkGoneError(self.refusal.errno, f"{self.refusal.reason} (since the attempt began)") from cause

    def check(self, table: InterfaceTable) -> None:
        """Abort if *table* refuses now what it allowed before."""
        refusal = self._refused_by(table)
        if refusal is not None and self.refusal is None:
            self.refusal = refusal
            self._abort()

    def _refused_by(self, table: InterfaceTable) -> Refusal | None:
        if self._link is None:
            assert self._local is not None
            if table.stands(None, 0, zoneless(self._local)):
                return None
            return table.trouble(Address(self._local))
        # By its index, for a socket follows its interface through a change of name, and no other link of that name.
        name = table.name_of(self._link.index)
        if name is None:
            return Refusal(errno.ENODEV, f"{self._link.name} is gone")
        local = None if self._local is None else (self._local,)
        decision = table.bind(name, self._target, local, borrow=self._borrow)
        return decision if isinstance(decision, Refusal) else None

    def look_for_neighbour(self, due: float) -> bool:
        """Abort if nobody answers for the next hop; return False if it is too early: the attempt began after *due*."""
        if self.began > due:
            return False
        if self._looked > due - 1.0:  # each once in a second: else every sweep would ask for all that are old
            return True
        self._looked = due
        pinned = self._link is not None and self._local is not None
        if pinned and (self._borrow or self._target.family == socket.AF_INET6):
            assert self._link is not None
            assert self._local is not None
            with suppress(OSError):
                source = zoneless(self._local)
                self.silent_hop = platform.silent_hop(self._link.index, self._target.host, source)
        if self.silent_hop is not None:
            self._abort()
        return True

    @property
    def aborted(self) -> bool:
        """Whether it was this guard that ended the attempt."""
        return self.refusal is not None or self.silent_hop is not None

    def _abort(self) -> None:
        with suppress(OSError):  # it has ended by itself meanwhile
            self._sock.shutdown(socket.SHUT_RDWR)


def _on_sweep(reference: weakref.ref[InterfaceWatch]) -> None:
    watch = reference()
    if watch is not None:
        watch._sweep()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - its own callback, without a hard reference
