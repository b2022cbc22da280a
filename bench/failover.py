"""How long after a NIC is pulled is another source in use?

    python -m bench.failover [--quick] [--json FILE]

Two NICs and the policy ``Failover``: the first one is preferred, and lost. Measured is the time from the loss until

- the next connection: a program that connects again and again has one from the second NIC;
- requests in flight: 20 requests that wait for an answer by the first NIC, and are asked again when they fail, as a
  crawler does (``abort_on_link_down=True``), have all been answered by the second one. The server answers no request
  that comes by the first.

aiohttp has one source, by ``local_addr``, and is not told of the loss: what was in flight waits for its timeout.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import aiobind
from aiobind.lab import Lab
from bench import table
from bench.apart import LOOPS, RESET, apart, run, served
from bench.table import Table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from aiobind.lab import Nic

PORT, REQUESTS = 8080, 20
#: The kernel tells of carriers at most once a second (``net/core/link_watch.c``), whichever network namespace they are
#: in. Before a loss there has been quiet for longer, as there is in life.
QUIET = 1.1

#: What happens to the NIC: at which end of the link, and the command of ``ip``.
LOSSES = {
    "down": ("near", "link set n0 down"),  # by an administrator
    "no carrier": ("far", "link set f0 down"),  # the cable is pulled
    "deleted": ("near", "link del n0"),  # so is the device, as with USB
}


_IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "ip"


class Pull:
    """Takes a NIC away: an ``ip`` that runs already, so that its start is not measured, and brings it back."""

    def __init__(self, lab: Lab, loss: str) -> None:
        self._lab = lab
        end, self._command = LOSSES[loss]
        with lab.near if end == "near" else lab.far:
            self._ip = subprocess.Popen([_IP, "-batch", "-"], stdin=subprocess.PIPE, bufsize=0)

    def now(self) -> float:
        """Have it done; return the time before."""
        assert self._ip.stdin is not None
        before = time.monotonic()
        self._ip.stdin.write(f"{self._command}\n".encode())
        return before

    def restore(self) -> None:
        """Bring both ends to where they were, the IPv4 side of them."""
        assert self._ip.stdin is not None
        self._ip.stdin.close()
        self._ip.wait()
        lab, nic = self._lab, self._lab.nics[0]
        if "del" in self._command:
            far = f"/proc/{os.getpid()}/fd/{lab.far.fileno()}"
            lab.near.ip(f"link add {nic.name} type veth peer name {nic.far_name} netns {far}")
        lab.far.ip(f"link set {nic.far_name} up", f"addr replace {nic.gateway_v4}/24 dev {nic.far_name}")
        lab.near.ip(
            f"link set {nic.name} up",
            f"addr replace {nic.v4}/24 dev {nic.name}",
            f"route replace default via {nic.gateway_v4} dev {nic.name} metric 1000",
        )


# --- what is measured -----------------------------------------------------------------------------------------


async def next_connection(lab: Lab, pull: Pull) -> float:
    """Return the seconds from the loss to the next connection."""
    first, second = lab.nics
    connector = aiobind.Connector(f"if!{first.name}", f"if!{second.name}", policy=aiobind.Failover())
    loop = asyncio.get_running_loop()
    pulled: list[float] = []
    loop.call_later(0.05, lambda: pulled.append(pull.now()))
    async with connector:
        while True:
            sock = await connector.connect(lab.target_v4, PORT)
            now, address = time.monotonic(), sock.getsockname()[0]
            sock.setsockopt(*RESET)
            sock.close()
            if pulled and address == second.v4:
                return now - pulled[0]
            assert pulled or address == first.v4, "it did not leave by the first NIC"
            if not pulled:
                await asyncio.sleep(0.001)


def _bound_pool(first: Nic, second: Nic) -> Any:
    from aiobind.aiohttp import BoundTCPConnector

    sources = f"if!{first.name}", f"if!{second.name}"
    return BoundTCPConnector(*sources, policy=aiobind.Failover(), abort_on_link_down=True)


def _pool_of_one(first: Nic, _: Nic) -> Any:
    import aiohttp

    return aiohttp.TCPConnector(local_addr=(first.v4, 0))


def in_flight(pool: Callable[[Nic, Nic], Any]) -> Callable[[Lab, Pull], Awaitable[float]]:
    import aiohttp

    async def measured(lab: Lab, pull: Pull) -> float:
        """Return the seconds from the loss until all requests in flight have been answered."""
        async with aiohttp.ClientSession(connector=pool(*lab.nics)) as session:

            async def request() -> float:
                while True:
                    try:
                        async with session.get(f"http://{lab.target_v4}:{PORT}/") as response:
                            await response.read()
                            return time.monotonic()
                    except aiohttp.ClientError:
                        await asyncio.sleep(0.001)

            requests = [asyncio.create_task(request()) for _ in range(REQUESTS)]
            await asyncio.sleep(0.1)
            assert not any(one.done() for one in requests), "the server has answered what came by the first NIC"
            before = pull.now()
            return max(await asyncio.gather(*requests)) - before

    return measured


AIOBIND_NEXT, AIOBIND, AIOHTTP = (
    "aiobind: next connection",
    "aiobind: requests in flight",
    "aiohttp local_addr: requests in flight",
)
PEERS: dict[str, Callable[[], Callable[[Lab, Pull], Awaitable[float]]]] = {
    AIOBIND_NEXT: lambda: next_connection,
    AIOBIND: lambda: in_flight(_bound_pool),
    AIOHTTP: lambda: in_flight(_pool_of_one),
}


def losses(label: str, loop: str, rounds: int, quiet: float, longest: float) -> dict[str, list[float]]:
    """Return the milliseconds of each round, by what was lost how; what takes too long stands as *longest*."""
    found: dict[str, list[float]] = {loss: [] for loss in LOSSES}
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(nics=2))
        with lab.far:
            listener = socket.create_server((lab.target_v4, PORT), backlog=1024)
        silent = "" if label == AIOBIND_NEXT else lab.nics[0].v4
        stack.enter_context(served(listener, silent=silent))
        measured = PEERS[label]()
        for _ in range(rounds):
            for loss, values in found.items():
                pull = Pull(lab, loss)
                if loss == "no carrier":
                    time.sleep(quiet)
                try:
                    values.append(run(loop, _within(longest, measured(lab, pull))) * 1000)
                finally:
                    pull.restore()
    return found


async def _within(longest: float, measured: Awaitable[float]) -> float:
    try:
        async with asyncio.timeout(longest):
            return await measured
    except TimeoutError:
        return longest


def measure(quick: bool) -> Iterator[Table]:
    rounds, quiet, longest = (1, 0.0, 0.2) if quick else (7, QUIET, 2.0)
    found = Table(
        "failover",
        "Time from the loss of a NIC until the next source is in use",
        "ms",
        list(LOSSES),
        note="down: by an administrator; no carrier: the other end has gone down; deleted: the device is gone. "
        f"Requests in flight: until {REQUESTS} of them, which the lost NIC had, have been answered by the next one. "
        f"aiohttp has one source, and nobody tells it of the loss: what had not come stands as {longest:g} s.",
    )
    for label in PEERS:
        ours = label != AIOHTTP
        for loop in LOOPS:
            # Without the quiet before it the news of a carrier may be late by a second.
            by_loss = apart(losses, label, loop, rounds if ours else 1, quiet, 1.5 if quick and ours else longest)
            for loss, values in by_loss.items():
                found.add(label, loss, values, loop)
    yield found


if __name__ == "__main__":
    table.main(measure)
