"""UDP endpoints: every datagram leaves from the source, or not at all; judged from the far side of the NICs."""

from __future__ import annotations

import asyncio
import errno
import gc
import re
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from dns_server import DnsServer

import aiobind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aiobind.lab import Lab, Witness

pytestmark = pytest.mark.anyio

V4, V6, PORT = "203.0.113.80", "2001:db8:ffff::80", 4000


class Client(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.heard: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.heard.put_nowait(data)

    def error_received(self, exc: Exception) -> None:
        self.heard.put_nowait(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)

    async def hears(self) -> bytes:
        async with asyncio.timeout(10):
            heard = await self.heard.get()
        if isinstance(heard, Exception):
            raise heard
        return heard


class Server(asyncio.DatagramProtocol):
    """Tell each client who it is."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(addr[0].partition("%")[0].encode(), addr)


@asynccontextmanager
async def far_server(lab: Lab, *more: str) -> AsyncIterator[None]:
    """Answer at the targets, from the address that was asked."""
    transports: list[Any] = []
    with lab.far:
        for host in (V4, V6, *more):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_DGRAM)
            scope = socket.if_nametoindex(host.partition("%")[2]) if "%" in host else 0
            sock.bind((host.partition("%")[0], PORT, 0, scope) if ":" in host else (host, PORT))
            sock.setblocking(False)
            transports.append(sock)
    transports = [
        (await asyncio.get_running_loop().create_datagram_endpoint(Server, sock=sock))[0] for sock in transports
    ]
    try:
        yield
    finally:
        for transport in transports:
            transport.close()
        await asyncio.sleep(0)


def seen(witness: Witness, port: int = PORT) -> list[tuple[str, str]]:
    return [(packet.nic, packet.source) for packet in witness.packets() if packet.dport == port]


def counts(connector: aiobind.Connector) -> list[int]:
    return [figures.connections for figures in connector.stats()]


async def closed(connector: aiobind.Connector, transport: asyncio.DatagramTransport) -> None:
    transport.close()
    await none_left(connector)
    with pytest.raises(LookupError, match="closed"):
        aiobind.bound_source(transport)


async def none_left(connector: aiobind.Connector) -> None:
    async with asyncio.timeout(10):
        while any(counts(connector)):
            gc.collect()
            await asyncio.sleep(0.001)


# ── which source ──

#: The source; whom it is connected to, or whom it sends to; by which NIC and from which address; what it is pinned to.
SOURCES = [
    ("if!n1", V4, "n1", "198.18.1.2", "n1"),
    ("if!n1", V6, "n1", "2001:db8:1::2", "n1"),
    ("ifhost!n2!198.18.2.2", V4, "n2", "198.18.2.2", "n2"),
    ("ifhost!n2!2001:db8:2::2", V6, "n2", "2001:db8:2::2", "n2"),
    # An address is only an address: the routing table chooses the interface.
    ("198.18.1.2", V4, "n0", "198.18.1.2", None),
    ("2001:db8:2::2", V6, "n0", "2001:db8:2::2", None),
    ("host!nic2.test", V4, "n0", "198.18.2.2", None),
    ("net!198.51.100.7/32", V4, "n0", "198.51.100.7", None),
]


@pytest.mark.parametrize(("source", "target", "nic", "address", "interface"), SOURCES)
async def test_source_and_egress(
    lab: Lab,
    witness: Witness,
    no_capabilities: None,
    resolv_conf: Callable[..., None],
    source: str,
    target: str,
    nic: str,
    address: str,
    interface: str | None,
) -> None:
    resolv_conf("", hosts="198.18.2.2 nic2.test\n")
    lab.near.ip("route add local 198.51.100.0/28 dev lo")
    lab.far.ip("route add 198.51.100.0/28 via 198.18.0.2")
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    async with far_server(lab), aiobind.Connector(source) as connector:
        for remote, told, connects in (((target, PORT), None, 1), (None, (target, PORT), 2)):
            transport, client = await connector.create_datagram_endpoint(Client, remote_addr=remote, family=family)
            bound = aiobind.bound_source(transport)
            assert bound[:3] == (aiobind.parse_source(source), interface, address)
            assert transport.get_extra_info("sockname")[:2] == (address, bound.port)
            assert (transport.get_extra_info("peername") or ())[:2] == (remote or ())
            assert bound.port
            transport.sendto(b"who", told)
            assert await client.hears() == address.encode()
            assert seen(witness) == [(nic, address)]
            figures = connector.stats()[0]
            assert (figures.connections, figures.connects) == (1, connects)
            assert (figures.latency_p50, figures.ports) == (None, {})
            await closed(connector, transport)


@pytest.mark.parametrize("source", ["if!n1", "ifhost!n1!{link_local}", "{link_local}%n1"])
async def test_link_local(lab: Lab, witness: Witness, source: str) -> None:
    nic = lab.nic("n1")
    peer = nic.gateway_link_local
    async with (
        far_server(lab, f"{peer}%f1"),
        aiobind.Connector(source.format(link_local=nic.link_local)) as connector,
    ):
        transport, client = await connector.create_datagram_endpoint(Client, remote_addr=(f"{peer}%n1", PORT))
        transport.sendto(b"who")
        assert await client.hears() == nic.link_local.encode()
        await closed(connector, transport)
        if source != "if!n1":  # which has a better address for whomever it may be
            transport, client = await connector.create_datagram_endpoint(Client)
            transport.sendto(b"who", (peer, PORT))
            assert await client.hears() == nic.link_local.encode()
            await closed(connector, transport)
    assert set(seen(witness)) == {("n1", nic.link_local)}


async def test_an_address_as_getaddrinfo_has_it(lab: Lab) -> None:
    """Of IPv6 with four members; the last is the number of the zone."""
    nic = lab.nic("n1")
    async with aiobind.Connector("if!n1") as connector:
        for address, source in (
            ((V4, PORT), "198.18.1.2"),
            ((V6, PORT, 0, 0), "2001:db8:1::2"),
            ((nic.gateway_link_local, PORT, 0, socket.if_nametoindex("n1")), nic.link_local),
        ):
            transport, _ = await connector.create_datagram_endpoint(Client, remote_addr=address)
            assert transport.get_extra_info("peername") == address
            assert aiobind.bound_source(transport).address == source
            await closed(connector, transport)


@pytest.mark.parametrize(
    ("sources", "change", "family", "address"),
    [
        (["if!n1"], "", 0, "198.18.1.2"),  # IPv4 where there is both
        (["if!n1"], "", socket.AF_INET6, "2001:db8:1::2"),
        (["if!n1"], "addr del 198.18.1.2/24 dev n1", 0, "2001:db8:1::2"),
        (["2001:db8:2::2"], "", 0, "2001:db8:2::2"),
        (["if!n1"], "addr add 198.18.1.66/24 dev n1", 0, "198.18.1.2"),  # the first one
        (["if!lo"], "", 0, "127.0.0.1"),
        (["127.0.0.5"], "", 0, "127.0.0.5"),
        (["if!n9", "if!n1"], "", 0, "198.18.1.2"),  # the next source
        (["if!n1", "if!n2"], "addr flush dev n1", 0, "198.18.2.2"),
        (["if!n1", "if!n2"], "link set n1 down", 0, "198.18.2.2"),
    ],
)
async def test_unconnected(lab: Lab, sources: list[str], change: str, family: int, address: str) -> None:
    if change:
        lab.near.ip(change)
    async with aiobind.Connector(*sources, policy=aiobind.Failover()) as connector:
        transport, _ = await connector.create_datagram_endpoint(Client, family=family)
        assert aiobind.bound_source(transport).address == address
        await closed(connector, transport)


@pytest.mark.parametrize(
    ("change", "source", "number", "words"),
    [
        ("", "if!n9", errno.ENODEV, "no interface named 'n9'"),
        # The kernel would send from the address of n0, by n1, what nobody ever answers.
        ("addr flush dev n1", "if!n1", errno.EADDRNOTAVAIL, "n1 has no IPv4 address"),
        ("link set n1 down", "if!n1", errno.ENETUNREACH, "n1 is down"),
        ("", "ifhost!n1!198.18.2.2", errno.EADDRNOTAVAIL, "198.18.2.2 is not an address of n1"),
        ("", "198.18.99.2", errno.EADDRNOTAVAIL, "198.18.99.2 is not usable on this host"),
        ("", "2001:db8:1::2", errno.EADDRNOTAVAIL, "the source has no IPv4 address"),
        ("", "net!198.51.100.0/28", errno.EADDRNOTAVAIL, "is not routed to this host"),
    ],
)
async def test_refused_by_the_source(
    lab: Lab, witness: Witness, change: str, source: str, number: int, words: str
) -> None:
    if change:
        lab.near.ip(change)
    async with aiobind.Connector(source) as connector:
        for remote in ((V4, PORT), None):
            with pytest.raises(aiobind.BindError, match=words) as caught:
                await connector.create_datagram_endpoint(Client, remote_addr=remote, family=socket.AF_INET)
            assert caught.value.errno == number
            assert str(caught.value.source) == source
            assert counts(connector) == [0]
    assert seen(witness) == []


async def test_borrow_and_direct(lab: Lab, witness: Witness) -> None:
    lab.near.ip("addr flush dev n1 scope global", "route add default dev n1 metric 1001")
    options: Any = {"borrow": True, "direct": ("127.0.0.0/8", "0.0.0.0/8")}
    async with far_server(lab), aiobind.Connector("if!n1", **options) as connector:
        transport, _ = await connector.create_datagram_endpoint(Client, remote_addr=(V4, PORT))
        transport.sendto(b"x")
        borrowed = aiobind.bound_source(transport)
        assert borrowed[1:3] == ("n1", "198.18.0.2")
        await closed(connector, transport)
        transport, _ = await connector.create_datagram_endpoint(Client, remote_addr=("127.0.0.1", PORT))
        assert aiobind.bound_source(transport)[1:3] == (None, "127.0.0.1")
        await closed(connector, transport)
        # It sends to whom it is told, so that nothing exempts it.
        transport, _ = await connector.create_datagram_endpoint(Client)
        assert aiobind.bound_source(transport).interface == "n1"
        await closed(connector, transport)
    assert {nic for nic, _ in seen(witness)} == {"n1"}


async def test_pins_of_one_call_and_of_a_block(lab: Lab) -> None:
    async with aiobind.Connector("if!n0") as connector:
        transport, _ = await connector.create_datagram_endpoint(Client, source="if!n2")
        assert aiobind.bound_source(transport).interface == "n2"
        transport.close()
        with aiobind.use_source("if!n1"):
            transport, _ = await connector.create_datagram_endpoint(Client, remote_addr=(V4, PORT))
        assert aiobind.bound_source(transport).interface == "n1"
        await closed(connector, transport)


# ── to whom ──


async def test_a_name(lab: Lab, witness: Witness, resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts=f"{V6} both.test\n{V4} both.test\n")
    lab.near.ip("addr flush dev n1 scope global", "addr add 198.18.1.2/24 dev n1", "route add default dev n1 metric 7")
    async with far_server(lab), aiobind.Connector("if!n1") as connector:
        transport, client = await connector.create_datagram_endpoint(Client, remote_addr=("both.test", PORT))
        transport.sendto(b"who")
        assert await client.hears() == b"198.18.1.2"  # the address that n1 can serve
        await closed(connector, transport)
        with pytest.raises(aiobind.ResolveError):
            await connector.create_datagram_endpoint(
                Client, remote_addr=("both.test", PORT), flags=socket.AI_NUMERICHOST
            )
        with pytest.raises(aiobind.ResolveError, match="cannot be resolved"):
            await connector.create_datagram_endpoint(Client, remote_addr=("nowhere.test", PORT))
    assert seen(witness) == [("n1", "198.18.1.2")]


@pytest.fixture
def dns(lab: Lab) -> Iterator[DnsServer]:
    with DnsServer("203.0.113.80", namespace=lab.far) as server:
        yield server


async def test_the_name_is_asked_for_from_the_source(lab: Lab, witness: Witness, dns: DnsServer) -> None:
    dns.add("there.test", V4)
    async with far_server(lab), aiobind.Connector("if!n2", dns=(V4,)) as connector:
        transport, client = await connector.create_datagram_endpoint(Client, remote_addr=("there.test", PORT))
        transport.sendto(b"who")
        assert await client.hears() == b"198.18.2.2"
        await closed(connector, transport)
    assert set(seen(witness, 53)) == {("n2", "198.18.2.2")}


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"local_addr": ("0.0.0.0", 0)}, TypeError, "local_addr is not taken here"),
    ({"sock": "any"}, TypeError, "sock is not taken here"),
    ({"proto": socket.IPPROTO_TCP}, ValueError, "proto is 0 or IPPROTO_UDP, not 6"),
    ({"family": socket.AF_UNIX}, ValueError, "family is 0, AF_INET or AF_INET6, not 1"),
    ({"remote_addr": ("224.0.0.251", 9)}, ValueError, r"224\.0\.0\.251 is a multicast group"),
    ({"remote_addr": ("ff02::fb%n1", 9)}, ValueError, "ff02::fb is a multicast group"),
    ({"remote_addr": ("group.test", 9)}, ValueError, r"239\.1\.2\.3 is a multicast group"),
    ({"remote_addr": (V4, 9), "allow_broadcast": True}, ValueError, "allow_broadcast: leave remote_addr away"),
    ({"remote_addr": ("255.255.255.255", 9)}, aiobind.ConnectError, "a broadcast address, from which no answer comes"),
    ({"remote_addr": ("198.18.1.255", 9)}, aiobind.ConnectError, "a broadcast address, from which no answer comes"),
    ({"remote_addr": (V4, 0)}, ValueError, "the port must be 1 to 65535"),
    ({"remote_addr": ("", 9)}, ValueError, "the host must be a name or an address"),
    ({"remote_addr": "203.0.113.80"}, ValueError, ""),
    ({"remote_addr": ("127.0.0.1", 9)}, aiobind.BindError, "a loopback address cannot be reached through n1"),
    ({"remote_addr": (V6, 9), "family": socket.AF_INET}, aiobind.ResolveError, "the destination has no IPv4 address"),
]


async def test_refused(lab: Lab, resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts="239.1.2.3 group.test\n")
    for options, error, words in REFUSED:
        async with aiobind.Connector("if!n1") as connector:
            with pytest.raises(error, match=words or None):
                await connector.create_datagram_endpoint(Client, **options)
            assert counts(connector) == [0]
            assert error is aiobind.BindError or not connector.stats()[0].suspended_until, options


async def test_a_prohibited_destination_is_no_broadcast_address(lab: Lab) -> None:
    lab.near.ip("route add prohibit 203.0.113.81")
    async with aiobind.Connector("198.18.1.2") as connector:
        with pytest.raises(aiobind.BindError, match="the routing table or a filter of this host prohibits it"):
            await connector.create_datagram_endpoint(Client, remote_addr=("203.0.113.81", 9))


@pytest.mark.parametrize(
    ("family", "groups", "address"),
    [
        (socket.AF_INET, ["224.0.0.251", "255.255.255.255", "198.18.2.255", "127.0.0.1", "198.18.2.1"], "198.18.1.2"),
        (socket.AF_INET6, ["ff02::fb", "ff02::fb%n2", "ff0e::1", "fe80::1", "::1"], "2001:db8:1::2"),
    ],
)
async def test_whatever_it_is_told_it_leaves_by_its_interface(
    lab: Lab, witness: Witness, family: int, groups: list[str], address: str
) -> None:
    """Multicast and broadcast too; a zone in a text is dropped by the socket module."""
    lab.near.ip(
        "neigh add fe80::1 lladdr 02:00:00:00:00:99 dev n1", "neigh add 127.0.0.1 lladdr 02:00:00:00:00:98 dev n1"
    )
    lab.near.ip("neigh add ::1 lladdr 02:00:00:00:00:97 dev n1", "neigh add 198.18.2.1 lladdr 02:00:00:00:00:96 dev n1")
    async with aiobind.Connector("if!n1") as connector:
        transport, _ = await connector.create_datagram_endpoint(Client, family=family, allow_broadcast=True)
        for group in groups:
            try:
                transport.sendto(b"x", (group, PORT))
            except ValueError:  # uvloop takes no zone in a text
                assert "%" in group
        await asyncio.sleep(0.01)
        arrived = seen(witness)
        assert set(arrived) == {("n1", address)}
        assert len(arrived) >= len(groups) - 2  # the system refuses loopback itself
        await closed(connector, transport)


async def test_the_number_of_a_zone_names_the_interface(lab: Lab, witness: Witness) -> None:
    """As documented: Linux takes it for more than the pin. Should this fail, it has changed, for the better."""
    async with aiobind.Connector("if!n1") as connector:
        transport, _ = await connector.create_datagram_endpoint(Client, family=socket.AF_INET6)
        transport.sendto(b"x", ("ff02::fb", PORT, 0, socket.if_nametoindex("n2")))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert seen(witness) == [("n2", "2001:db8:1::2")]
        await closed(connector, transport)


# ── options and ports ──


async def test_options_are_set_before_it_is_bound(lab: Lab) -> None:
    options = [(socket.SOL_SOCKET, socket.SO_PRIORITY, 4), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    async with aiobind.Connector("if!n1", socket_options=options) as connector:
        transport, _ = await connector.create_datagram_endpoint(Client, allow_broadcast=True, reuse_port=True)
        sock = transport.get_extra_info("socket")
        for name, value in ((socket.SO_PRIORITY, 4), (socket.SO_BROADCAST, 1), (socket.SO_REUSEPORT, 1)):
            assert sock.getsockopt(socket.SOL_SOCKET, name) == value
        await closed(connector, transport)
        transport, _ = await connector.create_datagram_endpoint(Client, remote_addr=(V4, PORT))
        assert not transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
        await closed(connector, transport)


@pytest.mark.parametrize("ports", [range(40000, 40002), range(7000, 7002)], ids=["kept", "given"])
async def test_local_ports(lab: Lab, ports: range) -> None:
    for remote in ((V4, PORT), None):
        connector = aiobind.Connector("if!n1", "if!n2", local_ports=ports, policy=aiobind.Failover())
        made = [(await connector.create_datagram_endpoint(Client, remote_addr=remote))[0] for _ in range(4)]
        ends = [aiobind.bound_source(transport)[1:4:2] for transport in made]
        assert sorted(ends) == [(nic, port) for nic in ("n1", "n2") for port in ports]
        with pytest.raises(aiobind.BindError, match=f"port from {ports[0]} to {ports[-1]} is left") as caught:
            await connector.create_datagram_endpoint(Client, remote_addr=remote)
        assert caught.value.errno == errno.EADDRNOTAVAIL
        for transport in made:
            transport.close()
        await none_left(connector)


async def test_no_port_is_left(lab: Lab) -> None:
    """Linux says EAGAIN then, which a loop would take for success: the socket is not connected, and writable."""
    lab.near.sysctl("ipv4.ip_local_port_range", "5000 5001")
    async with aiobind.Connector("if!n1") as connector:
        made = [(await connector.create_datagram_endpoint(Client, remote_addr=(V4, PORT)))[0] for _ in range(2)]
        with pytest.raises(aiobind.BindError, match="ephemeral port is left") as caught:
            await connector.create_datagram_endpoint(Client, remote_addr=(V4, PORT))
        assert caught.value.errno == errno.EADDRNOTAVAIL
        for transport in made:
            transport.close()
        await none_left(connector)


# ── its end ──


@pytest.mark.parametrize("change", ["link set n1 down", "link del n1", "addr flush dev n1"])
async def test_what_the_link_does_is_told(lab: Lab, witness: Witness, change: str) -> None:
    async with far_server(lab), aiobind.Connector("if!n1") as connector:
        connected, client = await connector.create_datagram_endpoint(Client, remote_addr=(V4, PORT))
        other, sender = await connector.create_datagram_endpoint(Client)
        lab.near.ip(change)
        connected.sendto(b"x")
        other.sendto(b"x", (V4, PORT))
        for protocol in (client, sender):
            with pytest.raises(OSError, match="unreachable") as caught:
                await protocol.hears()
            assert caught.value.errno == errno.ENETUNREACH
        other.close()
        await closed(connector, connected)
    assert seen(witness) == []


@pytest.mark.parametrize("remote", [(V4, PORT), None], ids=["connected", "unconnected"])
async def test_a_cut(lab: Lab, witness: Witness, remote: Any) -> None:
    async with aiobind.Connector("if!n1", "if!n2", "if!n0", abort_on_link_down=True) as connector:
        made = [await connector.create_datagram_endpoint(Client, remote_addr=remote) for _ in range(3)]
        connector.remove("if!n1", drain=False)
        assert made[0][0].is_closing()
        with suppress(RuntimeError):  # uvloop's is closed already
            made[0][0].sendto(b"x", remote or (V4, PORT))  # to connect it to nowhere would have taken the pin away
        lab.near.ip("link set n2 down")
        for _, client in made[:2]:
            async with asyncio.timeout(10):
                assert await client.lost is None
        assert sorted(counts(connector)) == [0, 1]
        assert set(seen(witness)) <= {("n1", "198.18.1.2")}
        await closed(connector, made[2][0])


async def test_removed_meanwhile(lab: Lab) -> None:
    class Remover(Client):
        def __init__(self) -> None:
            super().__init__()
            connector.remove("if!n1", drain=False)

    async with aiobind.Connector("if!n1", "if!n2") as connector:
        with pytest.raises(aiobind.BindError, match="it was removed") as caught:
            await connector.create_datagram_endpoint(Remover, remote_addr=(V4, PORT))
        assert caught.value.errno == errno.ENETDOWN
        await none_left(connector)


async def test_a_source_that_can_send_again_is_no_longer_suspended(lab: Lab) -> None:
    """Nobody answers, but what it had failed at is over: it begins anew, and whoever listens is told."""
    events: list[str] = []
    sources = ("198.18.1.2", "198.18.2.2")
    async with aiobind.Connector(*sources, policy=aiobind.Failover(), on_event=lambda e: events.append(e.kind)) as made:

        async def source(remote: Any, pin: str | None = None) -> str:
            transport, _ = await made.create_datagram_endpoint(Client, remote_addr=remote, source=pin)
            address = aiobind.bound_source(transport).address
            await closed(made, transport)
            return address

        lab.near.ip(f"rule add from 198.18.1.2 to {V4} prio 10 unreachable")
        assert await source((V4, PORT)) == "198.18.2.2"
        assert made.stats()[0].suspended_until
        lab.near.ip("rule del prio 10")
        await source(None, "198.18.1.2")  # which asks for no route
        assert made.stats()[0].suspended_until
        await source((V4, PORT), "198.18.1.2")
        assert events == ["failed", "suspended", "connected", "connected", "recovered", "connected"]
        assert await source((V4, PORT)) == "198.18.1.2"


async def test_a_protocol_factory_that_fails_leaves_nothing_open(lab: Lab) -> None:
    def fail() -> Client:
        raise LookupError("no protocol today")

    async with aiobind.Connector("if!n1") as connector:
        with pytest.raises(LookupError):
            await connector.create_datagram_endpoint(fail, remote_addr=(V4, PORT))
        assert counts(connector) == [0]


async def test_a_cancelled_one_leaves_nothing(lab: Lab) -> None:
    async with aiobind.Connector("if!n1", limit_per_source=1) as connector:
        transport, _ = await connector.create_datagram_endpoint(Client)
        for waits in (1, 0, 2, 3):
            waiting = asyncio.ensure_future(connector.create_datagram_endpoint(Client, remote_addr=(V4, PORT)))
            for _ in range(waits):
                await asyncio.sleep(0)
            assert not waiting.done()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert counts(connector) == [1]
        waiting = asyncio.ensure_future(connector.create_datagram_endpoint(Client, remote_addr=(V4, PORT)))
        await asyncio.sleep(0)
        transport.close()
        async with asyncio.timeout(10):
            transport, _ = await waiting
        await closed(connector, transport)
        for turns in range(8):  # amid it
            made = asyncio.ensure_future(connector.create_datagram_endpoint(Client, remote_addr=(V4, PORT)))
            for _ in range(turns):
                await asyncio.sleep(0)
            if made.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await made
            else:
                made.result()[0].close()
            await none_left(connector)


async def test_it_can_be_had_as_long_as_the_connector_is_open(lab: Lab) -> None:
    connector = aiobind.Connector("if!n1")
    transport, _ = await connector.create_datagram_endpoint(Client)
    await connector.aclose()
    assert not transport.is_closing()
    await closed(connector, transport)
    with pytest.raises(RuntimeError, match="closed"):
        await connector.create_datagram_endpoint(Client)


# ── the example ──


async def test_the_example_asks_for_the_time(lab: Lab, witness: Witness) -> None:
    class TimeServer(Server):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            assert (len(data), data[0]) == (48, 0x23)
            self.transport.sendto(b"\x24".ljust(40, b"\0") + (3_900_000_000).to_bytes(4) + bytes(4), addr)

    with lab.far:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((V4, 123))
    sock.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(TimeServer, sock=sock)
    example = Path(__file__).parent.parent / "examples" / "udp_query.py"

    def run() -> subprocess.CompletedProcess[str]:
        with lab.near:  # a thread of the pool may be older than the lab
            command = [sys.executable, "-W", "error", str(example), "if!n1", V4]
            return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    ended = await asyncio.to_thread(run)
    transport.close()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.fullmatch(r"2023-08-02 21:20:00\+00:00\nasked from 198\.18\.1\.2\n", ended.stdout), ended.stdout
    assert seen(witness, 123) == [("n1", "198.18.1.2")]
