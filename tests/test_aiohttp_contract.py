"""What `aiobind.aiohttp` takes for granted of aiohttp's private parts, and of public ones that say less than we need.

Nothing of aiobind runs here. When one of these fails, this version of aiohttp has changed something that
`aiobind/aiohttp.py` touches: look there for the name in the message before you declare the version supported.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import socket
import ssl
import weakref
from collections import defaultdict, deque
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_exceptions import cert_errors, ssl_errors
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest, ConnectionKey
from aiohttp.connector import BaseConnector, Connection, TCPConnector

import aiobind
from aiobind._dial import Dialer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.anyio

_context: ContextVar[str] = ContextVar("_context")


def changed(what: str) -> str:
    return f"aiohttp {aiohttp.__version__} has changed {what}; aiobind/aiohttp.py relies on it"


# --- names and signatures -----------------------------------------------------------------------------------

SIGNATURES = {
    "connect": "self, req, traces, timeout",
    "_create_connection": "self, req, traces, timeout",
    "_wrap_create_connection": "self, *args, addr_infos, req, timeout, client_error, **kwargs",
    "_get": "self, key, traces",
    "_release": "self, key, protocol, *, should_close",
}


def parameters(function: Callable[..., Any]) -> str:
    """The parameters by name and kind, without their types and defaults."""
    found = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty, default=p.empty) for p in found]))[1:-1]


@pytest.mark.parametrize(("name", "expected"), SIGNATURES.items(), ids=list(SIGNATURES))
def test_signatures(name: str, expected: str) -> None:
    method = getattr(TCPConnector, name, None)
    assert method is not None, changed(f"TCPConnector.{name}: it is gone")
    assert parameters(method) == expected, changed(f"the signature of TCPConnector.{name}")
    is_coroutine = inspect.iscoroutinefunction(method)
    assert is_coroutine is (name != "_release"), changed(f"whether TCPConnector.{name} is a coroutine")


def test_close_takes_keywords_at_most() -> None:
    kinds = [p.kind for p in list(inspect.signature(TCPConnector.close).parameters.values())[1:]]
    assert set(kinds) <= {inspect.Parameter.KEYWORD_ONLY}, changed("the signature of TCPConnector.close")


def test_every_private_name_that_we_touch_is_held_here() -> None:
    """A private name of aiohttp that ``aiobind/aiohttp.py`` comes to use needs a test in this file."""
    tree = ast.parse(Path(aiobind.__file__).with_name("aiohttp.py").read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    used = {node.attr for node in attributes} | functions
    ours = functions | {node.attr for node in attributes if isinstance(node.ctx, ast.Store)} | set(vars(Dialer))
    theirs = set(vars(TCPConnector)) | set(vars(BaseConnector)) | {"_acquired_per_host", "_factory", "_payload"}
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert (private - ours) | (private & theirs) == {
        "_acquired_per_host",
        "_conns",
        "_create_connection",
        "_factory",
        "_get",
        "_loop",
        "_payload",
        "_protocol",
        "_release",
        "_ssl_shutdown_timeout",
        "_wrap_create_connection",
    }


# --- behaviour ----------------------------------------------------------------------------------------------


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="hello", status=302 if request.path == "/again" else 200, headers={"Location": "/"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, sock).start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}/"
    await runner.cleanup()


class Key(tuple[Any, ...]):
    """As aiobind's key: all that may be asked of it is to be hashable, equal to itself, and ``is_ssl``."""

    __slots__ = ()

    @property
    def is_ssl(self) -> bool:
        return False


class Request:
    """As aiobind's request: aiohttp's own, with another key."""

    def __init__(self, request: ClientRequest) -> None:
        self.request = request
        self.connection_key = Key((request.connection_key, "from somewhere"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.request, name)


class Handler(ResponseHandler):
    """A protocol of ours."""

    __slots__ = ("more",)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)


