"""From a source to bindings, decided from what is true now, on every loop and real interfaces."""

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
from opened import open_bound

from aiobind._binding import Binding, Refusal, Target
from aiobind._errors import BindError, ResolveError
from aiobind._interfaces import InterfaceWatch
from aiobind._plan import Planner
from aiobind._platform import platform
from aiobind._platform.base import LinkSeen
from aiobind._resolve import Resolved, SystemLookup
from aiobind._sources import Interface, parse_source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiobind._sources import Source
    from aiobind.lab import Lab

pytestmark = pytest.mark.anyio


def to(text: str, port: int = 443) -> Target:
    return Target.of(ip_address(text), port)


WIDE, WIDE6, LOOPBACK, LOOPBACK6 = to("203.0.113.80"), to("2001:db8:ffff::80"), to("127.0.0.1"), to("::1")


@pytest.fixture
async def planner() -> AsyncIterator[Planner]:
    planner = Planner(lookup=SystemLookup(0))
    yield planner
    planner.close()
    gc.collect()
    await asyncio.sleep(0.001)  # the loop closes the watch


@pytest.fixture
async def borrower() -> AsyncIterator[Planner]:
    planner = Planner(lookup=SystemLookup(0), borrow=True)
    yield planner
    planner.close()
    gc.collect()
    await asyncio.sleep(0.001)


async def plan(planner: Planner, source: str | None, *targets: Target) -> list[tuple[Any, ...]]:
    """Return each decision in short: the device, the addresses and the owner; or the errno."""
    return [
        (errno.errorcode[decision.errno],)
        if isinstance(decision, Refusal)
        else (decision.device, [str(ip) for ip in decision.local], decision.owner and decision.owner.name)
        for decision in await planner.plan(None if source is None else parse_source(source), targets)
    ]


N1, N1_6 = ("n1", ["198.18.1.2"], "n1"), ("n1", ["2001:db8:1::2"], "n1")
UNAVAILABLE, UNREACHABLE, NO_DEVICE = ("EADDRNOTAVAIL",), ("ENETUNREACH",), ("ENODEV",)


async def test_what_is_planned_after_close_keeps_nothing(lab: Lab) -> None:
    """An attempt under way may look once more."""
    planner = Planner(lookup=SystemLookup(0))
    assert await plan(planner, "if!n1", WIDE) == [N1]
    planner.close()
    assert await plan(planner, "if!n1", WIDE) == [N1]
    assert planner._watch is None
    gc.collect()
    await asyncio.sleep(0.001)  # the loop closes the watch


