"""The synchronous form, in the hands of the clients that it is made for."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import threading
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohappyeyeballs
import aiohttp
import pytest
from aiohttp import web

from aiobind import BindError, InvalidSource, parse_source, socket_factory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiobind.lab import Lab, Witness

pytestmark = pytest.mark.anyio

V4, V6 = socket.AF_INET, socket.AF_INET6
TARGET_V4, TARGET_V6 = "203.0.113.80", "2001:db8:ffff::80"
IP_FREEBIND = 15  # Python 3.11 has no name for it


def info(host: str, port: int = 80, kind: int = socket.SOCK_STREAM) -> Any:
    """What getaddrinfo says of a literal address."""
    return socket.getaddrinfo(host, port, type=kind, flags=socket.AI_NUMERICHOST)[0]


def fds() -> set[tuple[str, str]]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one of listdir
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


# --- what it makes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "device", "address"),
    [
        ("127.0.0.2", "127.0.0.1", "", "127.0.0.2"),
        ("127.0.0.2", "127.9.9.9", "", "127.0.0.2"),
        ("::1", "::1", "", "::1"),
        ("host!127.0.0.2", "127.0.0.1", "", "127.0.0.2"),
        ("if!lo", "127.0.0.1", "lo", "127.0.0.1"),
        ("if!lo", "::1", "lo", "::1"),
        ("ifhost!lo!127.0.0.1", "127.0.0.1", "lo", "127.0.0.1"),
        ("ifhost!lo!::1", "::1", "lo", "::1"),
    ],
)
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
def test_a_socket_is_bound_and_not_connected(source: str, target: str, device: str, address: str, kind: int) -> None:
    with socket_factory(source)(info(target, kind=kind)) as sock:
        assert (sock.family, sock.type) == (V6 if ":" in target else V4, kind)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0").decode() == device
        assert sock.getsockname()[:2] == (address, 0)
        assert sock.gettimeout() == 0
        with pytest.raises(OSError, match="not connected"):
            sock.getpeername()


@pytest.mark.parametrize(("prefix", "target"), [("net!127.9.0.0/24", "127.0.0.1"), ("net!2001:db8:7::/64", "::1")])
def test_a_prefix_gives_each_socket_an_address_of_its_own(lab: Lab, prefix: str, target: str) -> None:
    factory = socket_factory(prefix)
    if ":" in prefix:  # 127.0.0.0/8 is routed here on every host
        with pytest.raises(BindError, match=r"is not routed to this host.*: ip route add local 2001:db8:7::/64 dev lo"):
            factory(info(target))
        lab.near.ip("route add local 2001:db8:7::/64 dev lo")
    addresses = set()
    for _ in range(20):
        with factory(info(target)) as sock:
            addresses.add(sock.getsockname()[0])
    network = prefix.removeprefix("net!").split("/")[0].rstrip(".0:")
    assert len(addresses) > 10
    assert all(address.startswith(network) for address in addresses)


def test_a_parsed_source_will_do() -> None:
    with socket_factory(parse_source("127.0.0.2"))(info("127.0.0.1")) as sock:
        assert sock.getsockname()[0] == "127.0.0.2"


def test_the_options_are_set_before_the_socket_is_bound() -> None:
    options = iter([(socket.SOL_IP, IP_FREEBIND, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)])
    factory = socket_factory("198.51.100.7", socket_options=options)
    for _ in range(2):  # the options are for every socket, although an iterator gave them
        with factory(info("127.0.0.1")) as sock:
            assert sock.getsockname()[0] == "198.51.100.7"  # refused without the first option
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# --- what it refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["host!crawler3.example", "ifhost!eth0!crawler3.example"])
def test_a_name_is_refused_at_once_with_where_to_go(source: str) -> None:
    with pytest.raises(TypeError) as caught:
        socket_factory(source)
    message = str(caught.value)
    assert message.startswith(source)
    assert "aiobind.Connector" in message
    assert "aiobind.aiohttp.BoundTCPConnector" in message


@pytest.mark.parametrize(("source", "error"), [("eth0", InvalidSource), ("", InvalidSource), (7, TypeError)])
def test_a_wrong_source_is_refused_at_once(source: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        socket_factory(source)


class Refused(NamedTuple):
    source: str
    target: str
    errno: int
    reason: str
    prepare: str = ""


REFUSED = [
    Refused("if!none", TARGET_V4, errno.ENODEV, "no interface named 'none' (have: lo, n0, n1, n2)"),
    Refused("if!N1", TARGET_V4, errno.ENODEV, "no interface named 'N1' (have: lo, n0, n1, n2); did you mean 'n1'?"),
    Refused("if!n1", TARGET_V4, errno.ENODEV, "no interface named 'n1' (have: lo, n0, n2)", "link del n1"),
    Refused("if!n1", TARGET_V4, errno.EADDRNOTAVAIL, "n1 has no IPv4 address", "addr flush dev n1"),
    Refused("if!n1", TARGET_V6, errno.EADDRNOTAVAIL, "n1 has no IPv6 address", "addr flush dev n1"),
    Refused("if!n1", "127.0.0.1", errno.ENETUNREACH, "a loopback address cannot be reached through n1"),
    Refused("if!lo", TARGET_V4, errno.ENETUNREACH, "only this host itself can be reached through lo"),
    Refused(
        "ifhost!n1!198.18.2.2",
        TARGET_V4,
        errno.EADDRNOTAVAIL,
        "198.18.2.2 is not an address of n1 (it has 198.18.1.2, ",
    ),
    Refused(
        "ifhost!n1!198.18.1.2",
        TARGET_V6,
        errno.EADDRNOTAVAIL,
        "the source has no IPv6 address (it has 198.18.1.2)",
    ),
    Refused("198.18.1.2", TARGET_V6, errno.EADDRNOTAVAIL, "the source has no IPv6 address (it has 198.18.1.2)"),
    Refused("2001:db8:1::2", TARGET_V4, errno.EADDRNOTAVAIL, "the source has no IPv4 address (it has 2001:db8:1::2)"),
    Refused(
        "net!198.51.100.0/24", TARGET_V6, errno.EADDRNOTAVAIL, "the source has no IPv6 address (it has 198.51.100."
    ),
    Refused("198.51.100.7", TARGET_V4, errno.EADDRNOTAVAIL, "198.51.100.7 is not usable on this host"),
    Refused("fe80::7%n1", "fe80::1", errno.EADDRNOTAVAIL, "fe80::7%n1 is not usable on this host"),
    Refused("fe80::7%none", "fe80::1", errno.ENODEV, "the zone of fe80::7%none is no interface of this host"),
    Refused("fe80::7%n1", TARGET_V6, errno.EADDRNOTAVAIL, "the link-local address fe80::7%n1 reaches no further"),
    Refused("127.0.0.1", TARGET_V4, errno.ENETUNREACH, "from the loopback address 127.0.0.1 only this host itself"),
    Refused("::1", TARGET_V6, errno.ENETUNREACH, "from the loopback address ::1 only this host itself"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case.source} to {case.target} {case.prepare}")
def test_refused_before_any_packet(lab: Lab, witness: Witness, case: Refused) -> None:
    if case.prepare:
        lab.near.ip(case.prepare)
    factory = socket_factory(case.source)
    destination = f"[{case.target}]:80" if ":" in case.target else f"{case.target}:80"
    with pytest.raises(BindError) as caught:
        factory(info(case.target))
    error = caught.value
    assert error.errno == case.errno
    assert (error.strerror or "").startswith(f"connect from {case.source} to {destination}: {case.reason}")
    assert (str(error.source), error.destination) == (case.source, destination)
    assert witness.packets() == []


def test_the_caller_s_option_that_is_refused_says_which() -> None:
    factory = socket_factory("127.0.0.2", socket_options=[(socket.SOL_SOCKET, 9999, 1)])
    with pytest.raises(OSError, match=r"socket option \(1, 9999\) refused") as caught:
        factory(info("127.0.0.1"))
    assert caught.value.errno == errno.ENOPROTOOPT


def test_it_keeps_up_with_the_interfaces(lab: Lab) -> None:
    lab.near.ip("addr flush dev n1")
    factory = socket_factory("if!n1")

    def outcome() -> int:
        try:
            factory(info(TARGET_V4)).close()
        except BindError as error:
            return error.errno or -1
        return 0

    assert outcome() == errno.EADDRNOTAVAIL
    lab.near.ip("addr add 198.18.1.9/24 dev n1")
    assert outcome() == 0
    lab.near.ip("addr del 198.18.1.9/24 dev n1")
    assert outcome() == errno.EADDRNOTAVAIL
    lab.near.ip("link del n1")
    assert outcome() == errno.ENODEV
    lab.near.ip("link add n1 type veth peer name x1", "addr add 198.18.1.9/24 dev n1")
    lab.near.ip("link set x1 up", "link set n1 up")
    deadline = time.monotonic() + 10
    while outcome() and time.monotonic() < deadline:  # the kernel takes its time to tell of the carrier
        time.sleep(0.001)
    assert outcome() == 0


def test_descriptors(lab: Lab) -> None:
    """One for the news of the interfaces, as long as the factory lives; the sockets are the caller's."""
    lab.near.sysctl("ipv6.conf.n1.accept_dad", 1)
    lab.near.ip("addr add 2001:db8:1::9/64 dev n1")  # tentative for a second: bind(2) refuses it
    gc.collect()
    before = fds()
    sources = ("if!n1", "if!none", "ifhost!n1!198.18.1.2", "ifhost!n1!2001:db8:1::9", "198.51.100.7")
    factories = [socket_factory(source) for source in sources]
    assert fds() == before
    opened = []
    for _ in range(3):
        for factory in factories:
            for target in (TARGET_V4, TARGET_V6):
                with suppress(BindError):
                    factory(info(target)).close()
        opened.append(fds() - before)
    assert len(opened[0]) == 4  # an address needs no news
    assert opened == [opened[0]] * 3
    del factory, factories  # no cycle holds them
    assert fds() == before


