"""Law: a peer is a function. It prepares a client as its users would, and yields what makes the connections.

    python -m bench.peers WORKLOAD PEER LOOP PLACE

is the worker that `bench.compare` starts, one process for each peer: for each ``COUNT AT_ONCE`` on standard input it
makes so many connections (or requests), so many at the same time, and prints the seconds of CPU and of wall time that
this took. The programs in other languages (``server.c``, ``peer.go``) do the same.

To add a peer, write its function and name it in `CONNECT` or `REQUEST`, at the end. All of them do honest work: they
leave from ``place.source``, pinned to ``place.device`` where the peer can do that; a connection is established and
closed each time unless ``place.keep``; and what is answered is read.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import socket
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeAlias

import aiobind
from bench import apart

if TYPE_CHECKING:
    import aiohttp

HAND, AIOHTTP = "sock_connect by hand", "aiohttp local_addr"


@dataclass(frozen=True)
class Place:
    """Where from, and where to."""

    device: str
    source: str
    #: that device and that source, and no other
    pin: str
    #: this device has 100 sources
    crowd: str
    host: str
    port: int
    #: a name that /etc/hosts has for ``host``, and one for ``host`` and another address
    names: tuple[str, str]
    #: whether connections are kept
    keep: bool

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/"

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.keep else {"Connection": "close"}

    @property
    def crowd_addresses(self) -> list[str]:
        return [f"198.18.1.{100 + at}" for at in range(100)]


#: Makes so many connections, so many at once.
Run: TypeAlias = Callable[[int, int], Awaitable[object]]
Start: TypeAlias = Callable[[Place], AbstractAsyncContextManager[Run]]
Running: TypeAlias = AsyncGenerator[Run]


def repeated(once: Callable[[], Awaitable[object]]) -> Run:
    """Return what does *once* many times, by tasks that live long: how a task is made is no peer's merit."""

    async def some(count: int) -> None:
        for _ in range(count):
            await once()

    async def run(count: int, at_once: int) -> None:
        await asyncio.gather(*(some(count // at_once) for _ in range(at_once)))
        await asyncio.sleep(0)  # transports close in the next turn of the loop

    return run


# --- connect and close --------------------------------------------------------------------------------------


def bound_by_hand(place: Place, flags: int = 0) -> socket.socket:
    """Return what aiobind promises for ``if!``, as one would write it: pinned to the device, from its address.

    With SOCK_NONBLOCK in *flags* it is non-blocking, which spares the call for that; aiobind spares it, too.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | flags)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, place.device.encode())
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((place.source, 0))
    except BaseException:
        sock.close()
        raise
    return sock


@asynccontextmanager
async def blocking(place: Place) -> Running:
    async def run(count: int, _: int) -> None:
        for _ in range(count):
            with bound_by_hand(place) as sock:
                sock.connect((place.host, place.port))

    yield run


@asynccontextmanager
async def by_hand(place: Place) -> Running:
    loop = asyncio.get_running_loop()

    async def once() -> None:
        with bound_by_hand(place, socket.SOCK_NONBLOCK) as sock:
            await loop.sock_connect(sock, (place.host, place.port))

    yield repeated(once)


@asynccontextmanager
async def floor(place: Place, *, fast_connect: bool = False) -> Running:
    """The system calls of aiobind, and nothing else: no choice, no guard, no figures. What it adds is the rest."""
    from aiobind._platform import platform
    from aiobind._wait import way_of

    way = way_of(asyncio.get_running_loop(), fast=fast_connect)
    with bound_by_hand(place) as probe:  # which finds out what the kernel has
        platform.prepare(probe)
    with socket.socket() as probe:
        platform.pin(probe, place.device, socket.if_nametoindex(place.device))
    options = platform.recipe(socket.if_nametoindex(place.device)) or ()

    async def once() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            for option in options:
                sock.setsockopt(*option)
            sock.bind((place.source, 0))
            await way(sock, (place.host, place.port))
            sock.getsockname()
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 224)

    yield repeated(once)


@asynccontextmanager
async def create_connection(place: Place) -> Running:
    loop = asyncio.get_running_loop()

    async def once() -> None:
        transport, _ = await loop.create_connection(
            asyncio.Protocol, place.host, place.port, local_addr=(place.source, 0)
        )
        transport.close()

    yield repeated(once)


@asynccontextmanager
async def happy_eyeballs(place: Place) -> Running:
    import aiohappyeyeballs

    def info(address: str, port: int) -> tuple[int, int, int, str, tuple[str, int]]:
        return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)

    loop = asyncio.get_running_loop()
    remote, local = [info(place.host, place.port)], [info(place.source, 0)]

    async def once() -> None:
        sock = await aiohappyeyeballs.start_connection(remote, local_addr_infos=local, loop=loop)
        sock.close()

    yield repeated(once)


@asynccontextmanager
async def anyio(place: Place) -> Running:
    import anyio

    async def once() -> None:
        stream = await anyio.connect_tcp(place.host, place.port, local_host=place.source)
        await stream.aclose()

    yield repeated(once)


@asynccontextmanager
async def connector(place: Place, *, name: int | None = None, fast_connect: bool = False) -> Running:
    """aiobind, to the address or to one of the names, which are asked for once."""
    host = place.host if name is None else place.names[name]
    ours = aiobind.Connector(f"if!{place.device}", fast_connect=fast_connect, ttl_dns_cache=None)

    async def once() -> None:
        sock = await ours.connect(host, place.port)
        sock.close()

    yield repeated(once)
    await ours.aclose()


# --- GET ----------------------------------------------------------------------------------------------------


#: Seconds that a connection may lie idle: a worker waits while the others have their turns.
IDLE = 600.0


def local_addr(place: Place) -> aiohttp.BaseConnector:
    import aiohttp

    return aiohttp.TCPConnector(local_addr=(place.source, 0), keepalive_timeout=IDLE)


def socket_factory(place: Place) -> aiohttp.BaseConnector:
    import aiohttp

    def factory(_: object) -> socket.socket:
        return bound_by_hand(place, socket.SOCK_NONBLOCK)

    return aiohttp.TCPConnector(socket_factory=factory, keepalive_timeout=IDLE)


def bound(place: Place, *, crowd: bool = False, fast_connect: bool = False) -> aiohttp.BaseConnector:
    from aiobind.aiohttp import BoundTCPConnector

    sources = [f"if!{place.device}"]
    if crowd:
        sources = [f"ifhost!{place.crowd}!{address}" for address in place.crowd_addresses]
    return BoundTCPConnector(*sources, fast_connect=fast_connect, keepalive_timeout=IDLE)


@asynccontextmanager
async def session(place: Place, *, connector: Callable[[Place], aiohttp.BaseConnector]) -> Running:
    """aiohttp, with one connector or another."""
    import aiohttp

    async with aiohttp.ClientSession(connector=connector(place), headers=place.headers) as client:

        async def once() -> None:
            async with client.get(place.url) as response:
                await response.read()

        yield repeated(once)


@asynccontextmanager
async def httpx(place: Place, *, module: str = "httpx") -> Running:
    """httpx, or httpx2 which is the same with other insides; the device cannot be given in time for the SYN."""
    httpx: Any = importlib.import_module(module)
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=IDLE)
    transport = httpx.AsyncHTTPTransport(local_address=place.source, limits=limits)
    async with httpx.AsyncClient(transport=transport, headers=place.headers, trust_env=False) as client:

        async def once() -> None:
            await client.get(place.url)

        yield repeated(once)


@asynccontextmanager
async def curl_cffi(place: Place) -> Running:
    from curl_cffi import AsyncSession

    async with AsyncSession[Any](
        interface=place.pin, headers=place.headers, max_clients=100, trust_env=False
    ) as client:

        async def once() -> None:
            await client.get(place.url)

        yield repeated(once)


def easy(place: Place) -> Any:
    """Return a handle of libcurl's."""
    import pycurl

    curl = pycurl.Curl()
    curl.setopt(pycurl.URL, place.url)
    curl.setopt(pycurl.INTERFACE, place.pin)
    curl.setopt(pycurl.HTTPHEADER, [f"{name}: {value}" for name, value in place.headers.items()])
    return curl


@asynccontextmanager
async def pycurl_on_loop(place: Place) -> Running:
    import pycurl
    from pycurl.async_multi import AsyncCurlMulti

    idle: list[Any] = []
    async with AsyncCurlMulti() as multi:

        async def once() -> None:
            curl = idle.pop() if idle else easy(place)
            curl.setopt(pycurl.WRITEDATA, BytesIO())
            await multi.perform(curl)
            idle.append(curl)

        yield repeated(once)


@asynccontextmanager
async def pycurl_alone(place: Place) -> Running:
    import pycurl

    multi = pycurl.CurlMulti()
    handles: list[Any] = []

    def begin(curl: Any) -> None:
        curl.setopt(pycurl.WRITEDATA, BytesIO())
        multi.add_handle(curl)

    async def run(count: int, at_once: int) -> None:
        handles.extend(easy(place) for _ in range(at_once - len(handles)))
        begun = ended = 0
        for curl in handles[:at_once]:
            begin(curl)
            begun += 1
        while ended < count:
            multi.perform()
            _, done, failed = multi.info_read()
            if failed:
                raise OSError(str(failed))
            for curl in done:
                multi.remove_handle(curl)
                ended += 1
                if begun < count:
                    begin(curl)
                    begun += 1
            if not done:
                multi.select(1.0)

    yield run


# --- the tables ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    #: a function of this module, or ``"c"``, ``"go"``: the program in that language
    start: Start | str
    #: the modules that it takes
    needs: tuple[str, ...] = ()
    #: "": it is on no event loop
    loops: tuple[str, ...] = ("asyncio", "uvloop")
    #: whether it can do several at once
    many: bool = True


CONNECT = {
    "C loop": Peer("c", loops=("",)),
    "Go LocalAddr": Peer("go", loops=("",)),
    "blocking socket": Peer(blocking, loops=("",), many=False),
    HAND: Peer(by_hand),
    "create_connection": Peer(create_connection),
    "aiohappyeyeballs": Peer(happy_eyeballs, ("aiohappyeyeballs",)),
    "anyio": Peer(anyio, ("anyio",)),
    "aiobind": Peer(connector),
    "aiobind fast_connect": Peer(partial(connector, fast_connect=True)),
    "its calls by hand": Peer(floor),
    "its calls by hand, fast_connect": Peer(partial(floor, fast_connect=True)),
}
REQUEST = {
    AIOHTTP: Peer(partial(session, connector=local_addr)),
    "aiohttp socket_factory": Peer(partial(session, connector=socket_factory)),
    "aiobind": Peer(partial(session, connector=bound)),
    "aiobind, 100 sources": Peer(partial(session, connector=partial(bound, crowd=True))),
    "aiobind fast_connect": Peer(partial(session, connector=partial(bound, fast_connect=True))),
    "aiobind fast_connect, 100 sources": Peer(
        partial(session, connector=partial(bound, crowd=True, fast_connect=True))
    ),
    "httpx": Peer(httpx, ("httpx",)),
    "httpx2": Peer(partial(httpx, module="httpx2"), ("httpx2",)),
    "curl_cffi": Peer(curl_cffi, ("curl_cffi",)),
    "pycurl AsyncCurlMulti": Peer(pycurl_on_loop, ("pycurl",)),
    "pycurl CurlMulti": Peer(pycurl_alone, ("pycurl",), loops=("",)),
    "Go net/http": Peer("go", loops=("",)),
}
WORKLOADS = {
    "connect": CONNECT,
    "one address": {"aiobind": Peer(partial(connector, name=0))},
    "two addresses": {"aiobind": Peer(partial(connector, name=1))},
    "get": REQUEST,
    "keepalive": REQUEST,
}


# --- the worker ---------------------------------------------------------------------------------------------


async def work(start: Start, place: Place) -> None:
    async with start(place) as run:
        for line in sys.stdin:  # which blocks the loop: nothing is to happen meanwhile
            count, at_once = map(int, line.split())
            cpu_before, wall_before = apart.cpu(), time.perf_counter()
            await run(count, at_once)
            print(f"{apart.cpu() - cpu_before:.6f} {time.perf_counter() - wall_before:.6f}", flush=True)


def main(workload: str, label: str, loop: str, place: str) -> None:
    start = WORKLOADS[workload][label].start
    assert not isinstance(start, str)
    apart.run(loop, work(start, Place(**json.loads(place))))


if __name__ == "__main__":
    main(*sys.argv[1:])
