"""Which source is next, by a clock that the test sets: the order of those that are ready, and who comes after them."""

from __future__ import annotations

import errno
import gc
import math
import random
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

import aiobind
from aiobind import _origin, _roster
from aiobind._binding import LinkAddress
from aiobind._events import Journal
from aiobind._interfaces import InterfaceTable
from aiobind._limits import Limits
from aiobind._platform.base import AddressSeen, LinkGone, LinkSeen
from aiobind._roster import Roster, Route, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aiobind import Event, SourceView
    from aiobind._origin import Origin

V4, V6 = socket.AF_INET, socket.AF_INET6
NO_ROUTE = aiobind.BindError(errno.ENETUNREACH, "no route")
HOST, PLACE, TOWARDS = "example.com", "example.com:443", ("example.com", 443)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_roster, "time", clock)
    monkeypatch.setattr(_origin, "time", clock)
    monkeypatch.setattr(random, "uniform", lambda _, most: most)  # no jitter
    return clock


class InOrder:
    def order(self, sources: Sequence[SourceView], host: str) -> Iterable[SourceView]:
        return iter(sources)


class Case:
    """A roster of ``if!a``, ``if!b``, ...; sources are told by their letters."""

    def __init__(self, names: str = "abc", policy: Any = None) -> None:
        self.events: list[Event] = []
        sources = [f"if!{name}" for name in names]
        self.roster = Roster(sources, policy or InOrder(), Journal(self.events.append), pooled=False)

    def __getitem__(self, name: str) -> Origin:
        return self.roster.find(f"if!{name}")

    def order(self, host: str = HOST, place: str = PLACE) -> str:
        """Return who would be tried, to the end; in capitals those that are forced."""
        name, _, port = place.rpartition(":")
        return letters(self.roster.order(host, (name, int(port))))

    def fails(self, names: str, family: int = V4) -> None:
        for name in names:
            self.roster.fails(self[name], family, NO_ROUTE)

    def told(self) -> list[str]:
        told = [" ".join(filter(None, (letter(event.source), event.kind, event.destination))) for event in self.events]
        self.events.clear()
        return told


def letter(source: Any) -> str:
    return str(source)[3:]


def letters(turns: Iterable[Turn]) -> str:
    return "".join(letter(turn.origin.source).upper() if turn.forced else letter(turn.origin.source) for turn in turns)


def link(index: int, name: str, *, up: bool = True, carrier: bool = True) -> LinkSeen:
    return LinkSeen(ifindex=index, name=name, loopback=False, kind="", master=0, altnames=(), up=up, carrier=carrier)


def has(index: int, ip: str) -> AddressSeen:
    return AddressSeen(index, LinkAddress(ip_address(ip)), b"")


@pytest.fixture
def table() -> InterfaceTable:
    table = InterfaceTable()
    for index, name in enumerate("abc", 1):
        table.apply(link(index, name))
        table.apply(has(index, f"192.0.2.{index}"))
    return table


# ── the list ──


@pytest.mark.parametrize(
    ("sources", "error", "words"),
    [
        ((), TypeError, "name at least one source, for example 'if!eth0' or '192.0.2.7'"),
        (("if!a", "if!b", "if!a"), ValueError, "a source is named twice: if!a, if!b, if!a"),
        (("eth0",), aiobind.InvalidSource, "if!eth0"),
    ],
)
def test_a_list_that_is_none(sources: Sequence[str], error: type[Exception], words: str) -> None:
    policy = aiobind.RoundRobin()
    with pytest.raises(error, match=words):
        Roster(sources, policy, Journal(None), pooled=False)
    Roster(("if!a",), policy, Journal(None), pooled=False)  # which has not taken the policy


def test_the_default_is_round_robin() -> None:
    roster = Roster(("if!a", "if!b"), None, Journal(None), pooled=False)
    assert [letters(roster.order(HOST, TOWARDS)) for _ in range(3)] == ["ab", "ba", "ab"]