# --- in the hands of others ---------------------------------------------------------------------------------


@asynccontextmanager
async def serving(listener: socket.socket) -> AsyncIterator[int]:
    """Answer HTTP requests with the address of the peer; yield the port."""

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        return web.Response(text=request.transport.get_extra_info("peername")[0])

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        yield listener.getsockname()[1]
    finally:
        await runner.cleanup()


async def by_aiohttp(factory: Callable[[Any], socket.socket], host: str, port: int) -> str:
    literal = f"[{host}]" if ":" in host else host
    connector = aiohttp.TCPConnector(socket_factory=factory)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"http://{literal}:{port}/") as response,
    ):
        return await response.text()


async def by_happy_eyeballs(factory: Callable[[Any], socket.socket], host: str, port: int) -> str:
    others = [info("127.0.0.1", 9), info("::1", 9)]  # nobody listens there
    sock = await aiohappyeyeballs.start_connection(
        [*others, info(host, port)], happy_eyeballs_delay=0.25, interleave=1, socket_factory=factory
    )
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer.rpartition(b"\r\n\r\n")[2].decode()


@pytest.mark.parametrize("client", [by_aiohttp, by_happy_eyeballs], ids=["aiohttp", "aiohappyeyeballs"])
@pytest.mark.parametrize(
    ("source", "seen"),
    [("127.0.0.7", "127.0.0.7"), ("if!lo", "127.0.0.1"), ("ifhost!lo!127.0.0.1", "127.0.0.1")],
)
async def test_on_loopback(client: Callable[..., Any], source: str, seen: str) -> None:
    async with serving(socket.create_server(("127.0.0.1", 0))) as port:
        assert await client(socket_factory(source), "127.0.0.1", port) == seen


