"""The fuzzers of ``fuzz.py``, for a few seconds each; ``make fuzz`` gives them longer."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUZZ = ROOT / "tests" / "fuzz.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="no atheris: it has wheels for CPython 3.11 to 3.14 on x86_64 Linux alone",
)


def run(target: str, folder: Path, *options: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a fuzzer, or *code* in its place, in *folder*, where it puts what it finds."""
    what = ["-c", code, target] if code else [str(FUZZ), target]
    command = [sys.executable, *what, *options]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{FUZZ.parent}"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=50, check=False
    )


@pytest.mark.parametrize("target", ["grammar", "netlink"])
def test_a_few_seconds_find_nothing(target: str, tmp_path: Path) -> None:
    done = run(target, tmp_path, "--seconds=3")
    found = [(path.name, path.read_bytes()) for path in tmp_path.iterdir()]
    assert (done.returncode, found) == (0, []), done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs, done.stderr[-3000:]
    assert int(runs[1]) > 200
    new = re.search(r"new_units_added: +(\d+)", done.stderr)
    assert new, done.stderr[-3000:]
    assert int(new[1]) > 20, "no input reached a new branch: what is fuzzed is not instrumented"


#: Faults as they could be made, and what they raise: a length that is not looked at, a name that need not be UTF-8.
PLANTED = {
    "grammar": ("import fuzz, re; fuzz._sources._LENGTH = re.compile('.*'); fuzz.main()", "ValueError"),
    "netlink": (
        "import fuzz; from aiobind._platform import linux; linux._text = lambda value: value.decode(); fuzz.main()",
        "UnicodeDecodeError",
    ),
}


@pytest.mark.parametrize("target", PLANTED)
def test_a_planted_fault_is_found(target: str, tmp_path: Path) -> None:
    code, error = PLANTED[target]
    done = run(target, tmp_path, "--seconds=20", "--seed=1", code=code)
    assert done.returncode != 0, "not found"
    assert error in done.stdout + done.stderr
    (found,) = tmp_path.glob("crash-*")
    assert run(target, tmp_path, str(found)).returncode == 0, "without the fault it is an input like others"
