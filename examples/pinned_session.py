"""An aiohttp session all of whose connections leave from one source.

    python examples/pinned_session.py 'if!eth0' https://example.com/

The quotes keep the shell away from the exclamation mark. With an interface that is not there it says:

    pinned_session: connect from if!eth9 to example.com:443: no interface named 'eth9' (have: eth0, lo)
"""

import asyncio
import sys

import aiohttp

import aiobind
from aiobind.aiohttp import BoundTCPConnector


async def main(source: str, url: str) -> None:
    async with aiohttp.ClientSession(connector=BoundTCPConnector(source)) as session, session.get(url) as response:
        bound = aiobind.bound_source(response)
        print(f"{response.status} {response.reason}")
        print(f"from {bound.source}: {bound.address} port {bound.port}, pinned to {bound.interface or 'no interface'}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: pinned_session.py SOURCE URL")
    try:
        asyncio.run(main(*sys.argv[1:]))
    except aiohttp.ClientConnectorError as error:
        sys.exit(f"pinned_session: {error.os_error.strerror}")  # error.os_error is an aiobind.BindError, for example
    except aiohttp.ClientError as error:
        sys.exit(f"pinned_session: {type(error).__name__}: {error}")
    except aiobind.InvalidSource as error:
        sys.exit(f"pinned_session: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
