"""One socket, made and connected as the library does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiobind._sockets import Opening
from aiobind._wait import way_of

if TYPE_CHECKING:
    import asyncio
    import socket

    from aiobind._binding import Binding, Target
    from aiobind._sockets import BoundSocket


def open_bound(binding: Binding, target: Target, *, port: int | None = None, **options: Any) -> BoundSocket:
    return Opening(binding, target, **options).open(port)


async def connect(loop: asyncio.AbstractEventLoop, sock: socket.socket, target: Target, *, fast: bool = False) -> None:
    await way_of(loop, fast=fast)(sock, target.sockaddr)
