"""The loop that trio drives: what aiobind's core asks of a loop, judged from inside a trio run."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from contextvars import ContextVar
from typing import Any

import pytest
import trio
import trio.testing

import aiobind
from aiobind._guest import GuestLoop, hosted, in_trio


def test_a_coroutine_of_asyncio_runs_in_trio() -> None:
    async def inner() -> tuple[str, bool]:
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await asyncio.sleep(0.001)
        return type(asyncio.get_running_loop()).__name__, in_trio()

    async def main() -> None:
        assert await hosted(inner()) == ("GuestLoop", True)
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()

    trio.run(main)
    assert not GuestLoop._of


def test_on_asyncio_it_is_awaited_as_it_is() -> None:
    async def main() -> None:
        task = asyncio.current_task()

        async def inner() -> None:
            assert asyncio.current_task() is task

        await hosted(inner())

    asyncio.run(main())


def test_in_trio_that_is_itself_the_guest_of_asyncio() -> None:
    """The loop below is not taken for that of the caller, and is there again afterwards."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        async def in_guest() -> str:
            async def inner() -> str:
                await asyncio.sleep(0.001)
                return type(asyncio.get_running_loop()).__name__

            name = await hosted(inner())
            assert asyncio.get_running_loop() is loop
            return name

        trio.lowlevel.start_guest_run(
            in_guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done.set_result,
        )
        assert (await done).unwrap() == "GuestLoop"
        assert not in_trio()

    asyncio.run(main())


def test_one_loop_for_each_run() -> None:
    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def main() -> tuple[asyncio.AbstractEventLoop, asyncio.AbstractEventLoop]:
        return await hosted(loop()), await hosted(loop())

    first, second = trio.run(main)
    assert first is second
    assert first.is_closed()
    with pytest.raises(RuntimeError):
        first.call_soon(print)
    with pytest.raises(RuntimeError):
        first.call_soon_threadsafe(print)
    assert trio.run(main)[0] is not first


async def forever(log: list[str], *, heeds: bool = True) -> str:
    try:
        await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError:
        log.append("cancelled")
        await asyncio.sleep(0.001)
        log.append("cleaned up")
        if heeds:
            raise
    return "ended"


def test_a_cancelled_scope_is_left_when_the_coroutine_has_cleaned_up() -> None:
    log: list[str] = []

    async def main() -> None:
        with trio.move_on_after(0.01) as scope:
            await hosted(forever(log))
        log.append("left")
        assert scope.cancelled_caught

    trio.run(main)
    assert log == ["cancelled", "cleaned up", "left"]


def test_what_has_ended_well_in_spite_of_a_cancellation_is_handed_over() -> None:
    """A socket that is connected by then has an owner."""

    async def main() -> str:
        with trio.move_on_after(0.01):
            return await hosted(forever([], heeds=False))
        return "lost"

    assert trio.run(main) == "ended"


def test_a_scope_that_was_cancelled_before_starts_nothing() -> None:
    started: list[int] = []

    async def inner() -> None:
        started.append(1)

    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await hosted(inner())
        assert scope.cancelled_caught

    trio.run(main)
    assert not started


def test_an_error_is_the_callers() -> None:
    async def inner() -> None:
        raise OSError(5, "no")

    async def main() -> None:
        with pytest.raises(OSError, match="no"):
            await hosted(inner())

    trio.run(main)


def test_who_ends_the_program_ends_it_for_the_caller() -> None:
    """Not for trio itself, of whose system tasks none may raise."""

    async def inner() -> None:
        raise SystemExit(3)

    async def main() -> None:
        with pytest.raises(SystemExit):
            await hosted(inner())
        assert isinstance(await hosted(running()), GuestLoop)

    trio.run(main)


def test_ctrl_c_at_any_line() -> None:
    """Else a task goes on for which nobody waits, and wakes the caller from what that waits for by then."""

    async def main(line: int) -> int:
        lines = 0

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal lines
            if frame.f_code not in (hosted.__code__, GuestLoop.host.__code__):
                return None
            lines += event == "line"
            if event == "line" and lines == line:
                signal.raise_signal(signal.SIGINT)
            return trace

        await hosted(running())
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            await hosted(asyncio.sleep(0.005))
        finally:
            sys.settrace(before)
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)
        return lines

    lines = trio.run(main, 0)
    assert lines > 5
    for line in range(1, lines + 1):
        with pytest.raises(KeyboardInterrupt):
            trio.run(main, line)