NIC_SOURCES = [
    ("if!n1", TARGET_V4, "198.18.1.2", "n1"),
    ("if!n1", TARGET_V6, "2001:db8:1::2", "n1"),
    ("if!n2", TARGET_V4, "198.18.2.2", "n2"),
    ("ifhost!n1!198.18.1.2", TARGET_V4, "198.18.1.2", "n1"),
    ("ifhost!n2!2001:db8:2::2", TARGET_V6, "2001:db8:2::2", "n2"),
    ("198.18.1.2", TARGET_V4, "198.18.1.2", "n0"),  # an address is only an address: the route chooses
    ("2001:db8:1::2", TARGET_V6, "2001:db8:1::2", "n0"),
]


@pytest.fixture(params=["root", "no capabilities"])
def privilege(request: pytest.FixtureRequest) -> None:
    if request.param == "no capabilities":
        request.getfixturevalue("no_capabilities")


@pytest.mark.parametrize(("source", "target", "address", "nic"), NIC_SOURCES)
@pytest.mark.usefixtures("privilege")
async def test_which_way_it_leaves(
    lab: Lab, witness: Witness, source: str, target: str, address: str, nic: str
) -> None:
    with lab.far:
        listener = socket.create_server((target, 80), family=V6 if ":" in target else V4)
    async with serving(listener):
        for client in (by_aiohttp, by_happy_eyeballs):
            assert await client(socket_factory(source), target, 80) == address
            # What the kernel answers by itself once the socket is closed (RST) goes by the routing table.
            assert {(packet.nic, packet.source) for packet in witness.packets() if packet.syn} == {(nic, address)}


