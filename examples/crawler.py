"""Get pages from several sources at once: results are JSON lines, progress is a table on standard error.

    python examples/crawler.py --source 'if!eth0' --source 'if!wwan0' https://example.com/ ...
    python examples/crawler.py --source 192.0.2.7 --source 192.0.2.8 --input urls.txt --output pages.jsonl
    zcat urls.gz | python examples/crawler.py --source 'if!eth0' --concurrency 50 --limit-per-host 2 > pages.jsonl

Each URL is had once, and gets a line: with its status, or with an error. What may be repeated is tried again, after a
pause that doubles each time, or the one that the server asks for: a connection that fails, a page that takes too long,
the answers 408, 425, 429 and 5xx. After 403 and 429 another source is taken for that host.

Ctrl-C lets the pages under way end, for 5 seconds at most; a second one does not. The same command with the same
--output goes on from there, or from a crash: what has a page is skipped, what has an error is tried again, so that a
URL may have lines with errors before the one with its page. The exit status is 0 when all pages were had, 1 when
some were not, 130 after Ctrl-C.
"""

import argparse
import asyncio
import contextlib
import fcntl
import importlib
import json
import math
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any, TextIO

import aiohttp
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

import aiobind
from aiobind.aiohttp import BoundTCPConnector

POLICIES: dict[str, Any] = {
    "round-robin": aiobind.RoundRobin,
    "random": aiobind.Random,
    "least-connections": aiobind.LeastConnections,
    "sticky": aiobind.Sticky,
    "failover": aiobind.Failover,
    "weighted": aiobind.Weighted,
}
#: The options that are passed on to the connector.
LIMITS = "limit_per_host", "limit_per_source", "limit_per_source_host", "rate_per_source", "rate_per_source_host"
PAUSE, LONGEST_PAUSE, GRACE = 0.5, 60.0, 5.0  # seconds
BANNED = {403, 429}
TRANSIENT = {408, 425, *BANNED, *range(500, 600)}


