"""Law: a name is looked up in a daemon thread of aiobind's own, once for all who ask, and nobody waits for it twice.

Not asyncio's default executor, nor anyio's workers: they hold the end of the program until ``getaddrinfo`` returns
(4 s and 10 s measured with a silent server), and one slow name there delays every other user of the executor.
A caller that is cancelled leaves at once; the look-up goes on for the others and for the cache.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
import time
import weakref
from collections import OrderedDict, deque
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._binding import IPAddress
    from ._sources import Source

__all__ = ["Lookup", "Resolved", "SystemLookup", "in_thread", "literal", "resolve"]

#: Look-ups that run at the same time in the whole process; further ones wait their turn.
MAX_THREADS = 256
#: Names whose last answer is kept for each loop.
MAX_CACHED = 1000


class Resolved(NamedTuple):
    """One address of a name; *scope_id* is the index of the interface that is its zone, or 0."""

    ip: IPAddress
    scope_id: int


class Lookup(Protocol):
    """Finds the addresses of names for one connector."""

    #: whether it asks from the source, so that another source may get another answer
    by_source: bool

    async def find(self, host: str, *, via: Source | None, family: int = 0, flags: int = 0) -> tuple[Resolved, ...]:
        """Return the addresses of *host*, in the order to try them.

        Args:
            host: a name.
            via: the source that is to ask for it; None leaves the way to the routing table.
            family: ``AF_INET``, ``AF_INET6``, or 0 for both.
            flags: ``AI_*`` flags of getaddrinfo(3).

        Raises:
            socket.gaierror: the name has no address, or could not be asked for.
            BindError: *via* can reach none that it could ask.
        """
        ...

    def forget(self, host: str | None = None) -> None:
        """Drop the answers that are kept, of *host* or of all."""
        ...

    def close(self) -> None:
        """End the look-ups that are under way."""
        ...


Answer: TypeAlias = "tuple[Resolved, ...] | socket.gaierror"
_Key: TypeAlias = tuple[str, int, int]
_T = TypeVar("_T")


class _Threads:
    """Runs each job in a daemon thread. A thread ends when no job is left, so that none lies idle.

    To start a thread is to wait until it runs: 0.1 ms, and more where the machine is busy. So whoever has a job starts
    none while one is about to start and another one runs: each thread starts the next one, while there are jobs, before
    it does its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._running = self._starting = 0

    def run(self, job: Callable[[], None]) -> None:
        with self._lock:
            # Only behind a thread that runs, for a start may fail, and then nobody would be there to take the job.
            if (self._running and self._starting) or self._running + self._starting >= MAX_THREADS:
                self._jobs.append(job)
                return
            self._starting += 1
        try:
            self._start(job)
        except BaseException as error:
            with self._lock:
                self._starting -= 1
                # The system allows no further thread (RuntimeError): one of those that run does it later.
                if not self._running or not isinstance(error, RuntimeError):
                    raise
                self._jobs.append(job)

    def _start(self, job: Callable[[], None]) -> None:
        threading.Thread(target=self._work, args=(job,), name="aiobind-resolve", daemon=True).start()

    def _start_next(self) -> None:
        with self._lock:
            self._starting -= 1
            self._running += 1
            if not self._jobs or self._starting or self._running >= MAX_THREADS:
                return
            job = self._jobs.popleft()
            self._starting += 1
        try:
            self._start(job)
        except BaseException:  # no further thread: one of those that run does it later
            with self._lock:
                self._starting -= 1
                self._jobs.appendleft(job)

    def _work(self, job: Callable[[], None]) -> None:
        self._start_next()
        while True:
            job()
            with self._lock:
                if not self._jobs:
                    self._running -= 1
                    return
                job = self._jobs.popleft()


_threads = _Threads()


def _after_fork() -> None:
    """Begin anew in a child process: the threads have stayed behind, and one may have held the lock."""
    global _threads  # noqa: PLW0603
    _threads = _Threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