def test_sources_come_and_go() -> None:
    case = Case("ab")
    assert case.roster.add("if!c") is case["c"]
    assert case.order() == "abc"  # behind the others
    assert case.roster.remove("if!a").removed
    assert case.order() == "bc"
    case.roster.add(aiobind.parse_source("if!a"))
    assert case.order() == "bca"
    assert not case["a"].removed
    assert [letter(origin.source) for origin in case.roster.listed] == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda roster: roster.find("if!x"), r"if!x is no source of this connector \(it has if!a, if!b\)"),
        (lambda roster: roster.remove("if!x"), "if!x is no source of this connector"),
        (lambda roster: roster.add("if!a"), "if!a is a source of this connector already"),
        (lambda roster: roster.add("eth0"), "if!eth0"),
        (
            lambda roster: (roster.remove("if!b"), roster.remove("if!a")),
            "if!a is the only source of this connector: add another one first",
        ),
    ],
)
def test_what_cannot_come_or_go(act: Callable[[Roster], Any], words: str) -> None:
    case = Case("ab")
    with pytest.raises(ValueError, match=words):
        act(case.roster)
    assert case.order().startswith("a")


def test_a_guest_lives_as_long_as_somebody_holds_it() -> None:
    roster = Case("ab").roster
    assert roster.guest(aiobind.parse_source("if!a")) is roster.find("if!a")  # it is no guest
    source = aiobind.parse_source("if!z")
    guest = roster.guest(source)
    assert roster.guest(source) is guest
    assert guest not in roster.all  # it has no connections
    guest.connections = 1
    assert [letter(origin.source) for origin in roster.all] == ["a", "b", "z"]
    del guest
    gc.collect()
    assert [letter(origin.source) for origin in roster.all] == ["a", "b"]
    assert roster.guest(source).connections == 0


def test_a_removed_source_that_has_connections_comes_back_as_the_same() -> None:
    roster = Case("ab").roster
    origin = roster.find("if!b")
    origin.connections = 1
    assert roster.remove("if!b") is origin
    assert [letter(each.source) for each in roster.all] == ["a", "b"]
    assert roster.guest(origin.source) is origin
    assert roster.add("if!b") is origin
    assert not origin.removed
    assert [letter(each.source) for each in roster.all] == ["a", "b"]  # once


def test_a_guest_that_becomes_a_source_keeps_its_figures() -> None:
    roster = Case("a").roster
    guest = roster.guest(aiobind.parse_source("if!z"))
    guest.connections = 3
    assert roster.add("if!z") is guest
    assert roster.find("if!z").connections == 3


def test_a_pin_stands_alone_whatever_it_has_failed_at() -> None:
    case = Case("ab")
    case.fails("a")
    assert letters(case.roster.only(case["a"].source)) == "A"
    assert letters(case.roster.only(aiobind.parse_source("if!z"))) == "Z"


# ── the only one ──


class Derived(aiobind.RoundRobin):
    """May do what it likes."""


@pytest.mark.parametrize(
    ("names", "policy", "obvious"),
    [
        ("a", None, True),
        ("a", aiobind.RoundRobin(), True),
        ("a", aiobind.Failover(), True),
        ("a", aiobind.Sticky(), True),
        ("a", aiobind.LeastConnections(), True),
        ("a", Derived(), False),
        ("a", InOrder(), False),
        ("ab", None, False),
    ],
)
def test_where_there_is_nothing_to_choose(names: str, policy: Any, *, obvious: bool) -> None:
    roster = Roster([f"if!{name}" for name in names], policy, Journal(None), pooled=False)
    sole = roster.sole
    assert (sole is not None) is obvious
    if sole is not None:
        assert (sole.origin, sole.forced, sole.held_back, sole.until) == (roster.find("if!a"), True, False, 0.0)
        assert roster.sole is sole
        assert letters(roster.order(HOST, TOWARDS)) == "a"


def test_the_only_one_is_heard_of_at_once() -> None:
    """Of what there is to choose, and of what is known against it, however that has come about."""
    roster = Roster(["if!a"], None, Journal(None), pooled=False)
    origin = roster.find("if!a")

    def sole() -> str:
        return "" if roster.sole is None else letters([roster.sole]).lower()

    assert sole() == "a"
    roster.add("if!b")
    assert sole() == ""
    roster.remove("if!a")
    assert sole() == "b"
    roster.add("if!a")
    roster.remove("if!b")
    assert sole() == "a"
    assert roster.find("if!a") is not origin or not origin.removed
    origin = roster.find("if!a")

    roster.fails(origin, V4, NO_ROUTE)
    assert sole() == ""
    roster.works(origin, V4, "somewhere")
    assert sole() == "a"
    roster.shun(origin, HOST, NO_ROUTE, banned=True)
    assert sole() == ""
    roster.accept(origin, HOST)
    assert sole() == "a"

    table = InterfaceTable()
    roster.links_changed(table, borrow=False)
    assert sole() == ""
    table.apply(link(1, "a"))
    table.apply(has(1, "192.0.2.1"))
    roster.links_changed(table, borrow=False)
    assert sole() == ""  # one connection tries it first
    roster.works(origin, V4, "somewhere")
    assert sole() == "a"


