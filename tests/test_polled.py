"""Interfaces without netlink: what the looks say is held against netlink, and used where netlink is refused."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import select
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from opened import open_bound
from sandbox import Sandbox

import aiobind
from aiobind._binding import Binding, Refusal, Target
from aiobind._interfaces import Guard, Interfaces, InterfaceTable, InterfaceWatch
from aiobind._platform import polled as module
from aiobind._platform.base import AddressSeen, LinkSeen, ListEnd
from aiobind._platform.linux import Linux, Netlink
from aiobind._platform.polled import Polled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiobind._platform.base import Record
    from aiobind.lab import Lab

AF_NETLINK = 16
WIDE = Target.of(ip_address("203.0.113.80"), 80)


@pytest.fixture
def feed() -> Iterator[Polled]:
    with closing(Polled(60)) as feed:
        yield feed


def told(feed: Polled) -> list[Record]:
    records: list[Record] = []
    while piece := feed.read():
        records += piece
    return records


def age(feed: Polled) -> None:
    """What is known is too old from now on."""
    feed._fresh_until = 0


def shown(table: InterfaceTable) -> dict[str, Any]:
    """All that the two feeds have in common; a veth's kind, and who else it is called, is netlink's alone."""
    return {
        link.name: (
            link.index,
            link.loopback,
            link.kind if link.kind == "bridge" else "",
            link.master,
            link.up,
            link.carrier,
            {text: (address.tentative, address.deprecated) for text, address in link.addresses.items()},
            {text: address.scope for text, address in link.addresses.items() if ":" in text},
        )
        for link in table._links.values()
    }


def by_netlink() -> dict[str, Any]:
    with closing(Netlink()) as feed:
        return shown(Interfaces(feed).caught_up())


# --- what is seen -------------------------------------------------------------------------------------------

CHANGES = [
    ("link set n1 down",),
    ("link set n1 down", "link set n1 up"),
    ("addr flush dev n1",),
    ("addr del 198.18.1.2/24 dev n1",),
    ("addr add 198.18.1.7/24 dev n1",),
    ("addr add 198.18.1.2/32 dev n1",),  # once more, with another length
    ("addr add 198.18.1.7/24 dev n1 label n1:x",),
    ("addr add 198.18.1.7/24 dev n1 label n1foo",),
    ("addr add 192.0.2.1 peer 192.0.2.2 dev n1",),
    ("addr add 2001:db8:1::7/64 dev n1 nodad",),
    ("addr change 2001:db8:1::2/64 dev n1 preferred_lft 0",),
    ("link set n1 name wan",),
    ("link set n1 down", "link set n1 name n10", "link set n2 down", "link set n2 name n1"),
    ("link del n1",),
    ("link del n1", "link add n1 type veth peer n1p", "link set n1 up", "addr add 198.18.1.2/24 dev n1"),
    ("link add br0 type bridge", "link set n1 master br0"),
    ("link add br0 type bridge", "link set n1 master br0", "link set n1 nomaster"),
    ("addr add 127.0.0.2/8 dev lo",),
]


@pytest.mark.parametrize("commands", CHANGES, ids=["; ".join(commands) for commands in CHANGES])
def test_it_sees_what_netlink_tells(lab: Lab, no_capabilities: None, feed: Polled, commands: tuple[str, ...]) -> None:
    interfaces = Interfaces(feed)
    assert shown(interfaces.caught_up()) == by_netlink()
    before = interfaces.table
    lab.near.ip(*commands)
    age(feed)
    deadline = time.monotonic() + 5
    while shown(interfaces.caught_up()) != by_netlink() and time.monotonic() < deadline:
        time.sleep(0.01)  # a link-local address is on its way
        age(feed)
    assert shown(interfaces.caught_up()) == by_netlink()
    assert interfaces.table is before  # by the changes alone
    interfaces.doubt()
    assert shown(interfaces.caught_up()) == by_netlink()
    assert interfaces.table is not before


def test_the_flags_of_an_address(lab: Lab, feed: Polled) -> None:
    lab.near.sysctl("ipv6.conf.n1.accept_dad", 1)
    lab.far.ip("addr add 2001:db8:1::9/64 dev f1 nodad")
    lab.near.ip("addr add 2001:db8:1::9/64 dev n1")  # the far side has it, too
    lab.near.ip("addr add 2001:db8:1::8/64 dev n1 nodad preferred_lft 0")
    interfaces, deadline = Interfaces(feed), time.monotonic() + 10
    seen: dict[str, tuple[bool, bool]] = shown(interfaces.caught_up())["n1"][6]
    assert seen["2001:db8:1::9"] == (True, False)
    assert seen["2001:db8:1::8"] == (False, True)
    while "dadfailed" not in lab.near.ip("addr show dev n1") and time.monotonic() < deadline:
        time.sleep(0.05)
    age(feed)
    assert shown(interfaces.caught_up()) == by_netlink()


def test_no_carrier(lab: Lab, feed: Polled) -> None:
    interfaces = Interfaces(feed)
    assert isinstance(interfaces.caught_up().bind("n1", WIDE), Binding)
    lab.far.ip("link set f1 down")
    deadline = time.monotonic() + 10
    while isinstance(decision := interfaces.caught_up().bind("n1", WIDE), Binding) and time.monotonic() < deadline:
        time.sleep(0.01)
        age(feed)
    assert decision == Refusal(errno.EHOSTUNREACH, "n1 has no carrier")


def test_a_change_of_one_thing_tells_of_no_other(lab: Lab, feed: Polled) -> None:
    Interfaces(feed).caught_up()
    lab.near.ip("addr add 198.18.1.7/24 dev n1")
    age(feed)
    (record,) = told(feed)
    assert isinstance(record, AddressSeen)
    assert str(record.address.ip) == "198.18.1.7"
    age(feed)
    assert told(feed) == []


def test_an_address_whose_flags_change_is_never_gone(lab: Lab, feed: Polled) -> None:
    """An attempt that has it would be aborted."""
    Interfaces(feed).caught_up()
    lab.near.ip("addr change 2001:db8:1::2/64 dev n1 preferred_lft 0")
    age(feed)
    (record,) = told(feed)
    assert isinstance(record, AddressSeen)
    assert (str(record.address.ip), record.address.deprecated) == ("2001:db8:1::2", True)


def test_an_address_that_is_there_twice_goes_with_the_last(lab: Lab, feed: Polled) -> None:
    lab.near.ip("addr add 192.0.2.1/32 dev n1 label n1:x", "addr add 192.0.2.1/24 dev n1")
    interfaces = Interfaces(feed)
    assert "192.0.2.1" in shown(interfaces.caught_up())["n1"][6]
    for command, there in (("addr del 192.0.2.1/32 dev n1", True), ("addr del 192.0.2.1/24 dev n1", False)):
        lab.near.ip(command)
        age(feed)
        assert ("192.0.2.1" in shown(interfaces.caught_up())["n1"][6]) is there


def test_where_procfs_is_hidden_the_ipv4_addresses_are_seen(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_open", lambda *_: None)
    lab.near.ip("addr add 198.18.1.7/24 dev n1 label n1:x", "link add br0 type bridge", "link set n2 master br0")
    with closing(Polled()) as feed:
        seen = shown(Interfaces(feed).caught_up())
    assert {name: set(link[6]) for name, link in seen.items()} == {
        "lo": {"127.0.0.1"},
        "n0": {"198.18.0.2"},
        "n1": {"198.18.1.2", "198.18.1.7"},
        "n2": {"198.18.2.2"},
    }


def test_what_sysfs_says_of_another_namespace_is_nothing_to_it(lab: Lab, feed: Polled) -> None:
    """/sys shows the namespace in which it was mounted."""
    lab.far.ip("link set f0 down")
    lab.near.ip("link add n9 type bridge", "link add f2 type bridge", "link add f1 type veth", "link set f1 master n9")
    with lab.far, closing(Polled()) as elsewhere:
        links = {record.name: record for record in all_of(elsewhere) if isinstance(record, LinkSeen)}
    assert links.keys() == {"lo", "f0", "f1", "f2"}
    assert {(link.kind, link.master) for link in links.values()} == {("", 0)}


def all_of(feed: Polled) -> list[Record]:
    feed.ask()
    return told(feed)


# --- as a feed ----------------------------------------------------------------------------------------------


def test_a_list_comes_in_pieces_and_ends_once(lab: Lab, feed: Polled) -> None:
    lab.near.ip(*(f"addr add 2001:db8:9::{number:x}/128 dev n1 nodad" for number in range(1, 601)))
    pieces = []
    feed.ask()
    assert not feed.quiet()
    while piece := feed.read():
        pieces.append(piece)
        if len(pieces) == 2:
            feed.ask()  # begins anew
        assert not feed.quiet()
    assert feed.quiet()
    assert max(map(len, pieces)) <= 200
    assert len(pieces) >= 2 + 4
    records = [record for piece in pieces for record in piece]
    assert [record for record in records if isinstance(record, ListEnd)] == [records[-1]] == [ListEnd(whole=True)]


def test_it_is_quiet_until_it_is_too_old(lab: Lab) -> None:
    with closing(Polled(0.3)) as feed:
        interfaces = Interfaces(feed)
        interfaces.caught_up()
        assert interfaces.quiet()
        lab.near.ip("link set n1 down")
        # Unless the machine was so slow that the time is over.
        assert not interfaces.quiet() or isinstance(interfaces.table.bind("n1", WIDE), Binding)
        assert select.select([feed], [], [], 10)[0]  # by then somebody is to look, though nobody asks
        assert not interfaces.quiet()
        assert isinstance(interfaces.caught_up().bind("n1", WIDE), Refusal)
        assert interfaces.quiet()
        assert not select.select([feed], [], [], 0)[0] or not feed.quiet()
        assert select.select([feed], [], [], 10)[0]


def test_a_look_is_taken_again_until_two_agree(feed: Polled, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes or goes while procfs is read page by page shifts the rest, of which some may be missing."""
    interfaces = Interfaces(feed)
    table = shown(interfaces.caught_up())
    right = feed._look
    torn = iter([right._replace(v6=frozenset()), right._replace(links={}), right, right])
    monkeypatch.setattr(feed, "_once", lambda: next(torn))
    age(feed)
    assert told(feed) == []
    assert shown(interfaces.caught_up()) == table
    assert next(torn, None) is None


