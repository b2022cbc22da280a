"""Both ways to connect say the same, and who waits is woken by the own connection alone."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import resource
import select
import socket
import warnings
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

import aiobind
from aiobind._wait import Pending, way_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from aiobind._wait import Connect
    from aiobind.lab import Lab

HOST = "127.0.0.1"
V4, V6 = socket.AF_INET, socket.AF_INET6
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
either_loop = pytest.mark.parametrize("new_loop", LOOPS.values(), ids=LOOPS)
either_way = pytest.mark.parametrize("fast", [False, True], ids=["default", "fast"])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def listener(stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_server((HOST, 0), backlog=512))


@pytest.fixture
def silent(stack: ExitStack) -> socket.socket:
    """A listener that answers no SYN, for its queue is full."""
    listener = stack.enter_context(socket.create_server((HOST, 0), backlog=0))
    stack.enter_context(socket.create_connection(listener.getsockname()))
    return listener


def tcp(family: int = socket.AF_INET) -> socket.socket:
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


def epolls() -> int:
    """Count the epoll instances of this process."""
    found = 0
    with socket.socket() as stranger:
        for number in range(512):
            with suppress(OSError), closing(select.epoll.fromfd(os.dup(number))) as epoll:
                try:
                    epoll.unregister(stranger)
                except OSError as error:
                    found += error.errno == errno.ENOENT  # else it is no epoll instance: EINVAL
    return found


def in_epoll(pending: Pending) -> list[int]:
    """Return the descriptors that the epoll instance holds and still waits for."""
    with open(f"/proc/self/fdinfo/{pending._epoll.fileno()}") as info:
        lines = [line.split() for line in info if line.startswith("tfd:")]
    return [int(line[1]) for line in lines if int(line[3], 16) & select.EPOLLOUT]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            gc.collect()
            await asyncio.sleep(0.001)


# --- the choice ---------------------------------------------------------------------------------------------


class WithoutReaders(asyncio.SelectorEventLoop):
    """A loop that reads no descriptors, as asyncio's on Windows."""

    def add_reader(self, *_: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("new_loop", "fast", "epoll", "shared"),
    [
        (asyncio.SelectorEventLoop, False, True, False),
        (asyncio.SelectorEventLoop, True, True, True),
        (asyncio.SelectorEventLoop, True, False, False),
        (WithoutReaders, True, True, False),
        (uvloop.new_event_loop, False, True, True),
        (uvloop.new_event_loop, True, True, True),
        (uvloop.new_event_loop, False, False, False),
    ],
)
def test_the_way_of_a_loop(
    monkeypatch: pytest.MonkeyPatch, new_loop: Callable[[], Any], *, fast: bool, epoll: bool, shared: bool
) -> None:
    loop = new_loop()
    before = epolls()
    try:
        with monkeypatch.context() as patch:
            if not epoll:
                patch.delattr(select, "epoll")
            way: Any = way_of(loop, fast=fast)
        assert isinstance(way.__self__, Pending) is shared
        assert shared or way == loop.sock_connect
        assert epolls() == before + shared
    finally:
        loop.close()


@pytest.mark.anyio
@pytest.mark.parametrize("lacks", ["epoll", "add_reader"])
async def test_a_connector_without_the_epoll(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket, lacks: str
) -> None:
    port = listener.getsockname()[1]
    if lacks == "epoll":
        monkeypatch.delattr(select, "epoll")
    else:
        monkeypatch.setattr(Pending, "_open", WithoutReaders.add_reader)
    async with aiobind.Connector("127.0.0.2", fast_connect=True) as connector:
        for _ in range(2):
            with await connector.connect(HOST, port) as sock:
                assert sock.getsockname()[0] == "127.0.0.2"


# --- what the system answers --------------------------------------------------------------------------------


@pytest.fixture
def network(lab: Lab) -> Iterator[Lab]:
    lab.near.ip("route add unreachable 192.0.2.0/28", "route add prohibit 192.0.2.16/28")
    lab.far.ip("route add unreachable 192.0.2.32/28")
    lab.far.sysctl("ipv4.ip_forward", 1)
    with lab.far:
        servers = [socket.create_server((host, 80), family=family) for host, family in (("", V4), ("::", V6))]
    yield lab
    for server in servers:
        server.close()


