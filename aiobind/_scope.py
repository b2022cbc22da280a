"""Law: the source that the surrounding code has pinned, carried by the context, so that tasks inherit it."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from ._sources import parse_source

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from ._sources import Source

__all__ = ["pinned", "scoped", "use_source"]

#: By scope: None is every connector; a connector's own scope is an object that stands for it and does not hold it.
_pins: ContextVar[Mapping[object, Source]] = ContextVar("aiobind_use_source", default={})  # noqa: B039 - never changed


@contextmanager
def scoped(scope: object, source: str | Source) -> Generator[Source]:
    """Pin what is made inside the ``with`` block by the connectors of *scope*."""
    pin = parse_source(source)
    token = _pins.set({**_pins.get(), scope: pin})
    try:
        yield pin
    finally:
        _pins.reset(token)


def use_source(source: str | Source) -> AbstractContextManager[Source]:
    """Pin the connections and requests that are made inside the ``with`` block to *source*, for any connector.

    A connector's own ``use_source`` wins over this one, and the argument ``source=`` wins over both. Tasks created
    inside inherit the pin. A pinned request never moves to another source.

    Args:
        source: any source, also one that is not in a connector's list.

    Raises:
        InvalidSource: *source* names no source.
    """
    return scoped(None, source)


def pinned(scope: object) -> Source | None:
    """Return the source that the context pins for the connector with *scope*."""
    pins = _pins.get()
    return (pins.get(scope) or pins.get(None)) if pins else None