class Spy(TCPConnector):
    """Notes what aiohttp's own connector does with a request and a key that are not its own."""

    def __init__(self, error: Exception | None = None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._factory = cast("partial[ResponseHandler]", partial(Handler, loop=self._loop))
        self.error = error
        self.calls: list[str] = []
        self.request: Any = None
        self.keys: list[Any] = []
        self.keywords: dict[str, Any] = {}
        self.context: str | None = None

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Connection:
        self.calls.append("connect")
        assert isinstance(req, ClientRequest), changed("what TCPConnector.connect is given")
        assert isinstance(req.connection_key, ConnectionKey), changed("ClientRequest.connection_key")
        assert isinstance(timeout, aiohttp.ClientTimeout), changed("the timeout of TCPConnector.connect")
        self.request = req
        connection = await super().connect(Request(req), traces, timeout)  # type: ignore[arg-type]
        assert type(connection) is Connection, changed("what TCPConnector.connect returns")
        return connection

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> ResponseHandler:
        self.calls.append("_create_connection")
        assert isinstance(req, Request), changed("TCPConnector.connect: _create_connection gets another request")
        token = _context.set("set in _create_connection")
        try:
            protocol = await super()._create_connection(req.request, traces, timeout)
        finally:
            _context.reset(token)
        assert isinstance(protocol, ResponseHandler), changed("what TCPConnector._create_connection returns")
        return protocol

    async def _wrap_create_connection(self, *args: Any, addr_infos: Any, req: Any, **keywords: Any) -> Any:
        self.calls.append("_wrap_create_connection")
        self.context, self.keywords = _context.get(None), keywords
        if self.error is not None:
            addr_infos.clear()
            raise self.error
        for info in addr_infos:
            assert isinstance(info[4][0], str), changed("addr_infos of _wrap_create_connection: the host is no text")
            assert isinstance(info[4][1], int), changed("addr_infos of _wrap_create_connection: the port is no number")
        sock = socket.socket()
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, addr_infos[0][4][:2])
        except OSError as error:
            sock.close()
            addr_infos.clear()
            raise keywords["client_error"](req.connection_key, error) from error
        # All but these two is what loop.create_connection takes, the factory of the protocol first.
        keywords = {name: value for name, value in keywords.items() if name not in {"timeout", "client_error"}}
        transport, protocol = await asyncio.get_running_loop().create_connection(*args, sock=sock, **keywords)
        assert isinstance(protocol, Handler), changed("what makes protocols: TCPConnector._factory")
        return transport, protocol

    def _release(self, key: Any, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        self.calls.append("_release")
        self.keys.append(key)
        super()._release(key, protocol, should_close=should_close)


class Table:
    """All that aiohttp may do to ``_acquired_per_host``: anything else is an error here."""

    def __init__(self) -> None:
        self._sets: defaultdict[Any, set[Any]] = defaultdict(set)

    def __getitem__(self, key: Any) -> set[Any]:
        assert isinstance(key, Key), changed("the key of _acquired_per_host")
        return self._sets[key]

    def __delitem__(self, key: Any) -> None:
        del self._sets[key]

    def get(self, key: Any, default: Any = None) -> Any:
        return self._sets.get(key, default)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(changed(f"what it does to _acquired_per_host: .{name}"))


async def get(client: aiohttp.ClientSession, url: str, **keywords: Any) -> aiohttp.ClientResponse:
    async with client.get(url, **keywords) as response:
        await response.read()
        return response


async def test_a_request_goes_through_these_methods_and_carries_our_key(url: str) -> None:
    connector = Spy()
    async with aiohttp.ClientSession(connector=connector) as client:
        await get(client, url)
        made = ["connect", "_create_connection", "_wrap_create_connection", "_release"]
        assert connector.calls == made, changed("the way of a request through the connector")
        await get(client, url)
        assert connector.calls == [*made, "connect", "_release"], changed(
            "the way of a request over an idle connection"
        )
        assert {type(key) for key in connector.keys} == {Key}, changed("the key that _release is given")
        assert isinstance(connector._conns, dict), changed("TCPConnector._conns")
        ((key, idle),) = connector._conns.items()
        assert type(key) is Key, changed("the key of TCPConnector._conns")
        assert isinstance(idle, deque | list), changed("what TCPConnector._conns holds")
        ((protocol, since),) = idle
        assert isinstance(protocol, ResponseHandler), changed("what TCPConnector._conns holds")
        assert isinstance(since, float), changed("what TCPConnector._conns holds")
        assert protocol.is_connected(), changed("ResponseHandler.is_connected")
        assert weakref.WeakKeyDictionary({protocol: 1})[protocol] == 1, changed("ResponseHandler: no weak references")
        assert getattr(connector, "_loop", None) is asyncio.get_running_loop(), changed("TCPConnector._loop")
        assert connector.context == "set in _create_connection", changed(
            "the context in which _wrap_create_connection is called"
        )
        assert connector.keywords.keys() == {"timeout", "client_error", "ssl", "server_hostname"}, changed(
            f"the keywords of _wrap_create_connection: {sorted(connector.keywords)}"
        )


async def test_the_body_that_is_being_read_is_the_payload_of_the_protocol() -> None:
    """And who takes it away, with an error in it, has the last word on what the reader is told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello")
        await writer.drain()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = "http://{}:{}/".format(*server.sockets[0].getsockname())
    async with server, aiohttp.ClientSession(connector=TCPConnector()) as client, client.get(address) as response:
        protocol = response._protocol
        assert protocol is not None
        assert await response.content.readany() == b"hello"
        assert protocol._payload is response.content, changed("ResponseHandler._payload")
        response.content.set_exception(aiohttp.ClientOSError(104, "cut"))
        protocol._payload = None
        assert protocol.transport is not None
        protocol.transport.abort()  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)
        with pytest.raises(aiohttp.ClientOSError, match="cut"):
            await response.content.readany()


async def test_connections_in_use_are_counted_by_host_in_a_table_that_we_replace(url: str) -> None:
    connector = Spy(limit_per_host=2)
    assert isinstance(connector._acquired_per_host, defaultdict), changed("TCPConnector._acquired_per_host")
    assert connector._acquired_per_host.default_factory is set, changed("TCPConnector._acquired_per_host")
    table = Table()
    connector._acquired_per_host = table  # type: ignore[assignment]
    async with aiohttp.ClientSession(connector=connector) as client:
        await asyncio.gather(*(get(client, url) for _ in range(6)))
        with pytest.raises(aiohttp.ClientConnectorError):
            await get(client, "http://127.0.0.1:1/")
        assert connector.calls.count("_create_connection") == 3, changed("limit_per_host")
        assert not table._sets, changed("_acquired_per_host: it is not emptied")


class Four(AbstractResolver):
    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
        hosts = ["127.0.0.1", "127.0.0.2", "::1", "127.0.0.3"]
        return [{"hostname": host, "host": ip, "port": port, "family": 0, "proto": 0, "flags": 0} for ip in hosts]

    async def close(self) -> None:
        pass


KEY = ConnectionKey("a.test", 80, False, True, None, None, None)


@pytest.mark.parametrize("error", [aiohttp.ClientConnectorError(KEY, OSError(5, "five")), TimeoutError()], ids=repr)
async def test_no_address_is_tried_again_when_the_list_was_emptied(error: Exception) -> None:
    connector = Spy(error, resolver=Four())
    async with aiohttp.ClientSession(connector=connector) as client:
        with pytest.raises(aiohttp.ClientConnectionError) as caught:
            await get(client, "http://a.test:1/")
    what = changed("its loop over the addresses, in _create_direct_connection")
    assert connector.calls.count("_wrap_create_connection") == 1, what
    assert caught.value is error or caught.value.__cause__ is error, what


async def test_the_hop_to_a_proxy_takes_the_same_way(url: str) -> None:
    connector = Spy()
    async with aiohttp.ClientSession(connector=connector) as client:
        await get(client, "http://a.test/", proxy=url)
        assert connector.keywords["client_error"] is aiohttp.ClientProxyConnectionError, changed(
            "client_error of _wrap_create_connection for a proxy"
        )
        assert connector.context == "set in _create_connection", changed("the context of the connection to a proxy")
        with pytest.raises(aiohttp.ClientProxyConnectionError):
            await get(client, "http://a.test/", proxy="http://127.0.0.1:1/")


async def test_a_response_keeps_its_protocol(url: str) -> None:
    async with aiohttp.ClientSession(connector=Spy()) as client:
        response = await get(client, url + "again")
        for each in (response, *response.history):
            assert isinstance(each._protocol, ResponseHandler), changed("ClientResponse._protocol")


KINDS = [aiohttp.ClientConnectorError, aiohttp.ClientConnectorDNSError, aiohttp.ClientProxyConnectionError]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_connector_errors_are_made_of_a_key_and_an_error(kind: type[aiohttp.ClientConnectorError]) -> None:
    inner = OSError(5, "five")
    error = kind(KEY, inner)
    assert error.args[0] is KEY, changed(f"the arguments of {kind.__name__}")
    assert error.os_error is inner, changed(f"{kind.__name__}.os_error")
    assert (error.errno, error.strerror) == (5, "five"), changed(f"errno and strerror of {kind.__name__}")
    assert issubclass(kind, aiohttp.ClientConnectorError), changed(f"the base of {kind.__name__}")


def test_the_errors_of_tls_have_names() -> None:
    """As ``_wrap_existing_connection`` of aiohttp, whose part aiobind plays, tells them apart."""
    assert set(cert_errors) == {ssl.CertificateError}, changed("client_exceptions.cert_errors")
    assert set(ssl_errors) == {ssl.SSLError}, changed("client_exceptions.ssl_errors")
    theirs = inspect.getsource(TCPConnector._wrap_existing_connection)
    for line in (
        "except cert_errors as exc:",
        "raise ClientConnectorCertificateError(req.connection_key, exc) from exc",
        "except ssl_errors as exc:",
        "raise ClientConnectorSSLError(req.connection_key, exc) from exc",
        "if exc.errno is None and isinstance(exc, asyncio.TimeoutError):",
        "raise client_error(req.connection_key, exc) from exc",
    ):
        assert line in theirs, changed("_wrap_existing_connection")


async def test_the_timeout_of_a_tls_shutdown_is_kept_where_there_is_one() -> None:
    connector = TCPConnector()
    there_is_one = "ssl_shutdown_timeout" in inspect.signature(TCPConnector).parameters
    assert hasattr(connector, "_ssl_shutdown_timeout") is there_is_one, changed("TCPConnector._ssl_shutdown_timeout")
    await connector.close()
    assert connector.closed, changed("TCPConnector.closed")


def test_a_resolver_answers_with_these_fields() -> None:
    fields = {"hostname", "host", "port", "family", "proto", "flags"}
    assert set(ResolveResult.__annotations__) == fields, changed("aiohttp.abc.ResolveResult")
    assert parameters(AbstractResolver.resolve) == "self, host, port, family", changed("AbstractResolver.resolve")
