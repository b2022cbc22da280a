"""Scrapy's requests leave from where their meta, or else the policy, says: a real spider, judged by the far side."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import trustme
from test_examples import ENVIRONMENT, EXAMPLES, Page, Site, serving

import aiobind

# The oldest aiohttp that aiobind takes is older than what Scrapy takes.
pytest.importorskip(
    "scrapy", reason="no Scrapy: with Python 3.11 the tests take the oldest aiohttp, which is too old for it"
)

from scrapy import Request, signals
from scrapy.core.downloader.handlers._aiohttp import AiohttpDownloadHandler
from scrapy.exceptions import (
    CannotResolveHostError,
    DownloadConnectionRefusedError,
    DownloadFailedError,
)
from scrapy.utils.test import get_crawler

from aiobind.scrapy import DownloadHandler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from scrapy.http import Response

    from aiobind.lab import Lab, Witness

SPIDER = Path(__file__).with_name("spider.py")
LOOPS = {
    "asyncio": [],
    "uvloop": ["ASYNCIO_EVENT_LOOP=uvloop.Loop"],
    "no reactor": ["TWISTED_REACTOR_ENABLED=False"],
}


class Pages(Page):
    """Pages on connections that are kept; some redirect, fail once, link to others, or stop in the middle."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        site, path = self.server, self.path
        site.seen.append((path, self.client_address[0]))
        if path.startswith("/slow"):
            site.asked.set()
            site.let_go.wait(30)
        status, headers, body = 200, {}, b"page"
        if path == "/moved":
            status, headers = 302, {"Location": "/there"}
        elif path == "/flaky" and site.seen.count((path, self.client_address[0])) < 2:
            status = 503
        elif path == "/links":
            headers, body = {"Content-Type": "text/html"}, b"".join(b'<a href="/%d">' % number for number in range(4))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if path.startswith("/held") and self.client_address[0] == site.holds:
            self.wfile.write(body[:2])
            body = body[2:]
            site.held.release()
            site.let_go.wait(30)
        self.wfile.write(body)


class Kept(Site):
    holds = ""  # the client whose pages /held stop in the middle

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener)
        self.held = threading.Semaphore(0)

    def finish_request(self, request: Any, client_address: Any) -> None:
        with contextlib.suppress(OSError):
            Pages(request, client_address, self)


RUN = "-m", "scrapy", "runspider", "-o", "-:jsonl"


@contextlib.contextmanager
def crawling(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def planned(plan: list[dict[str, Any]], *settings: str) -> list[str]:
    return [*RUN, str(SPIDER), "-a", f"plan={json.dumps(plan)}", *(word for each in settings for word in ("-s", each))]


def ended(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], str]:
    output, log = process.communicate(timeout=40)
    assert process.returncode == 0, log
    assert "Unclosed" not in log
    assert "Traceback" not in log or "unclosed event loop" in log, log  # the one that Twisted leaves when uvloop comes
    return [json.loads(line) for line in output.splitlines()], log


@pytest.fixture
def site() -> Iterator[Kept]:
    with serving(socket.create_server(("127.0.0.1", 0)), Kept) as site:
        yield site