# --- each kind of source ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "targets", "expected"),
    [
        ("if!n1", [WIDE, WIDE6, LOOPBACK], [N1, N1_6, UNREACHABLE]),
        ("if!lo", [WIDE, LOOPBACK, LOOPBACK6], [UNREACHABLE, ("lo", ["127.0.0.1"], "lo"), ("lo", ["::1"], "lo")]),
        ("if!lo", [to("198.18.1.2")], [("lo", ["127.0.0.1"], "lo")]),  # an address of this host
        ("if!n9", [WIDE, WIDE6], [NO_DEVICE, NO_DEVICE]),
        ("if!wan", [WIDE], [N1]),
        ("ifhost!n1!198.18.1.2", [WIDE, WIDE6], [N1, UNAVAILABLE]),
        ("ifhost!n1!198.18.2.2", [WIDE], [UNAVAILABLE]),
        ("ifhost!n1!nics.test", [WIDE, WIDE6], [N1, N1_6]),
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
        (None, [WIDE, WIDE6, LOOPBACK], [(None, [], None)] * 3),  # the routing table's
        (None, [], []),
    ],
)
async def test_plan(
    lab: Lab,
    resolv_conf: Callable[..., None],
    planner: Planner,
    source: str | None,
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


PREFIXES = [("192.0.2.0/24", WIDE, WIDE6), ("2001:db8:7::/64", WIDE6, WIDE)]


def route_here(lab: Lab, *prefixes: str) -> None:
    lab.near.ip(*(f"route add local {prefix} dev lo" for prefix in prefixes))


async def address(planner: Planner, source: Source, target: Target, **options: str) -> str:
    (binding,) = await planner.plan(source, [target], **options)
    assert isinstance(binding, Binding)
    (ip,) = binding.local
    return str(ip)


@pytest.mark.parametrize(("prefix", "served", "refused"), PREFIXES)
async def test_a_prefix_gives_each_target_an_address_of_its_own(
    lab: Lab, planner: Planner, prefix: str, served: Target, refused: Target
) -> None:
    route_here(lab, prefix)
    source = parse_source(f"net!{prefix}")
    seen = set()
    for _ in range(20):
        bindings = await planner.plan(source, [served, served], host="a.test")
        for binding in bindings:
            assert isinstance(binding, Binding)
            assert (binding.device, binding.freebind, binding.owner, len(binding.local)) == (None, True, None, 1)
            assert binding.local[0] in ip_network(prefix)
            seen.add(binding.local[0])
    assert len(seen) > 20
    (decision,) = await planner.plan(source, [refused])
    assert isinstance(decision, Refusal)
    assert decision.errno == errno.EADDRNOTAVAIL
    assert "routed" not in decision.reason  # that is not what is wrong


@pytest.mark.parametrize(("prefix", "served", "refused"), PREFIXES)
async def test_a_prefix_may_keep_to_one_address_for_each_host(
    lab: Lab, prefix: str, served: Target, refused: Target
) -> None:
    route_here(lab, prefix)
    source = parse_source(f"net!{prefix}")
    planner, another = (Planner(lookup=SystemLookup(0), sticky_prefix=True) for _ in range(2))
    hosts = [f"host{number}.test" for number in range(10)]
    seen = {host: await address(planner, source, served, host=host) for host in hosts}
    assert len(set(seen.values())) > 5
    for host in hosts:
        for spelling in (host, host.upper(), f"{host}."):
            assert await address(planner, source, served, host=spelling) == seen[host]
    both = await planner.plan(source, [served, served._replace(port=80)], host=hosts[0])
    assert [[str(ip) for ip in binding.local] for binding in both if isinstance(binding, Binding)] == [
        [seen[hosts[0]]]
    ] * 2
    # Nobody who knows the hosts can compute them.
    assert [await address(another, source, served, host=host) for host in hosts] != list(seen.values())


async def test_without_a_host_each_target_is_one(lab: Lab) -> None:
    route_here(lab, "2001:db8:7::/64")
    source, planner = parse_source("net!2001:db8:7::/64"), Planner(lookup=SystemLookup(0), sticky_prefix=True)
    one, other = WIDE6, to("2001:db8:ffff::81")
    seen = await address(planner, source, one)
    assert await address(planner, source, one) == await address(planner, source, one, host=one.host) == seen
    assert await address(planner, source, other) != seen


@pytest.mark.parametrize(("prefix", "served", "refused"), PREFIXES)
async def test_a_prefix_that_is_not_routed_here(
    lab: Lab, planner: Planner, prefix: str, served: Target, refused: Target
) -> None:
    """Its connections would hang."""
    source = parse_source(f"net!{prefix}")
    command = f"ip route add local {prefix} dev lo"
    (decision,) = await planner.plan(source, [served])
    reason = f"{prefix} is not routed to this host, so no answer would arrive: {command}"
    assert decision == Refusal(errno.EADDRNOTAVAIL, reason)
    lab.near.ip(command.removeprefix("ip "))  # as it says
    assert isinstance((await planner.plan(source, [served]))[0], Binding)


async def test_a_part_of_a_prefix_is_routed_here(lab: Lab, planner: Planner) -> None:
    """What counts is the address that was picked."""
    route_here(lab, "192.0.2.0/25")
    source = parse_source("net!192.0.2.0/24")
    decisions = await planner.plan(source, [WIDE] * 50)
    picked = [decision.local[0] for decision in decisions if isinstance(decision, Binding)]
    assert 0 < len(picked) < 50
    assert all(ip in ip_network("192.0.2.0/25") for ip in picked)


async def test_where_nobody_can_tell_the_route_a_prefix_is_tried(
    lab: Lab, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(platform), "routed_here", lambda *_: None)
    (decision,) = await planner.plan(parse_source("net!192.0.2.0/24"), [WIDE])
    assert isinstance(decision, Binding)


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


class Fixed:
    """A look-up that knows one answer, and who asked."""

    by_source = True

    def __init__(self, *answer: Resolved) -> None:
        self._answer = answer
        self.asked: list[tuple[str, Source | None, int, int]] = []

    async def find(self, host: str, *, via: Source | None, family: int = 0, flags: int = 0) -> tuple[Resolved, ...]:
        self.asked.append((host, via, family, flags))
        return self._answer

    def forget(self, host: str | None = None) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError  # it is the dialer's


async def test_a_name_with_a_zone(lab: Lab) -> None:
    """As a multicast DNS resolver answers."""
    link_local, index = lab.nic("n1").link_local, socket.if_nametoindex("n1")
    lookup = Fixed(Resolved(ip_address(link_local), index), Resolved(ip_address("198.18.1.2"), 0))
    planner = Planner(lookup=lookup)
    assert await plan(planner, "host!near.local", to("fe80::1"), WIDE) == [
        (None, [f"{link_local}%n1"], None),
        (None, ["198.18.1.2"], None),
    ]
    assert await plan(planner, "ifhost!n1!near.local", to("fe80::1")) == [("n1", [f"{link_local}%n1"], "n1")]
    lab.near.ip("link del n1")  # without its zone the address cannot be bound
    assert await plan(planner, "host!near.local", to("fe80::1")) == [(None, [link_local], None)]
    planner.close()
    gc.collect()
    await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("host!near.local", [("near.local", None, 0, 0)]),
        # the address of an interface may be one that only the interface's own servers know
        ("ifhost!n1!near.local", [("near.local", Interface("n1"), 0, 0)]),
        ("ifhost!wan!near.local", [("near.local", Interface("wan"), 0, 0)]),
        ("ifhost!n1!198.18.1.2", []),
        ("198.18.1.2", []),
        ("if!n1", []),
        ("net!198.18.1.0/24", []),
        (None, []),
    ],
)
async def test_whose_name_is_asked_for_through_what(
    lab: Lab, source: str | None, asked: list[tuple[str, Source | None, int, int]]
) -> None:
    route_here(lab, "198.18.1.0/24")
    lab.near.ip("link property add dev n1 altname wan")
    lookup = Fixed(Resolved(ip_address("198.18.1.2"), 0))
    planner = Planner(lookup=lookup)
    decisions = await planner.plan(None if source is None else parse_source(source), [WIDE, to("203.0.113.81")])
    assert all(isinstance(decision, Binding) for decision in decisions)
    assert lookup.asked == asked  # once for all targets
    planner.close()
    gc.collect()
    await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("source", "targets", "expected"),
    [
        ("if!n1", [WIDE, WIDE6, LOOPBACK], [N1, ("n1", [], "n1"), UNREACHABLE]),  # its own where it has one
        ("ifhost!n1!198.18.2.2", [WIDE], [("n1", ["198.18.2.2"], "n1")]),
        ("ifhost!n1!192.0.2.99", [WIDE, WIDE6], [("n1", ["192.0.2.99"], "n1"), UNAVAILABLE]),  # whose it is, bind tells
        ("if!n9", [WIDE], [NO_DEVICE]),
        ("if!lo", [WIDE], [UNREACHABLE]),
        ("198.18.1.2", [WIDE, WIDE6], [(None, ["198.18.1.2"], None), UNAVAILABLE]),
    ],
)
async def test_an_address_may_be_borrowed(
    lab: Lab, borrower: Planner, source: str, targets: list[Target], expected: list[tuple[Any, ...]]
) -> None:
    lab.near.ip("addr del 2001:db8:1::2/64 dev n1")
    assert await plan(borrower, source, *targets) == expected


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


