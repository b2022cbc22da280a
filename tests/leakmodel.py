"""Law: what must happen to a connection, from the documentation and the kernel's own rules. Pure, and without aiobind.

A case is a source, a target, a state of the NIC n1, a routing, a setting of rp_filter and a privilege. The state says
what n1 holds; ``expected`` says by which NIC and from which address the connection then leaves, or how it fails.
``leaktable.py`` holds this against packets.
"""

from __future__ import annotations

import errno
import itertools
import socket
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

V4, V6 = "203.0.113.80", "2001:db8:ffff::80"  # on the far side
H4, H6 = "198.18.1.2", "2001:db8:1::2"  # n1's, which sources name
S4, S6 = "198.18.1.22", "2001:db8:1::22"  # n1's second ones, where it has such
A4 = "198.18.1.55"  # with the label n1:1
LL, GATEWAY_LL = "fe80::1:2", "fe80::1:1"
NET4, NET6 = "198.51.100.0/28", "2001:db8:77::/64"
SOON, NEIGHBOUR = 0.5, 3.1  # seconds that a failure may take: aiobind's own, and the kernel's when nobody answers
LATER = 0.25  # RFC 8305: so much later begins the attempt at the next address

# --- the factors --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """What is asked for: *texts* with ``{n1}`` for what the state calls the NIC, the devices and addresses in them."""

    name: str
    texts: tuple[str, ...]
    devices: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    option: str = ""


@dataclass(frozen=True, eq=False)
class Target:
    """Where to: what *host* stands for, and the interface that a link-local one names."""

    name: str
    host: str
    addresses: tuple[str, ...]
    zone: str = ""


@dataclass(frozen=True)
class Device:
    """What the kernel says of a NIC: its addresses with their kinds, its link, the families of its default routes."""

    addresses: Mapping[str, str] = field(default_factory=dict)
    link: str = "up"  # or "down", "no carrier", "port"
    defaults: tuple[int, ...] = (4, 6)


@dataclass(frozen=True, eq=False)
class State:
    """How n1 is: the commands that make it so, what the kernel then says, and what the sources call n1.

    A command is for ``ip`` in near, unless ``far`` or ``sysctl`` stands in front. ``+4 NIC`` and ``+6 NIC`` give n1's
    default routes to *NIC*, ``-4 NIC`` and ``-6 NIC`` take them away.
    """

    name: str
    change: tuple[str, ...] = ()
    devices: Mapping[str, Device] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    called: str = "n1"


SOURCES = (
    Source("if!n1", ("if!{n1}",), ("n1",)),
    Source("if!lo", ("if!lo",), ("lo",)),
    Source("v4", (H4,), (), (H4,)),
    Source("v6", (H6,), (), (H6,)),
    Source("ifhost v4", (f"ifhost!{{n1}}!{H4}",), ("n1",), (H4,)),
    Source("ifhost v6", (f"ifhost!{{n1}}!{H6}",), ("n1",), (H6,)),
    Source("ifhost name", ("ifhost!{n1}!nic1.test",), ("n1",), (H4, H6)),
    Source("host name", ("host!nic1.test",), (), (H4, H6)),
    Source("net v4", (f"net!{NET4}",), (), (NET4,)),
    Source("net v6", (f"net!{NET6}",), (), (NET6,)),
    Source("if!n1, if!n2", ("if!{n1}", "if!n2"), ("n1", "n2")),
    Source("if!n1 borrow", ("if!{n1}",), ("n1",), (), "borrow"),
    Source("if!n1 direct", ("if!{n1}",), (), (), "direct"),
    Source("if!n1 not strict", ("if!{n1}",), ("n1",), (), "not strict"),
    Source("ifhost v4 borrow", (f"ifhost!{{n1}}!{H4}",), ("n1",), (H4,), "borrow"),
)
TARGETS = (
    Target("v4", V4, (V4,)),
    Target("v6", V6, (V6,)),
    Target("dual", "dual.test", (V6, V4)),
    Target("loopback v4", "127.0.0.1", ("127.0.0.1",)),
    Target("loopback v6", "::1", ("::1",)),
    Target("own v4", H4, (H4,)),
    Target("own v6", H6, (H6,)),
    Target("n0's v4", "198.18.0.2", ("198.18.0.2",)),
    Target("link-local", f"{GATEWAY_LL}%n1", (GATEWAY_LL,), "n1"),
)

