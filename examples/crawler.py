"""Get pages from several sources at once: results are JSON lines on stdout, progress is a table on stderr.

    python examples/crawler.py --source 'if!eth0' --source 'if!wwan0' https://example.com/ ...
    python examples/crawler.py --source 192.0.2.7 --source 192.0.2.8 --concurrency 50 < urls.txt > pages.jsonl

The sources take turns. A page whose connection fails is tried again; the exit status is 1 when one could not be had.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter

import aiohttp
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

import aiobind
from aiobind.aiohttp import BoundTCPConnector

TRIES, PAUSE = 3, 0.2


async def get(session: aiohttp.ClientSession, url: str, tries: int = TRIES) -> dict[str, str | float]:
    """Return what is to be told of the page."""
    start = time.perf_counter()
    try:
        async with session.get(url) as response:
            status, body, bound = response.status, await response.read(), aiobind.bound_source(response)
    except (aiohttp.ClientError, TimeoutError) as error:
        if tries > 1 and isinstance(error, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError)):
            await asyncio.sleep(PAUSE)
            return await get(session, url, tries - 1)
        reason = error.os_error.strerror if isinstance(error, aiohttp.ClientConnectorError) else None
        return {"url": url, "error": reason or f"{type(error).__name__}: {error}"}
    milliseconds = round((time.perf_counter() - start) * 1000, 1)
    whence = {"source": str(bound.source), "local": bound.address}
    return {"url": url, "status": status, "bytes": len(body), **whence, "ms": milliseconds}


async def crawl(sources: list[str], urls: list[str], concurrency: int) -> bool:
    """Print a line for each of *urls*; tell whether all could be had."""
    pages, sizes, failed = Counter[str](), Counter[str](), 0
    start, waiting = time.perf_counter(), iter(urls)

    def progress() -> Group:
        seconds = time.perf_counter() - start
        table = Table("source", box=None, pad_edge=False)
        for heading in ("pages", "pages/s", "kB"):
            table.add_column(heading, justify="right")
        for source in sources:
            count, size = pages[source], sizes[source]
            table.add_row(source, str(count), f"{count / seconds:.1f}", f"{size / 1000:.1f}")
        return Group(table, f"{pages.total()} of {len(urls)} pages, {failed} failed, {seconds:.1f} s")

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal failed
        for url in waiting:
            result = await get(session, url)
            if "error" in result:
                failed += 1
            else:
                pages[str(result["source"])] += 1
                sizes[str(result["source"])] += int(result["bytes"])
            print(json.dumps(result), flush=True)

    connector, console = BoundTCPConnector(*sources, limit=concurrency), Console(stderr=True, highlight=False)
    # Results that go to a file or a pipe must not go through the live display.
    live = Live(console=console, get_renderable=progress, transient=True, redirect_stdout=sys.stdout.isatty())
    try:
        async with aiohttp.ClientSession(connector=connector) as session:
            with live:
                await asyncio.gather(*(work(session) for _ in range(concurrency)))
    finally:
        console.print(progress())
    return pages.total() == len(urls)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Get pages from several sources at once.")
    parser.add_argument("--source", action="append", required=True, help="such as 'if!eth0'; give one or more")
    parser.add_argument("--concurrency", type=int, default=10, metavar="N", help="requests at once (default: 10)")
    parser.add_argument("url", nargs="*", help="default: those on standard input")
    options = parser.parse_args()
    try:
        sources = [str(aiobind.parse_source(source)) for source in options.source]
        urls = options.url or sys.stdin.read().split()
        sys.exit(not asyncio.run(crawl(sources, urls, options.concurrency)))
    except ValueError as error:  # a wrong source
        sys.exit(f"crawler: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # nobody reads the results any more, as after "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
