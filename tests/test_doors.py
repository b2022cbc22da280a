"""What asyncio's own ``create_connection`` takes, the connector's takes, or refuses with the reason."""

from __future__ import annotations

import asyncio
import errno
import gc
import inspect
import os
import re
import socket
import ssl
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trustme

import aiobind
from aiobind._sockets import IPPROTO_MPTCP

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiobind.lab import Lab, Witness

pytestmark = pytest.mark.anyio

HOST, TARGET = "127.0.0.1", "203.0.113.80"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say who asks, once asked; ``TLS`` changes to that before."""
    try:
        if await reader.readline() == b"TLS\n":
            writer.write(b"now\n")
            await writer.start_tls(answer.context)  # type: ignore[attr-defined]
            await reader.readline()
        writer.write(writer.get_extra_info("peername")[0].encode() + b"\n")
        await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def serving(*sockets: socket.socket, **options: Any) -> AsyncIterator[int]:
    if sockets:
        servers = [await asyncio.start_server(answer, sock=sock, **options) for sock in sockets]
    else:
        servers = [await asyncio.start_server(answer, HOST, 0, **options)]
    try:
        yield servers[0].sockets[0].getsockname()[1]
    finally:
        for server in servers:
            server.close()


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    answer.context = server  # type: ignore[attr-defined]
    return server, client


async def none_left(connector: aiobind.Connector) -> None:
    async with asyncio.timeout(10):
        while any(figures.connections for figures in connector.stats()):
            gc.collect()
            await asyncio.sleep(0.001)


# ── the keywords ──

#: Each keyword of ``loop.create_connection``, with its default there. A new one has to come here, and further down.
DEFAULTS: dict[str, Any] = {
    "ssl": None,
    "family": 0,
    "proto": 0,
    "flags": 0,
    "sock": None,
    "local_addr": None,
    "server_hostname": None,
    "ssl_handshake_timeout": None,
    "ssl_shutdown_timeout": None,
    "happy_eyeballs_delay": None,
    "interleave": None,
    "all_errors": False,  # Python 3.12
}

#: What is refused: by the connector, or by the loop, with what it says itself.
REFUSED = [
    ({"sock": "any"}, TypeError, "sock is not taken here: the source names the local end"),
    ({"local_addr": ("127.0.0.9", 0)}, TypeError, "local_addr is not taken here: the source names the local end"),
    ({"all_errors": True}, TypeError, "a ConnectError always has them all in .attempts"),
    ({"proto": socket.IPPROTO_UDP}, ValueError, "proto is 0, IPPROTO_TCP or IPPROTO_MPTCP, not 17"),
    ({"proto": IPPROTO_MPTCP}, ValueError, "only the first subflow leaves from the source.*: strict=False permits"),
    ({"server_hostname": "localhost"}, ValueError, "only meaningful with ssl"),
    ({"ssl_handshake_timeout": 1.0}, ValueError, "only meaningful with ssl"),
    ({"ssl_shutdown_timeout": 1.0}, ValueError, "only meaningful with ssl"),
    ({"ssl": "yes"}, TypeError, "ssl is True or an ssl.SSLContext, not str"),
    ({"no_such_keyword": 1}, TypeError, "no_such_keyword"),
    ({"family": socket.AF_INET6}, aiobind.ResolveError, "the destination has no IPv6 address"),
]


async def test_every_keyword_of_the_loop_is_known() -> None:
    loop = asyncio.get_running_loop()
    connection = set(inspect.signature(loop.create_connection).parameters)
    assert connection - set(DEFAULTS) == {"protocol_factory", "host", "port"}
    endpoint = set(inspect.signature(loop.create_datagram_endpoint).parameters)
    assert endpoint - {"reuse_address"} <= set(inspect.signature(aiobind.Connector.create_datagram_endpoint).parameters)


async def test_every_keyword_may_say_what_it_says_anyway() -> None:
    async with serving() as port, aiobind.Connector("127.0.0.2") as connector:
        transport, _ = await connector.create_connection(asyncio.Protocol, HOST, port, **DEFAULTS)
        transport.close()
        transport, _ = await connector.create_connection(asyncio.Protocol, HOST, port, proto=socket.IPPROTO_TCP)
        transport.close()
        await none_left(connector)


@pytest.mark.parametrize(("options", "error", "words"), REFUSED, ids=[next(iter(row[0])) for row in REFUSED])
async def test_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    async with serving() as port, aiobind.Connector("127.0.0.2") as connector:
        with pytest.raises(error, match=words):
            await connector.create_connection(asyncio.Protocol, HOST, port, **options)
        await none_left(connector)


async def test_flags_and_family_are_those_of_the_look_up(resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts="127.0.0.1 both.test\n::1 both.test\n")
    async with serving() as port, aiobind.Connector("if!lo") as connector:
        with pytest.raises(aiobind.ResolveError):
            await connector.open_connection("both.test", port, flags=socket.AI_NUMERICHOST)
        for family, peer in ((socket.AF_INET, HOST), (0, HOST)):  # ::1 refuses
            _, writer = await connector.open_connection("both.test", port, family=family)
            assert writer.get_extra_info("peername")[0] == peer
            writer.close()
        with pytest.raises(aiobind.ConnectError) as caught:
            await connector.open_connection("both.test", port, family=socket.AF_INET6)
        assert [attempt.address for attempt in caught.value.attempts] == [f"[::1]:{port}"]
        await none_left(connector)


async def test_interleave(lab: Lab, resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts="2001:db8:ffff::80 all.test\n2001:db8:ffff::81 all.test\n203.0.113.80 all.test\n")
    lab.add_target("2001:db8:ffff::81")
    rows: list[tuple[dict[str, int], str]]
    rows = [({}, "646"), ({"interleave": 1}, "646"), ({"interleave": 2}, "664"), ({"interleave": 0}, "646")]
    for options, order in rows:
        async with aiobind.Connector("if!n1") as connector:
            with pytest.raises(aiobind.ConnectError) as caught:
                await connector.create_connection(asyncio.Protocol, "all.test", 80, **options)
            assert "".join("6" if "[" in attempt.address else "4" for attempt in caught.value.attempts) == order


async def test_happy_eyeballs_delay(lab: Lab, resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts=f"2001:db8:1::dead both.test\n{TARGET} both.test\n")
    lab.near.ip("neigh add 2001:db8:1::dead lladdr 02:00:00:00:00:99 dev n1")  # nobody's: silence
    with lab.far:
        listening = socket.create_server((TARGET, 80))
    async with serving(listening), aiobind.Connector("if!n1") as connector:
        _, writer = await connector.open_connection("both.test", 80, happy_eyeballs_delay=0.01)
        assert writer.get_extra_info("peername")[0] == TARGET
        writer.close()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connector.open_connection("both.test", 80, happy_eyeballs_delay=None), 0.4)
        await none_left(connector)


# ── TLS ──


@pytest.mark.parametrize("host", [HOST, "localhost"])
@pytest.mark.parametrize("name", [None, "", "localhost", "elsewhere.test", HOST])
@pytest.mark.parametrize("checks", [True, False])
async def test_server_hostname_means_what_it_means_to_the_loop(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], host: str, name: str | None, *, checks: bool
) -> None:
    server, client = contexts
    if not checks:
        client = ssl.create_default_context()
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE

    async def outcome(create: Callable[..., Any], port: int) -> object:
        try:
            transport, _ = await create(
                asyncio.Protocol, host, port, ssl=client, server_hostname=name, family=socket.AF_INET
            )
        except (OSError, ValueError) as error:
            return type(error)
        transport.close()
        return "connected"

    async with serving(ssl=server) as port, aiobind.Connector("127.0.0.2") as connector:
        loop = asyncio.get_running_loop()
        assert await outcome(connector.create_connection, port) == await outcome(loop.create_connection, port)
        await none_left(connector)


async def test_the_handshake_has_its_timeout(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    with socket.create_server((HOST, 0)) as silent:
        async with aiobind.Connector("127.0.0.2") as connector:
            with pytest.raises(ConnectionAbortedError, match=r"SSL handshake is taking longer than 0\.05 seconds"):
                await connector.create_connection(
                    asyncio.Protocol, HOST, silent.getsockname()[1], ssl=contexts[1], ssl_handshake_timeout=0.05
                )
            await none_left(connector)


async def test_the_shutdown_has_its_timeout(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    class Deaf(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.pause_reading()  # so that it never answers the close_notify
            peers.append(transport)

    peers: list[Any] = []
    server = await asyncio.get_running_loop().create_server(Deaf, HOST, 0, ssl=contexts[0])
    async with aiobind.Connector("127.0.0.2") as connector:
        port = server.sockets[0].getsockname()[1]
        transport, _ = await connector.create_connection(
            asyncio.Protocol, HOST, port, ssl=contexts[1], server_hostname="localhost", ssl_shutdown_timeout=0.05
        )
        transport.close()
        began = time.monotonic()
        await none_left(connector)
        assert time.monotonic() - began < 10  # by default it takes 30 s
    for peer in peers:
        peer.abort()
    server.close()


@pytest.mark.parametrize("way", ["writer", "loop", "as_loop"])
async def test_start_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext], way: str) -> None:
    async with serving() as port, aiobind.Connector("127.0.0.2") as connector:
        reader, writer = await connector.open_connection(HOST, port)
        before = aiobind.bound_source(writer)
        writer.write(b"TLS\n")
        assert await reader.readline() == b"now\n"
        if way == "writer":
            await writer.start_tls(contexts[1], server_hostname="localhost")
        else:
            loop = connector.as_loop() if way == "as_loop" else asyncio.get_running_loop()
            plain, protocol = writer, writer.transport.get_protocol()
            transport = await loop.start_tls(plain.transport, protocol, contexts[1], server_hostname="localhost")
            assert transport is not None
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)  # type: ignore[arg-type]
        writer.write(b"who\n")
        assert await reader.readline() == b"127.0.0.2\n"
        assert aiobind.bound_source(writer) == before
        assert [figures.connections for figures in connector.stats()] == [1]
        writer.close()
        await none_left(connector)


async def test_start_tls_that_fails_leaves_nothing(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async with serving() as port, aiobind.Connector("127.0.0.2") as connector:
        reader, writer = await connector.open_connection(HOST, port)
        writer.write(b"TLS\n")
        assert await reader.readline() == b"now\n"
        with pytest.raises(ssl.SSLCertVerificationError):
            await writer.start_tls(contexts[1], server_hostname="elsewhere.test")
        writer.close()
        await none_left(connector)


# ── what socket_options can do ──


async def test_keep_alive() -> None:
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 31),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 11),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]
    async with serving() as port, aiobind.Connector("127.0.0.2", socket_options=options) as connector:
        _, writer = await connector.open_connection(HOST, port)
        sock = writer.get_extra_info("socket")
        assert [(level, name, sock.getsockopt(level, name)) for level, name, _ in options] == options
        writer.close()
        await none_left(connector)


TCP_FASTOPEN_CONNECT, TCPI_OPT_SYN_DATA = 30, 32  # linux/tcp.h


async def test_fast_open(lab: Lab, witness: Witness) -> None:
    lab.far.sysctl("ipv4.tcp_fastopen", 3)
    lab.near.sysctl("ipv4.tcp_fastopen", 1)
    with lab.far:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        listening.bind((TARGET, 80))
        listening.listen()
    options = [(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)]
    async with aiobind.Connector("if!n1", socket_options=options) as connector:
        async with serving(listening):
            for known in (False, True):  # the first one asks for the cookie
                reader, writer = await connector.open_connection(TARGET, 80)
                sock = writer.get_extra_info("socket")
                sent_before = any(packet.syn for packet in witness.packets())
                writer.write(b"who\n")
                assert await reader.readline() == b"198.18.1.2\n"
                carried = bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5] & TCPI_OPT_SYN_DATA)
                assert (sent_before, carried) == (not known, known)
                assert {(packet.nic, packet.source) for packet in witness.packets()} == {("n1", "198.18.1.2")}
                writer.close()
                await none_left(connector)
        # A connect that has sent nothing says nothing: neither how long one takes, nor that the source works.
        figures = connector.stats()[0]
        assert (figures.connects, figures.latency_p50) == (2, figures.latency_p99)
        assert (figures.bytes_sent, figures.bytes_received) == (8, 22)
        reader, writer = await connector.open_connection(TARGET, 80)  # where nobody listens any more
        writer.write(b"who\n")
        with pytest.raises(ConnectionRefusedError):
            await reader.readline()
        writer.close()
        await none_left(connector)
        lab.near.ip("link set n1 down")
        with pytest.raises(aiobind.BindError, match="n1 is down"):
            await connector.connect(TARGET, 80)


# ── Multipath TCP ──


@pytest.fixture
def mptcp() -> None:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()
    except OSError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no MPTCP: {error}")


def listen(lab: Lab, proto: int) -> socket.socket:
    with lab.far:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((TARGET, 80))
        listening.listen()
    return listening


def syns(witness: Witness) -> set[tuple[str, str]]:
    return {(packet.nic, packet.source) for packet in witness.packets() if packet.syn}


@pytest.mark.parametrize("peer", [IPPROTO_MPTCP, socket.IPPROTO_TCP], ids=["MPTCP", "TCP"])
async def test_the_first_subflow_leaves_from_the_source(mptcp: None, lab: Lab, witness: Witness, peer: int) -> None:
    events: list[aiobind.Event] = []
    async with (
        serving(listen(lab, peer)),
        aiobind.Connector("if!n1", strict=False, local_ports=range(40000, 40100), on_event=events.append) as connector,
    ):
        reader, writer = await connector.open_connection(TARGET, 80, proto=IPPROTO_MPTCP)
        writer.write(b"who\n")
        assert await reader.readline() == b"198.18.1.2\n"
        bound = aiobind.bound_source(writer)
        assert (bound.interface, bound.address, bound.port in range(40000, 40100)) == (None, "198.18.1.2", True)
        assert [event.kind for event in events] == ["connected", "unpinned"]
        writer.close()
        await none_left(connector)
        figures = connector.stats()[0]
        assert (figures.bytes_sent, figures.bytes_received) == (4, 11)
    assert syns(witness) == {("n1", "198.18.1.2")}


async def test_no_pin_holds_for_a_further_subflow(mptcp: None, lab: Lab, witness: Witness) -> None:
    """Why a strict connector refuses MPTCP; should this fail, the kernel has learned it."""
    lab.near.ip("mptcp limits set subflow 2", "mptcp endpoint add 198.18.2.2 dev n2 subflow")
    async with serving(listen(lab, IPPROTO_MPTCP)), aiobind.Connector("if!n1", strict=False) as connector:
        reader, writer = await connector.open_connection(TARGET, 80, proto=IPPROTO_MPTCP)
        seen: set[tuple[str, str]] = set()
        writer.write(b"who\n")
        assert await reader.readline() == b"198.18.1.2\n"
        async with asyncio.timeout(10):
            while len(seen) < 2:
                seen |= syns(witness)
                await asyncio.sleep(0.01)
        assert seen == {("n1", "198.18.1.2"), ("n2", "198.18.2.2")}
        writer.close()
        await none_left(connector)


async def test_a_system_without_mptcp_says_so(mptcp: None, lab: Lab) -> None:
    lab.near.sysctl("mptcp.enabled", 0)
    async with aiobind.Connector("if!n1", strict=False) as connector:
        with pytest.raises(aiobind.ConnectError, match=re.compile("protocol not available", re.IGNORECASE)) as caught:
            await connector.connect(TARGET, 80, proto=IPPROTO_MPTCP)
    assert caught.value.errno == errno.ENOPROTOOPT


async def test_mptcp_is_cut_as_tcp_is(mptcp: None, lab: Lab) -> None:
    async with serving(listen(lab, IPPROTO_MPTCP)), aiobind.Connector("if!n1", "if!n2", strict=False) as connector:
        reader, writer = await connector.open_connection(TARGET, 80, proto=IPPROTO_MPTCP)
        connector.remove("if!n1", drain=False)
        with pytest.raises(OSError, match=r"connected|reset|Broken"):
            await asyncio.wait_for(reader.readline(), 10)
        writer.close()
        await none_left(connector)


async def test_one_shot_of_mptcp(mptcp: None, lab: Lab) -> None:
    async with serving(listen(lab, IPPROTO_MPTCP)):
        sock = await aiobind.connect(TARGET, 80, source="198.18.2.2", proto=IPPROTO_MPTCP, strict=False)
        assert (sock.proto, sock.getsockname()[0]) == (IPPROTO_MPTCP, "198.18.2.2")
        sock.close()