OWN, SECOND = {H4: "", H6: "", LL: ""}, {S4: "", S6: "", LL: ""}
N1 = Device(OWN)
OTHERS = {
    "lo": Device({"127.0.0.1": "", "::1": ""}, defaults=()),
    "n0": Device({"198.18.0.2": "", "2001:db8::2": ""}),
    "n2": Device({"198.18.2.2": "", "2001:db8:2::2": ""}),
}
N2_TOO = Device({**OTHERS["n2"].addresses, H4: "", H6: ""})
_SECOND_TOO = (f"addr add {S4}/24 dev n1", f"addr add {S6}/64 dev n1 nodad")
_NO_WIDE = (f"addr del {H4}/24 dev n1", f"addr del {H6}/64 dev n1")
_NO_IPV6 = (f"addr del {H6}/64 dev n1", f"addr del {LL}/64 dev n1")
ROUTES = ("+4 n1", "+6 n1")  # which may have gone with the addresses
_BRIDGED = ("link add br0 type bridge", "link set br0 up", "link set n1 master br0")
_DAD = ("sysctl ipv6.conf.n1.accept_dad=1", "sysctl ipv6.conf.n1.dad_transmits=1000")
_FAR_END = (
    "link add n1 type veth peer name f1 netns {far}",
    *("far addr add 198.18.1.1/24 dev f1", "far addr add 2001:db8:1::1/64 dev f1 nodad"),
    *(f"far addr add {GATEWAY_LL}/64 dev f1 nodad", "far link set f1 up"),
)


def _all_to(nic: str) -> tuple[str, ...]:
    v6 = (f"addr add {H6}/64 dev {nic} nodad", f"addr add {LL}/64 dev {nic} nodad")
    return (f"link set {nic} up", f"addr replace {H4}/24 dev {nic}", *v6, f"+4 {nic}", f"+6 {nic}")


STATES = (
    State("up", (), {"n1": N1}),
    State("no route", ("-4 n1", "-6 n1"), {"n1": Device(OWN, defaults=())}),
    State("no address", ("addr flush dev n1", *ROUTES), {"n1": Device()}),
    State("no IPv4 address", (_NO_WIDE[0], *ROUTES), {"n1": Device({H6: "", LL: ""})}),
    State("no IPv6 address", (*_NO_IPV6, *ROUTES), {"n1": Device({H4: ""})}),
    State("down", ("link set n1 down",), {"n1": Device({H4: ""}, "down", ())}),
    State("no carrier", ("far link set f1 down",), {"n1": Device(OWN, "no carrier")}),
    State("missing", ("link del n1",)),
    State("renamed", ("link set n1 down", "link set n1 name wan", *_all_to("wan")), {"wan": N1}),
    State("re-created", ("link del n1", *_FAR_END, *_all_to("n1")), {"n1": N1}),
    State("address removed", (*_NO_WIDE, *ROUTES), {"n1": Device(SECOND)}, _SECOND_TOO),
    State(
        "tentative",
        (*_DAD, *_NO_IPV6, f"addr add {H6}/64 dev n1", f"addr add {LL}/64 dev n1", *ROUTES),
        {"n1": Device({H4: "", H6: "tentative", LL: "tentative"})},
    ),
    State(
        "deprecated",
        (f"addr change {H6}/64 dev n1 preferred_lft 0",),
        {"n1": Device({H4: "", H6: "deprecated", S6: "", LL: ""})},
        _SECOND_TOO[1:],
    ),
    State(
        "address on n2",
        (*_NO_WIDE, f"addr add {H4}/32 dev n2", f"addr add {H6}/128 dev n2 nodad", *ROUTES),
        {"n1": Device(SECOND), "n2": N2_TOO},
        _SECOND_TOO,
    ),
    State("wrong case", (), {"n1": N1}, called="N1"),
    State("alias label", (), {"n1": Device({**OWN, A4: ""})}, (f"addr add {A4}/32 dev n1 label n1:1",), "n1:1"),
    State(
        "port of a bridge",
        (*_BRIDGED, "addr flush dev n1", *_all_to("br0")),
        {"n1": Device({}, "port", ()), "br0": N1},
    ),
    State("port with addresses", _BRIDGED, {"n1": Device(OWN, "port"), "br0": Device(defaults=())}),
    State("only link-local", (*_NO_WIDE, *ROUTES), {"n1": Device({LL: ""})}),
    State(
        "only deprecated",
        (f"addr change {H4}/24 dev n1 preferred_lft 0", f"addr change {H6}/64 dev n1 preferred_lft 0"),
        {"n1": Device({H4: "deprecated", H6: "deprecated", LL: ""})},
    ),
    State(
        "only scope link",
        (_NO_WIDE[0], f"addr add {H4}/24 dev n1 scope link", *ROUTES),
        {"n1": Device({H4: "scope link", H6: "", LL: ""})},
    ),
)
ROUTINGS = ("metric", "source rule", "oif rule")
RP_FILTERS = (0, 1, 2)
PRIVILEGES = ("root", "no capabilities", "EPERM")
LOOPS = ("asyncio", "uvloop")
PEERS = ("curl if!", "curl address", "aiohttp local_addr")


