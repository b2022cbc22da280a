"""What the types promise, checked by ``make lint`` with mypy and basedpyright. Nothing here is ever run.

An ignored line is a refusal that must happen: both checkers report an ignore that is not needed.
"""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, assert_never, assert_type

import aiohttp
from anyio.abc import ByteStreamConnectable, SocketStream
from anyio.streams.tls import TLSStream

import aiobind
from aiobind.aiohttp import BoundTCPConnector
from aiobind.anyio import TCPConnectable, connect_tcp

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager


class Echo(asyncio.Protocol):
    """A protocol of a user's own."""


class LastFirst:
    """A policy of a user's own; it inherits from nothing."""

    def order(self, sources: Sequence[aiobind.SourceView], host: str) -> Iterable[aiobind.SourceView]:
        """Return the sources backwards."""
        return sorted(sources, key=lambda view: (view.in_use, view.connections, str(view.source)), reverse=bool(host))


class Orderless:
    """This is no policy."""


def sources() -> None:
    parsed = aiobind.parse_source("if!eth0")
    assert_type(parsed, aiobind.Interface | aiobind.Address | aiobind.Host | aiobind.Prefix)
    again: aiobind.Source = aiobind.parse_source(parsed)
    match again:
        case aiobind.Interface(name, local):
            assert_type(name, str)
            assert_type(local, aiobind.Address | aiobind.Host | None)
        case aiobind.Address() | aiobind.Host() | aiobind.Prefix():
            pass
        case _:  # four kinds, and no fifth
            assert_never(again)
    aiobind.parse_source(1)  # type: ignore[arg-type]


def policies() -> None:
    every: list[aiobind.Policy] = [aiobind.RoundRobin(), LastFirst()]
    aiobind.Connector("if!eth0", aiobind.Address("192.0.2.7"), policy=every[0])
    BoundTCPConnector("if!eth0", policy=LastFirst(), limit=4, limit_per_source=2, ssl=True)
    aiobind.Connector("if!eth0", policy=Orderless())  # type: ignore[arg-type]
    aiobind.Connector("if!eth0", policy=LastFirst)  # type: ignore[arg-type]


def limits() -> None:
    aiobind.Connector(
        "if!eth0", limit_per_source=50, limit_per_source_host=2, rate_per_source=10, abort_on_link_down=True
    )
    BoundTCPConnector("if!eth0", limit_per_source_host=2, rate_per_source=0.5, rate_per_source_host=None)
    aiobind.Connector("if!eth0", limit_per_source=2.5)  # type: ignore[arg-type]
    aiobind.Connector("if!eth0", rate_per_source="10/s")  # type: ignore[arg-type]


def told(event: aiobind.Event) -> None:
    assert_type(event.source, aiobind.Interface | aiobind.Address | aiobind.Host | aiobind.Prefix)
    assert_type(event.destination, str | None)
    assert_type(event.error, OSError | None)
    assert_type(event.seconds, float | None)
    match event.kind:
        case "connected" | "failed" | "suspended" | "recovered" | "unpinned":
            pass
        case _:  # five kinds, and no sixth
            assert_never(event.kind)


def events() -> None:
    seen: list[aiobind.Event] = []
    aiobind.Connector("if!eth0", on_event=told)
    aiobind.Connector("if!eth0", on_event=seen.append)
    BoundTCPConnector("if!eth0", on_event=lambda event: event.seconds)
    aiobind.Connector("if!eth0", on_event=seen)  # type: ignore[arg-type]


def figures(stats: aiobind.SourceStats) -> None:
    assert_type(stats.source, aiobind.Interface | aiobind.Address | aiobind.Host | aiobind.Prefix)
    for number in (stats.connections, stats.in_use, stats.idle, stats.connects, stats.bytes_sent, stats.bytes_received):
        assert_type(number, int)
    for seconds in (stats.suspended_until, stats.latency_p50, stats.latency_p99):
        assert_type(seconds, float | None)
    counts: list[Mapping[str, int]] = [stats.failures, stats.ports]
    assert_type(counts[0]["ECONNREFUSED"], int)
    stats.failures["ECONNREFUSED"] = 1  # type: ignore[index]
    stats.ports["192.0.2.1:443"] = 1  # type: ignore[index]