@pytest.mark.parametrize(("limits", "at_once"), [({}, True), ({"connections": 3}, False), ({"rate": 9.0}, False)])
def test_the_first_of_a_route(limits: dict[str, Any], *, at_once: bool) -> None:
    case = Case("ab")
    route = Route(case.roster, Limits(**limits), HOST, TOWARDS, None)
    turn = route.first()
    assert (turn is not None) is at_once
    assert route.first() is None  # only the first one
    assert (case["a"].connecting, case["b"].connecting) == (int(at_once), 0)
    route.close()


# ── the policy ──


def test_a_policy_serves_one_connector() -> None:
    policy = aiobind.Failover()
    first = Case("a", policy)
    for _ in range(2):
        with pytest.raises(ValueError, match="this policy serves another connector: give each one its own"):
            Case("b", policy)
    first.roster.close()
    second = Case("b", policy)
    first.roster.close()  # which has nothing more to let go of
    with pytest.raises(ValueError, match="serves another connector"):
        Case("c", policy)
    del second
    gc.collect()
    Case("c", policy)


def test_equal_policies_are_not_the_same() -> None:
    class Equal(InOrder):
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 1

    held = [Case("a", Equal()), Case("b", Equal())]
    assert [case.order() for case in held] == ["a", "b"]


def test_the_policy_is_given_the_same_tuple_until_the_set_changes(clock: Clock, table: InterfaceTable) -> None:
    given: list[Any] = []

    class Noting(InOrder):
        def order(self, sources: Sequence[SourceView], host: str) -> Iterable[SourceView]:
            given.append(sources)
            return iter(sources)

    def first() -> Any:
        turns = case.roster.order(HOST, TOWARDS)
        next(turns)
        turns.close()
        return given[-1]

    case = Case("abc", Noting())
    everybody = first()
    assert isinstance(everybody, tuple)
    case["a"].failed(NO_ROUTE)  # no reason of its own
    case.roster.works(case["a"], V4, "t")
    case.roster.shun(case["a"], "elsewhere", NO_ROUTE)
    case.roster.links_changed(table, borrow=False)
    clock.now += 1000
    assert first() is everybody
    case.fails("b")
    others = first()
    assert (len(others), first() is others) == (2, True)
    clock.now += 1.0
    assert first() == everybody  # for a probe
    case.roster.works(case["b"], V4, "t")
    everybody = first()
    assert (len(everybody), first() is everybody) == (3, True)
    case.roster.remove("if!c")
    assert [letter(origin.source) for origin in first()] == ["a", "b"]


def test_the_policy_hears_the_host_and_is_asked_lazily() -> None:
    asked: list[str] = []

    class Lazy:
        def order(self, sources: Sequence[SourceView], host: str) -> Iterator[SourceView]:
            for view in sources:
                asked.append(f"{letter(view.source)} for {host}")
                yield view

    case = Case("abc", Lazy())
    turns = case.roster.order("h.test", ("h.test", 1))
    assert asked == []
    next(turns)
    assert asked == ["a for h.test"]
    next(turns)
    turns.close()
    assert asked == ["a for h.test", "b for h.test"]


def test_what_the_policy_leaves_out_is_not_tried(clock: Clock) -> None:
    class Only:
        def order(self, sources: Sequence[SourceView], host: str) -> Iterable[SourceView]:
            return [view for view in sources if letter(view.source) in "bd"]

    case = Case("abcd", Only())
    assert case.order() == "bd"
    case.fails("abc")
    assert case.order() == "dB"
    case.fails("d")
    assert case.order() == "BD"


def test_a_policy_that_names_nobody() -> None:
    class Nobody:
        def order(self, sources: Sequence[SourceView], host: str) -> Iterable[SourceView]:
            return ()

    assert Case("ab", Nobody()).order() == ""


def test_a_policy_is_never_given_an_empty_list() -> None:
    class Picky:
        def order(self, sources: Sequence[SourceView], host: str) -> Iterable[SourceView]:
            return [sources[0]]

    case = Case("a", Picky())
    case.fails("a")
    assert case.order() == "A"


