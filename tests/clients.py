"""The clients of the table (``test_clients.py``): one row each.

A row is a ``Client`` in ``ROWS``: data, and one function that uses the client as its user would::

    @contextlib.asynccontextmanager
    async def _redis(connector, host, port):               # *host*: an address or a name; it may have to connect lazily
        client = redis.asyncio.Redis(...)                  # by the hook; import it from examples/ where there is one
        try:
            yield client.ping                              # `await talk()`: one real exchange, which may be repeated
        finally:
            await client.aclose()                          # whatever happens: an error, a cancellation

    Client("redis-py", "redis", servers.redis, _redis, redis.exceptions.ConnectionError)

The checks of the columns are in ``test_clients.py`` and are the same for all rows. They call ``use`` with a connector
of their own, and in it ``talk``; once the server has cut the connection they repeat ``talk`` until it works again, for
up to 20 s, whatever it raises meanwhile: the client has to reconnect by itself. Where a column does not apply to a
client, the row says why: ``reasons={"reconnect": "a stream is one connection"}``.
"""

from __future__ import annotations

import contextlib
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import aiohttp
import asyncpg
import nats.aio.client
import nats.errors
import psycopg
import psycopg_pool
import redis.asyncio
import servers

import aiobind
from aiobind.aiohttp import BoundTCPConnector

if TYPE_CHECKING:
    from aiobind.lab import Lab

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # what the README shows is what is tested
from nats_client import BoundTransport
from redis_client import BoundConnection
from relay import relay

__all__ = ["ALL", "COLUMNS", "ROWS", "Client", "Talk", "libpq", "trusting"]

Talk: TypeAlias = Callable[[], Awaitable[object]]

#: What each client has to show.
COLUMNS = {
    "source": "the far side sees the address that was named",
    "egress": "every packet leaves by the NIC that was named",
    "reconnect": "after the server has cut the connection, the client's own new one leaves by the same source",
    "missing": "an interface that is not there is the client's own error, with our BindError (ENODEV) as cause",
    "cancel": "cancelled while it connects, it leaves no descriptor, task, thread or count behind",
    "silent": "cancelled while a server that it has reached says nothing, it leaves none either",
    "dns": "the server's name is asked for through the same NIC, and the system's resolver is not asked",
}
#: the loops of every client
ALL = ("asyncio", "uvloop")


@dataclass(frozen=True)
class Client:
    """A row of the table."""

    name: str
    #: the distribution whose version is shown; "" for the standard library
    package: str
    #: starts its server and yields the port
    server: Callable[[Lab, Path], AbstractContextManager[int]]
    #: by a connector to a host and a port: opens the client, yields ``talk``, and closes it
    use: Callable[[Any, str, int], AbstractAsyncContextManager[Talk]]
    #: what the client raises when it cannot connect; our error is in its chain
    error: type[BaseException]
    #: "asyncio", "uvloop", "trio"
    loops: tuple[str, ...] = ALL
    #: makes what ``use`` is given, from sources and ``dns=``; it has ``stats()``, and ``aclose()`` or ``close()``
    connector: Callable[..., Any] = aiobind.Connector
    #: of the columns that do not apply: why
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def trusting() -> ssl.SSLContext:
    """Return what verifies the certificates of the servers."""
    context = ssl.create_default_context()
    servers.CA.configure_trust(context)
    return context


#: whether the connection to PostgreSQL is encrypted
IS_TLS = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"

# --- the clients, one function each -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _streams(connector: aiobind.Connector, host: str, port: int) -> AsyncIterator[Talk]:
    reader, writer = await connector.open_connection(host, port)

    async def talk() -> None:
        writer.write(b"PING\r\n")  # Redis understands what is typed in
        assert await reader.readuntil(b"\n") == b"+PONG\r\n"

    try:
        yield talk
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def _aiohttp(connector: BoundTCPConnector, host: str, port: int) -> AsyncIterator[Talk]:
    async with aiohttp.ClientSession(connector=connector) as session:

        async def talk() -> None:
            async with session.get(f"http://{host}:{port}/") as response:
                assert await response.text() == aiobind.bound_source(response).address

        yield talk


@contextlib.asynccontextmanager
async def _asyncpg(connector: aiobind.Connector, host: str, port: int, *, tls: bool = False) -> AsyncIterator[Talk]:
    options: dict[str, Any] = {"user": "postgres", "database": "postgres", "ssl": trusting() if tls else False}
    async with asyncpg.create_pool(
        host=host, port=port, loop=connector.as_loop(), min_size=1, max_size=1, **options
    ) as pool:

        async def talk() -> None:
            assert await pool.fetchval(IS_TLS) == tls

        yield talk


