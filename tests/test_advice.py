"""What is said of each errno, in each circumstance: provoked where Linux can, by a made-up platform where it cannot."""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from opened import open_bound

from aiobind import BindError
from aiobind._advice import ADVICE, advice
from aiobind._binding import Binding, Target, bind_any
from aiobind._platform import platform
from aiobind._sockets import BoundSocket, _bind

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiobind.lab import Lab

V4, V6 = Target.of(ip_address("127.0.0.1"), 80), Target.of(ip_address("::1"), 80)


def bound(address: str, target: Target, **keywords: Any) -> None:
    open_bound(Binding(local=(ip_address(address),)), target, **keywords).close()


def bound_twice(address: str, target: Target) -> None:
    with BoundSocket(target.family, socket.SOCK_STREAM) as sock:
        sock.bind((address, 0))
        _bind(sock, ip_address(address), target, None, freebind=False)


def taken(address: str, target: Target) -> None:
    with socket.socket() as sock:
        sock.bind((address, 20000))
        sock.listen()
        bound(address, target, port=20000)


def nowhere(address: str, target: Target) -> None:
    refusal = bind_any((ip_address(address),), target)
    raise BindError(*refusal)  # type: ignore[misc]


#: What FreeBSD's in_pcbbind_setup tells apart, and what Linux has besides, as Linux itself says it.
PROVOKED: dict[str, tuple[Callable[[str, Target], None], str, Target, int, str]] = {
    "not local": (bound, "192.0.2.7", V4, errno.EADDRNOTAVAIL, "192.0.2.7 is not usable on this host: no interface of"),
    "not local, IPv6": (bound, "2001:db8::7", V6, errno.EADDRNOTAVAIL, "no interface of this network namespace holds"),
    "already bound": (bound_twice, "127.0.0.1", V4, errno.EINVAL, "the socket has an address or a port already"),
    "already bound, IPv6": (bound_twice, "::1", V6, errno.EINVAL, "the socket has an address or a port already"),
    "port taken": (taken, "127.0.0.1", V4, errno.EADDRINUSE, "no port is left on 127.0.0.1"),
    "no zone": (bound, "fe80::1", V6, errno.EINVAL, "it needs its interface as a zone, as in fe80::1%eth0"),
    "unknown zone": (bound, "fe80::1%nosuch", V6, errno.ENODEV, "the zone of fe80::1%nosuch is no interface"),
    "multicast": (
        nowhere,
        "224.0.0.9",
        V4,
        errno.EADDRNOTAVAIL,
        "224.0.0.9 is no source: a multicast address is bound",
    ),
    "multicast, IPv6": (nowhere, "ff02::1", V6, errno.EADDRNOTAVAIL, "ff02::1 is no source: a multicast address"),
}


@pytest.mark.parametrize(("provoke", "address", "target", "number", "words"), PROVOKED.values(), ids=list(PROVOKED))
def test_as_linux_says_it(
    make_lab: Callable[[int], Lab],
    provoke: Callable[[str, Target], None],
    address: str,
    target: Target,
    number: int,
    words: str,
) -> None:
    make_lab(0)
    with pytest.raises(BindError) as caught:
        provoke(address, target)
    assert caught.value.errno == number
    assert words in (caught.value.strerror or "")


@pytest.mark.parametrize(("address", "target"), [("127.0.0.1", V4), ("::1", V6)])
def test_no_address_at_all(make_lab: Callable[[int], Lab], address: str, target: Target) -> None:
    lab = make_lab(0)
    lab.near.ip("link set lo down", "addr flush dev lo")
    with pytest.raises(BindError, match=r"no interface of this network namespace has any IPv. address") as caught:
        bound(address, target)
    assert caught.value.errno == errno.EADDRNOTAVAIL


class FreeBSD:
    """A platform that answers as FreeBSD's bind() would, in or outside of a jail."""

    def __init__(self, place: str, number: int, *, has_address: bool) -> None:
        self.place, self._number, self._has_address = place, number, has_address
        self.socket_flags = platform.socket_flags

    def bind(self, sock: socket.socket, ip: object, port: int | None, *, freebind: bool = False) -> None:
        raise OSError(self._number, os.strerror(self._number))

    def has_address(self, version: int) -> bool:
        return self._has_address

    def prepare(self, sock: socket.socket) -> None:
        pass

    def recipe(self, ifindex: int) -> None:
        pass


@pytest.mark.parametrize(
    ("place", "number", "has_address", "words"),
    [
        ("host", errno.EADDRNOTAVAIL, False, "no interface of this host has any IPv4 address"),
        ("jail", errno.EADDRNOTAVAIL, False, "no interface of this jail has any IPv4 address"),
        ("host", errno.EADDRNOTAVAIL, True, "192.0.2.7 is not usable on this host: no interface of this host holds it"),
        ("jail", errno.EADDRNOTAVAIL, True, "192.0.2.7 is not one of the addresses that this jail may use"),
        ("host", errno.EINVAL, True, "its length is not that of an address of this family"),
        ("host", errno.EAFNOSUPPORT, True, "192.0.2.7 is not of the socket's address family"),
        ("jail", errno.EAFNOSUPPORT, True, "192.0.2.7 cannot be used: this jail has no IPv4"),
        ("host", errno.EIO, True, f"192.0.2.7: {os.strerror(errno.EIO)}"),
    ],
)
def test_as_another_platform_says_it(
    monkeypatch: pytest.MonkeyPatch, place: str, number: int, has_address: bool, words: str
) -> None:
    monkeypatch.setattr("aiobind._sockets.platform", FreeBSD(place, number, has_address=has_address))
    with pytest.raises(BindError) as caught:
        bound("192.0.2.7", V4)
    assert caught.value.errno == number
    assert words in (caught.value.strerror or "")


def test_each_row_has_words_of_its_own() -> None:
    about = {"subject": "S", "place": "P", "family": "F", "what": "W"}
    texts = [advice(*row, **about) for row in ADVICE]
    assert len(set(texts)) == len(texts)
    assert all(text and "{" not in text for text in texts)


def test_an_unknown_circumstance_is_told_by_its_errno() -> None:
    assert advice("connect", errno.ENODEV, "jail") == advice("connect", errno.ENODEV)
    assert advice("connect", errno.EIO) is None
