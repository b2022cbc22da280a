"""What every test shares: a lab, the loops that a test body runs on, and what no test may do.

The session runs in network and mount namespaces of its own where that is possible (as root, or by user
namespaces), so a test may set sysctls and replace ``/etc/resolv.conf``. A test that needs more than the
machine offers is skipped with the reason, or fails when ``CI=true``: there a skip would go unnoticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from anyio.pytest_plugin import extract_backend_and_options, get_runner
from blockbuster import BlockBuster
from blockbuster.blockbuster import BlockBusterFunction

from aiobind import _ports, _wait
from aiobind import lab as aiobind_lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_no_lab: list[str] = []  # why there is none


def pytest_configure() -> None:
    """Isolate the session, while there is no thread that would stay behind."""
    # A shell has its background jobs ignore Ctrl-C, and the programs that the tests interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if reason := aiobind_lab.available():
            _no_lab.append(reason)
        else:
            aiobind_lab.isolate()
    except OSError as exc:
        _no_lab.append(str(exc))
    uvloop.new_event_loop().close()  # libuv keeps a pipe from its first loop on


def _need_lab() -> None:
    if _no_lab:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no lab: {_no_lab[0]}")


# --- the lab ------------------------------------------------------------------------------------------------


@pytest.fixture
def make_lab() -> Iterator[Callable[[int], aiobind_lab.Lab]]:
    """``make_lab(64)``: enter a lab with that many NICs."""
    _need_lab()
    with contextlib.ExitStack() as stack:
        yield lambda nics: stack.enter_context(aiobind_lab.Lab(nics))


@pytest.fixture
def lab(make_lab: Callable[[int], aiobind_lab.Lab]) -> aiobind_lab.Lab:
    """A lab with three NICs, entered."""
    return make_lab(3)


@pytest.fixture
def witness(lab: aiobind_lab.Lab) -> aiobind_lab.Witness:
    """The witness of ``lab``."""
    return lab.witness()


_CAP_SYS_ADMIN = 21


@pytest.fixture
def no_capabilities(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test, and the threads that it starts, without effective capabilities.

    But for CAP_SYS_ADMIN: ``with lab.far:`` takes it, and no socket does. The children of root get all back.
    """
    for needs_capabilities in ("lab", "witness"):
        if needs_capabilities in request.fixturenames:
            request.getfixturevalue(needs_capabilities)
    before = _capabilities("CapEff")
    _capset(before & 1 << _CAP_SYS_ADMIN)
    yield
    _capset(before)


def _capabilities(which: str) -> int:
    with open("/proc/thread-self/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith(which))


def _capset(effective: int) -> None:
    permitted, inheritable = _capabilities("CapPrm"), _capabilities("CapInh")
    sets = (effective, permitted, inheritable)
    words = [bits >> shift & 0xFFFFFFFF for shift in (0, 32) for bits in sets]  # version 3 of capset(2)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *words)):
        raise OSError(ctypes.get_errno(), "capset")


@pytest.fixture
def resolv_conf() -> Iterator[Callable[..., None]]:
    """``resolv_conf("nameserver 203.0.113.80\\n", hosts="...")``: what getaddrinfo goes by in this test."""
    _need_lab()
    with contextlib.ExitStack() as stack:

        def replace(text: str, hosts: str = "127.0.0.1 localhost\n::1 localhost\n") -> None:
            files = {"/etc/resolv.conf": text, "/etc/hosts": hosts}
            if os.path.exists("/etc/nsswitch.conf"):  # systemd-resolved would answer from outside
                files["/etc/nsswitch.conf"] = "hosts: files dns\n"
            for path, content in files.items():
                stack.enter_context(aiobind_lab.replace_file(path, content))

        yield replace


# --- the loops ----------------------------------------------------------------------------------------------


class EpollLoop(asyncio.SelectorEventLoop):
    """A loop of asyncio on which every connector has ``fast_connect=True``; with eager tasks, where there are such."""

    def __init__(self) -> None:
        super().__init__()
        if sys.version_info >= (3, 12):
            self.set_task_factory(asyncio.eager_task_factory)


_LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {},
    "uvloop": {"use_uvloop": True},
    "epoll" if sys.version_info < (3, 12) else "eager": {"loop_factory": EpollLoop},
}

