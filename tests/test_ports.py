"""Which local port a socket gets: the kernel's choice, one that is reserved, or one of the caller's range."""

from __future__ import annotations

import errno
import gc
import os
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from opened import open_bound

from aiobind import BindError, _ports
from aiobind._binding import Binding, Target
from aiobind._platform import platform
from aiobind._ports import ANY_PORT, LocalPorts, claim, release

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiobind._sockets import BoundSocket
    from aiobind.lab import Lab


ROOT = Path(__file__).parent.parent

# --- the caller's range -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ports", [range(1, 2), range(65535, 65536), range(1, 65536), range(40000, 40100)])
def test_a_range_of_ports(ports: range) -> None:
    local = LocalPorts(ports)
    assert ports[0] in local
    assert ports[-1] in local
    assert ports[0] - 1 not in local
    assert ports[-1] + 1 not in local
    assert str(local) == f"port from {ports[0]} to {ports[-1]}"


def test_any_port() -> None:
    assert 1 in ANY_PORT
    assert 65535 in LocalPorts()
    assert str(ANY_PORT) == "ephemeral port"


@pytest.mark.parametrize(
    ("ports", "error", "text"),
    [
        ((40000, 40100), TypeError, "local_ports is a range, as in range(40000, 40100), not tuple"),
        ("40000-40100", TypeError, "not str"),
        (40000, TypeError, "not int"),
        (range(0), ValueError, "local_ports is a range of ports from 1 to 65535 without a step, not range(0, 0)"),
        (range(5, 5), ValueError, "not range(5, 5)"),
        (range(10), ValueError, "not range(0, 10)"),
        (range(-3, 10), ValueError, "not range(-3, 10)"),
        (range(65000, 65537), ValueError, "not range(65000, 65537)"),
        (range(40000, 40100, 2), ValueError, "not range(40000, 40100, 2)"),
        (range(40100, 40000, -1), ValueError, "not range(40100, 40000, -1)"),
    ],
)
def test_what_is_no_range_of_ports(ports: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        LocalPorts(ports)
    assert str(caught.value).endswith(text)


# --- the ways to get one ------------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the system answers when it is asked what it keeps to, one after the other."""
    answers: list[bool] = []
    monkeypatch.setattr(platform, "keeps_to", lambda ports: answers.pop(0))
    return answers


def test_without_a_range_connect_chooses_and_else_one_is_reserved(kept: list[bool]) -> None:
    assert list(ANY_PORT.ways()) == [None, 0]
    ANY_PORT.doubt()
    assert ANY_PORT.kept_by_system
    assert not kept  # nobody has been asked


def test_nor_is_it_otherwise_with_a_range_that_the_system_keeps_to(kept: list[bool]) -> None:
    kept.append(True)
    ports = LocalPorts(range(40000, 40100))
    assert list(ports.ways()) == list(ports.ways()) == [None, 0]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_of_another_range_each_port_has_its_turn(kept: list[bool], size: int) -> None:
    kept.append(False)
    ports = LocalPorts(range(40000, 40000 + size))
    for _ in range(3):
        ways = list(ports.ways())
        assert sorted(ways) == list(range(40000, 40000 + size))
        # one after the other, round from the end to the start
        assert all((after - before) % size == 1 % size for before, after in pairwise(ways))


def test_the_search_begins_anywhere(kept: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    kept.append(False)
    ports = LocalPorts(range(40000, 40100))
    generator = random.Random(1)
    monkeypatch.setattr(random, "randrange", generator.randrange)
    assert len({next(ports.ways()) for _ in range(1000)}) == 100  # the first to the last


def test_a_long_search_is_given_up(kept: list[bool]) -> None:
    kept.append(False)
    ways = list(LocalPorts(range(1, 65536)).ways())
    assert len(ways) == len(set(ways)) == 1000


def test_the_system_is_asked_once_until_there_is_doubt(kept: list[bool]) -> None:
    kept += [True, False]
    ports = LocalPorts(range(40000, 40100))
    assert [ports.kept_by_system for _ in range(3)] == [True] * 3
    ports.doubt()
    assert [ports.kept_by_system for _ in range(3)] == [False] * 3
    assert not kept


def test_the_system_is_limited_to_what_it_keeps_to(kept: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    limited: list[range] = []
    monkeypatch.setattr(platform, "limit", lambda sock, ports: limited.append(ports))
    kept += [True, False]
    ports = LocalPorts(range(40000, 40100))
    with socket.socket() as sock:
        for _ in range(2):
            ports.prepare(sock)
            ports.doubt()
        ANY_PORT.prepare(sock)
    assert limited == [range(40000, 40100)]


# --- claims -------------------------------------------------------------------------------------------------

HERE, THERE = "192.0.2.7", "192.0.2.8"
TARGET = Target.of(ip_address("198.51.100.1"), 443)


@pytest.fixture(autouse=True)
def no_claim_left() -> Iterator[None]:
    gc.collect()
    claims(drop=True)
    yield
    gc.collect()
    _ports._ended.extend(claim for _, claim in _ports._lingering)
    _ports._lingering.clear()
    assert claims() == {}


def claims(*, drop: bool = False) -> dict[Any, int]:
    """Return the claims that have not ended."""
    claim("", TARGET, pinned=False)  # takes in those that have
    release(("", TARGET.host, TARGET.port, False))
    if drop:
        _ports._claims.clear()
        _ports._ended.clear()
    return {key: count for key, count in _ports._claims.items() if key[0]}


def test_two_kinds_at_one_address_and_target_reserve() -> None:
    first, reserve = claim(HERE, TARGET, pinned=True)
    assert not reserve
    second, reserve = claim(HERE, TARGET, pinned=True)  # of one kind connect(2) knows how to keep them apart
    assert not reserve
    third, reserve = claim(HERE, TARGET, pinned=False)
    assert reserve
    fourth, reserve = claim(HERE, TARGET, pinned=True)  # and now each of them
    assert reserve
    for mine in (first, second, third, fourth):
        release(mine)


@pytest.mark.parametrize(
    ("address", "target"),
    [
        (THERE, TARGET),
        (HERE, TARGET._replace(port=444)),
        (HERE, Target.of(ip_address("198.51.100.2"), 443)),
        ("2001:db8::7", Target.of(ip_address("2001:db8::1"), 443)),
    ],
)
def test_others_share(address: str, target: Target) -> None:
    ours, _ = claim(HERE, TARGET, pinned=True)
    theirs, reserve = claim(address, target, pinned=False)
    assert not reserve
    release(ours)
    release(theirs)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_kind_is_there_until_the_last_of_it_has_ended(*, pinned: bool) -> None:
    held = [claim(HERE, TARGET, pinned=pinned)[0] for _ in range(3)]
    assert claims() == {(HERE, TARGET.host, TARGET.port, pinned): 3}
    for left in (2, 1, 0):
        release(held.pop())
        other, reserve = claim(HERE, TARGET, pinned=not pinned)
        assert reserve is (left > 0)
        release(other)
    assert claims() == {}


def test_a_claim_may_end_while_another_is_made() -> None:
    """The collector ends some, amid any statement of any thread: that must not wait for anybody."""
    mine, _ = claim(HERE, TARGET, pinned=True)
    ended = threading.Thread(target=release, args=(mine,), daemon=True)
    with _ports._lock:  # as `claim` holds it
        release(claim_of_another := (THERE, TARGET.host, TARGET.port, True))
        ended.start()
        ended.join(10)
        assert not ended.is_alive()
        _ports._claims[claim_of_another] = 1
    assert claims() == {}


def test_claims_of_many_threads_are_counted() -> None:
    def work() -> None:
        for n in range(500):
            mine, _ = claim(HERE, TARGET, pinned=bool(n % 2))
            release(mine)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert claims() == {}


CHILD = """
import os
from ipaddress import ip_address
from aiobind import BindError, _ports
from aiobind._binding import Target
target = Target.of(ip_address("198.51.100.1"), 443)
mine, _ = _ports.claim("192.0.2.7", target, pinned=True)
with _ports._lock:  # as another thread of the parent may hold it
    child = os.fork()
    if not child:
        theirs, reserve = _ports.claim("192.0.2.7", target, pinned=False)
        assert reserve
        _ports.release(mine)
        again, reserve = _ports.claim("192.0.2.7", target, pinned=False)
        assert not reserve
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
_, reserve = _ports.claim("192.0.2.7", target, pinned=False)
assert reserve  # what the child ends is the child's
"""


def test_in_a_child_process_the_claims_are_still_there() -> None:
    """For so are the sockets; and the lock is nobody's, whoever held it."""
    run = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", CHILD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")


# --- real sockets -------------------------------------------------------------------------------------------


class Open:
    """Sockets from one NIC's address to one of the lab's targets, in a namespace with few ports."""

    def __init__(self, lab: Lab, stack: ExitStack, ports: str, version: int) -> None:
        lab.near.sysctl("ipv4.ip_local_port_range", ports)
        nic = lab.nic("n1")
        self._local = ip_address(nic.v4 if version == 4 else nic.v6)
        self.target = Target.of(ip_address(lab.target_v4 if version == 4 else lab.target_v6), 80)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with lab.far:
            self.server = stack.enter_context(socket.create_server((self.target.host, 80), family=family, backlog=128))
            stack.enter_context(socket.create_server((self.target.host, 81), family=family, backlog=128))
        self._stack = stack
        #: those that were asked for, and connected if that was asked for
        self.sockets: list[BoundSocket] = []

    def __call__(
        self, *, pinned: bool, target: Target | None = None, port: int | None = None, connect: bool = True
    ) -> BoundSocket:
        target = target or self.target
        binding = Binding("n1" if pinned else None, (self._local,))
        sock = self._stack.enter_context(open_bound(binding, target, port=port))
        if connect:
            sock.settimeout(10)
            sock.connect(target.sockaddr)
        self.sockets.append(sock)
        return sock


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6"])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


@pytest.mark.parametrize("pinned", [True, False])
def test_one_kind_shares_its_ports_among_destinations(
    lab: Lab, stack: ExitStack, version: int, *, pinned: bool
) -> None:
    opened = Open(lab, stack, "5001 5001", version)
    for port in (80, 81):
        target = opened.target._replace(port=port)
        sock = opened(pinned=pinned, target=target, connect=False)
        assert port_of(sock) == 0
        sock.settimeout(10)
        sock.connect(target.sockaddr)
        assert port_of(sock) == 5001


@pytest.mark.parametrize("pinned_first", [True, False])
def test_the_second_kind_at_an_address_and_target_reserves(
    lab: Lab, stack: ExitStack, version: int, *, pinned_first: bool
) -> None:
    opened = Open(lab, stack, "5001 5004", version)
    first = opened(pinned=pinned_first, connect=False)
    assert port_of(first) == 0
    second = opened(pinned=not pinned_first, connect=False)
    assert port_of(second) != 0
    assert port_of(opened(pinned=pinned_first, connect=False)) != 0  # and so do they all
    elsewhere = opened(pinned=not pinned_first, target=opened.target._replace(port=81), connect=False)
    assert port_of(elsewhere) == 0
    # when the other kind has gone, nobody has to
    first.close()
    opened._stack.close()
    assert claims() == {}
    assert port_of(opened(pinned=not pinned_first, connect=False)) == 0


@pytest.mark.parametrize("pinned_first", [True, False])
def test_no_connection_is_given_the_4_tuple_of_another(
    lab: Lab, stack: ExitStack, version: int, *, pinned_first: bool
) -> None:
    """Which connect(2) would do."""
    opened = Open(lab, stack, "5001 5040", version)
    kinds = [pinned_first] * 15 + [not pinned_first] * 15
    socks = [opened(pinned=pinned) for pinned in kinds]
    assert len({port_of(sock) for sock in socks}) == len(socks)
    accepted = []
    for _ in socks:
        opened.server.settimeout(10)
        accepted.append(stack.enter_context(opened.server.accept()[0]))
    for sock in accepted:
        sock.sendall(b"?")
    for sock in socks:
        assert sock.recv(1) == b"?"


def test_the_kernel_would_give_it(lab: Lab, stack: ExitStack, version: int) -> None:
    """Why they reserve: the later connection's SYN resets the pinned one."""
    opened = Open(lab, stack, "5001 5001", version)
    pinned = opened(pinned=True)
    release(pinned.claimed)  # nobody knows of it
    pinned.claimed = None
    taken = opened(pinned=False, connect=False)
    taken.settimeout(1)
    with suppress(OSError):
        taken.connect(opened.target.sockaddr)
    if port_of(taken) != port_of(pinned):
        pytest.skip("this kernel tells a pinned socket's 4-tuple from no other")
    assert port_of(taken) == port_of(pinned) == 5001


@pytest.mark.parametrize("pinned", [True, False])
def test_after_connect_has_found_none_one_may_still_be_reserved(
    lab: Lab, stack: ExitStack, version: int, *, pinned: bool
) -> None:
    """A port that somebody has reserved at another address is lost to connect(2) alone."""
    opened = Open(lab, stack, "5001 5001", version)
    other = stack.enter_context(socket.socket(opened.server.family))
    other.bind(("127.0.0.1" if version == 4 else "::1", 5001))
    failures = []
    for port in ANY_PORT.ways():
        sock = opened(pinned=pinned, port=port, connect=False)
        try:
            sock.settimeout(10)
            sock.connect(opened.target.sockaddr)
        except OSError as error:
            failures.append(error.errno)
            sock.close()
        else:
            assert port_of(sock) == 5001
            break
    assert failures in ([errno.EADDRNOTAVAIL], [])


def test_a_socket_that_is_collected_has_ended_its_claim(lab: Lab, version: int) -> None:
    with ExitStack() as stack:
        opened = Open(lab, stack, "5001 5004", version)
        sock = opened(pinned=True, connect=False)
        assert list(claims().values()) == [1]
        stack.pop_all().close()
        assert claims() == {}
        sock = open_bound(Binding("n1", (ip_address(lab.nic("n1").v4),)), TARGET)
        sock.user = lambda sock=sock: sock  # type: ignore[misc,assignment]  # a cycle
        del sock
        with pytest.warns(ResourceWarning, match="unclosed"):
            gc.collect()
        assert claims() == {}


@pytest.mark.parametrize("end", ["close", "close twice", "detach"])
def test_a_socket_ends_its_claim_once(lab: Lab, end: str) -> None:
    kept = open_bound(Binding("n1", (ip_address(lab.nic("n1").v4),)), TARGET)
    sock = open_bound(Binding("n1", (ip_address(lab.nic("n1").v4),)), TARGET)
    assert list(claims().values()) == [2]
    if end == "detach":
        os.close(sock.detach())
    for _ in range(2 if end == "close twice" else 1):
        sock.close()
    assert list(claims().values()) == [1]
    kept.close()


def test_a_socket_that_could_not_be_bound_has_no_claim(lab: Lab) -> None:
    local = tuple(ip_address(text) for text in ("192.0.2.1", "192.0.2.2"))
    with pytest.raises(OSError, match=r"192\.0\.2\.2 is not usable on this host"):
        open_bound(Binding(None, local), TARGET)
    gc.collect()
    assert claims() == {}
    with open_bound(Binding(None, (*local, ip_address("198.18.1.2"))), TARGET):
        assert claims() == {("198.18.1.2", TARGET.host, TARGET.port, False): 1}


def test_two_kinds_of_a_given_port_do_not_share_it(lab: Lab, stack: ExitStack, version: int) -> None:
    opened = Open(lab, stack, "5001 5040", version)
    opened(pinned=True, port=7001)
    with pytest.raises(OSError, match="no port is left") as caught:
        opened(pinned=False, port=7001)
    assert caught.value.errno == errno.EADDRINUSE
    # to another target it leaves at the same time
    opened(pinned=False, port=7001, target=opened.target._replace(port=81))


def test_a_range_outside_of_the_automatic_one_is_gone_through(lab: Lab, stack: ExitStack, version: int) -> None:
    opened = Open(lab, stack, "5001 5040", version)
    ports = LocalPorts(range(7001, 7004))
    assert not ports.kept_by_system

    def tried(target: Target) -> list[int]:
        """Return the ports that were tried until one was free."""
        ways: list[int] = []
        for port in ports.ways():
            assert port is not None
            ways.append(port)
            with suppress(OSError):
                opened(pinned=True, port=port, target=target)
                break
        return ways

    # each three to one target, all of the same three
    for target in (opened.target, opened.target._replace(port=81)):
        assert {tried(target)[-1] for _ in range(3)} == set(range(7001, 7004))
        full = set(map(port_of, opened.sockets))
        assert sorted(tried(target)) == list(range(7001, 7004))
        assert full == set(range(7001, 7004))


def test_what_a_closed_socket_has_still_to_send_is_not_reset(lab: Lab) -> None:
    """After close(2) the kernel goes on sending from the same 4-tuple (FIN-WAIT-1), here the only one that there is."""
    lab.near.sysctl("ipv4.ip_local_port_range", "5001 5001")
    target = Target.of(ip_address(lab.target_v4), 80)
    local = (ip_address(lab.nic("n1").v4),)
    with lab.far:
        server = socket.create_server((lab.target_v4, 80))
    with server:
        pinned = open_bound(Binding("n1", local), target)
        pinned.settimeout(10)
        pinned.connect(target.sockaddr)
        peer, _ = server.accept()
        pinned.setblocking(False)
        sent = 0
        with suppress(BlockingIOError):
            while True:
                sent += pinned.send(bytes(65536))
        pinned.close()
        with peer:
            with pytest.raises(BindError, match="no port is left"):
                open_bound(Binding(None, local), target)
            peer.settimeout(10)
            got = 0
            while data := peer.recv(1 << 20):
                got += len(data)
            assert got == sent


def test_a_claim_that_lingers_ends_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.of(ip_address("192.0.2.80"), 80)
    mine, _ = _ports.claim("192.0.2.7", target, pinned=True)
    _ports.release(mine, unsent=True)
    other, reserve = _ports.claim("192.0.2.7", target, pinned=False)
    assert reserve
    _ports.release(other)
    now = time.monotonic()
    monkeypatch.setattr(_ports.time, "monotonic", lambda: now + _ports._LINGER + 1)
    other, reserve = _ports.claim("192.0.2.7", target, pinned=False)
    assert not reserve
    _ports.release(other)
