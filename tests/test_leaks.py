"""The leak table (``leakmodel.py``, ``leaktable.py``): the default selection runs once, and each state has to hold."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import leakmodel
import leaktable
import pytest
from conftest import _need_lab

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.timeout(400)  # the first test waits for all of it: 40 s with two idle cores

Row = dict[str, Any]


def _run(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[Row]]:
    command = [sys.executable, leaktable.__file__, "--json", str(folder / "results.json"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    return done, [json.loads(line) for line in (folder / "results.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[Row]]:
    _need_lab()
    return _run(tmp_path_factory.mktemp("leaks"))


@pytest.fixture(scope="module")
def ours(run: tuple[subprocess.CompletedProcess[str], list[Row]]) -> list[Row]:
    return [row for row in run[1] if row["client"] not in leakmodel.PEERS]


def _told(rows: list[Row]) -> str:
    return "\n".join(str(leaktable.Result(**row)) for row in rows)


@pytest.mark.parametrize("state", [state.name for state in leakmodel.STATES])
def test_nothing_leaks_and_every_promise_holds(ours: list[Row], state: str) -> None:
    rows = [row for row in ours if row["state"] == state]
    bad = [row for row in rows if row["verdict"] not in ("right", "failed closed")]
    assert not bad, f"{len(bad)} of {len(rows)}:\n{_told(bad)}"


def test_each_source_meets_each_target_in_each_state_once(ours: list[Row]) -> None:
    kinds = (leakmodel.STATES, leakmodel.SOURCES, leakmodel.TARGETS)
    product = itertools.product(*([each.name for each in kind] for kind in kinds))
    assert len(ours) >= 400
    assert sorted((row["state"], row["client"], row["target"]) for row in ours) == sorted(product)


def test_the_command_tells_what_came_of_it(run: tuple[subprocess.CompletedProcess[str], list[Row]]) -> None:
    done, rows = run
    bad = [row for row in rows if row["client"] not in leakmodel.PEERS and row["verdict"] in ("leaked", "wrong")]
    assert done.returncode == bool(bad)
    assert not done.stderr
    figures = {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines() if line[:20].strip()}
    assert int(figures["aiobind"][0]) == len(leakmodel.selection())


def test_the_readme_has_the_table() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for part in leakmodel.table().strip().split("\n\n"):
        assert part in readme


def test_peers_leak_where_aiobind_does_not(run: tuple[subprocess.CompletedProcess[str], list[Row]]) -> None:
    """Else the harness would be blind, or the comparison unfair."""
    for peer in leakmodel.PEERS if shutil.which("curl") else leakmodel.PEERS[2:]:
        rows = [row for row in run[1] if row["client"] == peer]
        verdicts = {row["verdict"] for row in rows}
        assert len(rows) == 2 * len(leakmodel.STATES) * len(leakmodel.TARGETS)
        assert {"right", "failed closed", "leaked"} <= verdicts, peer


# --- the harness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "cases", "seen"),
    [
        ("pin", "up | if!n1 | v4 |", ["n0", leakmodel.H4]),
        ("pin", "no route | ifhost v4 | v4 |", ["n0", leakmodel.H4]),
        ("pin", "no address | if!n1, if!n2 | v4 |", ["n0", "198.18.2.2"]),
        ("bind", "up | v4 | v4 |", ["n0", "198.18.0.2"]),
    ],
)
def test_it_sees_a_leak(tmp_path: Path, broken: str, cases: str, seen: list[str]) -> None:
    _need_lab()
    done, rows = _run(tmp_path, "--broken", broken, "--no-peers", "-k", cases)
    assert done.returncode == 1
    assert [row["verdict"] for row in rows] == ["leaked"]
    assert rows[0]["seen"] == [seen]


def test_it_sees_what_is_late_or_another_error_or_not_as_promised() -> None:
    environment = leakmodel.Environment(leakmodel.STATES[0], "metric", 0, "root")
    case = leakmodel.Case(environment, "if!n1", leakmodel.TARGETS[0])
    failed, left = leakmodel._failed("BindError", 1), leakmodel.Left(("n1",), (leakmodel.H4,), True, "n1")
    ended, connected = leaktable.Ended("BindError", 1), leaktable.Ended("connected", 0, "n1", leakmodel.H4)
    by_n1 = [("n1", leakmodel.H4)]
    judged: Callable[..., tuple[str, str]] = leaktable._judged
    assert judged(case, failed, ended, 0.1, []) == ("failed closed", "")
    assert judged(case, failed, ended, 0.6, []) == ("wrong", "late")
    assert judged(case, failed, ended._replace(errno=2), 0.1, []) == ("wrong", "another error")
    assert judged(case, failed, ended, 0.1, by_n1) == ("leaked", "it failed, and a packet left")
    assert judged(case, failed, connected, 0.1, by_n1) == ("wrong", "something left")
    assert judged(case, left, connected, 0.1, by_n1) == ("right", "")
    assert judged(case, left, connected, 0.1, []) == ("wrong", "not as promised")
    assert judged(case, left, connected, 0.1, [*by_n1, ("n0", leakmodel.H4)]) == ("leaked", "by n0")
    assert judged(case, left, connected, 0.1, [("n1", "198.18.0.2")]) == ("leaked", "from 198.18.0.2")
    assert judged(case, left, leaktable.Ended("silent"), 5.0, by_n1) == ("wrong", "the answer")
    assert judged(case, left, connected._replace(interface=None), 0.1, by_n1)[0] == "wrong"
    assert judged(case, left, connected._replace(address=leakmodel.S4), 0.1, by_n1)[0] == "wrong"


# --- the selection ------------------------------------------------------------------------------------------


def test_every_two_values_of_the_factors_meet() -> None:
    factors = {
        "routing": (lambda case: case.environment.routing, leakmodel.ROUTINGS),
        "rp_filter": (lambda case: case.environment.rp_filter, leakmodel.RP_FILTERS),
        "privilege": (lambda case: case.environment.privilege, leakmodel.PRIVILEGES),
        "loop": (lambda case: case.environment.loop, leakmodel.LOOPS),
        "source": (lambda case: case.client, [source.name for source in leakmodel.SOURCES]),
        "target": (lambda case: case.target.name, [target.name for target in leakmodel.TARGETS]),
        "state": (lambda case: case.environment.state.name, [state.name for state in leakmodel.STATES]),
    }
    cases = leakmodel.selection()
    for one, other in itertools.combinations(factors, 2):
        (first, firsts), (second, seconds) = factors[one], factors[other]
        met = {(first(case), second(case)) for case in cases}
        assert met == set(itertools.product(firsts, seconds)), (one, other)


def test_the_full_product() -> None:
    cases = leakmodel.selection(full=True)
    kinds = (
        *(leakmodel.STATES, leakmodel.SOURCES, leakmodel.TARGETS),
        *(leakmodel.ROUTINGS, leakmodel.RP_FILTERS, leakmodel.PRIVILEGES),
    )
    product = 1
    for kind in kinds:
        product *= len(kind)
    assert len({str(case) for case in cases}) == len(cases) == product


def test_the_model_has_an_answer_to_every_case_of_the_full_product() -> None:
    for case in leakmodel.selection(full=True):
        outcome = leakmodel.expected(case)
        assert outcome.nics if isinstance(outcome, leakmodel.Left) else outcome.errnos


def test_the_table_of_promises_names_every_state() -> None:
    lines = leakmodel.table().splitlines()
    assert {state.name for state in leakmodel.STATES} <= {line.split(" | ")[0].removeprefix("| ") for line in lines}
    assert leaktable.main(["--table"]) == 0
