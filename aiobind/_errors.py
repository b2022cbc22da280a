"""Law: every failure keeps a real errno, names its source and destination, and survives pickling.

    ValueError ── InvalidSource        a source text that means nothing; raised before any socket exists
    OSError ── AiobindError            .source .destination .errno; the whole message is in .strerror
                 ├ ResolveError        also socket.gaierror: a name has no address; errno is an EAI_* code
                 ├ BindError           the source itself failed: the device, its address, its ports, the privilege
                 └ ConnectError        also ConnectionError: the target was tried; .attempts says how each try ended

A ``BindError`` means that nothing was sent, so another source may be tried without doing anything twice.
"""

from __future__ import annotations

import errno as _errno
import socket
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from ._sources import Source

__all__ = ["AiobindError", "Attempt", "BindError", "ConnectError", "InvalidSource", "ResolveError"]

#: Longest piece of a caller's text that a message repeats: enough to recognise it, not enough to flood a log.
_QUOTED = 80


def quoted(text: str) -> str:
    """Return *text* as a literal that is safe to print, cut to a readable length."""
    shown = ascii(text[:_QUOTED])
    if len(text) <= _QUOTED and len(shown) <= 2 * _QUOTED:
        return shown
    return f"{shown[: 2 * _QUOTED]}... ({len(text)} characters)"


def shown(text: str) -> str:
    """Return *text* as it stands where it is short and printable, else escaped and cut, for a message or a log."""
    return text if len(text) <= 2 * _QUOTED and text.isprintable() else quoted(text)


class InvalidSource(ValueError):  # noqa: N818 - the name is public and says what is wrong
    """A text or value that names no source.

    Args:
        text: what was given.
        reason: what is wrong, and at which part.
        hint: the spelling that was probably meant, as advice; empty when there is none.
    """

    def __init__(self, text: str, reason: str, hint: str = "") -> None:
        super().__init__(text, reason, hint)
        self.text = text
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        message = f"invalid source {quoted(self.text)}: {self.reason}"
        return f"{message}; {self.hint}" if self.hint else message


class AiobindError(OSError):
    """What every failure of a connection has in common.

    Attributes:
        errno: the errno of the cause (an ``EAI_*`` code for ``ResolveError``), never a made-up one.
        strerror: the whole message: source, destination, cause and what to do about it.
        source: the source of the connection.
        destination: what the connection was for, as ``"host:port"``.
    """

    source: Source | None
    destination: str | None

    def __init__(
        self, errno: int, strerror: str, *, source: Source | None = None, destination: str | None = None
    ) -> None:
        super().__init__(errno, strerror)
        self.source = source
        self.destination = destination

    def __reduce__(self) -> tuple[Any, ...]:
        keywords = {"source": self.source, "destination": self.destination}
        return _rebuild, (type(self), (self.errno, self.strerror), keywords)


def _rebuild(kind: type[AiobindError], args: tuple[Any, ...], keywords: dict[str, Any]) -> AiobindError:
    return kind(*args, **keywords)


class ResolveError(AiobindError, socket.gaierror):
    """A name could not be resolved: the destination's, or that of a ``host!`` source.

    ``errno`` is an ``EAI_*`` code, as ``socket.gaierror`` promises.
    """


class BindError(AiobindError):
    """The source itself failed; no data was sent to the destination.

    ``errno`` is one of: EPERM (the device pin was refused), ENODEV (no such interface), EADDRNOTAVAIL
    (the address is not usable here, the source has none of the destination's family, or no port is left), EADDRINUSE,
    EINVAL, ENETUNREACH (the source has no way to the destination), EHOSTUNREACH (its interface has no carrier),
    ENETDOWN (its interface or address has gone since it connected, or the source was removed), ETIMEDOUT (it has failed
    before, and gets no answer now),
    EACCES (a privileged port, or a route or filter that prohibits it), EOPNOTSUPP (this platform cannot do it yet).
    """


