"""What is done to a socket, as tables: one row is one rule. At the end the kernel is asked whether they are needed."""

from __future__ import annotations

import errno
import re
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aiobind._binding import Binding, Exempt, Link, LinkAddress, Refusal, Target, bind_any, bind_on_link, listed
from aiobind._interfaces import Interfaces
from aiobind._platform import platform

if TYPE_CHECKING:
    from aiobind._binding import IPAddress
    from aiobind.lab import Lab

HOST, LINK, SITE, GLOBAL = 254, 253, 200, 0  # rtnetlink(7), rtm_scope


def to(text: str, scope_id: int = 0) -> Target:
    return Target.of(ip_address(text), 443, scope_id)


def ips(*texts: str) -> tuple[IPAddress, ...]:
    return tuple(ip_address(text) for text in texts)


def held(text: str) -> LinkAddress:
    """Read an address with its marks: ``"192.0.2.7 scope=253 deprecated"``."""
    address, *marks = text.split()
    ip = ip_address(address)
    scope = LINK if ip.version == 6 and ip.is_link_local else HOST if ip.is_loopback else GLOBAL
    for mark in marks:
        if mark.startswith("scope="):
            scope = int(mark.removeprefix("scope="))
    return LinkAddress(ip, scope, "tentative" in marks, "deprecated" in marks)


def a_link(*addresses: str, index: int = 7, name: str = "eth0", **more: Any) -> Link:
    return Link(index, name, addresses={held(a).ip.compressed: held(a) for a in addresses}, **more)


def lo(*more: str) -> Link:
    return a_link("127.0.0.1", "::1", *more, index=1, name="lo", loopback=True)


def assert_refused(decision: Binding | Refusal, number: int, reason: str) -> None:
    assert isinstance(decision, Refusal), decision
    assert (errno.errorcode[decision.errno], reason in decision.reason) == (errno.errorcode[number], True), decision


# --- targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "family", "reach", "shown"),
    [
        ("192.0.2.1", socket.AF_INET, "global", "192.0.2.1:443"),
        ("10.0.0.1", socket.AF_INET, "global", "10.0.0.1:443"),
        ("127.0.0.1", socket.AF_INET, "loopback", "127.0.0.1:443"),
        ("127.255.0.9", socket.AF_INET, "loopback", "127.255.0.9:443"),
        ("0.0.0.0", socket.AF_INET, "loopback", "0.0.0.0:443"),
        ("169.254.1.1", socket.AF_INET, "link", "169.254.1.1:443"),
        ("2001:db8::1", socket.AF_INET6, "global", "[2001:db8::1]:443"),
        ("fd00::1", socket.AF_INET6, "global", "[fd00::1]:443"),
        ("::1", socket.AF_INET6, "loopback", "[::1]:443"),
        ("::", socket.AF_INET6, "loopback", "[::]:443"),
        ("fe80::1", socket.AF_INET6, "link", "[fe80::1]:443"),
        ("fe80::1%eth0", socket.AF_INET6, "link", "[fe80::1]:443"),
        ("::ffff:192.0.2.1", socket.AF_INET, "global", "192.0.2.1:443"),
        ("::ffff:127.0.0.1", socket.AF_INET, "loopback", "127.0.0.1:443"),
    ],
)
def test_a_target_knows_its_family_and_its_reach(text: str, family: int, reach: str, shown: str) -> None:
    target = to(text)
    assert (target.family, target.reach, str(target)) == (family, reach, shown)


def test_the_zone_of_a_target_is_in_its_socket_address() -> None:
    assert to("fe80::1", 7).sockaddr == ("fe80::1", 443, 0, 7)
    assert to("2001:db8::1").sockaddr == ("2001:db8::1", 443, 0, 0)
    assert to("192.0.2.1", 7).sockaddr == ("192.0.2.1", 443)  # IPv4 has no zones


# --- a source that names its addresses ----------------------------------------------------------------------

