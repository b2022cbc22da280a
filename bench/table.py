"""What a measurement finds: tables of rounds, from which medians and ratios are read. Nothing here measures.

A module of bench measures one thing. It has ``measure(quick)``, which gives its tables (a list, or one after the other
as a generator), and ends in two lines::

    if __name__ == "__main__":
        table.main(measure)

``python -m bench.NAME [--quick] [--json FILE]`` then runs it in network namespaces of its own and prints the tables.
``quick`` is for the tests: two rounds and small counts, the same tables, within ten seconds. A peer that cannot run
here (not installed, no compiler, no strace) goes to ``skipped`` with the reason; nothing else does.

The names of the tables, rows and columns that the project's claims are read from are in ``CLAIMS`` of report.py; a
measurement may have any other tables, rows and columns beside these.

A cell holds every round, in the order of the rounds. The peers take turns within a round, so that round k of one is to
be compared with round k of another: a ratio is the median of the ratios of the rounds, and any two cells have one.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from aiobind.lab import available, isolate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Row", "Table", "Value", "dump", "figure", "load", "main", "ratio"]


def ratio(rounds: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the median of the ratios, round by round; of the medians if they did not run in the same rounds."""
    if len(rounds) == len(baseline):
        return statistics.median(one / other for one, other in zip(rounds, baseline, strict=True))
    return statistics.median(rounds) / statistics.median(baseline)


def figure(value: float) -> str:
    """Return *value* with three digits that mean something: ``0.412``, ``26.1``, ``1,126``."""
    if value == 0 or abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}" if abs(value) >= 0.9995 else f"{value:.3f}"


@dataclass
class Value:
    """One cell: what each round found, or one exact figure."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        """The first quartile of the rounds."""
        return self._quartiles()[0]

    @property
    def high(self) -> float:
        """The third quartile of the rounds."""
        return self._quartiles()[2]

    def _quartiles(self) -> list[float]:
        return statistics.quantiles(self.rounds, method="inclusive") if len(self.rounds) > 1 else self.rounds * 3


@dataclass
class Row:
    """A peer or a case (*label*) on a *loop*: ``asyncio``, ``uvloop``, or ``""`` where there is none."""

    label: str
    loop: str = ""
    values: dict[str, Value] = field(default_factory=dict[str, Value])  # by column; a peer may lack some


@dataclass
class Table:
    """One table, and one plot.

    ``baseline`` is what the ratios shown are taken to: the label of a row (the one on the same loop; asyncio's for what
    runs on no loop), or the name of a column (of the same row). ``kind`` is the plot: bars, a group for each column; or
    lines, where the columns are numbers along ``axis``.
    """

    name: str  # a word-with-hyphens: the plot's file, and what the claims of report.py go by
    title: str
    unit: str  # of every cell, as in "µs of CPU for each connect"; less is better unless the title says otherwise
    columns: list[str]
    rows: list[Row] = field(default_factory=list[Row])
    baseline: str = ""
    note: str = ""  # one or two sentences: what was done, and what a reader should know
    kind: Literal["bars", "lines"] = "bars"
    axis: str = ""  # what the columns are, as in "at once" or "destinations"
    skipped: dict[str, str] = field(default_factory=dict[str, str])  # the reason, by label

    def add(self, label: str, column: str, rounds: Iterable[float] | float, loop: str = "") -> None:
        """Set a cell: its rounds, or one exact figure. The row is made where there is none."""
        if column not in self.columns:
            raise ValueError(f"{self.name}: there is no column {column!r} in {self.columns}")
        row = next((row for row in self.rows if (row.label, row.loop) == (label, loop)), None)
        if row is None:
            row = Row(label, loop)
            self.rows.append(row)
        row.values[column] = Value([rounds] if isinstance(rounds, int | float) else list(rounds))

    def value(self, label: str, column: str, loop: str = "") -> Value | None:
        """Return a cell, or None if it was not measured."""
        return next((row.values.get(column) for row in self.rows if (row.label, row.loop) == (label, loop)), None)

    def base(self, row: Row, column: str) -> Value | None:
        """Return the cell that this one's ratio is taken to."""
        if self.baseline in self.columns:
            return row.values.get(self.baseline)
        loops = (row.loop, row.loop or "asyncio", "")
        return next((base for loop in loops if (base := self.value(self.baseline, column, loop)) is not None), None)

    def ratio(self, row: Row, column: str) -> float | None:
        """Return the ratio of a cell to its base, or None if one of them was not measured or the base is 0."""
        value, base = row.values.get(column), self.base(row, column)
        return None if value is None or base is None or not all(base.rounds) else ratio(value.rounds, base.rounds)

    def text(self) -> str:
        """Return the table for a terminal: the median, and the ratio to the baseline in brackets."""
        lines = [["", "", *self.columns]]
        for row in self.rows:
            cells = ["-"] * len(self.columns)
            for at, column in enumerate(self.columns):
                if column in row.values:
                    share = self.ratio(row, column)
                    cells[at] = figure(row.values[column].median) + ("" if share is None else f" ({share:.2f})")
            lines.append([row.label, row.loop, *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        head = f"{self.title} [{self.unit}]" + (f"; columns: {self.axis}" if self.axis else "")
        head += f"; in brackets: to {self.baseline}" if self.baseline else ""
        body = [
            "  ".join(cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in enumerate(pairs))
            for pairs in ([*zip(line, widths, strict=True)] for line in lines)
        ]
        skipped = [f"{label}: skipped, {reason}" for label, reason in self.skipped.items()]
        return "\n".join(line.rstrip() for line in [head, *([self.note] if self.note else []), *body, *skipped])

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the table of which *data* is the ``asdict``."""
        rows = [
            Row(row["label"], row["loop"], {column: Value(**value) for column, value in row["values"].items()})
            for row in data["rows"]
        ]
        return cls(**{**data, "rows": rows})


def dump(tables: Iterable[Table], path: Path) -> None:
    """Write the tables to *path*, as JSON."""
    path.write_text(json.dumps([asdict(table) for table in tables], indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> list[Table]:
    """Read what ``dump`` has written."""
    return [Table.from_dict(data) for data in json.loads(path.read_text())]


def main(measure: Callable[[bool], Iterable[Table]], arguments: Sequence[str] | None = None) -> None:
    """Run one measurement in network namespaces of its own; print its tables, and write them where ``--json`` says."""
    parser = argparse.ArgumentParser(description=sys.modules[measure.__module__].__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds and small counts: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to this file as well")
    options = parser.parse_args(arguments)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it cleans up as after Ctrl-C
        if missing := available():
            sys.exit(f"no lab here: {missing}")
        isolate()
        tables: list[Table] = []
        for table in measure(options.quick):
            tables.append(table)
            print(table.text(), end="\n\n", flush=True)
            if options.json:  # after each, so that what is there survives a later failure
                dump(tables, options.json)
    except KeyboardInterrupt:
        sys.exit(130)
