"""A crawl over many machines by Dask: the resources of each worker are its sources, and URLs are placed by them.

    dask scheduler
    dask worker tcp://HOST:8786 --preload examples/dask_crawl.py --nthreads 20 --resources 'if!eth0=20 if!wwan0=20'
    python examples/dask_crawl.py tcp://HOST:8786 120 https://example.com/ 'if!wwan0=https://example.org/' ...

The first on one machine, HOST; the second on each, with the sources that it has; all need the same Python and Dask:
pip install distributed bokeh. A URL leaves from any source of any worker, SOURCE=URL from that one, of any worker that
has it. A worker has --nthreads pages under way; allow each source as many, for in Dask a URL that waits for its source
holds up all behind it. What is left, by source, is on Dask's dashboard: http://HOST:8787/status. Whoever reaches the
scheduler can run programs on the workers: keep it in a network of your own, or use Dask's TLS.

What a worker had under way when it died, Dask has another one fetch: at once when the process dies, after 30 s when the
machine is silent. Each URL gets one line of JSON. When nothing has come for so long (here 120 s), that is what the rest
get: no worker has their source any more, for example. The exit status is 0 when all pages were had, 1 when not.
"""

import asyncio
import contextlib
import json
import sys
import uuid
from typing import Any

import aiohttp
from distributed import Client, as_completed, get_worker

import aiobind
from aiobind.aiohttp import BoundTCPConnector


async def dask_setup(worker: Any) -> None:  # Dask calls it on the worker's own loop, before the worker joins
    try:
        connector = BoundTCPConnector(*worker.state.total_resources, limit=0, abort_on_link_down=True)
    except (TypeError, ValueError) as error:
        sys.exit(f"dask_crawl: --resources: {error}")  # a worker without sources must not join
    worker.session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30))


async def dask_teardown(worker: Any) -> None:
    await worker.session.close()


async def fetch(source: str, url: str) -> dict[str, Any]:  # when it raises, Dask tries again, here or elsewhere
    worker: Any = get_worker()
    with aiobind.use_source(source) if source else contextlib.nullcontext():
        async with worker.session.get(url) as response:
            bound, size = aiobind.bound_source(response), len(await response.read())
    left_from = {"source": str(bound.source), "local": bound.address, "worker": worker.name}
    return {"url": url, "status": response.status, "bytes": size, **left_from}


def tell(source: str, url: str, result: Any) -> int:
    if failed := not isinstance(result, dict):
        error = result[1] if isinstance(result, tuple) else result  # of what raised: type, exception, traceback
        result = {"url": url, "source": source, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)
    return failed


def parsed(text: str) -> tuple[str, str]:
    source, _, url = ("", "", text) if text.startswith("http") else text.partition("=")
    return source if source and aiobind.parse_source(source) else "", url


async def main(scheduler: str, patience: str, *texts: str) -> int:
    pairs, failed = dict.fromkeys(map(parsed, texts)), 0
    # By the key of the task, whose first part names the bar on the dashboard.
    left = {(source or "any source", url, uuid.uuid4().hex): (source, url) for source, url in pairs}
    async with Client(scheduler, asynchronous=True) as client:
        pages: Any = as_completed(with_results=True, raise_errors=False)
        for key, (source, url) in left.items():
            resources = {source: 1} if source else None
            pages.add(client.submit(fetch, source, url, key=key, resources=resources, retries=2))
        try:
            while left:
                async with asyncio.timeout(float(patience)):
                    page, result = await anext(pages)
                failed += tell(*left.pop(page.key), result)
        except TimeoutError:
            failed += sum(tell(*each, TimeoutError(f"nothing has come for {patience} s")) for each in left.values())
    return min(failed, 1)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: dask_crawl.py SCHEDULER SECONDS [SOURCE=]URL ...")
    try:
        sys.exit(asyncio.run(main(*sys.argv[1:])))
    except (OSError, ValueError) as error:
        sys.exit(f"dask_crawl: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