BOTH = ips("192.0.2.7", "2001:db8::7", "192.0.2.8")
OWN = {"127.0.0.1", "192.0.2.7", "::1", "2001:db8::7", "fe80::9"}


@pytest.mark.parametrize(
    ("local", "target", "bound"),
    [
        (("192.0.2.7",), "198.51.100.1", ["192.0.2.7"]),
        (("2001:db8::7",), "2001:db8:9::1", ["2001:db8::7"]),
        (("fe80::7%eth0",), "fe80::1", ["fe80::7%eth0"]),
        # of two families: those of the target's, in their order
        (("192.0.2.7", "2001:db8::7", "192.0.2.8"), "198.51.100.1", ["192.0.2.7", "192.0.2.8"]),
        (("192.0.2.7", "2001:db8::7", "192.0.2.8"), "2001:db8:9::1", ["2001:db8::7"]),
        # loopback reaches loopback, and this host's other addresses
        (("127.0.0.5",), "127.0.0.1", ["127.0.0.5"]),
        (("127.0.0.5",), "0.0.0.0", ["127.0.0.5"]),
        (("127.0.0.5",), "192.0.2.7", ["127.0.0.5"]),
        (("::1",), "2001:db8::7", ["::1"]),
        # another address reaches loopback too
        (("192.0.2.7",), "127.0.0.1", ["192.0.2.7"]),
        # what cannot come from here is left out
        (("127.0.0.1", "192.0.2.7"), "198.51.100.1", ["192.0.2.7"]),
    ],
)
def test_a_named_address_is_bound(local: tuple[str, ...], target: str, bound: list[str]) -> None:
    assert bind_any(ips(*local), to(target), own=OWN) == Binding(None, ips(*bound))


@pytest.mark.parametrize(
    ("local", "target", "number", "reason"),
    [
        (("192.0.2.7",), "2001:db8::1", errno.EADDRNOTAVAIL, "no IPv6 address (it has 192.0.2.7)"),
        (("2001:db8::7", "::1"), "192.0.2.1", errno.EADDRNOTAVAIL, "no IPv4 address (it has 2001:db8::7, ::1)"),
        (("127.0.0.1",), "198.51.100.1", errno.ENETUNREACH, "from the loopback address 127.0.0.1 only this host"),
        (("127.0.0.9", "2001:db8::7"), "198.51.100.1", errno.ENETUNREACH, "the loopback address 127.0.0.9"),
        (("::1",), "fe80::1", errno.ENETUNREACH, "from the loopback address ::1"),
    ],
)
def test_a_named_address_that_cannot_serve_is_refused(
    local: tuple[str, ...], target: str, number: int, reason: str
) -> None:
    assert_refused(bind_any(ips(*local), to(target), own=OWN), number, reason)


def test_device_and_freebind_are_passed_on() -> None:
    binding = bind_any(BOTH, to("2001:db8::1"), device="eth0", freebind=True)
    assert binding == Binding("eth0", ips("2001:db8::7"), freebind=True)
    assert binding.owner is None


# --- a source that is an interface --------------------------------------------------------------------------

