"""See it work: HTTP requests leave from the sources that you name, and the far side is the witness.

    python examples/demo.py        or: make demo

First a few hundred pages from a server on loopback, through one session with five sources; then, where network
namespaces can be made, a lab of three NICs, of which one is pulled while requests are under way. Needs neither root nor
the internet. The exit status is 0 when all that it shows is as promised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
from aiohttp import web
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import aiobind
from aiobind.aiohttp import BoundTCPConnector
from aiobind.lab import Lab, available, isolate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

#: The sources of the first part, and the address that the server must see for each.
LOOPBACK = {
    "127.0.0.2": "127.0.0.2",
    "127.0.0.3": "127.0.0.3",
    "127.0.0.4": "127.0.0.4",
    "ifhost!lo!127.0.0.5": "127.0.0.5",
    "if!lo": "127.0.0.1",
}
SHARE, WORKERS = 120, 12  # pages for each source; requests at once
CONNECTS = 20  # for each source and family in the lab
PULLED = 300  # requests in each phase, while a NIC is pulled
WRONG = "[red]This is not what was promised!"


@asynccontextmanager
async def serving(*listeners: socket.socket, seconds: tuple[float, float] = (0, 0)) -> AsyncIterator[None]:
    """Answer each request with the address and the port that it comes from, as they are seen here."""

    async def page(request: web.BaseRequest) -> web.Response:
        peer = request.get_extra_info("peername")
        await asyncio.sleep(random.uniform(*seconds))
        return web.json_response(peer[:2])

    runner = web.ServerRunner(web.Server(page))
    await runner.setup()
    try:
        for listener in listeners:
            await web.SockSite(runner, listener).start()
        yield
    finally:
        await runner.cleanup()


async def ask(session: aiohttp.ClientSession, url: str) -> tuple[aiobind.BoundSource, str, int]:
    """Return where a request left from, as aiobind says; and the address and the port that the server saw."""
    async with session.get(url) as response:
        host, port = await response.json()
        return aiobind.bound_source(response), host, port


async def serve() -> None:
    """Print the port to serve on; serve until standard input ends, as it does with the demo, come what may."""
    listener = socket.create_server(("127.0.0.1", 0))
    async with serving(listener, seconds=(0.02, 0.04)):
        print(listener.getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)


@dataclass
class Tally:
    """What came of one source; ``peers`` are what the server saw, ``connects`` what aiobind says that it made."""

    seconds: list[float] = field(default_factory=list[float])
    peers: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    connects: int = 0
    wrong: int = 0

    def as_promised(self) -> bool:
        """Tell whether it had its share of the pages, each from its own address."""
        return len(self.seconds) == SHARE and not self.wrong and len(self.peers) == self.connects


async def fetch_pages(url: str, console: Console) -> dict[str, Tally]:
    tallies = {source: Tally() for source in LOOPBACK}
    left, right = TextColumn("  {task.description:<19}"), TextColumn("{task.fields[connections]} connections")
    columns = left, BarColumn(bar_width=24), MofNCompleteColumn(), right
    progress = Progress(*columns, console=console, transient=True)
    bars = {source: progress.add_task(source, total=SHARE, connections=0) for source in LOOPBACK}
    turns = iter(range(SHARE * len(LOOPBACK)))

    async def work(session: aiohttp.ClientSession) -> None:
        for _ in turns:
            start = time.perf_counter()
            bound, host, port = await ask(session, url)
            source = str(bound.source)
            tally = tallies[source]
            tally.seconds.append(time.perf_counter() - start)
            tally.peers.add((host, port))
            tally.wrong += (host, port) != (LOOPBACK[source], bound.port)
            progress.update(bars[source], advance=1, connections=len(tally.peers))

    connector = BoundTCPConnector(*LOOPBACK)
    async with aiohttp.ClientSession(connector=connector) as session:
        with progress:
            await asyncio.gather(*(work(session) for _ in range(WORKERS)))
        for stats in connector.stats():
            tallies[str(stats.source)].connects = stats.connects
    return tallies


def show_loopback(console: Console) -> bool:
    """Part one; return whether it is as promised."""
    pages = SHARE * len(LOOPBACK)
    # The server is a process of its own: on the client's loop, or in a thread beside it, each would wait for the other
    # one, and the latencies would be partly the demo's own making. In a group of its own it does not see Ctrl-C.
    pipe, command = subprocess.PIPE, [sys.executable, __file__, "--part=serve"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, process_group=0) as server:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/"
            sources = len(LOOPBACK)
            console.print(f"[bold]1. Loopback:[/] {pages} pages through one session that has {sources} sources.\n")
            tallies = asyncio.run(fetch_pages(url, console))
        finally:
            server.kill()

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("source", "requests", "connections", "the server saw", "median", "p99"):
        table.add_column(heading, justify="left" if heading in {"source", "the server saw"} else "right")
    for source, tally in tallies.items():
        seconds = tally.seconds or [0.0, 0.0]
        times = (f"{value * 1000:.1f} ms" for value in (median(seconds), quantiles(seconds, n=100)[-1]))
        saw = ", ".join(sorted({host for host, _ in tally.peers})) or "nothing"
        colour = "green" if tally.as_promised() else "red"
        table.add_row(source, str(len(tally.seconds)), str(tally.connects), f"[{colour}]{saw}", *times)
    console.print(Padding.indent(table, 2))
    right = all(tally.as_promised() for tally in tallies.values())
    console.print(f"\n  {'The server saw every page asked for from the right address.' if right else WRONG}")
    console.print("  [dim]The server takes 20 to 40 ms over a page.\n")
    return right


class Row(NamedTuple):
    """What came of the connections from one source by one family; SYNs are counted at the far end of each NIC."""

    source: str
    family: str
    expected: str
    syns: dict[str, int]
    from_its_address: bool

    def as_promised(self) -> bool:
        """Tell whether all connections, and only they, left by the NIC that was expected, from its address."""
        ways = [nic for nic, count in self.syns.items() if count]
        return self.from_its_address and ways == [self.expected] and self.syns[self.expected] >= CONNECTS


async def measure(lab: Lab) -> list[Row]:
    """Connect from each source in its turn, and see what arrives in that time, by any NIC."""
    n1, n2 = lab.nic("n1"), lab.nic("n2")
    cases = [
        *((f"if!{nic.name}", nic.name, address) for nic in lab.nics for address in (nic.v4, nic.v6)),
        *((f"ifhost!n1!{address}", "n1", address) for address in (n1.v4, n1.v6)),
        *((address, "n0", address) for address in (n2.v4, n2.v6)),  # no pin: the default route leads by n0
    ]
    with lab.far:
        listeners = [socket.create_server(("", 80), family=family) for family in (socket.AF_INET, socket.AF_INET6)]
    witness = lab.witness(syn_only=True)
    connector = BoundTCPConnector(*(f"if!{nic.name}" for nic in lab.nics), force_close=True)
    rows: list[Row] = []
    async with serving(*listeners), aiohttp.ClientSession(connector=connector) as session:
        for source, expected, address in cases:
            family, target = ("IPv6", f"[{lab.target_v6}]") if ":" in address else ("IPv4", lab.target_v4)
            with connector.use_source(source):
                answers = await asyncio.gather(*(ask(session, f"http://{target}/") for _ in range(CONNECTS)))
            came_by = Counter(packet.nic for packet in witness.packets())
            syns = {nic.name: came_by[nic.name] for nic in lab.nics}
            rows.append(Row(source, family, expected, syns, {host for _, host, _ in answers} == {address}))
    return rows


class Phase(NamedTuple):
    """What became of the requests of one phase: by which NIC the server was asked, and how long the slowest took."""

    name: str
    pages: dict[str, int]
    cut: int
    longest: float


async def pull(lab: Lab) -> list[Phase]:
    """Ask for pages by three NICs in turn; in the middle of the second phase one of them goes down."""
    nic_of = {nic.v4: nic.name for nic in lab.nics}
    with lab.far:
        listener = socket.create_server((lab.target_v4, 8080), backlog=WORKERS)
    connector = BoundTCPConnector(*(f"if!{nic.name}" for nic in lab.nics), abort_on_link_down=True)
    phases: list[Phase] = []
    async with serving(listener, seconds=(0.01, 0.02)), aiohttp.ClientSession(connector=connector) as session:

        async def run(name: str, middle: Callable[[], object] | None = None) -> None:
            pages, waits, cut, turns = Counter[str](), [0.0], 0, iter(range(PULLED))

            async def work() -> None:
                nonlocal cut
                for turn in turns:
                    if turn == PULLED // 2 and middle is not None:
                        middle()
                    start = time.perf_counter()
                    while True:
                        try:
                            _, host, _ = await ask(session, f"http://{lab.target_v4}:8080/")
                        except aiohttp.ClientOSError:  # its connection was cut: ask again
                            cut += 1
                        else:
                            break
                    pages[nic_of[host]] += 1
                    waits.append(time.perf_counter() - start)

            await asyncio.gather(*(work() for _ in range(WORKERS)))
            phases.append(Phase(name, {nic.name: pages[nic.name] for nic in lab.nics}, cut, max(waits)))

        await run("all are up")
        await run("n1 goes down", lambda: lab.near.ip("link set n1 down"))
        await run("without n1")
        lab.near.ip("link set n1 up")
        async with asyncio.timeout(5):
            while connector.stats()[1].connections == 0:  # a single request tries n1 before others follow
                await ask(session, f"http://{lab.target_v4}:8080/")
        await run("n1 is back")
    return phases


def show_pull(console: Console, phases: list[Phase]) -> bool:
    """Part three; return whether it is as promised."""
    console.print(f"\n[bold]3. One NIC is pulled:[/] {PULLED} requests in each phase, three NICs in turn.\n")
    table = Table("phase", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in (*phases[0].pages, "cut", "lost", "longest wait"):
        table.add_column(heading, justify="right")
    for phase in phases:
        lost = PULLED - sum(phase.pages.values())
        counts = (str(count or "-") for count in (*phase.pages.values(), phase.cut))
        table.add_row(phase.name, *counts, str(lost), f"{phase.longest * 1000:.0f} ms")
    console.print(Padding.indent(table, 2))
    even = [PULLED // 3] * 3
    first, _, without, back = (list(phase.pages.values()) for phase in phases)
    right = first == even and without == [PULLED // 2, 0, PULLED // 2] and back == even
    text = "No page was lost; the others took n1's share, and gave it back."
    console.print(f"\n  {text if right else WRONG}")
    console.print("  [dim]What was under way by n1 was cut at once, and asked for again.")
    return right


def show_lab(console: Console) -> bool:
    """Parts two and three; return whether it is as promised, or cannot be shown here."""
    with console.status("making a lab of three NICs"):
        if reason := available():
            console.print("[bold]2. Three NICs:[/] no lab can be made here:", escape(reason), soft_wrap=True)
            return True
        # A process that moves to namespaces of its own must have no threads yet, and cannot come back.
        output = subprocess.check_output([sys.executable, __file__, "--part=lab"], text=True, process_group=0)
    measured, phases = json.loads(output)
    rows = [Row(*row) for row in measured]

    console.print(f"[bold]2. Three NICs:[/] {CONNECTS} connections from each source, counted at the far end.\n")
    table = Table("source", "family", "expected", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for nic in rows[0].syns:
        table.add_column(nic, justify="right")
    table.add_column()
    for row in rows:
        pinned = "!" in row.source
        verdict = f"[green]only by {row.expected}" if pinned else f"[yellow]by {row.expected}: no pin"
        counts = (str(count or "-") for count in row.syns.values())
        table.add_row(row.source, row.family, row.expected, *counts, verdict if row.as_promised() else "[red]WRONG")
    console.print(Padding.indent(table, 2))
    right = all(row.as_promised() for row in rows)
    console.print(f"\n  {'Each pinned source left by its own NIC, and by no other.' if right else WRONG}")
    console.print("  [dim]An address alone is no pin: n2's went the way of the default route, by n0.")
    return show_pull(console, [Phase(*phase) for phase in phases]) and right


def main() -> int:
    parser = argparse.ArgumentParser(description="Show that connections leave from the sources that were named.")
    parser.add_argument("--part", choices=("serve", "lab"), help=argparse.SUPPRESS)
    part = parser.parse_args().part
    if part == "serve":
        asyncio.run(serve())
    elif part == "lab":
        isolate()
        with Lab(nics=3) as lab:
            json.dump([asyncio.run(measure(lab)), asyncio.run(pull(lab))], sys.stdout)
    else:
        console = Console(highlight=False)
        return 0 if all([show_loopback(console), show_lab(console)]) else 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (aiohttp.ClientError, subprocess.CalledProcessError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
