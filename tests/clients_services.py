"""The rows of mail, SSH, websockets, MQTT, S3 and DNS (``clients.py`` says what a row is)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import weakref
from email.message import EmailMessage
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import aiomqtt
import aiosmtplib
import asyncssh
import dns.asyncquery
import dns.asyncresolver
import dns.message
import servers_services as servers
import websockets
import websockets.client
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from aiohttp.abc import AbstractResolver
from botocore.exceptions import EndpointConnectionError
from clients import Client, Talk, trusting  # which finds the examples
from dns_query import BoundBackend
from mqtt_client import BoundClient
from packaging.version import Version
from smtp_send import BoundSMTP
from websocket_client import BoundConnect

import aiobind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

__all__ = ["ROWS"]


@contextlib.asynccontextmanager
async def _aiosmtplib(connector: aiobind.Connector, host: str, port: int) -> AsyncIterator[Talk]:
    message = EmailMessage()
    message["From"], message["To"] = "a@near.test", f"root@{servers.NAME}"
    async with BoundSMTP(connector, host, port, start_tls=False) as client:

        async def talk() -> None:
            if not client.is_connected:
                await client.connect()
            await client.send_message(message)

        yield talk


@contextlib.asynccontextmanager
async def _asyncssh(connector: aiobind.Connector, host: str, port: int) -> AsyncIterator[Talk]:
    home = servers.HOMES[0]
    options: Any = {
        "username": servers.USER,
        "client_keys": [str(home / "id_ed25519")],
        "agent_path": None,
        "config": None,
    }
    # Given a path, asyncssh reads it on the loop.
    options["known_hosts"] = await asyncio.to_thread(asyncssh.read_known_hosts, str(home / "known_hosts"))
    sock = await connector.connect(host, port)
    async with asyncssh.connect(host, port, sock=sock, **options) as connection:

        async def talk() -> None:
            done = await connection.run("echo $SSH_CONNECTION", check=True)
            assert str(done.stdout).split()[0] == aiobind.bound_source(connection).address

        yield talk


@contextlib.asynccontextmanager
async def _websockets(connector: aiobind.Connector, host: str, port: int, **options: Any) -> AsyncIterator[Talk]:
    def final(error: Exception) -> Exception | None:
        """Say that a missing interface is no reason to try again, as it is by itself: it may come back."""
        return error if isinstance(error, aiobind.BindError) else websockets.client.process_exception(error)

    url = f"{'wss' if options else 'ws'}://{host}:{port}/"
    connections = aiter(BoundConnect(connector, url, process_exception=final, **options))
    websocket = await anext(connections)

    async def talk() -> None:
        nonlocal websocket
        try:
            await websocket.send("whence?")
            assert await websocket.recv() == aiobind.bound_source(websocket.transport).address
        except websockets.ConnectionClosed:
            websocket = await anext(connections)  # what `continue` does in `async for`
            raise

    try:
        yield talk
    finally:
        await connections.aclose()


@contextlib.asynccontextmanager
async def _aiomqtt(connector: aiobind.Connector, host: str, port: int) -> AsyncIterator[Talk]:
    client = BoundClient(connector, host, port)
    async with contextlib.AsyncExitStack() as stack:

        async def talk() -> None:
            if client in left:
                await stack.enter_async_context(client)
                left.clear()
                await client.subscribe("topic", timeout=5)
            try:
                await client.publish("topic", b"payload", timeout=5)
                assert (await asyncio.wait_for(anext(client.messages), 5)).payload == b"payload"
            except aiomqtt.MqttError:
                left.add(client)
                await stack.aclose()
                raise

        left = {client}
        yield talk


class Resolver(AbstractResolver):
    """aiohttp's interface to names, on dnspython's."""

    def __init__(self, connector: aiobind.Connector, servers: Sequence[str]) -> None:
        self._connector, self._resolver = connector, dns.asyncresolver.Resolver(configure=False)
        self._resolver.nameservers = list(servers)

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[Any]:
        answer = await self._resolver.resolve(host, "A", backend=BoundBackend(self._connector))
        common = {"hostname": host, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
        return [{**common, "host": record.address} for record in answer]

    async def close(self) -> None:
        await self._connector.aclose()


class Sockets:
    """What a client is given that takes a socket factory; it counts what of it is open."""

    def __init__(self, *sources: str, dns: Any = "system") -> None:
        self._make = aiobind.socket_factory(*sources)
        self._made = weakref.WeakSet[Any]()
        self.arguments: dict[str, Any] = {"socket_factory": self}
        if dns != "system":
            self.arguments["resolver"] = Resolver(aiobind.Connector(*sources), dns)

    def __call__(self, address: Any) -> Any:
        sock = self._make(address)
        self._made.add(sock)
        return sock

    def stats(self) -> list[Any]:
        return [SimpleNamespace(connections=sum(sock.fileno() >= 0 for sock in self._made))]

    def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def _aiobotocore(factory: Sockets, host: str, port: int) -> AsyncIterator[Talk]:
    config = AioConfig(connector_args=factory.arguments, retries={"max_attempts": 0})
    where: Any = {"endpoint_url": f"http://{host}:{port}", "region_name": "far"}
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    async with get_session().create_client("s3", config=config, **where, **keys) as s3:

        async def talk() -> None:
            assert (await s3.list_buckets())["Buckets"][0]["Name"] == servers.BUCKET

        yield talk


@contextlib.asynccontextmanager
async def _dnspython(connector: aiobind.Connector, host: str, port: int) -> AsyncIterator[Talk]:
    backend = BoundBackend(connector)

    async def talk() -> None:
        for name, kind in (("server.lab.test", "A"), ("long.lab.test", "TXT")):
            query = dns.message.make_query(name, kind)
            _, truncated = await dns.asyncquery.udp_with_fallback(query, host, 5, port, backend=backend)
            assert truncated == (kind == "TXT")

    yield talk


ROWS = (
    Client(
        "aiosmtplib",
        "aiosmtplib",
        servers.exim,
        _aiosmtplib,
        aiosmtplib.SMTPConnectError,
        reasons={"silent": "aiosmtplib before 5.1.3 keeps its connection when it is cancelled before the greeting"}
        if Version(aiosmtplib.__version__) < Version("5.1.3")
        else {},
    ),
    Client(
        "asyncssh",
        "asyncssh",
        servers.sshd,
        _asyncssh,
        OSError,
        reasons={"reconnect": "asyncssh has none: a connection is one socket"},
    ),
    Client("websockets", "websockets", servers.websocket_server, _websockets, OSError),
    Client(
        "websockets, TLS",
        "websockets",
        servers.websocket_server_tls,
        functools.partial(_websockets, ssl=trusting()),
        OSError,
    ),
    Client(
        "aiomqtt",
        "aiomqtt",
        servers.mosquitto,
        _aiomqtt,
        aiomqtt.MqttError,
        reasons={"silent": "aiomqtt keeps its connection when it is cancelled before the broker has answered"},
    ),
    Client(
        "aiobotocore",
        "aiobotocore",
        servers.s3,
        _aiobotocore,
        EndpointConnectionError,
        connector=Sockets,
    ),
    Client(
        "dnspython",
        "dnspython",
        servers.dnsmasq,
        _dnspython,
        OSError,
        reasons={
            "reconnect": "dnspython asks each question by a socket of its own",
            "silent": "over UDP a silent server is the black hole of `cancel`",
            "dns": "a name server is an address",
        },
    ),
)