PICKS = {
    "its address": (a_link("192.0.2.7"), "198.51.100.1", ["192.0.2.7"]),
    "its addresses": (a_link("192.0.2.8", "192.0.2.7"), "198.51.100.1", ["192.0.2.8", "192.0.2.7"]),
    "its IPv6 address": (a_link("192.0.2.7", "fe80::7", "2001:db8::7"), "2001:db8:9::1", ["2001:db8::7"]),
    "one ready among tentative": (a_link("2001:db8::7 tentative", "2001:db8::8"), "2001:db8:9::1", ["2001:db8::8"]),
    "link-local to link-local": (a_link("fe80::7", "2001:db8::7"), "fe80::1", ["fe80::7"]),
    "link-local, its own zone": (a_link("fe80::7"), ("fe80::1", 7), ["fe80::7"]),
    # every link has its own fe80::1, often the router
    "link-local, an own address elsewhere": (a_link("fe80::7"), ("fe80::9", 7), ["fe80::7"]),
    "IPv4 link-local target": (a_link("192.0.2.7"), "169.254.1.1", ["192.0.2.7"]),
    "IPv4 link-local source": (a_link("169.254.7.7"), "169.254.1.1", ["169.254.7.7"]),
    "own address of the interface": (a_link("192.0.2.7"), "192.0.2.7", ["192.0.2.7"]),
    "loopback": (lo(), "127.0.0.1", ["127.0.0.1"]),
    "loopback, another of the net": (lo(), "127.9.9.9", ["127.0.0.1"]),
    "loopback of IPv6": (lo(), "::1", ["::1"]),
    "loopback, unspecified": (lo(), "0.0.0.0", ["127.0.0.1"]),
    "own address through lo": (lo(), "192.0.2.7", ["127.0.0.1"]),
    "own address of IPv6 through lo": (lo(), "2001:db8::7", ["::1"]),
    "an address of lo that reaches farther": (lo("192.0.2.7"), "127.0.0.1", ["192.0.2.7", "127.0.0.1"]),
    # the kernel would pass them over for another interface's address
    "deprecated": (a_link("2001:db8::7 deprecated", "fe80::7"), "2001:db8:9::1", ["2001:db8::7"]),
    "IPv4 of scope link": (a_link("192.0.2.7 scope=253"), "198.51.100.1", ["192.0.2.7"]),
    "IPv4 of scope link, link-local target": (a_link("192.0.2.7 scope=253"), "169.254.1.1", ["192.0.2.7"]),
    "IPv4 of scope site": (a_link("192.0.2.7 scope=200"), "198.51.100.1", ["192.0.2.7"]),
    "IPv6 of scope site": (a_link("fec0::7 scope=200", "fe80::7"), "2001:db8:9::1", ["fec0::7"]),
    # the best one first: not deprecated, then of the widest scope
    "one good among lesser": (a_link("192.0.2.7 deprecated", "192.0.2.8"), "198.51.100.1", ["192.0.2.8", "192.0.2.7"]),
    "several lesser": (
        a_link("192.0.2.6 deprecated scope=253", "192.0.2.7 deprecated", "192.0.2.8 scope=253", "192.0.2.9 tentative"),
        "198.51.100.1",
        ["192.0.2.8", "192.0.2.7", "192.0.2.6"],
    ),
    "by scope": (
        a_link("192.0.2.7 scope=253", "192.0.2.8 scope=200", "192.0.2.9"),
        "198.51.100.1",
        ["192.0.2.9", "192.0.2.8", "192.0.2.7"],
    ),
}


@pytest.mark.parametrize(("link", "target", "bound"), PICKS.values(), ids=PICKS)
def test_an_interface_is_pinned_and_its_own_address_used(
    link: Link, target: str | tuple[str, int], bound: list[str]
) -> None:
    target = (target, 0) if isinstance(target, str) else target
    assert bind_on_link(link, to(*target), OWN) == Binding(link.name, ips(*bound), owner=link)


