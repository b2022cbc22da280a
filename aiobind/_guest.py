"""Law: what is written for asyncio runs inside a trio run as well, on a loop that trio drives: not a line twice.

``hosted`` is the door: on asyncio and uvloop it just awaits; on trio it hands the coroutine to the one `GuestLoop` of
the run, and waits. A cancelled scope cancels the coroutine, and is left when that has cleaned up after itself.

The guest has of a loop what aiobind's core needs: callbacks, timers, tasks, and descriptors that trio itself waits for
(``trio.lowlevel.wait_readable``, ``wait_writable``). It lives in system tasks, so that what several connects share (the
interface watch, names under way, queues) outlives the nursery of each, and ends with the run.

trio is imported here only, when somebody calls from within it.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import os
import socket
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from ._wait import UNDER_WAY

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from contextvars import Context

    import trio

__all__ = ["GuestLoop", "hosted", "in_trio"]

_T = TypeVar("_T")
_Arguments = TypeVarTuple("_Arguments")
_log = logging.getLogger("aiobind")


def in_trio() -> bool:
    """Return whether the caller is a task of trio's."""
    # Who calls from there has imported it. First, for trio itself may be the guest of an asyncio loop.
    found = sys.modules.get("trio")
    return found is not None and found.lowlevel.in_trio_task()


