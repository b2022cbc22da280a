"""Where packets really leave, judged from the far side of the NICs, with and without capabilities."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

import aiobind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiobind.lab import Lab, Witness

pytestmark = pytest.mark.anyio

V4, V6 = "203.0.113.80", "2001:db8:ffff::80"


@pytest.fixture(params=["root", "no capabilities"], autouse=True)
def privilege(request: pytest.FixtureRequest) -> None:
    if request.param == "no capabilities":
        request.getfixturevalue("no_capabilities")


@asynccontextmanager
async def far_server(lab: Lab) -> AsyncIterator[None]:
    """Answer each connection on port 80 of every far address with the peer that the far side sees."""

    class Answer(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.write(transport.get_extra_info("peername")[0].encode())
            transport.close()
            open_here.add(transport)

    open_here: set[Any] = set()
    loop = asyncio.get_running_loop()

    with lab.far:
        sockets = [socket.create_server(("", 80), family=family) for family in (socket.AF_INET, socket.AF_INET6)]
    servers = [await loop.create_server(Answer, sock=sock) for sock in sockets]
    try:
        yield
    finally:
        for transport in open_here:
            transport.abort()  # a link that is down lets nothing end by itself
        for server in servers:
            server.close()


async def ask(source: str, host: str, **options: object) -> tuple[str, aiobind.BoundSource]:
    """Return the peer that the far side sees, and what aiobind says of the connection."""
    async with aiobind.Connector(source) as connector, asyncio.timeout(10):
        reader, writer = await connector.open_connection(host, 80, **options)
        bound = aiobind.bound_source(writer)
        seen = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
    return seen, bound


def syns(witness: Witness) -> Counter[tuple[str, str]]:
    """Count connections, not SYNs: the kernel repeats one that gets no answer in time."""
    begun = {(packet.nic, packet.source, packet.sport) for packet in witness.packets() if packet.syn}
    return Counter((nic, source) for nic, source, _ in begun)


@pytest.mark.parametrize(
    ("source", "target", "nic", "address", "interface"),
    [
        ("if!n0", V4, "n0", "198.18.0.2", "n0"),
        ("if!n1", V4, "n1", "198.18.1.2", "n1"),
        ("if!n2", V6, "n2", "2001:db8:2::2", "n2"),
        ("if!n1", "198.18.1.1", "n1", "198.18.1.2", "n1"),
        ("ifhost!n1!198.18.1.2", V4, "n1", "198.18.1.2", "n1"),
        ("ifhost!n2!2001:db8:2::2", V6, "n2", "2001:db8:2::2", "n2"),
        ("ifhost!n2!nic2.test", V6, "n2", "2001:db8:2::2", "n2"),
        ("ifhost!n2!nic2.test", V4, "n2", "198.18.2.2", "n2"),
        # An address is only an address: the routing table chooses the interface, and bound_source does not promise it.
        ("198.18.1.2", V4, "n0", "198.18.1.2", None),
        ("2001:db8:2::2", V6, "n0", "2001:db8:2::2", None),
        ("host!nic2.test", V4, "n0", "198.18.2.2", None),
        ("host!nic2.test", "198.18.2.1", "n2", "198.18.2.2", None),
    ],
)
async def test_source_and_egress(
    lab: Lab,
    witness: Witness,
    resolv_conf: Callable[..., None],
    source: str,
    target: str,
    nic: str,
    address: str,
    interface: str | None,
) -> None:
    resolv_conf("", hosts="198.18.2.2 nic2.test\n2001:db8:2::2 nic2.test\n")
    async with far_server(lab):
        seen, bound = await ask(source, target)
    assert seen == address
    assert bound[1:3] == (interface, address)
    assert syns(witness) == {(nic, address): 1}


@pytest.mark.parametrize("name", ["n0", "n1", "n2"])
async def test_link_local(lab: Lab, witness: Witness, name: str) -> None:
    nic = lab.nic(name)
    async with far_server(lab):
        for source in (f"if!{name}", f"{nic.link_local}%{name}", f"ifhost!{name}!{nic.link_local}"):
            seen, bound = await ask(source, f"{nic.gateway_link_local}%{name}")
            assert seen.partition("%")[0] == nic.link_local
            assert bound.interface == name
    assert syns(witness) == {(name, nic.link_local): 3}


@pytest.mark.parametrize(
    ("prefix", "target"), [("2001:db8:77::/64", V6), ("198.51.100.0/28", V4)], ids=["IPv6", "IPv4"]
)
async def test_a_prefix_gives_each_connection_an_address_of_its_own(
    lab: Lab, witness: Witness, prefix: str, target: str
) -> None:
    lab.near.ip(f"route add local {prefix} dev lo")
    gateway = lab.nics[0].v6 if ":" in prefix else lab.nics[0].v4
    lab.far.ip(f"route add {prefix} via {gateway}")
    async with far_server(lab):
        seen = [(await ask(f"net!{prefix}", target))[0] for _ in range(20)]
    network = aiobind.Prefix(prefix).network
    assert all(aiobind.Address(address).ip in network for address in seen)
    assert len(set(seen)) > 5
    assert sum(syns(witness).values()) == 20


async def test_a_name_with_two_families_goes_by_the_one_that_the_interface_has(
    lab: Lab, witness: Witness, resolv_conf: Callable[..., None]
) -> None:
    resolv_conf("", hosts=f"{V6} both.test\n{V4} both.test\n")
    lab.near.ip("addr flush dev n1 scope global", "addr add 198.18.1.2/24 dev n1", "route add default dev n1 metric 7")
    started = time.monotonic()
    async with far_server(lab):
        seen, _ = await ask("if!n1", "both.test")
    assert seen == "198.18.1.2"
    assert syns(witness) == {("n1", "198.18.1.2"): 1}
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(("family", "seen"), [(socket.AF_INET, "198.18.1.2"), (socket.AF_INET6, "2001:db8:1::2")])
async def test_family_is_honoured(lab: Lab, resolv_conf: Callable[..., None], family: int, seen: str) -> None:
    resolv_conf("", hosts=f"{V6} both.test\n{V4} both.test\n")
    async with far_server(lab):
        assert (await ask("if!n1", "both.test", family=family))[0] == seen


async def test_a_second_address_answers_when_the_first_is_a_black_hole(
    lab: Lab, witness: Witness, resolv_conf: Callable[..., None]
) -> None:
    resolv_conf("", hosts=f"2001:db8:1::dead both.test\n{V4} both.test\n")  # nobody has the first one
    async with far_server(lab):
        seen, _ = await ask("if!n1", "both.test")
    assert seen == "198.18.1.2"
    assert syns(witness) == {("n1", "198.18.1.2"): 1}


#: What is done to the lab, the source, the target, and how the connection fails: before any packet to the target.
REFUSED = [
    ("", "if!n9", V4, errno.ENODEV, "no interface named 'n9' (have: lo, n0, n1, n2)"),
    ("", "if!N1", V4, errno.ENODEV, "did you mean 'n1'?"),
    ("link del n1", "if!n1", V4, errno.ENODEV, "no interface named 'n1'"),
    ("addr flush dev n1", "if!n1", V4, errno.EADDRNOTAVAIL, "n1 has no IPv4 address"),
    ("addr flush dev n1 scope global", "if!n1", V6, errno.EADDRNOTAVAIL, "n1 has only link-local IPv6 addresses"),
    (
        "addr del 2001:db8:1::2/64 dev n1; addr flush dev n1 scope link",
        "if!n1",
        V6,
        errno.EADDRNOTAVAIL,
        "n1 has no IPv6 address",
    ),
    ("", "ifhost!n1!198.18.2.2", V4, errno.EADDRNOTAVAIL, "198.18.2.2 is not an address of n1 (it has 198.18.1.2,"),
    ("", "ifhost!n9!198.18.1.2", V4, errno.ENODEV, "no interface named 'n9'"),
    ("", "ifhost!n1!nowhere.test", V4, socket.EAI_AGAIN, "the source's name 'nowhere.test' cannot be resolved"),
    ("", "198.18.99.2", V4, errno.EADDRNOTAVAIL, "198.18.99.2 is not usable on this host"),
    ("", "198.18.1.2", V6, errno.EADDRNOTAVAIL, "the source has no IPv6 address (it has 198.18.1.2)"),
    ("", "2001:db8:1::2", V4, errno.EADDRNOTAVAIL, "the source has no IPv4 address"),
    ("", "host!nowhere.test", V4, socket.EAI_AGAIN, "the source's name 'nowhere.test' cannot be resolved"),
    ("", "if!n1", "127.0.0.1", errno.ENETUNREACH, "a loopback address cannot be reached through n1"),
    ("", "if!n1", "::1", errno.ENETUNREACH, "a loopback address cannot be reached through n1"),
    ("", "if!lo", V4, errno.ENETUNREACH, "only this host itself can be reached through lo"),
    ("", "if!lo", V6, errno.ENETUNREACH, "only this host itself can be reached through lo"),
    ("", "::1", V6, errno.ENETUNREACH, "from the loopback address ::1 only this host itself can be reached"),
    ("", "127.0.0.1", V4, errno.ENETUNREACH, "from the loopback address 127.0.0.1 only this host itself"),
    ("", "if!n1", "fe80::1%n2", errno.ENETUNREACH, "lies in the zone of another interface than n1"),
    ("", "if!n1", "198.18.2.2", errno.ENETUNREACH, "198.18.2.2 is this host's own address, but not one of n1"),
    ("", "ifhost!n1!2001:db8:1::2", "2001:db8:2::2", errno.ENETUNREACH, "this host's own address"),
    ("link set n1 down", "if!n1", V4, errno.ENETUNREACH, "n1 is down"),
    ("link set n1 down", "if!n1", V6, errno.ENETUNREACH, "n1 is down"),
    ("far link set f1 down", "if!n1", V4, errno.EHOSTUNREACH, "n1 has no carrier"),
    ("link add b0 type bridge", "if!b0", V4, errno.ENETUNREACH, "b0 is down"),
]


@pytest.mark.parametrize(
    ("change", "source", "target", "number", "words"), REFUSED, ids=[f"{c} {s} {t}" for c, s, t, *_ in REFUSED]
)
async def test_refused_before_any_packet(
    lab: Lab,
    witness: Witness,
    resolv_conf: Callable[..., None],
    change: str,
    source: str,
    target: str,
    number: int,
    words: str,
) -> None:
    resolv_conf("", hosts="127.0.0.1 localhost\n")
    if change.startswith("far "):
        lab.far.ip(change.removeprefix("far "))
    elif change:
        lab.near.ip(*change.split("; "))
    started = time.monotonic()
    async with far_server(lab), aiobind.Connector(source) as connector:
        with pytest.raises(aiobind.AiobindError) as caught:
            await asyncio.wait_for(connector.connect(target, 80), 10)
    assert caught.value.errno == number
    assert time.monotonic() - started < 2  # at once; the kernel's own answer would take 3 s, or 127 s
    assert words in str(caught.value)
    assert str(caught.value.source) == source
    assert not [packet for packet in witness.packets() if packet.destination == target]


async def test_a_bridge_port_names_its_bridge(lab: Lab) -> None:
    lab.near.ip("link add br0 type bridge", "addr flush dev n1", "link set n1 master br0")
    with pytest.raises(aiobind.BindError, match=r"n1 is a port of br0, .*: use if!br0") as caught:
        await aiobind.connect(V4, 80, source="if!n1")
    assert caught.value.errno == errno.EADDRNOTAVAIL


async def test_addresses_of_a_lesser_kind_are_bound_explicitly(lab: Lab, witness: Witness) -> None:
    """The kernel alone would take the other NIC's address here."""
    lab.near.ip(
        "addr change 2001:db8:1::2/64 dev n1 preferred_lft 0",
        "addr del 198.18.1.2/24 dev n1",
        "addr add 198.18.1.2/24 dev n1 scope link",
        "route replace default via 198.18.1.1 dev n1 metric 1001",
    )
    async with far_server(lab):
        assert (await ask("if!n1", V6))[0] == "2001:db8:1::2"
        assert (await ask("if!n1", V4))[0] == "198.18.1.2"
    assert {nic for nic, _ in syns(witness)} == {"n1"}