@contextlib.asynccontextmanager
async def libpq(
    connector: aiobind.Connector, host: str, port: int, *, tls: bool = False
) -> AsyncIterator[dict[str, Any]]:
    """Yield what libpq is told."""
    async with relay(connector, host, port) as near:
        with servers.CA.cert_pem.tempfile() as ca:
            options = {"sslmode": "verify-full", "sslrootcert": ca} if tls else {"sslmode": "disable"}
            yield {"user": "postgres", "host": host, "hostaddr": "127.0.0.1", "port": near, **options}


@contextlib.asynccontextmanager
async def _psycopg(connector: aiobind.Connector, host: str, port: int, *, tls: bool = False) -> AsyncIterator[Talk]:
    async with (
        libpq(connector, host, port, tls=tls) as options,
        await psycopg.AsyncConnection.connect(**options) as connection,
    ):

        async def talk() -> None:
            assert await (await connection.execute(IS_TLS)).fetchone() == (tls,)

        yield talk


@contextlib.asynccontextmanager
async def _psycopg_pool(connector: aiobind.Connector, host: str, port: int) -> AsyncIterator[Talk]:
    async with libpq(connector, host, port) as options:
        pool = psycopg_pool.AsyncConnectionPool(kwargs=options, min_size=1, max_size=1, open=False)

        async def talk() -> None:
            async with pool.connection(timeout=2) as connection:
                await connection.execute("SELECT 1")

        await pool.open()
        try:
            yield talk
        finally:
            await pool.close(timeout=0.1)  # else 5 s for whoever is connecting


@contextlib.asynccontextmanager
async def _redis(connector: aiobind.Connector, host: str, port: int, **options: Any) -> AsyncIterator[Talk]:
    options = {"connection_class": BoundConnection, "connector": connector, "host": host, "port": port, **options}
    async with redis.asyncio.Redis.from_pool(redis.asyncio.ConnectionPool(**options)) as client:
        yield client.ping


class BoundSSLConnection(BoundConnection, redis.asyncio.SSLConnection):
    """What the docstring of the example tells."""


@contextlib.asynccontextmanager
async def _redis_tls(connector: aiobind.Connector, host: str, port: int) -> AsyncIterator[Talk]:
    with servers.CA.cert_pem.tempfile() as ca:
        options = {"connection_class": BoundSSLConnection, "ssl_ca_certs": ca, "ssl_check_hostname": True}
        async with _redis(connector, host, port, **options) as talk:
            yield talk


@contextlib.asynccontextmanager
async def _nats(connector: aiobind.Connector, host: str, port: int, *, tls: bool = False) -> AsyncIterator[Talk]:
    failures: list[Exception] = []

    async def failed(error: Exception) -> None:
        failures.append(error)

    options: dict[str, Any] = {"max_reconnect_attempts": 3, "reconnect_time_wait": 0.1, "error_cb": failed}
    if tls:
        options["tls"] = trusting()
    client = nats.aio.client.Client()
    BoundTransport(client, connector)
    async with client:  # which closes it even if it is cancelled while it connects
        try:
            await client.connect(f"nats://{host}:{port}", **options)
        except nats.errors.NoServersError as error:
            raise error from failures[-1]  # nats-py tells why to error_cb alone

        async def talk() -> None:
            subscription = await client.subscribe("talk")
            await client.publish("talk", b"hello")
            assert (await subscription.next_msg(timeout=1)).data == b"hello"
            await subscription.unsubscribe()

        yield talk


NO_POOL = {"reconnect": "it is one connection, which does not reconnect; psycopg_pool does"}

ROWS = (
    Client(
        "asyncio streams",
        "",
        servers.redis,
        _streams,
        OSError,
        reasons={"reconnect": "a stream is one connection"},
    ),
    Client("aiohttp", "aiohttp", servers.nginx, _aiohttp, aiohttp.ClientConnectorError, connector=BoundTCPConnector),
    Client("asyncpg", "asyncpg", servers.postgres, _asyncpg, OSError),
    Client("asyncpg, TLS", "asyncpg", servers.postgres, partial(_asyncpg, tls=True), OSError),
    Client("psycopg", "psycopg", servers.postgres, _psycopg, psycopg.OperationalError, reasons=NO_POOL),
    Client(
        "psycopg, TLS",
        "psycopg",
        servers.postgres,
        partial(_psycopg, tls=True),
        psycopg.OperationalError,
        reasons=NO_POOL,
    ),
    Client("psycopg_pool", "psycopg_pool", servers.postgres, _psycopg_pool, psycopg_pool.PoolTimeout),
    Client("redis-py", "redis", servers.redis, _redis, redis.exceptions.ConnectionError),
    Client("redis-py, TLS", "redis", servers.redis_tls, _redis_tls, redis.exceptions.ConnectionError),
    Client("nats-py", "nats-py", servers.nats, _nats, nats.errors.NoServersError),
    Client("nats-py, TLS", "nats-py", servers.nats_tls, partial(_nats, tls=True), nats.errors.NoServersError),
)
