"""Names: one question for all who ask, in daemon threads, and nobody waits for another's name."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from ipaddress import ip_address
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import uvloop
from dns_server import NXDOMAIN, REFUSED, SERVFAIL, DnsServer

import aiobind
from aiobind import _resolve
from aiobind._resolve import Resolved, in_thread, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def dns(resolv_conf: Callable[..., None]) -> Iterator[DnsServer]:
    with DnsServer() as server:
        resolv_conf(server.resolv_conf)
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the cache sees; set ``clock.now``."""
    fake = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(_resolve, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def found(*addresses: str) -> set[Resolved]:
    return {Resolved(ip_address(address), 0) for address in addresses}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "aiobind-resolve"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def start(*names: str) -> list[asyncio.Task[tuple[Resolved, ...]]]:
    return [asyncio.ensure_future(resolve(name)) for name in names]


# --- what it returns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (0, found("192.0.2.1", "192.0.2.2", "2001:db8::1")),
        (socket.AF_INET, found("192.0.2.1", "192.0.2.2")),
        (socket.AF_INET6, found("2001:db8::1")),
    ],
)
async def test_the_addresses_of_a_name(dns: DnsServer, family: int, expected: set[Resolved]) -> None:
    dns.add("both.test", "192.0.2.1", "192.0.2.2", "2001:db8::1")
    addresses = await resolve("both.test", family=family)
    assert len(addresses) == len(expected)
    assert set(addresses) == expected


async def test_the_order_is_that_of_the_system(resolv_conf: Callable[..., None]) -> None:
    addresses = ["127.0.0.9", "127.0.0.2", "::1", "127.0.0.7", "127.0.0.2"]
    resolv_conf("", hosts="".join(f"{address} some.test\n" for address in addresses))
    system: list[str] = []

    def ask() -> None:
        system.extend(str(info[4][0]) for info in socket.getaddrinfo("some.test", None, type=socket.SOCK_STREAM))

    thread = threading.Thread(target=ask)
    thread.start()
    await until(lambda: not thread.is_alive())
    assert [str(ip) for ip, _ in await resolve("some.test")] == list(dict.fromkeys(system))


async def test_etc_hosts_is_heeded(dns: DnsServer, resolv_conf: Callable[..., None]) -> None:
    resolv_conf(dns.resolv_conf, hosts="192.0.2.7 listed.test alias.test\n2001:db8::7 listed.test\n")
    assert set(await resolve("listed.test")) == found("192.0.2.7", "2001:db8::7")
    assert set(await resolve("alias.test")) == found("192.0.2.7")
    assert not dns.queries


async def test_the_scope_of_a_link_local_address() -> None:
    index = socket.if_nametoindex("lo")
    assert await resolve("fe80::1%lo") == (Resolved(ip_address("fe80::1"), index),)
    assert await resolve(f"fe80::1%{index}") == (Resolved(ip_address("fe80::1"), index),)


async def test_flags_are_passed_on(resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts="127.0.0.1 localhost\n")
    with pytest.raises(socket.gaierror):
        await resolve("localhost", flags=socket.AI_NUMERICHOST)
    assert set(await resolve("localhost")) == found("127.0.0.1")


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "two..dots",
        "x" * 64 + ".test",
        ".".join(["x" * 60] * 5),
        "x" * 1_000_000,
        "\ud800",
        "\0",
        "localhost\0.example.com",  # getaddrinfo(3) would read no further than the NUL
        "127.0.0.1\0",
        "%lo",
        "fe80::1%no-such-nic",
    ],
    ids=lambda name: ascii(name[:20]),
)
async def test_an_impossible_name(resolv_conf: Callable[..., None], name: str) -> None:
    resolv_conf("nameserver 127.0.0.1\n", hosts="127.0.0.1 localhost\n")
    with pytest.raises(socket.gaierror) as caught:
        await resolve(name)
    assert caught.value.errno == socket.EAI_NONAME
    assert caught.value.strerror


@pytest.mark.parametrize(
    ("rcode", "number"),
    [(NXDOMAIN, socket.EAI_NONAME), (0, socket.EAI_NODATA), (SERVFAIL, socket.EAI_AGAIN), (REFUSED, socket.EAI_AGAIN)],
)
async def test_a_failure_keeps_its_number(dns: DnsServer, rcode: int, number: int) -> None:
    dns.add("failing.test", rcode=rcode)
    with pytest.raises(socket.gaierror) as caught:
        await resolve("failing.test")
    assert caught.value.errno == number


async def test_no_descriptor_left_is_a_failure_like_others(dns: DnsServer) -> None:
    dns.add("some.test", "192.0.2.1")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(socket.gaierror):
            await resolve("some.test")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert set(await resolve("some.test")) == found("192.0.2.1")


