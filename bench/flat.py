"""Does a connect cost the same with one source and a thousand, with ten addresses on the interface and ten thousand?

    python bench/flat.py [--connects 300] [--uvloop]

CPU time of this process for each connect and close (the server is another process), the median of several rounds, and
the ratio to the smallest case of the same run: that is what counts, for machines are noisy. Needs network namespaces.
"""

import argparse
import asyncio
import ctypes
import resource
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

import aiobind
from aiobind.lab import Lab, available, isolate

ROUNDS = 5
COUNTS = (1, 10, 100, 1000)
ADDRESSES = (10, 100, 1000, 10_000)

POLICIES: dict[str, Callable[[list[str]], aiobind.Policy]] = {
    "RoundRobin": lambda _: aiobind.RoundRobin(),
    "Random": lambda _: aiobind.Random(1),
    "Failover": lambda _: aiobind.Failover(),
    "Weighted": lambda sources: aiobind.Weighted({source: 1 + at % 7 for at, source in enumerate(sources)}),
    "LeastConnections": lambda _: aiobind.LeastConnections(),
    "Sticky": lambda _: aiobind.Sticky(),
}

SERVER = """
import resource, socket, sys
server = socket.socket(fileno=int(sys.argv[1]))
while True:
    server.accept()[0].close()
"""


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def cost(sources: Sequence[str], policy: aiobind.Policy, target: tuple[str, int], connects: int) -> float:
    """Return the microseconds of CPU time for each connect."""
    async with aiobind.Connector(*sources, policy=policy) as connector:
        rounds: list[float] = []
        for _ in range(ROUNDS + 1):
            start = cpu()
            for _ in range(connects):
                sock = await connector.connect(*target)
                # A reset instead of TIME_WAIT, of which a kernel in a small machine soon has too many.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
            rounds.append((cpu() - start) / connects * 1e6)
        return statistics.median(rounds[1:])


def row(name: str, values: Sequence[float]) -> None:
    cells = [f"{value:7.0f} ({value / values[0]:4.2f})" for value in values]
    print(f"{name:<18}", *(f"{cell:>15}" for cell in cells), flush=True)


async def main(lab: Lab, target: tuple[str, int], connects: int) -> None:
    print(
        f"µs of CPU for each connect and close, and the ratio to the first column; {type(asyncio.get_running_loop())}"
    )
    print(f"\n{'sources':<18}", *(f"{count:>15,}" for count in COUNTS))
    addresses = [f"127.1.{at // 250}.{at % 250 + 1}" for at in range(COUNTS[-1])]
    lab.near.ip(*(f"address add {address}/32 dev lo" for address in addresses))
    for name, policy in POLICIES.items():
        row(
            name,
            [
                await cost(addresses[:count], policy(addresses[:count]), ("127.0.0.1", target[1]), connects)
                for count in COUNTS
            ],
        )
    print(f"\n{'addresses on n1':<18}", *(f"{count:>15,}" for count in ADDRESSES))
    values: dict[str, list[float]] = {"if!n1": [], "ifhost!n1!...": [], "198.18.1.2": []}
    there = 1
    for count in ADDRESSES:
        more = [f"address add 198.19.{at // 250}.{at % 250 + 1}/32 dev n1" for at in range(there, count)]
        for at in range(0, len(more), 1000):
            lab.near.ip(*more[at : at + 1000])
        there = count
        for name, costs in values.items():
            source = name.replace("...", "198.18.1.2")
            costs.append(await cost([source], aiobind.RoundRobin(), target, connects))
    for name, each in values.items():
        row(name, each)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a connect costs with many sources, and with many addresses.")
    parser.add_argument("--connects", type=int, default=300, metavar="N", help="in each of five rounds (default: 300)")
    parser.add_argument("--uvloop", action="store_true", help="on uvloop")
    options = parser.parse_args()
    if missing := available():
        sys.exit(f"flat: {missing}")
    isolate()
    runner = asyncio.Runner()
    if options.uvloop:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with Lab(nics=2) as lab:
        target = (lab.target_v4, 8080)
        with lab.far:
            far = socket.create_server(target, backlog=4096)
        near = socket.create_server(("127.0.0.1", 8080), backlog=4096)
        die_with_us = ctypes.CDLL(None).prctl
        servers = [
            subprocess.Popen(
                [sys.executable, "-c", SERVER, str(server.fileno())],
                pass_fds=[server.fileno()],
                preexec_fn=lambda: die_with_us(1, signal.SIGKILL),  # noqa: PLW1509 - there are no threads yet
            )
            for server in (far, near)
        ]
        try:
            with runner:
                runner.run(main(lab, target, options.connects))
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            for server in servers:
                server.kill()
                server.wait()
