"""From what the measurements found to what people read: Markdown, SVG, and whether the claims are met.

    python -m bench.report [FOLDER] [--readme FILE]

reads ``results.json`` in the folder (``bench/results``) and writes ``RESULTS.md`` and a plot of each table beside it;
with ``--readme`` also what stands in that file between the two marks. The same results make the same files.

The claims are one table, ``CLAIMS``: each is a cell, divided by another one where it is a ratio, and a bound. Whatever
is not met, or was not measured, is shown as that, and why it is not met is in ``WHY``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import textwrap
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.table import Table, figure, ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bench.table import Row

__all__ = ["CLAIMS", "NO_REASON", "WHY", "Claim", "Results", "Verdict", "judge", "markdown", "plot", "readme", "write"]

HERE = Path(__file__).parent
BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"
NO_REASON = "**no reason is known**"


# --- the results ----------------------------------------------------------------------------------------------


@dataclass
class Results:
    """What one run found, and on which machine."""

    machine: dict[str, str]
    tables: list[Table]

    @classmethod
    def load(cls, folder: Path) -> Results:
        data = json.loads((folder / "results.json").read_text())
        return cls(data["machine"], [Table.from_dict(table) for table in data["tables"]])

    def dump(self, folder: Path) -> None:
        (folder / "results.json").write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


# --- the claims -----------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """Where a figure is: the label and loop of the row, and the column."""

    label: str
    loop: str
    column: str


@dataclass(frozen=True)
class Claim:
    """*cell* of *table*, over *base* where there is one, is at most *bound* (or at least)."""

    text: str
    table: str
    cell: Cell
    base: Cell | None
    bound: float
    at_least: bool = False


HAND, EYEBALLS, AIOHTTP = "sock_connect by hand", "aiohappyeyeballs", "aiohttp local_addr"
A, U = "asyncio", "uvloop"


def _claims() -> list[Claim]:
    claims: list[Claim] = []

    def claim(text: str, table: str, cell: Cell, base: Cell | None, bound: float, *, at_least: bool = False) -> None:
        claims.append(Claim(text, table, cell, base, bound, at_least))

    for label, loop, base, bound in (
        ("aiobind", A, HAND, 1.10),
        ("aiobind fast_connect", A, HAND, 0.75),
        ("aiobind", U, HAND, 0.55),
        ("aiobind", A, EYEBALLS, 1.05),
        ("aiobind", U, EYEBALLS, 0.55),
        ("aiobind", A, "anyio", 0.25),
        ("aiobind", U, "anyio", 0.25),
    ):
        for at_once in ("1", "100"):
            text = f"connect and close, {at_once} at once, {loop}: {label} / {base}"
            claim(text, "connect", Cell(label, loop, at_once), Cell(base, loop, at_once), bound)
    for label, loop in (("aiobind fast_connect", A), ("aiobind", U)):
        text = f"connect and close, 100 at once, {loop}: thousands of instructions of {label}"
        claim(text, "connect-instructions", Cell(label, loop, "100"), None, 60)

    for label, loop, bound in (("aiobind", A, 0.97), ("aiobind fast_connect", A, 0.88), ("aiobind", U, 0.85)):
        for many in ("", ", 100 sources"):
            text = f"GET on a new connection, instructions, {loop}: {label}{many} / {AIOHTTP}"
            claim(text, "get-instructions", Cell(label + many, loop, "new"), Cell(AIOHTTP, loop, "new"), bound)
    for loop in (A, U):
        for many in ("", ", 100 sources"):
            text = f"GET on keep-alive, instructions, {loop}: aiobind{many} / {AIOHTTP}"
            cells = Cell(f"aiobind{many}", loop, "keep-alive"), Cell(AIOHTTP, loop, "keep-alive")
            claim(text, "get-instructions", *cells, 1.03)

    for loop in (A, U):
        text = f"cost per connect, 90 % of the range full, {loop}: aiobind / with the empty range"
        claim(text, "ports-fill", Cell("aiobind", loop, "90"), Cell("aiobind", loop, "0"), 2)
    for loop in (A, U):
        held = Cell("aiobind", loop, "19"), Cell("aiobind", loop, "1")
        text = f"connections held from one source, {loop}: 19 destinations / one"
        claim(text, "ports-held", *held, 19, at_least=True)
    for loop in (A, U):
        text = f"system calls of a single-address if! connect beyond those that it needs, {loop}"
        claim(text, "connect-syscalls", Cell("aiobind", loop, "beyond"), None, 0)
        cells = Cell("aiobind", loop, "two addresses"), Cell("aiobind", loop, "one address")
        claim(f"two addresses, the first one answers, {loop}: / one address", "two-addresses", *cells, 1.2)
    for loop in (A, U):
        for policy in ("RoundRobin", "Failover"):
            cells = Cell(policy, loop, "1000"), Cell(policy, loop, "1")
            claim(f"1,000 sources / one, {policy}, {loop}", "flat-sources", *cells, 1.10)
        cells = Cell("if!", loop, "10000"), Cell("if!", loop, "10")
        claim(f"10,000 addresses on the interface / ten, {loop}", "flat-addresses", *cells, 1.10)
    for column, what, bound in (
        ("all connected", "until all are connected, ms", 2500),
        ("lag", "the longest that the loop stood still, ms", 30),
        ("other look-up", "another program's look-up on the same loop, ms", 100),
    ):
        for loop in (A, U):
            claim(f"50 slow source names, {loop}: {what}", "names", Cell("aiobind", loop, column), None, bound)
    cells = Cell("aiobind", "", "time"), Cell("asyncio, ipaddress", "", "time")
    claim("import of aiobind / of asyncio and ipaddress", "import", *cells, 1.2)
    return claims


CLAIMS = _claims()

#: Why a claim is not met, by the profile, and what the floor is; by its text, or by its table for all of the others
#: there. The report shows those that it needs.
WHY: dict[str, str] = {
    "connect": (
        "The floor is the row “its calls by hand”: the system calls of aiobind in the same wait, and nothing else."
        " They are more than those of the hand-written connect, which sets no range of ports, does not look at its"
        " local end and counts no bytes; on asyncio they alone cost as much as that one, with `fast_connect` about"
        " 0.8 of it. What aiobind adds is about 1,250 bytecodes of Python: the choice of the source (150), the"
        " socket and its options (190), the watch over the interface and the check of what has come out (250), the"
        " claim of the 4-tuple (100), counting it in and out, with latency, bytes and ports (400), five coroutines."
        " The others promise none of that. On uvloop anyio rests on a `create_connection` in C."
    ),
    "connect-syscalls": (
        "TCP_INFO is asked once before the close: it tells the bytes for `stats()`, whether the port stays in"
        " TIME_WAIT, and whether bytes are left that the kernel still sends from the 4-tuple. `loop.sock_connect`"
        " asks for SO_ERROR besides; with the epoll that is needed only where a connect has failed. A tenth is a"
        " look for news of the interfaces, which strace makes due: it is taken when the last one was more than 2 ms"
        " ago."
    ),
    "connect-instructions": (
        "The floor, “its calls by hand”, takes 40 to 47 thousand by itself: socket, three options, bind, connect,"
        " the future and the turn of the loop, getsockname, TCP_INFO, close. What aiobind adds is the 1,250"
        " bytecodes that are told below “connect and close”, at about 55 instructions each."
    ),
    "get-instructions": (
        "All but the connecting is aiohttp's own. A new connection costs what “connect and close” shows, less what"
        " aiohappyeyeballs and its `create_connection` would have cost, and the way around them: the source in the"
        " key of the pool, the request that carries it, the deadline for TCP and TLS together (`asyncio.timeout`, as"
        " aiohttp's own, and 31 thousand instructions of it). On keep-alive it is one look at the source, its key"
        " and two figures: 14 thousand instructions. With several sources the policy is asked, and the rest of its"
        " order is kept for a failure: 20 thousand more, the same with 2 as with 1,000."
    ),
    "two-addresses": (
        "The second address costs its decision and the timer of the Connection Attempt Delay: no task. A timer that"
        " is cancelled takes 16 thousand instructions on asyncio; one swept timer for all would take less, and be a"
        " copy of the loop's own work."
    ),
    "flat-sources": (
        "The only source of a connector needs no choice, so that one is cheaper, not a thousand dearer: from 10 to"
        " 1,000 there is what the kernel adds (blocking sockets by hand that go round the same addresses, the last row"
        " of the table) and what the caches of the processor do, for each source has figures and sockets of its own."
    ),
    "import": (
        "Thirty modules and nothing but the standard library: reading them takes 10 ms where asyncio takes 50. What"
        " few need (random, hashlib, ctypes) is imported when it is needed."
    ),
    "names": (
        "The lag is one turn of the loop in which fifty look-ups begin or end; each thread that starts or wakes"
        " takes the interpreter from it for a moment, and on two cores with the name server beside it that adds up."
    ),
    "ports-fill": (
        "The kernel looks for a free port from a random one onwards: the fuller the range, the longer; at 99 % it"
        " looks at a hundred. Without the range set it looks at half of all."
    ),
}


class Verdict(NamedTuple):
    """What became of a claim: its figure, or the reason why there is none."""

    claim: Claim
    figure: float | None
    missing: str = ""

    @property
    def met(self) -> bool:
        if self.figure is None:
            return False
        return self.figure >= self.claim.bound if self.claim.at_least else self.figure <= self.claim.bound

    @property
    def word(self) -> str:
        return f"not measured: {self.missing}" if self.figure is None else "met" if self.met else "not met"

    @property
    def bound(self) -> str:
        return f"at {'least' if self.claim.at_least else 'most'} {self.claim.bound:,g}"

    @property
    def found(self) -> str:
        """The figure, with as many digits as it takes to see on which side of the bound it is."""
        if self.figure is None:
            return "-"
        return f"{self.figure:.3f}" if abs(self.figure) < 9.9995 else f"{self.figure:,.1f}"


def judge(tables: Iterable[Table], claims: Iterable[Claim] = CLAIMS) -> list[Verdict]:
    """Hold the claims against what was found."""
    by_name = {table.name: table for table in tables}
    return [_judge(by_name.get(claim.table), claim) for claim in claims]


def _judge(table: Table | None, claim: Claim) -> Verdict:
    if table is None:
        return Verdict(claim, None, f"there is no table {claim.table}")
    rounds: list[list[float]] = []
    for cell in filter(None, (claim.cell, claim.base)):
        value = table.value(cell.label, cell.column, cell.loop)
        if value is None:
            what = ", ".join(filter(None, cell))
            return Verdict(claim, None, f"{what}: {table.skipped.get(cell.label, 'not in the results')}")
        rounds.append(value.rounds)
    if claim.base is None:
        return Verdict(claim, statistics.median(rounds[0]))
    return Verdict(claim, ratio(*rounds)) if all(rounds[1]) else Verdict(claim, None, "the other figure is 0")


# --- Markdown -------------------------------------------------------------------------------------------------


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]], right: int) -> list[str]:
    """Return a table, in which the columns from *right* on are numbers."""
    rule = ["---" if at < right else "--:" for at in range(len(head))]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows)]


def _verdicts(verdicts: Iterable[Verdict]) -> list[str]:
    rows = [
        [verdict.claim.text, verdict.bound, verdict.found, "met" if verdict.met else f"**{verdict.word}**"]
        for verdict in verdicts
    ]
    return _grid(["claim", "bound", "found", ""], rows, right=4)


def _reasons(verdicts: Iterable[Verdict], why: Mapping[str, str]) -> list[str]:
    """Return why those that are not met are not: a line for each reason, with the claims that it holds for."""
    texts: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.figure is not None and not verdict.met:
            reason = why.get(verdict.claim.text) or why.get(verdict.claim.table) or NO_REASON
            texts.setdefault(reason, []).append(verdict.claim.text)
    lines = [f"- {'; '.join(held_for)}: {reason}" for reason, held_for in texts.items()]
    return ["", "Why these are not met, and what the floor is:", "", *lines] if lines else []


def _title(table: Table) -> str:
    return table.title[:1].upper() + table.title[1:]


def _figures(table: Table) -> list[str]:
    def cell(row: Row, column: str) -> str:
        if column not in row.values:
            return "-"
        share = table.ratio(row, column)
        return figure(row.values[column].median) + ("" if share is None else f" ({share:.2f})")

    def name(text: str, row: Row) -> str:
        return f"**{text}**" if text and _ours(row) else text

    looped = any(row.loop for row in table.rows)
    rows = [
        [*([name(row.label, row), name(row.loop, row)][: 1 + looped]), *(cell(row, column) for column in table.columns)]
        for row in table.rows
    ]
    about = f"Columns: {table.axis}. " if table.axis else ""
    about += f"In brackets: the ratio to {table.baseline}. " if table.baseline else ""
    head = [*[""] * (1 + looped), *table.columns]
    lines = [f"{about}{table.note}".strip(), "", *_grid(head, rows, right=1 + looped)]
    if table.skipped:
        lines += ["", *(f"- Skipped: {label}: {reason}" for label, reason in table.skipped.items())]
    return lines


def markdown(results: Results, claims: Iterable[Claim] = CLAIMS, why: Mapping[str, str] = WHY) -> str:
    """Return the report: the machine, the claims, and a table and a plot of everything."""
    verdicts = judge(results.tables, claims)
    met = sum(verdict.met for verdict in verdicts)
    lines = [
        "# What a connect costs, beside every peer",
        "",
        "Written by `make bench`; `results.json` has every round. A figure is the median of the rounds, a ratio the",
        "median of the ratios round by round, for which the peers take turns; where they do not, the table says so.",
        "Plots show the quartiles as well.",
        "",
        *_grid(["machine", ""], [[key, value] for key, value in results.machine.items()], right=2),
        "",
        "## What is claimed",
        "",
        f"{met} of {len(verdicts)} are met.",
        "",
        *_verdicts(verdicts),
        *_reasons(verdicts, why),
    ]
    for table in results.tables:
        title = _title(table)
        lines += ["", f"## {title} ({table.unit})", "", f"![{title}]({table.name}.svg)", "", *_figures(table)]
    return "\n".join(lines) + "\n"


#: What the README shows: the table, its head, and the columns of one and of many at once.
SHOWN = (
    ("connect", "connect and close", "1", "100"),
    ("get", "GET on a new connection", "1", "64"),
)


def readme(results: Results) -> str:
    """Return what stands in the README: one plot, and the CPU of every peer as a multiple of aiobind's."""
    by_name = {table.name: table for table in results.tables}
    rows: list[list[str]] = []
    for name, head, *columns in SHOWN:
        if name not in by_name:
            continue
        table = by_name[name]
        rows.append([f"*{head}*", *(f"*{column} at once*" for column in columns * 2)])
        for label in dict.fromkeys(row.label for row in table.rows):
            cells = [_multiple(table, label, loop, column) for loop in (A, U) for column in columns]
            rows.append([f"**{label}**" if label.startswith("aiobind") else label, *cells])
    lines = [f"![{_title(by_name[name])}](bench/results/{name}.svg)" for name, *_ in SHOWN[:1] if name in by_name]
    about = ", ".join(results.machine[key] for key in ("kernel", "Python", "CPU") if key in results.machine)
    lines += ["", *_grid(["CPU, as a multiple of aiobind's", A, A, U, U], rows, right=1), "", f"{about}."]
    return "\n".join(lines) + "\n"


