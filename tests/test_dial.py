"""What the options of a connection do, with real sockets, judged from the far side of the NICs."""

from __future__ import annotations

import asyncio
import errno
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

import aiobind
from aiobind import _dial, _interfaces
from aiobind._platform import platform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from aiobind.lab import Lab, Namespace, Witness

pytestmark = pytest.mark.anyio

V4, V6 = "203.0.113.80", "2001:db8:ffff::80"


@pytest.fixture
def namespace(make_lab: Callable[[int], Lab]) -> Namespace:
    """A host with nothing but a loopback interface, and 20 ephemeral ports."""
    lab = make_lab(0)
    lab.near.sysctl("ipv4.ip_local_port_range", "50000 50019")
    return lab.near


@pytest.fixture
def far(lab: Lab) -> Iterator[list[socket.socket]]:
    """Listen on port 80 of every far address; the kernel answers, and nobody needs to accept."""
    with lab.far:
        listening = [
            socket.create_server(("", 80), family=family, backlog=2048) for family in (socket.AF_INET, socket.AF_INET6)
        ]
    yield listening
    for sock in listening:
        sock.close()


def connections(witness: Witness) -> set[tuple[str, str, int]]:
    """Return NIC, source address and source port of each SYN."""
    return {(packet.nic, packet.source, packet.sport) for packet in witness.packets() if packet.syn}


# ── no connection takes the 4-tuple of another ──

PINNED, UNPINNED = "if!n1", "198.18.1.2"


@pytest.mark.parametrize("order", [(PINNED, UNPINNED), (UNPINNED, PINNED), (PINNED, PINNED), (UNPINNED, UNPINNED)])
async def test_no_connection_takes_the_4_tuple_of_another(
    lab: Lab, far: list[socket.socket], order: tuple[str, str]
) -> None:
    """The kernel alone gives some of the second three hundred the very 4-tuple of one of the first."""
    lab.near.sysctl("ipv4.ip_local_port_range", "10000 10999")
    lab.far.sysctl("core.somaxconn", 4096)
    async with aiobind.Connector(*dict.fromkeys(order)) as connector:
        held = [await connector.connect(V4, 80, source=source) for source in order for _ in range(300)]
        try:
            assert len({sock.getsockname() for sock in held}) == 600
            await asyncio.sleep(0.05)
            for sock in held:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
                assert sock.send(b"x") == 1  # one whose 4-tuple was taken has been reset
        finally:
            for sock in held:
                sock.close()


async def test_attempts_of_both_kinds_at_once(lab: Lab, far: list[socket.socket]) -> None:
    """Also while the connects are under way, whose ports nobody knows yet."""
    lab.near.sysctl("ipv4.ip_local_port_range", "10000 10299")
    async with aiobind.Connector(PINNED, UNPINNED) as connector:
        held = await asyncio.gather(*(connector.connect(V4, 80, source=(PINNED, UNPINNED)[n % 2]) for n in range(200)))
        try:
            assert len({sock.getsockname() for sock in held}) == 200
        finally:
            for sock in held:
                sock.close()


async def test_the_sockets_of_a_factory_count_as_well(lab: Lab, far: list[socket.socket]) -> None:
    lab.near.sysctl("ipv4.ip_local_port_range", "10000 10099")
    make = aiobind.socket_factory(PINNED)
    loop = asyncio.get_running_loop()
    held: list[socket.socket] = []
    for _ in range(50):
        held.append(make((socket.AF_INET, socket.SOCK_STREAM, 0, "", (V4, 80))))
        await loop.sock_connect(held[-1], (V4, 80))
    async with aiobind.Connector(UNPINNED) as connector:
        held += [await connector.connect(V4, 80) for _ in range(50)]
    assert len({sock.getsockname() for sock in held}) == 100
    for sock in held:
        sock.close()


async def test_one_kind_alone_shares_its_ports_among_destinations(lab: Lab, far: list[socket.socket]) -> None:
    lab.near.sysctl("ipv4.ip_local_port_range", "10000 10009")
    lab.add_target("203.0.113.81")
    async with aiobind.Connector("if!n1") as connector:
        held = [await connector.connect(host, 80) for host in (V4, "203.0.113.81") for _ in range(10)]
        assert len({sock.getsockname() for sock in held}) == 10
        # The other kind has ports of its own, and none of these ten is left to it.
        with pytest.raises(aiobind.BindError, match="port is left") as caught:
            await connector.connect(V4, 80, source=UNPINNED)
        assert caught.value.errno == errno.EADDRNOTAVAIL
        for sock in held:
            sock.close()


# ── local_ports ──


@pytest.mark.parametrize(
    ("ports", "reserved"),
    [
        (range(50005, 50010), ""),  # within the automatic range: connect(2) chooses
        (range(50005, 50010), "50000-50006,50012"),  # what is reserved connect(2) never takes
        (range(40000, 40005), ""),  # outside
        (range(50017, 50022), ""),  # partly outside
    ],
)
async def test_the_callers_ports_and_no_other(namespace: Namespace, ports: range, reserved: str) -> None:
    """Each port serves each destination once, whoever chooses it."""
    namespace.sysctl("ipv4.ip_local_reserved_ports", reserved)
    with socket.create_server(("127.1.0.1", 80)), socket.create_server(("127.1.0.2", 80)):
        async with aiobind.Connector("if!lo", "127.0.0.1", local_ports=ports) as connector:
            for source in ("if!lo", "127.0.0.1"):
                held = [
                    await connector.connect(host, 80, source=source)
                    for host in ("127.1.0.1", "127.1.0.2")
                    for _ in range(5)
                ]
                assert sorted(sock.getsockname()[1] for sock in held) == sorted([*ports, *ports])
                words = f"no source address or port from {ports[0]} to {ports[-1]} is left"
                with pytest.raises(aiobind.BindError, match=words) as caught:
                    await connector.connect("127.1.0.1", 80, source=source)
                assert caught.value.errno == errno.EADDRNOTAVAIL
                for sock in held:
                    # Without TIME_WAIT, whose ports the next source would not get.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    sock.close()


