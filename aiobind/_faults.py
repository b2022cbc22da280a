"""Law: whose fault a failure is, and in which words it is told.

A ``BindError`` is the source's own, and the next one may do better. What the target, or nobody, has answered is no
fault of the source, unless another one shows that it can be reached (`_health.Timeouts`).
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from functools import lru_cache
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from ._advice import advice
from ._errors import AiobindError, Attempt, BindError, ConnectError, ResolveError, explained, shown
from ._interfaces import NoNeighbourError
from ._wait import NoPeerError

if TYPE_CHECKING:
    from ._binding import Refusal, Target
    from ._sources import Source

__all__ = [
    "ANSWERS",
    "NO_ANSWER",
    "NoPortError",
    "bare",
    "combined",
    "destination_of",
    "gone",
    "place_of",
    "plain",
    "suspended",
    "unresolved",
    "with_context",
]

#: Nobody has answered, or a router instead of the target: the source may have lost its way, or the target be down.
NO_ANSWER: Final = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH})
#: The target itself has answered.
ANSWERS: Final = frozenset({errno.ECONNREFUSED, errno.ECONNRESET})


class NoPortError(BindError):
    """The source has no port left for one destination."""


@lru_cache(maxsize=4096)
def place_of(host: str) -> str:
    """Return *host* as it is compared: without case and the dot of the root, and as it is asked for (IDNA).

    An IPv6 address has one form, and no brackets.
    """
    if ":" in host:
        with suppress(ValueError):
            return str(ip_address(host.strip("[]")))
    if not host.isascii():
        with suppress(UnicodeError):
            host = host.encode("idna").decode()
    return host.rstrip(".").lower()


def destination_of(host: str, port: int) -> str:
    """Return the destination as people write it."""
    text = shown(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def unresolved(
    host: str, port: int, reason: str, number: int | None = None, source: Source | None = None
) -> ResolveError:
    destination = destination_of(host, port)
    text = f"connect to {destination}: {reason}" if source is None else explained(source, destination, reason)
    return ResolveError(number or socket.EAI_NONAME, text, source=source, destination=destination)


def with_context(error: AiobindError, source: Source, destination: str) -> AiobindError:
    text = explained(source, destination, error.strerror or "")
    return type(error)(error.errno or errno.EINVAL, text, source=source, destination=destination)


def gone(source: Source, destination: str) -> BindError:
    """Return what has become of a connection whose interface or address has gone."""
    text = explained(source, destination, "its interface or address has gone since it connected")
    return BindError(errno.ENETDOWN, text, source=source, destination=destination)


def bare(error: OSError) -> OSError:
    """Return *error* without its traceback, whose frames hold the list of errors that it is going to be in."""
    return error.with_traceback(None)


def plain(error: OSError, *, sent: bool) -> OSError:
    """Return what connect(2) answered, in plain words, as the source's failure or the target's."""
    number = error.errno or errno.EINVAL
    if isinstance(error, (NoNeighbourError, NoPeerError)):
        return OSError(number, error.strerror)
    text = None if sent else advice("connect", number)
    if text is not None:  # nothing was sent: that is the source's fault, and another one may do better
        return BindError(number, text)
    return OSError(number, advice("answer", number) or os.strerror(number).lower())


def combined(
    source: Source, destination: str, tried: list[tuple[Target, OSError]], refusals: list[Refusal]
) -> AiobindError:
    """Return the one error for all that was tried; a source that could serve no target is a BindError."""
    not_tried = "; ".join(dict.fromkeys(refusal.reason for refusal in refusals))
    if not tried:
        error = BindError(refusals[0].errno, not_tried)
        return with_context(error, source, destination)
    if len(tried) == 1 and str(tried[0][0]) == destination:
        reason = tried[0][1].strerror or ""
    else:
        reason = "; ".join(f"{target}: {error.strerror}" for target, error in tried)
    if not_tried:
        reason = f"{reason} (not tried: {not_tried})"
    first = tried[0][1]
    number, text = first.errno or errno.EINVAL, explained(source, destination, reason)
    if all(isinstance(error, BindError) for _, error in tried):
        failure = BindError(number, text, source=source, destination=destination)
        failure.__cause__ = first if len(tried) == 1 else ExceptionGroup("attempts", [error for _, error in tried])
        return failure
    attempts = [Attempt(source, str(target), error) for target, error in tried]
    return ConnectError(number, text, source=source, destination=destination, attempts=attempts)


def suspended(cause: OSError | None, seconds: float) -> BindError:
    """Return why a source is not tried, which has failed for *cause*, for so many *seconds* to come."""
    until = f"for another {seconds:.1f} s" if seconds > 0 else "until somebody has found out how it is now"
    if cause is None:
        cause = OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
    return BindError(cause.errno or errno.ENETUNREACH, f"it is suspended {until}: {cause.strerror}")
