"""Law: a policy is pure. It sees the sources and the destination's host, and yields sources in the order to try.

It does no I/O and reads no clock. It yields lazily: the first source is nearly always enough, so choosing costs the
same with one source and with a thousand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ._sources import Source

__all__ = ["Policy", "RoundRobin", "SourceView"]


class SourceView(Protocol):
    """What a policy sees of one source; the figures are live."""

    @property
    def source(self) -> Source:
        """The source."""
        ...

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        ...

    @property
    def in_use(self) -> int:
        """Those of them that are in use; the others lie idle in a pool."""
        ...


class Policy(Protocol):
    """Chooses the source of each connection.

    An instance belongs to one connector. ``order`` is called on the event loop and must not block.
    """

    def order(self, sources: Sequence[SourceView], host: str) -> Iterable[SourceView]:
        """Return *sources* in the order to try them for a connection to *host*.

        The next one is asked for only when the one before has failed for a reason of its own. What is left out is
        not tried.
        """
        ...


class RoundRobin:
    """Each source in its turn (the default)."""

    def __init__(self) -> None:
        self._turn = 0

    def order(self, sources: Sequence[SourceView], host: str) -> Iterator[SourceView]:
        """Return the sources, beginning one further than the last time."""
        count = len(sources)
        first = self._turn % count
        self._turn = first + 1
        for offset in range(count):
            yield sources[(first + offset) % count]
