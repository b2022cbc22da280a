"""A policy of your own: where it goes to decides which source a request leaves from.

    python examples/own_policy.py '*.example.com=if!wwan0' '10.0.0.0/8=if!eth0' '*=if!eth1' https://www.example.com/ ...

A rule is WHERE=SOURCE, and WHERE a pattern for the host or a network. Networks are for hosts given as an IP address:
a name is not looked up to see whether one fits. A request leaves from the source of the first rule that fits its host;
when that source fails, from that of the next one that fits. What fits none is refused.
"""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TypeAlias

import aiohttp

import aiobind
from aiobind.aiohttp import BoundTCPConnector

Where: TypeAlias = str | IPv4Network | IPv6Network


def fits(where: Where, host: str) -> bool:
    """Tell whether *host* is in the network *where*, or as the pattern says."""
    if isinstance(where, str):
        return fnmatchcase(host.lower().removesuffix("."), where)
    try:
        return ip_address(host) in where
    except ValueError:  # a name
        return False


class ByDestination:
    """The sources of the rules that fit the host, each once."""

    def __init__(self, rules: Sequence[tuple[Where, aiobind.Source]]) -> None:
        self.rules = rules

    def order(self, sources: Sequence[aiobind.SourceView], host: str) -> Iterator[aiobind.SourceView]:
        """Yield from *sources*, which are those in good health."""
        views = {view.source: view for view in sources}
        for where, source in self.rules:
            if source in views and fits(where, host):
                yield views.pop(source)


def parsed(rule: str) -> tuple[Where, aiobind.Source]:
    """Read WHERE=SOURCE."""
    where, _, source = rule.partition("=")
    if not where or not source:
        raise ValueError(f"neither a rule WHERE=SOURCE nor an http URL: {rule!r}")
    return ip_network(where) if "/" in where else where.lower(), aiobind.parse_source(source)


async def main(rules: Sequence[tuple[Where, aiobind.Source]], urls: Sequence[str]) -> int:
    failed = 0
    sources = dict.fromkeys(source for _, source in rules)  # several rules may name the same one
    connector = BoundTCPConnector(*sources, policy=ByDestination(rules))
    async with aiohttp.ClientSession(connector=connector) as session:
        for url in urls:
            try:
                async with session.get(url) as response:
                    print(response.status, url, "from", aiobind.bound_source(response).source, flush=True)
            except (OSError, aiohttp.ClientError, RuntimeError) as error:  # RuntimeError: no rule fits
                print(f"own_policy: {url}: {error}", file=sys.stderr, flush=True)
                failed = 1
    return failed


if __name__ == "__main__":
    urls = [text for text in sys.argv[1:] if text.startswith(("http://", "https://"))]
    try:
        rules = [parsed(text) for text in sys.argv[1:] if text not in urls]
        if not urls or not rules:
            sys.exit("usage: own_policy.py WHERE=SOURCE ... URL ...")
        sys.exit(asyncio.run(main(rules, urls)))
    except ValueError as error:
        sys.exit(f"own_policy: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