class Crawl:
    """One run: URLs come in by a queue, a line for each goes out."""

    def __init__(self, options: argparse.Namespace, output: TextIO | None, seen: set[str]) -> None:
        self.options, self.output, self.seen = options, output, seen
        limits = {name: value for name in LIMITS if (value := getattr(options, name)) is not None}
        limits |= {"limit": options.concurrency, "abort_on_link_down": True}  # what is aborted is asked for again
        self.connector = BoundTCPConnector(*options.source, policy=options.policy, **limits)
        self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
        # The reader is ahead by as many URLs as there is room for, so that no list of them is too long.
        self.queue, self.room = asyncio.Queue[str | None](), threading.Semaphore(2 * options.concurrency)
        self.console = Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else 120)
        # Results that go to a file or a pipe must not go through the live display.
        mixed = output is None and sys.stdout.isatty()
        self.live = Live(console=self.console, auto_refresh=False, transient=True, redirect_stdout=mixed)
        self.pages, self.sizes, self.errors = Counter[str](), Counter[str](), Counter[str]()  # by source
        self.banned: dict[tuple[str, str], float] = {}  # until when, by source and host
        self.start, self.skipped, self.under_way, self.failed, self.status = time.monotonic(), 0, 0, 0, 0
        self.failure: OSError | None = None
        self.tasks: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Return the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell has it for its background jobs
                self.loop.add_signal_handler(number, self.stop, number)
        # Not `total`, which would count the wait for a connection that the limits allow.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.options.timeout, sock_read=self.options.timeout)
        session = aiohttp.ClientSession(connector=self.connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar())
        async with session:
            threading.Thread(target=self.read, daemon=True).start()  # which may still wait for a pipe in the end
            with self.live if sys.stderr.isatty() else contextlib.nullcontext() as live:
                showing = self.loop.create_task(self.show(live))
                async with asyncio.TaskGroup() as group:
                    self.tasks = [group.create_task(self.work(session)) for _ in range(self.options.concurrency)]
                showing.cancel()
            if self.failure is not None:
                raise self.failure
            self.console.print(self.table())
        return self.status or int(self.failed > 0)

    # ── in ──

    def read(self) -> None:
        """Fill the queue, in a thread of its own: a pipe may keep it waiting."""
        try:
            for url in filter(None, map(str.strip, lines(self.options))):
                if url in self.seen:
                    self.skipped += 1
                elif not url.startswith("#"):
                    self.seen.add(url)
                    self.room.acquire()
                    self.loop.call_soon_threadsafe(self.queue.put_nowait, url)
            self.loop.call_soon_threadsafe(self.queue.put_nowait, None)
        except OSError as error:
            self.loop.call_soon_threadsafe(self.fail, error)
        except RuntimeError:
            pass  # the loop is closed: it is over

    async def work(self, session: aiohttp.ClientSession) -> None:
        """Get one page after the other."""
        while (url := await self.queue.get()) is not None and not self.stopping.is_set():
            self.room.release()
            self.under_way += 1
            result = await self.get(session, url)
            self.under_way -= 1
            if result is not None:
                self.write(result)
        self.queue.put_nowait(None)  # for the next one

    # ── a page ──

    async def get(self, session: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
        """Return what is to be told of the page; None if the crawl is stopped before that is known."""
        tries = 0
        while True:
            tries += 1
            result, pause = await self.get_once(session, url)
            if pause is None or pause > LONGEST_PAUSE or tries == self.options.tries:
                return {**result, "tries": tries}
            pause = max(pause, min(PAUSE * 2 ** (tries - 1), LONGEST_PAUSE) * random.uniform(0.5, 1))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self.stopping.wait()
                return None

    async def get_once(self, session: aiohttp.ClientSession, url: str) -> tuple[dict[str, Any], float | None]:
        """Return what came of it, and in how many seconds it may be tried again; None: that is of no use."""
        start, source = time.perf_counter(), ""
        try:
            async with session.get(url) as response:
                bound = aiobind.bound_source(response)
                source = str(bound.source)
                async with asyncio.timeout(self.options.timeout):
                    size, whole = await self.read_body(response)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self.errors[source] += 1
            reason = getattr(getattr(error, "os_error", None), "strerror", None)
            reason = reason or f"{type(error).__name__}: {error}".removesuffix(": ")
            return {"url": url, "error": reason}, 0 if may_be_repeated(error) else None
        milliseconds = round((time.perf_counter() - start) * 1000, 1)
        result = {"url": url, "status": response.status, "bytes": size, "source": source, "local": bound.address}
        result |= {"ms": milliseconds} if whole else {"ms": milliseconds, "truncated": True}
        if response.status not in TRANSIENT:
            return result, None
        self.errors[source] += 1
        pause: float | None = asked_pause(response.headers.get("Retry-After", ""))
        if response.status in BANNED:
            self.connector.report(bound.source, host=response.url.raw_host or "", seconds=pause or None)
            host, now = response.url.raw_host or "", time.monotonic()
            self.banned[source, host] = now + (pause or PAUSE)
            if any(self.banned.get((str(other), host), 0) <= now for other in self.options.source):
                pause = 0  # another source need not wait
            elif response.status == 403:
                pause = None
        return {**result, "error": f"{response.status} {response.reason}"}, pause

    async def read_body(self, response: aiohttp.ClientResponse) -> tuple[int, bool]:
        """Return how much there is, and whether that is all. This is the place to do something with a page."""
        size = 0
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > self.options.max_bytes:
                response.close()
                return self.options.max_bytes, False
        return size, True

    # ── out ──

    def write(self, result: dict[str, Any]) -> None:
        """Count it and tell it. Nothing awaits between a page and the end of its line, so Ctrl-C cannot come in."""
        if "error" in result:
            self.failed += 1
        else:
            self.pages[result["source"]] += 1
            self.sizes[result["source"]] += result["bytes"]
        try:
            print(json.dumps(result), file=self.output, flush=True)
        except OSError as error:  # the disk is full, or nobody reads any more
            self.fail(error)

    # ── the end before the end ──

    def stop(self, number: int) -> None:
        """Begin no further page; the second time, end no page either."""
        if self.stopping.is_set():
            self.cut()
            return
        self.status = 128 + number
        self.stopping.set()
        self.queue.put_nowait(None)
        self.loop.call_later(GRACE, self.cut)
        self.console.print(f"{self.under_way} pages under way may end; press again to end at once")

    def fail(self, error: OSError) -> None:
        """End at once, for there is nothing to read from, or to write to."""
        self.failure = self.failure or error
        self.cut()

    def cut(self) -> None:
        """End at once."""
        for task in self.tasks:
            task.cancel()

    # ── progress ──

    async def show(self, live: Live | None) -> None:
        """Show the table all the time; where there is no terminal, a line now and then."""
        while True:
            await asyncio.sleep(0.25 if live else self.options.progress)
            if live:
                live.update(self.table(), refresh=True)
                continue
            stats = self.connector.stats()
            rows = (f"{its.source} {state(its)} {self.pages[str(its.source)]}" for its in stats)
            self.console.print(self.summary(), *rows, sep="; ", soft_wrap=True)

    def summary(self) -> str:
        """Return the sums in one line."""
        seconds, pages = time.monotonic() - self.start, self.pages.total()
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{pages} pages, {self.failed} failed{skipped}, {seconds:.1f} s, {pages / seconds:.1f} pages/s"

    def table(self) -> Group:
        """Return a row for each source, and the sums."""
        seconds, table = time.monotonic() - self.start, Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("source", no_wrap=True)
        table.add_column("state")
        for heading in ("open", "busy", "pages", "/s", "kB", "errors", "p50", "p99 ms"):
            table.add_column(heading, justify="right")
        for its in self.connector.stats():
            source = str(its.source)
            pages, size = self.pages[source], self.sizes[source] / 1000
            errors = self.errors[source] + sum(its.failures.values())
            connects = (f"{1000 * each:.1f}" if each else "" for each in (its.latency_p50, its.latency_p99))
            row = (its.connections, its.in_use, pages, f"{pages / seconds:.1f}", f"{size:.1f}", errors, *connects)
            table.add_row(source, state(its), *map(str, row))
        return Group(table, self.summary())


def state(its: aiobind.SourceStats) -> str:
    if its.suspended_until is None:
        return "ok"
    seconds = its.suspended_until - time.monotonic()
    return "down" if seconds == math.inf else f"suspended {max(seconds, 0):.0f} s"


def may_be_repeated(error: Exception) -> bool:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return False
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno == socket.EAI_NONAME:
        return False
    return isinstance(error, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError))