def test_a_policy_that_wants_to_is_told_of_each_change() -> None:
    told: list[tuple[str, int, int]] = []

    class Told(InOrder):
        def changed(self, source: SourceView) -> None:
            told.append((letter(source.source), source.in_use, source.failures))

    case = Case("ab", policy := Told())
    case["b"].failed(NO_ROUTE)
    guest = case.roster.guest(aiobind.parse_source("if!z"))
    guest.failed(NO_ROUTE)
    assert told == [("b", 0, 1), ("z", 0, 1)]
    listed = case["b"]
    case.roster.close()
    Case("ab", policy)  # it serves another one now, and takes their figures for those of its own
    listed.failed(NO_ROUTE)
    guest.failed(NO_ROUTE)
    case.roster.guest(aiobind.parse_source("if!y")).failed(NO_ROUTE)
    assert len(told) == 2


# ── suspended, due, and all of them ──


def test_who_has_failed_comes_after_the_others_and_is_forced(clock: Clock) -> None:
    case = Case("abcd")
    case.fails("b")
    assert case.order() == "acdB"
    assert case.told() == ["b suspended"]
    clock.now += 0.5
    case.fails("a")
    assert case.order() == "cdBA"  # those that have failed longest ago come first
    case.fails("a")  # of those that were under way
    assert case.told() == ["a suspended"]
    clock.now += 0.5
    assert case.order() == "bcdA"


def test_when_all_have_failed_nobody_is_refused(clock: Clock) -> None:
    case = Case("abc")
    for name in "bca":
        case.fails(name)
        clock.now += 0.1
    assert case.order() == "BCA"
    case.fails("b")  # again: it is the last one now
    assert case.order() == "CAB"


@pytest.mark.parametrize(
    ("before", "now", "until"),
    [
        ([], [], None),
        ([V4], [V4], 1001.0),
        ([V4, V6], [V4], None),  # the other one works
        ([V4, V6], [V4, V6], 1001.0),
        ([], [V6], 1001.0),
        ([V4], [V6], None),
    ],
)
def test_one_family_does_not_hold_up_the_other(before: list[int], now: list[int], until: float | None) -> None:
    case = Case("ab")
    for family in before:
        case.roster.works(case["a"], family, "t")
    for family in now:
        case.fails("a", family)
    assert case["a"].suspended_until(1000.0) == until
    assert case.order() == ("ab" if until is None else "bA")


def test_each_family_has_a_time_of_its_own(clock: Clock) -> None:
    case = Case("ab")
    case.fails("a", V6)
    clock.now += 0.5
    case.fails("a", V4)
    assert case["a"].suspended_until(clock.now) == 1001.0
    clock.now = 1001.0  # the time of V6 has ended, that of V4 has not
    assert case["a"].suspended_until(clock.now) is None
    assert case.order() == "ab"


def test_a_family_that_works_for_the_first_time_ends_the_suspension() -> None:
    case = Case("ab")
    case.fails("a", V4)
    assert case.order() == "bA"
    case.roster.works(case["a"], V6, "t")
    assert case.order() == "ab"
    assert case.told() == ["a suspended"]  # V4 has not recovered


def test_it_has_recovered_when_it_works(clock: Clock) -> None:
    case = Case("ab")
    case.fails("a", V4)
    case.fails("a", V6)
    case.told()
    case.roster.works(case["a"], V4, "t")
    assert case.told() == ["a recovered"]
    assert set(case["a"].breakers) == {V6}
    assert case.order() == "ab"
    case.roster.works(case["a"], V4, "t")
    assert case.told() == []
    case.fails("a", V4)
    assert case["a"].suspended_until(clock.now) is not None  # nothing works any more


# ── the probe ──


def due(clock: Clock, names: str = "abc", families: Sequence[int] = (V4,)) -> Case:
    """Return a case whose first source has failed, and whose time is over."""
    case = Case(names)
    for family in families:
        case.fails("a", family)
    clock.now += 1.0
    return case


def test_one_connection_finds_out(clock: Clock) -> None:
    case = due(clock)
    turn = next(case.roster.order(HOST, TOWARDS))
    assert (letter(turn.origin.source), turn.forced) == ("a", False)
    assert case.order() == "abc"  # nobody knows yet which family it is going to be
    families, probes = case.roster.allowed(turn, {V4})
    assert (families, probes, turn.held_back) == ({V4}, [case["a"].breakers[V4]], False)
    # The others go elsewhere meanwhile, and to it only when all else has failed.
    assert [case.order() for _ in range(2)] == ["bcA", "bcA"]
    late = Turn(case["a"])
    assert case.roster.allowed(late, {V4}) == (set(), [])
    assert late.held_back
    probes[0].probing = False
    assert case.order() == "abc"


