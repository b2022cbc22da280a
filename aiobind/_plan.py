"""Law: from a source to what each target's socket is bound to. Names and interfaces are looked up here, and only here.

The decisions themselves are `_binding`'s. A source that fails as a whole (its name cannot be resolved, the host's
interfaces cannot be read) raises; a target that it cannot serve is a `Refusal` beside those that it can.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import nullcontext, suppress
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, assert_never

from ._binding import Refusal, bind_any, listed
from ._errors import BindError, ResolveError
from ._interfaces import Guard, InterfaceWatch
from ._resolve import resolve
from ._sources import Address, Host, Interface, Prefix

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Sequence
    from contextlib import AbstractContextManager

    from ._binding import Binding, IPAddress, Target
    from ._interfaces import InterfaceTable
    from ._sources import Source

__all__ = ["Planner"]


#: A cached look may allow. What it refuses the news may allow, but for a carrier: the kernel tells of one once in a
#: second at most (net/core/link_watch.c), so that only a list told anew may say that there is none.
_LOOKS = (InterfaceWatch.table, InterfaceWatch.caught_up, InterfaceWatch.told_anew)


class Planner:
    """Decides for one connector, on one loop."""

    def __init__(self, *, ttl: float | None) -> None:
        self._ttl = ttl
        self._watch: InterfaceWatch | None = None

    def close(self) -> None:
        """Let go of the loop's interface watch."""
        self._watch = None

    async def plan(self, source: Source, targets: Sequence[Target]) -> list[Binding | Refusal]:
        """Return the decision for each of *targets*.

        Raises:
            BindError: the host's interfaces cannot be read.
            ResolveError: the source is a name that has no address.
        """
        match source:
            case Interface(name, local):
                return await self._on_interface(name, None if local is None else await self._addresses(local), targets)
            case Address() | Host():
                return await self._on_address(await self._addresses(source), targets)
            case Prefix():
                each = [await self._on_address((source.pick(),), (target,), freebind=True) for target in targets]
                return [decision for decisions in each for decision in decisions]
        assert_never(source)

    def guard(self, sock: socket.socket, binding: Binding, target: Target) -> AbstractContextManager[Guard | None]:
        """Return a context in which *sock* connects, and is aborted when its interface can no longer serve it."""
        if binding.owner is None or self._watch is None:
            return nullcontext()
        return Guard(self._watch, sock, binding, target)

    async def verify(self, binding: Binding, address: str) -> None:
        """Hold the local address of a new connection against the promise.

        Raises:
            BindError: EADDRNOTAVAIL, it is not what was promised. A table that says so is read to the end first, for
                an address that has just arrived is no leak. Or the host's interfaces cannot be read.
        """
        if binding.local:
            kept = any(str(ip).partition("%")[0] == address for ip in binding.local)
        elif binding.owner is None or address in binding.owner.addresses:
            return
        else:
            link = (await self._table(InterfaceWatch.caught_up)).link(binding.owner.name)
            kept = link is not None and address in link.addresses
        if not kept:
            promised = listed(binding.local) if binding.local else f"an address of {binding.device}"
            raise BindError(
                errno.EADDRNOTAVAIL,
                f"the system connected from {address}, which is not {promised}; nothing was sent",
            )

    async def _on_interface(
        self, name: str, local: tuple[IPAddress, ...] | None, targets: Sequence[Target]
    ) -> list[Binding | Refusal]:
        decisions: list[Binding | Refusal] = []
        for look in _LOOKS:
            table = await self._table(look)
            decisions = [table.bind(name, target, local) for target in targets]
            refused = {decision.errno for decision in decisions if isinstance(decision, Refusal)}
            if not refused or (look is InterfaceWatch.caught_up and errno.EHOSTUNREACH not in refused):
                break
        return decisions

    async def _on_address(
        self, local: tuple[IPAddress, ...], targets: Sequence[Target], *, freebind: bool = False
    ) -> list[Binding | Refusal]:
        own: Container[str] = ()
        if any(ip.is_loopback for ip in local) and any(target.reach != "loopback" for target in targets):
            own = (await self._table(InterfaceWatch.caught_up)).own
        return [bind_any(local, target, own=own, freebind=freebind) for target in targets]

    async def _addresses(self, local: Address | Host) -> tuple[IPAddress, ...]:
        if isinstance(local, Address):
            return (local.ip,)
        try:
            found = await resolve(local.name, ttl=self._ttl)
        except socket.gaierror as error:
            text = f"the source's name {local.name!r} cannot be resolved: {error.strerror}"
            raise ResolveError(error.errno or socket.EAI_FAIL, text) from error
        return tuple(_with_zone(ip, scope_id) if scope_id else ip for ip, scope_id in found)

    async def _table(self, look: Callable[[InterfaceWatch], Awaitable[InterfaceTable]]) -> InterfaceTable:
        try:
            if self._watch is None:
                self._watch = InterfaceWatch.of(asyncio.get_running_loop())
            return await look(self._watch)
        except OSError as error:
            reason = f"the interfaces of this host cannot be read: {error.strerror}"
            raise BindError(error.errno or errno.EINVAL, reason) from error


def _with_zone(ip: IPAddress, scope_id: int) -> IPAddress:
    with suppress(OSError):  # the interface is gone: without its zone the address cannot be bound, which is right
        return IPv6Address(f"{ip}%{socket.if_indextoname(scope_id)}")
    return ip
