"""DNS from a source: who is asked, by which NIC, for what, how long an answer holds, and what a failure says."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from dns_server import NXDOMAIN, REFUSED, SERVFAIL, DnsServer

import aiobind
from aiobind import dns as aiobind_dns
from aiobind._dial import Dialer
from aiobind.aiohttp import BoundTCPConnector
from aiobind.dns import SourceLookup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from aiobind._sockets import BoundSocket
    from aiobind.lab import Lab, Witness

pytestmark = pytest.mark.anyio

V4, V6 = "203.0.113.80", "2001:db8:ffff::80"
N0, N1, N2 = map(aiobind.Interface, ("n0", "n1", "n2"))
HOSTS = "127.0.0.1 localhost\n"


def dialer(servers: Sequence[str], ttl: float | None) -> Dialer:
    return Dialer(
        ["if!n0"],
        policy=None,
        socket_options=(),
        ttl=ttl,
        lookup=lambda reach: SourceLookup(reach, servers or None, ttl=ttl),
    )


@contextmanager
def lookup(*servers: str, ttl: float | None = None) -> Iterator[SourceLookup]:
    with closing(dialer(servers, ttl)) as made:
        assert isinstance(made._lookup, SourceLookup)
        yield made._lookup


async def find(made: SourceLookup, host: str, via: aiobind.Source | None = None, **options: int) -> tuple[str, ...]:
    """Return the addresses as text; ten seconds are enough for anything here."""
    async with asyncio.timeout(10):
        return tuple(str(ip) for ip, _ in await made.find(host, via=via, **options))


def start(made: SourceLookup, *hosts: str, via: aiobind.Source | None = None) -> list[asyncio.Task[tuple[str, ...]]]:
    return [asyncio.ensure_future(find(made, host, via)) for host in hosts]


def questions_under_way() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__name__", "") == "_ask"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def questions(witness: Witness) -> set[tuple[str, str, str]]:
    """Return by which NIC, from which address and by what the questions came."""
    return {(packet.nic, packet.source, packet.protocol) for packet in witness.packets() if packet.dport == 53}


@pytest.fixture
def dns(resolv_conf: Callable[..., None]) -> Iterator[DnsServer]:
    """A server on 127.0.0.1, and a resolv.conf that names it."""
    with DnsServer() as server:
        resolv_conf(server.resolv_conf)
        yield server


@pytest.fixture
def far_dns(lab: Lab) -> Iterator[DnsServer]:
    """A server on the far side, which every NIC reaches, and on the far end of n1."""
    with DnsServer(V4, V6, "198.18.1.1", f"{lab.nic('n1').gateway_link_local}%f1", namespace=lab.far) as server:
        server.add("some.test", "192.0.2.1", "2001:db8::1", ttl=60)
        yield server


@pytest.fixture
def near_dns(lab: Lab) -> Iterator[DnsServer]:
    """A server on the loopback of this side, as systemd-resolved is one."""
    lab.near.sysctl("ipv4.ip_unprivileged_port_start", 0)
    with DnsServer("127.0.0.53", "127.0.0.1", "::1", namespace=lab.near) as server:
        server.add("some.test", "192.0.2.1")
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the cache sees; set ``clock.now``."""
    fake = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(aiobind_dns, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


@pytest.fixture(params=["root", "no capabilities"])
def privilege(request: pytest.FixtureRequest) -> None:
    if request.param == "no capabilities":
        if "gone_witness" in request.fixturenames:
            request.getfixturevalue("gone_witness")  # takes CAP_NET_RAW
        request.getfixturevalue("no_capabilities")


# --- by which NIC -------------------------------------------------------------------------------------------


#: The source, the server, and by which NIC and from which address the question comes.
WAYS = [
    ("if!n1", V4, "n1", "198.18.1.2"),
    ("if!n2", V4, "n2", "198.18.2.2"),
    ("if!n1", V6, "n1", "2001:db8:1::2"),
    ("if!n1", "198.18.1.1", "n1", "198.18.1.2"),
    ("ifhost!n1!198.18.1.2", V4, "n1", "198.18.1.2"),
    ("ifhost!n2!2001:db8:2::2", V6, "n2", "2001:db8:2::2"),
    # An address is only an address: the routing table chooses the interface.
    ("198.18.2.2", V4, "n0", "198.18.2.2"),
    ("198.18.1.2", "198.18.1.1", "n1", "198.18.1.2"),
    ("2001:db8:2::2", V6, "n0", "2001:db8:2::2"),
    (None, V4, "n0", "198.18.0.2"),
    (None, V6, "n0", "2001:db8::2"),
]


@pytest.mark.usefixtures("privilege")
@pytest.mark.parametrize("named", [False, True], ids=["resolv.conf", "named"])
async def test_a_question_leaves_by_the_source(
    far_dns: DnsServer, witness: Witness, resolv_conf: Callable[..., None], named: bool
) -> None:
    for via, server, nic, address in WAYS:
        resolv_conf("nameserver 203.0.113.99\n" if named else f"nameserver {server}\n", hosts=HOSTS)
        far_dns.queries.clear()
        with lookup(*([server] if named else [])) as made:
            found = await find(made, "some.test", None if via is None else aiobind.parse_source(via))
        assert found == ("2001:db8::1", "192.0.2.1")
        assert questions(witness) == {(nic, address, "udp")}, (via, server)
        assert far_dns.queries == {("some.test", "A"): 1, ("some.test", "AAAA"): 1}


@pytest.mark.usefixtures("privilege")
async def test_a_link_local_server(lab: Lab, far_dns: DnsServer, witness: Witness, resolv_conf: Any) -> None:
    nic = lab.nic("n1")
    resolv_conf(f"nameserver {nic.gateway_link_local}%n1\n", hosts=HOSTS)
    for servers in ([], [f"{nic.gateway_link_local}%n1"]):
        with lookup(*servers) as made:
            for via in (N1, None):
                assert await find(made, "some.test", via) == ("2001:db8::1", "192.0.2.1")
            with pytest.raises(aiobind.BindError, match="zone of another interface than n2"):
                await find(made, "some.test", N2)
            lab.near.ip("link set n1 down", "link set n1 name wan", "link set wan up")
            with pytest.raises(socket.gaierror, match="no interface of this host is named 'n1'"):
                await find(made, "other.test")
            lab.near.ip("link set wan down", "link set wan name n1", "link set n1 up")
            await until(lambda: "tentative" not in lab.near.ip("addr show n1"))
    assert {name for name, _, _ in questions(witness)} == {"n1"}


@pytest.mark.usefixtures("privilege")
async def test_a_truncated_answer_goes_to_tcp_by_the_source(far_dns: DnsServer, witness: Witness) -> None:
    far_dns.add("large.test", *(f"192.0.2.{i}" for i in range(200)), truncated=True)
    with lookup(V4) as made:
        assert len(await find(made, "large.test", N1, family=socket.AF_INET)) == 200
    assert [transport for _, transport, _, _ in far_dns.asked] == ["udp", "tcp"]
    assert questions(witness) == {("n1", "198.18.1.2", "udp"), ("n1", "198.18.1.2", "tcp")}


#: What is done to the interface of a source, and how the source then fails: at once, and before any packet.
GONE = [
    ("link del {}", errno.ENODEV, "no interface named '{}'"),
    ("link set {} down", errno.ENETUNREACH, "{} is down"),
    ("addr flush dev {}", errno.EADDRNOTAVAIL, "{} has no IPv4 address"),
    ("link set {0} down; link set {0} name w{0}; link set w{0} up", errno.ENODEV, "no interface named '{}'"),
]


@pytest.fixture
def gone_lab(make_lab: Callable[[int], Lab]) -> Lab:
    return make_lab(len(GONE) + 1)


@pytest.fixture
def gone_witness(gone_lab: Lab) -> Witness:
    return gone_lab.witness()


@pytest.fixture
def gone_dns(gone_lab: Lab) -> Iterator[DnsServer]:
    with DnsServer(V4, "198.18.0.1", namespace=gone_lab.far) as server:
        server.add("some.test", "192.0.2.1", ttl=60)
        yield server


@pytest.mark.usefixtures("privilege")
@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a question"])
async def test_a_source_that_is_gone_asks_nobody(
    gone_lab: Lab, gone_dns: DnsServer, gone_witness: Witness, resolv_conf: Callable[..., None], before: bool
) -> None:
    lab, witness = gone_lab, gone_witness
    resolv_conf("options timeout:5 attempts:5\n", hosts=HOSTS)
    with lookup(V4, "198.18.0.1") as made:
        for (change, number, words), nic in zip(GONE, lab.nics[1:], strict=True):
            via = aiobind.Interface(nic.name)
            if before:
                await find(made, "some.test", via)
                assert {name for name, _, _ in questions(witness)} == {nic.name}
            lab.near.ip(*change.format(nic.name).split("; "))
            started = time.monotonic()
            with pytest.raises(aiobind.BindError) as caught:
                await find(made, "other.test", via)
            assert time.monotonic() - started < 2  # a try takes five seconds
            assert caught.value.errno == number
            assert f"no DNS server can be asked: {V4}: {words.format(nic.name)}" in str(caught.value)
            assert not questions(witness)


async def test_a_source_that_goes_during_a_question(
    lab: Lab, far_dns: DnsServer, witness: Witness, resolv_conf: Callable[..., None]
) -> None:
    resolv_conf("options timeout:1 attempts:5\n", hosts=HOSTS)
    far_dns.add("held.test", "192.0.2.1", delay=inf)
    with lookup(V4, "198.18.1.1") as made:
        (task,) = start(made, "held.test", via=N1)
        await until(lambda: far_dns.queries.total() == 2)
        witness.packets()
        lab.near.ip("link set n1 down")
        started = time.monotonic()
        with pytest.raises(aiobind.BindError, match="n1 is down"):
            await task
        assert time.monotonic() - started < 5  # the try that is under way; all of them would take ten seconds
    assert not questions(witness)


@pytest.mark.usefixtures("privilege")
async def test_an_answer_outlives_the_interface_and_a_new_one_is_asked_by(
    lab: Lab, far_dns: DnsServer, witness: Witness
) -> None:
    with lookup(V4) as made:
        first = await find(made, "some.test", N2)
        lab.near.ip("link set n2 down")
        assert await find(made, "some.test", N2) == first
        lab.near.ip("link set n2 up", f"route add default via {lab.nic('n2').gateway_v4} dev n2 metric 1002")
        assert await find(made, "some.test", N2, family=socket.AF_INET) == ("192.0.2.1",)
    assert questions(witness) == {("n2", "198.18.2.2", "udp")}
    assert far_dns.queries == {("some.test", "A"): 2, ("some.test", "AAAA"): 1}


async def test_a_server_that_the_source_cannot_reach_leaves_the_others(
    lab: Lab, far_dns: DnsServer, witness: Witness
) -> None:
    lab.near.ip("addr flush dev n1 scope global", "addr add 198.18.1.2/24 dev n1", "route add default dev n1 metric 7")
    with lookup(V6, "198.18.2.2", V4) as made:
        assert await find(made, "some.test", N1) == ("2001:db8::1", "192.0.2.1")
    assert questions(witness) == {("n1", "198.18.1.2", "udp")}
    with lookup(V6, "198.18.2.2") as made, pytest.raises(aiobind.BindError) as caught:
        await find(made, "some.test", N1)
    assert caught.value.errno == errno.EADDRNOTAVAIL
    assert f"no DNS server can be asked: {V6}: n1 has" in str(caught.value)
    assert "198.18.2.2: 198.18.2.2 is this host's own address" in str(caught.value)
    with lookup(V6, "198.18.1.1") as made:  # one has been asked, and does not know: that is no fault of the source
        far_dns.add("broken.test", rcode=SERVFAIL)
        with pytest.raises(socket.gaierror) as failed:
            await find(made, "broken.test", N1)
    assert failed.value.errno == socket.EAI_AGAIN
    assert "198.18.1.1: SERVFAIL" in str(failed.value)


async def test_no_route_is_the_sources_fault(lab: Lab, far_dns: DnsServer) -> None:
    lab.near.ip("route del default via 2001:db8:1::1 dev n1 metric 1001")
    with lookup(V6) as made, pytest.raises(aiobind.BindError, match=V6) as caught:
        await find(made, "some.test", N1)
    assert caught.value.errno == errno.ENETUNREACH
    assert not far_dns.queries


#: Sources, and the servers on the loopback that they have the family for.
STUBS = [
    ("if!n1", ["127.0.0.53", "127.0.0.1", "::1"]),
    ("ifhost!n1!198.18.1.2", ["127.0.0.53"]),
    ("198.18.1.2", ["127.0.0.53", "127.0.0.1"]),
    ("2001:db8:1::2", ["::1"]),
]


@pytest.mark.usefixtures("privilege")
async def test_a_stub_on_the_loopback_cannot_be_asked_from_a_source(
    near_dns: DnsServer, witness: Witness, resolv_conf: Callable[..., None]
) -> None:
    for via, stubs in STUBS:
        for stub in stubs:
            resolv_conf(f"nameserver {stub}\n", hosts=HOSTS)
            near_dns.queries.clear()
            with lookup() as made:
                with pytest.raises(aiobind.BindError) as caught:
                    await find(made, "some.test", aiobind.parse_source(via))
                assert not near_dns.queries
                assert await find(made, "some.test") == ("192.0.2.1",)  # from no source in particular
            assert caught.value.errno == errno.ENETUNREACH
            assert f"{stub}: " in str(caught.value)
            assert f"not from {via}: name the servers of the link in dns=(...)" in str(caught.value)
            assert ("'resolvectl dns n1' lists them" if "!" in via else "'resolvectl dns' lists") in str(caught.value)
    assert not questions(witness)


#: Sources, and servers at addresses of this host that they can reach.
OWN = [
    ("if!n1", "198.18.1.2"),
    ("if!n1", "2001:db8:1::2"),
    ("ifhost!n1!198.18.1.2", "198.18.1.2"),
    ("198.18.1.2", "198.18.1.2"),
    ("198.18.2.2", "198.18.1.2"),
]


@pytest.fixture
def own_dns(lab: Lab) -> Iterator[DnsServer]:
    """A server of this host, at an address of its own."""
    lab.near.sysctl("ipv4.ip_unprivileged_port_start", 0)
    with DnsServer("198.18.1.2", "2001:db8:1::2", namespace=lab.near) as server:
        server.add("some.test", "192.0.2.1")
        yield server


async def test_a_server_of_this_host_is_asked_where_it_is_named_only(
    own_dns: DnsServer, resolv_conf: Callable[..., None]
) -> None:
    for via, server in OWN:
        own_dns.queries.clear()
        resolv_conf(f"nameserver {server}\n", hosts=HOSTS)
        with lookup() as made, pytest.raises(aiobind.BindError, match="this host itself") as caught:
            await find(made, "some.test", aiobind.parse_source(via))
        assert caught.value.errno == errno.ENETUNREACH
        assert not own_dns.queries
        with lookup(server) as made:
            assert await find(made, "some.test", aiobind.parse_source(via)) == ("192.0.2.1",)


async def test_a_stub_may_be_named_and_a_loopback_source_may_ask_it(
    near_dns: DnsServer, resolv_conf: Callable[..., None]
) -> None:
    resolv_conf("nameserver 127.0.0.1\n", hosts=HOSTS)
    with lookup("127.0.0.1") as made:
        assert await find(made, "some.test", aiobind.Address("198.18.1.2")) == ("192.0.2.1",)
    with lookup() as made:
        assert await find(made, "some.test", aiobind.Address("127.0.0.7")) == ("192.0.2.1",)
        assert await find(made, "some.test", aiobind.Interface("lo")) == ("192.0.2.1",)


# --- what is asked, and what is not -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected", "asked"),
    [
        (0, ("2001:db8::1", "192.0.2.2", "192.0.2.1"), {"A", "AAAA"}),
        (socket.AF_INET, ("192.0.2.2", "192.0.2.1"), {"A"}),
        (socket.AF_INET6, ("2001:db8::1",), {"AAAA"}),
    ],
)
async def test_the_addresses_of_a_name(dns: DnsServer, family: int, expected: tuple[str, ...], asked: set[str]) -> None:
    dns.add("both.test", "192.0.2.2", "192.0.2.1", "2001:db8::1")
    with lookup() as made:
        assert await find(made, "both.test", family=family) == expected
    assert dns.queries == {("both.test", kind): 1 for kind in asked}