@pytest.mark.parametrize(
    ("failed", "until", "asked", "allowed", "probed"),
    [
        ((), {}, {V4, V6}, {V4, V6}, set()),
        ((V4,), {V4: 1001.0}, {V4, V6}, {V4, V6}, {V4}),
        ((V4,), {V4: 1001.0}, {V6}, {V6}, set()),  # it finds out nothing about V4
        ((V4,), {V4: 1002.0}, {V4, V6}, {V6}, set()),
        ((V4,), {V4: 1002.0}, {V4}, set(), set()),
        ((V4, V6), {V4: 1001.0, V6: 1001.0}, {V4, V6}, {V4, V6}, {V4, V6}),
        ((V4, V6), {V4: 1001.0, V6: 1002.0}, {V4, V6}, {V4}, {V4}),
        ((V4, V6), {V4: 1001.0, V6: 1002.0}, {V6}, set(), set()),
    ],
)
def test_which_families_a_connection_may_try(
    clock: Clock, failed: Sequence[int], until: dict[int, float], asked: set[int], allowed: set[int], probed: set[int]
) -> None:
    case = due(clock, families=failed)
    breakers = case["a"].breakers
    for family, end in until.items():
        breakers[family].until = end
    turn = Turn(case["a"])
    families, probes = case.roster.allowed(turn, asked)
    assert families == allowed
    assert {family for family, breaker in breakers.items() if breaker.probing} == probed
    assert {id(breaker) for breaker in probes} == {id(breakers[family]) for family in probed}
    assert turn.held_back is not bool(allowed)


def test_a_family_that_works_is_not_held_up_by_the_others_probe(clock: Clock) -> None:
    case = due(clock)
    case.roster.works(case["a"], V6, "t")
    case.roster.allowed(Turn(case["a"]), {V4})
    assert case.order() == "abc"
    assert case.roster.allowed(Turn(case["a"]), {V4, V6}) == ({V6}, [])


def test_what_becomes_of_a_probe(clock: Clock) -> None:
    case = due(clock, "ab")
    for length in (2.0, 4.0, 8.0):  # each time for longer
        clock.now = case["a"].breakers[V4].until
        turns = case.roster.order(HOST, TOWARDS)
        _, probes = case.roster.allowed(next(turns), {V4})
        case.fails("a")
        probes[0].probing = False
        assert case["a"].breakers[V4].until == clock.now + length
        assert letters(turns) == "b"  # it is not tried again
        assert case.order() == "bA"
    clock.now = case["a"].breakers[V4].until
    case.roster.allowed(next(case.roster.order(HOST, TOWARDS)), {V4})
    case.roster.works(case["a"], V4, "t")
    assert case["a"].breakers == {}
    assert case.order() == "ab"
    case.fails("a")
    assert case["a"].breakers[V4].until == clock.now + 1.0  # from the beginning


@pytest.mark.parametrize(
    ("names", "latency", "patience"),
    [("ab", math.nan, 0.4), ("ab", 0.01, 0.4), ("ab", 1.0, pytest.approx(3.0, rel=0.06)), ("a", 0.01, None)],
)
def test_how_long_a_probe_may_take(clock: Clock, names: str, latency: float, patience: Any) -> None:
    case = due(clock, names)
    case.order()
    for _ in range(100):
        case["a"].latency.add(latency)
    assert case.roster.patience(case["a"]) == patience


def test_without_another_one_that_is_ready_a_probe_may_take_its_time(clock: Clock) -> None:
    case = Case("ab")
    case.fails("a")
    clock.now += 0.5
    case.fails("b")
    clock.now += 0.5
    assert case.order() == "aB"
    assert case.roster.patience(case["a"]) is None


def test_what_the_caller_holds_back_comes_last_and_is_forced() -> None:
    case = Case("abc")
    for turn in (turns := case.roster.order(HOST, TOWARDS)):
        turn.held_back = letter(turn.origin.source) in "ab"
        if letter(turn.origin.source) == "c":
            break
    assert letters(turns) == "AB"


def test_what_is_avoided_and_held_back_comes_last_as_well() -> None:
    case = Case("abc")
    case.roster.shun(case["a"], HOST, NO_ROUTE)
    tried = ""
    for turn in case.roster.order(HOST, TOWARDS):
        tried += letter(turn.origin.source).upper() if turn.forced else letter(turn.origin.source)
        turn.held_back = tried == "bca"
    assert tried == "bcaA"


# ── what changes while a connection goes through the order ──


