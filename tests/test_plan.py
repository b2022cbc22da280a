"""From a source to bindings, and the promise held against the connection, on every loop and real interfaces."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any

import pytest

from aiobind import _plan
from aiobind._binding import Binding, Link, Refusal, Target
from aiobind._errors import BindError, ResolveError
from aiobind._interfaces import InterfaceWatch
from aiobind._plan import Planner
from aiobind._platform import platform
from aiobind._platform.base import LinkSeen
from aiobind._resolve import Resolved
from aiobind._sockets import open_bound
from aiobind._sources import parse_source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiobind.lab import Lab

pytestmark = pytest.mark.anyio


def to(text: str, port: int = 443) -> Target:
    return Target.of(ip_address(text), port)


WIDE, WIDE6, LOOPBACK, LOOPBACK6 = to("203.0.113.80"), to("2001:db8:ffff::80"), to("127.0.0.1"), to("::1")


@pytest.fixture
async def planner() -> AsyncIterator[Planner]:
    planner = Planner(ttl=0)
    yield planner
    planner.close()
    gc.collect()
    await asyncio.sleep(0.001)  # the loop closes the watch


async def plan(planner: Planner, source: str, *targets: Target) -> list[tuple[Any, ...]]:
    """Return each decision in short: the device, the addresses and the owner; or the errno."""
    return [
        (errno.errorcode[decision.errno],)
        if isinstance(decision, Refusal)
        else (decision.device, [str(ip) for ip in decision.local], decision.owner and decision.owner.name)
        for decision in await planner.plan(parse_source(source), targets)
    ]


UNAVAILABLE, UNREACHABLE, NO_DEVICE = ("EADDRNOTAVAIL",), ("ENETUNREACH",), ("ENODEV",)


# --- each kind of source ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "targets", "expected"),
    [
        ("if!n1", [WIDE, WIDE6, LOOPBACK], [("n1", [], "n1"), ("n1", [], "n1"), UNREACHABLE]),
        ("if!lo", [WIDE, LOOPBACK, LOOPBACK6], [UNREACHABLE, ("lo", [], "lo"), ("lo", [], "lo")]),
        ("if!lo", [to("198.18.1.2")], [("lo", ["127.0.0.1"], "lo")]),  # an address of this host
        ("if!n9", [WIDE, WIDE6], [NO_DEVICE, NO_DEVICE]),
        ("if!wan", [WIDE], [("n1", [], "n1")]),
        ("ifhost!n1!198.18.1.2", [WIDE, WIDE6], [("n1", ["198.18.1.2"], "n1"), UNAVAILABLE]),
        ("ifhost!n1!198.18.2.2", [WIDE], [UNAVAILABLE]),
        ("ifhost!n1!nics.test", [WIDE, WIDE6], [("n1", ["198.18.1.2"], "n1"), ("n1", ["2001:db8:1::2"], "n1")]),
        ("ifhost!n1!v4.test", [WIDE, WIDE6], [UNAVAILABLE, UNAVAILABLE]),
        (
            "198.18.1.2",
            [WIDE, WIDE6, LOOPBACK],
            [(None, ["198.18.1.2"], None), UNAVAILABLE, (None, ["198.18.1.2"], None)],
        ),
        ("192.0.2.99", [WIDE], [(None, ["192.0.2.99"], None)]),  # whose it is, bind tells
        ("2001:db8:1::2", [WIDE, WIDE6], [UNAVAILABLE, (None, ["2001:db8:1::2"], None)]),
        ("127.0.0.5", [LOOPBACK, to("127.9.9.9")], [(None, ["127.0.0.5"], None)] * 2),
        ("127.0.0.5", [WIDE, to("198.18.1.2"), LOOPBACK6], [UNREACHABLE, (None, ["127.0.0.5"], None), UNAVAILABLE]),
        ("host!v4.test", [WIDE, WIDE6], [(None, ["198.18.2.2"], None), UNAVAILABLE]),
        ("host!lo.test", [WIDE, LOOPBACK], [UNREACHABLE, (None, ["127.0.0.7"], None)]),
        ("if!n1", [], []),
    ],
)
async def test_plan(
    lab: Lab,
    resolv_conf: Callable[..., None],
    planner: Planner,
    source: str,
    targets: list[Target],
    expected: list[tuple[Any, ...]],
) -> None:
    resolv_conf(
        "",
        hosts="198.18.2.2 v4.test\n127.0.0.7 lo.test\n"
        "198.18.0.2 nics.test\n2001:db8::2 nics.test\n198.18.1.2 nics.test\n2001:db8:1::2 nics.test\n",
    )
    lab.near.ip("link property add dev n1 altname wan")
    assert await plan(planner, source, *targets) == expected


async def test_a_name_with_several_addresses_offers_them_all(
    lab: Lab, resolv_conf: Callable[..., None], planner: Planner
) -> None:
    resolv_conf("", hosts="198.18.0.2 nics.test\n2001:db8::2 nics.test\n198.18.1.2 nics.test\n")
    ((device, local, owner), (_, local6, _)) = await plan(planner, "host!nics.test", WIDE, WIDE6)
    assert (device, owner, sorted(local), local6) == (None, None, ["198.18.0.2", "198.18.1.2"], ["2001:db8::2"])


@pytest.mark.parametrize(
    ("prefix", "served", "refused"), [("192.0.2.0/24", WIDE, WIDE6), ("2001:db8:7::/64", WIDE6, WIDE)]
)
async def test_a_prefix_gives_each_target_an_address_of_its_own(
    planner: Planner, prefix: str, served: Target, refused: Target
) -> None:
    source = parse_source(f"net!{prefix}")
    seen = set()
    for _ in range(20):
        bindings = await planner.plan(source, [served, served])
        for binding in bindings:
            assert isinstance(binding, Binding)
            assert (binding.device, binding.freebind, binding.owner, len(binding.local)) == (None, True, None, 1)
            assert binding.local[0] in ip_network(prefix)
            seen.add(binding.local[0])
    assert len(seen) > 20
    (decision,) = await planner.plan(source, [refused])
    assert isinstance(decision, Refusal)
    assert decision.errno == errno.EADDRNOTAVAIL


async def test_a_prefix_of_loopback_reaches_this_host(lab: Lab, planner: Planner) -> None:
    decisions = await planner.plan(parse_source("net!127.1.0.0/16"), [LOOPBACK, to("198.18.1.2"), WIDE])
    assert [isinstance(decision, Binding) and decision.freebind for decision in decisions] == [True, True, False]
    assert isinstance(decisions[2], Refusal)
    assert decisions[2].errno == errno.ENETUNREACH


@pytest.mark.parametrize("source", ["host!no.test", "ifhost!n1!no.test"])
async def test_a_name_without_an_address(
    lab: Lab, resolv_conf: Callable[..., None], planner: Planner, source: str
) -> None:
    resolv_conf("")
    with pytest.raises(ResolveError, match=r"the source's name 'no\.test' cannot be resolved: ") as caught:
        await plan(planner, source, WIDE)
    assert caught.value.errno in {socket.EAI_NONAME, socket.EAI_AGAIN, getattr(socket, "EAI_NODATA", 0)}
    assert isinstance(caught.value.__cause__, socket.gaierror)


async def test_a_name_with_a_zone(lab: Lab, planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a multicast DNS resolver answers."""
    link_local, index = lab.nic("n1").link_local, socket.if_nametoindex("n1")

    async def resolve(name: str, *, ttl: float | None) -> tuple[Resolved, ...]:
        assert (name, ttl) == ("near.local", 0)
        return Resolved(ip_address(link_local), index), Resolved(ip_address("198.18.1.2"), 0)

    monkeypatch.setattr(_plan, "resolve", resolve)
    assert await plan(planner, "host!near.local", to("fe80::1"), WIDE) == [
        (None, [f"{link_local}%n1"], None),
        (None, ["198.18.1.2"], None),
    ]
    assert await plan(planner, "ifhost!n1!near.local", to("fe80::1")) == [("n1", [f"{link_local}%n1"], "n1")]
    lab.near.ip("link del n1")  # without its zone the address cannot be bound
    assert await plan(planner, "host!near.local", to("fe80::1")) == [(None, [link_local], None)]