@pytest.mark.parametrize(
    ("error", "number", "text"),
    [
        (OSError(24, "Too many open files"), socket.EAI_SYSTEM, "Too many open files"),
        (LookupError("unknown encoding: idna"), socket.EAI_FAIL, "LookupError: unknown encoding: idna"),
        (MemoryError(), socket.EAI_FAIL, "MemoryError: "),
    ],
    ids=repr,
)
async def test_whatever_happens_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, number: int, text: str
) -> None:
    def getaddrinfo(*_: object) -> None:
        raise error

    monkeypatch.setattr(_resolve.socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(socket.gaierror) as caught:
        await resolve("some.test")
    assert type(caught.value) is socket.gaierror
    assert (caught.value.errno, caught.value.strerror) == (number, text)


# --- one question for all -----------------------------------------------------------------------------------


async def test_the_same_name_is_asked_for_once(dns: DnsServer) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    tasks = start(*["held.test"] * 50)
    await until(lambda: dns.queries.total() == 2)
    assert len(threads()) == 1
    dns.release("held.test")
    assert set(map(frozenset, await asyncio.gather(*tasks))) == {frozenset(found("192.0.2.1"))}
    assert dns.queries == {("held.test", "A"): 1, ("held.test", "AAAA"): 1}


async def test_another_family_is_another_question(dns: DnsServer) -> None:
    dns.add("both.test", "192.0.2.1", "2001:db8::1")
    await asyncio.gather(*(resolve("both.test", family=family) for family in (socket.AF_INET, socket.AF_INET6)))
    assert dns.queries == {("both.test", "A"): 1, ("both.test", "AAAA"): 1}


async def test_names_do_not_wait_for_each_other(dns: DnsServer) -> None:
    names = [f"held{i}.test" for i in range(50)]
    for name in names:
        dns.add(name, "192.0.2.1", delay=inf)
    dns.add("fast.test", "192.0.2.2")
    tasks = start(*names)
    await until(lambda: dns.queries.total() == 100)
    assert set(await resolve("fast.test")) == found("192.0.2.2")
    assert not any(task.done() for task in tasks)
    for name in names:
        dns.release(name)
    await asyncio.gather(*tasks)


async def test_a_failure_is_told_to_all_and_not_kept(dns: DnsServer) -> None:
    dns.add("held.test", delay=inf, rcode=NXDOMAIN)
    tasks = start(*["held.test"] * 10)
    await until(lambda: dns.queries.total() == 2)
    dns.release("held.test")
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert {(type(error), getattr(error, "errno", None)) for error in errors} == {(socket.gaierror, socket.EAI_NONAME)}
    assert len(set(map(id, errors))) == 10  # each has a traceback of its own
    assert dns.queries["held.test", "A"] == 1
    dns.add("held.test", "192.0.2.1")
    assert set(await resolve("held.test")) == found("192.0.2.1")
    assert dns.queries["held.test", "A"] == 2


@pytest.mark.parametrize(
    "keywords", [{"source": "127.0.0.2", "host": "slow.test"}, {"source": "host!slow.test", "host": "127.0.0.1"}]
)
async def test_fifty_connects_by_one_slow_name(dns: DnsServer, keywords: dict[str, str]) -> None:
    dns.add("slow.test", "127.0.0.1", delay=1.0)
    lags: list[float] = []

    async def watch() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            lags.append(time.monotonic() - before)

    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        watching = asyncio.ensure_future(watch())
        connector = aiobind.Connector(keywords["source"])
        port = listener.getsockname()[1]
        started = time.monotonic()
        socks = await asyncio.gather(*(connector.connect(keywords["host"], port) for _ in range(50)))
        took = time.monotonic() - started
        watching.cancel()
        for sock in socks:
            sock.close()
    assert dns.queries == {("slow.test", "A"): 1, ("slow.test", "AAAA"): 1}
    assert 1.0 <= took < 5
    assert len(lags) > 20
    assert max(lags) < 0.5  # on the loop, the name would take all of its second


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ttl", "age", "asked"),
    [
        (10.0, 0.0, 1),
        (10.0, 9.9, 1),
        (10.0, 10.0, 2),
        (0.5, 0.4, 1),
        (0.5, 0.6, 2),
        (0, 0.0, 2),
        (None, 1e9, 1),
    ],
)
async def test_how_long_an_answer_is_kept(
    dns: DnsServer, clock: SimpleNamespace, ttl: float | None, age: float, asked: int
) -> None:
    dns.add("some.test", "192.0.2.1")
    first = await resolve("some.test", ttl=ttl)
    clock.now += age
    assert await resolve("some.test", ttl=ttl) == first
    assert dns.queries["some.test", "A"] == asked


