"""What ``import aiobind`` costs a program that has asyncio anyway: CPU of the one statement, in a fresh interpreter."""

import importlib.util
import os
import subprocess
import sys
import tempfile

from bench import table

PROGRAM = "import time; start = time.process_time(); {}; print((time.process_time() - start) * 1e3)"
STATEMENTS = {
    "asyncio, ipaddress": "import asyncio, ipaddress",
    "aiobind": "import aiobind",
    "aiobind.aiohttp": "import aiobind.aiohttp",
    "aiohttp": "import aiohttp",
    "anyio": "import anyio, anyio._backends._asyncio",  # which its first call imports
    "httpx": "import httpx",
}


def measure(quick: bool) -> list[table.Table]:
    # The compiled files are there whatever PYTHONDONTWRITEBYTECODE says, and whoever owns the folders.
    with tempfile.TemporaryDirectory(prefix="aiobind-bench-") as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return [imports(quick, environment | {"PYTHONPYCACHEPREFIX": folder})]


def imports(quick: bool, environment: dict[str, str]) -> table.Table:
    found = table.Table(
        "import", "Import", "ms of CPU", ["time"], baseline="asyncio, ipaddress", note="From compiled files, warm."
    )
    statements = dict(STATEMENTS)
    for name in [
        name for name in statements if importlib.util.find_spec(name.partition(",")[0].partition(".")[0]) is None
    ]:
        found.skipped[name] = "not installed"
        del statements[name]
    rounds: dict[str, list[float]] = {name: [] for name in statements}
    for turn in range(3 if quick else 22):
        for name, statement in statements.items():
            command = [sys.executable, "-c", PROGRAM.format(statement)]
            output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            if turn:  # the first one compiles
                rounds[name].append(float(output))
    for name, taken in rounds.items():
        found.add(name, "time", taken)
    return found


if __name__ == "__main__":
    table.main(measure)