async def test_ports_that_nobody_elses_connection_can_take(lab: Lab, far: list[socket.socket]) -> None:
    """Another process connects from our address without our device: the kernel's choice would take our 4-tuples."""
    lab.near.sysctl("ipv4.ip_local_port_range", "10000 10099")
    strangers: list[socket.socket] = []
    async with aiobind.Connector("if!n1", local_ports=range(20000, 20050)) as connector:
        held = [await connector.connect(V4, 80) for _ in range(50)]
        for _ in range(100):
            stranger = socket.socket()
            stranger.setsockopt(socket.SOL_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
            stranger.bind(("198.18.1.2", 0))
            stranger.setblocking(False)
            with pytest.raises(BlockingIOError):
                stranger.connect((V4, 80))
            strangers.append(stranger)
        ours = {sock.getsockname() for sock in held}
        assert {port for _, port in ours} == set(range(20000, 20050))
        assert ours.isdisjoint(sock.getsockname() for sock in strangers)
        assert all(sock.send(b"x") == 1 for sock in held)
        for sock in (*held, *strangers):
            sock.close()


@pytest.mark.parametrize("name", ["SO_REUSEADDR", "SO_REUSEPORT"])
async def test_an_option_of_the_caller_shares_no_reserved_port(lab: Lab, far: list[socket.socket], name: str) -> None:
    options = [(socket.SOL_SOCKET, getattr(socket, name), 1)]
    async with aiobind.Connector(
        PINNED, UNPINNED, local_ports=range(20000, 20200), socket_options=options
    ) as connector:
        held = [await connector.connect(V4, 80, source=source) for source in (PINNED, UNPINNED) for _ in range(90)]
    assert len({sock.getsockname() for sock in held}) == 180
    for sock in held:
        sock.close()


async def test_a_range_that_has_moved_meanwhile(namespace: Namespace) -> None:
    """The kernel ignores a range that lies outside the automatic one: nothing is sent by a wrong port."""
    with socket.create_server(("127.1.0.1", 80)):
        async with aiobind.Connector("127.0.0.1", local_ports=range(50000, 50010)) as connector:
            (await connector.connect("127.1.0.1", 80)).close()
            namespace.sysctl("ipv4.ip_local_port_range", "40000 40010")
            with pytest.raises(aiobind.BindError, match="which is no port from 50000 to 50009; no data was sent"):
                await connector.connect("127.1.0.1", 80)
            with await connector.connect("127.1.0.1", 80) as sock:
                assert sock.getsockname()[1] in range(50000, 50010)


async def test_a_port_below_1024_takes_a_privilege(lab: Lab, no_capabilities: None) -> None:
    with pytest.raises(aiobind.BindError, match=r"ip_unprivileged_port_start takes CAP_NET_BIND_SERVICE") as caught:
        await aiobind.connect(V4, 80, source="if!n1", local_ports=range(700, 800))
    assert caught.value.errno == errno.EACCES


async def test_a_port_is_found_where_others_have_reserved_all_at_another_address(namespace: Namespace) -> None:
    """connect(2) finds none then, at any address; bind(2) does."""
    others = []
    for _ in range(20):
        sock = socket.socket()
        sock.bind(("127.0.0.9", 0))
        others.append(sock)
    with socket.create_server(("127.1.0.1", 80)), await aiobind.connect("127.1.0.1", 80, source="127.0.0.2") as sock:
        assert sock.getsockname()[1] in range(50000, 50020)
    for sock in others:
        sock.close()


# ── borrow ──


async def test_a_borrowed_address(lab: Lab, far: list[socket.socket], witness: Witness) -> None:
    """As on an unnumbered link: the address belongs to another interface, and the packets leave by the one named."""
    lab.near.ip("addr flush dev n1", "route add default dev n1 metric 5")
    lab.far.ip("route add 198.18.0.2 dev f1", "neigh add 198.18.0.2 lladdr 02:00:00:00:00:01 dev f1")
    lab.near.ip("link set n1 address 02:00:00:00:00:01")
    lab.far.sysctl("ipv4.conf.f1.proxy_arp", 1)
    with pytest.raises(aiobind.BindError, match="n1 has no IPv4 address"):
        await aiobind.connect(V4, 80, source="if!n1")
    assert not connections(witness)
    for source in ("if!n1", "ifhost!n1!198.18.0.2"):
        with await aiobind.connect(V4, 80, source=source, borrow=True) as sock:
            assert aiobind.bound_source(sock)[1:3] == ("n1", "198.18.0.2")
        ((nic, address, _),) = connections(witness)
        assert (nic, address) == ("n1", "198.18.0.2")


@pytest.mark.parametrize(
    ("change", "source", "host", "number"),
    [
        ("", "ifhost!n1!192.0.2.7", V4, errno.EADDRNOTAVAIL),  # nobody's
        ("link set n1 down", "if!n1", V4, errno.ENETUNREACH),
        ("link del n1", "if!n1", V4, errno.ENODEV),
        ("", "if!n1", "127.0.0.1", errno.ENETUNREACH),
        ("", "if!lo", V4, errno.ENETUNREACH),
    ],
)
async def test_what_may_not_be_borrowed(
    lab: Lab, witness: Witness, change: str, source: str, host: str, number: int
) -> None:
    if change:
        lab.near.ip(change)
    with pytest.raises(aiobind.BindError) as caught:
        await aiobind.connect(host, 80, source=source, borrow=True)
    assert caught.value.errno == number
    assert not witness.packets()


# ── direct ──


@pytest.mark.parametrize(
    ("direct", "host"),
    [
        (["203.0.113.0/24"], V4),
        ([V4], V4),
        (["FAR.test."], "far.test"),
        (["2001:db8::/32", "203.0.113.0/24"], "far.test"),  # by its address
    ],
)
async def test_an_exempt_destination(
    lab: Lab,
    far: list[socket.socket],
    witness: Witness,
    resolv_conf: Callable[..., None],
    direct: list[str],
    host: str,
) -> None:
    resolv_conf("", hosts=f"{V4} far.test\n")
    for source in ("if!n1", "if!n9", "192.0.2.99"):  # whatever would become of the source
        with await aiobind.connect(host, 80, source=source, direct=direct) as sock:
            assert aiobind.bound_source(sock)[:3] == (aiobind.parse_source(source), None, "198.18.0.2")
    assert {(nic, address) for nic, address, _ in connections(witness)} == {("n0", "198.18.0.2")}


async def test_only_what_was_named_is_exempt(
    lab: Lab, far: list[socket.socket], witness: Witness, resolv_conf: Callable[..., None]
) -> None:
    resolv_conf("", hosts=f"{V4} far.test below.far.test\n")
    async with aiobind.Connector("if!n1", direct=["far.test", "127.0.0.0/8", "203.0.113.81"]) as connector:
        for host in (V4, "below.far.test"):
            with await connector.connect(host, 80) as sock:
                assert aiobind.bound_source(sock)[1:3] == ("n1", "198.18.1.2")
        with (
            socket.create_server(("127.0.0.1", 80)),
            await connector.connect("127.0.0.1", 80) as sock,
        ):
            assert aiobind.bound_source(sock)[1:3] == (None, "127.0.0.1")
    assert {nic for nic, _, _ in connections(witness)} == {"n1"}


async def test_one_address_of_a_name_is_exempt(lab: Lab, witness: Witness, resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts=f"{V6} both.test\n{V4} both.test\n")
    with lab.far:
        server = socket.create_server((V4, 80))
    with server, await aiobind.connect("both.test", 80, source="if!n9", direct=[V4]) as sock:
        assert aiobind.bound_source(sock)[1:3] == (None, "198.18.0.2")
    assert {nic for nic, _, _ in connections(witness)} == {"n0"}


# ── sources that no packet can come from ──


@pytest.mark.parametrize(
    ("address", "number", "words"),
    [
        ("239.1.1.1", errno.EADDRNOTAVAIL, "239.1.1.1 is no source: a multicast address is bound, and then"),
        ("ff02::1", errno.EADDRNOTAVAIL, "a multicast address"),
        ("255.255.255.255", errno.EADDRNOTAVAIL, "a broadcast address"),
        ("0.0.0.0", errno.EADDRNOTAVAIL, "a wildcard address"),
        ("fe80::1", errno.EADDRNOTAVAIL, "the link-local address fe80::1 reaches no further than its link"),
    ],
)
async def test_a_name_that_stands_for_no_source(
    lab: Lab, far: list[socket.socket], witness: Witness, resolv_conf: Callable[..., None], address: str, number: int,
    words: str,
) -> None:  # fmt: skip
    """Linux binds the first four, and connects from another address."""
    resolv_conf("", hosts=f"{address} odd.test\n")
    host = V6 if ":" in address else V4
    with pytest.raises(aiobind.BindError, match=words) as caught:
        await aiobind.connect(host, 80, source="host!odd.test")
    assert caught.value.errno == number
    assert not witness.packets()
    async with aiobind.Connector("host!odd.test", "if!n2", policy=InOrder()) as connector:
        with await connector.connect(host, 80) as sock:
            assert aiobind.bound_source(sock).interface == "n2"


@pytest.mark.parametrize("source", ["{}%n1", "ifhost!n1!{}"])
async def test_a_link_local_source_goes_no_further(
    lab: Lab, far: list[socket.socket], witness: Witness, source: str
) -> None:
    source = source.format(lab.nic("n1").link_local)
    with pytest.raises(aiobind.BindError, match="reaches no further than its link") as caught:
        await aiobind.connect(V6, 80, source=source)
    assert caught.value.errno == errno.EADDRNOTAVAIL
    assert not witness.packets()
    (await aiobind.connect(f"{lab.nic('n1').gateway_link_local}%n1", 80, source=source)).close()


async def test_a_link_local_name_without_its_zone(lab: Lab, resolv_conf: Callable[..., None]) -> None:
    resolv_conf("", hosts="fe80::1 odd.test\n")
    with pytest.raises(aiobind.BindError, match="fe80::1 is link-local: it needs its interface as a zone") as caught:
        await aiobind.connect("::1", 80, source="host!odd.test")
    assert caught.value.errno == errno.EINVAL


async def test_an_ipv4_link_local_address_of_this_host(lab: Lab, witness: Witness) -> None:
    lab.near.ip("addr add 169.254.7.7/16 dev n2")
    with pytest.raises(aiobind.BindError, match="this host's own address") as caught:
        await aiobind.connect("169.254.7.7", 80, source="if!n1")
    assert caught.value.errno == errno.ENETUNREACH
    assert not witness.packets()


async def test_a_source_whose_text_the_c_library_spells_otherwise(namespace: Namespace) -> None:
    namespace.ip("addr add ::1:2/128 dev lo nodad")
    with socket.create_server(("::1", 80), family=socket.AF_INET6):
        for source in ("::1:2", "ifhost!lo!::1:2"):
            (await aiobind.connect("::1", 80, source=source)).close()


# ── the moment before the SYN ──


@pytest.mark.parametrize("library", ["asyncio", "uvloop"])
def test_no_connect_waits_for_the_names_of_others(make_lab: Callable[[int], Lab], library: str) -> None:
    """uvloop's own sock_connect does: it hands a literal to the four threads that look names up.

    In a process of its own, for those threads stay in the network namespace in which the first name was looked up.
    """
    make_lab(0)
    program = f"""if True:
        import asyncio, socket, {library}
        import aiobind
        from aiobind import lab

        async def main():
            loop = asyncio.get_running_loop()
            names = [asyncio.ensure_future(loop.getaddrinfo(f"slow{{n}}.test", 80)) for n in range(5)]
            await asyncio.sleep(0.1)
            with socket.create_server(("127.1.0.1", 80)):
                (await aiobind.connect("127.1.0.1", 80, source="if!lo")).close()
            print([name.done() for name in names])
            await asyncio.gather(*names, return_exceptions=True)

        lab.isolate()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 53))
            with lab.replace_file("/etc/resolv.conf", "nameserver 127.0.0.1\\noptions timeout:2 attempts:1\\n"):
                {library}.run(main())
        """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout == f"{[False] * 5}\n", run.stderr


async def test_what_changes_between_the_decision_and_the_connect(
    lab: Lab, witness: Witness, resolv_conf: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two addresses the second is tried later than the decision was made: the address has moved by then."""
    lab.near.ip("neigh add 198.18.1.99 lladdr 02:00:00:00:00:99 dev n1")
    resolv_conf("", hosts=f"198.18.1.99 two.test\n{V4} two.test\n")
    async with aiobind.Connector("if!n1", happy_eyeballs_delay=0.1) as connector:
        attempt = asyncio.create_task(connector.connect("two.test", 80))
        await asyncio.sleep(0.03)
        lab.near.ip("addr del 198.18.1.2/24 dev n1", "addr add 198.18.1.2/24 dev n2")
        with pytest.raises(aiobind.BindError) as caught:
            await asyncio.wait_for(attempt, 10)
    assert caught.value.errno == errno.EADDRNOTAVAIL
    assert not [packet for packet in witness.packets() if packet.destination == V4]


# ── the short way: what has been worked out once is repeated ──


async def warm(connector: aiobind.Connector, host: str = V4, port: int = 80) -> None:
    """Have the way to *host* worked out, and repeated once."""
    for _ in range(3):
        (await connector.connect(host, port)).close()
        await asyncio.sleep(0)


async def test_what_is_kept_is_bounded_over_all_sources_together(
    lab: Lab, far: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dial, "_KNOWN", 6)
    targets = [f"203.0.113.{number}" for number in range(101, 109)]
    for target in targets:
        lab.add_target(target)
    async with aiobind.Connector("if!n0", "if!n1") as connector:
        for target in targets * 2:
            for source in ("if!n0", "if!n1"):
                (await connector.connect(target, 80, source=source)).close()
        kept = [len(origin.openings) for origin in connector._dialer.roster.all]
    assert all(0 < number <= 3 for number in kept)


FROM_N2 = "198.18.2.2"


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ("addr del 198.18.1.2/24 dev n1; addr add 198.18.1.77/24 dev n1; {default}", "198.18.1.77"),
        ("addr add 198.18.1.77/24 dev n1", "198.18.1.2"),
        ("addr del 198.18.1.2/24 dev n1", errno.EADDRNOTAVAIL),
        ("addr del 198.18.1.2/24 dev n1; addr add 198.18.1.2/32 dev lo", errno.EADDRNOTAVAIL),
        ("addr del 198.18.1.2/24 dev n1; addr add 198.18.1.2/32 dev n2", errno.EADDRNOTAVAIL),
        ("link set n1 down", errno.ENETUNREACH),
        ("link set n1 down; link set n1 up; {default}", "198.18.1.2"),
        ("link del n1", errno.ENODEV),
        ("link del n1; link add n1 type veth peer name e1; addr add 198.18.1.78/24 dev n1", errno.ENETUNREACH),
        ("link set n1 name x1", errno.ENODEV),
        ("link set n1 name x1; link set n2 name n1", FROM_N2),
        ("link del n1; link set n2 name n1", FROM_N2),
    ],
    ids=lambda text: text.replace(" dev n1", "") if isinstance(text, str) else None,
)
@pytest.mark.parametrize("trusted", [False, True], ids=["", "trusted"])
async def test_what_changes_between_two_connects(
    lab: Lab,
    far: list[socket.socket],
    witness: Witness,
    monkeypatch: pytest.MonkeyPatch,
    changes: str,
    outcome: str | int,
    *,
    trusted: bool,
) -> None:
    """Without a turn of the loop, which would have read of it, so that nobody has told the connector.

    What is not looked for before the connect is found out after it: then a SYN may have gone, and no more.
    """
    monkeypatch.setattr(_interfaces, "_TRUST", 10 if trusted else 0.001)
    async with aiobind.Connector("if!n1") as connector:
        await warm(connector)
        witness.packets()
        lab.near.ip(*changes.format(default="route add default via 198.18.1.1 dev n1 metric 1001").split("; "))
        end = time.monotonic() + 0.002
        while time.monotonic() < end:
            pass
        if isinstance(outcome, int):
            with pytest.raises(aiobind.BindError) as caught:
                await connector.connect(V4, 80)
            assert caught.value.errno == outcome
            assert trusted or not connections(witness)
        else:
            with await connector.connect(V4, 80) as sock:
                bound = aiobind.bound_source(sock)
                assert bound[1:3] == ("n1", outcome)
                assert sock.getsockname()[0] == outcome
                assert sock.getpeername() == (V4, 80)
            nic = "n2" if outcome == FROM_N2 else "n1"
            seen = connections(witness)
            assert (nic, outcome, bound.port) in seen
            assert trusted or len(seen) == 1


async def test_a_link_that_goes_down_while_a_repeated_connect_waits(lab: Lab, far: list[socket.socket]) -> None:
    events: list[aiobind.Event] = []
    async with aiobind.Connector("if!n1", on_event=events.append) as connector, asyncio.timeout(5):
        await warm(connector)
        lab.far.ip("route add blackhole 198.18.1.2/32")
        attempts = [asyncio.ensure_future(connector.connect(V4, 80)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(attempt.done() for attempt in attempts)
        lab.near.ip("link set n1 down")
        for attempt in attempts:
            with pytest.raises(aiobind.BindError, match="n1 is down") as caught:
                await attempt
            assert caught.value.errno == errno.ENETUNREACH
        figures = connector.stats()[0]
        assert (figures.connects, figures.failures) == (3, {"ENETUNREACH": 3})
        assert not connector._dialer._planner.watching()._attempts
        assert not connector._dialer._planner.watching().guards


async def test_a_link_that_is_back_when_a_repeated_connect_goes_on(lab: Lab, far: list[socket.socket]) -> None:
    """It is not the socket that was ended for the link's sake which the caller gets."""
    async with aiobind.Connector("if!n1") as connector:
        await warm(connector)
        dialer, ways = connector._dialer, []
        way = dialer._way
        assert way is not None

        async def flapping(sock: socket.socket, address: Any) -> None:
            await way(sock, address)
            ways.append(sock)
            if len(ways) == 1:  # all this is in the same turn, before whoever waits goes on
                lab.near.ip("link set n1 down")
                dialer._planner.watching().on_readable()
                lab.near.ip("link set n1 up", "route add default via 198.18.1.1 dev n1 metric 1001")
                while dialer._planner.watching().on_readable():
                    pass

        dialer._way = flapping
        with await connector.connect(V4, 80) as sock:
            assert sock.send(b"x") == 1


async def test_news_that_say_nothing_of_it_leave_a_repeated_connect_alone(lab: Lab, far: list[socket.socket]) -> None:
    async with aiobind.Connector("if!n1") as connector, asyncio.timeout(5):
        await warm(connector)
        lab.far.ip("route add blackhole 198.18.1.2/32")
        attempt = asyncio.ensure_future(connector.connect(V4, 80))
        await asyncio.sleep(0.02)
        lab.near.ip("link set n2 down", "addr add 198.18.1.55/32 dev n1")
        await asyncio.sleep(0.02)
        assert not attempt.done()
        lab.far.ip("route del blackhole 198.18.1.2/32")  # the next SYN is answered, after a second
        (await attempt).close()


@pytest.mark.parametrize("then", ["waits", "connects"])
async def test_a_way_whose_first_attempt_was_refused_is_guarded_like_any_other(
    lab: Lab, far: list[socket.socket], then: str
) -> None:
    """Nothing has told yet whether what it is bound to is there."""
    async with aiobind.Connector("if!n1", abort_on_link_down=True) as connector, asyncio.timeout(5):
        with pytest.raises(aiobind.ConnectError) as refused:
            await connector.connect(V4, 81)
        assert refused.value.errno == errno.ECONNREFUSED
        with lab.far:
            later = socket.create_server(("", 81))
        with later:
            sock = await connector.connect(V4, 81) if then == "connects" else None
            lab.far.ip("route add blackhole 198.18.1.2/32")
            attempt = asyncio.ensure_future(connector.connect(V4, 81))
            await asyncio.sleep(0.05)
            assert not attempt.done()
            lab.near.ip("link set n1 down")
            with pytest.raises(aiobind.BindError, match="n1 is down"):
                await attempt
            if sock is not None:
                with sock, pytest.raises(ConnectionResetError):
                    sock.send(b"x")


def interpose(connector: aiobind.Connector, after: Callable[[], object], *, times: int = 1) -> list[int]:
    """Do something right after a connect has ended, before whoever waits for it goes on; return their local ports."""
    dialer, ports = connector._dialer, list[int]()
    way = dialer._way
    assert way is not None

    async def interposed(sock: socket.socket, address: Any) -> None:
        try:
            await way(sock, address)
        finally:
            ports.append(sock.getsockname()[1])
            if len(ports) <= times:
                after()

    dialer._way = interposed
    return ports


@pytest.mark.parametrize("host", [V4, "198.18.1.1"], ids=["repeated", "first"])
@pytest.mark.parametrize("back", [False, True])
async def test_an_address_that_goes_as_a_connect_ends(
    lab: Lab, far: list[socket.socket], host: str, *, back: bool
) -> None:
    """Though the connect has ended well: the guard has shut the socket down, which nobody is to get."""
    async with aiobind.Connector("198.18.1.2") as connector:
        await warm(connector)
        watch = connector._dialer._planner.watching()

        def goes() -> None:
            lab.near.ip("addr add 198.18.1.7/32 dev n1", "addr del 198.18.1.2/24 dev n1")
            watch.on_readable()
            if back:
                lab.near.ip("addr add 198.18.1.2/24 dev n1")
                watch.on_readable()

        interpose(connector, goes)
        if host == V4 and back:
            with await connector.connect(host, 80) as sock:
                assert sock.send(b"x") == 1
        else:
            with pytest.raises(aiobind.BindError) as caught:
                await connector.connect(host, 80)
            assert caught.value.errno == errno.EADDRNOTAVAIL


@pytest.mark.parametrize("busy", [False, True])
async def test_what_changes_between_the_attempts_of_a_repeated_race(
    lab: Lab, far: list[socket.socket], witness: Witness, resolv_conf: Callable[..., None], *, busy: bool
) -> None:
    """The second one goes by what is true in the moment before its own SYN, also when nobody has read of it yet."""
    other = "203.0.113.81"
    lab.add_target(other)
    resolv_conf("", hosts=f"{other} two.test\n{V4} two.test\n")
    async with aiobind.Connector("if!n1", happy_eyeballs_delay=0.1) as connector, asyncio.timeout(5):
        for host in (V4, other, "two.test"):
            await warm(connector, host)
        lab.far.ip(f"addr del {other}/32 dev lo", f"route add blackhole {other}/32")
        witness.packets()
        attempt = asyncio.ensure_future(connector.connect("two.test", 80))
        await asyncio.sleep(0.02)
        assert {packet.destination for packet in witness.packets()} == {other}
        lab.near.ip("addr add 198.18.1.7/32 dev n1", "addr del 198.18.1.2/24 dev n1", "addr add 198.18.1.2/24 dev n2")
        until = time.monotonic() + 0.15
        while busy and time.monotonic() < until:  # the loop is kept from reading until the second one is due
            pass
        with await attempt as sock:
            assert aiobind.bound_source(sock)[1:3] == ("n1", "198.18.1.7")
        syns = {(packet.nic, packet.source) for packet in witness.packets() if packet.syn and packet.destination == V4}
        assert syns == {("n1", "198.18.1.7")}


@pytest.mark.parametrize("source", ["if!n1", "198.18.1.2", "127.0.0.2"])
@pytest.mark.parametrize("closed", [False, True])
async def test_a_connection_counts_whatever_else_has_changed_meanwhile(
    lab: Lab, far: list[socket.socket], source: str, *, closed: bool
) -> None:
    """It is not made a second time, nor where no interface lists the address (127.0.0.2)."""
    with socket.create_server(("127.0.0.1", 80)):
        host = "127.0.0.1" if source == "127.0.0.2" else V4
        async with aiobind.Connector(source) as connector:
            await warm(connector, host)
            watch = connector._dialer._planner.watching()

            def changes() -> None:
                if closed:
                    connector._dialer.close()
                lab.near.ip("addr add 192.0.2.9/32 dev n2")
                watch.on_readable()

            attempts = interpose(connector, changes)
            with await connector.connect(host, 80) as sock:
                assert attempts == [sock.getsockname()[1]]


async def test_an_answer_counts_whatever_else_has_changed_meanwhile(lab: Lab, far: list[socket.socket]) -> None:
    """The attempt was made as decided: it is not made again because of a NIC that has nothing to do with it."""
    async with aiobind.Connector("if!n1") as connector:
        await warm(connector)
        far[0].close()

        def changes() -> None:
            lab.near.ip("addr add 192.0.2.9/32 dev n2")
            connector._dialer._planner.watching().on_readable()

        attempts = interpose(connector, changes)
        with pytest.raises(aiobind.ConnectError) as caught:
            await connector.connect(V4, 80)
        assert caught.value.errno == errno.ECONNREFUSED
        assert len(attempts) == 1
        assert connector.stats()[0].failures == {"ECONNREFUSED": 1}


async def test_a_neighbour_that_does_not_answer_any_more(lab: Lab, far: list[socket.socket]) -> None:
    """It is found for a repeated connect as for the first."""
    gateway = "2001:db8:1::1"
    async with aiobind.Connector("if!n1") as connector, asyncio.timeout(8):
        await warm(connector, gateway)
        lab.far.ip(f"addr del {gateway}/64 dev f1")
        lab.near.ip("neigh flush dev n1", "route del ::/0 dev n1")
        with pytest.raises(aiobind.ConnectError, match=f"nobody answers for {gateway} on n1") as caught:
            await connector.connect(gateway, 80)
        assert caught.value.errno == errno.EHOSTUNREACH


@pytest.mark.parametrize("outcome", ["connected", "refused", "cancelled"])
async def test_nothing_is_watched_afterwards(lab: Lab, far: list[socket.socket], outcome: str) -> None:
    async with aiobind.Connector("if!n1") as connector:
        await warm(connector)
        watch = connector._dialer._planner.watching()
        if outcome == "refused":
            far[0].close()
        elif outcome == "cancelled":
            lab.far.ip("route add blackhole 198.18.1.2/32")
        attempt = asyncio.ensure_future(connector.connect(V4, 80))
        if outcome == "cancelled":
            await asyncio.sleep(0.02)
            assert len(watch._attempts) == 1
            attempt.cancel()
        (result,) = await asyncio.gather(attempt, return_exceptions=True)
        if isinstance(result, socket.socket):
            result.close()
        kinds = {"connected": socket.socket, "refused": aiobind.ConnectError, "cancelled": asyncio.CancelledError}
        assert isinstance(result, kinds[outcome])
        assert (len(watch._attempts), len(watch._guarded), len(watch.guards)) == (0, 0, 0)


_CALLS = """
    import asyncio, os, aiobind
    aiobind._interfaces._TRUST = 0.1  # under strace a connect takes milliseconds
    async def main():
        async with aiobind.Connector({source!r}, fast_connect={fast}) as connector:
            for number in range(40):
                if number > 9:
                    os.path.exists("/next")
                (await connector.connect({host!r}, 80)).close()
            os.path.exists("/next")
    {library}.run(main())
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
@pytest.mark.parametrize(
    ("library", "fast", "wait"),
    [
        ("asyncio", False, "epoll_ctl epoll_wait getsockopt epoll_wait epoll_ctl"),
        ("asyncio", True, "epoll_ctl epoll_wait epoll_wait epoll_wait"),
        ("import uvloop; uvloop", False, "epoll_ctl epoll_pwait epoll_wait"),
    ],
)
@pytest.mark.parametrize(
    ("source", "host", "options"),
    [("if!n1", V4, 3), ("if!n1", V6, 3), ("ifhost!n1!198.18.1.2", V4, 3), ("198.18.1.2", V4, 2)],
)
def test_the_system_calls_of_a_repeated_connect(
    lab: Lab,
    far: list[socket.socket],
    tmp_path: Path,
    library: str,
    wait: str,
    source: str,
    host: str,
    options: int,
    *,
    fast: bool,
) -> None:
    """Nothing on the netlink socket, and nothing but what one connect needs."""
    program = textwrap.dedent(_CALLS.format(library=library, source=source, host=host, fast=fast))
    trace = tmp_path / "trace"
    subprocess.run(["strace", "-qq", "-o", trace, sys.executable, "-c", program], check=True, timeout=60)
    connects = re.split(r'.*"/next".*\n', trace.read_text())[1:-1]
    assert len(connects) == 30
    # Python 3.11 asks for its own number whenever it is asked for the running loop.
    calls = Counter(" ".join(re.findall(r"(?m)^(?!getpid)(\w+)\(", text)) for text in connects)
    expected = ["socket", *["setsockopt"] * options, "bind", "connect", *wait.split(), "getsockname"]
    # One of them may have been held up, so that the table was looked at once.
    assert calls.most_common(1)[0][0].split() == [*expected, "getsockopt", "close"]


class Counting:
    """Counts what a loop is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = self.timers = 0

    def create_task(self, *args: Any, **keywords: Any) -> Any:
        self.tasks += 1
        return super().create_task(*args, **keywords)  # type: ignore[misc]

    def call_later(self, *args: Any, **keywords: Any) -> Any:
        self.timers += 1
        return super().call_later(*args, **keywords)  # type: ignore[misc]


class CountingAsyncio(Counting, asyncio.SelectorEventLoop):
    pass


class CountingUvloop(Counting, uvloop.Loop):
    pass


@pytest.mark.parametrize("new_loop", [CountingAsyncio, CountingUvloop])
@pytest.mark.parametrize("fast", [False, True], ids=["default", "fast"])
@pytest.mark.parametrize(
    ("sources", "host", "timers"),
    [
        (["if!n1"], V4, 0),
        (["if!n1", "if!n2"], V6, 0),
        (["198.18.1.2"], V4, 0),
        (["if!n1"], "two.test", 1),
        (["if!n1", "198.18.1.2"], "two.test", 1),
    ],
)
def test_no_task_and_no_timer_that_is_not_needed(
    lab: Lab,
    far: list[socket.socket],
    resolv_conf: Callable[..., None],
    new_loop: Callable[[], Any],
    sources: list[str],
    host: str,
    timers: int,
    *,
    fast: bool,
) -> None:
    """None for one address; for two, of which the first answers, the timer that would start the other one."""
    resolv_conf("", hosts=f"{V4} two.test\n198.18.1.1 two.test\n")

    async def main() -> None:
        async with aiobind.Connector(*sources, fast_connect=fast) as connector:
            for number in range(8):
                if number == 4:  # the one timer of all attempts is due in three seconds
                    loop.tasks = loop.timers = 0
                (await connector.connect(host, 80)).close()
            assert (loop.tasks, loop.timers) == (0, 4 * timers)

    loop = new_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


# ── what the kernel tells, and what it does not ──


async def test_a_neighbour_that_does_not_answer(lab: Lab, witness: Witness) -> None:
    """The kernel tells a pinned socket of it for IPv4 only, and not where the address is borrowed."""
    lab.near.ip(
        "route del ::/0 dev n1",  # else the kernel turns to that router when the other one does not answer
        "route replace 2001:db8:aaaa::/64 via 2001:db8:1::dead dev n1",
        "addr flush dev n2 scope global",
        "route add 192.0.2.0/24 dev n2",
        "neigh add 2001:db8:1::beef lladdr 02:00:00:00:00:99 dev n1",
    )

    async def failure(host: str, source: str, **options: Any) -> OSError | None:
        try:
            async with asyncio.timeout(4.5):
                (await aiobind.connect(host, 80, source=source, **options)).close()
        except TimeoutError:
            return None
        except OSError as error:
            return error
        raise AssertionError("nobody is there")

    *silent, gone, black_hole = await asyncio.gather(
        failure("2001:db8:1::77", "if!n1"),
        failure("2001:db8:aaaa::7", "if!n1"),  # the gateway
        failure("192.0.2.7", "if!n2", borrow=True),
        failure("198.18.1.77", "if!n1"),
        failure("2001:db8:1::beef", "if!n1"),  # somebody is there, and swallows it all
    )
    for error in (*silent, gone):
        assert isinstance(error, aiobind.ConnectError)
        assert error.errno == errno.EHOSTUNREACH
    for error, hop in zip(silent, ("2001:db8:1::77 on n1", "2001:db8:1::dead on n1", "192.0.2.7 on n2"), strict=True):
        assert f"nobody answers for {hop}" in str(error)
    assert black_hole is None
    assert {packet.destination for packet in witness.packets() if packet.syn} == {"2001:db8:1::beef"}


async def test_a_neighbour_that_is_lost_later(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for again, each second, also when no other attempt comes."""
    lab.near.ip("neigh add 2001:db8:1::beef lladdr 02:00:00:00:00:99 dev n1")
    answers = [None, "2001:db8:1::beef"]
    monkeypatch.setattr(_interfaces, "_NEIGHBOUR_TIMEOUT", 0.05)
    monkeypatch.setattr(platform, "silent_hop", lambda *_: answers.pop(0))
    async with asyncio.timeout(10):
        with pytest.raises(aiobind.ConnectError, match="nobody answers for 2001:db8:1::beef on n1"):
            await aiobind.connect("2001:db8:1::beef", 80, source="if!n1")
    assert not answers


async def test_a_way_that_this_host_does_not_have_is_the_sources_failure(
    lab: Lab, far: list[socket.socket], witness: Witness
) -> None:
    """The kernel says the same of itself and for a router; only then something was sent."""
    lab.near.ip("route del default dev n1", "route del ::/0 dev n1")
    lab.far.sysctl("ipv6.conf.all.forwarding", 1)
    async with aiobind.Connector("if!n1", "if!n2", policy=InOrder()) as connector:
        with await connector.connect(V6, 80) as sock:
            assert aiobind.bound_source(sock).interface == "n2"
        with pytest.raises(aiobind.BindError, match="the source has no route there") as caught:
            await connector.connect(V6, 80, source="if!n1")
        assert caught.value.errno == errno.ENETUNREACH
    assert {nic for nic, _, _ in connections(witness)} == {"n2"}
    async with aiobind.Connector("if!n2", "if!n0", policy=InOrder()) as connector:
        with pytest.raises(aiobind.ConnectError, match="a router says so") as refused:
            await connector.connect("2001:db8:dddd::7", 80)
        assert refused.value.errno == errno.ENETUNREACH
    assert {nic for nic, _, _ in connections(witness)} == {"n2"}


class InOrder:
    def order(self, sources: Any, host: str) -> Any:
        return sources


@pytest.mark.parametrize("source", ["127.0.0.2", "if!lo"])
async def test_a_local_address_that_is_not_the_promised_one(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Should the system ever bind another address than it was told to, no byte is sent from it."""
    bind = platform.bind

    def elsewhere(sock: socket.socket, ip: Any, port: int | None, **keywords: Any) -> None:
        bind(sock, ip + 7, port, **keywords)

    with socket.create_server(("127.1.0.1", 80)) as server:
        monkeypatch.setattr(platform, "bind", elsewhere)
        with pytest.raises(aiobind.BindError, match=r"the system connected from 127\.0\.0\.[89] instead of") as caught:
            await aiobind.connect("127.1.0.1", 80, source=source)
        assert caught.value.errno == errno.EADDRNOTAVAIL
        server.setblocking(False)
        accepted, _ = server.accept()
        with accepted:
            accepted.setblocking(False)
            assert accepted.recv(1) == b""  # closed, and nothing was sent


def test_every_option_is_one_of_both_connectors() -> None:
    import inspect

    from aiobind.aiohttp import BoundTCPConnector

    ours: Any = inspect.signature(aiobind.Connector).parameters
    theirs: Any = inspect.signature(BoundTCPConnector).parameters
    assert set(ours) <= set(theirs)
    assert all(ours[name].default == theirs[name].default for name in set(ours) - {"ttl_dns_cache"})