async def in_thread(function: Callable[[], _T]) -> _T:
    """Return what *function* returns, called in a daemon thread; a caller that is cancelled leaves at once.

    Raises:
        RuntimeError: no thread can be started.
        Exception: what *function* raises.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def deliver(settle: Callable[[], None]) -> None:
        if not future.done():
            settle()

    def job() -> None:
        try:
            settle = partial(future.set_result, function())
        except Exception as error:
            settle = partial(future.set_exception, error)
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(deliver, settle)

    _threads.run(job)
    return await future


_names: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Names] = weakref.WeakKeyDictionary()


class _Names:
    """The look-ups of one loop: those under way, and the last answers."""

    def __init__(self) -> None:
        # Held by the thread that is to answer, not here: it would keep a loop that was closed meanwhile for ever.
        self._under_way: weakref.WeakValueDictionary[_Key, asyncio.Future[Answer]] = weakref.WeakValueDictionary()
        self._answers: OrderedDict[_Key, tuple[float, Answer]] = OrderedDict()

    def cached(self, key: _Key, ttl: float | None) -> Answer | None:
        found = self._answers.get(key)
        if found is None or (ttl is not None and time.monotonic() - found[0] >= ttl):
            return None
        self._answers.move_to_end(key)
        return found[1]

    def look_up(self, key: _Key, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Answer]:
        future = self._under_way.get(key)
        if future is None:
            future = loop.create_future()
            self._under_way[key] = future
            deliver = partial(self._deliver, key, future)

            def job() -> None:
                answer = _getaddrinfo(key)
                with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                    loop.call_soon_threadsafe(deliver, answer)

            try:
                _threads.run(job)
            except RuntimeError as error:  # no thread can be started
                del self._under_way[key]
                raise socket.gaierror(socket.EAI_AGAIN, str(error)) from error
        return future

    def _deliver(self, key: _Key, future: asyncio.Future[Answer], answer: Answer) -> None:
        if not isinstance(answer, socket.gaierror):  # a failure is told to those who wait, and not kept
            self._answers[key] = time.monotonic(), answer
            if len(self._answers) > MAX_CACHED:
                self._answers.popitem(last=False)
        del self._under_way[key]
        if not future.done():
            future.set_result(answer)


def _getaddrinfo(key: _Key) -> Answer:
    host, family, flags = key
    try:
        if "\0" in host:  # getaddrinfo(3) would resolve what stands before it
            raise ValueError("it contains NUL")
        infos = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM, 0, flags)
    except socket.gaierror as error:
        return error.with_traceback(None)
    except OSError as error:  # EAI_SYSTEM arrives as the bare errno, for example EMFILE
        return socket.gaierror(socket.EAI_SYSTEM, error.strerror)
    except ValueError as error:  # UnicodeError: no DNS name can be made of it
        return socket.gaierror(socket.EAI_NONAME, f"not a host name: {error}")
    except Exception as error:  # somebody waits for it (LookupError: a frozen program without its idna codec)
        return socket.gaierror(socket.EAI_FAIL, f"{type(error).__name__}: {error}")
    found: dict[Resolved, None] = {}
    for family, _, _, _, sockaddr in infos:
        if family in (socket.AF_INET, socket.AF_INET6):
            text = str(sockaddr[0]).partition("%")[0]
            scope_id = int(sockaddr[3]) if len(sockaddr) == 4 else 0
            found[Resolved(ip_address(text), scope_id)] = None
    return tuple(found)


def literal(text: str) -> Resolved | None:
    """Return the address that *text* is, with its zone by name or index; None when it is a name.

    Raises:
        OSError: ENXIO, the zone is no interface of this host.
    """
    try:
        ip = ip_address(text)
    except ValueError:
        return None
    zone = ip.scope_id if ip.version == 6 else None
    if zone is None:
        return Resolved(ip, 0)
    try:
        return Resolved(ip, int(zone) if zone.isdecimal() else socket.if_nametoindex(zone))
    except OSError as error:
        raise OSError(errno.ENXIO, f"no interface of this host is named {zone!r}, as its zone says") from error


async def resolve(host: str, *, family: int = 0, flags: int = 0, ttl: float | None = 10.0) -> tuple[Resolved, ...]:
    """Return the addresses of *host* in the order of the system's resolver.

    Args:
        host: a name.
        family: ``AF_INET``, ``AF_INET6``, or 0 for both.
        flags: ``AI_*`` flags of getaddrinfo(3).
        ttl: how old an answer may be, in seconds; None means any age, 0 means ask.

    Raises:
        socket.gaierror: the name has no address, or could not be asked for.
    """
    loop = asyncio.get_running_loop()
    names = _names.get(loop)
    if names is None:
        names = _names[loop] = _Names()
    key = (host, family, flags)
    answer = names.cached(key, ttl)
    if answer is None:
        # Shielded: the look-up belongs to all who wait for it, and a cancelled one must not take it from the others.
        answer = await asyncio.shield(names.look_up(key, loop))
    if isinstance(answer, socket.gaierror):
        raise socket.gaierror(*answer.args)
    return answer


class SystemLookup:
    """The operating system's resolver, which goes its own way whatever the source."""

    by_source = False

    def __init__(self, ttl: float | None) -> None:
        self._ttl = ttl

    async def find(self, host: str, *, via: Source | None, family: int = 0, flags: int = 0) -> tuple[Resolved, ...]:
        """Return what `resolve` does."""
        del via
        return await resolve(host, family=family, flags=flags, ttl=self._ttl)

    def forget(self, host: str | None = None) -> None:
        """Do nothing: the answers are the loop's, shared by all its connectors."""

    def close(self) -> None:
        """Do nothing: a look-up may be waited for by others."""