async def test_the_default_is_ten_seconds(dns: DnsServer, clock: SimpleNamespace) -> None:
    dns.add("some.test", "192.0.2.1")
    for age, asked in ((0, 1), (9.9, 1), (0.2, 2)):
        clock.now += age
        await resolve("some.test")
        assert dns.queries["some.test", "A"] == asked


async def test_a_new_answer_replaces_the_old_one(dns: DnsServer, clock: SimpleNamespace) -> None:
    dns.add("some.test", "192.0.2.1")
    assert set(await resolve("some.test")) == found("192.0.2.1")
    dns.add("some.test", "192.0.2.2")
    assert set(await resolve("some.test", ttl=0)) == found("192.0.2.2")  # asked, although one was kept
    clock.now += 9.9
    assert set(await resolve("some.test")) == found("192.0.2.2")  # and its age counts from then


async def test_the_least_recently_used_answer_goes_first(dns: DnsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resolve, "MAX_CACHED", 3)
    names = ["a.test", "b.test", "c.test", "d.test"]
    for name in names:
        dns.add(name, "192.0.2.1")
    for name in ["a.test", "b.test", "c.test", "a.test", "d.test"]:
        await resolve(name)
    before = dns.queries.copy()
    for name in ["a.test", "c.test", "d.test"]:
        await resolve(name)
    assert dns.queries == before
    await resolve("b.test")
    assert dns.queries - before == {("b.test", "A"): 1, ("b.test", "AAAA"): 1}


# --- who leaves, leaves at once -----------------------------------------------------------------------------


async def test_a_cancelled_caller_leaves_the_others(dns: DnsServer) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    first, second, third = start(*["held.test"] * 3)
    await until(lambda: dns.queries.total() == 2)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    assert not second.done()
    dns.release("held.test")
    assert await second == await third != ()
    assert dns.queries["held.test", "A"] == 1


async def test_an_answer_that_nobody_waited_for_is_kept(dns: DnsServer) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    tasks = start(*["held.test"] * 3)
    await until(lambda: dns.queries.total() == 2)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    late = start("held.test")  # joins the look-up that is still under way
    dns.release("held.test")
    assert set(await late[0]) == found("192.0.2.1")
    assert set(await resolve("held.test")) == found("192.0.2.1")
    assert dns.queries["held.test", "A"] == 1


async def test_a_timeout_does_not_wait_for_the_system(dns: DnsServer) -> None:
    dns.add("held.test", delay=inf)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await resolve("held.test")
    dns.release("held.test")