async def test_both_families_are_asked_at_the_same_time(dns: DnsServer) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    with lookup() as made:
        (task,) = start(made, "held.test")
        await until(lambda: dns.queries.total() == 2)
        assert not task.done()
        dns.release("held.test")
        assert await task == ("192.0.2.1",)


@pytest.mark.parametrize("late", ["A", "AAAA"])
async def test_the_late_family_is_for_those_who_come_later(dns: DnsServer, late: str) -> None:
    addresses = {"A": "192.0.2.1", "AAAA": "2001:db8::1"}
    dns.add("half.test", *addresses.values(), ttl=60, delay={late: inf})
    (early,) = set(addresses.values()) - {addresses[late]}
    with lookup() as made:
        assert await find(made, "half.test") == (early,)
        assert await find(made, "half.test") == (early,)  # this one waits for nobody
        dns.release("half.test")
        await until(lambda: len(made._kept[None, "half.test", 0].found) == 2)
        assert await find(made, "half.test") == ("2001:db8::1", "192.0.2.1")
        await until(lambda: not made._tasks)
    assert dns.queries == {("half.test", "A"): 1, ("half.test", "AAAA"): 1}


async def test_a_little_is_waited_for_the_other_family(dns: DnsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert aiobind_dns.RESOLUTION_DELAY == 0.05  # RFC 8305 section 3
    monkeypatch.setattr(aiobind_dns, "RESOLUTION_DELAY", 5)
    dns.add("both.test", "192.0.2.1", "2001:db8::1", delay={"AAAA": 0.1})
    with lookup() as made:
        assert await find(made, "both.test") == ("2001:db8::1", "192.0.2.1")


async def test_who_has_no_address_yet_waits_for_the_other_family(dns: DnsServer) -> None:
    with lookup() as made:
        for rcode in (0, NXDOMAIN, SERVFAIL, REFUSED):
            dns.add("v6.test", "2001:db8::1", rcode={"A": rcode}, delay={"AAAA": 0.1})
            assert await find(made, "v6.test") == ("2001:db8::1",)


#: What resolv.conf says, the name, and the names that are asked for.
SEARCHES = [
    ("", "www", ["www"]),
    ("search a.test b.test", "www", ["www.a.test", "www.b.test", "www"]),
    ("search a.test b.test", "www.", ["www"]),
    ("search a.test", "www.x", ["www.x", "www.x.a.test"]),
    ("search a.test\noptions ndots:2", "www.x", ["www.x.a.test", "www.x"]),
    ("search a.test\noptions ndots:2", "www.x.y", ["www.x.y", "www.x.y.a.test"]),
    ("search a.test\noptions ndots:0", "www", ["www", "www.a.test"]),
    ("domain a.test", "www", ["www.a.test", "www"]),
    ("search a.test\ndomain b.test", "www", ["www.b.test", "www"]),
    ("domain b.test\nsearch a.test", "www", ["www.a.test", "www"]),
    ("search a.test .", "www", ["www.a.test", "www"]),
    (f"search {'x' * 64}.test {'.'.join(['x' * 61] * 4)}.test a.test", "www", ["www.a.test", "www"]),
]


async def test_search_and_ndots(dns: DnsServer, resolv_conf: Callable[..., None]) -> None:
    for conf, host, asked in SEARCHES:
        resolv_conf(f"nameserver 127.0.0.1\n{conf}\n", hosts=HOSTS)
        dns.remove()
        for last in range(len(asked)):
            dns.asked.clear()
            dns.add(asked[last], "192.0.2.1")
            with lookup() as made:
                assert await find(made, host, family=socket.AF_INET) == ("192.0.2.1",)
            assert [name for _, _, name, _ in dns.asked] == asked[: last + 1], (conf, host)
            dns.add(asked[last])  # it exists, without an address: the search goes on
        with lookup() as made, pytest.raises(socket.gaierror, match="the name has no address") as caught:
            await find(made, host)
        assert caught.value.errno == socket.EAI_NODATA


def test_the_domain_of_the_host_is_searched_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiobind_dns.socket, "gethostname", lambda: "box.a.test")
    assert aiobind_dns._resolv_conf("").search == ("a.test",)
    assert aiobind_dns._resolv_conf("search b.test").search == ("b.test",)
    assert aiobind_dns._resolv_conf("search").search == ()