def test_a_source_whose_time_ends_meanwhile_is_tried(clock: Clock) -> None:
    case = Case("ab")
    case.fails("b")
    turns = case.roster.order(HOST, TOWARDS)
    assert letter(next(turns).origin.source) == "a"
    clock.now += 2.0  # which took a while
    case.fails("a")
    assert letters(turns) == "B"


def test_a_source_that_comes_meanwhile_is_tried() -> None:
    case = Case("ab")
    turns = case.roster.order(HOST, TOWARDS)
    next(turns)
    case.roster.add("if!c")
    assert letters(turns) == "bC"


def test_a_source_that_goes_meanwhile_is_not_tried() -> None:
    case = Case("abcd")
    case.roster.shun(case["c"], HOST, NO_ROUTE)
    case.fails("d")
    turns = case.roster.order(HOST, TOWARDS)
    tried = letter(next(turns).origin.source)
    held = [case.roster.remove("if!b")]
    case.roster.add("if!e")
    held += [case.roster.remove(f"if!{name}") for name in "cd"]
    assert tried + letters(turns) == "aE"
    assert all(origin.removed for origin in held)


def test_a_source_that_goes_when_only_those_that_are_avoided_are_left() -> None:
    case = Case("abc")
    case.roster.shun(case["a"], HOST, NO_ROUTE)
    case.roster.shun(case["b"], HOST, NO_ROUTE)
    turns = case.roster.order(HOST, TOWARDS)
    tried = letter(next(turns).origin.source) + letter(next(turns).origin.source)
    held = case.roster.remove("if!b")
    assert tried + letters(turns) == "ca"
    assert held.removed


def test_a_source_that_was_held_back_and_goes_meanwhile_is_not_tried() -> None:
    case = Case("ab")
    turns = case.roster.order(HOST, TOWARDS)
    next(turns).held_back = True
    next(turns).held_back = True
    held = case.roster.remove("if!a")
    assert letters(turns) == "B"
    assert held.removed


def test_a_source_that_fails_meanwhile_is_tried_once() -> None:
    case = Case("abc")
    tried = ""
    for turn in case.roster.order(HOST, TOWARDS):
        tried += letter(turn.origin.source)
        case.fails(tried[-1])
    assert tried == "abc"


# ── who is avoided somewhere ──


@pytest.mark.parametrize(
    ("shunned", "host", "place", "expected"),
    [
        ([("a", HOST)], HOST, PLACE, "bca"),
        ([("a", PLACE)], HOST, PLACE, "bca"),
        ([("a", HOST)], "other.test", "other.test:443", "abc"),
        ([("a", PLACE)], HOST, "example.com:80", "abc"),
        ([("a", HOST)], HOST, "proxy.test:3128", "bca"),
        ([("b", HOST), ("a", HOST)], HOST, PLACE, "cba"),  # the ban that ends first
        ([("a", HOST), ("b", HOST), ("c", HOST)], HOST, PLACE, "abc"),
        ([("c", HOST), ("b", PLACE), ("a", HOST)], HOST, PLACE, "cba"),
        ([("a", HOST), ("b", HOST), ("a", PLACE)], HOST, PLACE, "cba"),  # both count, until the last one ends
    ],
)
def test_others_go_first_where_a_source_is_avoided(
    clock: Clock, shunned: list[tuple[str, str]], host: str, place: str, expected: str
) -> None:
    case = Case("abc")
    for name, where in shunned:
        case.roster.shun(case[name], where, NO_ROUTE)
        clock.now += 0.01
    assert case.order(host, place) == expected
    clock.now += 1.0
    assert case.order(host, place) == "abc"


def test_those_that_have_failed_come_after_those_that_are_avoided() -> None:
    case = Case("abc")
    case.roster.shun(case["a"], HOST, NO_ROUTE)
    case.fails("b")
    assert case.order() == "caB"


@pytest.mark.parametrize(
    ("banned", "seconds", "lengths"),
    [(False, None, [1.0, 2.0, 4.0]), (True, None, [30.0, 60.0, 120.0]), (True, 7.0, [7.0, 7.0]), (False, 90.0, [90.0])],
)
def test_how_long_a_source_is_avoided(
    clock: Clock, lengths: list[float], seconds: float | None, *, banned: bool
) -> None:
    case = Case("ab")
    for length in lengths:
        case.roster.shun(case["a"], HOST, NO_ROUTE, banned=banned, seconds=seconds)
        (event,) = case.events
        assert (event.kind, event.destination, event.error) == ("suspended", HOST, NO_ROUTE)
        assert event.seconds == length
        case.events.clear()
        clock.now += length - 0.01
        assert case.order() == "ba"
        clock.now += 0.02
        assert case.order() == "ab"