REFUSALS = {
    "no address": (a_link(), "192.0.2.1", errno.EADDRNOTAVAIL, "eth0 has no IPv4 address"),
    "other family": (a_link("192.0.2.7"), "2001:db8::1", errno.EADDRNOTAVAIL, "eth0 has no IPv6 address"),
    "tentative": (
        a_link("2001:db8::7 tentative"),
        "2001:db8::1",
        errno.EADDRNOTAVAIL,
        "eth0 has only tentative IPv6 addresses",
    ),
    "link-local only": (
        a_link("fe80::7"),
        "2001:db8::1",
        errno.EADDRNOTAVAIL,
        "eth0 has only link-local IPv6 addresses",
    ),
    "link-local only, the other tentative": (
        a_link("fe80::7", "2001:db8::7 tentative"),
        "2001:db8::1",
        errno.EADDRNOTAVAIL,
        "eth0 has only link-local IPv6 addresses",
    ),
    "no link-local": (a_link("2001:db8::7"), "fe80::1", errno.EADDRNOTAVAIL, "eth0 has no link-local IPv6 address"),
    "link-local, but tentative": (
        a_link("2001:db8::7", "fe80::7 tentative"),
        "fe80::1",
        errno.EADDRNOTAVAIL,
        "eth0 has no link-local IPv6 address",
    ),
    "other zone": (a_link("fe80::7"), ("fe80::1", 8), errno.ENETUNREACH, "zone of another interface than eth0"),
    "loopback through a NIC": (
        a_link("192.0.2.7"),
        "127.0.0.1",
        errno.ENETUNREACH,
        "a loopback address cannot be reached through eth0",
    ),
    "unspecified through a NIC": (a_link("2001:db8::7"), "::", errno.ENETUNREACH, "cannot be reached through eth0"),
    "loopback held by a NIC": (a_link("127.0.0.1"), "127.0.0.1", errno.ENETUNREACH, "cannot be reached through eth0"),
    "elsewhere through lo": (lo(), "198.51.100.1", errno.ENETUNREACH, "only this host itself"),
    "link-local through lo": (lo(), "fe80::1", errno.ENETUNREACH, "only this host itself"),
    "own address of another interface": (
        a_link("192.0.2.8"),
        "192.0.2.7",
        errno.ENETUNREACH,
        "192.0.2.7 is this host's own address, but not one of eth0",
    ),
    "down": (a_link("192.0.2.7", up=False), "192.0.2.1", errno.ENETUNREACH, "eth0 is down"),
    "no carrier": (a_link("192.0.2.7", carrier=False), "192.0.2.1", errno.EHOSTUNREACH, "eth0 has no carrier"),
}