@pytest.mark.parametrize("rcode", [SERVFAIL, REFUSED])
async def test_a_search_ends_where_nobody_knows(dns: DnsServer, resolv_conf: Callable[..., None], rcode: int) -> None:
    """Else another name's address would be taken for that of this one."""
    resolv_conf("nameserver 127.0.0.1\nsearch a.test\n", hosts=HOSTS)
    dns.add("www.a.test", rcode=rcode)
    dns.add("www", "192.0.2.1")
    with lookup() as made, pytest.raises(socket.gaierror):
        await find(made, "www")
    assert {name for name, _ in dns.queries} == {"www.a.test"}


#: The name, the family, and what is known of it.
KNOWN = [
    ("listed.test", 0, ("192.0.2.7", "2001:db8::7", "192.0.2.8")),
    ("LISTED.test.", 0, ("192.0.2.7", "2001:db8::7", "192.0.2.8")),
    ("listed.test", socket.AF_INET6, ("2001:db8::7",)),
    ("alias.test", 0, ("192.0.2.7",)),
    ("zoned.test", 0, ("fe80::1%lo",)),
    ("localhost", 0, ("127.0.0.1",)),
    ("localhost", socket.AF_INET6, ("::1",)),
    ("LocalHost.", 0, ("::1", "127.0.0.1")),
    ("www.localhost", 0, ("::1", "127.0.0.1")),
    ("www.localhost", socket.AF_INET, ("127.0.0.1",)),
]
N9 = aiobind.Interface("n9")  # which does not exist: whoever asks fails