# --- a spider in the lab ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS.values(), ids=list(LOOPS))
def test_each_request_leaves_from_its_source(loop: list[str], lab: Lab, witness: Witness) -> None:
    certificate = trustme.CA().issue_cert(lab.target_v4)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    with lab.far:
        plain, secure = (socket.create_server((lab.target_v4, port)) for port in (80, 443))
    with serving(plain, Kept) as http, serving(context.wrap_socket(secure, server_side=True), Kept) as https:
        pinned = {"source": "if!n2"}
        plan = [
            # The policy, of which there is one for both schemes: n0, n1, n0, n1, each from a connection of its own.
            *({"url": url} for url in (f"{http.url}/0", f"https://{lab.target_v4}/1", f"{http.url}/2")),
            {"url": f"https://{lab.target_v4}/3"},
            # Pinned: one connection for what goes to the same place, kept over redirect and retry.
            *({"url": f"{http.url}/{path}", "meta": pinned} for path in ("a", "moved", "flaky")),
            *({"url": f"{http.url}/{path}", "meta": {"bindaddress": "198.18.2.2"}} for path in "bc"),
            {"url": f"{http.url}/d", "meta": {"source": "if!n9"}},
            {"url": f"{http.url}/4"},
        ]
        with crawling(*planned(plan, "AIOBIND_SOURCES=if!n0,if!n1", "CONCURRENT_REQUESTS=1", *loop)) as process:
            pages, log = ended(process)
    found = {page["url"].rpartition("/")[2]: page for page in pages}
    sources = {path: page.get("source") for path, page in found.items()}
    n0, n1 = "if!n0", "if!n1"
    assert sources == dict(zip("01234", (n0, n1, n0, n1, n0), strict=True)) | {
        **dict.fromkeys(("a", "moved", "flaky"), "if!n2"),
        **dict.fromkeys("bc", "198.18.2.2"),
        "d": None,
    }
    assert all(page["status"] == 200 and page["bytes"] == 4 for path, page in found.items() if path != "d")
    refused = found["d"]
    assert (refused["error"], refused["cause"], refused["errno"]) == ("DownloadFailedError", "BindError", errno.ENODEV)
    assert refused["tries"] == 3
    # What the servers saw, and the far ends of the NICs.
    seen = {path.strip("/"): client for site in (http, https) for path, client in site.seen}
    assert seen.pop("there") == "198.18.2.2"
    assert seen == {path: page["address"] for path, page in found.items() if path != "d"}
    ways = {"if!n0": "n0", "if!n1": "n1", "if!n2": "n2", "198.18.2.2": "n0"}  # an address is only an address
    connections = {(ways[page["source"]], page["address"], page["port"]) for page in pages if "source" in page}
    assert {(packet.nic, packet.source, packet.sport) for packet in witness.packets() if packet.syn} == connections
    assert Counter(nic for nic, _, _ in connections) == {"n0": 2, "n1": 1, "n2": 1}
    counts = dict(re.findall(r"'aiobind/response_count/(\S+)': (\d+)", log))
    assert counts == {"if!n0": "3", "if!n1": "2", "if!n2": "5", "198.18.2.2": "2"}
    if loop == LOOPS["uvloop"]:
        assert "uvloop.Loop" in log


def test_a_nic_is_pulled_in_the_middle_and_nothing_is_lost(lab: Lab) -> None:
    with lab.far:
        listener = socket.create_server((lab.target_v4, 80))
    with serving(listener, Kept) as site:
        site.holds = lab.nic("n1").v4
        plan = [{"url": f"{site.url}/held/{number}"} for number in range(40)]
        with crawling(*planned(plan, "AIOBIND_SOURCES=if!n0,if!n1", "CONCURRENT_REQUESTS_PER_DOMAIN=6")) as process:
            for _ in range(6):  # n0 answers all, until n1 has all that may be under way
                assert site.held.acquire(timeout=20)
            lab.near.ip("link del n1")  # these would never be answered
            pages, log = ended(process)
    assert sorted(page["url"] for page in pages) == sorted(request["url"] for request in plan)
    assert {page.get("source") for page in pages} == {"if!n0"}, pages
    assert lab.nic("n1").v4 in {client for _, client in site.seen}
    assert "'retry/reason_count/scrapy.exceptions.ResponseDataLossError'" in log  # cut amid the body
    assert re.search(r"\[aiobind\] INFO: .*if!n1", log)


def test_ctrl_c_ends_what_is_under_way_and_no_more(site: Kept) -> None:
    plan = [{"url": f"{site.url}/slow/{number}"} for number in range(60)]
    with crawling(*planned(plan, "AIOBIND_SOURCES=127.0.0.2")) as process:
        assert site.asked.wait(20)
        process.send_signal(signal.SIGINT)
        site.let_go.set()
        pages, log = ended(process)
    assert "'finish_reason': 'shutdown'" in log
    assert len(pages) < 60


def test_in_a_script_whose_loop_does_not_run_yet(site: Kept) -> None:
    with crawling(SPIDER, json.dumps([{"url": f"{site.url}/a"}]), "127.0.0.2") as process:
        pages, _ = ended(process)
    assert [page["source"] for page in pages] == ["127.0.0.2"]


@pytest.mark.parametrize("pin", [None, "127.0.0.4"])
def test_example(pin: str | None, site: Kept) -> None:
    arguments = ["-s", "AIOBIND_SOURCES=127.0.0.2,127.0.0.3", "-a", f"url={site.url}/links"]
    arguments += ["-a", f"pin={pin}"] if pin else []
    with crawling(*RUN, EXAMPLES / "scrapy_spider.py", *arguments) as process:
        pages, _ = ended(process)
    assert pages[0]["url"] == f"{site.url}/links"
    assert sorted(site.seen) == sorted((page["url"].removeprefix(site.url), page["local"]) for page in pages)
    first, *others = (page["source"] for page in pages)
    assert first == (pin or "127.0.0.2")
    assert Counter(others) == {"127.0.0.2": 2, "127.0.0.3": 2}


def test_example_is_short() -> None:
    assert len((EXAMPLES / "scrapy_spider.py").read_text().splitlines()) < 40


# --- the handler by itself ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def handling(**settings: Any) -> AsyncIterator[DownloadHandler]:
    handler = DownloadHandler.from_crawler(get_crawler(settings_dict=settings))
    try:
        yield handler
    finally:
        await handler.close()