@pytest.mark.parametrize("source", ["198.18.1.2", "net!192.0.2.0/24", "host!v4.test", None])
async def test_other_sources_ask_for_no_interfaces(
    lab: Lab, resolv_conf: Callable[..., None], planner: Planner, monkeypatch: pytest.MonkeyPatch, source: str | None
) -> None:
    route_here(lab, "192.0.2.0/24")
    resolv_conf("", hosts="198.18.2.2 v4.test\n")
    monkeypatch.delattr(type(platform), "feed")
    assert await plan(planner, source, WIDE) != [UNAVAILABLE]


# --- as it is now -------------------------------------------------------------------------------------------


async def test_no_decision_is_older_than_the_last_change(lab: Lab, planner: Planner) -> None:
    """Neither what was refused nor what was allowed; the loop has no turn in between."""
    assert await plan(planner, "ifhost!n1!198.18.1.7", WIDE) == [UNAVAILABLE]
    assert await plan(planner, "if!wan0", WIDE) == [NO_DEVICE]
    lab.near.ip("addr add 198.18.1.7/24 dev n1")
    assert await plan(planner, "ifhost!n1!198.18.1.7", WIDE) == [("n1", ["198.18.1.7"], "n1")]
    lab.near.ip("link property add dev n1 altname wan0")
    assert await plan(planner, "if!wan0", WIDE) == [("n1", ["198.18.1.2", "198.18.1.7"], "n1")]
    lab.near.ip("addr del 198.18.1.2/24 dev n1", "addr replace 198.18.1.7/24 dev n1")  # the second goes with the first
    assert await plan(planner, "if!n1", WIDE) == [("n1", ["198.18.1.7"], "n1")]
    lab.near.ip("addr flush dev n1")
    assert await plan(planner, "if!n1", WIDE, LOOPBACK) == [UNAVAILABLE, UNREACHABLE]
    lab.near.ip("link set n1 down")
    assert await plan(planner, "if!n1", WIDE) == [UNREACHABLE]
    lab.near.ip("link set n1 name n7")
    assert await plan(planner, "if!n1", WIDE) == [NO_DEVICE]
    lab.near.ip("addr del 127.0.0.1/8 dev lo", "addr add 192.0.2.1/32 dev lo")
    assert await plan(planner, "127.0.0.1", to("192.0.2.1")) == [(None, ["127.0.0.1"], None)]


