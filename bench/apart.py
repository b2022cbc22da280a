"""Law: what is measured has a process of its own, and what answers it has another.

So nothing is shared: no warm allocator, no thread that another measurement has left, no port. A child that is not done
in time is killed, and dies with its parent. All of them are in the network namespace of the thread that starts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import resource
import select
import signal
import socket
import traceback
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from multiprocessing.connection import Connection

LOOPS = ("asyncio", "uvloop") if find_spec("uvloop") else ("asyncio",)
#: SO_LINGER with no time: close(2) resets. What has ended leaves no TIME_WAIT; thousands of connects per second would
#: soon have one for each port. The same for all who are compared.
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

_T = TypeVar("_T")
_spawn = multiprocessing.get_context("spawn")


def cpu() -> float:
    """Return the CPU time of this process so far, in seconds, the system's for it included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def files(wanted: int) -> int:
    """Raise the limit of open files to *wanted*, if that may be; return the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for soft, top in ((wanted, max(wanted, hard)), (min(wanted, hard), hard)):
        with contextlib.suppress(ValueError, OSError):  # to raise the hard one takes CAP_SYS_RESOURCE
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, top))
            return soft
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def run(loop: str, main: Coroutine[Any, Any, _T]) -> _T:
    """Run *main* on a new loop of that kind."""
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


class Apart:
    """A call that runs in a fresh interpreter."""

    def __init__(self, function: Callable[..., _T], *arguments: Any) -> None:
        self._answer, theirs = _spawn.Pipe(duplex=False)
        self._process = _spawn.Process(target=_child, args=(theirs, function, arguments))
        self._process.start()
        theirs.close()

    def result(self, within: float) -> Any:
        """Return what it has returned.

        Raises:
            TimeoutError: not *within* so many seconds; it is killed.
            Exception: what it has raised.
        """
        try:
            if not self._answer.poll(within):
                raise TimeoutError(f"not done within {within:.0f} s")
            done, value = self._answer.recv()
        finally:
            self.kill()
        if not done:
            raise value
        return value

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.join()
        self._answer.close()


def apart(function: Callable[..., _T], *arguments: Any, within: float = 60.0) -> _T:
    """Return what *function* returns, called in a fresh interpreter."""
    value: _T = Apart(function, *arguments).result(within)
    return value


def _child(answer: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it dies with who started it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: its parent has something to say of it
    try:
        message = True, function(*arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())  # the traceback itself stays here
        message = False, error
    answer.send(message)


@contextlib.contextmanager
def served(*listeners: socket.socket, silent: str = "") -> Iterator[None]:
    """Have a process accept what comes to *listeners*, answer each request, and keep all until the other end closes.

    It closes by itself after a request that says ``Connection: close``. Whoever's address starts with *silent* gets no
    answer. The listeners are closed here, and live there.
    """
    server = Apart(_serve, listeners, silent)
    for listener in listeners:
        listener.close()
    try:
        yield
    finally:
        server.kill()


_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_LAST = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


def _serve(listeners: Sequence[socket.socket], silent: str) -> None:
    files(1 << 17)
    epoll = select.epoll()
    listening = {listener.fileno(): listener for listener in listeners}
    open_now: dict[int, socket.socket] = {}
    mute: set[int] = set()
    for number, listener in listening.items():
        listener.setblocking(False)
        epoll.register(number, select.EPOLLIN)
    while True:
        for number, _ in epoll.poll():
            if number in listening:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        sock, peer = listening[number].accept()
                        open_now[sock.fileno()] = sock
                        epoll.register(sock.fileno(), select.EPOLLIN)
                        if silent and peer[0].startswith(silent):
                            mute.add(sock.fileno())
                continue
            try:
                asked = open_now[number].recv(65536)
                if asked and number not in mute:
                    last = b"\r\nconnection: close" in asked.lower()
                    open_now[number].send(_LAST if last else _ANSWER * asked.count(b"\r\n\r\n"))
                    asked = b"" if last else asked
            except OSError:
                asked = b""
            if not asked:
                mute.discard(number)
                open_now.pop(number).close()  # which takes it out of the epoll
