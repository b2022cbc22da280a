"""Law: to a library that only takes ``loop=``, this is the running loop, but for two doors, which are a connector's.

It adds nothing to what the loop and the connector do: what is to be connected goes to the connector; what has a socket
already, and all else, goes to the loop.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine

    Door: TypeAlias = Callable[..., Coroutine[Any, Any, tuple[Any, Any]]]

__all__ = ["LoopOfSources"]


class LoopOfSources:
    """Stands for a loop.

    Args:
        loop: the running one.
        connect: makes its connections.
        associate: makes its datagram endpoints.
    """

    __slots__ = ("__weakref__", "_associate", "_connect", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, connect: Door, associate: Door) -> None:
        self._loop = loop
        self._connect = connect
        self._associate = associate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    @property  # type: ignore[misc]  # what isinstance asks
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._loop)

    # To all that keeps something for each loop it is the same key: asyncio.current_task(loop) before Python 3.14.
    def __eq__(self, other: object) -> bool:
        return self is other or self._loop == other

    def __hash__(self) -> int:
        return hash(self._loop)

    def __repr__(self) -> str:
        return f"<sources on {self._loop!r}>"

    async def create_connection(
        self, protocol_factory: Callable[[], Any], host: Any = None, port: Any = None, **options: Any
    ) -> tuple[Any, Any]:
        """Connect to *host* from a source."""
        create = self._loop.create_connection if host is None else self._connect
        return await create(protocol_factory, host, port, **options)

    async def create_datagram_endpoint(
        self, protocol_factory: Callable[[], Any], local_addr: Any = None, remote_addr: Any = None, **options: Any
    ) -> tuple[Any, Any]:
        """Make an endpoint with a source."""
        given = options.get("sock") is not None or options.get("family") == getattr(socket, "AF_UNIX", -1)
        create = self._loop.create_datagram_endpoint if given else self._associate
        return await create(protocol_factory, local_addr, remote_addr, **options)
