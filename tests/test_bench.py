"""The benchmarks run, and the report says what they found; what they found is not judged here: machines are noisy."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # last, so that an installed aiobind is the one that is tested

from bench import __main__ as command  # noqa: E402 - it is not installed
from bench import report  # noqa: E402
from bench.report import CLAIMS, Cell, Claim, Results  # noqa: E402
from bench.table import Table, Value, dump, figure, load, ratio  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiobind.lab import Lab

#: Which tables each measurement gives; it may give more.
TABLES = {
    "compare": {
        "connect",
        "connect-instructions",
        "connect-syscalls",
        "two-addresses",
        "get",
        "keepalive",
        "get-instructions",
    },
    "ports": {"ports-held", "ports-fill"},
    "lag": {"names"},
    "flat": {"flat-sources", "flat-addresses"},
    "memory": {"memory"},
    "failover": {"failover"},
    "imports": {"import"},
}


# --- the measurements -------------------------------------------------------------------------------------------


def test_every_claim_is_measured() -> None:
    assert tuple(TABLES) == command.MEASUREMENTS
    assert {claim.table for claim in CLAIMS} <= set().union(*TABLES.values())


@pytest.mark.timeout(150)  # compare runs a dozen clients under callgrind
@pytest.mark.parametrize("name", TABLES)
def test_measurement(lab: Lab, name: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"bench.{name}", "--quick", "--json", str(tmp_path / "tables.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    tables = {table.name: table for table in load(tmp_path / "tables.json")}
    assert set(tables) >= TABLES[name]
    for table in tables.values():
        assert table.text() in ended.stdout
        assert table.rows or table.skipped, table.name
        for row in table.rows:
            assert row.values, (table.name, row.label)
            rounds = [value for cell in row.values.values() for value in cell.rounds]
            assert all(math.isfinite(value) and value >= 0 for value in rounds), (table.name, row.label)
        assert all(table.skipped.values())
    for verdict in report.judge(tables.values()):
        if verdict.claim.table in tables and verdict.figure is None:
            skipped = tables[verdict.claim.table].skipped
            assert any(cell.label in skipped for cell in (verdict.claim.cell, verdict.claim.base) if cell), verdict


# --- the tables -------------------------------------------------------------------------------------------------


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratio([10, 30, 100], [10, 10, 50]) == 2  # the medians alone would say 3
    assert ratio([10, 30, 100], [15]) == 2  # which were not the same rounds


def test_value() -> None:
    value = Value([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (value.low, value.median, value.high) == (2, 3, 4)
    exact = Value([7.0])
    assert exact.low == exact.median == exact.high == 7


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.4123, "0.412"),
        (0.9996, "1.00"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1126.4, "1,126"),
        (-3.21, "-3.21"),
    ],
)
def test_figure(value: float, text: str) -> None:
    assert figure(value) == text


def connects() -> Table:
    table = Table("connect", "connects", "µs", ["1", "100"], baseline="sock_connect by hand", axis="at once")
    table.add("sock_connect by hand", "1", [10, 20, 30], "asyncio")
    table.add("sock_connect by hand", "1", [40, 40, 40], "uvloop")
    table.add("aiobind", "1", [11, 24, 30], "asyncio")
    table.add("aiobind", "1", [20, 20, 20], "uvloop")
    table.add("Go net.Dialer", "1", [5, 5, 5])
    table.add("Go net.Dialer", "100", 3)
    table.skipped["anyio"] = "not installed"
    return table


def filling() -> Table:
    table = Table("ports-fill", "Filling", "µs", ["0", "90"], baseline="0", kind="lines", axis="% full")
    for label, costs in {"aiobind": (80, 88), "asyncio local_addr": (100, 7000)}.items():
        for column, cost in zip(table.columns, costs, strict=True):
            table.add(label, column, [cost, cost, cost], "asyncio")
    return table


def test_table() -> None:
    table = connects()
    hand, _, ours, ours_on_uvloop, go = table.rows
    assert [table.ratio(row, "1") for row in (hand, ours, ours_on_uvloop)] == [1, 1.1, 0.5]
    assert table.ratio(go, "1") == 0.25  # what runs on no loop is held against asyncio's
    assert table.ratio(go, "100") is table.ratio(ours, "100") is None
    assert table.value("aiobind", "100", "asyncio") is table.value("anyio", "1", "asyncio") is None
    assert table.value("Go net.Dialer", "100") == Value([3])  # one exact figure
    filled = filling()
    assert [filled.ratio(row, "90") for row in filled.rows] == [1.1, 70]
    with pytest.raises(ValueError, match="no column"):
        table.add("aiobind", "64", 1)


def test_table_as_text() -> None:
    title, head, *rows = connects().text().splitlines()
    assert title == "connects [µs]; columns: at once; in brackets: to sock_connect by hand"
    assert head.split() == ["1", "100"]
    assert "Go net.Dialer                  5.00 (0.25)  3.00" in rows
    assert rows[-1] == "anyio: skipped, not installed"
    assert {len(row) for row in (head, *rows[:-1])} == {len(head)}
    assert "aiobind               asyncio  24.0 (1.10)     -" in rows


def test_tables_as_json(tmp_path: Path) -> None:
    tables = [connects(), filling()]
    dump(tables, tmp_path / "tables.json")
    assert load(tmp_path / "tables.json") == tables


# --- the report -------------------------------------------------------------------------------------------------

_OURS, _HAND = Cell("aiobind", "asyncio", "1"), Cell("sock_connect by hand", "asyncio", "1")
_JUDGED = [
    (Claim("ours / by hand", "connect", _OURS, _HAND, 1.1), "met"),
    (Claim("ours / by hand", "connect", _OURS, _HAND, 1.099), "not met"),
    (Claim("µs", "connect", _OURS, None, 24), "met"),
    (Claim("by hand / ours", "connect", _HAND, _OURS, 0.9, at_least=True), "met"),
    (Claim("by hand / ours", "connect", _HAND, _OURS, 0.92, at_least=True), "not met"),
    (
        Claim("anyio", "connect", _OURS, Cell("anyio", "asyncio", "1"), 0.25),
        "not measured: anyio, asyncio, 1: not installed",
    ),
    (
        Claim("100", "connect", Cell("aiobind", "asyncio", "100"), None, 5),
        "not measured: aiobind, asyncio, 100: not in the results",
    ),
    (Claim("memory", "memory", _OURS, None, 5), "not measured: there is no table memory"),
]


@pytest.mark.parametrize(("claim", "word"), _JUDGED)
def test_claim(claim: Claim, word: str) -> None:
    (verdict,) = report.judge([connects()], [claim])
    assert verdict.word == word
    assert verdict.met is (word == "met")


def results() -> Results:
    return Results({"CPU": "a | b, 2 cores", "kernel": "Linux 6.18", "date": "2026-01-02"}, [connects(), filling()])


def test_markdown() -> None:
    why = {"by hand / ours": "it is slow. Floor: 1", "connect": "there is more to do"}
    text = report.markdown(results(), [claim for claim, _ in _JUDGED], why)
    lines = text.splitlines()
    for line in (
        r"| CPU | a \| b, 2 cores |",
        "3 of 8 are met.",
        "| ours / by hand | at most 1.1 | 1.100 | met |",
        "| ours / by hand | at most 1.099 | 1.100 | **not met** |",
        "| by hand / ours | at least 0.92 | 0.909 | **not met** |",
        "| memory | at most 5 | - | **not measured: there is no table memory** |",
        "- ours / by hand: there is more to do",
        "- by hand / ours: it is slow. Floor: 1",
        "## Connects (µs)",
        "![Connects](connect.svg)",
        "Columns: at once. In brackets: the ratio to sock_connect by hand.",
        "| **aiobind** | **asyncio** | 24.0 (1.10) | - |",
        "| Go net.Dialer |  | 5.00 (0.25) | 3.00 |",
        "- Skipped: anyio: not installed",
        "| asyncio local_addr | asyncio | 100 (1.00) | 7,000 (70.00) |",
    ):
        assert line in lines, line
    assert text.index("## What is claimed") < text.index("## Connects") < text.index("## Filling")


def test_a_claim_that_is_not_met_has_a_reason() -> None:
    claims = [claim for claim, _ in _JUDGED]
    assert f"\n- ours / by hand; by hand / ours: {report.NO_REASON}\n" in report.markdown(results(), claims, {})
    assert "Why these are not met" not in report.markdown(results(), claims[:1], {})
    assert set(report.WHY) <= {name for claim in CLAIMS for name in (claim.text, claim.table)}


def test_the_claims_of_the_project_are_all_in_the_report() -> None:
    text = report.markdown(results())
    for claim in CLAIMS:
        assert f"| {claim.text} | " in text


def test_readme_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plot", lambda table, path: None)
    results().dump(tmp_path)
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    for _ in range(2):
        report.main([str(tmp_path), "--readme", str(page)])
        text = page.read_text()
        assert text.startswith(f"before\n{report.BEGIN}![Connects](bench/results/connect.svg)\n")
        assert text.endswith(f"{report.END}after\n")
        assert "| sock_connect by hand | 0.91 | - | 2.00 | - |\n" in text
        assert "| Go net.Dialer | 0.21 | - | 0.25 | - |\n" in text  # beside both loops
        assert "old" not in text
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="no lines"):
        report.main([str(tmp_path), "--readme", str(page)])
    with pytest.raises(SystemExit, match="no results"):
        report.main([str(tmp_path / "none")])


@pytest.mark.parametrize("make", [connects, filling])
def test_plot(make: Callable[[], Table], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [bench] is not installed")
    table = make()
    for name in ("one", "two"):
        report.plot(table, tmp_path / f"{name}.svg")
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    texts = [
        "".join(text.itertext()) for text in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")
    ]
    wanted = [table.title.capitalize(), "aiobind, asyncio"]
    wanted += ["24.0  (1.10 x)", "1 at once", "Go net.Dialer"] if table.kind == "bars" else ["µs", "% full", "90"]
    assert [text for text in wanted if text not in texts] == []
    assert b"<dc:date>" not in drawn


def test_plot_of_many_columns_shows_the_sums(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [bench] is not installed")
    table = Table("calls", "calls", "system calls", ["all", "beyond", "bind", "close", "connect", "read", "write"])
    for column in table.columns:
        table.add("aiobind", column, 1)
    report.plot(table, tmp_path / "calls.svg")
    drawn = (tmp_path / "calls.svg").read_text()
    assert [column for column in table.columns if f">{column}<" in drawn] == ["all", "beyond"]


def test_what_is_committed_is_one_run() -> None:
    folder = ROOT / "bench/results"
    if not (folder / "results.json").exists():
        pytest.skip("there are no results in this checkout")
    found = Results.load(folder)
    assert (folder / "RESULTS.md").read_text() == report.markdown(found)
    assert {path.stem for path in folder.glob("*.svg")} == {table.name for table in found.tables}
    page = (ROOT / "README.md").read_text()
    assert f"{report.BEGIN}{report.readme(found)}{report.END}" in page
    assert "rounds" not in found.machine  # those of --quick mean nothing
    reported = (folder / "RESULTS.md").read_text()
    assert report.NO_REASON not in reported
    assert "TODO" not in reported


# --- the command ------------------------------------------------------------------------------------------------


def test_command(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "MEASUREMENTS", ("absent", "imports"))
    before = Results(command.machine(quick=True) | {"date": "2026-01-02"}, [connects()])
    before.dump(tmp_path)
    assert command.main(["--only", "absent", "imports", "--quick", "--output", str(tmp_path)]) == 1
    output, errors = capfd.readouterr()
    assert "absent failed: exit status 1\n" in errors
    assert "[2/2] imports" in output
    assert "import of aiobind / of asyncio and ipaddress: at most 1.2, found " in output
    found = Results.load(tmp_path)
    assert [table.name for table in found.tables] == ["connect", "import"]  # the older one is from this machine, too
    assert found.machine["Python"] == ".".join(map(str, sys.version_info[:3])).join(("CPython ", ""))
    assert "--quick" in found.machine["rounds"]
    assert (tmp_path / "RESULTS.md").read_text() == report.markdown(found)
    plots = {path.name for path in tmp_path.glob("*.svg")}
    assert plots == ({"connect.svg", "import.svg"} if importlib.util.find_spec("matplotlib") else set())


def test_results_of_another_machine_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"CPU": "this one", "date": "2026-01-02"}
    assert command.kept(tmp_path, about) == []
    Results(about, [connects()]).dump(tmp_path)
    assert command.kept(tmp_path, about | {"date": "2026-01-03"}) == [connects()]
    assert capsys.readouterr().err == ""
    assert command.kept(tmp_path, about | {"CPU": "another one"}) == []
    assert "another machine" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_command_ends_clean(lab: Lab, tmp_path: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "--only", "imports", "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stdout
    assert "[1/1] imports" in process.stdout.readline()
    pid, deadline = process.pid, time.monotonic() + 20
    for _ in ("the measurement", "one of its interpreters"):
        while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pid = int(children[0])
    assert any(tmp_path.iterdir())  # the command's temporary folder at least
    process.send_signal(how)  # what it has started is in another group, and hears of it from no terminal
    _, errors = process.communicate(timeout=20)  # to the end of the last of them that has the pipe
    assert (process.returncode, errors) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_command_without_a_lab_says_so(tmp_path: Path) -> None:
    for arguments in (["bench", "--output", str(tmp_path)], ["bench.imports"]):
        ended = subprocess.run(
            [sys.executable, "-m", *arguments, "--quick"],
            cwd=ROOT,
            env={**os.environ, "PATH": str(tmp_path)},  # in which there is no ip command
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert ended.returncode == 1
        assert ended.stderr.startswith("no lab here: ")
        assert ended.stderr.count("\n") == 1
