"""Errors: the tree, the errno, the message, and what pickling keeps."""

import copy
import errno
import pickle
import socket

import pytest

from aiobind._errors import (
    AiobindError,
    Attempt,
    BindError,
    ConnectError,
    InvalidSource,
    ResolveError,
    quoted,
)
from aiobind._sources import Address, Host, Interface, Prefix

ETH0 = Interface("eth0", local=Address("fe80::1%eth0"))
ABOUT = {"source": ETH0, "destination": "example.com:443"}

BIND = BindError(errno.ENODEV, "no interface named 'eth0'", **ABOUT)
ATTEMPTS = (
    Attempt(Host("crawler3.example"), "192.0.2.1", TimeoutError(errno.ETIMEDOUT, "Connection timed out")),
    Attempt(ETH0, "2001:db8::1", BIND),
    Attempt(
        Prefix("2001:db8:7::/64"),
        "2001:db8::2",
        ConnectError(
            errno.ECONNREFUSED,
            "inner",
            attempts=[Attempt(ETH0, "::1", ConnectionRefusedError(errno.ECONNREFUSED, "refused"))],
            **ABOUT,
        ),
    ),
)
ERRORS = [
    AiobindError(errno.EIO, "a message", **ABOUT),
    BIND,
    ResolveError(socket.EAI_NONAME, "no such name", source=Host("no.example"), destination="example.com:443"),
    ConnectError(errno.ETIMEDOUT, "timed out", attempts=ATTEMPTS, **ABOUT),
    ConnectError(errno.ECONNREFUSED, "refused", attempts=ATTEMPTS[2:], **ABOUT),
    ConnectError(errno.ECONNREFUSED, "not tried", **ABOUT),
]


def again(error):
    """Copies of *error*, by each way that there is."""
    yield copy.copy(error)
    yield copy.deepcopy(error)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(error, protocol))


def same(one, other):
    """Whether two errors tell the same, down to the causes."""
    if type(one) is not type(other):
        return False
    if isinstance(one, ExceptionGroup):
        pairs = zip(one.exceptions, other.exceptions, strict=True)
        return one.message == other.message and all(same(*pair) for pair in pairs)
    if one.args != other.args:
        return False
    if isinstance(one, AiobindError) and (one.source, one.destination) != (other.source, other.destination):
        return False
    if isinstance(one, ConnectError):
        pairs = list(zip(one.attempts, other.attempts, strict=True))
        if not all(a[:2] == b[:2] and same(a.error, b.error) for a, b in pairs):
            return False
    causes = (one.__cause__, other.__cause__)
    return causes == (None, None) or same(*causes)


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        (InvalidSource, {ValueError}),
        (AiobindError, {OSError}),
        (BindError, {AiobindError}),
        (ResolveError, {AiobindError, socket.gaierror}),
        (ConnectError, {AiobindError, ConnectionError}),
    ],
)
def test_tree(kind, bases):
    assert set(kind.__bases__) == bases
    assert not issubclass(kind, ValueError) or not issubclass(kind, OSError)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_error_has_what_the_tree_promises(error):
    number, message = error.args
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror) == (number, message)
    assert str(error) == f"[Errno {number}] {message}"
    assert error.destination == "example.com:443"
    assert error.source in {ETH0, Host("no.example")}
    assert repr(error) == f"{type(error).__name__}({number}, {message!r})"


@pytest.mark.parametrize("kind", [AiobindError, BindError, ResolveError, ConnectError])
def test_source_and_destination_may_be_unknown(kind):
    error = kind(errno.EIO, "a message")
    assert error.source is None
    assert error.destination is None


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_pickling_keeps_everything(error):
    for other in again(error):
        assert other is not error
        assert same(other, error)
        assert str(other) == str(error)