async def test_a_route_cannot_name_the_address_of_another_interface(lab: Lab, witness: Witness) -> None:
    """The kernel alone obeys the route's hint, even for a device-bound socket."""
    lab.near.ip("route replace default via 198.18.1.1 dev n1 metric 1001 src 198.18.2.2")
    async with far_server(lab):
        assert (await ask("if!n1", V4))[0] == "198.18.1.2"
    assert syns(witness) == {("n1", "198.18.1.2"): 1}


async def test_a_route_may_choose_among_the_addresses_of_the_interface(lab: Lab, witness: Witness) -> None:
    lab.near.ip(
        "addr add 198.18.1.66/24 dev n1",
        "addr add 2001:db8:1::66/64 dev n1 nodad",
        "route replace default via 198.18.1.1 dev n1 metric 1001 src 198.18.1.66",
        "route replace default via 2001:db8:1::1 dev n1 metric 1001 src 2001:db8:1::66",
    )
    async with far_server(lab):
        assert (await ask("if!n1", V4))[0] == "198.18.1.66"
        assert (await ask("if!n1", V6))[0] == "2001:db8:1::66"
    assert {nic for nic, _ in syns(witness)} == {"n1"}


async def test_addresses_that_have_just_come_and_gone(lab: Lab) -> None:
    """No turn of the loop lies between the change and the connect, so nobody has read the news yet."""
    async with far_server(lab), aiobind.Connector("if!n1") as connector:
        (await connector.connect(V4, 80)).close()
        lab.near.ip("addr flush dev n1")
        # The kernel borrows another NIC's address for the SYN, and nothing would ever answer it.
        with pytest.raises(aiobind.BindError, match="n1 has no IPv4 address"):
            await asyncio.wait_for(connector.connect(V4, 80), 10)
        lab.near.ip("addr add 198.18.1.77/24 dev n1", "route add default via 198.18.1.1 dev n1 metric 1001")
        sock = await connector.connect(V4, 80)
        assert sock.getsockname()[0] == "198.18.1.77"
        sock.close()


