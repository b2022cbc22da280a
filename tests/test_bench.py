"""The benchmarks run, and print what they promise; what they print is not judged here, for machines are noisy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from aiobind.lab import Lab

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize("options", [[], ["--uvloop"]], ids=["asyncio", "uvloop"])
def test_flat(lab: Lab, options: list[str]) -> None:
    command = [sys.executable, "-W", "error", str(BENCH / "flat.py"), "--connects", "2", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    rows = re.findall(r"^(\S+) +(?: +\d+ \( *\d+\.\d\d\)){4}$", ended.stdout, re.MULTILINE)
    policies = ["RoundRobin", "Random", "Failover", "Weighted", "LeastConnections", "Sticky"]
    assert rows == [*policies, "if!n0", "ifhost!n0!198.18.0.2", "198.18.0.2"]
