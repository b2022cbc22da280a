"""Law: what a loop reads for aiobind is there once for each loop, and as long as somebody holds it.

Those who need it share it; the last to let go takes it along, whether it was closed or merely forgotten, and its
descriptor is closed on the loop. The loop itself holds it weakly.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, cast

if TYPE_CHECKING:
    import asyncio

__all__ = ["PerLoop", "Readable"]


class Readable(Protocol):
    """Something with a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is something to read."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class PerLoop:
    """What reads *opened* on *loop*. Get it by ``of``; hold it while it is needed."""

    _of: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[Any]]]

    def __init_subclass__(cls) -> None:
        cls._of = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Self:
        """Return the one of *loop*, which all who ask share.

        Raises:
            OSError: the system does not give it.
            NotImplementedError: the loop reads no descriptors.
        """
        reference = cls._of.get(loop)
        shared: Self | None = reference() if reference else None
        if shared is None:
            shared = cls._open(loop)
            cls._of[loop] = weakref.ref(shared)
        return shared

    @classmethod
    def _open(cls, loop: asyncio.AbstractEventLoop) -> Self:
        """Make the one of *loop*."""
        raise NotImplementedError

    def __init__(self, loop: asyncio.AbstractEventLoop, opened: Readable) -> None:
        try:
            loop.add_reader(opened.fileno(), _on_readable, cast("weakref.ref[PerLoop]", weakref.ref(self)))
        except BaseException:
            opened.close()
            raise
        # Not __del__: the collector may run in any thread, and remove_reader belongs to the loop's.
        weakref.finalize(self, _close, loop, opened).atexit = False

    def on_readable(self) -> object:
        """Read what there is, without ever blocking."""
        raise NotImplementedError


def _on_readable(reference: weakref.ref[PerLoop]) -> None:
    reader = reference()
    if reader is not None:
        reader.on_readable()


def _close(loop: asyncio.AbstractEventLoop, opened: Readable) -> None:
    def close() -> None:
        loop.remove_reader(opened.fileno())
        opened.close()

    try:
        loop.call_soon_threadsafe(close)
    except RuntimeError:  # the loop is closed, and has forgotten its readers
        opened.close()