async def test_a_decision_without_news_needs_no_turn_of_the_loop(lab: Lab, planner: Planner) -> None:
    assert await plan(planner, "if!n1", WIDE) == [N1]
    with pytest.raises(StopIteration) as result:
        plan(planner, "if!n1", WIDE).send(None)
    assert result.value.value == [N1]


async def test_only_a_new_list_says_that_there_is_no_carrier(lab: Lab, planner: Planner) -> None:
    """The kernel tells of a carrier late, but it lists what is."""
    assert await plan(planner, "if!n1", WIDE) == [N1]
    table = planner._watch._interfaces.table
    index = table.link("n1").index
    table.apply(LinkSeen(index, "n1", loopback=False, kind="veth", master=0, altnames=(), carrier=False))
    assert isinstance(table.bind("n1", WIDE), Refusal)
    assert await plan(planner, "if!n1", WIDE) == [N1]
    assert planner._watch._interfaces.table is not table
    lab.far.ip("link set f1 down")
    planner._watch._interfaces.doubt()  # for the news may be a second late
    assert await plan(planner, "if!n1", WIDE, LOOPBACK) == [("EHOSTUNREACH",), ("EHOSTUNREACH",)]
    lab.far.ip("link set f1 up")
    assert await plan(planner, "if!n1", WIDE) == [N1]