#: The long tests of these are about what becomes of a connection, and take the first two loops: one for each way.
_ON_TWO_LOOPS = {"test_limits", "test_metrics", "test_spread"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the third loop out where it shows nothing more."""
    third = list(_LOOPS.values())[2]

    def superfluous(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        params = callspec.params if callspec is not None else {}
        return item.path.stem in _ON_TWO_LOOPS and params.get("anyio_backend") is third

    items[:] = [item for item in items if not superfluous(item)]


@pytest.fixture(scope="session", autouse=True)
def both_ways() -> Iterator[None]:
    """Wait for connects in both ways: by ``loop.sock_connect`` on asyncio, by the epoll on the other two loops."""

    def way_of(loop: asyncio.AbstractEventLoop, *, fast: bool = False) -> Any:
        return _wait.way_of(loop, fast=fast or isinstance(loop, EpollLoop))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiobind._dial.way_of", way_of)
        yield


@pytest.fixture(scope="module", params=_LOOPS.values(), ids=list(_LOOPS))
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Run every ``@pytest.mark.anyio`` test on every loop."""
    return "asyncio", request.param


# --- what no test leaves to the next ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_lingering_claims() -> None:
    """Forget the pinned sockets that were closed with bytes left to send: each test has NICs and servers of its own."""
    while _ports._lingering:
        _ports.release(_ports._lingering.popleft()[1])


# --- what no test may do ------------------------------------------------------------------------------------


def _is_numeric(*args: Any, flags: int = 0, **_: Any) -> bool:
    return bool((args[5] if len(args) > 5 else flags) & socket.AI_NUMERICHOST)


def _blockbuster(modules: str | None = None) -> BlockBuster:
    blockbuster = BlockBuster(modules)
    # aiobind must look up no name on the loop, and blockbuster does not know these.
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr", "getfqdn"):
        function = BlockBusterFunction(None, f"socket.{name}", scanned_modules=modules, can_block_predicate=_is_numeric)
        blockbuster.functions[f"socket.{name}"] = function
    for function in blockbuster.functions.values():
        function.can_block_in("aiobind/_platform/linux.py", {"_procfs"})  # procfs never waits
        # A test may do to its lab what it likes.
        function.can_block_in(
            "aiobind/lab.py", {"__enter__", "__exit__", "ip", "new", "packets", "sysctl", "add_target"}
        )
        function.can_block_in("tests/conftest.py", {"replace"})
    return blockbuster


_BLOCKBUSTER = _blockbuster()


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[None]:
    """Raise in an async test where a call would block the loop."""
    if "anyio_backend" not in request.fixturenames:
        yield
        return
    _BLOCKBUSTER.activate()
    try:
        yield
    finally:
        _BLOCKBUSTER.deactivate()


_failed = pytest.StashKey[bool]()


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Remember whether the test has failed."""
    item.stash[_failed] = call.excinfo is not None


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail an async test that leaves a task, thread or file descriptor behind; a module may override it."""
    if "anyio_backend" not in request.fixturenames:
        yield
        return
    name, options = extract_backend_and_options(request.getfixturevalue("anyio_backend"))
    fds, threads = _open_fds(), _threads()
    # The lease keeps the loop open after the test, whose end would hide the tasks by cancelling them.
    runner: Any
    with get_runner(name, options) as runner:
        yield
        failed = request.node.stash[_failed]  # its traceback holds on to things
        if name == "asyncio" and not failed:
            loop = runner.get_loop()
            _settle(lambda: asyncio.all_tasks(loop) - {runner._runner_task}, "tasks", loop)
    if not failed:
        _settle(lambda: _threads() - threads, "threads")
        _settle(lambda: _open_fds() - fds, "file descriptors")


def _threads() -> set[threading.Thread]:
    # Those of trio's cache, in which anyio's test runner has it wait, are idle for ten seconds before they end.
    return {thread for thread in threading.enumerate() if not thread.name.startswith("Trio thread ")}


def _open_fds() -> set[tuple[int, str]]:
    found: set[tuple[int, str]] = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of listdir
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return found


def _settle(left: Callable[[], set[Any]], what: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
    """Give what is *left* some time to go away: on a busy machine the collector alone takes a part of a second."""
    deadline = time.monotonic() + 5
    while left():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} left behind: {left()}")
        gc.collect()
        if loop is not None:
            loop.run_until_complete(asyncio.sleep(0.001))
        else:
            time.sleep(0.001)