class Environment(NamedTuple):
    """What the cases of one process have in common."""

    state: State
    routing: str
    rp_filter: int
    privilege: str
    loop: str = LOOPS[0]

    @property
    def devices(self) -> dict[str, Device]:
        return {**OTHERS, **self.state.devices}


class Case(NamedTuple):
    """One connection. *client* is the name of a source of aiobind's, or one of PEERS."""

    environment: Environment
    client: str
    target: Target

    @property
    def source(self) -> Source:
        """The source that is asked for: a peer is to leave by n1."""
        return next((source for source in SOURCES if source.name == self.client), SOURCES[0])

    @property
    def texts(self) -> tuple[str, ...]:
        """The sources as the connector takes them."""
        return tuple(text.format(n1=self.environment.state.called) for text in self.source.texts)

    @property
    def names(self) -> tuple[str, str, str]:
        """The state, the client and the target by name."""
        return self.environment.state.name, self.client, self.target.name

    def __str__(self) -> str:
        state, routing, rp_filter, privilege, _ = self.environment
        return f"{state.name} | {self.client} | {self.target.name} | {routing}, rp_filter={rp_filter}, {privilege}"


# --- the selection ------------------------------------------------------------------------------------------


def selection(*, full: bool = False) -> list[Case]:
    """Return each source x target x state once, or the full product.

    Every state meets three environments, by a Latin square that turns with the state: so each two values of routing,
    rp_filter and privilege meet. The sources and targets of a state are dealt out to them by diagonals.
    """
    cases = []
    for k, state in enumerate(STATES):
        some = [(i, (i + k) % 3, (i + k // 3) % 3) for i in range(3)]
        for number, (i, r, p) in enumerate(itertools.product(range(3), repeat=3) if full else some):
            environment = Environment(state, ROUTINGS[i], RP_FILTERS[r], PRIVILEGES[p], LOOPS[(number + k) % 2])
            for (a, source), (b, target) in itertools.product(enumerate(SOURCES), enumerate(TARGETS)):
                if full or (a + b + k) % 3 == i:
                    cases.append(Case(environment, source.name, target))
    return cases


def peers(clients: Iterable[str]) -> list[Case]:
    """Return what the peers are asked: each target in each state, as root and where the device pin is refused."""
    environments = [Environment(state, "metric", 0, privilege) for state in STATES for privilege in ("root", "EPERM")]
    return [Case(*each) for each in itertools.product(environments, clients, TARGETS)]


# --- the model ----------------------------------------------------------------------------------------------


class Left(NamedTuple):
    """It leaves by one of *nics* from one of *addresses* (none: any of the host's); *answered* None: either way."""

    nics: tuple[str, ...]
    addresses: tuple[str, ...]
    answered: bool | None
    pinned: str | None

    def __str__(self) -> str:
        answer = {True: "", False: ", no answer", None: ", answered or not"}[self.answered]
        return f"left by {'/'.join(self.nics)} from {'/'.join(self.addresses) or 'any'}{answer}"


class Failed(NamedTuple):
    """It fails with the class *kind* and one of *errnos* within so many seconds, or is "silent"; nothing leaves.

    Where several reasons hold at once any of them will do; the first one is that of the link.
    """

    kind: str
    errnos: tuple[int, ...]
    within: float = SOON

    def __str__(self) -> str:
        errnos = "/".join(map(errno_name, self.errnos))
        return "neither packet nor answer" if self.kind == "silent" else f"{self.kind} {errnos} within {self.within} s"


def _failed(kind: str, *errnos: int, within: float = SOON) -> Failed:
    return Failed(kind, errnos, within)


def errno_name(number: int) -> str:
    return errno.errorcode.get(number, "EAI_NONAME" if number == socket.EAI_NONAME else str(number))


def version_of(address: str) -> int:
    return 6 if ":" in address else 4


_NO_WAY = (errno.ENETUNREACH,)
_LINK = {"down": errno.ENETUNREACH, "no carrier": errno.EHOSTUNREACH, "port": errno.EADDRNOTAVAIL}
NETS = {
    "n1": ("198.18.1.0/24", "2001:db8:1::/64"),
    "n0": ("198.18.0.0/24", "2001:db8::/64"),
    "n2": ("198.18.2.0/24", "2001:db8:2::/64"),
}


def expected(case: Case) -> Left | Failed:
    """Return what must happen."""
    environment, _, target = case
    if environment.state.called == "n1:1" and "{n1}" in case.source.texts[0]:
        return _failed("InvalidSource", 0)
    if target.zone and target.zone not in environment.devices:
        return _failed("ResolveError", socket.EAI_NONAME)
    outcomes: list[Left | Failed] = []
    for device in case.source.devices or ("",):
        each = [_to(environment, case.source, device, address, target.zone) for address in target.addresses]
        outcomes.append(_merged(each))
        # The next source is tried when this one itself has failed.
        if not all(isinstance(one, Failed) and one.kind == "BindError" for one in each):
            break
    return _merged(outcomes)


def _merged(outcomes: Sequence[Left | Failed]) -> Left | Failed:
    """Return what becomes of one connection whose addresses, or sources, fare like this."""
    left = [outcome for outcome in outcomes if isinstance(outcome, Left)]
    if left:
        answers = {outcome.answered for outcome in left}
        nics, addresses = ({each: None for outcome in left for each in outcome[i]} for i in (0, 1))
        answered = True if True in answers else None if None in answers else False
        return Left(tuple(nics), tuple(addresses), answered, left[0].pinned)
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    kinds = {outcome.kind for outcome in failed}
    kind = next(kind for kind in ("silent", "ConnectError", "BindError") if kind in kinds)
    errnos = {
        number: None
        for outcome in failed
        if kind in ("BindError", outcome.kind) or outcome.errnos == _NO_WAY
        for number in outcome.errnos
    }
    later = sum(outcome.within == NEIGHBOUR for outcome in failed[1:])  # each begins later
    return Failed(kind, tuple(errnos), max(outcome.within for outcome in failed) + LATER * later)


def _to(environment: Environment, source: Source, device: str, target: str, zone: str) -> Left | Failed:
    """Return what must happen to a connection to one address by one device, or by none in particular."""
    devices, version, refused = environment.devices, version_of(target), environment.privilege == "EPERM"
    kinds = {name: each.addresses[target] for name, each in devices.items() if target in each.addresses}
    own, loopback = set(kinds), ip_address(target).is_loopback
    local = loopback or bool(set(kinds.values()) - {"tentative"})  # the kernel has a local route
    if device and (environment.state.called if device == "n1" else device) not in devices:
        return _failed("BindError", errno.ENODEV)
    searched = devices.values() if not device or source.option == "borrow" else [devices[device]]
    held = {address: kind for each in searched for address, kind in each.addresses.items()}
    same = [each for each in source.local if version_of(each) == version]
    addresses = tuple(each for each in same if "/" in each or held.get(each, "tentative") != "tentative")
    if device and not source.local:
        addresses = _own(devices[device], target, local=local)
    none_serves = not addresses and (source.local or (device and source.option != "borrow"))
    if device:
        link = devices[device].link
        here = loopback or bool(own)
        elsewhere = not here if device == "lo" else here and device not in own
        reasons = [_LINK[link]] if link in _LINK else []
        reasons += [errno.ENETUNREACH] if elsewhere or zone not in ("", device) else []
        reasons += [errno.EADDRNOTAVAIL] if none_serves else []
        if none_serves and same and refused and (source.option == "borrow" or {*same} & {*held}):
            reasons += [errno.EPERM]  # that the address serves nobody is for the kernel to say, after the pin
        if not reasons and refused and source.option != "not strict":
            reasons = [errno.EPERM]
        if reasons:
            return _failed("BindError", *reasons)
    elif none_serves:
        return _failed("BindError", errno.EADDRNOTAVAIL)
    pinned = None if refused and not zone else device or None  # the zone of a link-local source is a pin as well
    if device == "lo" and version == 6 and not loopback:
        return _failed("BindError", errno.ENETUNREACH)  # the kernel has this route at the other NIC
    if local:
        return Left(("lo",), addresses, True, pinned)
    outcomes = [_routed(environment, address, target, pinned, zone) for address in addresses or ("",)]
    outcome = _merged(outcomes)
    if isinstance(outcome, Left) and len({isinstance(each, Left) and each.answered for each in outcomes}) > 1:
        return outcome._replace(answered=None)  # it hangs on which of them the kernel takes
    return outcome


def _own(device: Device, target: str, *, local: bool) -> tuple[str, ...]:
    """Return the addresses of *device* of which one must be the source: to another host one of the best kind."""
    near = target == GATEWAY_LL
    fit = {
        address: kind
        for address, kind in device.addresses.items()
        if version_of(address) == version_of(target)
        and kind != "tentative"
        and (":" not in address or near == (address == LL))
    }
    preferred = tuple(address for address, kind in fit.items() if kind != "deprecated")
    return (not local and preferred) or tuple(fit)


def _routed(environment: Environment, source: str, target: str, pinned: str | None, zone: str) -> Left | Failed:
    """Return what the kernel does with a socket that is bound to these."""
    version, bound = version_of(target), pinned or zone
    out, on_link = _route(environment, source, target, bound)
    if not out and (version == 6 or not pinned):
        return _failed("BindError", errno.ENETUNREACH)
    device, seen_as = environment.devices[out or bound], _seen_as(out or bound)
    mute = version == 6 and seen_as == "n1" and device.addresses.get(LL) != ""  # it cannot ask for a neighbour
    if zone and mute and not source:
        return _failed("BindError", errno.EADDRNOTAVAIL)
    if not out or mute or device.link != "up" or (on_link and target != GATEWAY_LL):  # no neighbour answers
        if zone and not pinned:  # a socket with a device is not told (6.18), and nobody watches over this one
            return _failed("silent", 0, within=NEIGHBOUR)
        return _failed("ConnectError", errno.EHOSTUNREACH, within=NEIGHBOUR)
    answered: bool | None = target in (V4, V6, GATEWAY_LL)  # and nobody forwards to any other
    home = next((name for name, nets in NETS.items() if any(_within(source, net) for net in nets)), "n0")
    asked = version == 4 or "/" in source or source in device.addresses  # IPv6 answers for what its NIC holds
    if answered and not source:
        answered = None if pinned else True
    elif answered and (not asked or (source != LL and home != seen_as)):  # the answer comes to another NIC, or to none
        answered = False if pinned else None
    elif version == 4 and environment.rp_filter == 1 and _route(environment, source, target, "")[0] != out:
        answered = False
    return Left((seen_as,), (source,) if source else (), answered, pinned)


def _within(address: str, network: str) -> bool:
    same = bool(address) and version_of(address) == version_of(network)
    return same and ip_network(address).subnet_of(ip_network(network))


def _seen_as(device: str) -> str:
    """Return the NIC as which the far side knows *device*: n1 may be renamed, or in a bridge."""
    return device if device in ("n0", "n2") else "n1"


def _route(environment: Environment, source: str, target: str, out: str) -> tuple[str, bool]:
    """Return the device that the routing tables name ("" for none), and whether they take *target* for on-link."""
    version, routing = version_of(target), environment.routing
    usable = {
        n: each for n, each in environment.devices.items() if n != "lo" and each.link != "down" and out in ("", n)
    }
    gateways = {name: version in each.defaults for name, each in usable.items()}
    ours = [name for name, is_one in gateways.items() if is_one and _seen_as(name) == "n1"]
    if ours and ((routing == "source rule" and source in (H4, H6)) or (routing == "oif rule" and out == "n1")):
        return ours[0], False
    for name, each in usable.items():
        nets = (*NETS[_seen_as(name)], "fe80::/64")
        if any(_within(target, net) and any(_within(address, net) for address in each.addresses) for net in nets):
            return name, True
    order = ("n0", *(ours if routing == "metric" else ()), "n2")
    return next((name for name in order if gateways.get(name)), ""), False


# --- the promises, for a reader -----------------------------------------------------------------------------

#: The columns: what the source is called, and the sources that show it for a target of IPv4 and of IPv6.
_COLUMNS = {
    "`if!n1`": ("if!n1", "if!n1"),
    "`ifhost!n1!ADDRESS`": ("ifhost v4", "ifhost v6"),
    "`ADDRESS`, `host!NAME`": ("v4", "v6"),
    "`net!PREFIX`": ("net v4", "net v6"),
    "`if!n1`, then `if!n2`": ("if!n1, if!n2", "if!n1, if!n2"),
    "`if!n1` with `borrow=True`": ("if!n1 borrow", "if!n1 borrow"),
}


def table() -> str:
    """Return what is promised as Markdown: by the state of n1, and by the target while n1 is up."""
    hosts = {target.name: target for target in TARGETS}
    far = {state.name: (state, hosts["v4"], hosts["v6"]) for state in STATES}
    pairs = {"loopback": "loopback", "n1's own address": "own", "another host": ""}
    up = {name: (STATES[0], hosts[f"{kind} v4".strip()], hosts[f"{kind} v6".strip()]) for name, kind in pairs.items()}
    return f"{_table('n1', far)}\n\n{_table('target', up)}"


def _table(corner: str, rows: Mapping[str, tuple[State, Target, Target]]) -> str:
    lines = [" | ".join([corner, *_COLUMNS]), " | ".join(["---"] * (1 + len(_COLUMNS)))]
    for name, (state, *targets) in rows.items():
        environment, cells = Environment(state, "metric", 0, "root"), [name]
        for clients in _COLUMNS.values():
            words = [_word(expected(Case(environment, *each))) for each in zip(clients, targets, strict=True)]
            cells.append(words[0] if words[0] == words[1] else " / ".join(words))
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _word(outcome: Left | Failed) -> str:
    if isinstance(outcome, Left):
        return "/".join(outcome.nics)
    if outcome.kind in ("silent", "InvalidSource"):
        return outcome.kind.replace("silent", "no packet")
    return errno_name(outcome.errnos[0]) + (" (3 s)" if outcome.within > SOON else "")
