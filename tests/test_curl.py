"""curl's own tests of ``--interface``, as ours: what curl expects, what aiobind does, and why where they differ.

A row has the number of curl's test (``tests/data/testN``, ``tests/unit/unitN.c``; "docs" is curl.1), the input, curl's
expectation and ours, and a reason where the two differ, only there and always: the tests hold that. The expectations
are those of curl 8.21, beside them what it did before 8.9, which brought ``ifhost!`` and refused empty names. The curl
that is installed shows that they are true. 1009 and 1047 to 1049 are about FTP and TFTP: here they go by HTTP.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import socket
import subprocess
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import aiohttp
import pytest
from test_race import Course, Try

import aiobind
from aiobind import Address, BindError, ConnectError, Host, Interface, InvalidSource, ResolveError, Source
from aiobind._binding import Target
from aiobind._race import interleave
from aiobind.aiohttp import BoundTCPConnector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from aiobind.lab import Lab

OLDEST, NEWEST = (7, 81), (8, 21)  # what the tables know of

# --- curl, and somebody to talk to --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def version() -> tuple[int, ...]:
    """The version of the installed curl."""
    text = subprocess.check_output(["curl", "--version"], text=True) if shutil.which("curl") else "none"
    number = tuple(map(int, re.findall(r"\d+", text)[:2]))
    if not OLDEST <= number <= NEWEST:
        reason = f"the tables know curl 7.81 to 8.21, and here is {text[:11]}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return number


PORT, DEAD = 8080, 9  # nobody listens on the second one
V4, V6 = f"127.0.0.1:{PORT}", f"[::1]:{PORT}"
DEAD4, DEAD6 = f"127.0.0.1:{DEAD}", f"[::1]:{DEAD}"
FAR4, FAR6 = f"203.0.113.80:{PORT}", f"[2001:db8:ffff::80]:{PORT}"
BOTH, SLOW, LOST = f"both.test:{PORT}", f"slow.test:{PORT}", f"nowhere.test:{PORT}"
HOSTS = "::1 ip6-localhost both.test\n127.0.0.1 both.test\n2001:db8:1::dead slow.test\n203.0.113.80 slow.test\n"


@pytest.fixture
def place(lab: Lab, resolv_conf: Callable[..., None]) -> Lab:
    """A lab where names are known by /etc/hosts, and a name server does not answer."""
    resolv_conf("", hosts=HOSTS)
    return lab


@asynccontextmanager
async def serving(lab: Lab, taken: Sequence[int] = ()) -> AsyncIterator[list[Any]]:
    """Tell whoever comes to PORT, here or on the far side, whence and by which NIC; occupy the ports *taken*."""

    class Answer(asyncio.Protocol):
        def __init__(self, nic: str) -> None:
            self.nic = nic

        def connection_made(self, transport: Any) -> None:
            came.append(transport)
            self.transport = transport

        def data_received(self, _: bytes) -> None:
            peer = "{} {} {}\n".format(*self.transport.get_extra_info("peername")[:2], self.nic)
            self.transport.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(peer)}\r\n\r\n{peer}".encode())

    came: list[Any] = []
    listeners = [(socket.create_server(("127.0.0.1", port)), "") for port in taken]
    for namespace, device, nic in [(lab.near, "lo", "lo"), *((lab.far, nic.far_name, nic.name) for nic in lab.nics)]:
        for family in (socket.AF_INET, socket.AF_INET6):
            with namespace:
                listeners.append((sock := socket.socket(family), nic))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(("", PORT))
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(partial(Answer, nic), sock=sock) for sock, nic in listeners]
    try:
        yield came
    finally:
        for transport in came:
            transport.abort()
        for server in servers:
            server.close()


async def curl(lab: Lab, *arguments: str, taken: Sequence[int] = ()) -> tuple[int, str]:
    """Run it beside somebody who answers; return the exit status and the output."""
    command = (shutil.which("curl") or "curl", "-q", "-sS", "--max-time", "10", *arguments)  # -q: no ~/.curlrc
    async with serving(lab, taken):
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env={})  # no proxies
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


# --- the grammar: unit1663, and what lib/cf-socket.c does with it -------------------------------------------


class Text(NamedTuple):
    text: str
    curl: dict[str, str] | None  # what Curl_parse_interface finds; None: CURLE_BAD_FUNCTION_ARGUMENT
    ours: Source | str  # or the reason why it is refused
    why: str = ""
    before: tuple[int, ...] = (45,)  # the exit status before 8.9
    since: tuple[int, ...] = ()  # since 8.9; by default 45, for no such thing exists, and 43 for an error

    def statuses(self, version: tuple[int, ...]) -> tuple[int, ...]:
        if version < (8, 9):
            return self.before
        if self.since or self.curl:
            return self.since or (45,)
        return (43,) if version >= (8, 18) else UNPINNED  # until then the command dropped the parser's error


UNPINNED = (0,)  # connected, by any interface
BARE, INCOMPLETE = "neither an IP address nor a text that starts with", "the address or host is missing"
NAMELESS, LONG, CASE = "the interface name is empty", "longer than 15 bytes", "exactly so, in lower case"
LOOKED_UP = "curl asks the DNS for what is no interface: a typing error leaves the host"
NO_NAME = "curl pins to the empty name, which is to none"
NO_DEVICE = "no device can have such a name, so no socket is made; curl asks the system first"
SPLIT = "the name of a device may hold a '!', and that of a host may not"
ONE_TEXT = "an address has one text, so that equal sources are equal"
ANY = "curl binds to every address, which is to none"
X16, X255, X513 = "x" * 16, "x" * 255, "x" * 513

GRAMMAR = [
    Text("dev", {"dev": "dev"}, BARE, LOOKED_UP),
    Text("if!eth0", {"iface": "eth0"}, Interface("eth0")),
    Text("host!myname", {"host": "myname"}, Host("myname")),
    Text("ifhost!eth0!myname", {"iface": "eth0", "host": "myname"}, Interface("eth0", Host("myname"))),
    Text("", None, BARE, before=(*UNPINNED, 2), since=(2,)),  # 2: the command itself refuses it since 8.6
    Text("!", {"dev": "!"}, CASE, LOOKED_UP),
    Text("if!", None, NAMELESS, before=UNPINNED),
    Text("if!eth0!blubb", {"iface": "eth0!blubb"}, Interface("eth0!blubb")),
    Text("host!", None, "the host name is empty"),
    Text("ifhost!", None, INCOMPLETE),
    Text("ifhost!eth0", None, INCOMPLETE),
    Text("ifhost!eth0!", None, INCOMPLETE),
    # not in unit1663
    Text("127.0.0.1", {"dev": "127.0.0.1"}, Address("127.0.0.1"), before=(0,), since=(0,)),
    Text("host!127.0.0.1", {"host": "127.0.0.1"}, Address("127.0.0.1"), ONE_TEXT, before=(0,), since=(0,)),
    Text("127.1", {"dev": "127.1"}, "four decimal numbers", "getaddrinfo guesses", before=(0,), since=(0,)),
    Text("[::1]", {"dev": "[::1]"}, "without brackets and port", LOOKED_UP),
    Text("0.0.0.0", {"dev": "0.0.0.0"}, "unspecified", ANY, before=UNPINNED, since=UNPINNED),
    Text("IF!eth0", {"dev": "IF!eth0"}, CASE, LOOKED_UP),
    Text("ifhost!!127.0.0.1", {"iface": "", "host": "127.0.0.1"}, NAMELESS, NO_NAME, since=UNPINNED),
    Text("ifhost!eth0!a!b", {"iface": "eth0", "host": "a!b"}, Interface("eth0!a", Host("b")), SPLIT),
    Text(f"if!{X16}", {"iface": X16}, LONG, NO_DEVICE),
    Text(f"if!{X255}", {"iface": X255}, LONG, NO_DEVICE, before=UNPINNED, since=(43,)),
    Text(X513, None, BARE, before=UNPINNED),
]
grammar = pytest.mark.parametrize("row", GRAMMAR, ids=[row.text[:20] or "empty" for row in GRAMMAR])


@grammar
def test_grammar(row: Text) -> None:
    reading: dict[str, str] | None = None
    if isinstance(row.ours, str):
        with pytest.raises(InvalidSource) as caught:
            aiobind.parse_source(row.text)
        assert row.ours in caught.value.reason
    else:
        match aiobind.parse_source(row.text):
            case Interface(name, None):
                reading = {"iface": name}
            case Interface(name, Host(host)):
                reading = {"iface": name, "host": host}
            case Host(host):
                reading = {"host": host}
            case address:
                reading = {"dev": str(address)}
        assert aiobind.parse_source(row.text) == row.ours
    assert bool(row.why) == (row.curl != reading)


@grammar
def test_grammar_of_curl(row: Text, place: Lab, version: tuple[int, ...]) -> None:
    status, _ = asyncio.run(curl(place, "--interface", row.text, f"http://{V4}/"))
    assert status in row.statuses(version)


# --- sources, errors and local ports: tests/data and curl.1 -------------------------------------------------


class Fault(NamedTuple):
    whose: Literal["source", "destination"]
    kind: type[Exception]
    errno: int | None = None  # None: none, or that of the kernel's version


REFUSED = Fault("source", InvalidSource)
UNKNOWN = Fault("source", ResolveError, socket.EAI_AGAIN)
MISSING = Fault("source", BindError, errno.ENODEV)
UNUSABLE = Fault("source", BindError, errno.EADDRNOTAVAIL)
NO_PORT = Fault("source", BindError, errno.EADDRNOTAVAIL)
NOBODY = Fault("destination", ConnectError, errno.ECONNREFUSED)
NO_SUCH_NAME = Fault("destination", ResolveError, socket.EAI_AGAIN)

#: An option that is none, CURLE_COULDNT_RESOLVE_HOST, CURLE_COULDNT_CONNECT, CURLE_INTERFACE_FAILED
WHOSE = {2: "source", 6: "destination", 7: "destination", 45: "source"}


class Row(NamedTuple):
    test: str
    source: str
    target: str
    curl: str | int  # from where the connection came, or the exit status
    ours: str | Fault
    why: str = ""
    before: str | int | None = None  # what curl did before 8.9
    family: int = 0
    ports: range | None = None
    taken: tuple[int, ...] = ()


LO4, LO6 = "127.0.0.1 by lo", "::1 by lo"
N0, N1, N2 = "198.18.1.2 by n0", "198.18.1.2 by n1", "198.18.2.2 by n2"
GONE = "non-existing-host.haxx.se."
RANGE, TWO, BELOW = range(44444, 45445), range(44444, 44446), range(20000, 20010)  # (32768 to 60999 is automatic)
BLAME = "curl says that it cannot connect; the destination was not asked"
WRONG_CASE = "curl takes N1 for n1, and pins nothing"
IGNORED = "curl ignores that the pin has failed where an address follows; its manual says 45"
FORGOTTEN = "curl is done once the device is pinned, and forgets the ports"

ROWS = [
    Row("1045 numeric", "127.0.0.1", V4, LO4, LO4),
    Row("1046 numeric", "::1", V6, LO6, LO6),
    Row("1082 IPv4 only", "127.0.0.1", BOTH, LO4, LO4, family=socket.AF_INET),
    Row("1083 name", "ip6-localhost", V6, LO6, REFUSED, LOOKED_UP),
    Row("1083 name", "host!ip6-localhost", V6, LO6, LO6),
    Row("1084 invalid source", GONE, DEAD4, 45, REFUSED),
    Row("1084 invalid source", f"host!{GONE}", DEAD4, 45, UNKNOWN),
    Row("1085 invalid source", GONE, DEAD6, 45, REFUSED),
    Row("1085 invalid source", f"host!{GONE}", DEAD6, 45, UNKNOWN),
    Row("1084 valid source", "127.0.0.1", DEAD4, 7, NOBODY),
    Row("1085 valid source", "::1", DEAD6, 7, NOBODY),
    Row("1084 invalid target", "127.0.0.1", LOST, 6, NO_SUCH_NAME),
    Row("1084 both invalid", f"host!{GONE}", LOST, 6, NO_SUCH_NAME),
    Row("nobody's address", "203.0.113.99", V4, 45, UNUSABLE),
    Row("other family", "127.0.0.1", V6, 7, UNUSABLE, BLAME),
    Row("other family", "::1", V4, 7, UNUSABLE, BLAME),
    Row("docs if!", "if!lo", V4, LO4, LO4),
    Row("docs if!", "if!n1", FAR4, N1, N1),
    Row("docs if!", "if!n1", FAR6, "2001:db8:1::2 by n1", "2001:db8:1::2 by n1"),
    Row("docs if! without match", "if!eth0", V4, 45, MISSING),
    Row("docs if! without match", "if!N1", FAR4, N0, MISSING, WRONG_CASE),
    Row("docs ifhost!", "ifhost!n1!198.18.1.2", FAR4, N1, N1, before=45),
    Row("docs ifhost! without match", "ifhost!eth0!198.18.1.2", FAR4, N0, MISSING, IGNORED, before=45),
    Row("docs host!", "host!198.18.1.2", FAR4, N0, N0),
    Row("2600 black hole", "if!n1", SLOW, N1, N1),
    Row("1009 ports", "127.0.0.1", V4, f"{LO4}, in range", f"{LO4}, in range", ports=RANGE),
    Row("1009 one port", "127.0.0.1", V4, f"{LO4}, in range", f"{LO4}, in range", ports=range(32763, 32764)),
    Row("1009 no port", "127.0.0.1", V4, 2, Fault("source", ValueError), ports=range(65535, 65537)),
    Row("1009 first taken", "127.0.0.1", V4, f"{LO4}, in range", f"{LO4}, in range", ports=TWO, taken=(44444,)),
    Row("1009 all taken", "127.0.0.1", V4, 45, NO_PORT, ports=BELOW, taken=tuple(BELOW)),
    Row("1009 both taken", "127.0.0.1", V4, 45, Fault("source", BindError), ports=TWO, taken=tuple(TWO)),
    Row("1009 if!", "if!n1", FAR4, f"{N1}, any port", f"{N1}, in range", FORGOTTEN, ports=BELOW),
    Row("1009 host!", "host!198.18.1.2", FAR4, f"{N0}, in range", f"{N0}, in range", ports=BELOW),
]
rows = pytest.mark.parametrize("row", ROWS, ids=[f"{row.test}, {row.source}, {row.target}" for row in ROWS])


def shown(peer: str, ports: range | None) -> str:
    address, port, nic = peer.split()
    return f"{address} by {nic}" + ("" if ports is None else ", in range" if int(port) in ports else ", any port")


@rows
def test_curl(row: Row, place: Lab, version: tuple[int, ...]) -> None:
    options = ["--interface", row.source, *(["-4"] if row.family else [])]
    if row.ports is not None:
        options += ["--local-port", f"{row.ports[0]}-{row.ports[-1]}"]
    status, peer = asyncio.run(curl(place, *options, f"http://{row.target}/", taken=row.taken))
    expected = row.curl if row.before is None or version >= (8, 9) else row.before
    assert (status or shown(peer, row.ports)) == expected


@rows
@pytest.mark.anyio
async def test_ours(row: Row, place: Lab) -> None:
    async with serving(place, row.taken) as came:
        if isinstance(row.ours, str):
            assert shown(await ask(row), row.ports) == row.ours
            differs = row.ours != row.curl
        else:
            with pytest.raises(row.ours.kind) as caught:
                await ask(row)
            error: Any = caught.value
            assert row.ours.errno is None or error.errno == row.ours.errno
            if isinstance(error, ResolveError):
                assert (error.source is not None) == (row.ours.whose == "source")
            assert not came
            differs = isinstance(row.curl, str) or WHOSE[row.curl] != row.ours.whose
    assert bool(row.why) == differs


async def ask(row: Row) -> str:
    """Return what the server sees, which is what aiobind tells."""
    host, _, port = row.target.rpartition(":")
    async with aiobind.Connector(row.source, local_ports=row.ports) as connector, asyncio.timeout(10):
        reader, writer = await connector.open_connection(host.strip("[]"), int(port), family=row.family)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        bound = aiobind.bound_source(writer)
        await reader.readuntil(b"\r\n\r\n")
        peer = (await reader.readline()).decode()
        writer.close()
        await writer.wait_closed()
    assert peer.split()[:2] == [bound.address, str(bound.port)]
    return peer


# --- reuse: 435 ---------------------------------------------------------------------------------------------


class Reuse(NamedTuple):
    sources: tuple[str, str]
    target: str
    curl: tuple[list[str], int]  # from where two requests came, by how many connections
    ours: tuple[list[str], int]
    why: str = ""
    before: tuple[list[str], int] | None = None  # what curl did before 8.9


POOL = "curl's pool knows bare names only (lib/url.c, localdev), and gives who asks for n2 the connection of n1"

REUSE = [
    Reuse(("127.0.0.1", "127.0.0.1"), V4, ([LO4, LO4], 1), ([LO4, LO4], 1)),
    Reuse(("if!n1", "if!n1"), FAR4, ([N1, N1], 1), ([N1, N1], 1)),
    Reuse(("if!n1", "if!n2"), FAR4, ([N1, N1], 1), ([N1, N2], 2), POOL, before=([N1, N2], 2)),
]
reuses = pytest.mark.parametrize("row", REUSE, ids=[" ".join(row.sources) for row in REUSE])


@reuses
def test_reuse_by_curl(row: Reuse, place: Lab, version: tuple[int, ...]) -> None:
    tell = "%{local_ip} %{local_port}\n"
    first, second = (("-sS", "-w", tell, "--interface", source, f"http://{row.target}/") for source in row.sources)
    status, output = asyncio.run(curl(place, *first, "--next", *second))
    peers, told = output.splitlines()[::2], output.splitlines()[1::2]
    assert (status, told) == (0, [peer.rpartition(" ")[0] for peer in peers])
    expected = row.before if row.before and version < (8, 9) else row.curl
    assert ([shown(peer, None) for peer in peers], len(set(peers))) == expected


@reuses
@pytest.mark.anyio
async def test_reuse_by_us(row: Reuse, place: Lab) -> None:
    peers = []
    async with serving(place), aiohttp.ClientSession(connector=BoundTCPConnector(row.sources[0])) as client:
        for source in row.sources:
            with aiobind.use_source(source):
                async with client.get(f"http://{row.target}/") as response:
                    peers.append(await response.text())
            bound = aiobind.bound_source(response)
            assert peers[-1].split()[:2] == [bound.address, str(bound.port)]
    assert ([shown(peer, None) for peer in peers], len(set(peers))) == row.ours
    assert bool(row.why) == (row.curl != row.ours)


# --- the race: unit2600 -------------------------------------------------------------------------------------


class Race(NamedTuple):
    """What curl expects when each attempt fails after *fails* seconds."""

    number: int
    addresses: str
    delay: float  # CURLOPT_HAPPY_EYEBALLS_TIMEOUT_MS, in seconds
    fails: float
    v4: int  # attempts
    v6: int
    lasts: float  # or longer
    at_once: int  # attempts
    ours: float  # how long it takes us, with that delay
    default: float  # and with our 250 ms; curl's own default is 200
    first: str = ""  # the family, where there are two
    family: int = 0
    differs: tuple[str, str] | None = None  # in what, and why


ORDER = "curl begins with IPv6; our order is that of getaddrinfo, which is RFC 6724's"
LIMIT = "curl gives the oldest attempt up for a seventh (since 8.20): RFC 8305 does not, and the oldest may yet win"
NINE = "::1,192.0.2.1,::2,::3,::4,::5,::6,::7,::8"

#: curl since 8.16. Before, the two families raced, and each went through its addresses one after the other.
RACES = [
    Race(1, "192.0.2.1", 0.15, 0.25, 1, 0, 0.2, 1, 0.25, 0.25),
    Race(2, "192.0.2.1,192.0.2.2", 0.15, 0.25, 2, 0, 0.4, 2, 0.4, 0.5),
    Race(3, "::1", 0.15, 0.25, 0, 1, 0.2, 1, 0.25, 0.25),
    Race(4, "::1,::2", 0.15, 0.25, 0, 2, 0.4, 2, 0.4, 0.5),
    Race(5, "192.0.2.1,::1", 0.15, 0.25, 1, 1, 0.35, 2, 0.4, 0.5, "v6", differs=("first", ORDER)),
    Race(6, "::1,192.0.2.1", 0.15, 0.25, 1, 1, 0.35, 2, 0.4, 0.5, "v6"),
    Race(7, "192.0.2.1,::1", 0.15, 0.5, 1, 0, 0.4, 1, 0.5, 0.5, family=socket.AF_INET),
    Race(8, "::1,192.0.2.1", 0.15, 0.5, 0, 1, 0.4, 1, 0.5, 0.5, family=socket.AF_INET6),
    Race(9, "::1,192.0.2.1,::2,::3", 0.05, 0.4, 1, 3, 0.55, 4, 0.55, 1.05, "v6"),
    Race(10, NINE, 0.02, 0.5, 1, 8, 0.55, 6, 0.66, 2.5, "v6", differs=("at_once", LIMIT)),
]


@pytest.mark.parametrize("row", RACES, ids=[f"unit2600 {row.number}" for row in RACES])
def test_race(row: Race) -> None:
    resolved = [Target.of(ip_address(address), 123) for address in row.addresses.split(",")]
    first = resolved[0].family
    resolved.sort(key=lambda target: target.family != first)  # getaddrinfo does not alternate
    order = interleave([target for target in resolved if row.family in (0, target.family)])
    families = ["v4" if target.family == socket.AF_INET else "v6" for target in order]
    tries = [Try(row.fails, "fails")] * len(order)
    course = Course(tries, row.delay).run()
    starts = dict(zip(reversed(families), reversed(course.starts), strict=True))  # the first one of each family
    found = {
        "v4": families.count("v4"),
        "v6": families.count("v6"),
        "at_once": max(sum(start <= now < start + row.fails for start in course.starts) for now in course.starts),
        "first": families[0] if len(starts) == 2 else "",
    }
    assert [name for name in found if getattr(row, name) != found[name]] == ([row.differs[0]] if row.differs else [])
    assert sorted(starts.values()) == pytest.approx([0, row.delay][: len(starts)])
    assert course.ended == pytest.approx(row.ours)
    assert course.ended >= row.lasts
    assert Course(tries, 0.25).run().ended == pytest.approx(row.default)


@pytest.mark.anyio
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
async def test_one_family_only(place: Lab, family: int, address: str) -> None:
    """Cases 7 and 8 on real sockets: the name has an address of the other family, which is not tried."""
    with pytest.raises(ConnectError) as caught:
        await aiobind.connect("both.test", DEAD, source="if!lo", family=family)
    assert [attempt.address.rpartition(":")[0].strip("[]") for attempt in caught.value.attempts] == [address]
