"""The figures of one source are true, whichever way its connections end and whoever asks."""

from __future__ import annotations

import errno
import gc
import math
import os
import socket
import threading
from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from opened import open_bound

from aiobind import _origin, parse_source
from aiobind._binding import Binding, Target
from aiobind._health import Breaker
from aiobind._origin import Origin
from aiobind._sockets import BoundSource, Kind

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterator

    from aiobind._sockets import BoundSocket

V4, V6 = socket.AF_INET, socket.AF_INET6
WHY = OSError(errno.ENETUNREACH, "no route")


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_origin, "time", clock)
    return clock


class Peer:
    """Accepts what an origin connects."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.server = socket.create_server((host, 0), backlog=1000)
        self.target = Target.of(ip_address(host), self.server.getsockname()[1])
        self.accepted: list[socket.socket] = []

    def connect(self, origin: Origin, local: str = "127.0.0.2") -> BoundSocket:
        sock = open_bound(Binding(local=(ip_address(local),)), self.target)
        sock.setblocking(True)
        sock.settimeout(10)
        sock.connect(self.target.sockaddr)
        sock.target = self.target
        sock.bound = BoundSource(origin.source, None, *sock.getsockname())
        origin.opened(sock)
        self.accepted.append(self.server.accept()[0])
        return sock

    def close(self) -> None:
        for sock in (self.server, *self.accepted):
            sock.close()

    def __str__(self) -> str:
        return str(self.target)


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def make(*host: str) -> Peer:
        peers.append(Peer(*host))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def peer(make_peer: Callable[..., Peer]) -> Peer:
    return make_peer()


def an_origin(text: str = "127.0.0.2", *, pooled: bool = False) -> Origin:
    return Origin(parse_source(text), pooled=pooled)


# ── connections ──


def test_a_new_one_has_no_figures(clock: Clock) -> None:
    origin = an_origin()
    assert origin.stats() == (origin.source, 0, 0, 0, 0, {}, None, None, None, 0, 0, {})
    assert origin.sockets == []


def by_close(sock: BoundSocket) -> None:
    sock.close()
    sock.close()


def by_detach(sock: BoundSocket) -> None:  # as uvloop does
    os.close(sock.detach())


def by_makefile(sock: BoundSocket) -> None:
    with sock.makefile():
        sock.close()
        assert sock.fileno() >= 0  # it is open until then


@pytest.mark.parametrize("end", [by_close, by_detach, by_makefile])
def test_a_connection_counts_until_it_ends(peer: Peer, end: Callable[[BoundSocket], None]) -> None:
    origin = an_origin()
    first, second = peer.connect(origin), peer.connect(origin)
    assert origin.stats()[1:5] == (2, 2, 0, 2)
    assert sorted(sock.fileno() for sock in origin.sockets) == sorted([first.fileno(), second.fileno()])
    end(first)
    assert origin.stats()[1:5] == (1, 1, 0, 2)
    assert origin.sockets == [second]
    end(second)
    assert origin.stats()[1:5] == (0, 0, 0, 2)
    assert origin.sockets == []


@pytest.mark.parametrize("cycle", [False, True])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_connection_that_is_forgotten_has_ended(peer: Peer, *, cycle: bool) -> None:
    origin = an_origin()
    sock: Any = peer.connect(origin)
    if cycle:  # then its weak references are gone before it can say anything
        sock.user = lambda sock=sock: sock  # a cycle
    del sock
    gc.collect()
    assert origin.stats()[1:5] == (0, 0, 0, 1)
    assert origin.sockets == []


def test_a_descriptor_that_is_another_connections_by_now(peer: Peer) -> None:
    """uvloop closes the descriptor by itself, and the socket hears of it late."""
    origin = an_origin()
    first = peer.connect(origin)
    number = first.fileno()
    os.close(number)
    second = peer.connect(origin)
    assert second.fileno() == number
    first.detach()
    assert origin.sockets == [second]
    assert origin.connections == 1
    second.close()
    assert (origin.sockets, origin.connections) == ([], 0)


def test_in_use_is_what_the_pool_has_handed_out(peer: Peer) -> None:
    origin = an_origin(pooled=True)
    sock = peer.connect(origin)
    assert (origin.connections, origin.in_use) == (1, 0)
    origin.handed_out()
    assert (origin.connections, origin.in_use) == (1, 1)
    origin.given_back()
    assert origin.stats(1)[1:4] == (1, 0, 1)
    sock.close()


def test_each_change_is_told(peer: Peer) -> None:
    told: list[tuple[int, int, int]] = []
    origin = an_origin(pooled=True)
    origin.on_change = lambda view: told.append((view.connections, view.in_use, view.failures))
    sock = peer.connect(origin)
    origin.handed_out()
    origin.failed(WHY)
    origin.given_back()
    sock.close()
    assert told == [(1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1), (0, 0, 1)]
    origin.begins()
    assert (len(told), origin.connecting) == (6, 1)
    origin.has_ended()
    assert (len(told), origin.connecting) == (7, 0)


def test_a_policy_that_fails_at_a_change_harms_nobody(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    def fail(view: object) -> None:
        raise LookupError("no policy today")

    origin = an_origin()
    origin.on_change = fail
    sock, told = peer.connect(origin), []
    sock.register(lambda *_: told.append("the next one as well"))
    sock.close()
    assert (origin.connections, told) == (0, ["the next one as well"])
    assert [record.getMessage() for record in caplog.records] == ["the policy failed at a change of 127.0.0.2"] * 2


# ── what it has carried ──


def receive(sock: socket.socket, count: int) -> None:
    while count:
        count -= len(sock.recv(count))


def test_bytes_of_all_connections_ever_made(peer: Peer) -> None:
    origin, sent, received = an_origin(), 0, 0
    for number in (0, 1, 5000):
        sock = peer.connect(origin)
        far = peer.accepted[-1]
        sock.sendall(b"x" * number)
        receive(far, number)
        far.sendall(b"y" * (number + 7))
        receive(sock, number + 7)
        sent, received = sent + number, received + number + 7
        assert (origin.stats().bytes_sent, origin.stats().bytes_received) == (sent, received)  # while it is open
        sock.close()
        assert (origin.stats().bytes_sent, origin.stats().bytes_received) == (sent, received)
    assert (origin.bytes_sent, origin.bytes_received) == (5001, 5022)


def test_what_was_last_seen_stands_where_nobody_can_be_asked(peer: Peer) -> None:
    """uvloop closes the descriptor, and tells the socket then."""
    origin = an_origin()
    sock = peer.connect(origin)
    sock.sendall(b"12345")
    receive(peer.accepted[-1], 5)
    assert origin.stats().bytes_sent == 5
    os.close(sock.fileno())
    assert origin.stats().bytes_sent == 5
    sock.detach()
    assert origin.stats()[1:5] == (0, 0, 0, 1)
    assert (origin.stats().bytes_sent, origin.stats().ports) == (5, {str(peer): 1})  # as far as anybody knows


def test_a_socket_without_such_counts(peer: Peer) -> None:
    origin = an_origin()
    sock = open_bound(Binding(local=(ip_address("127.0.0.2"),)), peer.target, kind=Kind(socket.SOCK_DGRAM))
    sock.target, sock.bound = peer.target, BoundSource(origin.source, None, "127.0.0.2", 1)
    origin.opened(sock)
    assert origin.stats()[9:] == (0, 0, {str(peer): 1})
    sock.close()
    assert origin.stats()[9:] == (0, 0, {})


# ── ports ──


def we_first(sock: BoundSocket, far: socket.socket) -> None:
    sock.close()


def the_peer_first(sock: BoundSocket, far: socket.socket) -> None:
    far.close()
    assert sock.recv(1) == b""
    sock.close()


def the_peer_resets(sock: BoundSocket, far: socket.socket) -> None:
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    far.close()
    with suppress(ConnectionResetError):
        sock.recv(1)
    sock.close()


@pytest.mark.parametrize(("end", "lingers"), [(we_first, True), (the_peer_first, False), (the_peer_resets, False)])
def test_who_closes_first_keeps_the_port(
    clock: Clock, peer: Peer, end: Callable[[BoundSocket, socket.socket], None], *, lingers: bool
) -> None:
    origin = an_origin()
    sock = peer.connect(origin)
    assert origin.stats().ports == {str(peer): 1}
    end(sock, peer.accepted[-1])
    assert origin.stats().ports == ({str(peer): 1} if lingers else {})
    clock.now += 59.9
    assert origin.ports_to(peer.target) == lingers
    clock.now += 0.1
    assert origin.ports_to(peer.target) == 0
    assert (origin.ports, len(origin._lingering)) == ({}, 0)


def test_ports_are_counted_for_each_target(clock: Clock, make_peer: Callable[..., Peer]) -> None:
    origin, one, two = an_origin(), make_peer(), make_peer("127.0.0.3")
    open_one = [one.connect(origin) for _ in range(3)]
    open_two = [two.connect(origin) for _ in range(2)]
    assert origin.stats().ports == {str(one): 3, str(two): 2}
    open_one.pop().close()
    clock.now += 30
    open_one.pop().close()
    open_two.pop().close()
    assert origin.stats().ports == {str(one): 3, str(two): 2}
    clock.now += 30  # the first one's minute is over
    assert origin.stats().ports == {str(one): 2, str(two): 2}
    assert origin.ports_to(one.target) == 2
    clock.now += 30
    assert origin.stats().ports == {str(one): 1, str(two): 1}
    open_one.pop().close()
    open_two.pop().close()
    clock.now += 60
    assert origin.stats().ports == {}
    assert origin.ports_to(Target.of(ip_address("192.0.2.1"), 1)) == 0
    assert origin.ports == {}  # to ask is not to count


def test_a_prefix_has_no_ports_to_run_out_of(clock: Clock, peer: Peer) -> None:
    origin = an_origin("net!127.9.0.0/24")
    for _ in range(2):
        sock = peer.connect(origin, local="127.9.0.7")
        assert origin.stats().ports == {}
        sock.close()
    assert (origin.stats().ports, len(origin._lingering), origin.connects) == ({}, 0, 2)


def test_two_who_free_the_same_port_at_once(clock: Clock, peer: Peer) -> None:
    origin = an_origin()
    peer.connect(origin).close()
    lingering: deque[Any] = origin._lingering

    class Raced(type(lingering)):  # type: ignore[misc]
        def popleft(self) -> Any:
            self.clear()  # the other one was quicker
            return super().popleft()

    origin._lingering = Raced(lingering)
    clock.now += 60
    assert origin.ports_to(peer.target) == 1  # which the other one is about to free


def test_no_port_is_freed_amid_the_counting_of_another(peer: Peer) -> None:
    """Python lets other threads run at calls: between the asking and the counting there is none."""
    origin, freed = an_origin(), 0

    class Interrupted(dict[Target, int]):
        def get(self, target: Target, default: Any = None) -> Any:
            nonlocal freed
            found = super().get(target, default)
            if found:
                freed += 1
                origin._free(target)  # another thread, in that very moment
            return found

    origin.ports = Interrupted()
    held = [peer.connect(origin) for _ in range(3)]
    assert dict(origin.ports) == {peer.target: 3 - freed}
    for sock in held:
        sock.close()


def test_the_last_port_is_freed_by_two_at_once(peer: Peer) -> None:
    origin = an_origin()
    for _ in range(2):
        origin._free(peer.target)
    assert origin.ports == {}


# ── failures ──


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "ECONNREFUSED"),
        (TimeoutError(errno.ETIMEDOUT, "no answer"), "ETIMEDOUT"),
        (socket.gaierror(socket.EAI_NONAME, "no such name"), "EAI"),
        (socket.gaierror(socket.EAI_AGAIN, "later"), "EAI"),
        (OSError(4711, "what?"), "4711"),
    ],
)
def test_failures_are_counted_by_name(error: OSError, name: str) -> None:
    origin = an_origin()
    origin.failed(error)
    origin.failed(WHY)
    origin.failed(error)
    assert (origin.failures, origin.stats().failures) == (3, {name: 2, "ENETUNREACH": 1})


def test_figures_are_of_their_moment(peer: Peer) -> None:
    origin = an_origin()
    sock = peer.connect(origin)
    origin.failed(WHY)
    figures = origin.stats()
    origin.failed(WHY)
    sock.close()
    assert figures.failures == {"ENETUNREACH": 1}
    assert figures.ports == {str(peer): 1}


def breaker(until: float, *, probing: bool = False) -> Breaker:
    made = Breaker()
    made.until, made.probing, made.failures = until, probing, 1
    return made


@pytest.mark.parametrize(
    ("breakers", "works", "down", "expected"),
    [
        ({}, set(), None, None),
        ({}, {V4}, None, None),
        ({V4: 1005.0}, set(), None, 1005.0),
        ({V4: 1005.0}, {V6}, None, None),  # a family that works
        ({V4: 1005.0, V6: 1003.0}, set(), None, 1003.0),
        ({V4: 1003.0, V6: 1005.0}, set(), None, 1003.0),
        ({V4: 1005.0, V6: 1003.0}, {V6}, None, 1003.0),  # it worked before
        ({V4: 1000.0}, set(), None, None),  # its time has ended
        ({V4: 1005.0, V6: 999.0}, set(), None, None),
        ({}, {V4}, WHY, math.inf),
        ({V4: 1005.0}, {V6}, WHY, math.inf),
    ],
)
def test_until_when_it_is_suspended(
    clock: Clock, breakers: dict[int, float], works: set[int], down: OSError | None, expected: float | None
) -> None:
    origin = an_origin()
    origin.breakers = {family: breaker(until) for family, until in breakers.items()}
    origin.works, origin.down = works, down
    assert origin.suspended_until(1000.0) == expected
    assert origin.stats().suspended_until == expected


@pytest.mark.parametrize(
    ("probing", "works", "expected"),
    [
        ({}, set(), False),
        ({V4: False}, set(), False),
        ({V4: True}, set(), True),
        ({V4: True, V6: False}, set(), True),
        ({V4: True}, {V6}, False),  # the other one works meanwhile
        ({V4: True, V6: False}, {V6}, True),  # it did
    ],
)
def test_whether_somebody_finds_out_how_it_is(probing: dict[int, bool], works: set[int], *, expected: bool) -> None:
    origin = an_origin()
    origin.breakers = {family: breaker(0.0, probing=value) for family, value in probing.items()}
    origin.works = works
    assert origin.is_being_probed is expected


@pytest.mark.parametrize(
    ("avoid", "expected"),
    [
        ({}, 0.0),
        ({"h": 1005.0}, 1005.0),
        ({"h:1": 1005.0}, 1005.0),
        ({"h": 1005.0, "h:1": 1007.0}, 1007.0),
        ({"h": 1007.0, "h:1": 1005.0}, 1007.0),
        ({"h": 1007.0, "h:1": 1000.0}, 1007.0),
        ({"h": 1000.0}, 0.0),
        ({"other": 1005.0, "h:2": 1005.0}, 0.0),
    ],
)
def test_until_when_it_is_avoided(avoid: dict[str, float], expected: float) -> None:
    origin = an_origin()
    origin.avoid = {place: breaker(until) for place, until in avoid.items()}
    assert origin.avoids("h", "h:1", 1000.0) == expected


# ── figures ──


def test_latencies() -> None:
    origin = an_origin()
    for _ in range(98):
        origin.latency.add(0.010)
    for _ in range(2):
        origin.latency.add(2.0)
    assert origin.stats().latency_p50 == pytest.approx(0.010, rel=0.06)
    assert origin.stats().latency_p99 == pytest.approx(2.0, rel=0.06)


def test_any_thread_may_ask(make_peer: Callable[..., Peer]) -> None:
    """While connections come and go there: nothing fails, and in the end nothing is missing."""
    origin, peers = an_origin(), [make_peer(f"127.0.0.{n}") for n in (1, 3, 4)]
    asked, failures, over = 0, list[BaseException](), threading.Event()

    def ask() -> None:
        nonlocal asked
        while not over.is_set():
            try:
                figures = origin.stats()
                assert 0 <= figures.connections <= 30
                assert 0 <= sum(figures.ports.values()) <= 600  # not of quite the same moment
            except BaseException as failure:
                failures.append(failure)
                return
            asked += 1
            over.wait(0.001)  # else they would keep the others from running

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        held: list[BoundSocket] = []
        for n in range(600):
            held.append(peers[n % 3].connect(origin))
            held[-1].send(b"x")
            origin.failed(OSError(n % 50 + 1, ""))
            if len(held) == 30:
                for sock in held[::2]:
                    sock.close()
                del held[::2]
        for sock in held:
            sock.close()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert asked > 0
    figures = origin.stats()
    assert (figures.connections, figures.connects, origin.sockets) == (0, 600, [])
    assert sum(figures.failures.values()) == 600
    assert sum(figures.ports.values()) == 600  # all in TIME_WAIT