async def test_nobody_is_asked_for_what_is_known(dns: DnsServer, resolv_conf: Callable[..., None]) -> None:
    hosts = """
        192.0.2.7 listed.test  Alias.test # comment.test
        2001:db8::7\tlisted.test
        192.0.2.8 listed.test\nnonsense listed.test\n# 192.0.2.9 listed.test\nfe80::1%lo zoned.test
        fe80::1%no-such-nic zoned.test
    """
    for host, family, expected in KNOWN:
        local = "" if host == "LocalHost." else "127.0.0.1 localhost\n"
        resolv_conf(dns.resolv_conf, hosts=hosts + local)
        with lookup() as made:
            assert await find(made, host, N9, family=family) == expected, host
    assert not dns.queries


async def test_a_name_that_is_listed_without_the_family_is_asked_for(
    dns: DnsServer, resolv_conf: Callable[..., None]
) -> None:
    resolv_conf(dns.resolv_conf, hosts="192.0.2.7 half.test\n")
    dns.add("half.test", "2001:db8::1")
    with lookup() as made:
        assert await find(made, "half.test", family=socket.AF_INET6) == ("2001:db8::1",)


IMPOSSIBLE = [
    "",
    " ",
    ".",
    "@",
    "two..dots",
    "x" * 64 + ".test",
    ".".join(["x" * 60] * 5),
    "x" * 1_000_000,
    "\ud800",
    "\0",
    "localhost\0.example.com",
    "%lo",
    "fe80::1%no-such-nic",
    "a b.test",
    "a\\.b.test",
    "a\\000b.test",
    "\\097.test",  # "a.test", as zone files spell it
    "\\108ocalhost",
    "*.test",
    "x.onion",
    "X.Onion.",
    "some.invalid",
]


async def test_an_impossible_name(dns: DnsServer) -> None:
    with lookup() as made:
        for name in IMPOSSIBLE:
            with pytest.raises(socket.gaierror) as caught:
                await find(made, name)
            assert caught.value.errno == socket.EAI_NONAME
            assert "host name" in str(caught.value) or "may be asked of DNS" in str(caught.value)
            assert len(str(caught.value)) < 300
    assert not dns.queries


async def test_other_alphabets(dns: DnsServer) -> None:
    dns.add("xn--bcher-kva.test", "192.0.2.1", ttl=60)
    with lookup() as made:
        assert await find(made, "bücher.test") == await find(made, "xn--bcher-kva.test") == ("192.0.2.1",)
        assert await find(made, "XN--BCHER-KVA.test") == ("192.0.2.1",)
    assert dns.queries["xn--bcher-kva.test", "A"] == 2


async def test_an_underscore_is_no_fault(dns: DnsServer) -> None:
    dns.add("my_host.test", "192.0.2.1")
    with lookup() as made:
        assert await find(made, "my_host.test") == ("192.0.2.1",)


async def test_only_numbers_where_only_numbers_are_wanted(dns: DnsServer) -> None:
    with lookup() as made, pytest.raises(socket.gaierror) as caught:
        await find(made, "some.test", flags=socket.AI_NUMERICHOST)
    assert caught.value.errno == socket.EAI_NONAME
    assert not dns.queries


async def test_no_other_family(dns: DnsServer) -> None:
    with lookup() as made, pytest.raises(socket.gaierror, match="AF_UNIX") as caught:
        await find(made, "some.test", family=socket.AF_UNIX)
    assert caught.value.errno == socket.EAI_FAMILY


# --- the files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (
            "nameserver 192.0.2.1\n  nameserver\t2001:db8::1  # x\nnameserver fe80::1%n1",
            {"servers": ("192.0.2.1", "2001:db8::1", "fe80::1%n1")},
        ),
        ("#nameserver 192.0.2.1\n;nameserver 192.0.2.1\nnameserver\nnameserver dns.test\nnonsense", {}),
        ("options ndots:3 timeout:7 attempts:4", {"ndots": 3, "timeout": 7, "attempts": 4}),
        ("options ndots:99 timeout:99 attempts:99", {"ndots": 15, "timeout": 30, "attempts": 5}),
        ("options ndots:x timeout: attempts:-1 timeout:0", {"timeout": 1}),
        ("options rotate edns0\noptions use-vc trust-ad", {"rotate": True, "edns": True, "tcp": True}),
        ("search a.test b.test\noptions ndots:2", {"search": ("a.test", "b.test"), "ndots": 2}),
    ],
)
def test_resolv_conf(monkeypatch: pytest.MonkeyPatch, text: str, expected: dict[str, Any]) -> None:
    monkeypatch.setattr(aiobind_dns.socket, "gethostname", lambda: "box")
    assert aiobind_dns._resolv_conf(text) == aiobind_dns._Config(**expected)


async def test_the_files_are_read_again_when_they_change(
    resolv_conf: Callable[..., None], dns: DnsServer, tmp_path: Path
) -> None:
    dns.add("some.test", "192.0.2.1")
    with lookup() as made:
        assert await find(made, "some.test") == ("192.0.2.1",)
        resolv_conf("nameserver 127.0.0.9\n", hosts="192.0.2.9 listed.test\n")
        with pytest.raises(socket.gaierror, match=r"127\.0\.0\.9: .*refused"):
            await find(made, "some.test")
        assert await find(made, "listed.test") == ("192.0.2.9",)
        resolv_conf("nameserver 127.0.0.1\n", hosts="192.0.2.8 listed.test\n")
        assert await find(made, "some.test") == ("192.0.2.1",)
        assert await find(made, "listed.test") == ("192.0.2.8",)


async def test_an_unchanged_file_is_parsed_once(tmp_path: Path) -> None:
    path, parsed = tmp_path / "file", []
    file = aiobind_dns._File(str(path), lambda text: parsed.append(text) or len(parsed))

    def contents() -> None:
        assert file.content() == 1  # there is none
        path.write_text("one")
        assert [file.content() for _ in range(3)] == [2, 2, 2]
        path.write_bytes(b"other \xff")
        assert [file.content() for _ in range(3)] == [3, 3, 3]
        path.unlink()
        assert file.content() == 4

    thread = threading.Thread(target=contents)
    thread.start()
    await until(lambda: not thread.is_alive())
    assert parsed == ["", "one", "other \ufffd", ""]


async def test_no_server_is_named(resolv_conf: Callable[..., None]) -> None:
    resolv_conf("search a.test\n", hosts=HOSTS)
    with lookup() as made, pytest.raises(socket.gaierror, match=r"names no server: .* in dns=\(") as caught:
        await find(made, "some.test")
    assert caught.value.errno == socket.EAI_AGAIN