def test_a_ban_grows_to_an_hour(clock: Clock) -> None:
    case = Case("ab")
    for _ in range(20):
        case.roster.shun(case["a"], HOST, NO_ROUTE, banned=True)
        clock.now = case["a"].avoid[HOST].until
    assert case.events[-1].seconds == 3600.0


def test_what_is_avoided_already_is_no_news() -> None:
    case = Case("ab")
    for _ in range(3):
        case.roster.shun(case["a"], HOST, NO_ROUTE)
    assert case.told() == ["a suspended example.com"]


def test_a_ban_that_is_lifted() -> None:
    case = Case("ab")
    case.roster.shun(case["a"], HOST, NO_ROUTE, banned=True)
    case.roster.accept(case["a"], "other.test")
    assert case.order() == "ba"
    case.roster.accept(case["a"], HOST)
    case.roster.accept(case["a"], HOST)
    assert case.order() == "ab"
    assert case.told() == ["a suspended example.com", "a recovered example.com"]


def test_of_a_million_hosts_those_whose_time_is_over_are_forgotten(clock: Clock) -> None:
    case = Case("ab")
    for n in range(5000):
        case.roster.shun(case["a"], f"{n}.test", NO_ROUTE)
        clock.now += 0.01
        assert len(case["a"].avoid) <= 1000
    assert case.order("4999.test", "4999.test:80") == "ba"
    assert case.order("4950.test", "4950.test:80") == "ba"


# ── whom a silence is blamed on ──


def test_who_waits_in_vain_where_another_one_gets_an_answer(clock: Clock) -> None:
    case = Case("ab")
    silence = TimeoutError(errno.ETIMEDOUT, "no answer")
    case.roster.waits_in_vain(case["a"], V4, "t", clock.now, silence)
    assert case.order() == "ab"  # the target may be down
    clock.now += 5
    case.roster.works(case["b"], V4, "t")
    assert case.order() == "bA"
    (event,) = case.events
    assert event.error is not None
    assert event.error.errno == errno.ETIMEDOUT
    assert event.error.strerror == "it reaches no t, and if!b does"


def test_who_waits_in_vain_while_another_one_gets_an_answer(clock: Clock) -> None:
    case = Case("ab")
    silence = TimeoutError(errno.ETIMEDOUT, "no answer")
    began = clock.now
    case.roster.works(case["b"], V6, "t")
    clock.now += 5
    case.roster.waits_in_vain(case["a"], V6, "t", began, silence)
    assert case.order() == "bA"
    assert case.events[0].error is silence
    assert set(case["a"].breakers) == {V6}


def test_who_reaches_what_belongs_to_no_family_tells_of_both(clock: Clock) -> None:
    case = Case("ab")
    for family in (V4, V6):
        case.roster.waits_in_vain(case["a"], family, "name server", clock.now, TimeoutError(errno.ETIMEDOUT, "silent"))
    case.roster.reaches(case["b"], 0, "name server")
    assert set(case["a"].breakers) == {V4, V6}
    assert (case.order(), case["b"].works) == ("bA", set())


def test_a_target_that_is_down_for_all_suspends_none(clock: Clock) -> None:
    case = Case("abc")
    for _ in range(3):
        for name in "abc":
            began, clock.now = clock.now, clock.now + 2
            case.roster.waits_in_vain(case[name], V4, "t", began, TimeoutError(errno.ETIMEDOUT, "no answer"))
    case.roster.works(case["b"], V4, "t")  # and back
    assert case.order() == "abc"
    assert case.events == []


def test_a_single_source_has_nobody_to_contradict_it(clock: Clock) -> None:
    case = Case("a")
    guest = case.roster.guest(aiobind.parse_source("if!z"))
    case.roster.works(guest, V4, "t")
    case.roster.waits_in_vain(case["a"], V4, "t", 0.0, TimeoutError(errno.ETIMEDOUT, "no answer"))
    case.roster.works(guest, V4, "t")
    assert case.order() == "a"
    assert not case.roster._timeouts._reached  # nor is anything kept of it


# ── the interfaces ──