@pytest.mark.parametrize("new_event_loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("answered", ["before the loop is closed", "after it"])
def test_a_loop_that_is_closed_meanwhile(
    dns: DnsServer, new_event_loop: Callable[[], asyncio.AbstractEventLoop], answered: str
) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    loop = new_event_loop()
    task = loop.create_task(resolve("held.test"))
    loop.run_until_complete(until(lambda: dns.queries.total() == 2))
    assert len(threads()) == 1
    task.cancel()
    loop.run_until_complete(asyncio.wait([task]))
    if answered == "after it":
        loop.close()
    dns.release("held.test")
    wait_until(lambda: not threads())  # and an exception in the thread would be a warning, hence a failure
    loop.close()
    gone = weakref.ref(loop)
    del loop, task
    gc.collect()
    assert gone() is None


async def test_other_loops_have_answers_of_their_own(dns: DnsServer) -> None:
    dns.add("some.test", "192.0.2.1")
    await resolve("some.test")
    answers: list[object] = []

    def other() -> None:
        loop = asyncio.new_event_loop()
        answers.append(loop.run_until_complete(resolve("some.test")))
        loop.close()

    thread = threading.Thread(target=other)
    thread.start()
    await until(lambda: not thread.is_alive())
    assert answers == [await resolve("some.test")]
    assert dns.queries["some.test", "A"] == 2


# --- threads ------------------------------------------------------------------------------------------------


async def test_threads_are_daemons_and_do_not_lie_idle(dns: DnsServer) -> None:
    dns.add("held.test", delay=inf)
    (task,) = start("held.test")
    await until(lambda: bool(threads()))
    assert all(thread.daemon for thread in threads())
    dns.release("held.test")
    await asyncio.wait([task])
    assert isinstance(task.exception(), socket.gaierror)
    await until(lambda: not threads())


async def test_no_more_threads_than_allowed_and_the_rest_in_turn(
    dns: DnsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_resolve, "MAX_THREADS", 2)
    names = ["a.test", "b.test", "c.test", "d.test"]
    for name in names:
        dns.add(name, "192.0.2.1", delay=inf)
    tasks = start(*names)
    for asked in range(2, 5):
        await until(lambda asked=asked: dns.queries.total() == 2 * asked)  # type: ignore[misc]
        await asyncio.sleep(0.01)
        assert {name for name, _ in dns.queries} == set(names[:asked])
        assert len(threads()) == 2
        dns.release(names[asked - 2])
    dns.release(names[-1])
    await asyncio.gather(*tasks)
    await until(lambda: not threads())
    dns.add("e.test", "192.0.2.1")  # the count is right afterwards
    await resolve("e.test")


def refuse(_: object) -> None:
    raise RuntimeError("can't start new thread")


async def test_when_no_thread_can_be_started_one_of_those_that_run_takes_over(
    dns: DnsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    dns.add("some.test", "192.0.2.2")
    tasks = start("held.test")
    await until(lambda: dns.queries.total() == 2)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    tasks += start("some.test")
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in tasks)
    dns.release("held.test")
    assert list(map(set, await asyncio.gather(*tasks))) == [found("192.0.2.1"), found("192.0.2.2")]


async def test_a_thread_that_cannot_be_started_leaves_nothing_behind(
    dns: DnsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dns.add("some.test", "192.0.2.1")
    monkeypatch.setattr(_resolve, "MAX_THREADS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(socket.gaierror, match="new thread") as caught:
            await resolve("some.test")
    assert set(await resolve("some.test")) == found("192.0.2.1")  # while the traceback still holds everything
    assert caught.traceback


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("failure", [RuntimeError, MemoryError])
def test_nobody_waits_behind_a_first_thread_that_cannot_be_started(
    order: tuple[int, ...], failure: type[Exception]
) -> None:
    """Each caller, of which each loop's thread may be one, is told, or its job is done."""
    threads, settled = _resolve._Threads(), set[int]()
    entered, gates = threading.Semaphore(0), [threading.Event() for _ in order]

    def start(job: Callable[[], None]) -> None:
        entered.release()
        gates[numbers[job]].wait(5)
        raise failure("can't start new thread")

    threads._start = start  # type: ignore[method-assign]
    jobs = [partial(settled.add, number) for number in range(len(order))]
    numbers = {job: number for number, job in enumerate(jobs)}

    def call(job: Callable[[], None]) -> None:
        try:
            threads.run(job)
        except failure:
            settled.add(numbers[job])

    callers = [threading.Thread(target=call, args=[job]) for job in jobs]
    for caller in callers:
        caller.start()
        entered.acquire(timeout=0.2)  # or it is queued
    for number in order:
        gates[number].set()
        callers[number].join(5)
    assert settled == set(order)
    assert not threads._jobs


async def test_a_function_in_a_thread() -> None:
    def where() -> threading.Thread:
        return threading.current_thread()

    def fail() -> None:
        raise LookupError("no such thing")

    thread = await in_thread(where)
    assert thread.daemon
    assert thread is not threading.current_thread()
    with pytest.raises(LookupError, match="no such thing"):
        await in_thread(fail)


async def test_who_waits_for_a_thread_can_leave() -> None:
    held, done = threading.Event(), threading.Event()

    def wait() -> None:
        held.wait()
        done.set()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await in_thread(wait)
    held.set()
    await until(done.is_set)
    await until(lambda: not threads())


PROGRAM = """
import asyncio, signal, sys, aiobind
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without

async def main():
    async with asyncio.timeout({timeout}):
        await aiobind.connect("held.test", 80, source="127.0.0.1")

try:
    {run}(main())
except TimeoutError:
    print("timed out", flush=True)
"""


@pytest.mark.parametrize("run", ["asyncio.run", "__import__('uvloop').run"])
@pytest.mark.parametrize("ending", ["a timeout", "Ctrl-C"])
def test_a_program_does_not_wait_for_the_system_to_end(dns: DnsServer, run: str, ending: str) -> None:
    dns.add("held.test", delay=inf)
    program = PROGRAM.format(run=run, timeout=0.1 if ending == "a timeout" else None)
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: dns.queries.total() == 2)
            if ending == "Ctrl-C":
                os.kill(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=10)  # the system gives up after 30 seconds
        finally:
            process.kill()
    if ending == "Ctrl-C":
        assert process.returncode == -signal.SIGINT, err
        assert err.rstrip().endswith("KeyboardInterrupt")
    else:
        assert (process.returncode, out, err) == (0, "timed out\n", "")


async def test_nothing_is_resolved_on_the_loop(resolv_conf: Callable[..., None]) -> None:
    """Blockbuster raises where the loop's thread calls getaddrinfo; this test is that it would."""
    resolv_conf("", hosts="127.0.0.1 localhost\n")
    asking: Coroutine[object, object, object] = resolve("localhost")
    assert await asking == (Resolved(ip_address("127.0.0.1"), 0),)
    with pytest.raises(BaseException, match="getaddrinfo"):
        socket.getaddrinfo("localhost", None)