def _multiple(table: Table, label: str, loop: str, column: str) -> str:
    value = table.value(label, column, loop) or table.value(label, column)  # what runs on no loop is beside both
    base = table.value("aiobind", column, loop)
    return "-" if value is None or base is None or not all(base.rounds) else f"{ratio(value.rounds, base.rounds):.2f}"


# --- plots ----------------------------------------------------------------------------------------------------

OURS, THEIRS, INK = "#0b62c4", "#b4b9c1", "#24292f"  # on white, whatever the page's own ground is
COLORS = ("#c4510b", "#2f8f4e", "#8250df", "#9a6700", "#57606a", "#bf3989")


def _ours(row: Row) -> bool:
    return row.label.startswith(("aiobind", "BoundTCPConnector"))


def _named(row: Row) -> str:
    return ", ".join(filter(None, (row.label, row.loop)))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def plot(table: Table, path: Path) -> None:
    """Draw the table as SVG; the same table, the same file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text as text: with glyphs as paths a file is seven times as large, and whatever font is there fits.
    style: dict[Any, Any] = {"svg.hashsalt": "aiobind", "svg.fonttype": "none", "font.size": 9, "text.color": INK}
    style |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": THEIRS}
    with mpl.rc_context({**mpl.rcParamsDefault, **style}):
        picture = Figure(layout="constrained")
        (_lines if table.kind == "lines" else _bars)(table, picture)
        picture.suptitle(textwrap.fill(_title(table), 95), x=0.01, ha="left", fontsize=11, fontweight="bold")
        picture.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _bars(table: Table, picture: Any) -> None:
    """Draw a panel for each column; the row that costs least in the first one is on top."""
    # A table with so many columns begins with their sums; the rest is for readers of the table.
    columns = table.columns if len(table.columns) <= 6 else table.columns[:2]
    below = f"; in brackets: the ratio to {table.baseline}" if table.baseline else ""
    picture.supxlabel(table.unit + below, fontsize=9)
    rows = sorted(
        table.rows,
        key=lambda row: [row.values[column].median if column in row.values else 0 for column in columns],
        reverse=True,
    )
    deep = math.ceil(len(columns) / 3)
    wide = math.ceil(len(columns) / deep)
    picture.set_size_inches(9, 0.7 + deep * (0.5 + 0.21 * len(rows)))
    panels = picture.subplots(deep, wide, sharey=True, squeeze=False)
    for panel in panels.flat[len(columns) :]:
        panel.set_visible(False)
    for panel, column in zip(panels.flat, columns, strict=False):
        panel.set_title(f"{column} {table.axis}".strip(), loc="left")
        most = max((row.values[column].high for row in rows if column in row.values), default=1) or 1
        panel.set_xlim(0, most * 1.4)  # room for the figures
        for at, row in enumerate(rows):
            value = row.values.get(column)
            if value is None:
                panel.text(most * 0.02, at, "-", va="center", fontsize=8)
                continue
            panel.barh(at, value.median, height=0.72, color=OURS if _ours(row) else THEIRS)
            if value.low < value.high:
                panel.plot([value.low, value.high], [at, at], color=INK, linewidth=1)
            share = table.ratio(row, column)
            text = figure(value.median) + ("" if share is None else f"  ({share:.2f} x)")
            panel.text(max(value.high, value.median) + most * 0.02, at, text, va="center", fontsize=8)
        panel.set_yticks(range(len(rows)), [_named(row) for row in rows])
        panel.tick_params(axis="y", length=0)
        panel.locator_params(axis="x", nbins=4)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[:, 0]:
        for label, row in zip(panel.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if _ours(row) else "normal")


def _lines(table: Table, picture: Any) -> None:
    """Draw a line for each row: ours thick, uvloop dashed, the quartiles as a band."""
    picture.set_size_inches(9, 3.6 + 0.09 * len(table.rows))
    panel = picture.subplots()
    labels = [row.label for row in table.rows if not _ours(row)]
    colors = {label: COLORS[at % len(COLORS)] for at, label in enumerate(dict.fromkeys(labels))}
    ours_only = not labels or all(not _ours(row) for row in table.rows)  # nobody to stand out from
    for row in table.rows:
        points = sorted((_number(column), value) for column, value in row.values.items())
        along = [x for x, _ in points]
        color = colors.get(row.label, OURS)
        width = 1.5 if ours_only or not _ours(row) else 2.6
        style = "--" if row.loop == U else "-"
        panel.plot(
            along,
            [value.median for _, value in points],
            style,
            color=color,
            linewidth=width,
            marker="o",
            markersize=3,
            label=_named(row),
        )
        low, high = [value.low for _, value in points], [value.high for _, value in points]
        panel.fill_between(along, low, high, color=color, alpha=0.12, linewidth=0)
    columns = [_number(column) for column in table.columns]
    if min(columns) > 0 and max(columns) / min(columns) >= 100:
        panel.set_xscale("log")
    medians = [value.median for row in table.rows for value in row.values.values()]
    if medians and min(medians) > 0 and max(medians) / min(medians) >= 20:
        panel.set_yscale("log")
        panel.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    else:
        panel.set_ylim(0, max([*medians, 1e-9]) * 1.15)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.set_xticks(columns, [f"{column:,g}" for column in columns])
    panel.minorticks_off()
    if panel.get_xscale() == "linear":
        for at in range(1, len(columns)):
            if columns[at] - columns[at - 1] < (max(columns) - min(columns)) / 25:  # their labels would overlap
                panel.get_xticklabels()[at - 1].set_ha("right")
                panel.get_xticklabels()[at].set_ha("left")
    panel.set_xlabel(table.axis)
    panel.set_ylabel(table.unit)
    panel.grid(axis="y", color=THEIRS, alpha=0.4, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    if table.rows:
        picture.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8, handlelength=3.5)


# --- files ----------------------------------------------------------------------------------------------------


def write(results: Results, folder: Path, *, plots: bool = True) -> None:
    """Write the results, the report and the plots into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    results.dump(folder)
    (folder / "RESULTS.md").write_text(markdown(results))
    for table in results.tables if plots else ():
        plot(table, folder / f"{table.name}.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="From results.json to RESULTS.md, plots, and the README.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "results", help="default: bench/results")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="replace what is between the marks in this file")
    options = parser.parse_args(arguments)
    try:
        results = Results.load(options.folder)
    except FileNotFoundError as exc:
        sys.exit(f"{exc.filename}: there are no results yet; make bench")
    plots = find_spec("matplotlib") is not None
    write(results, options.folder, plots=plots)
    if not plots:
        print("no plots: matplotlib is not installed (the extra [bench])", file=sys.stderr)
    if options.readme:
        before, begin, rest = options.readme.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            sys.exit(f"{options.readme}: it has no lines {BEGIN.strip()} and {END.strip()}")
        options.readme.write_text(f"{before}{begin}{readme(results)}{end}{after}")


if __name__ == "__main__":
    main()