async def test_a_renamed_and_a_recreated_interface(lab: Lab, witness: Witness) -> None:
    async with far_server(lab), aiobind.Connector("if!n1", "if!wan") as connector:
        (await connector.connect(V4, 80, source="if!n1")).close()
        lab.near.ip("link set n1 down", "link set n1 name wan", "link set wan up")
        with pytest.raises(aiobind.BindError) as caught:
            await connector.connect(V4, 80, source="if!n1")
        assert caught.value.errno == errno.ENODEV
        lab.near.ip("route add default via 198.18.1.1 dev wan metric 1001")
        (await connector.connect(V4, 80, source="if!wan")).close()
        lab.near.ip("link set n2 down", "link set n2 name n1", "link set n1 up")
        lab.near.ip("route add default via 198.18.2.1 dev n1 metric 1002")
        (await connector.connect(V4, 80, source="if!n1")).close()
    assert syns(witness) == {("n1", "198.18.1.2"): 2, ("n2", "198.18.2.2"): 1}


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ("link set n1 down", errno.ENETUNREACH),
        ("link del n1", errno.ENETUNREACH),  # it goes down first
        ("addr flush dev n1", errno.EADDRNOTAVAIL),
    ],
)
async def test_an_attempt_ends_with_its_link(lab: Lab, change: str, number: int) -> None:
    """The kernel itself would say nothing for two minutes."""
    black_hole = "198.18.1.99"  # on the link, and nobody's
    lab.near.ip(f"neigh add {black_hole} lladdr 02:00:00:00:00:99 dev n1")
    async with aiobind.Connector("if!n1") as connector:
        attempt = asyncio.create_task(connector.connect(black_hole, 80))
        await asyncio.sleep(0.1)
        assert not attempt.done()
        lab.near.ip(change)
        with pytest.raises(aiobind.BindError, match="since the attempt began") as caught:
            await asyncio.wait_for(attempt, 10)
    assert caught.value.errno == number