@pytest.mark.anyio
@either_way
@pytest.mark.parametrize(
    ("address", "answer"),
    [
        (("203.0.113.80", 80), 0),
        (("2001:db8:ffff::80", 80, 0, 0), 0),
        (("203.0.113.80", 81), errno.ECONNREFUSED),
        (("2001:db8:ffff::80", 81, 0, 0), errno.ECONNREFUSED),
        (("192.0.2.1", 80), errno.EHOSTUNREACH),  # at once
        (("192.0.2.17", 80), errno.EACCES),
        (("192.0.2.33", 80), errno.EHOSTUNREACH),  # by the far side
        (("255.255.255.255", 80), errno.ENETUNREACH),
    ],
)
async def test_an_answer(network: Lab, address: tuple[Any, ...], answer: int, *, fast: bool) -> None:
    way = way_of(asyncio.get_running_loop(), fast=fast)
    with tcp(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as sock:
        try:
            await way(sock, address)
        except OSError as error:
            assert error.errno == answer  # noqa: PT017 - or none
        else:
            assert answer == 0
            assert sock.getpeername() == address


@pytest.mark.anyio
@either_way
async def test_a_udp_socket_connects_at_once(*, fast: bool) -> None:
    with socket.socket(type=socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        await way_of(asyncio.get_running_loop(), fast=fast)(sock, (HOST, 9))
        assert sock.getpeername() == (HOST, 9)


@pytest.mark.anyio
async def test_many_at_once(listener: socket.socket) -> None:
    pending = Pending.of(asyncio.get_running_loop())
    with ExitStack() as stack:
        socks = [stack.enter_context(tcp()) for _ in range(200)]
        free = stack.enter_context(socket.socket())
        free.bind((HOST, 0))
        ways = [pending.connect(sock, (free if i % 5 == 4 else listener).getsockname()) for i, sock in enumerate(socks)]
        results = await asyncio.gather(*ways, return_exceptions=True)
        for i, (sock, result) in enumerate(zip(socks, results, strict=True)):
            if i % 5 == 4:
                assert isinstance(result, ConnectionRefusedError)
            else:
                assert result is None
                assert sock.getpeername() == listener.getsockname()
        assert not pending._waiting
        assert not in_epoll(pending)


# --- who gives up -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_cancelled_connect_leaves_nothing(silent: socket.socket) -> None:
    pending = Pending.of(asyncio.get_running_loop())
    with tcp() as sock:
        task = asyncio.ensure_future(pending.connect(sock, silent.getsockname()))
        await asyncio.sleep(0.01)
        assert in_epoll(pending) == [sock.fileno()] == list(pending._waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not in_epoll(pending)
        assert not pending._waiting


@contextmanager
def kept_by_nobody(sock: socket.socket) -> Iterator[Callable[[], object]]:
    yield lambda: None


@contextmanager
def kept_by_a_copy(sock: socket.socket) -> Iterator[Callable[[], object]]:
    with sock.dup() as copy:
        yield lambda: copy.shutdown(socket.SHUT_RDWR)


@contextmanager
def kept_by_a_child(sock: socket.socket) -> Iterator[Callable[[], object]]:
    reading, writing = socket.socketpair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does without
        child = os.fork()
    if not child:  # nothing of the parent's is to run here
        with suppress(BaseException):
            writing.close()
            reading.setblocking(False)
            select.select([reading], [], [])
            sock.shutdown(socket.SHUT_RDWR)
            reading.recv(1)
            select.select([reading], [], [])
        os._exit(0)
    with reading, writing:
        writing.setblocking(False)
        yield lambda: writing.send(b"x")
    os.waitpid(child, 0)


@pytest.mark.anyio
@pytest.mark.parametrize("keep", [kept_by_nobody, kept_by_a_copy, kept_by_a_child])
async def test_no_event_of_another_connection_under_the_same_number(
    silent: socket.socket, keep: Callable[[socket.socket], AbstractContextManager[Callable[[], object]]]
) -> None:
    """What somebody else has as well stays in the epoll when it is closed (epoll(7), question 6)."""
    pending = Pending.of(asyncio.get_running_loop())
    with ExitStack() as stack:
        with tcp() as first:
            number = first.fileno()
            task = asyncio.ensure_future(pending.connect(first, silent.getsockname()))
            await asyncio.sleep(0.01)
            end = stack.enter_context(keep(first))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        second = stack.enter_context(tcp())
        assert second.fileno() == number
        task = asyncio.ensure_future(pending.connect(second, silent.getsockname()))
        await asyncio.sleep(0.01)
        end()
        await asyncio.sleep(0.05)
        assert not task.done()
        assert in_epoll(pending) == [number]
        second.shutdown(socket.SHUT_RDWR)  # its own event comes
        with pytest.raises(ConnectionResetError):
            await task


@pytest.mark.anyio
async def test_cancelled_in_the_moment_of_the_answer(silent: socket.socket) -> None:
    """The event has been read, and the task has not gone on yet; or the event comes while it is being cancelled."""
    pending = Pending.of(asyncio.get_running_loop())
    for too_late in (False, True):
        with tcp() as sock:
            task = asyncio.ensure_future(pending.connect(sock, silent.getsockname()))
            await asyncio.sleep(0.01)
            sock.shutdown(socket.SHUT_RDWR)
            if too_late:
                task.cancel()
            pending.on_readable()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not pending._waiting


@pytest.mark.anyio
async def test_a_socket_that_is_closed_while_it_connects(silent: socket.socket) -> None:
    pending = Pending.of(asyncio.get_running_loop())
    sock = tcp()
    task = asyncio.ensure_future(pending.connect(sock, silent.getsockname()))
    await asyncio.sleep(0.01)
    sock.close()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not pending._waiting


@pytest.mark.anyio
async def test_what_the_epoll_refuses(silent: socket.socket) -> None:
    """As where fs.epoll.max_user_watches are taken."""
    pending = Pending.of(asyncio.get_running_loop())
    with tcp() as sock:
        pending._epoll.register(sock.fileno(), 0)
        with pytest.raises(FileExistsError):
            await pending.connect(sock, silent.getsockname())
        assert not pending._waiting


# --- one for each loop, as long as it is needed -------------------------------------------------------------


@pytest.mark.anyio
async def test_the_last_holder_takes_it_along(listener: socket.socket) -> None:
    loop, before = asyncio.get_running_loop(), epolls()
    ways = [way_of(loop, fast=True) for _ in range(3)]
    assert epolls() == before + 1
    with tcp() as sock:
        await ways.pop()(sock, listener.getsockname())
    for _ in range(2):
        await asyncio.sleep(0.001)
        assert epolls() == before + 1
        ways.pop()
    await until(lambda: epolls() == before)


@pytest.mark.anyio
async def test_a_connect_that_nobody_else_holds_it_for(silent: socket.socket) -> None:
    """It lives as long as somebody waits."""
    loop, before = asyncio.get_running_loop(), epolls()
    with tcp() as sock:
        task = asyncio.ensure_future(way_of(loop, fast=True)(sock, silent.getsockname()))
        await asyncio.sleep(0.01)
        gc.collect()
        assert epolls() == before + 1
        sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ConnectionResetError):
            await task
    del task
    await until(lambda: epolls() == before)


@pytest.mark.anyio
async def test_connectors_share_it(listener: socket.socket) -> None:
    before, port = epolls(), listener.getsockname()[1]
    connectors = [aiobind.Connector("127.0.0.2", fast_connect=True) for _ in range(3)]
    for connector in connectors:
        (await connector.connect(HOST, port)).close()
    assert epolls() == before + 1
    for connector in connectors:
        await connector.aclose()
    del connector, connectors
    await until(lambda: epolls() == before)


@either_loop
def test_a_loop_that_is_closed_amid_connects(
    new_loop: Callable[[], asyncio.AbstractEventLoop], silent: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    before = epolls()
    loop = new_loop()
    loop.set_exception_handler(lambda *_: None)  # that a task was destroyed

    async def begin() -> list[asyncio.Task[None]]:
        way = way_of(loop, fast=True)
        tasks = [loop.create_task(way(sock, silent.getsockname())) for sock in socks]  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        return tasks

    with ExitStack() as stack:
        socks = [stack.enter_context(tcp()) for _ in range(3)]
        tasks = loop.run_until_complete(begin())
        loop.close()
        assert not any(task.done() for task in tasks)
    del tasks
    gc.collect()
    assert epolls() == before


def test_each_loop_has_its_own() -> None:
    loops = [new_loop() for new_loop in LOOPS.values() for _ in range(2)]
    try:
        assert len({id(Pending.of(loop)) for loop in loops}) == 1  # each gone before the next: nobody held it
        held = [Pending.of(loop) for loop in loops]
        assert [Pending.of(loop) for loop in loops] == held
        assert len(set(held)) == 4
    finally:
        for loop in loops:
            loop.close()


@contextmanager
def no_descriptor_free() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in taken:
            os.close(number)


@either_loop
def test_no_descriptor_left_for_it(new_loop: Callable[[], asyncio.AbstractEventLoop], listener: socket.socket) -> None:
    loop = new_loop()

    async def connect() -> None:
        way: Connect | None = None
        with tcp() as sock:
            with no_descriptor_free(), pytest.raises(OSError, match="Too many open files") as caught:
                way_of(loop, fast=True)
            assert caught.value.errno == errno.EMFILE
            way = way_of(loop, fast=True)
            await way(sock, listener.getsockname())

    try:
        loop.run_until_complete(connect())
    finally:
        loop.close()
    gc.collect()


@pytest.mark.anyio
async def test_a_connector_that_gets_no_epoll(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    """It fails as it does without a socket, and works when there are descriptors again."""
    port, failures = listener.getsockname()[1], [OSError(errno.EMFILE, "Too many open files")]
    epoll = select.epoll

    def scarce() -> select.epoll:
        if failures:
            raise failures.pop()
        return epoll()

    monkeypatch.setattr(select, "epoll", scarce)
    async with aiobind.Connector("127.0.0.2", fast_connect=True) as connector:
        with pytest.raises(OSError, match="too many open files") as caught:
            await connector.connect(HOST, port)
        assert caught.value.errno == errno.EMFILE
        for _ in range(2):
            (await connector.connect(HOST, port)).close()
        assert connector.stats()[0].connects == 2
