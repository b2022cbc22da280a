"""Law: `make test` on all that a small machine has: two processes of pytest, each with its own half of the files.

    python tests/halves.py [pytest's arguments]

Other arguments than ``--last-failed`` choose tests by themselves, and get one process. Not pytest-xdist: its workers
have a thread before the session moves into its namespaces, and with threads nobody may enter a user namespace
(unshare(2), EINVAL), so that without root there would be no lab.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent

#: Seconds that the slow ones take; all others take about three.
SECONDS = {
    "crawler": 140,
    "spread": 65,
    "bench": 70,
    "faults": 40,
    "leaks": 40,
    "clients": 38,
    "httpx": 30,
    "dask": 20,
    "scrapy": 15,
    "anyio": 13,
    "client_examples": 13,
    "datagram": 10,
    "doors": 9,
    "dial": 38,
    "plan": 30,
    "connector": 30,
    "examples": 30,
    "dns": 28,
    "egress": 28,
    "aiohttp": 26,
    "ports": 25,
    "limits": 16,
    "metrics": 14,
    "fuzz": 18,
    "lab": 15,
    "factory": 14,
    "platform": 14,
    "polled": 14,
    "interfaces": 13,
    "sockets": 13,
    "policy": 11,
    "sources": 10,
    "resolve": 9,
}


def halves() -> tuple[list[str], list[str]]:
    """Give each file, the slow ones first, to the half that has less to do."""
    parts: tuple[list[str], list[str]] = [], []
    loads = [0.0, 0.0]
    names = {path: SECONDS.get(path.stem.removeprefix("test_"), 3) for path in sorted(HERE.glob("test_*.py"))}
    for path in sorted(names, key=lambda path: -names[path]):
        at = loads.index(min(loads))
        parts[at].append(str(path))
        loads[at] += names[path]
    return parts


def main(arguments: list[str]) -> int:
    """Return pytest's exit status; that of the half that fares worse."""
    pytest = [sys.executable, "-m", "pytest"]
    if (arguments and arguments != ["--last-failed"]) or (os.cpu_count() or 1) < 2:
        return subprocess.run([*pytest, *arguments], check=False).returncode
    start = time.monotonic()
    first, second = (
        # What failed last is remembered by each half for itself.
        [*pytest, "-o", f"cache_dir=.pytest_cache/{number}", "--last-failed-no-failures=none", *arguments, *files]
        for number, files in enumerate(halves())
    )
    with tempfile.TemporaryFile("w+") as kept, subprocess.Popen(second, stdout=kept, stderr=kept) as other:
        try:
            with subprocess.Popen(first, stdout=subprocess.PIPE, text=True, errors="replace") as process:
                assert process.stdout is not None
                lines: list[str] = []
                for line in process.stdout:
                    print(line, end="", flush=True)
                    lines.append(line)
            print("\n=== the other half", flush=True)
            other.wait()
        except BaseException:
            other.terminate()
            raise
        kept.seek(0)
        rest = kept.read()
        print(rest, end="", flush=True)
    counts: Counter[str] = Counter()
    for summary in (lines[-1] if lines else "", rest.strip().rpartition("\n")[2]):
        for count, what in re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed|deselected)", summary):
            counts[what] += int(count)
    counted = ", ".join(f"{count} {what}" for what, count in counts.items()) or "no tests ran"
    print(f"\n=== both halves: {counted} in {time.monotonic() - start:.0f} s", flush=True)
    statuses = {process.returncode, other.returncode} - {0, 5}  # 5: nothing to do
    return max(statuses, key=abs, default=0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
