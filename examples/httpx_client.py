"""Requests by httpx (or httpx2) that leave from the sources in turn; one of them is pinned.

    python examples/httpx_client.py https://example.com/ 'if!eth0' 'if!wwan0'

The quotes keep the shell away from the exclamation mark. ``anyio.run(..., backend="trio")`` does as well.
"""

import sys

import anyio
import httpx

import aiobind
from aiobind.httpx import BoundTransport


async def main(url: str, sources: list[str]) -> None:
    transport = BoundTransport(*sources)
    async with httpx.AsyncClient(transport=transport, timeout=10) as client:
        for _ in sources:
            response = await client.get(url)
            bound = aiobind.bound_source(response)
            print(f"{response.status_code} from {bound.source}: {bound.address} by {bound.interface or 'any NIC'}")
        response = await client.get(url, extensions={"source": sources[-1]})
        print(f"{response.status_code} from {sources[-1]} again")
        for stats in transport.stats():
            print(f"{stats.source}: {stats.connects} connections, {stats.bytes_received} bytes received")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: httpx_client.py URL SOURCE [SOURCE ...]")
    try:
        anyio.run(main, sys.argv[1], sys.argv[2:])
    except (httpx.TransportError, aiobind.InvalidSource) as error:
        sys.exit(f"httpx_client: {getattr(error.__cause__, 'strerror', error)}")  # of an aiobind.BindError, for example
    except KeyboardInterrupt:
        sys.exit(130)