class Attempt(NamedTuple):
    """One try to reach one address from one source.

    Attributes:
        source: the source that was tried.
        address: the destination's address, as text.
        error: how it ended.
    """

    source: Source | None
    address: str
    error: OSError


class ConnectError(AiobindError, ConnectionError):
    """The destination was tried and could not be reached.

    ``errno`` is that of the first attempt. ``__cause__`` is an ``ExceptionGroup`` of the attempts' errors.
    With ECONNREFUSED the error is a ``ConnectionRefusedError`` too.

    Attributes:
        attempts: how each (source, address) that was tried ended, in the order of the attempts.
    """

    attempts: tuple[Attempt, ...]

    def __new__(cls, errno: int, strerror: str, **keywords: Any) -> Self:
        kind: Any = _Refused if cls is ConnectError and errno == _errno.ECONNREFUSED else cls
        return cast("Self", super().__new__(kind, errno, strerror))

    def __init__(
        self,
        errno: int,
        strerror: str,
        *,
        source: Source | None = None,
        destination: str | None = None,
        attempts: Sequence[Attempt] = (),
    ) -> None:
        super().__init__(errno, strerror, source=source, destination=destination)
        self.attempts = tuple(attempts)
        if attempts:
            self.__cause__ = ExceptionGroup("attempts", [attempt.error for attempt in attempts])

    def __reduce__(self) -> tuple[Any, ...]:
        kind = ConnectError if type(self) is _Refused else type(self)
        keywords = {"source": self.source, "destination": self.destination, "attempts": self.attempts}
        return _rebuild, (kind, (self.errno, self.strerror), keywords)


class _Refused(ConnectError, ConnectionRefusedError):  # noqa: N818 - see below
    """A ``ConnectError`` that ``except ConnectionRefusedError`` catches."""


_Refused.__name__ = _Refused.__qualname__ = "ConnectError"


def is_sources_fault(error: OSError) -> bool:
    """Return whether *error* is the source's own: another source may do better, and nothing was sent yet."""
    if isinstance(error, ConnectError):
        return all(is_sources_fault(attempt.error) for attempt in error.attempts)
    if isinstance(error, ResolveError):
        return error.source is not None  # else it is the destination that has no address
    return isinstance(error, BindError)


#: So many sources are named in the message of an error; its attempts, or its cause, have them all.
_TOLD = 20


def merged(failures: Sequence[AiobindError]) -> AiobindError:
    """Return the one error for a destination that several sources failed to reach, the first one's errno kept."""
    first = failures[0]
    if len(failures) == 1:
        return first
    causes = "; ".join(f"from {shown(str(failure.source))}: {_cause(failure)}" for failure in failures[:_TOLD])
    if len(failures) > _TOLD:
        causes += f"; and from {len(failures) - _TOLD:,} others"
    message = f"connect to {first.destination} failed from each source tried: {causes}"
    attempts = [
        attempt
        for failure in failures
        for attempt in (
            failure.attempts
            if isinstance(failure, ConnectError)
            else (Attempt(failure.source, failure.destination or "", failure),)
        )
    ]
    if any(isinstance(failure, ConnectError) for failure in failures):
        # An errno of the system, so not that of a name.
        numbers = [attempt.error.errno for attempt in attempts if not isinstance(attempt.error, ResolveError)]
        number = next(filter(None, numbers), _errno.EINVAL)
        return ConnectError(number, message, source=first.source, destination=first.destination, attempts=attempts)
    number = first.errno or _errno.EINVAL
    error = type(first)(number, message, source=first.source, destination=first.destination)
    error.__cause__ = ExceptionGroup("one for each source", list(failures))
    return error


def explained(source: Source, destination: str, reason: str) -> str:
    """Return the message of an error: who wanted what, and why not."""
    return f"connect from {shown(str(source))} to {destination}: {reason}"


def _cause(failure: AiobindError) -> str:
    text = failure.strerror or ""
    return text.removeprefix(explained(failure.source, failure.destination or "", "")) if failure.source else text
