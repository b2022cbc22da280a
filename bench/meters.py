"""Law: three ways to measure a worker of `bench.peers`: by CPU time, by instructions, and by system calls.

CPU time is that of the worker's process, user and system. The workers take turns in rounds, so that what else the
machine does hits all alike. Instructions (user, by callgrind) and system calls (by strace) hardly move at all: they are
the difference between a long run and a short one, so that what is done once is not in.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from bench.table import Table

CHECKOUT = Path(__file__).parent.parent
LONGEST = 300.0  # seconds for one run; the longest takes some, under callgrind


@dataclass(frozen=True)
class Effort:
    """How much is done for a figure."""

    #: rounds, and about how many seconds of CPU a peer takes in each
    rounds: int
    seconds: float
    #: how often before anything is measured: 200 gives each of 100 sources a connection to keep
    warm_up: int
    #: the two runs of which the difference is taken, as multiples of 40 or of those at once
    short: int
    long: int

    def lengths(self, at_once: int) -> tuple[int, int]:
        unit = max(at_once, 40)
        return self.short * unit, self.long * unit


FULL = Effort(rounds=9, seconds=0.1, warm_up=200, short=2, long=6)
QUICK = Effort(rounds=2, seconds=0.01, warm_up=4, short=1, long=2)


#: What runs, each at the head of a group of its own: what it has started in turn ends with it.
running: set[subprocess.Popen[str]] = set()


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


# --- one worker ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A peer on a loop: the command of its worker, and how many at once for each column that it is to fill."""

    label: str
    loop: str
    command: tuple[str, ...]
    columns: tuple[tuple[str, int], ...]