@pytest.mark.parametrize("source", ["if!lo", "ifhost!lo!127.0.0.1", "127.0.0.1"])
async def test_interfaces_that_cannot_be_read(planner: Planner, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    def refuse() -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(platform, "feed", refuse)
    with pytest.raises(
        BindError, match="the interfaces of this host cannot be read: Operation not permitted"
    ) as caught:
        await plan(planner, source, WIDE)
    assert caught.value.errno == errno.EPERM
    with pytest.raises(BindError):  # nor is it a promise kept
        await planner.verify(Binding("lo", owner=Link(1, "lo")), "198.18.1.2")


@pytest.mark.parametrize("source", ["198.18.1.2", "net!192.0.2.0/24", "host!v4.test"])
async def test_other_sources_ask_for_no_interfaces(
    resolv_conf: Callable[..., None], planner: Planner, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    resolv_conf("", hosts="198.18.2.2 v4.test\n")
    monkeypatch.delattr(type(platform), "feed")
    assert await plan(planner, source, WIDE) != [UNAVAILABLE]


# --- fresh enough -------------------------------------------------------------------------------------------


async def test_only_a_fresh_look_refuses(lab: Lab, planner: Planner) -> None:
    assert await plan(planner, "ifhost!n1!198.18.1.7", WIDE) == [UNAVAILABLE]
    assert await plan(planner, "if!wan0", WIDE) == [NO_DEVICE]
    # the loop has had no turn since
    lab.near.ip("addr add 198.18.1.7/24 dev n1")
    assert await plan(planner, "ifhost!n1!198.18.1.7", WIDE) == [("n1", ["198.18.1.7"], "n1")]
    lab.near.ip("link property add dev n1 altname wan0")
    assert await plan(planner, "if!wan0", WIDE) == [("n1", [], "n1")]
    lab.near.ip("addr del 127.0.0.1/8 dev lo", "addr add 192.0.2.1/32 dev lo")
    assert await plan(planner, "127.0.0.1", to("192.0.2.1")) == [(None, ["127.0.0.1"], None)]


async def test_a_cached_look_allows(lab: Lab, planner: Planner) -> None:
    """The kernel has the last word, and the connection is checked."""
    assert await plan(planner, "if!n1", WIDE) == [("n1", [], "n1")]
    lab.near.ip("addr flush dev n1")
    assert await plan(planner, "if!n1", WIDE) == [("n1", [], "n1")]
    # and with one refusal everything is looked at again
    assert await plan(planner, "if!n1", WIDE, LOOPBACK) == [UNAVAILABLE, UNREACHABLE]


async def test_only_a_new_list_says_that_there_is_no_carrier(lab: Lab, planner: Planner) -> None:
    """The kernel tells of a carrier late, but it lists what is."""
    assert await plan(planner, "if!n1", WIDE) == [("n1", [], "n1")]
    table = planner._watch._interfaces.table
    index = table.link("n1").index
    table.apply(LinkSeen(index, "n1", loopback=False, kind="veth", master=0, altnames=(), carrier=False))
    assert isinstance(table.bind("n1", WIDE), Refusal)
    assert await plan(planner, "if!n1", WIDE) == [("n1", [], "n1")]
    lab.far.ip("link set f1 down")
    planner._watch._interfaces.doubt()  # a cached look still allows
    assert await plan(planner, "if!n1", WIDE, LOOPBACK) == [("EHOSTUNREACH",), ("EHOSTUNREACH",)]


# --- the promise --------------------------------------------------------------------------------------------


async def decided(planner: Planner, source: str, target: Target = WIDE) -> Binding:
    (decision,) = await planner.plan(parse_source(source), [target])
    assert isinstance(decision, Binding)
    return decision


@pytest.mark.parametrize(
    ("source", "target", "address"),
    [
        ("if!n1", WIDE, "198.18.1.2"),
        ("if!n1", WIDE6, "2001:db8:1::2"),
        ("ifhost!n1!198.18.1.2", WIDE, "198.18.1.2"),
        ("198.18.1.2", WIDE, "198.18.1.2"),
        ("fe80::7%n1", to("fe80::1"), "fe80::7"),
        ("net!192.0.2.7/32", WIDE, "192.0.2.7"),
    ],
)
async def test_a_promise_kept(lab: Lab, planner: Planner, source: str, target: Target, address: str) -> None:
    await planner.verify(await decided(planner, source, target), address)


@pytest.mark.parametrize(
    ("source", "target", "address", "promised"),
    [
        ("if!n1", WIDE, "198.18.0.2", "an address of n1"),
        ("if!n1", WIDE6, "2001:db8::2", "an address of n1"),
        ("ifhost!n1!198.18.1.2", WIDE, "198.18.0.2", "198.18.1.2"),
        ("198.18.1.2", WIDE, "198.18.0.2", "198.18.1.2"),
        ("fe80::7%n1", to("fe80::1"), "fe80::8", "fe80::7%n1"),
        ("net!192.0.2.7/32", WIDE, "192.0.2.8", "192.0.2.7"),
    ],
)
async def test_a_promise_broken(
    lab: Lab, planner: Planner, source: str, target: Target, address: str, promised: str
) -> None:
    binding = await decided(planner, source, target)
    with pytest.raises(BindError) as caught:
        await planner.verify(binding, address)
    assert caught.value.errno == errno.EADDRNOTAVAIL
    assert caught.value.strerror == f"the system connected from {address}, which is not {promised}; nothing was sent"


async def test_an_address_that_has_just_arrived_is_no_leak(lab: Lab, planner: Planner) -> None:
    binding = await decided(planner, "if!n1")
    lab.near.ip("addr add 198.18.1.7/24 dev n1")
    assert binding.owner is not None
    assert "198.18.1.7" not in binding.owner.addresses  # nobody has read the news
    await planner.verify(binding, "198.18.1.7")


async def test_an_address_of_a_link_that_is_gone_is_none(lab: Lab, planner: Planner) -> None:
    binding = await decided(planner, "if!n1")
    lab.near.ip("link del n1")
    with pytest.raises(BindError):
        await planner.verify(binding, "198.18.1.7")


async def test_a_vrf_promises_no_address(planner: Planner) -> None:
    await planner.verify(Binding("blue"), "198.18.1.7")


# --- the watch ----------------------------------------------------------------------------------------------


async def test_planners_share_a_watch_until_the_last_is_closed(lab: Lab) -> None:
    planners = [Planner(ttl=0) for _ in range(3)]
    for planner in planners:
        await planner.plan(parse_source("if!n1"), [WIDE])
    watch = InterfaceWatch.of(asyncio.get_running_loop())
    assert {id(planner._watch) for planner in planners} == {id(watch)}
    fd = watch._interfaces._feed.fileno()
    inode = os.fstat(fd).st_ino
    del watch
    for planner in planners:
        assert os.fstat(fd).st_ino == inode
        planner.close()
    gc.collect()
    await asyncio.sleep(0.01)
    with suppress(OSError):  # nothing is there, or something else
        assert os.fstat(fd).st_ino != inode
    assert await plan(planners[0], "if!n1", WIDE) == [("n1", [], "n1")]  # a closed one may begin anew


@pytest.mark.parametrize("source", ["if!n1", "ifhost!n1!198.18.1.2"])
async def test_an_attempt_is_guarded_by_the_interface_of_its_source(lab: Lab, planner: Planner, source: str) -> None:
    binding = await decided(planner, source)
    with open_bound(binding, socket.AF_INET) as sock, planner.guard(sock, binding, WIDE) as guard:
        assert guard is not None
        lab.near.ip("link set n1 down")
        await planner.plan(parse_source("if!n9"), [WIDE])  # reads the news
        assert guard.refusal is not None
        assert guard.refusal.errno == errno.ENETUNREACH


async def test_an_attempt_without_an_interface_is_not_guarded(lab: Lab, planner: Planner) -> None:
    binding = await decided(planner, "if!n1")
    with socket.socket() as sock:
        for source in ("198.18.1.2", "net!192.0.2.0/24"):
            with planner.guard(sock, await decided(planner, source), WIDE) as guard:
                assert guard is None
        planner.close()
        with planner.guard(sock, binding, WIDE) as guard:
            assert guard is None
