"""Cases in which several rules meet: limits and bans, flaps and probes, TLS and links, removals and waiting."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import time

import aiohttp
import aiolimiter  # noqa: F401 - reads its version from a file when it is first imported
import pytest

import aiobind
from aiobind.aiohttp import BoundTCPConnector

pytestmark = pytest.mark.anyio
A, B = "127.0.0.2", "127.0.0.3"


@contextlib.asynccontextmanager
async def server(host="127.0.0.1", handler=None):
    peers = []

    async def serve(r, w):
        peers.append(w.get_extra_info("peername")[0])
        with contextlib.suppress(OSError):
            await r.read()
        w.close()

    s = await asyncio.start_server(handler or serve, host, 0)
    try:
        yield s.sockets[0].getsockname()[1], peers
    finally:
        s.close()


def origin(c, text):
    return c._dialer.roster.find(text)


async def test_banned_source_waits_for_full_one():
    async with server() as (port, _peers):
        c = aiobind.Connector(A, B, limit_per_source=1, policy=aiobind.Failover())
        first = await c.connect("127.0.0.1", port)
        c.report(B, host="127.0.0.1", seconds=60)
        asyncio.get_running_loop().call_later(0.1, first.close)
        with await c.connect("127.0.0.1", port) as second:
            assert second.getsockname()[0] == A


async def test_late_source_goes_before_banned_one():
    async with server() as (port, _peers):
        c = aiobind.Connector(A, B, rate_per_source=10, policy=aiobind.Failover())
        c.report(B, host="127.0.0.1", seconds=60)
        for _ in range(2):
            with await c.connect("127.0.0.1", port) as sock:
                assert sock.getsockname()[0] == A


async def test_suspended_black_hole_is_not_tried_while_the_healthy_one_is_full(lab):
    lab.far.ip("route add blackhole 198.18.1.2/32")

    async def far_server():
        with lab.far:
            s = socket.create_server(("0.0.0.0", 8080))
        s.setblocking(False)
        return s

    s = await far_server()
    c = aiobind.Connector("if!n0", "if!n1", limit_per_source=1, policy=aiobind.Failover())
    c._dialer.roster.fails(origin(c, "if!n1"), socket.AF_INET, aiobind.BindError(errno.ETIMEDOUT, "silent"))
    origin(c, "if!n1").breakers[socket.AF_INET].until += 30
    first = await c.connect(lab.target_v4, 8080)
    asyncio.get_running_loop().call_later(0.2, first.close)
    began = time.monotonic()
    async with asyncio.timeout(5):
        second = await c.connect(lab.target_v4, 8080)
    assert time.monotonic() - began < 1
    second.close()
    s.close()


async def test_on_event_may_remove(lab):
    told = []

    def on_event(e):
        told.append(e)
        if e.kind == "suspended":
            c.remove(e.source)

    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    c = aiobind.Connector("if!n0", "if!n1", "if!n2", on_event=on_event)
    c._dialer.enter()
    await asyncio.sleep(0.05)
    lab.near.ip("link set n0 down")
    await asyncio.sleep(0.1)
    await c.aclose()
    assert not errors, errors
    assert [e.kind for e in told] == ["suspended"]


async def test_direct_says_nothing_of_the_source(lab):
    lab.far.ip("route add blackhole 198.18.0.2/32")  # nobody answers
    c = aiobind.Connector("if!n0", "if!n1", direct=(lab.target_v4,), policy=aiobind.Failover())
    c._dialer.enter()
    await asyncio.sleep(0.05)
    lab.near.ip("link set n1 down")
    await asyncio.sleep(0.1)
    lab.near.ip("link set n1 up")
    await asyncio.sleep(0.1)
    turn = aiobind._roster.Turn(origin(c, "if!n1"))
    targets = await c._dialer.targets(turn.origin, lab.target_v4, 9)
    try:
        async with asyncio.timeout(0.8):
            await c._dialer.dial(turn, lab.target_v4, targets, delay=None)
    except (TimeoutError, aiobind.AiobindError):
        pass
    assert not c.stats()[1].failures
    assert not any(b.failures for b in origin(c, "if!n1").breakers.values())


async def test_removed_while_waiting():
    async with server() as (port, _peers):
        c = aiobind.Connector(A, limit_per_source=1)
        first = await c.connect("127.0.0.1", port)
        waiting = asyncio.create_task(c.connect("127.0.0.1", port))
        await asyncio.sleep(0.05)
        c.add(B)
        c.remove(A)
        first.close()
        with await waiting as sock:
            assert sock.getsockname()[0] == B


async def test_pace_and_close():

    async def http(r, w):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await r.readuntil(b"\r\n\r\n")
            w.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        w.close()

    async with server(handler=http) as (port, _):
        c = BoundTCPConnector(A, rate_per_source=0.1)
        session = aiohttp.ClientSession(connector=c)
        (await session.get(f"http://127.0.0.1:{port}/")).release()
        task = asyncio.create_task(session.get(f"http://127.0.0.1:{port}/"))
        await asyncio.sleep(0.05)
        await session.close()
        with pytest.raises(aiohttp.ClientError):
            await task


@pytest.mark.parametrize(
    ("reported", "asked"),
    [
        ("[::1]", "::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("stra\u00dfe.de", "xn--strae-oqa.de"),
    ],
)
async def test_report_names_the_same_host(reported, asked):
    web, plain = (make(A, B, policy=aiobind.Failover()) for make in (BoundTCPConnector, aiobind.Connector))
    for connector in (web, plain):
        connector.report(A, host=reported)
        first = await connector._dialer.route(asked, 80).next()
        if connector is web or reported.isascii():  # the standard library has IDNA 2003 only
            assert str(first.origin.source) == B
    await web.close()


async def test_tls_handshake_moves_on_with_its_link(lab):
    with lab.far:
        s = socket.create_server(("0.0.0.0", 443))
    s.setblocking(False)
    c = BoundTCPConnector("if!n0", "if!n1", policy=aiobind.Failover())
    async with aiohttp.ClientSession(connector=c) as session:
        task = asyncio.create_task(session.get(f"https://{lab.target_v4}/", ssl=False))
        loop = asyncio.get_running_loop()
        one, _peer1 = await loop.sock_accept(s)
        await loop.sock_recv(one, 1)
        lab.near.ip("link set n0 down")
        try:
            async with asyncio.timeout(2):
                two, peer2 = await loop.sock_accept(s)
            assert peer2[0].startswith("198.18.1.")
            two.close()
        finally:
            one.close()
            s.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_no_slow_path_after_a_flap(lab):
    with lab.far:
        s = socket.create_server(("0.0.0.0", 8080))
    c = aiobind.Connector("if!n0", "if!n1", policy=aiobind.Failover())
    c._dialer.enter()
    await asyncio.sleep(0.05)
    lab.near.ip("link set n0 down")
    await asyncio.sleep(0.1)
    lab.near.ip("link set n0 up", "route add default via 198.18.0.1 dev n0 metric 1000")
    await asyncio.sleep(1.2)
    (await c.connect(lab.target_v4, 8080)).close()
    assert not origin(c, "if!n0").breakers
    s.close()


async def test_suspended_after_a_flap_is_suspended(lab):
    c = aiobind.Connector("if!n0", "if!n1", policy=aiobind.Failover())
    c._dialer.enter()
    await asyncio.sleep(0.05)
    lab.near.ip("link set n0 down")
    await asyncio.sleep(0.1)
    lab.near.ip("link set n0 up")
    await asyncio.sleep(0.1)
    c._dialer.roster.fails(origin(c, "if!n0"), socket.AF_INET, aiobind.BindError(errno.ETIMEDOUT, "silent"))
    assert c.stats()[0].suspended_until is not None


async def test_a_kept_answer_is_no_answer(resolv_conf):
    from dns_server import DnsServer

    resolv_conf("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    loop = asyncio.get_running_loop()
    server = DnsServer()
    await loop.run_in_executor(None, server.__enter__)
    try:
        server.add("warm.test", "127.0.0.1", ttl=300)
        import math

        server.add("silent.test", "127.0.0.1", delay=math.inf)
        c = aiobind.Connector(A, B, dns=("127.0.0.1",), ttl_dns_cache=None)
        d = c._dialer
        d.enter()
        a, b = origin(c, A), origin(c, B)
        await d.find(a, "warm.test", 80)
        failing = asyncio.create_task(d.find(b, "silent.test", 80))
        await asyncio.sleep(0.3)
        await d.find(a, "warm.test", 80)
        with pytest.raises(aiobind.ResolveError):
            await failing
        assert c.stats()[1].suspended_until is None
        await c.aclose()
    finally:
        await loop.run_in_executor(None, server.__exit__, None, None, None)


async def test_websocket_gives_its_place_back():
    from aiohttp import web

    async def ws(request):
        sock = web.WebSocketResponse()
        await sock.prepare(request)
        async for _ in sock:
            pass
        return sock

    app = web.Application()
    app.router.add_get("/", ws)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    c = BoundTCPConnector(A, limit_per_source=1)
    async with aiohttp.ClientSession(connector=c) as session:
        for how in ("close", "drop"):
            w = await session.ws_connect(f"http://127.0.0.1:{port}/")
            assert c.stats()[0].in_use == 1
            if how == "close":
                await w.close()
            else:
                w._response.close()
            assert c.stats()[0].in_use == 0
            c._dialer.limits._settle()
            assert not c._dialer.limits._held
    await runner.cleanup()


async def test_tls_handshake_counts_after_link_loss(lab):
    with lab.far:
        s = socket.create_server(("0.0.0.0", 443))
    s.setblocking(False)
    c = BoundTCPConnector("if!n0", policy=aiobind.Failover(), limit_per_source=1)
    async with aiohttp.ClientSession(connector=c) as session:
        task = asyncio.create_task(session.get(f"https://{lab.target_v4}/", ssl=False))
        loop = asyncio.get_running_loop()
        one, _ = await loop.sock_accept(s)
        await loop.sock_recv(one, 1)
        lab.near.ip("link set n0 down")
        with pytest.raises(aiohttp.ClientConnectorError) as caught:
            async with asyncio.timeout(2):
                await task
        assert caught.value.errno in (errno.ENETDOWN, errno.ENETUNREACH)
        await asyncio.sleep(0.1)
        stats = c.stats()[0]
        assert (stats.connections, stats.in_use) == (0, 0)
        c._dialer.limits._settle()
        assert not c._dialer.limits._held
    one.close()
    s.close()


@pytest.mark.parametrize("how", ["servfail", "silent"])
async def test_a_broken_domain_is_no_fault_of_the_source(resolv_conf, how):
    import math

    from dns_server import SERVFAIL, DnsServer

    resolv_conf("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    loop = asyncio.get_running_loop()
    server = DnsServer()
    await loop.run_in_executor(None, server.__enter__)
    try:
        for i in range(20):
            server.add(f"ok{i}.test", "127.0.0.1")
        for i in range(2):
            server.add(
                f"broken{i}.test",
                *(() if how == "servfail" else ("127.0.0.1",)),
                **({"rcode": SERVFAIL} if how == "servfail" else {"delay": math.inf}),
            )
        told = []
        c = aiobind.Connector(A, B, dns=("127.0.0.1",), on_event=told.append)
        d = c._dialer
        d.enter()
        sources = [origin(c, A), origin(c, B)]

        async def good():
            for i in range(20):
                await d.find(sources[i % 2], f"ok{i}.test", 80)
                await asyncio.sleep(0.05)

        async def bad(i):
            with contextlib.suppress(aiobind.AiobindError):
                await d.find(sources[i], f"broken{i}.test", 80)

        await asyncio.gather(good(), bad(0), bad(1))
        await c.aclose()
        assert [e for e in told if e.kind == "suspended"] == []
    finally:
        await loop.run_in_executor(None, server.__exit__, None, None, None)


async def test_connector_tls_handshake_ends_with_its_link(lab):
    with lab.far:
        s = socket.create_server(("0.0.0.0", 443))
    s.setblocking(False)
    c = aiobind.Connector("if!n0", "if!n1", policy=aiobind.Failover())
    ctx = ssl.create_default_context()
    ctx.check_hostname = False
    ctx.verify_mode = ssl.CERT_NONE
    task = asyncio.create_task(c.open_connection(lab.target_v4, 443, ssl=ctx))
    loop = asyncio.get_running_loop()
    one, _ = await loop.sock_accept(s)
    await loop.sock_recv(one, 1)
    lab.near.ip("link set n0 down")
    try:
        done, _ = await asyncio.wait([task], timeout=3)
        assert done
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        one.close()
        s.close()


async def test_dead_target_suspends_nobody_after_a_flap(lab):
    told = []
    c = aiobind.Connector("if!n0", "if!n1", policy=aiobind.Failover(), on_event=told.append)
    c._dialer.enter()
    lab.far.ip("route add blackhole 198.18.0.2/32", "route add blackhole 198.18.1.2/32")
    await asyncio.sleep(0.05)
    lab.near.ip("link set n0 down")
    await asyncio.sleep(0.1)
    lab.near.ip("link set n0 up", "route add default via 198.18.0.1 dev n0 metric 1000")
    await asyncio.sleep(0.1)
    told.clear()
    with contextlib.suppress(TimeoutError, aiobind.AiobindError):
        async with asyncio.timeout(2):
            await c.connect(lab.target_v4, 9)
    assert [e for e in told if e.kind == "suspended"] == []


async def test_remove_without_drain_cuts_what_is_under_way(lab):
    async with server() as (port, _):
        c = aiobind.Connector(A, B, policy=aiobind.Failover())

        async def on():
            return await c.connect("127.0.0.1", port)

        task = asyncio.create_task(on())
        await asyncio.sleep(0)
        c.remove(A, drain=False)
        with await task as sock:
            assert sock.getsockname()[0] == B or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