def asked_pause(retry_after: str) -> float:
    """Return the seconds that a server asks for, by number or by date (RFC 9110 10.2.3); an hour at most."""
    if retry_after.isascii() and retry_after.isdigit():
        return min(float(retry_after), 3600.0)
    with contextlib.suppress(ValueError, OverflowError):
        return min(max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time()), 3600.0)
    return 0.0


def lines(options: argparse.Namespace) -> Iterator[str]:
    yield from options.url
    if options.input or not options.url:
        path = 0 if options.input in {None, "-"} else options.input
        with open(path, errors="replace", closefd=path != 0) as file:
            yield from file


def had_before(output: TextIO) -> set[str]:
    """Return what *output* has pages of; a last line that is not whole, as after a crash, is cut off."""
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{output.name}: another crawl is writing to it") from None
    seen, whole = set[str](), 0
    with open(output.name, "rb") as file:
        for line in file:
            if not whole and not line.startswith(b'{"url": '[: len(line)]):
                raise ValueError(f"{output.name}: it holds something else than results, and is left alone")
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            with contextlib.suppress(ValueError, LookupError, TypeError):  # it is not one of ours
                result = json.loads(line)
                if "error" not in result:
                    seen.add(result["url"])
    os.truncate(output.name, whole)
    return seen


def number(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def amount(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Get pages from several sources at once, as JSON lines.")
    add = parser.add_argument
    add("--source", action="append", required=True, help="such as 'if!eth0'; give one or more")
    add("--policy", choices=POLICIES, help="who is next (default: round-robin; weighted, where a weight is given)")
    add("--weight", action="append", default=[], nargs=2, metavar=("SOURCE", "N"), help="default: 1")
    add("--input", metavar="FILE", help="URLs, one to a line; those that begin with # are left out")
    add("--output", metavar="FILE", help="default: standard output; where there are results already, it goes on")
    add("--concurrency", type=number, default=10, metavar="N", help="pages at once (default: 10)")
    add("--limit-per-host", type=number, metavar="N", help="connections to a host")
    add("--limit-per-source", type=number, metavar="N", help="connections from a source")
    add("--limit-per-source-host", type=number, metavar="N", help="connections from a source to a host")
    add("--rate-per-source", type=amount, metavar="N", help="connects per second from a source")
    add("--rate-per-source-host", type=amount, metavar="N", help="connects per second from a source to a host")
    add("--timeout", type=amount, default=30.0, metavar="S", help="of a connect, an answer, a body (default: 30)")
    add("--tries", type=number, default=5, metavar="N", help="of a page (default: 5)")
    add("--max-bytes", type=number, default=10**7, metavar="N", help="of a page, whose rest is left (default: 10^7)")
    add("--progress", type=amount, default=10.0, metavar="S", help="between lines, without a terminal (default: 10)")
    add("--uvloop", action="store_true", help="run on uvloop")
    add("url", nargs="*", help="default: those on standard input")
    options = parser.parse_args()
    options.source = [aiobind.parse_source(source) for source in options.source]
    weights = {aiobind.parse_source(source): float(weight) for source, weight in options.weight}
    options.policy = options.policy or ("weighted" if weights else "round-robin")
    if weights and (options.policy != "weighted" or not weights.keys() <= set(options.source)):
        parser.error("--weight is for --policy weighted, and for one of the sources")
    policy = POLICIES[options.policy]
    options.policy = policy(weights) if policy is aiobind.Weighted else policy()
    return options


async def crawl(options: argparse.Namespace, output: TextIO | None, seen: set[str]) -> int:
    return await Crawl(options, output, seen).run()


def main() -> int:
    options = arguments()
    with open(options.output, "a", encoding="utf-8") if options.output else contextlib.nullcontext() as output:
        seen = had_before(output) if output and os.path.isfile(options.output) else set()
        loop_factory = importlib.import_module("uvloop").new_event_loop if options.uvloop else None
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            status = runner.run(crawl(options, output, seen))
    if status > 128:
        how = "the same command" if options.output else "with --output FILE the same command"
        print(f"interrupted; {how} {'goes' if options.output else 'would go'} on from here", file=sys.stderr)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before or after the crawl itself
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # nobody reads the results any more, as after "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ImportError, OSError, ValueError) as error:  # ImportError: an extra is needed
        sys.exit(f"crawler: {error}")