async def test_no_thread_can_be_started(dns: DnsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    dns.add("some.test", "192.0.2.1")
    with lookup() as made:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(socket.gaierror, match="new thread"):
                await find(made, "some.test")
        assert await find(made, "some.test") == ("192.0.2.1",)


async def test_nothing_is_read_on_the_loop(dns: DnsServer) -> None:
    """Blockbuster raises where the loop's thread opens a file; this test is that it would."""
    with pytest.raises(BaseException, match="Blocking call"):
        aiobind_dns._HOSTS.content()


# --- failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "number", "words"),
    [
        ({"rcode": NXDOMAIN}, socket.EAI_NONAME, "there is no such name (asked: 127.0.0.1)"),
        ({}, socket.EAI_NODATA, "the name has no address (asked: 127.0.0.1)"),
        ({"rcode": {"A": NXDOMAIN}}, socket.EAI_NODATA, "the name has no address (asked: 127.0.0.1)"),
        ({"rcode": SERVFAIL}, socket.EAI_AGAIN, "no DNS server has answered: 127.0.0.1: SERVFAIL"),
        ({"rcode": REFUSED}, socket.EAI_AGAIN, "no DNS server has answered: 127.0.0.1: REFUSED"),
        ({"rcode": {"A": SERVFAIL}}, socket.EAI_AGAIN, "no DNS server has answered: 127.0.0.1: SERVFAIL"),
        ({"rcode": 6}, socket.EAI_FAIL, "YXDOMAIN"),
        ({"cname": "gone.test"}, socket.EAI_NODATA, "the name has no address"),
        ({"cname": "failing.test"}, socket.EAI_AGAIN, "no DNS server has answered: 127.0.0.1: ChainTooLong"),
    ],
    ids=str,
)
async def test_a_failure(
    dns: DnsServer, resolv_conf: Callable[..., None], record: dict[str, Any], number: int, words: str
) -> None:
    resolv_conf("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n", hosts=HOSTS)
    dns.add("failing.test", **record)
    with lookup() as made, pytest.raises(socket.gaierror) as caught:
        await find(made, "failing.test.")
    assert type(caught.value) is socket.gaierror
    assert caught.value.errno == number
    assert words in str(caught.value)


async def test_each_server_is_named_with_its_reason(dns: DnsServer) -> None:
    dns.add("failing.test", rcode=SERVFAIL)
    dns.add("some.test", "192.0.2.1")
    with lookup("127.0.0.9", "127.0.0.1") as made:
        with pytest.raises(socket.gaierror, match=r"127\.0\.0\.9: Connection refused; 127\.0\.0\.1: SERVFAIL"):
            await find(made, "failing.test")
        assert await find(made, "some.test") == ("192.0.2.1",)


def patient(monkeypatch: pytest.MonkeyPatch, *servers: str, timeout: float, attempts: int) -> None:
    """Let resolv.conf say so, which knows whole seconds only."""
    config = aiobind_dns._Config(servers, timeout=timeout, attempts=attempts)
    monkeypatch.setattr(aiobind_dns, "_RESOLV_CONF", SimpleNamespace(content=lambda: config))