@pytest.mark.parametrize(
    ("route", "target", "address"),
    [
        ("203.0.113.80 via 198.18.1.1 dev n1 src {}", TARGET_V4, "198.18.1.2"),
        ("2001:db8:ffff::80 via 2001:db8:1::1 dev n1 src {}", TARGET_V6, "2001:db8:1::2"),
    ],
    ids=["IPv4", "IPv6"],
)
async def test_a_route_names_no_other_address(
    lab: Lab, witness: Witness, route: str, target: str, address: str
) -> None:
    nic = lab.nic("n0")
    lab.near.ip(f"route add {route.format(nic.v6 if ':' in target else nic.v4)} metric 1")
    with lab.far:
        listener = socket.create_server((target, 80), family=V6 if ":" in target else V4)
    async with serving(listener):
        assert await by_happy_eyeballs(socket_factory("if!n1"), target, 80) == address
    assert {(packet.nic, packet.source) for packet in witness.packets()} == {("n1", address)}


def test_two_kinds_at_one_address_and_target_have_ports_of_their_own(lab: Lab) -> None:
    with socket_factory("if!n1")(info(TARGET_V4)) as pinned:
        assert pinned.getsockname() == ("198.18.1.2", 0)
        with socket_factory("198.18.1.2")(info(TARGET_V4)) as unpinned:
            assert unpinned.getsockname()[0] == "198.18.1.2"
            assert unpinned.getsockname()[1] != 0
    with socket_factory("198.18.1.2")(info(TARGET_V4)) as alone:
        assert alone.getsockname()[1] == 0


async def test_a_prefix_in_the_lab(lab: Lab, witness: Witness) -> None:
    lab.near.ip("route add local 198.51.100.0/24 dev lo")
    lab.far.ip("route add 198.51.100.0/24 via 198.18.0.2")
    with lab.far:
        listener = socket.create_server((TARGET_V4, 80))
    factory = socket_factory("net!198.51.100.0/24")
    async with serving(listener):
        seen = {await by_aiohttp(factory, TARGET_V4, 80) for _ in range(10)}
    assert len(seen) > 5
    assert {packet.source for packet in witness.packets()} == seen


async def test_a_link_local_target(lab: Lab, witness: Witness) -> None:
    nic = lab.nic("n1")
    # By number: uvloop looks the zone up in threads that may have been started in another namespace.
    host = f"{nic.gateway_link_local}%{socket.if_nametoindex('n1')}"
    with lab.far:
        listener = socket.create_server(("::", 80), family=V6)
    async with serving(listener):
        assert await by_aiohttp(socket_factory("if!n1"), host, 80) == nic.link_local
    assert {(packet.nic, packet.source) for packet in witness.packets()} == {("n1", nic.link_local)}


@pytest.mark.parametrize(
    ("source", "number"), [("if!none", errno.ENODEV), ("if!n1", errno.EADDRNOTAVAIL), ("if!lo", errno.ENETUNREACH)]
)
async def test_the_error_arrives_by_aiohttp(lab: Lab, witness: Witness, source: str, number: int) -> None:
    lab.near.ip("addr flush dev n1")
    with pytest.raises(aiohttp.ClientConnectorError) as caught:
        await by_aiohttp(socket_factory(source), TARGET_V4, 80)
    assert isinstance(caught.value.os_error, BindError)
    assert caught.value.errno == number
    assert source in str(caught.value)
    assert witness.packets() == []


async def test_the_error_arrives_by_happy_eyeballs(lab: Lab, witness: Witness) -> None:
    with pytest.raises(BindError) as caught:
        await aiohappyeyeballs.start_connection([info(TARGET_V4)], socket_factory=socket_factory("if!none"))
    assert caught.value.errno == errno.ENODEV
    assert witness.packets() == []


async def test_a_target_that_the_source_cannot_serve_is_passed_over(lab: Lab, witness: Witness) -> None:
    lab.near.ip("addr del 2001:db8:1::2/64 dev n1")
    with lab.far:
        listener = socket.create_server((TARGET_V4, 80))
    with listener:
        sock = await aiohappyeyeballs.start_connection(
            [info(TARGET_V6), info(TARGET_V4)], happy_eyeballs_delay=5, socket_factory=socket_factory("if!n1")
        )
        with sock:
            assert sock.getsockname()[0] == "198.18.1.2"
    assert {(packet.nic, packet.source) for packet in witness.packets()} == {("n1", "198.18.1.2")}


def test_threads_share_a_factory() -> None:
    """Of two readers of the one queue of news each would get one half, and wait for ever for the other."""
    factory = socket_factory("if!lo")
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                factory((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 80))).close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


def test_an_ipv4_mapped_target_is_refused() -> None:
    with pytest.raises(BindError, match="give the IPv4 address"):
        socket_factory("127.0.0.2")((socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::ffff:127.0.0.1", 80, 0, 0)))
