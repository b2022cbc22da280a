"""The rows of aiobind's own edges (``clients.py`` says what a row is): anyio, httpx, httpx2 and bare httpcore."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import httpcore
import httpcore2
import httpx
import httpx2
import servers
from clients import ALL, Client, Talk, trusting

import aiobind
from aiobind.anyio import connect_tcp
from aiobind.httpx import BoundBackend, BoundTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["ROWS"]


@contextlib.asynccontextmanager
async def _anyio(connector: aiobind.Connector, host: str, port: int, *, tls: bool = False) -> AsyncIterator[Talk]:
    options: dict[str, Any] = {"ssl_context": trusting(), "tls_standard_compatible": False} if tls else {}
    async with await connect_tcp(host, port, connector=connector, **options) as stream:

        async def talk() -> None:
            await stream.send(b"PING\r\n")
            assert await stream.receive() == b"+PONG\r\n"

        yield talk


@contextlib.asynccontextmanager
async def _httpx(
    transport: BoundTransport, host: str, port: int, *, library: Any = httpx, scheme: str = "http"
) -> AsyncIterator[Talk]:
    async with library.AsyncClient(transport=transport) as client:

        async def talk() -> None:
            response = await client.get(f"{scheme}://{host}:{port}/")
            assert response.text == aiobind.bound_source(response).address
            assert response.http_version == ("HTTP/2" if scheme == "https" else "HTTP/1.1")

        yield talk


def _http2(*sources: str, **options: Any) -> BoundTransport:
    return BoundTransport(*sources, verify=trusting(), http2=True, **options)


@contextlib.asynccontextmanager
async def _httpcore(
    connector: aiobind.Connector, host: str, port: int, *, library: Any = httpcore
) -> AsyncIterator[Talk]:
    backend = BoundBackend(connector=connector)
    async with library.AsyncConnectionPool(network_backend=backend) as pool:

        async def talk() -> None:
            try:
                response = await pool.request("GET", f"http://{host}:{port}/")
            except library.ConnectError as error:
                raise error from error.__context__  # its pool raises it `from None`
            assert response.status == 200

        yield talk


TRIO = (*ALL, "trio")
ONE_STREAM = {"reconnect": "a stream is one connection"}

ROWS = (
    Client("anyio", "anyio", servers.redis, _anyio, OSError, TRIO, reasons=ONE_STREAM),
    Client("anyio, TLS", "anyio", servers.redis_tls, partial(_anyio, tls=True), OSError, TRIO, reasons=ONE_STREAM),
    Client("httpx", "httpx", servers.nginx, _httpx, httpx.ConnectError, TRIO, BoundTransport),
    Client(
        "httpx, HTTP/2", "httpx", servers.nginx_tls, partial(_httpx, scheme="https"), httpx.ConnectError, TRIO, _http2
    ),
    Client(
        "httpx2", "httpx2", servers.nginx, partial(_httpx, library=httpx2), httpx2.ConnectError, TRIO, BoundTransport
    ),
    Client("httpcore", "httpcore", servers.nginx, _httpcore, httpcore.ConnectError, TRIO),
    Client(
        "httpcore2",
        "httpcore2",
        servers.nginx,
        partial(_httpcore, library=httpcore2),
        httpcore2.ConnectError,
        TRIO,
    ),
)
