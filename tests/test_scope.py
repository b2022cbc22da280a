"""What ``use_source`` pins, for whom, and until when."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from typing import TYPE_CHECKING

import pytest

import aiobind
from aiobind import InvalidSource, parse_source, use_source
from aiobind._scope import pinned, scoped

if TYPE_CHECKING:
    from aiobind import Source

A, B, C = map(parse_source, ("if!a", "192.0.2.2", "host!c.example"))
MINE, OTHER = object(), object()


def pins() -> tuple[Source | None, Source | None]:
    """What holds for a connector, and for another one."""
    return pinned(MINE), pinned(OTHER)


def test_nothing_is_pinned_by_default() -> None:
    assert pins() == (None, None)


@pytest.mark.parametrize("source", ["if!a", A])
def test_any_connector(source: str | Source) -> None:
    with use_source(source) as pin:
        assert pin == A
        assert pins() == (A, A)
    assert pins() == (None, None)


def test_one_connector() -> None:
    with scoped(MINE, A) as pin:
        assert pin == A
        assert pins() == (A, None)
    assert pins() == (None, None)


def test_the_inner_one_wins() -> None:
    with use_source(A):
        with use_source(B):
            with use_source(C):
                assert pins() == (C, C)
            assert pins() == (B, B)
        assert pins() == (A, A)
    with scoped(MINE, A):
        with scoped(MINE, B):
            assert pins() == (B, None)
        assert pins() == (A, None)


def test_a_connectors_own_wins_inside_as_well_as_outside() -> None:
    with use_source(A), scoped(MINE, B):
        assert pins() == (B, A)
    with scoped(MINE, B), use_source(A):
        assert pins() == (B, A)
        with scoped(MINE, C):
            assert pins() == (C, A)
        assert pins() == (B, A)


def test_connectors_are_independent() -> None:
    with scoped(MINE, A), scoped(OTHER, B):
        assert pins() == (A, B)
        with scoped(MINE, C):
            assert pins() == (C, B)
    assert pins() == (None, None)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
def test_an_exception_ends_it(error: type[BaseException]) -> None:
    for block in (scoped(MINE, B), use_source(C)):
        with pytest.raises(error), block:
            raise error
        assert pins() == (None, None)


@pytest.mark.parametrize("text", ["eth0", "", "if!"])
def test_a_wrong_source_pins_nothing(text: str) -> None:
    with use_source(A):
        with pytest.raises(InvalidSource), use_source(text):
            pytest.fail("entered")
        with pytest.raises(TypeError), use_source(None):  # type: ignore[arg-type]
            pytest.fail("entered")
        assert pins() == (A, A)


@pytest.mark.anyio
async def test_tasks_inherit_it() -> None:
    started = asyncio.Event()

    async def child() -> list[tuple[Source | None, Source | None]]:
        seen = [pins()]
        await started.wait()
        seen.append(pins())
        with use_source(C):
            seen.append(pins())
        return seen

    with use_source(A), scoped(MINE, B):
        inside = asyncio.create_task(child())
        await asyncio.sleep(0)
    outside = asyncio.create_task(child())
    started.set()
    assert await inside == [(B, A), (B, A), (B, C)]  # also when the block has been left
    assert await outside == [(None, None), (None, None), (C, C)]
    assert pins() == (None, None)


@pytest.mark.anyio
async def test_tasks_do_not_see_each_others() -> None:
    async def pin(source: Source) -> None:
        with scoped(MINE, source):
            for _ in range(5):
                await asyncio.sleep(0)
                assert pins() == (source, None)

    await asyncio.gather(pin(A), pin(B), pin(C))


def test_another_thread_has_none() -> None:
    seen: list[object] = []
    with use_source(A):
        thread = threading.Thread(target=lambda: seen.append(pins()))
        thread.start()
        thread.join()
        assert contextvars.copy_context().run(pins) == (A, A)
    assert seen == [(None, None)]


@pytest.mark.anyio
async def test_the_argument_wins_over_both_and_the_own_one_over_any() -> None:
    """Through real connectors: a source that nobody has fails with its own name in the error."""

    async def tried(connector: aiobind.Connector, **keywords: str) -> str:
        with pytest.raises(aiobind.BindError) as caught:
            await connector.connect("127.0.0.1", 9, **keywords)  # type: ignore[arg-type]
        return str(caught.value.source)

    one, two = aiobind.Connector("if!none1"), aiobind.Connector("if!none2")
    assert (await tried(one), await tried(two)) == ("if!none1", "if!none2")
    with use_source("if!any"), one.use_source("if!own"):
        assert (await tried(one), await tried(two)) == ("if!own", "if!any")
        assert await tried(one, source="if!argument") == "if!argument"
    with one.use_source("if!own"), use_source("if!any"):
        assert (await tried(one), await tried(two)) == ("if!own", "if!any")
        assert await tried(two, source="if!argument") == "if!argument"
    assert (await tried(one), await tried(two)) == ("if!none1", "if!none2")


def test_a_pin_does_not_hold_its_connector() -> None:
    connector = aiobind.Connector("if!lo")
    gone = weakref.ref(connector)
    with connector.use_source(A):
        context = contextvars.copy_context()
        del connector
        gc.collect()
        assert gone() is None
    assert context is not None
