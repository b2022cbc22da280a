"""The figures as Prometheus and OpenTelemetry read them: their real libraries, real connectors, real threads."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import re
import socket
import subprocess
import sys
import threading
import tomllib
import urllib.request
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

import aiobind
from aiobind import SourceStats, parse_source
from aiobind.aiohttp import BoundTCPConnector
from aiobind.metrics import Collector, Instruments

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from opentelemetry.metrics import Meter

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
A, B = "127.0.0.2", "127.0.0.3"

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Fixed:
    """Something with the figures that a test wants."""

    def __init__(self, *stats: SourceStats) -> None:
        self.figures = stats

    def stats(self) -> tuple[SourceStats, ...]:
        return self.figures


def stats(source: str = "if!eth0", **figures: Any) -> SourceStats:
    zero: dict[str, Any] = {
        "connections": 0,
        "in_use": 0,
        "idle": 0,
        "connects": 0,
        "failures": {},
        "suspended_until": None,
        "latency_p50": None,
        "latency_p99": None,
        "bytes_sent": 0,
        "bytes_received": 0,
        "ports": {},
    }
    return SourceStats(source=parse_source(source), **zero | figures)


BUSY = stats(
    connections=7,
    in_use=3,
    idle=2,
    connects=41,
    failures={"ECONNREFUSED": 4, "ENETUNREACH": 1},
    suspended_until=math.inf,
    latency_p50=0.012,
    latency_p99=0.25,
    bytes_sent=1000,
    bytes_received=2_000_000,
    ports={"192.0.2.1:443": 5, "192.0.2.2:443": 9},
)
FRESH = stats("ifhost!wwan0!2001:db8::7")


def registered(collector: Collector) -> CollectorRegistry:
    prometheus = CollectorRegistry(auto_describe=True)  # as the global one
    prometheus.register(collector)
    return prometheus


def text_of(*figures: SourceStats, name: str = "", generate: Callable[[Any], bytes] = generate_latest) -> str:
    connector = Fixed(*figures)  # the collector does not hold it
    return generate(registered(Collector(connector, name))).decode()


def series(prometheus: Any, **labels: str) -> Series:
    return series_in(generate_latest(prometheus).decode(), **labels)


def series_in(text: str, **labels: str) -> Series:
    """Return what Prometheus reads: each series once, without empty labels; those that have *labels*."""
    found: Series = {}
    for family in parse(text):
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                key = (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if v and k not in labels)))
                assert key not in found, f"twice: {key}"
                found[key] = sample.value
    return found


def only(found: Series, name: str) -> dict[str, float]:
    """Return the values of one name by what its labels say."""
    return {" ".join(v for _, v in labels): value for (each, labels), value in found.items() if each == name}


# --- the table ----------------------------------------------------------------------------------------------


def test_the_whole_text() -> None:
    assert text_of(BUSY, FRESH, name="crawl").splitlines() == [
        "# HELP aiobind_connections Open connections.",
        "# TYPE aiobind_connections gauge",
        'aiobind_connections{connector="crawl",source="if!eth0",state="in_use"} 3.0',
        'aiobind_connections{connector="crawl",source="if!eth0",state="idle"} 2.0',
        'aiobind_connections{connector="crawl",source="if!eth0",state="other"} 2.0',
        'aiobind_connections{connector="crawl",source="ifhost!wwan0!2001:db8::7",state="in_use"} 0.0',
        'aiobind_connections{connector="crawl",source="ifhost!wwan0!2001:db8::7",state="idle"} 0.0',
        'aiobind_connections{connector="crawl",source="ifhost!wwan0!2001:db8::7",state="other"} 0.0',
        "# HELP aiobind_connects_total Connections made.",
        "# TYPE aiobind_connects_total counter",
        'aiobind_connects_total{connector="crawl",source="if!eth0"} 41.0',
        'aiobind_connects_total{connector="crawl",source="ifhost!wwan0!2001:db8::7"} 0.0',
        "# HELP aiobind_failures_total Failed connects, by errno.",
        "# TYPE aiobind_failures_total counter",
        'aiobind_failures_total{connector="crawl",error="ECONNREFUSED",source="if!eth0"} 4.0',
        'aiobind_failures_total{connector="crawl",error="ENETUNREACH",source="if!eth0"} 1.0',
        "# HELP aiobind_suspended 1 while suspended.",
        "# TYPE aiobind_suspended gauge",
        'aiobind_suspended{connector="crawl",source="if!eth0"} 1.0',
        'aiobind_suspended{connector="crawl",source="ifhost!wwan0!2001:db8::7"} 0.0',
        "# HELP aiobind_connect_duration_seconds Quantiles of how long connects took.",
        "# TYPE aiobind_connect_duration_seconds gauge",
        'aiobind_connect_duration_seconds{connector="crawl",quantile="0.5",source="if!eth0"} 0.012',
        'aiobind_connect_duration_seconds{connector="crawl",quantile="0.99",source="if!eth0"} 0.25',
        "# HELP aiobind_bytes_total Payload of all connections.",
        "# TYPE aiobind_bytes_total counter",
        'aiobind_bytes_total{connector="crawl",direction="sent",source="if!eth0"} 1000.0',
        'aiobind_bytes_total{connector="crawl",direction="received",source="if!eth0"} 2e+06',
        'aiobind_bytes_total{connector="crawl",direction="sent",source="ifhost!wwan0!2001:db8::7"} 0.0',
        'aiobind_bytes_total{connector="crawl",direction="received",source="ifhost!wwan0!2001:db8::7"} 0.0',
        "# HELP aiobind_local_ports_used Local ports taken at the destination where most are.",
        "# TYPE aiobind_local_ports_used gauge",
        'aiobind_local_ports_used{connector="crawl",source="if!eth0"} 9.0',
        'aiobind_local_ports_used{connector="crawl",source="ifhost!wwan0!2001:db8::7"} 0.0',
    ]


def test_openmetrics_has_the_same_with_units() -> None:
    families = list(parse_openmetrics(text_of(BUSY, FRESH, generate=openmetrics.generate_latest)))  # it is strict
    assert sum(len(family.samples) for family in families) == 20
    assert {family.name: (family.type, family.unit) for family in families} == {
        "aiobind_connections": ("gauge", ""),
        "aiobind_connects": ("counter", ""),
        "aiobind_failures": ("counter", ""),
        "aiobind_suspended": ("gauge", ""),
        "aiobind_connect_duration_seconds": ("gauge", "seconds"),
        "aiobind_bytes": ("counter", "bytes"),
        "aiobind_local_ports_used": ("gauge", ""),
    }


@pytest.mark.parametrize(
    ("figures", "name", "values"),
    [
        # The figures are read while they change: none of them may become negative.
        ({"connections": 1, "in_use": 2}, "aiobind_connections", {"in_use": 2, "idle": 0, "other": 0}),
        ({"suspended_until": 12.5}, "aiobind_suspended", {"": 1}),
        # 0 is a time of the loop, and no latency that is not there.
        ({"suspended_until": 0.0}, "aiobind_suspended", {"": 1}),
        ({"latency_p50": 0.0}, "aiobind_connect_duration_seconds", {"0.5": 0}),
        ({"ports": {"[2001:db8::1]:443": 3}}, "aiobind_local_ports_used", {"": 3}),
    ],
)
def test_the_edges_of_the_table(figures: dict[str, Any], name: str, values: dict[str, float]) -> None:
    assert only(series_in(text_of(stats(**figures)), source="if!eth0"), name) == values


@pytest.mark.parametrize(
    "source", ["if!eth0", "192.0.2.7", "fe80::1%eth0", "net!2001:db8:7::/64", "host!crawler3.example", 'if!a"b\\n']
)
def test_a_source_is_written_as_it_is_read(source: str) -> None:
    families = list(parse(text_of(stats(source))))
    assert {sample.labels["source"] for family in families for sample in family.samples} == {source}
    assert str(parse_source(source)) == source


def test_there_are_as_many_series_as_sources_and_no_destination_in_them() -> None:
    def text(destinations: int) -> str:
        ports = {f"192.0.2.{number}:443": number for number in range(destinations)}
        return text_of(stats(ports=ports), stats(A, ports=ports))

    assert len(series_in(text(200))) == 2 * 8
    assert len(text(1).splitlines()) == len(text(200).splitlines())
    assert "192.0.2." not in text(200)
    assert ":443" not in text(200)


# --- the registry ---------------------------------------------------------------------------------------------


def test_registering_asks_for_no_figures() -> None:
    connector = Fixed(BUSY)
    connector.stats = lambda: pytest.fail("was asked")  # type: ignore[method-assign]
    prometheus = registered(Collector(connector))
    # A second one would say each TYPE twice, which is no valid text: the registry learns that from the names.
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        prometheus.register(Collector(Fixed()))


def test_some_names_only() -> None:
    connector = Fixed(BUSY)
    prometheus = registered(Collector(connector))
    names = {name for name, _ in series(prometheus.restricted_registry(["aiobind_bytes_total", "aiobind_suspended"]))}
    assert names == {"aiobind_bytes_total", "aiobind_suspended"}


def test_several_connectors() -> None:
    crawl, api, newer = Fixed(stats(connects=1)), Fixed(stats(connects=2)), Fixed(stats(connects=3))
    collector = Collector(crawl)
    prometheus = registered(collector)
    collector.add(api, "api")
    connects = "aiobind_connects_total"
    assert only(series(prometheus, source="if!eth0"), connects) == {"": 1, "api": 2}
    assert series(prometheus, source="if!eth0", connector="")[connects, ()] == 1  # an empty label is none
    collector.add(newer, "api")
    assert only(series(prometheus, source="if!eth0"), connects) == {"": 1, "api": 3}
    del newer
    gc.collect()
    # The one before does not come back.
    assert only(series(prometheus, source="if!eth0"), connects) == {"": 1}


def test_what_is_forgotten_leaves_nothing() -> None:
    collector = Collector(Fixed(BUSY), "gone at once")
    prometheus = registered(collector)
    gc.collect()
    assert series(prometheus) == {}
    for number in range(100):
        collector.add(Fixed(BUSY), str(number))
        gc.collect()
    assert len(collector._named) == 1


def test_connectors_that_come_from_several_threads() -> None:
    collector = Collector(first := Fixed(BUSY), "first")
    kept = {f"{number}": Fixed(BUSY) for number in range(400)}
    together = threading.Barrier(4)

    def add(begin: int) -> None:
        together.wait()
        for number in range(begin, 400, 4):
            collector.add(kept[f"{number}"], f"{number}")

    with switching_often():
        threads = [threading.Thread(target=add, args=(begin,)) for begin in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {name for name, _ in collector._stats()} == {"first", *kept}
    assert first.stats()


# --- real connectors ----------------------------------------------------------------------------------------


class _Peer(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        transport.write(transport.get_extra_info("peername")[0].encode() + b"\n")


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A port that takes connections and keeps them."""
    server = await asyncio.get_running_loop().create_server(_Peer, HOST, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="whole")

    async def begin(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        await go.wait()
        return response

    go = asyncio.Event()
    app = web.Application()
    app.router.add_get("/", answer)
    app.router.add_get("/half", begin)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    sock = socket.create_server(("", 0))
    await web.SockSite(runner, sock).start()
    yield f"http://{HOST}:{sock.getsockname()[1]}/"
    go.set()
    await runner.cleanup()


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    """Let threads change places wherever they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            gc.collect()
            await asyncio.sleep(0.001)


@pytest.mark.anyio
async def test_a_connector(port: int) -> None:
    async with aiobind.Connector(A, B) as connector:
        prometheus = registered(Collector(connector))
        socks = [await connector.connect(HOST, port) for _ in range(3)]
        found = series(prometheus)
        assert only(found, "aiobind_connects_total") == {A: 2, B: 1}
        assert only(series(prometheus, state="in_use"), "aiobind_connections") == {A: 2, B: 1}
        for sock in socks:
            sock.close()
        found = series(prometheus)
        assert only(found, "aiobind_connects_total") == {A: 2, B: 1}
        assert set(only(found, "aiobind_connections").values()) == {0}


@pytest.mark.anyio
async def test_a_pool(url: str) -> None:
    async with aiohttp.ClientSession(connector=BoundTCPConnector(A)) as client:
        assert isinstance(client.connector, BoundTCPConnector)
        prometheus = registered(Collector(client.connector))

        def connections() -> dict[str, float]:
            return only(series(prometheus, source=A), "aiobind_connections")

        async with client.get(url + "half"), client.get(url) as response:
            await response.read()
            assert connections() == {"in_use": 1, "idle": 1, "other": 0}
        assert only(series(prometheus), "aiobind_connects_total") == {A: 2}


@pytest.mark.anyio
async def test_a_handshake_that_hangs_is_seen() -> None:
    """Neither in use nor idle: without a state of its own nobody would notice them."""
    async with aiohttp.ClientSession(connector=BoundTCPConnector(A)) as client:
        assert isinstance(client.connector, BoundTCPConnector)
        prometheus = registered(Collector(client.connector))
        with socket.create_server((HOST, 0)) as silent:
            request = asyncio.ensure_future(client.get(f"https://{HOST}:{silent.getsockname()[1]}/"))
            await until(lambda: series(prometheus, source=A)["aiobind_connections", (("state", "other"),)] == 1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)


@pytest.mark.anyio
async def test_a_source_from_outside_the_list_is_there_while_it_has_connections(port: int) -> None:
    async with aiobind.Connector(A) as connector:
        prometheus = registered(Collector(connector))
        for _ in range(2):
            sock = await connector.connect(HOST, port, source=B)
            assert only(series(prometheus), "aiobind_connects_total") == {A: 0, B: 1}
            sock.close()
            del sock
            await until(lambda: only(series(prometheus), "aiobind_connects_total") == {A: 0})


def test_a_connector_that_is_registered_is_not_kept(reader: InMemoryMetricReader, meter: Meter) -> None:
    connector = aiobind.Connector(A)
    prometheus = registered(Collector(connector))
    Instruments(meter, connector)
    assert series(prometheus)
    assert observed(reader)
    gone = weakref.ref(connector)
    del connector
    gc.collect()
    assert gone() is None
    assert series(prometheus) == {}
    assert observed(reader) == {}


# --- other threads ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def exposed(prometheus: CollectorRegistry) -> AsyncIterator[str]:
    """Answer as ``start_http_server`` does, in its threads; yield the address."""
    server, thread = await asyncio.to_thread(start_http_server, 0, HOST, prometheus)
    try:
        yield f"http://{HOST}:{server.server_port}/metrics"
    finally:
        await asyncio.to_thread(server.shutdown)
        await asyncio.to_thread(thread.join)
        server.server_close()
        await asyncio.get_running_loop().shutdown_default_executor()


def scrape(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=10) as response:
        return response.read()  # type: ignore[no-any-return]


@pytest.mark.anyio
async def test_scraped_over_http_while_a_connector_works(url: str) -> None:
    connector = BoundTCPConnector(A, B, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as client, exposed(registered(Collector(connector))) as at:
        seen = {A: [0.0], B: [0.0]}
        for _ in range(5):
            scraped = asyncio.create_task(asyncio.to_thread(scrape, at))
            while not scraped.done():
                async with client.get(url) as response:
                    await response.read()
            for family in parse((await scraped).decode()):
                for sample in family.samples:
                    if sample.name == "aiobind_connects_total":
                        seen[sample.labels["source"]].append(sample.value)
        for values in seen.values():
            assert values == sorted(values)
            assert values[-1] > 0


@contextlib.asynccontextmanager
async def asked_all_the_time(prometheus: CollectorRegistry) -> AsyncIterator[None]:
    """Ask for the figures in another thread, again and again."""
    failures: list[Exception] = []
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                generate_latest(prometheus)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    with switching_often():
        thread.start()
        try:
            yield
        finally:
            stop.set()
            while thread.is_alive():
                await asyncio.sleep(0.001)
    assert failures == []


@pytest.mark.anyio
async def test_another_thread_may_ask_while_sources_come_and_go(port: int) -> None:
    async with aiobind.Connector(A) as connector, asked_all_the_time(registered(Collector(connector))):
        held: list[socket.socket] = []
        for number in range(800):
            held.append(await connector.connect(HOST, port, source=f"127.0.{number % 250}.9"))
            if len(held) > 200:
                held.pop(0).close()
        for sock in held:
            sock.close()


@pytest.mark.anyio
async def test_another_thread_may_ask_while_a_pool_changes(url: str) -> None:
    connector = BoundTCPConnector(A, B, limit=0)
    async with (
        aiohttp.ClientSession(connector=connector) as client,
        asked_all_the_time(registered(Collector(connector))),
    ):

        async def get(number: int) -> None:
            # Each host has idle connections of its own.
            async with client.get(url.replace(HOST, f"127.0.1.{number % 40 + 1}")) as response:
                await response.read()

        for _ in range(6):
            await asyncio.gather(*(get(number) for number in range(80)))


def test_a_loop_that_has_ended_can_still_be_asked() -> None:
    async def main() -> aiobind.Connector:
        async with aiobind.Connector(A) as connector:
            with contextlib.suppress(OSError):
                await connector.connect(HOST, 1)
            return connector

    connector = asyncio.run(main())
    assert only(series(registered(Collector(connector))), "aiobind_connects_total") == {A: 0}


# --- OpenTelemetry ------------------------------------------------------------------------------------------


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def meter(reader: InMemoryMetricReader) -> Iterator[Meter]:
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider.get_meter("test")
    provider.shutdown()


def metrics(reader: InMemoryMetricReader) -> Iterator[Any]:
    data: Any = reader.get_metrics_data()
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            yield from scope.metrics


def observed(reader: InMemoryMetricReader, **labels: str) -> Series:
    found: Series = {}
    for metric in metrics(reader):
        for point in metric.data.data_points:
            key = (metric.name, tuple(sorted((k, v) for k, v in point.attributes.items() if k not in labels)))
            if labels.items() <= point.attributes.items():
                assert key not in found
                found[key] = point.value
    return found


@pytest.mark.parametrize("name", ["", "crawl"])
def test_opentelemetry_has_the_same_figures(reader: InMemoryMetricReader, meter: Meter, name: str) -> None:
    connector = Fixed(BUSY, FRESH)
    Instruments(meter, connector, name)  # which the meter keeps
    gc.collect()
    prometheus = series(registered(Collector(connector, name)))
    assert len(prometheus) == 20
    assert {(re.sub("_total$|_seconds$", "", each), labels): value for (each, labels), value in prometheus.items()} == {
        (each.replace(".", "_"), labels): value for (each, labels), value in observed(reader).items()
    }


def test_opentelemetry_has_kinds_and_units(reader: InMemoryMetricReader, meter: Meter) -> None:
    connector = Fixed(BUSY)
    Instruments(meter, connector)
    assert {each.name: (type(each.data).__name__, getattr(each.data, "is_monotonic", None), each.unit)
            for each in metrics(reader)} == {
        "aiobind.connections": ("Sum", False, "{connection}"),
        "aiobind.connects": ("Sum", True, "{connection}"),
        "aiobind.failures": ("Sum", True, "{failure}"),
        "aiobind.suspended": ("Gauge", None, "1"),
        "aiobind.connect_duration": ("Gauge", None, "s"),
        "aiobind.bytes": ("Sum", True, "By"),
        "aiobind.local_ports_used": ("Gauge", None, "{port}"),
    }  # fmt: skip


def test_opentelemetry_of_several_connectors(reader: InMemoryMetricReader, meter: Meter) -> None:
    crawl, api, never = (Fixed(stats(connects=number)) for number in (1, 2, 3))
    instruments = Instruments(meter, crawl, "crawl")
    instruments.add(api, "api")
    Instruments(meter, never, "never")  # the SDK keeps the callbacks of the first instrument of a name
    assert only(observed(reader, source="if!eth0"), "aiobind.connects") == {"crawl": 1, "api": 2}


@pytest.mark.anyio
async def test_opentelemetry_of_a_real_connector(port: int, reader: InMemoryMetricReader, meter: Meter) -> None:
    async with aiobind.Connector(A) as connector:
        Instruments(meter, connector)
        with await connector.connect(HOST, port):
            found = await asyncio.to_thread(observed, reader, source=A)
        await asyncio.get_running_loop().shutdown_default_executor()
    assert found["aiobind.connections", (("state", "in_use"),)] == 1
    assert found["aiobind.connects", ()] == 1


# --- the libraries ------------------------------------------------------------------------------------------


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)


def test_neither_library_is_imported_before_it_is_used() -> None:
    done = run("import sys, aiobind.metrics; print({'prometheus_client', 'opentelemetry'} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(("missing", "works", "fails"), [
    ("prometheus_client", "Instruments(NoOpMeter('test'), connector)", "Collector(connector)"),
    ("opentelemetry", "list(Collector(connector).collect())", "raise ImportError"),
])  # fmt: skip
def test_without_one_of_the_libraries_the_other_works(missing: str, works: str, fails: str) -> None:
    done = run(f"""if True:
        import sys
        sys.modules[{missing!r}] = None
        import aiobind
        from aiobind.metrics import Collector, Instruments
        if {missing!r} != "opentelemetry":
            from opentelemetry.metrics import NoOpMeter
        connector = aiobind.Connector("if!eth0")
        {works}
        print("works")
        {fails}
        """)
    assert (done.returncode, done.stdout) == (1, "works\n"), done.stderr
    if missing == "prometheus_client":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        oldest = extras["metrics"][0].partition(">=")[2]
        assert f"ImportError: aiobind.metrics.Collector needs prometheus_client {oldest} or later" in done.stderr
        assert 'pip install "aiobind[metrics]"' in done.stderr