async def hosted(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Return what *coroutine*, written for asyncio, returns; on whatever loop this runs.

    On trio it may return although its scope was cancelled meanwhile, when it had ended by then: trio cancels at the
    next checkpoint.
    """
    if not in_trio():
        return await coroutine
    return await GuestLoop.of_this_run().host(coroutine)


class GuestLoop(asyncio.AbstractEventLoop):
    """An asyncio loop as far as aiobind needs one, run by trio. Get it by ``of_this_run``."""

    _of: dict[trio.lowlevel.TrioToken, GuestLoop] = {}  # noqa: RUF012 - shared: one for each run

    @classmethod
    def of_this_run(cls) -> GuestLoop:
        """Return the one of the running trio."""
        import trio  # noqa: PLC0415

        token = trio.lowlevel.current_trio_token()
        guest = cls._of.get(token)
        if guest is None:
            guest = cls._of[token] = cls(trio, token)
        return guest

    def __init__(self, library: Any, token: trio.lowlevel.TrioToken) -> None:
        self._trio = library
        self._token = token
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[asyncio.TimerHandle] = []
        self._wake: trio.Event = library.Event()
        self._readers: dict[int, trio.CancelScope] = {}
        self._closed = False
        # By a Ctrl-C between two of its lines nobody would wait for the task, which wakes its caller all the same.
        library.lowlevel.enable_ki_protection(hosted)
        library.lowlevel.spawn_system_task(self._serve, name="aiobind's guest loop")

    async def host(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run *coroutine* as a task of this loop, on behalf of the trio task that calls."""
        lowlevel = self._trio.lowlevel
        caller = lowlevel.current_task()
        task: asyncio.Task[_T] = self.create_task(coroutine)
        raise_cancel: Callable[[], Any] | None = None

        def abort(raise_it: Callable[[], Any]) -> Any:
            nonlocal raise_cancel
            raise_cancel = raise_it
            task.cancel()
            return lowlevel.Abort.FAILED  # the task says when it is done

        task.add_done_callback(lambda _: lowlevel.reschedule(caller))
        await lowlevel.wait_task_rescheduled(abort)
        if raise_cancel is not None and task.cancelled():
            raise_cancel()
        return task.result()

    # ── turns ──

    async def _serve(self) -> None:
        try:
            while True:
                now = self.time()
                while self._timers and (self._timers[0].cancelled() or self._timers[0].when() <= now):
                    self._ready.append(heapq.heappop(self._timers))
                if self._ready:
                    # Those that are there now; what they add comes after everybody else's turn.
                    self._run(*(self._ready.popleft() for _ in range(len(self._ready))))
                    await self._trio.lowlevel.checkpoint()
                    continue
                self._wake = self._trio.Event()
                with self._trio.move_on_at(self._timers[0].when() if self._timers else math.inf):
                    await self._wake.wait()
        finally:  # the run ends
            self._end()

    def _run(self, *handles: asyncio.Handle) -> None:
        before = asyncio._get_running_loop()  # noqa: SLF001 - documented for those who make loops
        asyncio._set_running_loop(self)  # noqa: SLF001
        try:
            for handle in handles:
                if not handle.cancelled():
                    try:
                        handle._run()  # noqa: SLF001 - how every loop runs its handles
                    except (SystemExit, KeyboardInterrupt) as error:
                        # It would end other loops. The task that it ended has it as well, for who waits for that;
                        # a system task of trio's must not raise.
                        self.call_exception_handler({"message": f"{error!r} in {handle!r}", "exception": error})
        finally:
            asyncio._set_running_loop(before)  # noqa: SLF001

    def _end(self) -> None:
        """Cancel what is left, as ``asyncio.run`` does, and let it have its last words."""
        del self._of[self._token]
        for task in asyncio.all_tasks(self):
            task.cancel()
        for _ in range(_LAST_TURNS):
            if not self._ready:
                break
            self._run(*(self._ready.popleft() for _ in range(len(self._ready))))
        self._closed = True

    def _add(self, handle: asyncio.Handle) -> None:
        if self._closed:  # a thread's, or a collected object's, which has come as the run was ending
            self._run(handle)
            return
        self._ready.append(handle)
        self._wake.set()

    # ── what asyncio asks of a loop ──

    def time(self) -> float:
        now: float = self._trio.current_time()
        return now

    def is_running(self) -> bool:
        return not self._closed

    def is_closed(self) -> bool:
        return self._closed

    def get_debug(self) -> bool:
        return False

    def call_soon(
        self, callback: Callable[[*_Arguments], object], *args: *_Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        handle = asyncio.Handle(callback, args, self, context)
        self._add(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*_Arguments], object], *args: *_Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._token.run_sync_soon(self._add, handle)  # RunFinishedError is a RuntimeError
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Arguments], object],
        *args: *_Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*_Arguments], object], *args: *_Arguments, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, handle)
        self._wake.set()
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: it is passed over when its time has come."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, **options)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        _log.error("%s", context.get("message"), exc_info=context.get("exception"))

    # ── descriptors, which trio waits for ──

    def add_reader(self, fd: Any, callback: Callable[[*_Arguments], object], *args: *_Arguments) -> None:
        self.remove_reader(fd)
        handle = asyncio.Handle(callback, args, self, None)
        self._readers[fd] = self._when(self._trio.lowlevel.wait_readable, fd, handle, again=True)

    def remove_reader(self, fd: Any) -> bool:
        scope = self._readers.pop(fd, None)
        if scope is not None:
            scope.cancel()
        return scope is not None

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        number = sock.connect_ex(address)
        if number in UNDER_WAY:
            await self._ready_for(self._trio.lowlevel.wait_writable, sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))

    async def sock_recv(self, sock: socket.socket, nbytes: int) -> bytes:
        while True:
            try:
                return sock.recv(nbytes)
            except BlockingIOError:
                await self._ready_for(self._trio.lowlevel.wait_readable, sock)

    async def sock_sendall(self, sock: socket.socket, data: Any) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[sock.send(rest) :]
            except BlockingIOError:
                await self._ready_for(self._trio.lowlevel.wait_writable, sock)

    async def _ready_for(self, wait: Callable[[int], Awaitable[None]], sock: socket.socket) -> None:
        ready = self.create_future()
        scope = self._when(wait, sock.fileno(), asyncio.Handle(_settle, (ready,), self, None))
        try:
            await ready
        finally:
            scope.cancel()

    def _when(
        self, wait: Callable[[int], Awaitable[None]], descriptor: int, handle: asyncio.Handle, *, again: bool = False
    ) -> trio.CancelScope:
        """Run *handle* when *descriptor* is ready; once it is cancelled, the number may be another's at once."""
        scope: trio.CancelScope = self._trio.CancelScope()

        async def watch() -> None:
            nonlocal again
            with scope:
                while not scope.cancel_called:  # before it has begun, or when it was woken and somebody ran before it
                    try:
                        await wait(descriptor)
                    except self._trio.BusyResourceError:
                        # Who waits there had another descriptor of that number, which was closed without a word.
                        self._trio.lowlevel.notify_closing(descriptor)
                        continue
                    except (self._trio.ClosedResourceError, OSError):  # closed: who waits for it finds out
                        again = False
                    if not scope.cancel_called:
                        self._run(handle)
                    if not again:
                        break

        self._trio.lowlevel.spawn_system_task(watch, name=f"aiobind: {wait.__name__}({descriptor})")
        return scope


#: So often what was cancelled at the end of the run may go on.
_LAST_TURNS = 100


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