def test_the_context_of_the_caller() -> None:
    variable = ContextVar("variable", default="nothing")

    async def inner() -> str:
        return variable.get()

    async def main() -> list[str]:
        variable.set("mine")
        return [await hosted(inner()), await hosted(asyncio.wait_for(inner(), 5))]

    assert trio.run(main) == ["mine", "mine"]


def test_timers_are_those_of_trios_clock() -> None:
    order: list[str] = []

    async def inner() -> None:
        loop = asyncio.get_running_loop()
        for seconds in (300, 100, 200):
            loop.call_later(seconds, order.append, f"{seconds}")
        loop.call_later(150, order.append, "cancelled").cancel()
        await asyncio.sleep(1000)

    trio.run(lambda: hosted(inner()), clock=trio.testing.MockClock(autojump_threshold=0))
    assert order == ["100", "200", "300"]


def test_a_timer_that_is_set_while_the_loop_sleeps() -> None:
    async def main() -> None:
        loop = await hosted(running())
        await trio.sleep(0.01)
        rung = trio.Event()
        loop.call_later(0.01, rung.set)
        with trio.fail_after(5):
            await rung.wait()

    trio.run(main)


async def running() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_another_thread_wakes_it() -> None:
    async def inner() -> str:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str] = loop.create_future()
        thread = threading.Timer(0.01, loop.call_soon_threadsafe, (future.set_result, "woken"))
        thread.start()
        async with asyncio.timeout(5):
            return await future

    assert trio.run(lambda: hosted(inner())) == "woken"


def test_descriptors_are_read_until_nobody_wants_them() -> None:
    read: list[bytes] = []

    async def main() -> None:
        loop = await hosted(running())
        mine, theirs = socket.socketpair()
        with mine, theirs:
            mine.setblocking(False)
            loop.add_reader(mine.fileno(), lambda: read.append(mine.recv(1)))
            theirs.send(b"ab")
            await trio.sleep(0.02)
            loop.remove_reader(mine.fileno())
            await trio.sleep(0.01)
            theirs.send(b"c")
            await trio.sleep(0.02)

    trio.run(main)
    assert read == [b"a", b"b"]


def test_a_descriptor_that_is_closed_behind_its_back_is_no_end_of_the_run() -> None:
    async def main() -> None:
        loop = await hosted(running())
        reading, writing = os.pipe()
        os.close(writing)
        os.close(reading)
        loop.add_reader(reading, lambda: None)
        await trio.sleep(0.01)

    trio.run(main)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_sock_connect(family: socket.AddressFamily) -> None:
    async def connect(address: Any) -> None:
        with socket.socket(family) as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, address)
            assert sock.getpeername() == address

    async def main() -> None:
        with socket.create_server(("", 0), family=family) as server:
            port = server.getsockname()[1]
            address = ("127.0.0.1", port) if family == socket.AF_INET else ("::1", port, 0, 0)
            await hosted(connect(address))
        with pytest.raises(ConnectionRefusedError):
            await hosted(connect(address))

    trio.run(main)


def test_sock_sendall_and_sock_recv() -> None:
    """What questions to a name server need."""
    much = os.urandom(1 << 22)

    async def both(mine: socket.socket, theirs: socket.socket) -> bytes:
        loop = asyncio.get_running_loop()
        sending = loop.create_task(loop.sock_sendall(mine, much))
        await asyncio.sleep(0.01)
        assert not sending.done()
        got = bytearray()
        while len(got) < len(much):
            got += await loop.sock_recv(theirs, 1 << 16)
        await sending
        receiving = loop.create_task(loop.sock_recv(theirs, 5))
        await asyncio.sleep(0.01)
        assert not receiving.done()
        mine.send(b"more")
        assert await receiving == b"more"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await loop.sock_recv(theirs, 5)
        mine.close()
        assert await loop.sock_recv(theirs, 5) == b""
        return bytes(got)

    async def main() -> None:
        mine, theirs = socket.socketpair()
        with mine, theirs:
            mine.setblocking(False)
            theirs.setblocking(False)
            assert await hosted(both(mine, theirs)) == much

    trio.run(main)


