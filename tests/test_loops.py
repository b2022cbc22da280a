"""What a loop reads is there once for each loop, is closed on that loop, and lives as long as somebody holds it."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self

import pytest
import uvloop

from aiobind._loops import PerLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NEW_LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture(params=NEW_LOOPS.values(), ids=NEW_LOOPS)
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    loop = request.param()
    yield loop
    loop.close()


class End:
    """One end of a pair of sockets, which notes in which thread it was closed."""

    def __init__(self) -> None:
        self.socket, self.other = socket.socketpair()
        self.closed_in: list[threading.Thread] = []

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.closed_in.append(threading.current_thread())
        self.socket.close()
        self.other.close()


class Reader(PerLoop):
    """Keeps what it has read."""

    opened: list[End]
    refusal: Exception | None = None

    @classmethod
    def _open(cls, loop: asyncio.AbstractEventLoop) -> Self:
        if cls.refusal is not None:
            raise cls.refusal
        cls.opened.append(End())
        return cls(loop, cls.opened[-1])

    def __init__(self, loop: asyncio.AbstractEventLoop, end: End) -> None:
        super().__init__(loop, end)
        self.end = end
        self.read = b""

    def on_readable(self) -> None:
        self.read += self.end.socket.recv(100, socket.MSG_DONTWAIT)


@pytest.fixture(autouse=True)
def readers() -> Iterator[None]:
    Reader.opened = []
    yield
    for end in Reader.opened:
        end.socket.close()
        end.other.close()


def turn(loop: asyncio.AbstractEventLoop, seconds: float = 0.001) -> None:
    for _ in range(3):
        loop.run_until_complete(asyncio.sleep(seconds))


def test_all_who_ask_share_it(loop: asyncio.AbstractEventLoop) -> None:
    reader = Reader.of(loop)
    assert Reader.of(loop) is reader
    assert len(Reader.opened) == 1
    reader.end.other.send(b"news")
    turn(loop)
    assert reader.read == b"news"


def test_each_loop_and_each_kind_has_its_own(loop: asyncio.AbstractEventLoop) -> None:
    class Other(Reader):
        pass

    second = asyncio.SelectorEventLoop()
    held = [Reader.of(loop), Other.of(loop), Reader.of(second), Other.of(second)]
    assert len({id(reader) for reader in held}) == 4
    assert [Reader.of(loop), Other.of(loop)] == held[:2]
    for reader in held:
        reader.end.other.send(b"x")
    turn(loop)
    assert [reader.read for reader in held] == [b"x", b"x", b"", b""]
    second.close()


def in_a_thread(release: Callable[[], object]) -> None:
    thread = threading.Thread(target=release)
    thread.start()
    thread.join()


@pytest.mark.parametrize("forget", [lambda release: release(), in_a_thread], ids=["here", "in a thread"])
def test_the_last_to_let_go_takes_it_along(
    loop: asyncio.AbstractEventLoop, forget: Callable[[Callable[[], object]], object]
) -> None:
    held = [Reader.of(loop), Reader.of(loop)]
    (end,) = Reader.opened
    held.pop()
    turn(loop)
    assert not end.closed_in
    forget(held.clear)
    assert not end.closed_in  # but on the loop
    turn(loop)
    assert end.closed_in == [threading.main_thread()]
    assert Reader.of(loop).end is not end


def test_a_cycle_is_collected_as_well(loop: asyncio.AbstractEventLoop) -> None:
    reader: Any = Reader.of(loop)
    reader.itself = reader
    del reader
    turn(loop)
    in_a_thread(gc.collect)
    turn(loop)
    assert Reader.opened[0].closed_in == [threading.main_thread()]


def test_the_next_one_does_not_wait_for_the_end_of_the_last(loop: asyncio.AbstractEventLoop) -> None:
    Reader.of(loop)
    reader = Reader.of(loop)
    assert len(Reader.opened) == 2
    reader.end.other.send(b"news")
    turn(loop)
    assert Reader.opened[0].closed_in
    assert not reader.end.closed_in
    assert reader.read == b"news"  # the reader of the first one was removed, not ours


def test_who_let_go_is_told_of_nothing(loop: asyncio.AbstractEventLoop) -> None:
    """Also where the loop has looked already, and the callback is due."""
    faults: list[Any] = []
    loop.set_exception_handler(lambda _, context: faults.append(context))
    held = [Reader.of(loop)]
    held[0].end.other.send(b"news")
    loop.call_soon(held.clear)
    turn(loop)
    assert Reader.opened[0].closed_in
    assert not faults


def test_a_loop_that_is_closed_first(loop: asyncio.AbstractEventLoop) -> None:
    reader = Reader.of(loop)
    loop.close()
    assert not reader.end.closed_in
    del reader
    assert Reader.opened[0].closed_in == [threading.main_thread()]


def test_it_keeps_no_loop_that_is_forgotten() -> None:
    loop = asyncio.SelectorEventLoop()
    reader = Reader.of(loop)
    gone = weakref.ref(loop)
    loop.close()
    del reader, loop
    gc.collect()
    assert gone() is None
    assert not Reader._of


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), NotImplementedError()], ids=repr)
def test_what_cannot_be_opened_is_asked_for_again(loop: asyncio.AbstractEventLoop, error: Exception) -> None:
    Reader.refusal = error
    try:
        with pytest.raises(type(error)) as caught:
            Reader.of(loop)
        assert caught.value is error
    finally:
        Reader.refusal = None
    assert Reader.of(loop).end is Reader.opened[0]


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(1, "no"), KeyboardInterrupt()], ids=repr)
def test_where_the_loop_does_not_read_it_is_closed(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    class Loop(asyncio.SelectorEventLoop):
        def add_reader(self, *_: Any) -> None:
            raise error

    loop = Loop()
    try:
        with pytest.raises(type(error)):
            Reader.of(loop)
        assert len(Reader.opened[0].closed_in) == 1
    finally:
        loop.close()
