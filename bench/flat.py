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

ROUNDS, PORT = 5, 8080
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
import socket, sys
server = socket.socket(fileno=int(sys.argv[1]))
while True:
    server.accept()[0].close()
"""


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def costs(connectors: Sequence[aiobind.Connector], target: tuple[str, int], connects: int) -> list[float]:
    """Return the microseconds of CPU time for each connect, by each connector; they take turns, for noise."""
    rounds: list[list[float]] = [[] for _ in connectors]
    for turn in range(ROUNDS + 1):
        for connector, taken in zip(connectors, rounds, strict=True):
            start = cpu()
            for _ in range(connects):
                sock = await connector.connect(*target)
                # A reset instead of TIME_WAIT, of which a kernel in a small machine soon has too many.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
            if turn:  # the first one warms up
                taken.append((cpu() - start) / connects * 1e6)
    for connector in connectors:
        await connector.aclose()
    return [statistics.median(taken) for taken in rounds]


def show(name: str, values: Sequence[float]) -> None:
    cells = [f"{value:7.0f} ({value / values[0]:4.2f})" for value in values]
    print(f"{name:<18}", *(f"{cell:>15}" for cell in cells), flush=True)


async def main(lab: Lab, connects: int) -> None:
    kind = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    print(f"µs of CPU for each connect and close, and the ratio to the first column; {kind}")
    print(f"\n{'sources':<18}", *(f"{count:>15,}" for count in COUNTS))
    addresses = [f"127.1.{at // 250}.{at % 250 + 1}" for at in range(COUNTS[-1])]
    lab.near.ip(*(f"address add {address}/32 dev lo" for address in addresses))
    for name, policy in POLICIES.items():
        connectors = [aiobind.Connector(*addresses[:count], policy=policy(addresses[:count])) for count in COUNTS]
        show(name, await costs(connectors, ("127.0.0.1", PORT), connects))

    for nic, count in zip(lab.nics, ADDRESSES, strict=True):
        subnet = int(nic.name[1:]) * 40
        more = [f"address add 10.1.{subnet + at // 250}.{at % 250 + 1}/32 dev {nic.name}" for at in range(1, count)]
        for at in range(0, len(more), 1000):
            lab.near.ip(*more[at : at + 1000])
    print(f"\n{'addresses':<18}", *(f"{count:>15,}" for count in ADDRESSES))
    for name in ("if!{0.name}", "ifhost!{0.name}!{0.v4}", "{0.v4}"):
        connectors = [aiobind.Connector(name.format(nic)) for nic in lab.nics]
        show(name.format(lab.nics[0]), await costs(connectors, (lab.target_v4, PORT), connects))


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
    with Lab(nics=len(ADDRESSES)) as lab:
        with lab.far:
            far = socket.create_server((lab.target_v4, PORT), backlog=4096)
        near = socket.create_server(("127.0.0.1", PORT), backlog=4096)
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
                runner.run(main(lab, options.connects))
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            for server in servers:
                server.kill()
                server.wait()
            far.close()
            near.close()
