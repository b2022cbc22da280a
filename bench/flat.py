"""Does a connect cost the same with one source and a thousand, with ten addresses on the interface and ten thousand?

    python -m bench.flat [--quick] [--json FILE]

CPU time of the process for each connect and close (the server is another one), and the ratio to the smallest case of
the same round. RoundRobin and Failover are promised to be flat; the other policies are there to be seen.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import aiobind
from aiobind.lab import Lab
from bench import table
from bench.apart import LOOPS, RESET, apart, cpu, run, served
from bench.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PORT = 8080
IP_BIND_ADDRESS_NO_PORT = 24
COUNTS = (1, 10, 100, 1000)
ADDRESSES = (10, 100, 1000, 10_000)

POLICIES: dict[str, Callable[[list[str]], aiobind.Policy]] = {
    "RoundRobin": lambda _: aiobind.RoundRobin(),
    "Failover": lambda _: aiobind.Failover(),
    "Random": lambda _: aiobind.Random(1),
    "Weighted": lambda sources: aiobind.Weighted({source: 1 + at % 7 for at, source in enumerate(sources)}),
    "LeastConnections": lambda _: aiobind.LeastConnections(),
    "Sticky": lambda _: aiobind.Sticky(),
}
BY_HAND = "blocking sockets by hand, in turn"
#: Of a NIC: its name, and its first address.
SOURCES = {"if!": "if!{0.name}", "ifhost!": "ifhost!{0.name}!{0.v4}", "address": "{0.v4}"}


async def costs(
    connectors: Sequence[aiobind.Connector],
    target: tuple[str, int],
    connects: int,
    rounds: int,
    warm: Sequence[int] = (),
) -> list[list[float]]:
    """Return the microseconds of CPU for each connect and close, of each round, by connector; they take turns.

    What a source does once is done before, by so many connects as *warm* says.
    """
    found: list[list[float]] = [[] for _ in connectors]
    for turn in range(rounds + 1):
        for at, (connector, taken) in enumerate(zip(connectors, found, strict=True)):
            start = cpu()
            for _ in range(connects if turn or not warm else max(connects, warm[at])):
                sock = await connector.connect(*target)
                sock.setsockopt(*RESET)
                sock.close()
            if turn:  # the first one warms up
                taken.append((cpu() - start) / connects * 1e6)
    for connector in connectors:
        await connector.aclose()
    return found


def costs_by_hand(addresses: Sequence[str], connects: int, rounds: int) -> list[list[float]]:
    """Return the same for blocking sockets that are bound to so many addresses in turn: the kernel's share of it."""
    found: list[list[float]] = [[] for _ in COUNTS]
    for turn in range(rounds + 1):
        for count, taken in zip(COUNTS, found, strict=True):
            start = cpu()
            for at in range(turn * connects, (turn + 1) * connects):
                with socket.socket() as sock:
                    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                    sock.bind((addresses[at % count], 0))
                    sock.connect(("127.0.0.1", PORT))
                    sock.setsockopt(*RESET)
            if turn:
                taken.append((cpu() - start) / connects * 1e6)
    return found


def by_sources(loop: str, connects: int, rounds: int) -> dict[str, list[list[float]]]:
    with Lab(nics=1) as lab:
        addresses = [f"127.1.{at // 250}.{at % 250 + 1}" for at in range(COUNTS[-1])]
        lab.near.ip(*(f"address add {address}/32 dev lo" for address in addresses))
        found: dict[str, list[list[float]]] = {}
        with served(socket.create_server(("127.0.0.1", PORT), backlog=4096)):
            # A policy that draws lots finds each source by then, nearly; quickly, none is warm.
            warm = [4 * count if rounds > 2 else 0 for count in COUNTS]
            for name, policy in POLICIES.items():
                connectors = [
                    aiobind.Connector(*addresses[:count], policy=policy(addresses[:count])) for count in COUNTS
                ]
                found[name] = run(loop, costs(connectors, ("127.0.0.1", PORT), connects, rounds, warm))
            if loop == LOOPS[0]:
                found[BY_HAND] = costs_by_hand(addresses, connects, rounds)
        return found


def by_addresses(loop: str, connects: int, rounds: int) -> dict[str, list[list[float]]]:
    with Lab(nics=len(ADDRESSES)) as lab:
        for subnet, (nic, count) in enumerate(zip(lab.nics, ADDRESSES, strict=True)):
            more = [
                f"address add 10.1.{subnet * 40 + at // 250}.{at % 250 + 1}/32 dev {nic.name}" for at in range(1, count)
            ]
            for at in range(0, len(more), 1000):
                lab.near.ip(*more[at : at + 1000])
        with lab.far:
            listener = socket.create_server((lab.target_v4, PORT), backlog=4096)
        found: dict[str, list[list[float]]] = {}
        with served(listener):
            for name, source in SOURCES.items():
                connectors = [aiobind.Connector(source.format(nic)) for nic in lab.nics]
                found[name] = run(loop, costs(connectors, (lab.target_v4, PORT), connects, rounds))
        return found


def measure(quick: bool) -> Iterator[Table]:
    connects, rounds = (2, 2) if quick else (250, 7)
    kernels = f" What {BY_HAND} cost more is the kernel's."
    for name, axis, function, counts, more in (
        ("flat-sources", "sources of the connector", by_sources, COUNTS, kernels),
        ("flat-addresses", "addresses on the interface", by_addresses, ADDRESSES, ""),
    ):
        found = Table(
            name,
            f"CPU of each connect and close, by the number of {axis}",
            "µs of CPU",
            [str(count) for count in counts],
            baseline=str(counts[0]),
            note="One at a time, the cases in turns, each source warm. The server is another process." + more,
            kind="lines",
            axis=axis,
        )
        for loop in LOOPS:
            for label, rounds_of in apart(function, loop, connects, rounds).items():
                for count, values in zip(counts, rounds_of, strict=True):
                    found.add(label, str(count), values, "" if label == BY_HAND else loop)
        yield found


if __name__ == "__main__":
    table.main(measure)