async def test_a_link_that_goes_in_the_moment_of_the_connect(lab: Lab) -> None:
    """The news and the answer of the target come in the same turn of the loop."""
    async with far_server(lab), aiobind.Connector("if!n1", "if!n2") as connector:
        (await connector.connect(V4, 80, source="if!n2")).close()
        attempt = asyncio.create_task(connector.connect(V4, 80))
        for _ in range(3):
            await asyncio.sleep(0)
        lab.near.ip("link set n1 down")  # takes longer than the handshake
        with await asyncio.wait_for(attempt, 10) as sock:
            name = aiobind.bound_source(sock).interface
            if name == "n2":
                assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"198.18.2.2"
            else:  # it was established before: then it is whole
                sock.send(b"x")


async def test_an_attempt_ends_with_its_link_also_when_the_connector_is_closed(lab: Lab) -> None:
    lab.near.ip("neigh add 198.18.1.99 lladdr 02:00:00:00:00:99 dev n1")
    connector = aiobind.Connector("if!n1")
    attempt = asyncio.create_task(connector.connect("198.18.1.99", 80))
    await asyncio.sleep(0.05)
    await connector.aclose()
    gc.collect()
    lab.near.ip("link set n1 down")
    with pytest.raises(aiobind.BindError, match="n1 is down"):
        await asyncio.wait_for(attempt, 10)


async def test_an_attempt_survives_a_change_of_name(lab: Lab) -> None:
    """The socket follows its interface."""
    lab.near.ip("neigh add 198.18.1.99 lladdr 02:00:00:00:00:99 dev n1")
    async with aiobind.Connector("if!n1") as connector:
        attempt = asyncio.create_task(connector.connect("198.18.1.99", 80))
        await asyncio.sleep(0.05)
        lab.near.ip("link set n1 name wan")
        await asyncio.sleep(0.05)
        assert not attempt.done()
        lab.near.ip("link set wan down")
        with pytest.raises(aiobind.BindError, match="wan is down"):
            await asyncio.wait_for(attempt, 10)