async def test_other_refusals_ask_for_no_new_list(lab: Lab, planner: Planner) -> None:
    assert await plan(planner, "if!n1", WIDE) == [N1]
    table = planner._watch._interfaces.table
    lab.near.ip("link set n2 down")
    assert await plan(planner, "if!n9", WIDE) == [NO_DEVICE]
    assert await plan(planner, "if!n2", WIDE) == [UNREACHABLE]
    assert await plan(planner, "ifhost!n1!198.18.2.2", WIDE) == [UNAVAILABLE]
    assert planner._watch._interfaces.table is table


# --- the watch ----------------------------------------------------------------------------------------------


async def test_planners_share_a_watch_until_the_last_is_closed(lab: Lab) -> None:
    planners = [Planner(lookup=SystemLookup(0)) for _ in range(3)]
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
    assert await plan(planners[0], "if!n1", WIDE) == [N1]  # a closed one may begin anew


async def decided(planner: Planner, source: str | None, target: Target = WIDE) -> Binding:
    (decision,) = await planner.plan(None if source is None else parse_source(source), [target])
    assert isinstance(decision, Binding)
    return decision


@pytest.mark.parametrize("source", ["if!n1", "ifhost!n1!198.18.1.2"])
async def test_an_attempt_is_guarded_by_the_interface_of_its_source(lab: Lab, planner: Planner, source: str) -> None:
    binding = await decided(planner, source)
    guard = planner.guard(sock := open_bound(binding, WIDE), binding, WIDE)
    assert guard is not None
    with sock, guard:
        lab.near.ip("link set n1 down")
        await planner.plan(parse_source("if!n9"), [WIDE])  # reads the news
        assert guard.refusal is not None
        assert guard.refusal.errno == errno.ENETUNREACH


@pytest.mark.parametrize("taken", ["198.18.1.2/24", "198.18.1.7/32"])
async def test_an_attempt_needs_the_very_address_that_its_socket_has(lab: Lab, planner: Planner, taken: str) -> None:
    """Though its source is the interface, which has another one."""
    lab.near.ip("addr add 198.18.1.7/32 dev n1")
    binding = await decided(planner, "if!n1")
    with open_bound(binding, WIDE) as sock:
        assert str(sock.local) == "198.18.1.2"
        guard = planner.guard(sock, binding, WIDE)
        assert guard is not None
        lab.near.ip(f"addr del {taken} dev n1")
        if taken.startswith(str(sock.local)):
            with pytest.raises(BindError, match=r"198\.18\.1\.2 is not an address of n1 .*\(since the attempt began\)"):
                await guard.confirm()
        else:
            await guard.confirm()


async def test_a_borrowed_address_is_nothing_to_the_guard(lab: Lab, borrower: Planner) -> None:
    binding = await decided(borrower, "ifhost!n1!198.18.2.2")
    with open_bound(binding, WIDE) as sock:
        guard = borrower.guard(sock, binding, WIDE)
        assert guard is not None
        await guard.confirm()
        lab.near.ip("link set n1 down")
        with pytest.raises(BindError, match="n1 is down"):
            await guard.confirm()


async def test_an_attempt_without_an_interface_is_not_guarded(lab: Lab, planner: Planner) -> None:
    route_here(lab, "192.0.2.0/24")
    binding = await decided(planner, "if!n1")
    with open_bound(Binding(), WIDE) as sock:
        assert planner.guard(sock, await decided(planner, "net!192.0.2.0/24"), WIDE) is None
        sock.local = None
        assert planner.guard(sock, await decided(planner, None), WIDE) is None
        assert planner.guard(sock, binding, WIDE) is not None
        planner.close()  # what has begun is watched over to its end
        assert planner.guard(sock, binding, WIDE) is not None


async def test_what_stands_and_falls_with_no_link_is_not_guarded(lab: Lab, planner: Planner) -> None:
    """A VRF: its ports hold the addresses, and come and go without it."""
    await decided(planner, "if!n1")
    with open_bound(Binding(), WIDE) as sock:
        assert planner.guard(sock, Binding("n1"), WIDE) is None