def test_a_source_is_suspended_until_its_interface_is_back(clock: Clock, table: InterfaceTable) -> None:
    case = Case("abc")
    changes: list[tuple[Any, str, list[str]]] = [
        (has(1, "192.0.2.9"), "abc", []),  # no matter
        (link(2, "b", up=False), "acB", ["b suspended"]),
        (link(2, "b", up=False, carrier=False), "acB", []),  # it stays so
        (LinkGone(2), "acB", []),
        (link(9, "b"), "acB", []),  # without an address
        (has(9, "192.0.2.2"), "abc", ["b recovered"]),
        (link(1, "a", carrier=False), "bcA", ["a suspended"]),
        (link(3, "c", up=False), "bAC", ["c suspended"]),
        (link(1, "a"), "abC", ["a recovered"]),
    ]
    for record, order, told in changes:
        table.apply(record)
        case.roster.links_changed(table, borrow=False)
        assert (case.order(), case.told()) == (order, told)
        clock.now += 100.0  # no time ends it


def test_what_is_told_of_an_interface_that_is_away(table: InterfaceTable) -> None:
    case = Case("ab")
    table.apply(link(2, "b", up=False))
    case.roster.links_changed(table, borrow=False)
    (event,) = case.events
    assert (event.kind, event.seconds, event.destination) == ("suspended", math.inf, None)
    assert isinstance(event.error, aiobind.BindError)
    assert (event.error.errno, event.error.strerror) == (errno.ENETUNREACH, "b is down")
    assert case["b"].suspended_until(0.0) == math.inf


def test_when_it_is_back_what_it_has_failed_at_is_forgotten(table: InterfaceTable) -> None:
    case = Case("ab")
    case.fails("b")
    table.apply(link(2, "b", up=False))
    case.roster.links_changed(table, borrow=False)
    table.apply(link(2, "b"))
    case.roster.links_changed(table, borrow=False)
    assert case.order() == "ab"
    assert [breaker.failures for breaker in case["b"].breakers.values()] == [0, 0]
    assert case.told() == ["b suspended", "b suspended", "b recovered"]
    case.roster.works(case["b"], V4, "t")
    assert V4 not in case["b"].breakers
    assert case.told() == []  # it was told already


def test_when_it_is_back_one_connection_tries_it(table: InterfaceTable) -> None:
    case = Case("ab")
    for up in (False, True):
        table.apply(link(2, "b", up=up))
        case.roster.links_changed(table, borrow=False)
    turn = Turn(case["b"])
    allowed, probes = case.roster.allowed(turn, {V4})
    assert allowed == {V4}
    assert [breaker.probing for breaker in probes] == [True]
    assert case.roster.allowed(Turn(case["b"]), {V4}) == (set(), [])
    assert case.order() == "aB"
    case.roster.works(case["b"], V4, "t")
    assert case.order() == "ab"


def test_what_fails_while_its_interface_is_away_is_suspended_until_that_is_back(table: InterfaceTable) -> None:
    case = Case("ab")
    table.apply(link(2, "b", up=False))
    case.roster.links_changed(table, borrow=False)
    case.fails("b")
    assert case["b"].breakers == {}
    assert case.told() == ["b suspended"]


def test_when_it_is_back_nothing_is_known_to_work(clock: Clock, table: InterfaceTable) -> None:
    case = Case("ab")
    case.roster.works(case["b"], V4, "t")
    case.fails("b", V4)
    for up in (False, True):
        table.apply(link(2, "b", up=up))
        case.roster.links_changed(table, borrow=False)
    case.fails("b", V4)
    case.fails("b", V6)
    assert case["b"].suspended_until(clock.now) == clock.now + 1.0


def test_what_has_failed_is_not_forgotten_while_its_interface_was_there_all_along(table: InterfaceTable) -> None:
    case = Case("ab")
    case.fails("b")
    for _ in range(2):
        case.roster.links_changed(table, borrow=False)
    assert case.order() == "aB"


def test_when_all_interfaces_are_away_the_one_that_went_first_is_tried(clock: Clock, table: InterfaceTable) -> None:
    case = Case("abc")
    for index, name in ((2, "b"), (3, "c"), (1, "a")):
        table.apply(link(index, name, up=False))
        case.roster.links_changed(table, borrow=False)
        clock.now += 1.0
    assert case.order() == "BCA"


def test_a_borrowed_address_is_needed_nowhere(table: InterfaceTable) -> None:
    case = Case("ab")
    table.apply(link(9, "b"))  # another one, without an address
    case.roster.links_changed(table, borrow=True)
    assert case.order() == "ab"
    case.roster.links_changed(table, borrow=False)
    assert case.order() == "aB"