async def gone(url: str, meta: dict[str, Any], **settings: Any) -> Exception:
    request = Request(url, meta={**meta, "bound_source": "that of the try before"})
    async with handling(**settings) as handler:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - that is what the tests ask
            await handler.download_request(request)
    assert "bound_source" not in request.meta
    return caught.value


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("url", "source", "kind", "cause"),
    [
        ("http://127.0.0.1:1/", "if!n9", DownloadFailedError, aiobind.BindError),
        ("http://127.0.0.1:1/", "127.0.0.2", DownloadConnectionRefusedError, aiobind.ConnectError),
        ("http://nobody.test/", "127.0.0.2", CannotResolveHostError, aiobind.ResolveError),
    ],
)
async def test_errors_are_scrapys_with_ours_as_the_cause(
    url: str, source: str, kind: type[Exception], cause: type[aiobind.AiobindError], resolv_conf: Callable[..., None]
) -> None:
    resolv_conf("")
    error = await gone(url, {"source": source}, AIOBIND_SOURCES=["if!lo"])
    assert type(error) is kind
    assert isinstance(error.__cause__, cause)
    assert str(error) == error.__cause__.strerror


@pytest.mark.anyio
async def test_a_failure_that_is_not_ours_stays_as_it_is(site: Kept) -> None:
    tls = site.url.replace("http:", "https:")
    error = await gone(tls, {}, AIOBIND_SOURCES=["if!lo"])  # there is no TLS
    assert not isinstance(error.__cause__, aiobind.AiobindError)
    assert isinstance(error.__cause__, aiohttp.ClientConnectorError)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("meta", "kind", "text"),
    [
        ({"source": "lo"}, aiobind.InvalidSource, "did you mean 'if!lo'"),
        ({"bindaddress": "if!lo"}, aiobind.InvalidSource, "if!lo"),
        ({"bindaddress": ("127.0.0.2", 4000)}, ValueError, "local_ports"),
    ],
)
async def test_a_wrong_source_is_no_reason_to_try_again(meta: dict[str, Any], kind: type[Exception], text: str) -> None:
    error = await gone("http://127.0.0.1:1/", meta, AIOBIND_SOURCES=["if!lo"])
    assert type(error) is kind
    assert text in str(error)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("settings", "meta", "address"),
    [
        ({"AIOBIND_SOURCES": ["127.0.0.2"]}, {}, "127.0.0.2"),
        ({"AIOBIND_SOURCES": "127.0.0.2"}, {"source": None}, "127.0.0.2"),
        ({"AIOBIND_SOURCES": [aiobind.Address("127.0.0.2")]}, {}, "127.0.0.2"),
        ({"DOWNLOAD_BIND_ADDRESS": "127.0.0.3"}, {}, "127.0.0.3"),
        ({"DOWNLOAD_BIND_ADDRESS": ("127.0.0.3", 0)}, {}, "127.0.0.3"),
        ({"DOWNLOAD_BIND_ADDRESS": "127.0.0.3", "AIOBIND_SOURCES": ["127.0.0.2"]}, {}, "127.0.0.2"),
        ({"AIOBIND_SOURCES": ["127.0.0.2"]}, {"bindaddress": ("127.0.0.4", 0)}, "127.0.0.4"),
        ({"AIOBIND_SOURCES": ["127.0.0.2"]}, {"source": "127.0.0.5", "bindaddress": "127.0.0.4"}, "127.0.0.5"),
        ({"AIOBIND_SOURCES": ["127.0.0.2"]}, {"source": aiobind.Address("127.0.0.5")}, "127.0.0.5"),
    ],
)
async def test_where_the_source_is_named(
    settings: dict[str, Any], meta: dict[str, Any], address: str, site: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    async with handling(**settings) as handler:
        request = Request(f"{site.url}/a", meta=meta)
        response = await handler.download_request(request)
        with pytest.raises(LookupError):
            aiobind.bound_source(response)
        response.request = request  # as the downloader does
        assert aiobind.bound_source(response).address == address
    assert site.seen == [("/a", address)]
    assert "bindaddress" not in caplog.text


@pytest.mark.anyio
async def test_by_a_proxy(site: Kept) -> None:
    async with handling(AIOBIND_SOURCES=["127.0.0.2"]) as handler:
        request = Request("http://nobody.test/a", meta={"proxy": site.url, "source": "127.0.0.3"})
        assert (await handler.download_request(request)).status == 200
    assert site.seen == [("http://nobody.test/a", "127.0.0.3")]


@pytest.mark.anyio
async def test_what_a_signal_starts_does_not_inherit_the_pin(site: Kept) -> None:
    async with handling(AIOBIND_SOURCES=["127.0.0.2"]) as handler:
        tasks: list[asyncio.Task[Response]] = []

        def aside(request: Request) -> None:
            if not tasks:
                tasks.append(asyncio.create_task(handler.download_request(Request(f"{site.url}/aside"))))

        handler.crawler.signals.connect(aside, signals.headers_received)
        await handler.download_request(Request(f"{site.url}/a", meta={"source": "127.0.0.3"}))
        await tasks[0]
    assert site.seen == [("/a", "127.0.0.3"), ("/aside", "127.0.0.2")]


@pytest.mark.anyio
async def test_a_response_that_did_not_come_by_our_connector_is_refused(site: Kept) -> None:
    """A Scrapy that makes its requests in another way than it does today is not to go unpinned unnoticed."""
    async with handling(AIOBIND_SOURCES=["127.0.0.2"]) as handler:
        ours, handler._session = handler._session, aiohttp.ClientSession()
        with pytest.raises(LookupError):
            await handler.download_request(Request(f"{site.url}/a"))
        await ours.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({}, TypeError, "source"),
        ({"AIOBIND_SOURCES": ["lo"]}, aiobind.InvalidSource, "if!lo"),
        ({"AIOBIND_SOURCES": ["if!lo"], "AIOBIND_OPTIONS": {"limit_per_sauce": 3}}, TypeError, "limit_per_sauce"),
        ({"AIOBIND_SOURCES": ["if!lo"], "AIOBIND_OPTIONS": {"local_addr": ("::1", 0)}}, TypeError, "local_addr"),
        ({"DOWNLOAD_BIND_ADDRESS": ("127.0.0.2", 4000)}, ValueError, "local_ports"),
    ],
)
async def test_wrong_settings(settings: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text) as caught:
        DownloadHandler.from_crawler(get_crawler(settings_dict=settings))
    assert type(caught.value) is kind


