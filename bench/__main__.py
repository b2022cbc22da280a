"""Runs every measurement, each in a process and in network namespaces of its own, and writes the report.

    python -m bench [--only NAME ...] [--quick] [--output bench/results]

What is measured anew replaces what the results had of it; the rest of them stays if it was found on the same machine
with the same versions. A measurement that fails is told of at the end; the others run, and are reported.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from aiobind.lab import available
from bench import report, table

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Each is a module of this folder; the order is that of the report.
MEASUREMENTS = ("compare", "ports", "lag", "flat", "memory", "failover", "imports")
PEERS = ("aiobind", "aiohttp", "aiohappyeyeballs", "anyio", "curl_cffi", "httpx", "httpx2", "pycurl", "uvloop")
CHECKOUT = Path(__file__).parent.parent
MINUTES = 20  # for one measurement; the longest takes far less


def machine(*, quick: bool) -> dict[str, str]:
    """Describe what the figures depend on."""
    found = {"CPU": _cpu(), "kernel": f"{platform.system()} {platform.release()}"}
    found["Python"] = f"{platform.python_implementation()} {platform.python_version()}"
    for name in PEERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if go := shutil.which("go"):
        told = subprocess.run([go, "version"], capture_output=True, text=True, check=False)
        found["Go"] = told.stdout.removeprefix("go version go").partition(" ")[0].strip()
    if quick:
        found["rounds"] = "few: made with --quick, so that nothing here means anything"
    found["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    return found


def _cpu() -> str:
    model = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def run(name: str, path: Path, *, quick: bool) -> str | None:
    """Run one measurement, whose tables go to *path*; return what went wrong, if anything."""
    command = [sys.executable, "-m", f"bench.{name}", "--json", str(path), *(["--quick"] if quick else [])]
    die_with_us = ctypes.CDLL(None).prctl
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=lambda: die_with_us(1, signal.SIGTERM),  # noqa: PLW1509 - there are no threads
    )
    try:
        status = process.wait(MINUTES * 60)
    except subprocess.TimeoutExpired:
        return f"it did not end within {MINUTES} minutes"
    finally:
        # Whatever ends us ends it, and all that it has started: first as Ctrl-C does, so that it cleans up.
        for end in (signal.SIGINT, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, end)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
    return f"exit status {status}" if status else None


def kept(folder: Path, about: dict[str, str]) -> list[table.Table]:
    """Return the tables that *folder* has from the same machine and versions, whatever the day."""
    try:
        before = report.Results.load(folder)
    except FileNotFoundError:
        return []
    if {**before.machine, "date": ""} == {**about, "date": ""}:
        return before.tables
    print(f"{folder}: what it had is from another machine or other versions, and is left out", file=sys.stderr)
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return 1 if anything has failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="What a connect costs, beside every peer.")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=" ".join(MEASUREMENTS))
    parser.add_argument("--quick", action="store_true", help="few rounds and small counts: does it run?")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "bench/results", help="default: bench/results")
    options = parser.parse_args(arguments)
    if missing := available():
        sys.exit(f"no lab here: {missing}")
    plots = importlib.util.find_spec("matplotlib") is not None
    about = machine(quick=options.quick)
    names = [name for name in MEASUREMENTS if name in (options.only or MEASUREMENTS)]
    found: list[table.Table] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="aiobind-bench-") as folder:
        for at, name in enumerate(names, 1):
            print(f"[{at}/{len(names)}] {name}", end="\n\n", flush=True)
            start, path = time.monotonic(), Path(folder, f"{name}.json")
            if wrong := run(name, path, quick=options.quick):
                failed[name] = wrong
            with contextlib.suppress(FileNotFoundError):
                found += table.load(path)
            print(f"[{at}/{len(names)}] {name}: {wrong or f'{time.monotonic() - start:.0f} s'}", end="\n\n", flush=True)
    before = kept(options.output, about) if options.only else []
    tables = {one.name: one for one in (*before, *found)}  # what is measured anew takes the place of the old
    results = report.Results(about, list(tables.values()))
    report.write(results, options.output, plots=plots)
    verdicts = report.judge(results.tables)
    for verdict in verdicts:
        if verdict.figure is not None:
            print(f"{verdict.claim.text}: {verdict.bound}, found {verdict.found}: {verdict.word}")
    print(f"{sum(verdict.figure is None for verdict in verdicts)} of {len(verdicts)} claims were not measured")
    print(f"\n{options.output / 'RESULTS.md'}{'' if plots else '; no plots: matplotlib is not installed'}")
    for name, wrong in failed.items():
        print(f"{name} failed: {wrong}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it cleans up as after Ctrl-C
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