def test_pickling_keeps_nested_attempts_and_causes():
    error = pickle.loads(pickle.dumps(ERRORS[3]))
    inner = error.attempts[2].error
    assert [attempt.source for attempt in error.attempts] == [attempt.source for attempt in ATTEMPTS]
    assert isinstance(error.attempts[0].error, TimeoutError)
    assert error.attempts[1].error.source == ETH0
    assert isinstance(inner, ConnectionRefusedError)
    assert inner.attempts[0].address == "::1"
    assert isinstance(inner.__cause__.exceptions[0], ConnectionRefusedError)
    # The group holds the attempts' own errors, not copies of them.
    for attempt, cause in zip(error.attempts, error.__cause__.exceptions, strict=True):
        assert attempt.error is cause


def test_attempts_are_the_cause():
    error = ConnectError(errno.ETIMEDOUT, "timed out", attempts=list(ATTEMPTS))
    assert error.attempts == ATTEMPTS
    assert isinstance(error.attempts, tuple)
    assert error.__cause__.exceptions == tuple(attempt.error for attempt in ATTEMPTS)
    assert ConnectError(errno.ETIMEDOUT, "timed out").attempts == ()
    assert ConnectError(errno.ETIMEDOUT, "timed out").__cause__ is None


def test_refused_is_caught_as_such():
    error = ConnectError(errno.ECONNREFUSED, "refused", attempts=ATTEMPTS[:1], **ABOUT)
    for one in (error, *again(error)):
        assert isinstance(one, ConnectionRefusedError)
        assert isinstance(one, ConnectError)
        assert type(one).__name__ == type(one).__qualname__ == "ConnectError"
        assert one.errno == errno.ECONNREFUSED


@pytest.mark.parametrize(
    "number", [errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE, errno.ENETUNREACH, errno.ECONNABORTED]
)
def test_nothing_else_is_caught_as_refused(number):
    for one in (error := ConnectError(number, "a message"), *again(error)):
        assert type(one) is ConnectError
        assert not isinstance(one, ConnectionRefusedError)


class SpecialError(ConnectError):
    """What a user may derive."""


@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.ETIMEDOUT])
def test_a_derived_error_keeps_its_type(number):
    error = SpecialError(number, "a message", attempts=ATTEMPTS, **ABOUT)
    for one in (error, *again(error)):
        assert type(one) is SpecialError
        assert same(one, error)


# InvalidSource, and what messages repeat of a text


def test_invalid_source():
    error = InvalidSource("eth0", "a plain word", "did you mean 'if!eth0'?")
    assert (error.text, error.reason, error.hint) == ("eth0", "a plain word", "did you mean 'if!eth0'?")
    assert str(error) == "invalid source 'eth0': a plain word; did you mean 'if!eth0'?"
    assert str(InvalidSource("eth0", "a plain word")) == "invalid source 'eth0': a plain word"


@pytest.mark.parametrize("text", ["", "eth0", "\ud800\0\n", "x" * 1_000_000])
def test_invalid_source_pickles(text):
    error = InvalidSource(text, "a reason", "a hint")
    for other in again(error):
        assert type(other) is InvalidSource
        assert (other.text, other.reason, other.hint) == (text, "a reason", "a hint")
        assert str(other) == str(error)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "''"),
        ("eth0", "'eth0'"),
        ("it's", '"it\'s"'),
        ("\xe9\n\0\x1b[31m", r"'\xe9\n\x00\x1b[31m'"),
        ("\ud800", r"'\ud800'"),
        ("x" * 80, f"'{'x' * 80}'"),
        ("x" * 81, f"'{'x' * 80}'... (81 characters)"),
        ("x" * 1_000_000, f"'{'x' * 80}'... (1000000 characters)"),
    ],
)
def test_quoted(text, shown):
    assert quoted(text) == shown


@pytest.mark.parametrize("character", ["x", "\0", "\n", "\x1b", "\xe9", "\ud800", "\u202e", "\U0001f600", "'"])
@pytest.mark.parametrize("length", [1, 79, 80, 81, 1_000_000])
def test_messages_never_flood(character, length):
    message = str(InvalidSource(character * length, "a reason", "a hint"))
    assert message.isascii()
    assert message.isprintable()
    # An escape takes up to ten characters (\U0001f600), so 80 of them take 800.
    assert len(message) < 900
    assert message.endswith(": a reason; a hint")
