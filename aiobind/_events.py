"""Law: what happens to a source is told once, in one place: to the log ``aiobind``, and to the caller's ``on_event``.

DEBUG      every attempt, how it ended and how long it took
INFO       a source is suspended, or has recovered
WARNING    a pin was refused
"""

from __future__ import annotations

import logging
import math
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from ._errors import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._sources import Source

__all__ = ["Event", "Journal"]

_log = logging.getLogger("aiobind")

EventKind: TypeAlias = Literal["connected", "failed", "suspended", "recovered", "unpinned"]


class Event(NamedTuple):
    """What ``on_event`` is told.

    Attributes:
        kind: ``"connected"`` or ``"failed"`` (an attempt, which need not be the whole connection), ``"suspended"`` or
            ``"recovered"`` (the source), ``"unpinned"`` (``strict=False``: a connection was made without the pin). A
            suspension at one destination ends by its time, of which nobody is told, or by ``report(ok=True)``.
        source: the source.
        destination: the address and port of an attempt; the host, where only that one is concerned.
        error: why it failed, or was suspended.
        seconds: how long the attempt took; for how long the source is suspended, ``math.inf`` for as long as its
            interface is away.
    """

    kind: EventKind
    source: Source
    destination: str | None = None
    error: OSError | None = None
    seconds: float | None = None


class Journal:
    """Tells one connector's events.

    Args:
        on_event: is called on the event loop with each; what it raises is logged, and harms nobody.

    Raises:
        TypeError: it cannot be called, or is a coroutine function, which nobody would await.
    """

    def __init__(self, on_event: Callable[[Event], object] | None) -> None:
        if on_event is not None and (not callable(on_event) or iscoroutinefunction(on_event)):
            raise TypeError(f"on_event is a plain function of one Event, not {on_event!r}")
        self._on_event = on_event

    @property
    def reads_attempts(self) -> bool:
        """Whether anybody wants to know of each attempt: most do not, and it costs more than all the rest here."""
        return self._on_event is not None or _log.isEnabledFor(logging.DEBUG)

    def connected(self, source: Source, destination: str, seconds: float) -> None:
        """Tell that an attempt has succeeded."""
        _log.debug("%s to %s: connected in %.1f ms", shown(str(source)), destination, seconds * 1000)
        self._tell(Event("connected", source, destination, seconds=seconds))

    def failed(self, source: Source, destination: str, error: OSError, seconds: float) -> None:
        """Tell that an attempt has failed."""
        reason = error.strerror or error
        _log.debug("%s to %s: failed after %.1f ms: %s", shown(str(source)), destination, seconds * 1000, reason)
        self._tell(Event("failed", source, destination, error, seconds))

    def suspended(self, source: Source, error: OSError, seconds: float, destination: str | None = None) -> None:
        """Tell that a source is left alone, for *destination* or at all."""
        where = f" for {shown(destination)}" if destination else ""
        time = "until its interface is back" if seconds == math.inf else f"for {seconds:.1f} s"
        _log.info("%s is suspended%s %s: %s", shown(str(source)), where, time, error.strerror or error)
        self._tell(Event("suspended", source, destination, error, seconds))

    def recovered(self, source: Source, destination: str | None = None) -> None:
        """Tell that a source is used again."""
        _log.info("%s has recovered%s", shown(str(source)), f" for {shown(destination)}" if destination else "")
        self._tell(Event("recovered", source, destination))

    def unpinned(self, source: Source, destination: str) -> None:
        """Tell that a connection was made without the pin; `_sockets` has logged it."""
        self._tell(Event("unpinned", source, destination))

    def _tell(self, event: Event) -> None:
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                _log.exception("on_event failed at %r", event)