def test_a_look_that_fails_is_followed_by_another(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with closing(Polled(0.05)) as feed:
        interfaces = Interfaces(feed)
        with monkeypatch.context() as patch:
            patch.setattr(feed, "_once", fail)
            with pytest.raises(OSError, match="Cannot allocate"):
                interfaces.caught_up()
        assert select.select([feed], [], [], 10)[0]
        assert shown(interfaces.caught_up()) == by_netlink()


def test_a_closed_and_a_forgotten_feed_leave_nothing() -> None:
    before = os.listdir("/proc/self/fd")
    feed = Polled()
    all_of(feed)
    feed.close()
    feed.close()
    assert os.listdir("/proc/self/fd") == before
    all_of(Polled())
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


def test_a_feed_that_cannot_be_opened_leaves_nothing() -> None:
    before = os.listdir("/proc/self/fd")

    def work() -> None:
        with pytest.raises(OSError, match="Operation not permitted"):
            Polled()

    Sandbox("timerfd_create", errno.EPERM).run(work)
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


# --- through the watch --------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_guard_hears_of_a_lost_link_though_nobody_asks(lab: Lab) -> None:
    watch = InterfaceWatch(asyncio.get_running_loop(), Polled(0.05))
    table = await watch.caught_up()
    binding = table.bind("n1", WIDE)
    assert isinstance(binding, Binding)
    assert binding.owner is not None
    with open_bound(binding, WIDE) as sock, Guard(watch, sock, binding.owner, sock.local, WIDE) as guard:
        await asyncio.sleep(0.2)
        assert not guard.aborted
        lab.near.ip("link set n1 down")
        async with asyncio.timeout(10):
            while not guard.aborted:
                await asyncio.sleep(0.01)
        assert guard.refusal == Refusal(errno.ENETUNREACH, "n1 is down")
    del watch, guard
    gc.collect()
    await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_a_watch_is_told_anew(lab: Lab) -> None:
    """As before it is believed that there is no carrier."""
    watch = InterfaceWatch(asyncio.get_running_loop(), Polled(60))
    before = await watch.caught_up()
    assert watch.look() is before
    lab.near.ip("link set n1 down")
    assert watch.look() is before  # it is young enough
    after = await watch.told_anew()
    assert isinstance(after.bind("n1", WIDE), Refusal)
    del watch
    gc.collect()
    await asyncio.sleep(0.01)


# --- where netlink is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EPERM", "EACCES", "EAFNOSUPPORT", "EPROTONOSUPPORT"])
@pytest.mark.parametrize(("call", "argument"), [("socket", (0, AF_NETLINK)), ("bind", None), ("sendto", None)])
def test_it_is_chosen_where_netlink_is_refused(
    lab: Lab, caplog: pytest.LogCaptureFixture, call: str, argument: tuple[int, int] | None, name: str
) -> None:
    """By a sandbox (socket), by gVisor (bind to groups), by Android's SELinux (sendto)."""
    linux = Linux()

    def work() -> None:
        for _ in range(3):
            with closing(linux.feed()) as feed:
                assert isinstance(feed, Polled)

    before = os.listdir("/proc/self/fd")
    with caplog.at_level(logging.WARNING, "aiobind"):
        Sandbox(call, getattr(errno, name), argument).run(work)
    assert os.listdir("/proc/self/fd") == before
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("aiobind", "WARNING")
    said = f"netlink is refused here ({os.strerror(getattr(errno, name))}): the interfaces are looked at once a second"
    assert said in record.getMessage()


def test_it_is_not_chosen_for_another_reason(caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        with pytest.raises(OSError, match="Too many open files"):
            Linux().feed()

    Sandbox("socket", errno.EMFILE, (0, AF_NETLINK)).run(work)
    with closing(Linux().feed()) as feed:
        assert isinstance(feed, Netlink)
    assert not caplog.records


def test_the_rest_is_quiet_where_netlink_is_refused(lab: Lab) -> None:
    linux = Linux()

    def work() -> None:
        assert linux.routed_here(ip_address("127.0.0.1")) is None
        assert linux.routed_here(ip_address("2001:db8:7::1")) is None
        assert linux.silent_hop(socket.if_nametoindex("n1"), "198.18.1.99", "198.18.1.2") is None

    Sandbox("socket", errno.EPERM, (0, AF_NETLINK)).run(work)


def test_a_socket_factory_without_netlink(lab: Lab) -> None:
    info = (socket.AF_INET, socket.SOCK_STREAM, 0, "", (lab.target_v4, 80))

    def work() -> None:
        make = aiobind.socket_factory("if!n1")
        with make(info) as sock:
            assert sock.getsockname()[0] == "198.18.1.2"
        # Each socket asks anew, but for a second.
        outside.submit(lab.near.ip, "link set n1 down").result()
        time.sleep(1.01)
        with pytest.raises(aiobind.BindError, match="n1 is down"):
            make(info)

    with ThreadPoolExecutor(1) as outside:
        outside.submit(bool).result()
        Sandbox("socket", errno.EPERM, (0, AF_NETLINK)).run(work)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_connector_without_netlink(lab: Lab, run: Callable[..., None]) -> None:
    """It connects by the NIC that is named, refuses one that is down within the time to live, and takes it back."""
    witness = lab.witness(syn_only=True)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def ip(*commands: str) -> None:  # a child of this thread would be confined as well
            await loop.run_in_executor(outside, lab.near.ip, *commands)

        async with aiobind.Connector("if!n1", "if!n2") as connector, asyncio.timeout(30):

            async def address(**options: str) -> str:
                with await connector.connect(lab.target_v4, 80, **options) as sock:
                    bound = aiobind.bound_source(sock)
                    assert str(bound.source) == f"if!{bound.interface}"
                    return bound.address

            for name, own in (("n1", "198.18.1.2"), ("n2", "198.18.2.2")):
                assert await address(source=f"if!{name}") == own
            with await connector.connect(lab.target_v6, 80, source="if!n1") as sock:
                assert sock.getsockname()[0] == "2001:db8:1::2"
            with pytest.raises(aiobind.BindError, match=r"no interface named 'n9' \(have: lo, n0, n1, n2\)"):
                await connector.connect(lab.target_v4, 80, source="if!n9")

            await ip("link set n1 down")
            await asyncio.sleep(1.01)  # the time to live; from here on it is known
            with pytest.raises(aiobind.BindError, match="n1 is down"):
                await connector.connect(lab.target_v4, 80, source="if!n1")
            assert {await address() for _ in range(4)} == {"198.18.2.2"}

            await ip("link set n1 up", "route add default via 198.18.1.1 dev n1 metric 1001")
            while True:
                await asyncio.sleep(0.1)
                try:
                    assert await address(source="if!n1") == "198.18.1.2"
                except aiobind.BindError:
                    continue
                break

            # An attempt that is under way ends with its link.
            await ip("neigh add 198.18.1.99 lladdr 02:00:00:00:00:99 dev n1 nud permanent")
            attempt = asyncio.create_task(connector.connect("198.18.1.99", 80, source="if!n1"))
            await asyncio.sleep(0.1)
            await ip("link set n1 down")
            with pytest.raises(aiobind.BindError, match=r"n1 is down \(since the attempt began\)"):
                await attempt

    with lab.far:
        servers = [
            socket.create_server((host, 80), family=family)
            for host, family in ((lab.target_v4, socket.AF_INET), (lab.target_v6, socket.AF_INET6))
        ]
    with ThreadPoolExecutor(1) as outside:
        outside.submit(bool).result()  # its thread begins here, unconfined
        Sandbox("socket", errno.EPERM, (0, AF_NETLINK)).run(lambda: run(main()))
    for server in servers:
        server.close()
    nics = Counter((packet.nic, packet.source.rpartition(".")[0]) for packet in witness.packets() if packet.syn)
    assert {nic for nic, source in nics if source} == {"n1", "n2"}
    assert all(source == f"198.18.{nic[1]}" for nic, source in nics if source)
