"""How the small examples are run: what they take as arguments, one line for each error, and 130 after Ctrl-C."""

import asyncio
import inspect
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import aiobind

NAME = sys.argv[0].rpartition("/")[2].removesuffix(".py")


def run(main: Callable[..., Coroutine[Any, Any, int | None]], log: str = "WARNING") -> None:
    """Run *main* with the arguments of the program; *log* is from which level on its client is heard."""
    logging.basicConfig(format=f"{NAME}: %(message)s", level=log)
    takes = inspect.signature(main).parameters
    if not sum(each.default is each.empty for each in takes.values()) < len(sys.argv) <= len(takes) + 1:
        sys.exit(f"usage: {NAME}.py {' '.join(takes).upper()}")
    try:
        sys.exit(asyncio.run(main(*sys.argv[1:])))
    except Exception as error:
        sys.exit(said(error))
    except KeyboardInterrupt:
        sys.exit(130)


def said(error: BaseException) -> str:
    """Return what aiobind says if the client's error has come from it, else what the client says."""
    last: BaseException | None = error
    while last is not None and not isinstance(last, aiobind.AiobindError):
        last = last.__cause__ or last.__context__
    return f"{NAME}: {(last.strerror if last else str(error)) or type(error).__name__}"


async def say(error: Exception) -> None:
    """Tell of an error after which the client goes on."""
    print(said(error), file=sys.stderr)