def test_a_reader_that_is_removed_when_it_has_been_woken() -> None:
    """The number may be another's at once: nobody waits for it any more, and nobody is called."""
    called: list[int] = []

    async def main() -> None:
        loop = await hosted(running())
        for number in range(20):
            mine, theirs = socket.socketpair()
            other, bell = socket.socketpair()
            descriptor = mine.fileno()
            loop.add_reader(descriptor, called.append, number)
            await trio.sleep(0.001)
            theirs.send(b"x")
            bell.send(b"x")  # the reader and this task are woken in one turn, in any order
            await trio.lowlevel.wait_readable(other)
            before = len(called)
            loop.remove_reader(descriptor)
            mine.close()
            one, two = socket.socketpair()
            assert one.fileno() == descriptor
            two.send(b"x")
            await trio.lowlevel.wait_readable(one)
            assert len(called) == before
            for sock in (theirs, other, bell, one, two):
                sock.close()

    trio.run(main)


def test_a_reader_that_is_removed_before_it_has_begun() -> None:
    async def main() -> None:
        loop = await hosted(running())
        mine, theirs = socket.socketpair()
        with mine, theirs:
            theirs.send(b"x")
            loop.add_reader(mine.fileno(), pytest.fail, "called")
            assert loop.remove_reader(mine.fileno())
            assert not loop.remove_reader(mine.fileno())
            await trio.lowlevel.wait_readable(mine)
            await trio.sleep(0.01)

    trio.run(main)


def test_a_number_whose_last_owner_was_closed_without_a_word() -> None:
    """Trio's waiter for it is told so, and the run goes on."""

    async def main() -> None:
        loop = await hosted(running())
        mine, theirs = socket.socketpair()
        descriptor = mine.fileno()
        async with trio.open_nursery() as nursery:

            async def stale() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(descriptor)

            nursery.start_soon(stale)
            await trio.testing.wait_all_tasks_blocked()
            mine.close()
            one, two = socket.socketpair()
            assert one.fileno() == descriptor
            rung = trio.Event()
            loop.add_reader(descriptor, rung.set)
            two.send(b"x")
            with trio.fail_after(5):
                await rung.wait()
            loop.remove_reader(descriptor)
        for sock in (theirs, one, two):
            sock.close()

    trio.run(main)


def test_an_error_in_a_callback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        (await hosted(running())).call_soon(int, "x")
        await trio.sleep(0.01)

    with caplog.at_level(logging.ERROR, "aiobind"):
        trio.run(main)
    assert "invalid literal" in caplog.text


def test_what_is_told_while_the_run_ends_is_done() -> None:
    """So does the interface watch of a connector close its descriptor."""
    done: list[int] = []

    async def last() -> None:
        loop = await hosted(running())
        try:
            await trio.sleep_forever()
        finally:
            loop.call_soon_threadsafe(done.append, 1)

    async def main() -> None:
        trio.lowlevel.spawn_system_task(last)
        await trio.sleep(0.01)

    for _ in range(10):  # the two system tasks end in any order
        trio.run(main)
    assert len(done) == 10


def test_the_end_of_the_run_cancels_what_is_left() -> None:
    log: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            log.append("first")
            try:
                await asyncio.sleep(0)
            finally:
                log.append("last")

    async def inner() -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(background())

    async def main() -> asyncio.Task[None]:
        task = await hosted(inner())
        await trio.sleep(0.01)
        return task

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = trio.run(main)
        assert task.cancelled()
        del task
        gc.collect()
    assert log == ["first", "last"]


def test_who_connects_by_the_door_of_asyncio_on_trio_is_told_of_this_one() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"on trio use aiobind\.anyio"):
            await aiobind.Connector("127.0.0.2").connect("127.0.0.1", 80)

    trio.run(main)
