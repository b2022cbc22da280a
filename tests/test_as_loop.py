"""To a library that only takes ``loop=``: its connections have a source, all else is the loop's."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

import aiobind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

HOST = "127.0.0.1"


class Tell(asyncio.Protocol):
    """Tell the client who it is."""

    def connection_made(self, transport: Any) -> None:
        transport.write(str((transport.get_extra_info("peername") or ["unix"])[0] or "unix").encode())
        transport.close()


class Hear(asyncio.Protocol, asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.heard = b""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.heard += data

    def connection_lost(self, _: Exception | None) -> None:
        self.ended.set_result(None)


async def heard(made: tuple[Any, Any]) -> str:
    transport, protocol = made
    async with asyncio.timeout(10):
        await protocol.ended
    transport.close()
    return protocol.heard.decode()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(Tell, HOST, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_a_connection_has_a_source(port: int) -> None:
    async with aiobind.Connector("127.0.0.2", "127.0.0.3") as connector:
        loop = connector.as_loop()
        seen = [await heard(await loop.create_connection(Hear, HOST, port)) for _ in range(4)]
        assert seen == ["127.0.0.2", "127.0.0.3"] * 2
        with connector.use_source("127.0.0.9"):
            assert await heard(await loop.create_connection(Hear, host=HOST, port=port)) == "127.0.0.9"
        assert [figures.connects for figures in connector.stats()] == [2, 2]


async def test_a_loop_of_one_source(port: int) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        loop = connector.as_loop(source="127.0.0.7")
        with connector.use_source("127.0.0.9"):
            assert await heard(await loop.create_connection(Hear, HOST, port)) == "127.0.0.7"
        transport, _ = await loop.create_datagram_endpoint(Hear, remote_addr=(HOST, 9))
        assert aiobind.bound_source(transport).address == "127.0.0.7"
        transport.close()
        with pytest.raises(aiobind.InvalidSource):
            connector.as_loop(source="if!")


async def test_what_has_a_socket_or_no_host_goes_to_the_loop(port: int, tmp_path: Path) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        loop = connector.as_loop()
        sock = await aiobind.connect(HOST, port, source="127.0.0.5")
        with pytest.raises(TypeError, match="sock is not taken here"):  # the loop takes no host with it either
            await loop.create_connection(Hear, HOST, port, sock=sock)
        assert await heard(await loop.create_connection(Hear, sock=sock)) == "127.0.0.5"
        with pytest.raises(ValueError, match="host and port was not specified"):
            await loop.create_connection(Hear)
        server = await loop.create_unix_server(Tell, str(tmp_path / "s"))
        assert await heard(await loop.create_unix_connection(Hear, str(tmp_path / "s"))) == "unix"
        server.close()
        name = f"\0{tmp_path}"  # in no file system
        if not isinstance(asyncio.get_running_loop(), uvloop.Loop):  # which has none of these
            transport, _ = await loop.create_datagram_endpoint(Hear, local_addr=name, family=socket.AF_UNIX)
            assert transport.get_extra_info("sockname") == name.encode()
            transport.close()
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.6", 0))
        transport, _ = await loop.create_datagram_endpoint(Hear, sock=udp)
        assert transport.get_extra_info("sockname")[0] == "127.0.0.6"
        transport.close()
        await asyncio.sleep(0)
        assert connector.stats()[0].connects == 0


async def test_the_local_end_is_the_sources(port: int) -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        loop = connector.as_loop()
        # What a library passes on when it was told nothing of it is nothing.
        made = await loop.create_connection(Hear, HOST, port, local_addr=None, sock=None, ssl=None, all_errors=False)
        assert await heard(made) == "127.0.0.2"
        with pytest.raises(TypeError, match="local_addr is not taken here"):
            await loop.create_connection(Hear, HOST, port, local_addr=("127.0.0.9", 0))
        with pytest.raises(TypeError, match="local_addr is not taken here"):
            await loop.create_datagram_endpoint(Hear, ("0.0.0.0", 0))


async def test_all_else_is_the_loops(port: int) -> None:
    running = asyncio.get_running_loop()
    async with aiobind.Connector("127.0.0.2") as connector:
        loop = connector.as_loop()
        assert isinstance(loop, asyncio.AbstractEventLoop)
        assert isinstance(loop, type(running))
        assert loop == running
        assert running == loop
        assert {running: 1}[loop] == 1
        assert loop != object()
        assert repr(loop) == f"<sources on {running!r}>"
        assert abs(loop.time() - running.time()) < 60
        assert loop.is_running()
        assert not loop.get_debug()
        future = loop.create_future()
        assert future.get_loop() is running
        loop.call_soon(future.set_result, 7)
        assert await future == 7
        assert await loop.run_in_executor(None, lambda: 8) == 8

        async def task() -> asyncio.Task[Any] | None:
            return asyncio.current_task(loop)

        for made in (loop.create_task(task()), asyncio.ensure_future(task(), loop=loop)):
            # From 3.14 on a loop is known by its identity, as all_tasks has always had it.
            assert await made is (made if sys.version_info < (3, 14) else None)
        reader = asyncio.StreamReader(loop=loop)  # as libraries do
        transport, protocol = await loop.create_connection(
            lambda: asyncio.StreamReaderProtocol(reader, loop=loop), HOST, port
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        assert await reader.read() == b"127.0.0.2"
        writer.close()
        await writer.wait_closed()


async def test_what_is_kept_weakly_for_each_loop() -> None:
    async with aiobind.Connector("127.0.0.2") as connector:
        kept = weakref.WeakKeyDictionary({asyncio.get_running_loop(): "kept"})
        assert kept[connector.as_loop()] == "kept"


async def test_when_it_can_be_had(port: int) -> None:
    connector = aiobind.Connector("127.0.0.2")
    loop = connector.as_loop()
    await connector.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        connector.as_loop()
    with pytest.raises(RuntimeError, match="closed"):
        await loop.create_connection(Hear, HOST, port)


def test_without_a_loop_there_is_none() -> None:
    connector = aiobind.Connector("127.0.0.2")
    with pytest.raises(RuntimeError, match="no running event loop"):
        connector.as_loop()


def test_it_keeps_no_connector_alive() -> None:
    async def main() -> weakref.ref[aiobind.Connector]:
        connector = aiobind.Connector("127.0.0.2")
        connector.as_loop()
        return weakref.ref(connector)

    for run in (asyncio.run, uvloop.run):
        gone = run(main())
        gc.collect()
        assert gone() is None