async def doors() -> None:
    async with aiobind.Connector("if!eth0", socket_options=[(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]) as connector:
        assert_type(connector, aiobind.Connector)
        assert_type(await connector.connect("example.com", 443, source="192.0.2.7"), socket.socket)
        assert_type(
            await connector.create_connection(Echo, "example.com", 443, ssl=ssl.create_default_context()),
            tuple[asyncio.Transport, Echo],
        )
        assert_type(
            await connector.open_connection("example.com", 443, ssl=True),
            tuple[asyncio.StreamReader, asyncio.StreamWriter],
        )
        assert_type(connector.stats(), tuple[aiobind.SourceStats, ...])
        figures(connector.stats()[0])
        connector.add("if!wwan1")
        connector.remove(aiobind.Interface("wwan1"), drain=False)
        connector.report("if!eth0", host="example.com")
        connector.report(aiobind.Interface("eth0"), host="example.com", ok=False, seconds=2.5)
        connector.report("if!eth0", host="example.com", ok=True)
        connector.report("if!eth0", "example.com")  # type: ignore[call-arg]
        connector.remove("if!eth0", False)  # type: ignore[call-arg]
        with connector.use_source("if!wwan0") as pinned:
            assert_type(pinned, aiobind.Interface | aiobind.Address | aiobind.Host | aiobind.Prefix)
    assert_type(await aiobind.connect("example.com", 443, source="if!eth0"), socket.socket)
    await aiobind.connect("example.com", 443)  # type: ignore[call-arg]


async def edge() -> None:
    connector = BoundTCPConnector("if!eth0", "if!wwan0", limit_per_source=50)
    base: aiohttp.TCPConnector = connector
    pin: AbstractContextManager[aiobind.Source] = connector.use_source(aiobind.Interface("wwan0"))
    async with aiohttp.ClientSession(connector=connector) as session:
        with pin, aiobind.use_source("192.0.2.7"):
            async with session.get("http://example.com/") as response:
                bound = aiobind.bound_source(response)
    assert_type(bound, aiobind.BoundSource)
    assert_type(bound.interface, str | None)
    assert_type((bound.address, bound.port), tuple[str, int])
    assert_type(connector.stats(), tuple[aiobind.SourceStats, ...])
    figures(connector.stats()[0])
    connector.add(aiobind.Interface("wwan1"))
    connector.remove("if!wwan1", drain=False)
    connector.report("if!eth0", host="example.com", seconds=60)
    await base.close()


def factory() -> None:
    aiohttp.TCPConnector(socket_factory=aiobind.socket_factory("if!eth0"))


def errors() -> None:
    try:
        raise aiobind.ConnectError(111, "refused")
    except aiobind.ConnectError as error:
        refused: ConnectionError = error
        assert_type(error.source, aiobind.Interface | aiobind.Address | aiobind.Host | aiobind.Prefix | None)
        assert_type(error.attempts, tuple[aiobind.Attempt, ...])
        assert_type(error.attempts[0].error, OSError)
        raise refused from error


async def anyio_streams(connector: aiobind.Connector, context: ssl.SSLContext, *, tls: bool) -> None:
    assert_type(await connect_tcp("example.com", 80, source="if!eth0"), SocketStream)
    assert_type(await connect_tcp("example.com", 80, connector=connector, tls=False), SocketStream)
    assert_type(await connect_tcp("example.com", 443, connector=connector, tls=True), TLSStream)
    assert_type(await connect_tcp("example.com", 443, source="if!eth0", ssl_context=context), TLSStream)
    assert_type(await connect_tcp("192.0.2.1", 443, source="if!eth0", tls_hostname="example.com"), TLSStream)
    assert_type(await connect_tcp("example.com", 443, source="if!eth0", tls=tls), SocketStream | TLSStream)
    await connect_tcp("example.com", 80, source="if!eth0", local_host="192.0.2.7")  # type: ignore[call-overload]
    connectable: ByteStreamConnectable = TCPConnectable("example.com", 80, source=aiobind.Interface("eth0"))
    await connectable.connect()