class Worker:
    """A peer at work, in a ``with`` block."""

    def __init__(self, case: Case, under: Sequence[str] = ()) -> None:
        self.case = case
        self.process = subprocess.Popen(
            [*under, *case.command],
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            process_group=0,
        )

    def __enter__(self) -> Self:
        running.add(self.process)
        return self

    def __exit__(self, *_: object) -> None:
        running.discard(self.process)
        self.process.terminate()
        self.process.communicate()

    def run(self, count: int, at_once: int) -> float:
        """Return the seconds of CPU that *count* have taken."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        limit = threading.Timer(LONGEST, kill, (self.process,))
        limit.start()
        try:
            print(count, at_once, file=stdin)
            taken = stdout.readline()
        finally:
            limit.cancel()
        if not taken:
            raise RuntimeError(f"{self.case} has failed:\n{self.end()}")
        return float(taken.split()[0])

    def end(self) -> str:
        """Have it end by itself, and return what it has to say."""
        return self.process.communicate()[1]


def times(count: float, at_once: int) -> int:
    """Return about *count* as a multiple of *at_once*: twice that at least."""
    return max(2, round(count / at_once)) * at_once


# --- CPU ----------------------------------------------------------------------------------------------------


def cpu(cases: Sequence[Case], result: Table, effort: Effort) -> None:
    rounds: dict[tuple[str, str, str], list[float]] = {}
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(case)) for case in cases]  # which start beside each other
        turns: list[tuple[Worker, str, int, int]] = []
        for worker in workers:
            for column, at_once in worker.case.columns:
                trial = times(effort.warm_up, at_once)
                worker.run(trial, at_once)
                each = worker.run(trial, at_once) / trial
                turns.append((worker, column, times(effort.seconds / each, at_once), at_once))
        for _ in range(effort.rounds):
            for worker, column, count, at_once in turns:
                key = worker.case.label, column, worker.case.loop
                rounds.setdefault(key, []).append(worker.run(count, at_once) / count * 1e6)
    for (label, column, loop), taken in rounds.items():
        result.add(label, column, taken, loop)


# --- instructions -------------------------------------------------------------------------------------------


def instructions(cases: Sequence[Case], result: Table, effort: Effort) -> None:
    with ThreadPoolExecutor(2) as pool:
        try:
            for case, counted in zip(cases, pool.map(partial(count_instructions, effort=effort), cases), strict=True):
                for column, figure in counted.items():
                    result.add(case.label, column, figure, case.loop)
        except BaseException:
            for process in [*running]:  # their threads wait for them, and the pool for its threads
                kill(process)
            raise


def count_instructions(case: Case, effort: Effort) -> dict[str, float]:
    """Return the thousands of each one, by column."""
    found: dict[str, float] = {}
    # They are not counted until it has started and warmed up, for it is ten times as slow then.
    callgrind = ("valgrind", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null")
    with TemporaryDirectory(prefix="aiobind-bench-") as folder, Worker(case, (*callgrind, pipes(folder))) as worker:
        for _, at_once in case.columns:
            worker.run(times(effort.warm_up, at_once), at_once)
        control(worker, folder, "-i", "on")
        for column, at_once in case.columns:
            counts = effort.lengths(at_once)
            totals = [executed(worker, folder)]
            for count in counts:
                worker.run(count, at_once)
                totals.append(executed(worker, folder))
            found[column] = difference(counts, (totals[1] - totals[0], totals[2] - totals[1])) / 1000
    return found


def pipes(folder: str) -> str:
    """Return the option for where valgrind has the pipes by which it is told; who is killed leaves them."""
    return f"--vgdb-prefix={folder}/vgdb"


def control(worker: Worker, folder: str, *arguments: str) -> str:
    command = ["callgrind_control", pipes(folder), *arguments, str(worker.process.pid)]
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, stdout=pipe, stderr=both, text=True, process_group=0) as process:
        running.add(process)
        told, _ = process.communicate()
        running.discard(process)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}\n{told}")
    return told


def executed(worker: Worker, folder: str) -> int:
    """Return how many instructions its threads have executed so far."""
    told = re.findall(r"Th \d+ +([\d,]+)", control(worker, folder, "-e"))
    return sum(int(figure.replace(",", "")) for figure in told)


def difference(counts: tuple[int, int], totals: tuple[int, int]) -> float:
    """Return the cost of each one, without what is done once."""
    return (totals[1] - totals[0]) / (counts[1] - counts[0])


# --- system calls -------------------------------------------------------------------------------------------

#: What a pinned connect cannot do without; bind pins its address, which a route could name otherwise (``src``). What
#: sets its options, and the loop's own wait, may be as many as they are (by io_uring_enter libuv tells epoll of several
#: descriptors at once).
NEEDED = {"socket": 1, "bind": 1, "connect": 1, "getsockopt": 1, "getsockname": 1, "close": 1}
FREE = re.compile(r"setsockopt|epoll_\w+|io_uring_enter")
BEYOND = f'"beyond": all but the options, the wait of the loop, and one each of {", ".join(NEEDED)}.'


def system_calls(cases: Sequence[Case], result: Table, effort: Effort) -> None:
    """Enter how many there are of each, of all, and of those beyond what is needed; a column for each name is added."""
    counts = effort.lengths(1)
    found: dict[Case, dict[str, float]] = {}
    for case in cases:
        short, long = (count_calls(case, count) for count in counts)
        # To a tenth: what the allocator asks of the system now and then belongs to no connect.
        each = {name: round(difference(counts, (short[name], long[name])), 1) for name in long}
        found[case] = {name: number for name, number in each.items() if number > 0}
    names = {name for each in found.values() for name in each}
    result.columns = ["all", "beyond", *sorted(names, key=lambda name: (name not in NEEDED, name))]
    for case, each in found.items():
        beyond = sum(max(0.0, each[name] - NEEDED.get(name, 0)) for name in each if not FREE.fullmatch(name))
        for column, number in {"all": sum(each.values()), "beyond": beyond, **each}.items():
            result.add(case.label, column, round(number, 1), case.loop)


def count_calls(case: Case, count: int) -> Counter[str]:
    """Return the system calls of a worker's whole life, by name."""
    with Worker(case, ("strace", "-f", "-c")) as worker:
        worker.run(count, 1)
        summary = worker.end()
    lines = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?(\w+)$", summary, re.MULTILINE)
    return Counter({name: int(calls) for calls, name in lines if name != "total"})


# --- the three ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meter:
    """A way to measure. ``trials`` are commands that succeed where its tools can be used."""

    unit: str
    measure: Callable[[Sequence[Case], Table, Effort], None]
    trials: tuple[str, ...] = ()

    def unusable(self) -> str:
        """Return why it cannot be used here, or nothing."""
        for trial in self.trials:
            words = trial.split()
            if shutil.which(words[0]) is None:
                return f"{words[0]} is not installed"
            tried = subprocess.run(words, capture_output=True, text=True, check=False)
            if tried.returncode:
                return f"{words[0]} does not work here: {' '.join(tried.stderr.splitlines()[-1:])}"
        return ""


CPU = Meter("µs of CPU for each", cpu)
INSTRUCTIONS = Meter(
    "thousands of user instructions for each",
    instructions,
    ("valgrind --vgdb=no --tool=callgrind --callgrind-out-file=/dev/null true", "callgrind_control --version"),
)
SYSTEM_CALLS = Meter("system calls for each", system_calls, ("strace -f -c true",))