@pytest.mark.anyio
async def test_options() -> None:
    policy = aiobind.Failover()
    options = {"policy": policy, "limit_per_source": 3, "limit_per_host": 7}
    async with handling(
        AIOBIND_SOURCES=["if!lo", "127.0.0.2"], AIOBIND_OPTIONS=options, CONCURRENT_REQUESTS=5
    ) as handler:
        connector = handler.connector
        assert (connector.limit, connector.limit_per_host, connector.limit_per_source) == (5, 7, 3)
        assert [str(figures.source) for figures in connector.stats()] == ["if!lo", "127.0.0.2"]
    assert connector.closed
    async with handling(AIOBIND_SOURCES=["if!lo"], CONCURRENT_REQUESTS_PER_DOMAIN=4) as handler:
        assert handler.connector.limit_per_host == 4


@pytest.mark.anyio
async def test_both_schemes_of_a_crawler_share_a_handler_and_nobody_else_does() -> None:
    class Other(DownloadHandler):
        pass

    crawlers = [get_crawler(settings_dict={"AIOBIND_SOURCES": ["if!lo"]}) for _ in range(2)]
    made = [kind.from_crawler(crawler) for kind in (DownloadHandler, Other) for crawler in (*crawlers, *crawlers)]
    assert len(set(map(id, made))) == 4
    assert [type(handler) for handler in made] == [DownloadHandler] * 4 + [Other] * 4
    assert [handler.crawler for handler in made] == crawlers * 4
    for handler in made:  # as Scrapy does, twice
        await handler.close()


# --- what aiobind/scrapy.py takes for granted of Scrapy -----------------------------------------------------------


@pytest.mark.anyio
async def test_the_session_is_made_as_scrapy_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    make = aiohttp.ClientSession.__init__

    def recorded(session: aiohttp.ClientSession, **keywords: Any) -> None:
        made.append(dict(keywords))
        make(session, **keywords)

    monkeypatch.setattr(aiohttp.ClientSession, "__init__", recorded)
    async with handling(AIOBIND_SOURCES=["if!lo"]) as handler:
        assert handler._session.connector is handler.connector
    theirs, ours = made
    assert (type(theirs.pop("connector")), ours.pop("connector")) == (aiohttp.TCPConnector, handler.connector)
    theirs["skip_auto_headers"], ours["skip_auto_headers"] = map(
        set, (theirs["skip_auto_headers"], ours["skip_auto_headers"])
    )
    assert ours == theirs


def test_the_hook_is_what_it_was() -> None:
    assert list(inspect.signature(AiohttpDownloadHandler._make_request).parameters) == ["self", "request", "timeout"]
    # Once Scrapy knows one of these, ours is not needed any more.
    assert AiohttpDownloadHandler.supports_per_request_bindaddress is False
    assert AiohttpDownloadHandler.lazy is False
