"""Law: from a source to what each target's socket is bound to. Names and interfaces are looked up here, and only here.

The decisions themselves are `_binding`'s. A source that fails as a whole (its name cannot be resolved, the host's
interfaces cannot be read) raises; a target that it cannot serve is a `Refusal` beside those that it can.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from contextlib import suppress
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, assert_never

from ._binding import Binding, Refusal, bind_any, zoneless
from ._errors import BindError, ResolveError
from ._interfaces import Guard, InterfaceWatch
from ._platform import platform
from ._sources import Address, Host, Interface, Prefix

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from ._binding import IPAddress, Target
    from ._interfaces import InterfaceTable, Listener
    from ._resolve import Lookup
    from ._sockets import BoundSocket
    from ._sources import Source

__all__ = ["Planner", "not_routed"]


class Planner:
    """Decides for one connector, on one loop.

    Args:
        lookup: finds the addresses of the sources' names.
        borrow: the address of another interface will do where an interface has none that serves.
        sticky_prefix: a prefix gives each destination host an address that stays the same; by default each connection
            gets one of its own.
    """

    def __init__(self, *, lookup: Lookup, borrow: bool = False, sticky_prefix: bool = False) -> None:
        self._lookup = lookup
        self._borrow = borrow
        # Nobody outside can tell which address a host is going to see.
        self._secret = os.urandom(32) if sticky_prefix else None
        self._watch: InterfaceWatch | None = None
        self._closed = False

    def close(self) -> None:
        """Let go of the loop's interface watch."""
        self._watch, self._closed = None, True

    async def plan(
        self, source: Source | None, targets: Sequence[Target], *, host: str = ""
    ) -> list[Binding | Refusal]:
        """Return the decision for each of *targets*; without a source, all is left to the routing table.

        Args:
            source: whence.
            targets: the addresses of the destination.
            host: what the caller calls the destination; by default each target is one of its own.

        Raises:
            BindError: the host's interfaces cannot be read.
            ResolveError: the source is a name that has no address.
        """
        match source:
            case None:
                return [Binding() for _ in targets]
            case Interface(name, local):
                # The name of its address is asked for through the interface.
                found = None if local is None else await self._addresses(local, Interface(name))
                return await self._on_interface(name, found, targets)
            case Address() | Host():
                return await self._on_address(await self._addresses(source, None), targets)
            case Prefix():
                return [await self._from_prefix(source, target, host or target.host) for target in targets]
        assert_never(source)

    def stamp(self, now: float) -> int:
        """Return a number that stays the same as long as decisions do; 0: they have to be taken anew.

        Args:
            now: by ``time.monotonic()``.
        """
        try:
            return self._watch.trusted(now) if self._watch is not None else 0
        except OSError:  # `plan` will say so
            return 0

    def holds(self, stamp: int) -> bool:
        """Return whether decisions are still those of *stamp*, by the news that have been read."""
        return self._watch is not None and self._watch.stamp == stamp

    def watching(self) -> InterfaceWatch:
        """Return the watch of the running loop, which lives as long as it is held, also when this is closed."""
        return self._watch or InterfaceWatch.of(asyncio.get_running_loop())

    def guard(self, sock: BoundSocket, binding: Binding, target: Target) -> Guard | None:
        """Return what aborts *sock* when its interface can no longer serve it while it connects; None: nothing can."""
        if binding.owner is not None:
            # The connector may have been closed since it planned: its attempts are watched over to their end.
            return Guard(self.watching(), sock, binding.owner, sock.local, target, borrow=self._borrow)
        # A literal address leaves by whatever interface the routing table names, and may work while its own is away
        # (the weak host model): so it is only guarded against what happens from now on.
        table = self._watch.last if self._watch is not None else None
        if (
            table is None
            or sock.local is None
            or binding.device
            or binding.freebind
            or not table.stands(None, 0, zoneless(sock.local))
        ):
            return None
        assert self._watch is not None
        return Guard(self._watch, sock, None, sock.local, target)

    def listen(self, listener: Listener) -> None:
        """Tell *listener* of the interfaces, whenever they change; say nothing where the system does not tell."""
        with suppress(OSError):
            if self._watch is None:
                self._watch = InterfaceWatch.of(asyncio.get_running_loop())
            self._watch.listen(listener)

    def stands(self, sock: BoundSocket) -> bool:
        """Return whether the interface and the address of *sock* are there; False as well when nobody can tell."""
        table = self._watch.last if self._watch is not None else None
        return table is not None and table.stands(
            sock.interface, sock.ifindex, sock.name[0].partition("%")[0], borrow=self._borrow
        )

    async def _on_interface(
        self, name: str, local: tuple[IPAddress, ...] | None, targets: Sequence[Target]
    ) -> list[Binding | Refusal]:
        table = await self._table()
        decisions = [table.bind(name, target, local, borrow=self._borrow) for target in targets]
        if any(isinstance(decision, Refusal) and decision.errno == errno.EHOSTUNREACH for decision in decisions):
            # The kernel tells of a carrier once in a second at most (net/core/link_watch.c): only a list told anew may
            # say that there is none.
            table = await self._table(anew=True)
            decisions = [table.bind(name, target, local, borrow=self._borrow) for target in targets]
        return decisions

    async def _from_prefix(self, source: Prefix, target: Target, host: str) -> Binding | Refusal:
        seed = None if self._secret is None else self._secret + host.rstrip(".").casefold().encode()
        ip = source.pick(seed)
        (decision,) = await self._on_address((ip,), (target,), freebind=True)
        return decision if isinstance(decision, Refusal) else not_routed(source, ip) or decision

    async def _on_address(
        self, local: tuple[IPAddress, ...], targets: Sequence[Target], *, freebind: bool = False
    ) -> list[Binding | Refusal]:
        own: Container[str] = ()
        if any(ip.is_loopback for ip in local) and any(target.reach != "loopback" for target in targets):
            own = (await self._table()).own
        return [bind_any(local, target, own=own, freebind=freebind) for target in targets]

    async def _addresses(self, local: Address | Host, via: Interface | None) -> tuple[IPAddress, ...]:
        if isinstance(local, Address):
            return (local.ip,)
        try:
            found = await self._lookup.find(local.name, via=via)
        except socket.gaierror as error:
            text = f"the source's name {local.name!r} cannot be resolved: {error.strerror}"
            raise ResolveError(error.errno or socket.EAI_FAIL, text) from error
        return tuple(_with_zone(ip, scope_id) if scope_id else ip for ip, scope_id in found)

    async def _table(self, *, anew: bool = False) -> InterfaceTable:
        try:
            watch = self.watching()
            if not self._closed:  # an attempt that is under way does not keep it
                self._watch = watch
            if anew:
                return await watch.told_anew()
            return watch.look() or await watch.caught_up()
        except OSError as error:
            reason = f"the interfaces of this host cannot be read: {error.strerror}"
            raise BindError(error.errno or errno.EINVAL, reason) from error


def not_routed(source: Prefix, ip: IPAddress) -> Refusal | None:
    """Return why no connection can come from *ip*, an address of *source*, if no route brings the answers here.

    The kernel itself would find out for IPv4 alone, with a word that says nothing, and send by IPv6 what nobody ever
    answers. To ask takes 16 µs.
    """
    if platform.routed_here(ip) is not False:
        return None
    command = f"ip route add local {source.network} dev lo"
    reason = f"{source.network} is not routed to this host, so no answer would arrive: {command}"
    return Refusal(errno.EADDRNOTAVAIL, reason)


def _with_zone(ip: IPAddress, scope_id: int) -> IPAddress:
    with suppress(OSError):  # the interface is gone: without its zone the address cannot be bound, which is right
        return IPv6Address(f"{ip}%{socket.if_indextoname(scope_id)}")
    return ip
