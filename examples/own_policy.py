"""A policy of your own: the destination's host chooses the source.

    python examples/own_policy.py '*.example.com=if!wwan0' '*=if!eth0' https://www.example.com/ ...

A rule is PATTERN=SOURCE. A request leaves from the first source whose pattern fits its host, or else from the next.
"""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import aiohttp

import aiobind
from aiobind.aiohttp import BoundTCPConnector


class ByHost:
    """The sources whose patterns fit the host, in their order."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = patterns

    def order(self, sources: Sequence[aiobind.SourceView], host: str) -> Iterator[aiobind.SourceView]:
        """Yield from *sources*, which are in the order in which the connector was given them."""
        for pattern, source in zip(self.patterns, sources, strict=True):
            if fnmatchcase(host, pattern):
                yield source


async def main(arguments: list[str]) -> None:
    urls = [text for text in arguments if "://" in text]
    rules = [text.partition("=") for text in arguments if "://" not in text]
    policy = ByHost([pattern for pattern, _, _ in rules])
    connector = BoundTCPConnector(*(source for _, _, source in rules), policy=policy)
    async with aiohttp.ClientSession(connector=connector) as session:
        for url in urls:
            async with session.get(url) as response:
                print(response.status, url, "from", aiobind.bound_source(response).source, flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1:]))
    except (
        TypeError,
        ValueError,
        RuntimeError,
        aiohttp.ClientError,
    ) as error:  # no source, a wrong one, none that fits
        sys.exit(f"own_policy: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