async def test_a_silent_server_costs_one_timeout(dns: DnsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, "127.0.0.9", "127.0.0.1", timeout=0.3, attempts=100)
    dns.add("some.test", "192.0.2.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent, lookup() as made:
        silent.bind(("127.0.0.9", 53))
        started = time.monotonic()
        assert await find(made, "some.test") == ("192.0.2.1",)
        assert 0.29 < time.monotonic() - started < 5


async def test_nobody_answers(dns: DnsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, "127.0.0.1", timeout=0.1, attempts=3)
    dns.add("held.test", delay=inf)
    with lookup() as made, pytest.raises(socket.gaierror, match=r"127\.0\.0\.1: no answer") as caught:
        await find(made, "held.test")
    assert caught.value.errno == socket.EAI_AGAIN
    assert dns.queries["held.test", "A"] > 1


async def test_a_truncated_answer_and_nobody_by_tcp(far_dns: DnsServer, witness: Witness) -> None:
    far_dns.add("large.test", "192.0.2.1", truncated=True)
    far_dns.close_tcp()
    with lookup(V4) as made, pytest.raises(socket.gaierror, match="refused") as caught:
        await find(made, "large.test", N1)
    assert caught.value.errno == socket.EAI_AGAIN
    assert questions(witness) == {("n1", "198.18.1.2", "udp"), ("n1", "198.18.1.2", "tcp")}


async def test_tcp_where_resolv_conf_wants_it(dns: DnsServer, resolv_conf: Callable[..., None]) -> None:
    resolv_conf("nameserver 127.0.0.1\noptions use-vc edns0 rotate\n", hosts=HOSTS)
    dns.add("some.test", "192.0.2.1")
    with lookup() as made:
        assert await find(made, "some.test") == ("192.0.2.1",)
    assert {transport for _, transport, _, _ in dns.asked} == {"tcp"}


async def test_what_reach_raises_is_told(dns: DnsServer) -> None:
    async def refusing(*_: object) -> BoundSocket:
        raise errors[0]

    errors: list[Exception] = [aiobind.ResolveError(socket.EAI_NONAME, "the source's name cannot be resolved")]
    with closing(SourceLookup(refusing, ["192.0.2.53"], ttl=None)) as made:
        with pytest.raises(aiobind.ResolveError, match="the source's name") as unresolved:
            await find(made, "some.test", aiobind.Host("nic.test"))
        assert unresolved.value.errno == socket.EAI_NONAME
        errors[0] = OSError(errno.EMFILE, "Too many open files")
        with pytest.raises(socket.gaierror, match="Too many open files") as caught:
            await find(made, "some.test", aiobind.Host("nic.test"))
        assert caught.value.errno == socket.EAI_AGAIN
        errors[0] = TimeoutError(errno.ETIMEDOUT, "connection timed out")
        with pytest.raises(socket.gaierror, match="connection timed out"):
            await find(made, "some.test", aiobind.Host("nic.test"))


async def test_whatever_happens_is_told(dns: DnsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("what nobody thought of")

    monkeypatch.setattr(aiobind_dns, "_candidates", fail)
    with lookup() as made, pytest.raises(socket.gaierror, match="LookupError: what nobody thought of") as caught:
        await find(made, "some.test")
    assert caught.value.errno == socket.EAI_FAIL


@pytest.mark.parametrize(
    ("servers", "words"),
    [
        ((), "names no server"),
        (("192.0.2.53", "dns.test"), "'dns.test'"),
        (("192.0.2.53:53",), "'192.0.2.53:53'"),
        (("",), "''"),
        ((5,), "'5'"),
        ((b"\1\1\1\1",), "text"),
    ],
)
def test_servers_are_given_by_address(servers: Sequence[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        aiobind.Connector("if!n0", dns=servers)


@pytest.mark.parametrize(
    "use", ["import aiobind.dns", "Connector('if!n0', dns='source')", "BoundTCPConnector('if!n0', dns=('192.0.2.53',))"]
)
def test_without_dnspython(use: str) -> None:
    program = f"""if True:
        import sys, asyncio
        sys.modules['dns'] = None
        from aiobind import Connector
        from aiobind.aiohttp import BoundTCPConnector
        async def main():
            Connector('if!n0'), await BoundTCPConnector('if!n0').close()
            {use}
        asyncio.run(main())
        """
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False
    )
    assert run.returncode == 1
    assert "ImportError: aiobind.dns needs dnspython" in run.stderr
    assert 'pip install "aiobind[dns]"' in run.stderr


# --- forgeries ----------------------------------------------------------------------------------------------


def _a(name: bytes, address: str) -> bytes:
    return name + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton(address)


def _wire(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in name.split(".")) + b"\0"


def _forgeries(query: bytes) -> Iterator[bytes]:
    """Answers to a question for an A record that are not to be believed, and then the right one."""
    question = query[12 : query.index(b"\0", 12) + 5]
    name, kind, pointer = question[:-4], question[-4:], b"\xc0\x0c"
    right, wrong = query[:2], bytes((query[0] ^ 1, query[1]))

    def head(number: bytes, flags: int = 0x8180, questions: int = 1, answers: int = 1) -> bytes:
        return number + struct.pack("!5H", flags, questions, answers, 0, 0)

    yield head(wrong) + question + _a(pointer, "192.0.2.102")
    yield head(right) + _wire("evil.test") + kind + _a(pointer, "192.0.2.103")
    yield head(right, 0x0180) + question + _a(pointer, "192.0.2.104")  # no answer, but a question
    yield right + b"junk"
    yield b""
    yield head(wrong, 0x8380, answers=0) + question  # truncated
    yield head(right, questions=0) + _a(name, "192.0.2.105")
    foreign = _a(_wire("evil.test"), "192.0.2.106"), _a(_wire("www.some.test"), "192.0.2.107")
    yield head(right, answers=3) + question + foreign[0] + _a(pointer, "192.0.2.1") + foreign[1]


@pytest.fixture
def forger(resolv_conf: Callable[..., None]) -> Iterator[list[int]]:
    """A server on 127.0.0.1, and somebody on 127.0.0.2 who is faster; the ports from which it was asked."""
    resolv_conf("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    ports: list[int] = []

    def serve() -> None:
        while len(query := (received := server.recvfrom(512))[0]) > 12:
            peer = received[1]
            ports.append(peer[1])
            if query[query.index(b"\0", 12) + 2] == 28:  # AAAA: nothing
                server.sendto(query[:2] + struct.pack("!5H", 0x8180, 1, 0, 0, 0) + query[12:], peer)
                continue
            *forged, right = _forgeries(query)
            stranger.sendto(right.replace(socket.inet_aton("192.0.2.1"), socket.inet_aton("192.0.2.101")), peer)
            for answer in (*forged, right):
                server.sendto(answer, peer)

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
    ):
        server.bind(("127.0.0.1", 53))
        stranger.bind(("127.0.0.2", 53))
        thread = threading.Thread(target=serve)
        thread.start()
        yield ports
        stranger.sendto(b"", ("127.0.0.1", 53))
        thread.join()


async def test_forged_answers_are_not_believed(forger: list[int]) -> None:
    with lookup() as made:
        for _ in range(5):
            assert await find(made, "some.test") == ("192.0.2.1",)
            assert {key[1] for key in made._kept} == {"some.test"}
            made.forget()
    assert len(set(forger)) > 5  # a fresh port for each query, one of 28,000


# --- the cache ----------------------------------------------------------------------------------------------


#: The TTL of the records, the bound, the age of the answer, and how often was asked.
AGES = [
    (60, None, 0.0, 1),
    (60, None, 59.9, 1),
    (60, None, 60.1, 2),
    (60, 10.0, 9.9, 1),
    (60, 10.0, 10.1, 2),
    (5, 10.0, 4.9, 1),
    (5, 10.0, 5.1, 2),
    (60, 0, 0.0, 2),
    (0, None, 0.0, 2),
    (0, 10.0, 0.0, 2),
    (86400, None, 86000.0, 1),
]


async def test_how_long_an_answer_is_kept(dns: DnsServer, clock: SimpleNamespace) -> None:
    for ttl, bound, age, asked in AGES:
        dns.queries.clear()
        dns.add("some.test", "192.0.2.1", "2001:db8::1", ttl=ttl)
        with lookup(ttl=bound) as made:
            first = await find(made, "some.test")
            clock.now += age
            assert await find(made, "SOME.test") == first
        assert dns.queries == {("some.test", "A"): asked, ("some.test", "AAAA"): asked}, (ttl, bound, age)


@pytest.mark.parametrize(("ttls", "kept"), [((60, 600), 60), ((600, 60), 60)])
async def test_the_lowest_ttl_of_a_chain_counts(
    dns: DnsServer, clock: SimpleNamespace, ttls: tuple[int, int], kept: int
) -> None:
    dns.add("alias.test", cname="real.test", ttl=ttls[0])
    dns.add("real.test", "192.0.2.1", ttl=ttls[1])
    with lookup() as made:
        for age, asked in ((0, 1), (kept - 1, 1), (2, 2)):
            clock.now += age
            assert await find(made, "alias.test", family=socket.AF_INET) == ("192.0.2.1",)
            assert dns.queries["alias.test", "A"] == asked
    assert not dns.queries["real.test", "A"]


async def test_each_source_has_answers_of_its_own(far_dns: DnsServer, witness: Witness) -> None:
    with lookup(V4) as made:
        assert await find(made, "some.test", N1) == ("2001:db8::1", "192.0.2.1")
        far_dns.add("some.test", "192.0.2.2", ttl=60)
        assert await find(made, "some.test", N2) == await find(made, "some.test") == ("192.0.2.2",)
        assert await find(made, "some.test", N1) == ("2001:db8::1", "192.0.2.1")
    assert {nic for nic, _, _ in questions(witness)} == {"n0", "n1", "n2"}


async def test_the_least_recently_used_answer_goes_first(dns: DnsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert aiobind_dns.MAX_CACHED == 1000
    monkeypatch.setattr(aiobind_dns, "MAX_CACHED", 3)
    names = ["a.test", "b.test", "c.test", "d.test"]
    for name in names:
        dns.add(name, "192.0.2.1", ttl=60)
    with lookup() as made:
        for name in ["a.test", "b.test", "c.test", "a.test", "d.test"]:
            await find(made, name)
        before = dns.queries.copy()
        for name in ["a.test", "c.test", "d.test"]:
            await find(made, name)
        assert dns.queries == before
        await find(made, "b.test")
    assert dns.queries["b.test", "A"] == 2


async def test_a_failure_is_not_kept(dns: DnsServer) -> None:
    with lookup() as made:
        for record in ({"rcode": NXDOMAIN}, {"rcode": SERVFAIL}, {}):
            dns.add("some.test", ttl=60, **record)
            with pytest.raises(socket.gaierror):
                await find(made, "some.test.")
        dns.add("some.test", "192.0.2.1", ttl=60)
        assert await find(made, "some.test.") == ("192.0.2.1",)


async def test_an_answer_can_be_forgotten(dns: DnsServer) -> None:
    for name in ("a.test", "b.test"):
        dns.add(name, "192.0.2.1", ttl=60)
    asked = {"a.test": 0, "b.test": 0}
    with lookup() as made:
        for forgotten in ({"a.test", "b.test"}, {"a.test"}, {"b.test"}, set(), {"a.test", "b.test"}):
            if len(forgotten) == 1:
                made.forget(*map(str.upper, forgotten))
            elif forgotten:
                made.forget()
            for name, times in asked.items():
                asked[name] = times + (name in forgotten)
                await find(made, name)
                assert dns.queries[name, "A"] == asked[name]


@pytest.mark.parametrize("late", [{}, {"AAAA": inf}], ids=["both", "a late family"])
async def test_what_was_forgotten_does_not_come_back(dns: DnsServer, late: dict[str, float]) -> None:
    dns.add("held.test", "192.0.2.1", "2001:db8::1", delay=late or inf, ttl=60)
    with lookup() as made:
        (task,) = start(made, "held.test")
        if late:
            assert await task == ("192.0.2.1",)
        else:
            await until(lambda: dns.queries.total() == 2)
        made.forget("held.test")
        dns.release("held.test")
        await task
        await until(lambda: not made._tasks)
        assert not made._kept
        await find(made, "held.test")
    assert dns.queries["held.test", "A"] == 2


async def test_what_was_forgotten_leaves_its_successor_alone(dns: DnsServer) -> None:
    dns.add("some.test", "192.0.2.1", delay=0.1, ttl=60)
    with lookup() as made:
        (first,) = start(made, "some.test")
        await until(lambda: dns.queries.total() == 2)
        made.forget("some.test")
        dns.add("some.test", "192.0.2.1", delay=1, ttl=60)
        (second,) = start(made, "some.test")
        await until(lambda: dns.queries.total() == 4)
        assert await first == ("192.0.2.1",)
        dns.add("some.test", "192.0.2.2", ttl=60)
        assert await find(made, "some.test") == await second == ("192.0.2.2",)
    assert dns.queries["some.test", "A"] == 2


# --- one question for all, and who leaves, leaves at once ---------------------------------------------------


async def test_the_same_name_is_asked_for_once(dns: DnsServer) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    with lookup() as made:
        tasks = start(made, *["held.test"] * 50)
        await until(lambda: dns.queries.total() == 2)
        dns.release("held.test")
        assert set(await asyncio.gather(*tasks)) == {("192.0.2.1",)}
    assert dns.queries == {("held.test", "A"): 1, ("held.test", "AAAA"): 1}


async def test_a_failure_is_told_to_all(dns: DnsServer) -> None:
    dns.add("held.test", delay=inf, rcode=SERVFAIL)
    with lookup() as made:
        tasks = start(made, *["held.test"] * 10)
        await until(lambda: dns.queries.total() == 2)
        dns.release("held.test")
        errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(error) for error in errors} == {socket.gaierror}
    assert len(set(map(id, errors))) == 10  # each has a traceback of its own


async def test_a_cancelled_caller_leaves_the_others(dns: DnsServer) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    with lookup() as made:
        first, second = start(made, "held.test", "held.test")
        await until(lambda: dns.queries.total() == 2)
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        dns.release("held.test")
        assert await second == ("192.0.2.1",)
    assert dns.queries["held.test", "A"] == 1


async def test_a_look_up_ends_when_nobody_waits_any_more(dns: DnsServer) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    with lookup() as made:
        tasks = start(made, "held.test", "held.test")
        await until(lambda: dns.queries.total() == 2)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: not made._tasks and not questions_under_way())
        (late,) = start(made, "held.test")
        await until(lambda: dns.queries.total() == 4)
        made.forget()  # and when nobody can join it
        late.cancel()
        await until(lambda: not made._tasks and not questions_under_way())


async def test_cancelled_and_asked_again_in_the_same_moment(dns: DnsServer) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    with lookup() as made:
        (task,) = start(made, "held.test")
        await until(lambda: dns.queries.total() == 2)
        task.cancel()
        (late,) = start(made, "held.test")  # no turn of the loop lies between the two
        await asyncio.wait([task])
        dns.release("held.test")
        assert await late == ("192.0.2.1",)


@pytest.mark.parametrize("truncated", [False, True], ids=["udp", "tcp"])
async def test_a_cancellation_at_any_step_leaves_nothing(dns: DnsServer, truncated: bool) -> None:
    """What it would leave, the fixtures find."""
    dns.add("some.test", "192.0.2.1", "2001:db8::1", ttl=60, truncated=truncated)
    for steps in range(25):
        with lookup() as made:
            (task,) = start(made, "some.test")
            for _ in range(steps):
                await asyncio.sleep(0 if steps < 12 else 0.0003)
            task.cancel()
            await asyncio.wait([task])
            assert await find(made, "some.test") == ("2001:db8::1", "192.0.2.1")


async def test_close_ends_what_is_under_way(dns: DnsServer) -> None:
    dns.add("held.test", "192.0.2.1", delay=inf)
    with lookup() as made:
        tasks = start(made, "held.test", "held.test")
        await until(lambda: dns.queries.total() == 2)
        made.close()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, socket.gaierror)
            assert "closed" in str(error)
        with pytest.raises(RuntimeError, match="closed"):
            await find(made, "held.test")
        await until(lambda: not made._tasks and not questions_under_way())


async def test_close_ends_the_wait_for_a_late_family(dns: DnsServer) -> None:
    dns.add("half.test", "192.0.2.1", delay={"AAAA": inf}, ttl=60)
    with lookup() as made:
        assert await find(made, "half.test") == ("192.0.2.1",)
        assert made._tasks
        assert questions_under_way()
        made.close()
        await until(lambda: not made._tasks and not questions_under_way())


@pytest.mark.parametrize(("ttl", "bound"), [(0, None), (60, 0)])
async def test_nobody_waits_for_a_late_family_that_is_not_to_be_kept(
    dns: DnsServer, ttl: int, bound: float | None
) -> None:
    dns.add("half.test", "192.0.2.1", delay={"AAAA": inf}, ttl=ttl)
    with lookup(ttl=bound) as made:
        assert await find(made, "half.test") == ("192.0.2.1",)
        await until(lambda: not made._tasks and not questions_under_way())


async def test_a_late_family_that_fails_changes_nothing(dns: DnsServer, clock: SimpleNamespace) -> None:
    dns.add("half.test", "192.0.2.1", delay={"AAAA": inf}, rcode={"AAAA": SERVFAIL}, ttl=60)
    with lookup() as made:
        assert await find(made, "half.test") == ("192.0.2.1",)
        dns.release("half.test")
        await until(lambda: not made._tasks)
        clock.now += 59
        assert await find(made, "half.test") == ("192.0.2.1",)
    assert dns.queries["half.test", "A"] == 1


@pytest.mark.parametrize("rcode", [0, SERVFAIL])
async def test_a_late_family_makes_no_answer_younger(dns: DnsServer, clock: SimpleNamespace, rcode: int) -> None:
    dns.add("half.test", "192.0.2.1", "2001:db8::1", delay={"AAAA": inf}, rcode={"AAAA": rcode}, ttl=5)
    with lookup() as made:
        assert await find(made, "half.test") == ("192.0.2.1",)
        clock.now += 4
        dns.release("half.test")
        await until(lambda: not made._tasks)
        clock.now += 2
        await find(made, "half.test")
    assert dns.queries["half.test", "A"] == 2


# --- through the doors --------------------------------------------------------------------------------------


@asynccontextmanager
async def far_server(lab: Lab) -> AsyncIterator[None]:
    """Answer each request on port 80 of every far address with the peer that the far side sees."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            body = writer.get_extra_info("peername")[0]
            writer.write(f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        writer.close()

    with lab.far:
        sockets = [socket.create_server(("", 80), family=family) for family in (socket.AF_INET, socket.AF_INET6)]
    servers = [await asyncio.start_server(answer, sock=sock) for sock in sockets]
    try:
        yield
    finally:
        for server in servers:
            server.close()


def came_by(witness: Witness) -> set[str]:
    """Return the NICs by which questions and connections came; how a connection ends is another matter."""
    return {packet.nic for packet in witness.packets() if packet.dport == 53 or packet.syn}


@pytest.mark.usefixtures("privilege")
@pytest.mark.parametrize("dns", ["source", (V4,)], ids=str)
async def test_a_connector_asks_and_connects_by_its_source(
    lab: Lab, far_dns: DnsServer, witness: Witness, resolv_conf: Callable[..., None], dns: str | tuple[str, ...]
) -> None:
    resolv_conf(f"nameserver {V4}\n" if dns == "source" else "", hosts=HOSTS)
    far_dns.add("target.test", V4, V6, ttl=60)
    far_dns.add("nic2.test", "198.18.2.2", ttl=60)
    async with far_server(lab), aiobind.Connector("if!n1", "if!n2", "ifhost!n2!nic2.test", dns=dns) as connector:
        for source, nic in [("if!n1", "n1"), ("if!n2", "n2"), ("ifhost!n2!nic2.test", "n2"), ("if!n1", "n1")]:
            sock = await connector.connect("target.test", 80, source=source)
            assert aiobind.bound_source(sock).interface == nic
            sock.close()
            assert came_by(witness) == {nic}
        # Its own name is asked for without a source, and the target's from the address that it has.
        witness.packets()
        sock = await connector.connect("target.test", 80, source="host!nic2.test")
        assert sock.getsockname()[0] == "198.18.2.2"
        sock.close()
        asked = {packet.source for packet in witness.packets() if packet.dport == 53}
        assert asked == {"198.18.0.2", "198.18.2.2"}
    assert far_dns.queries["target.test", "A"] == 4  # one for each source


async def test_the_systems_resolver_is_asked_no_more(
    lab: Lab, far_dns: DnsServer, resolv_conf: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the system was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    resolv_conf(f"nameserver {V4}\n", hosts=HOSTS)
    far_dns.add("target.test", V4, ttl=60)
    async with far_server(lab), aiobind.Connector("if!n1", dns="source") as connector:
        (await connector.connect("target.test", 80)).close()


async def test_a_source_that_cannot_ask_lets_the_next_one_try(lab: Lab, far_dns: DnsServer, witness: Witness) -> None:
    far_dns.add("target.test", V4, ttl=60)
    lab.near.ip("link set n1 down")
    started = time.monotonic()
    async with far_server(lab), aiobind.Connector("if!n1", "if!n9", "if!n2", dns=[V4]) as connector:
        for _ in range(3):
            sock = await connector.connect("target.test", 80)
            assert aiobind.bound_source(sock).interface == "n2"
            sock.close()
        with pytest.raises(aiobind.BindError, match="no DNS server can be asked") as caught:
            await connector.connect("other.test", 80, source="if!n1")
    assert caught.value.errno == errno.ENETUNREACH
    assert str(caught.value.source) == "if!n1"
    assert caught.value.destination == "other.test:80"
    assert came_by(witness) == {"n2"}
    assert time.monotonic() - started < 5


async def test_a_source_that_no_server_answers_lets_the_next_one_try(
    lab: Lab, far_dns: DnsServer, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, V4, timeout=0.2, attempts=2)
    lab.far.ip("route add blackhole 198.18.1.2/32")
    far_dns.add("target.test", V4, ttl=60)
    async with far_server(lab), aiobind.Connector("if!n1", "if!n2", dns="source") as connector:
        with await connector.connect("target.test", 80) as sock:
            assert aiobind.bound_source(sock).interface == "n2"
        n1, n2 = connector.stats()
        assert n1.suspended_until is not None  # another one has been answered, so it is not the server that is down
        assert (n1.failures, n2.suspended_until, n2.failures) == ({"EAI": 1}, None, {})
        with pytest.raises(aiobind.ResolveError, match=f"no DNS server has answered: {V4}: no answer") as caught:
            await connector.connect("target.test", 80, source="if!n1")
    assert str(caught.value.source) == "if!n1"
    assert caught.value.errno == socket.EAI_AGAIN
    assert came_by(witness) == {"n1", "n2"}


async def test_a_source_whose_own_name_is_unknown_lets_the_next_one_try(lab: Lab, far_dns: DnsServer) -> None:
    far_dns.add("target.test", V4, ttl=60)
    for nameless in ("host!nowhere.test", "ifhost!n1!nowhere.test"):
        async with far_server(lab), aiobind.Connector(nameless, "if!n2", dns=[V4]) as connector:
            with await connector.connect("target.test", 80) as sock:
                assert aiobind.bound_source(sock).interface == "n2"
            with pytest.raises(aiobind.ResolveError, match=r"the source's name 'nowhere\.test'") as caught:
                await connector.connect("target.test", 80, source=nameless)
        assert str(caught.value.source) == nameless
        assert caught.value.errno == socket.EAI_NONAME


async def test_a_name_that_is_nowhere_is_no_fault_of_the_source(lab: Lab, far_dns: DnsServer) -> None:
    async with aiobind.Connector("if!n1", "if!n2", dns=[V4]) as connector:
        with pytest.raises(aiobind.ResolveError, match="there is no such name") as caught:
            await connector.connect("nowhere.test.", 80)
    assert caught.value.errno == socket.EAI_NONAME
    assert caught.value.source is None
    assert sum(count for (name, _), count in far_dns.queries.items() if name == "nowhere.test") == 2


async def test_a_connector_that_is_closed_leaves_nothing(far_dns: DnsServer) -> None:
    far_dns.add("held.test", V4, delay=inf)
    connector = aiobind.Connector("if!n1", dns=[V4])
    connecting = asyncio.ensure_future(connector.connect("held.test", 80))
    await until(lambda: far_dns.queries.total() == 2)
    await connector.aclose()
    with pytest.raises(aiobind.ResolveError, match="closed during the look-up"):
        await connecting


@pytest.mark.usefixtures("privilege")
@pytest.mark.parametrize("dns", ["source", (V4,)], ids=str)
async def test_aiohttp_asks_by_the_source_of_the_request(
    lab: Lab, far_dns: DnsServer, witness: Witness, resolv_conf: Callable[..., None], dns: str | tuple[str, ...]
) -> None:
    resolv_conf(f"nameserver {V4}\n" if dns == "source" else "", hosts=HOSTS)
    far_dns.add("target.test", V4, ttl=60)
    connector = BoundTCPConnector("if!n1", "if!n2", dns=dns)
    async with far_server(lab), aiohttp.ClientSession(connector=connector) as session:

        async def get(source: str) -> str:
            with connector.use_source(source):
                async with session.get("http://target.test/") as response:
                    return await response.text()

        for source, nic, address in [("if!n1", "n1", "198.18.1.2"), ("if!n2", "n2", "198.18.2.2")] * 2:
            assert await get(source) == address
            assert came_by(witness) == {nic}
        assert far_dns.queries["target.test", "A"] == 2  # one for each source
        connector.clear_dns_cache("target.test", 80)
        assert await get("if!n1") == "198.18.1.2"
        assert far_dns.queries["target.test", "A"] == 3
        connector.clear_dns_cache()
        assert await get("if!n1") == "198.18.1.2"
        assert far_dns.queries["target.test", "A"] == 4
        witness.packets()
        lab.near.ip("link set n1 down")
        connector.clear_dns_cache()
        with pytest.raises(aiohttp.ClientConnectorError, match="n1 is down"):
            await get("if!n1")
    assert not came_by(witness)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, 1),
        ({"use_dns_cache": False}, 3),
        ({"ttl_dns_cache": 0}, 3),
        ({"ttl_dns_cache": None}, 1),
    ],
    ids=str,
)
async def test_aiohttps_cache_options_are_honoured(
    lab: Lab, far_dns: DnsServer, options: dict[str, Any], asked: int
) -> None:
    far_dns.add("target.test", V4, ttl=60)
    connector = BoundTCPConnector("if!n1", dns=[V4], **options)
    async with far_server(lab), aiohttp.ClientSession(connector=connector) as session:
        for _ in range(3):
            async with session.get("http://target.test/") as response:
                assert await response.text() == "198.18.1.2"
    assert far_dns.queries["target.test", "A"] == asked


@pytest.mark.parametrize("connector", [aiobind.Connector, BoundTCPConnector])
async def test_what_dns_may_be(connector: Any) -> None:
    for wrong in ((), ("dns.test",), "192.0.2.53", "sources", "", None, 5, b"\1\1\1\1"):
        with pytest.raises(ValueError, match="dns"):
            connector("if!n1", dns=wrong)
