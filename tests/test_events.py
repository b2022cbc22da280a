"""Each event is told once: a line of the log at its level, and a value for ``on_event``, which can harm nobody."""

from __future__ import annotations

import errno
import logging
import math
from typing import TYPE_CHECKING, Any

import pytest

from aiobind import BindError, Event, parse_source
from aiobind._events import Journal

if TYPE_CHECKING:
    from collections.abc import Callable

ETH0 = parse_source("if!eth0")
REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "connection refused")
GONE = BindError(errno.ENODEV, "no interface named 'eth0'")
BARE = OSError("no words")  # without errno and strerror
TARGET = "192.0.2.1:443"


TABLE: list[tuple[str, Callable[[Journal], None], int | None, str, Event]] = [
    (
        "connected",
        lambda journal: journal.connected(ETH0, TARGET, 0.0123),
        logging.DEBUG,
        "if!eth0 to 192.0.2.1:443: connected in 12.3 ms",
        Event("connected", ETH0, TARGET, None, 0.0123),
    ),
    (
        "failed",
        lambda journal: journal.failed(ETH0, TARGET, REFUSED, 1.5),
        logging.DEBUG,
        "if!eth0 to 192.0.2.1:443: failed after 1500.0 ms: connection refused",
        Event("failed", ETH0, TARGET, REFUSED, 1.5),
    ),
    (
        "failed without words",
        lambda journal: journal.failed(ETH0, TARGET, BARE, 0.0),
        logging.DEBUG,
        "if!eth0 to 192.0.2.1:443: failed after 0.0 ms: no words",
        Event("failed", ETH0, TARGET, BARE, 0.0),
    ),
    (
        "suspended",
        lambda journal: journal.suspended(ETH0, GONE, 1.25),
        logging.INFO,
        "if!eth0 is suspended for 1.2 s: no interface named 'eth0'",
        Event("suspended", ETH0, None, GONE, 1.25),
    ),
    (
        "suspended without words",
        lambda journal: journal.suspended(ETH0, BARE, 2.0),
        logging.INFO,
        "if!eth0 is suspended for 2.0 s: no words",
        Event("suspended", ETH0, None, BARE, 2.0),
    ),
    (
        "its interface is away",
        lambda journal: journal.suspended(ETH0, GONE, math.inf),
        logging.INFO,
        "if!eth0 is suspended until its interface is back: no interface named 'eth0'",
        Event("suspended", ETH0, None, GONE, math.inf),
    ),
    (
        "banned",
        lambda journal: journal.suspended(ETH0, GONE, 30.0, "example.com"),
        logging.INFO,
        "if!eth0 is suspended for example.com for 30.0 s: no interface named 'eth0'",
        Event("suspended", ETH0, "example.com", GONE, 30.0),
    ),
    (
        "recovered",
        lambda journal: journal.recovered(ETH0),
        logging.INFO,
        "if!eth0 has recovered",
        Event("recovered", ETH0),
    ),
    (
        "recovered at a host",
        lambda journal: journal.recovered(ETH0, "example.com"),
        logging.INFO,
        "if!eth0 has recovered for example.com",
        Event("recovered", ETH0, "example.com"),
    ),
    (
        "unpinned",  # `_sockets` has logged the reason, as a WARNING
        lambda journal: journal.unpinned(ETH0, TARGET),
        None,
        "",
        Event("unpinned", ETH0, TARGET),
    ),
]


@pytest.mark.parametrize(("tell", "level", "line", "event"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_is_told(
    caplog: pytest.LogCaptureFixture, tell: Callable[[Journal], None], level: int | None, line: str, event: Event
) -> None:
    events: list[Event] = []
    with caplog.at_level(logging.DEBUG, "aiobind"):
        tell(Journal(events.append))
    assert events == [event]
    assert caplog.record_tuples == ([] if level is None else [("aiobind", level, line)])
    # one level further nothing is said, and the event is the same
    caplog.clear()
    with caplog.at_level((level or 0) + 1, "aiobind"):
        tell(Journal(events.append))
        tell(Journal(None))
    assert caplog.records == []
    assert events == [event, event]


def test_no_name_breaks_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """An interface may have nearly any bytes in its name, and the host is whatever the application reports."""
    source, host = parse_source("if!a\x1b[1m\u2028"), "a\nroot logged in" + "!" * 2000
    journal = Journal(None)
    with caplog.at_level(logging.DEBUG, "aiobind"):
        journal.recovered(source, host)
        journal.suspended(source, GONE, 1.0, host)
        journal.connected(source, TARGET, 1.0)
        journal.failed(source, TARGET, GONE, 1.0)
    assert len(caplog.messages) == 4
    for message in caplog.messages:
        assert message.isprintable()
        assert r"if!a\x1b[1m\u2028" in message
        assert len(message) < 400


@pytest.mark.parametrize("raised", [ZeroDivisionError("oh"), OSError(5, "oh")])
def test_what_on_event_raises_is_logged_and_harms_nobody(caplog: pytest.LogCaptureFixture, raised: Exception) -> None:
    def on_event(event: Event) -> None:
        raise raised

    journal = Journal(on_event)
    journal.recovered(ETH0)
    journal.unpinned(ETH0, TARGET)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.name for record in errors] == ["aiobind"] * 2
    assert errors[0].getMessage().startswith("on_event failed at Event(kind='recovered', source=Interface('eth0'")
    assert errors[0].exc_info is not None
    assert errors[0].exc_info[1] is raised


def test_what_ends_the_program_is_not_swallowed() -> None:
    def on_event(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Journal(on_event).recovered(ETH0)


@pytest.mark.parametrize(
    ("level", "on_event", "reads"),
    [
        (logging.INFO, None, False),
        (logging.WARNING, None, False),
        (logging.DEBUG, None, True),
        (logging.WARNING, print, True),
    ],
)
def test_nobody_is_told_of_attempts_who_does_not_listen(
    caplog: pytest.LogCaptureFixture, level: int, on_event: Any, *, reads: bool
) -> None:
    with caplog.at_level(level, "aiobind"):
        assert Journal(on_event).reads_attempts is reads


def test_the_level_may_change_at_any_time(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(None)
    for level, reads in [(logging.INFO, False), (logging.DEBUG, True), (logging.INFO, False)]:
        caplog.set_level(level, "aiobind")
        assert journal.reads_attempts is reads