@pytest.mark.parametrize(("link", "target", "number", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_an_interface_that_cannot_serve_is_refused(
    link: Link, target: str | tuple[str, int], number: int, reason: str
) -> None:
    target = (target, 0) if isinstance(target, str) else target
    assert_refused(bind_on_link(link, to(*target), OWN), number, reason)


NIC = a_link("192.0.2.7", "2001:db8::7 deprecated", "fe80::7")


@pytest.mark.parametrize(
    ("link", "local", "target", "bound"),
    [
        (NIC, ("192.0.2.7",), "198.51.100.1", ["192.0.2.7"]),
        (NIC, ("2001:db8::7",), "2001:db8:9::1", ["2001:db8::7"]),
        (NIC, ("fe80::7%eth0",), "fe80::1", ["fe80::7%eth0"]),
        # a name may have addresses of other hosts and interfaces: only those of this one are tried
        (NIC, ("192.0.2.99", "192.0.2.7"), "198.51.100.1", ["192.0.2.7"]),
        (lo(), ("127.0.0.1",), "127.9.9.9", ["127.0.0.1"]),
        # the whole net is local to lo, which lists one address of it
        (lo(), ("127.0.0.5",), "127.9.9.9", ["127.0.0.5"]),
        (lo(), ("127.0.0.1",), "192.0.2.7", ["127.0.0.1"]),
    ],
)
def test_an_address_on_an_interface_is_bound(link: Link, local: tuple[str, ...], target: str, bound: list[str]) -> None:
    assert bind_on_link(link, to(target), OWN, ips(*local)) == Binding(link.name, ips(*bound), owner=link)


@pytest.mark.parametrize(
    ("link", "local", "target", "number", "reason"),
    [
        (
            NIC,
            ("192.0.2.99",),
            "198.51.100.1",
            errno.EADDRNOTAVAIL,
            "192.0.2.99 is not an address of eth0 (it has 192.0.2.7, 2001:db8::7, fe80::7)",
        ),
        (a_link(), ("192.0.2.99",), "198.51.100.1", errno.EADDRNOTAVAIL, "of eth0 (it has none)"),
        (NIC, ("192.0.2.7",), "2001:db8:9::1", errno.EADDRNOTAVAIL, "no IPv6 address (it has 192.0.2.7)"),
        (NIC, ("192.0.2.7",), "127.0.0.1", errno.ENETUNREACH, "cannot be reached through eth0"),
        (NIC, ("127.0.0.5",), "198.51.100.1", errno.EADDRNOTAVAIL, "127.0.0.5 is not an address of eth0"),
        (lo(), ("127.0.0.1",), "198.51.100.1", errno.ENETUNREACH, "only this host itself"),
        (a_link("192.0.2.7", up=False), ("192.0.2.7",), "198.51.100.1", errno.ENETUNREACH, "eth0 is down"),
    ],
)
def test_an_address_on_an_interface_that_cannot_serve_is_refused(
    link: Link, local: tuple[str, ...], target: str, number: int, reason: str
) -> None:
    assert_refused(bind_on_link(link, to(target), OWN, ips(*local)), number, reason)


@pytest.mark.parametrize("kind", ["bridge", "bond", "team", "vrf", "openvswitch", ""])
@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize(
    ("link", "local"),
    [
        (NIC, None),
        (NIC, ips("192.0.2.7")),
        (a_link(), None),
        (a_link("fe80::7"), ips("192.0.2.7")),
    ],
    ids=["has addresses", "has the address", "bare", "link-local"],
)
def test_what_arrives_at_a_port_is_taken_by_some_masters(
    kind: str, link: Link, local: tuple[IPAddress, ...] | None, *, borrow: bool
) -> None:
    decision = bind_on_link(link, to("198.51.100.1"), OWN, local, master=a_link(name="m0", kind=kind), borrow=borrow)
    if kind in {"bridge", "bond", "team"}:
        assert_refused(decision, errno.EADDRNOTAVAIL, "eth0 is a port of m0, which takes what arrives there: use if!m0")
    else:
        assert decision == bind_on_link(link, to("198.51.100.1"), OWN, local, borrow=borrow)


def test_the_state_of_a_port_is_told_before_its_master() -> None:
    port = a_link("192.0.2.7", up=False)
    assert_refused(
        bind_on_link(port, to("198.51.100.1"), master=a_link(name="m0", kind="bond")), errno.ENETUNREACH, "is down"
    )


@pytest.mark.parametrize(
    ("link", "local", "target", "bound"),
    [
        # its own where it has one that serves
        (NIC, None, "198.51.100.1", ["192.0.2.7"]),
        (NIC, ("192.0.2.7",), "198.51.100.1", ["192.0.2.7"]),
        # else whatever the kernel chooses
        (a_link(), None, "198.51.100.1", []),
        (a_link("192.0.2.7"), None, "2001:db8:9::1", []),
        (a_link("192.0.2.7 tentative"), None, "198.51.100.1", []),
        (a_link("fe80::7"), None, "2001:db8:9::1", []),
        (lo(), None, "::1", ["::1"]),
        # a named one may be anybody's: what the host has, bind tells
        (NIC, ("192.0.2.99",), "198.51.100.1", ["192.0.2.99"]),
        (a_link(), ("192.0.2.99", "2001:db8::99"), "2001:db8:9::1", ["2001:db8::99"]),
    ],
)
def test_an_address_may_be_borrowed(link: Link, local: tuple[str, ...] | None, target: str, bound: list[str]) -> None:
    decision = bind_on_link(link, to(target), OWN, None if local is None else ips(*local), borrow=True)
    assert decision == Binding(link.name, ips(*bound), owner=link)


BORROWERS = {
    "down": (a_link(up=False), None, "198.51.100.1", errno.ENETUNREACH, "eth0 is down"),
    "no carrier": (a_link(carrier=False), None, "198.51.100.1", errno.EHOSTUNREACH, "eth0 has no carrier"),
    "loopback": (a_link(), None, "127.0.0.1", errno.ENETUNREACH, "cannot be reached through eth0"),
    "elsewhere through lo": (lo(), None, "198.51.100.1", errno.ENETUNREACH, "only this host itself"),
    "own address of another": (a_link(), None, "192.0.2.7", errno.ENETUNREACH, "this host's own address"),
    "other zone": (a_link(), None, ("fe80::1", 8), errno.ENETUNREACH, "zone of another interface"),
    "other family": (NIC, ("192.0.2.99",), "2001:db8:9::1", errno.EADDRNOTAVAIL, "no IPv6 address"),
    "from loopback": (NIC, ("127.0.0.1",), "198.51.100.1", errno.ENETUNREACH, "from the loopback address 127.0.0.1"),
}


@pytest.mark.parametrize(("link", "local", "target", "number", "reason"), BORROWERS.values(), ids=BORROWERS)
def test_to_borrow_an_address_lifts_no_other_rule(
    link: Link, local: tuple[str, ...] | None, target: str | tuple[str, int], number: int, reason: str
) -> None:
    target = (target, 0) if isinstance(target, str) else target
    decision = bind_on_link(link, to(*target), OWN, None if local is None else ips(*local), borrow=True)
    assert_refused(decision, number, reason)


def test_a_vrf_is_pinned_although_it_has_no_address() -> None:
    vrf = a_link(name="blue", kind="vrf", carrier=False)
    for target in ("198.51.100.1", "2001:db8::1", "127.0.0.1"):
        assert bind_on_link(vrf, to(target)) == Binding("blue")
    # whose ports hold it
    assert bind_on_link(vrf, to("198.51.100.1"), (), ips("192.0.2.99")) == Binding("blue", ips("192.0.2.99"))
    assert_refused(bind_on_link(vrf, to("2001:db8::1"), (), ips("192.0.2.99")), errno.EADDRNOTAVAIL, "no IPv6 address")


# --- destinations that are exempt ---------------------------------------------------------------------------

EXEMPT = ("localhost", "Proxy.Example.", "127.0.0.0/8", "192.0.2.7", "2001:db8::/32", "::1", "fe80::/10")


@pytest.mark.parametrize(
    ("host", "target", "covered"),
    [
        ("localhost", "203.0.113.1", True),
        ("LocalHost.", "203.0.113.1", True),
        ("proxy.example", "203.0.113.1", True),
        ("PROXY.EXAMPLE.", "203.0.113.1", True),
        # each name for itself alone
        ("my.localhost", "203.0.113.1", False),
        ("proxy.example.org", "203.0.113.1", False),
        ("example", "203.0.113.1", False),
        # an address, by whatever name
        ("www.example", "127.9.9.9", True),
        ("www.example", "192.0.2.7", True),
        ("www.example", "192.0.2.8", False),
        ("2001:db8::1", "2001:db8::1", True),
        ("2001:db9::1", "2001:db9::1", False),
        ("fe80::1%eth0", "fe80::1", True),
        # such a packet is IPv4
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", True),
        ("::2", "::2", False),
    ],
)
def test_what_is_exempt(host: str, target: str, *, covered: bool) -> None:
    assert Exempt(EXEMPT).covers(host, to(target)) is covered


def test_a_name_is_exempt_before_it_is_looked_up() -> None:
    assert Exempt(EXEMPT).names("LOCALHOST.")
    assert not Exempt(EXEMPT).names("127.0.0.1")  # which nobody looks up
    assert not Exempt(["127.0.0.0/8"]).names("localhost")
    assert not Exempt([]).covers("localhost", to("127.0.0.1"))
    assert not Exempt(["localhost"]).covers("www.example", to("127.0.0.1"))


@pytest.mark.parametrize(
    ("entries", "error", "text"),
    [
        ("localhost", TypeError, "direct is a sequence of hosts and networks, as in direct=('localhost',)"),
        (["localhost", b"x"], TypeError, "direct holds texts, not bytes"),
        ([ip_address("127.0.0.1")], TypeError, "direct holds texts, not IPv4Address"),
        ([""], ValueError, "direct: '' is no host, no address and no network"),
        (["*.example"], ValueError, "direct: '*.example' is no host"),
        (["10.0.0.1/8"], ValueError, "has host bits set"),
        (["10.0.0.0/33"], ValueError, "direct: '10.0.0.0/33' is no host"),
        (["http://proxy.example"], ValueError, "direct: 'http://proxy.example' is no host"),
        (["proxy.example:3128"], ValueError, "direct: 'proxy.example:3128' is no host"),
        (["[::1]"], ValueError, "direct: '[::1]' is no host"),
        (["a b"], ValueError, "direct: 'a b' is no host"),
    ],
)
def test_what_cannot_be_exempt(entries: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        Exempt(entries)


# --- messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, ""),
        (1, "0"),
        (8, "0, 1, 2, 3, 4, 5, 6, 7"),
        (9, "0, 1, 2, 3, 4, 5, 6, 7 and 1 more"),
        (10_000, "0, 1, 2, 3, 4, 5, 6, 7 and 9992 more"),
    ],
)
def test_a_long_list_is_cut(count: int, text: str) -> None:
    assert listed(range(count)) == text


# --- the kernel ---------------------------------------------------------------------------------------------

GATEWAY4, GATEWAY6 = "route add default via 198.18.1.1 dev n1", "route add default via 2001:db8:1::1 dev n1 metric 1"
LESSER = {
    "deprecated": (["addr add 2001:db8:1::7/64 dev n1 nodad preferred_lft 0", GATEWAY6], "2001:db8:ffff::80"),
    "optimistic": (["addr add 2001:db8:1::7/64 dev n1 optimistic", GATEWAY6], "2001:db8:ffff::80"),
    "site-local": (
        ["addr add fec0::7/64 dev n1 nodad", "route add default via fec0::1 dev n1 metric 1"],
        "2001:db8:ffff::80",
    ),
    "scope site": (["addr add 198.18.1.7/24 dev n1 scope site", f"{GATEWAY4} metric 1"], "203.0.113.80"),
    "scope link": (["addr add 198.18.1.7/24 dev n1 scope link", f"{GATEWAY4} metric 1"], "203.0.113.80"),
    "scope link, link-local target": (
        ["addr add 198.18.1.7/24 dev n1 scope link", f"{GATEWAY4} metric 1"],
        "169.254.9.9",
    ),
}


def source_address(target: Target, binding: Binding) -> str:
    """Return the source address of a datagram, which a connect chooses without sending anything."""
    with socket.socket(target.family, socket.SOCK_DGRAM) as sock:
        assert binding.device is not None
        platform.pin(sock, binding.device)
        for ip in binding.local[:1]:
            platform.bind(sock, ip, None)
        sock.connect(target.sockaddr)
        return str(sock.getsockname()[0])


@pytest.mark.parametrize(("commands", "target"), LESSER.values(), ids=LESSER)
def test_the_kernel_would_take_another_interfaces_address(lab: Lab, commands: list[str], target: str) -> None:
    """Why lesser addresses are bound explicitly: the pin to n1 alone does not keep the kernel from n0's."""
    if "optimistic" in commands[0]:
        if not Path("/proc/sys/net/ipv6/conf/all/optimistic_dad").exists():
            pytest.skip("this kernel has no optimistic addresses (CONFIG_IPV6_OPTIMISTIC_DAD)")
        for name, value in {"accept_dad": 1, "dad_transmits": 50, "optimistic_dad": 1, "use_optimistic": 0}.items():
            lab.near.sysctl(f"ipv6.conf.n1.{name}", value)
    lab.near.ip("addr flush dev n1 scope global", *commands)
    own = set(Interfaces(platform.feed()).caught_up().link("n1").addresses)
    decision = Interfaces(platform.feed()).caught_up().bind("n1", to(target))
    assert isinstance(decision, Binding)
    assert decision.local
    assert source_address(to(target), decision) in own
    assert source_address(to(target), Binding("n1")) in {"198.18.0.2", "2001:db8::2"}
