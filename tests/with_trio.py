"""The loops of a module whose tests run on trio too: ``from with_trio import anyio_backend, no_tasks_left_in_trio``."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio

from aiobind._guest import GuestLoop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

BACKENDS = {"asyncio": ("asyncio", {}), "uvloop": ("asyncio", {"use_uvloop": True}), "trio": ("trio", {})}


@pytest.fixture(scope="module", params=BACKENDS.values(), ids=list(BACKENDS))
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
async def no_tasks_left_in_trio(anyio_backend_name: str) -> AsyncIterator[None]:
    """Of asyncio's the conftest has an eye on."""
    yield
    if anyio_backend_name == "trio":
        await until(lambda: not _tasks_of_guest())


def _tasks_of_guest() -> list[object]:
    def below(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                yield child
                yield from below(child)

    root = trio.lowlevel.current_root_task()
    assert root is not None
    guests = [asyncio.all_tasks(guest) for guest in GuestLoop._of.values()]
    return [*(task for task in below(root) if task.name.startswith("aiobind: ")), *(t for g in guests for t in g)]


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():
            gc.collect()
            await anyio.sleep(0.001)
