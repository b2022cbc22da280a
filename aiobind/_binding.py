"""Law: from a source's addresses, a target and the host's links, decide what is done to the socket. No I/O, no clock.

The decision is a `Binding` (do this) or a `Refusal` (this source cannot serve this target, and why). A refusal
carries the errno that the kernel would have used: EADDRNOTAVAIL for the source, ENETUNREACH for the way.
Everything here is a value, so every rule is a row of a table in the tests.
"""

from __future__ import annotations

import errno
import socket
from functools import cached_property, lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from ._advice import advice

if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from ipaddress import IPv4Network

__all__ = ["Binding", "Exempt", "IPAddress", "Link", "LinkAddress", "Refusal", "Target", "bind_any", "bind_on_link"]

IPAddress: TypeAlias = IPv4Address | IPv6Address

#: A message lists this many things before it says "and N more".
_LISTED = 8

#: Kinds of interface that take every packet which arrives at one of their ports: a socket on the port hears nothing.
_TAKES_OVER = {"bridge", "bond", "team"}


class Target(NamedTuple):
    """One address to connect to. ``of`` makes it; ``reach`` is how far away it can be.

    A socket that is not going to connect has a target as well, which says no more than its family: ``anywhere``.
    """

    family: int
    host: str
    port: int
    scope_id: int
    reach: Literal["loopback", "link", "global", "any"]

    @classmethod
    def anywhere(cls, family: int) -> Target:
        """Return the target of a socket that sends to whatever address of *family* it is told."""
        return cls(family, "::" if family == socket.AF_INET6 else "0.0.0.0", 0, 0, "any")

    @classmethod
    def of(cls, ip: IPAddress, port: int, scope_id: int = 0) -> Target:
        """Return the target for *ip*, whose zone (if any) is the interface with the index *scope_id*.

        An IPv4-mapped address is the IPv4 address in it: such a packet is IPv4 on the wire, from an IPv4 source.
        """
        if ip.version == 6 and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        reach: Literal["loopback", "link", "global"]
        # To connect to 0.0.0.0 or :: is to connect to this host (ip(7), INADDR_ANY).
        reach = "loopback" if ip.is_loopback or ip.is_unspecified else "link" if ip.is_link_local else "global"
        if ip.version == 4:
            return cls(socket.AF_INET, str(ip), port, 0, reach)
        return cls(socket.AF_INET6, zoneless(ip), port, scope_id, reach)

    @property
    def sockaddr(self) -> tuple[str, int] | tuple[str, int, int, int]:
        """The address as the socket module takes it."""
        if self.family == socket.AF_INET6:
            return self.host, self.port, 0, self.scope_id
        return self.host, self.port

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.family == socket.AF_INET6 else f"{self.host}:{self.port}"


class Addresses(tuple[IPAddress, ...]):
    """Addresses in their order, which tell whether one is among them in constant time: an interface may have 10,000."""

    @cached_property
    def _set(self) -> frozenset[IPAddress]:
        return frozenset(self)

    def __contains__(self, ip: object) -> bool:
        return ip in self._set


class Binding(NamedTuple):
    """What is done to one socket before it connects.

    Attributes:
        device: the interface that every packet must leave by; None leaves that to the routing table.
        local: the source addresses that keep the promise, the best one first, all of the socket's family; empty: any
            that the kernel picks.
        freebind: *local* may be an address that no interface holds (ip(7), IP_FREEBIND).
        owner: the link that the connection stands and falls with; None when there is none.
    """

    device: str | None = None
    local: tuple[IPAddress, ...] = ()
    freebind: bool = False
    owner: Link | None = None


class Refusal(NamedTuple):
    """Why a source cannot serve a target. Nothing has been sent."""

    errno: int
    reason: str


class LinkAddress(NamedTuple):
    """One address that an interface holds.

    Attributes:
        ip: the address, without a zone.
        scope: rtnetlink(7), rtm_scope: 0 reaches everything, a larger number less (253: only its link).
        tentative: not usable yet, or found to be somebody else's.
        deprecated: usable, but the last choice of the kernel.
    """

    ip: IPAddress
    scope: int = 0
    tentative: bool = False
    deprecated: bool = False


class Link:
    """One interface, as the kernel last described it."""

    __slots__ = ("addresses", "altnames", "carrier", "index", "kind", "loopback", "master", "name", "up")

    def __init__(
        self,
        index: int,
        name: str,
        *,
        loopback: bool = False,
        kind: str = "",
        master: int = 0,
        altnames: tuple[str, ...] = (),
        up: bool = True,
        carrier: bool = True,
        addresses: dict[str, LinkAddress] | None = None,
    ) -> None:
        self.index = index
        self.name = name
        self.loopback = loopback
        self.kind = kind
        self.master = master
        self.altnames = altnames
        self.up = up
        self.carrier = carrier
        #: by their text
        self.addresses = {} if addresses is None else addresses

    def __repr__(self) -> str:
        return f"Link({self.index}, {self.name!r})"


@lru_cache(maxsize=4096)
def zoneless(ip: IPAddress) -> str:
    """Return *ip* as text, without its zone."""
    return str(ip).partition("%")[0]


def listed(things: Iterable[object]) -> str:
    """Return *things* joined for a message, the long tail counted."""
    texts = [str(thing) for thing in things]
    more = len(texts) - _LISTED
    return ", ".join(texts) if more <= 0 else f"{', '.join(texts[:_LISTED])} and {more} more"


def _no_source(ip: IPAddress) -> str:
    """Return why no connection comes from *ip*, which only a name can stand for: the grammar refuses it."""
    if ip.is_multicast:
        return "multicast"
    if ip.is_unspecified:
        return "wildcard"
    return "broadcast" if ip == _BROADCAST else ""


_BROADCAST = IPv4Address("255.255.255.255")


def _version(target: Target) -> int:
    return 6 if target.family == socket.AF_INET6 else 4


def bind_any(
    local: tuple[IPAddress, ...],
    target: Target,
    *,
    own: Container[str] = (),
    device: str | None = None,
    freebind: bool = False,
) -> Binding | Refusal:
    """Decide for a source that names its addresses: bind one of *local* that has the target's family.

    Args:
        local: the addresses of the source, the first one first.
        target: where to.
        own: every address of this host, as text; asked only when a loopback or link-local address is to leave for
            elsewhere.
        device: the interface to pin as well.
        freebind: no interface needs to hold the address.
    """
    version = _version(target)
    same = tuple(ip for ip in local if ip.version == version)
    if not same:
        return Refusal(errno.EADDRNOTAVAIL, f"the source has no IPv{version} address (it has {listed(local)})")
    sources = tuple(ip for ip in same if not _no_source(ip))
    if not sources:
        text = advice("bind", errno.EADDRNOTAVAIL, "multicast", subject=same[0], what=_no_source(same[0]))
        return Refusal(errno.EADDRNOTAVAIL, text or "")
    if version == 6 and target.reach == "global" and target.host not in own:
        same, sources = sources, tuple(ip for ip in sources if not ip.is_link_local)
        if not sources:
            return Refusal(errno.EADDRNOTAVAIL, f"the link-local address {same[0]} reaches no further than its link")
    # Measured: from ::1 the kernel sends SYNs to other hosts, which can never answer.
    near = target.reach in ("loopback", "any")
    usable = tuple(ip for ip in sources if near or not ip.is_loopback or target.host in own)
    if not usable:
        return Refusal(
            errno.ENETUNREACH, f"from the loopback address {sources[0]} only this host itself can be reached"
        )
    return Binding(device, usable, freebind)


def bind_on_link(
    link: Link,
    target: Target,
    own: Container[str] = (),
    local: tuple[IPAddress, ...] | None = None,
    *,
    master: Link | None = None,
    borrow: bool = False,
) -> Binding | Refusal:
    """Decide for a source that is an interface: pin *link*, and see that its own address is used.

    Args:
        link: the interface.
        target: where to.
        own: every address of this host, as text.
        local: the addresses that the source names besides the interface; None when it names none.
        master: the interface of which *link* is a port.
        borrow: where *link* holds no address that serves, one of another interface will do.
    """
    if link.kind == "vrf":
        # A VRF device holds no address of its own, its ports do (Documentation/networking/vrf.rst).
        return Binding(link.name) if local is None else bind_any(local, target, own=own, device=link.name)
    blocked = _no_way(link, target, own)
    if blocked:
        return blocked
    if master is not None and master.kind in _TAKES_OVER:
        reason = f"{link.name} is a port of {master.name}, which takes what arrives there: use if!{master.name}"
        return Refusal(errno.EADDRNOTAVAIL, reason)
    if local is None:
        decision = _own_address(link, target)
        return Binding(link.name, owner=link) if borrow and isinstance(decision, Refusal) else decision
    # The whole of 127.0.0.0/8 is local to the loopback interface, which lists 127.0.0.1 alone.
    held = tuple(ip for ip in local if borrow or zoneless(ip) in link.addresses or (link.loopback and ip.is_loopback))
    if not held:
        has = f"it has {listed(link.addresses) or 'none'}"
        return Refusal(errno.EADDRNOTAVAIL, f"{listed(local)} is not an address of {link.name} ({has})")
    decision = bind_any(held, target, own=own, device=link.name)
    return decision._replace(owner=link) if isinstance(decision, Binding) else decision


def _no_way(link: Link, target: Target, own: Container[str]) -> Refusal | None:
    if not link.up:
        return Refusal(errno.ENETUNREACH, f"{link.name} is down")
    if not link.carrier:
        # The kernel finds out after 3 s, when nobody has answered for the neighbour.
        return Refusal(errno.EHOSTUNREACH, f"{link.name} has no carrier")
    if target.scope_id and target.scope_id != link.index:
        return Refusal(errno.ENETUNREACH, f"{target.host} lies in the zone of another interface than {link.name}")
    if link.loopback:
        if target.reach not in ("loopback", "any") and target.host not in own:
            return Refusal(errno.ENETUNREACH, f"only this host itself can be reached through {link.name}")
    elif target.reach == "loopback":
        # Measured: the kernel would ask for 127.0.0.1 by ARP on the wire of that interface.
        return Refusal(errno.ENETUNREACH, f"a loopback address cannot be reached through {link.name}")
    elif (
        (target.reach == "global" or target.family == socket.AF_INET)  # fe80::1 may be an address of many links
        and target.host in own
        and target.host not in link.addresses
    ):
        # Measured: SYNs leave by that interface, and nobody out there can answer for an address of this host.
        return Refusal(errno.ENETUNREACH, f"{target.host} is this host's own address, but not one of {link.name}")
    return None


def _own_address(link: Link, target: Target) -> Binding | Refusal:
    """Allow the addresses of *link* that can serve *target*, in the order of RFC 6724 (rules 2 and 3).

    Left alone the kernel takes the address of another interface where this one has lesser ones, for the rules of scope
    and of not being deprecated come before that of the outgoing interface (rule 5); and whatever address a route names
    (``ip route ... src``). All measured on Linux 6.18 with a device-bound socket.
    """
    version = _version(target)
    same = [address for address in link.addresses.values() if address.ip.version == version]
    ready = [address for address in same if not address.tentative]
    if not ready:
        state = f"only tentative IPv{version} addresses" if same else f"no IPv{version} address"
        return Refusal(errno.EADDRNOTAVAIL, f"{link.name} has {state}")
    if version == 6 and target.reach not in ("loopback", "any"):
        # A link-local target is reached from a link-local address, which reaches no other one.
        on_link = target.reach == "link"
        ready = [address for address in ready if address.ip.is_link_local == on_link]
        if not ready:
            what = "no link-local IPv6 address"
            if not on_link:
                what = "only link-local IPv6 addresses, which reach no further than its link"
            return Refusal(errno.EADDRNOTAVAIL, f"{link.name} has {what}")
    ready.sort(key=lambda address: (address.deprecated, address.scope))
    return Binding(link.name, Addresses(address.ip for address in ready), owner=link)


_MAPPED: Final = IPv6Network("::ffff:0:0/96")  # `Target.of` takes the IPv4 address out of it


class Exempt:
    """Destinations that no source is pinned for: names, addresses and networks.

    Args:
        entries: host names (each for itself alone, in any case), IP addresses, and networks as in ``"10.0.0.0/8"``.

    Raises:
        TypeError: not a sequence of texts.
        ValueError: a text is neither a name, an address nor a network.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        if isinstance(entries, str):
            raise TypeError(f"direct is a sequence of hosts and networks, as in direct=({entries!r},)")
        self._names: set[str] = set()
        self._networks: list[IPv4Network | IPv6Network] = []
        for entry in entries:
            if not isinstance(entry, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"direct holds texts, not {type(entry).__name__}")
            name = entry.rstrip(".").casefold()
            try:
                network = ip_network(entry)
            except ValueError as error:
                # getaddrinfo reads a number at the end as an address: 127.1, 256.1.1.1
                if not name or not set(name).isdisjoint("/*:%[] ") or name.rpartition(".")[2].isdecimal():
                    raise ValueError(f"direct: {entry!r} is no host, no address and no network ({error})") from None
                self._names.add(name)
            else:
                if "%" in entry or (network.version == 6 and network.subnet_of(_MAPPED)):
                    raise ValueError(f"direct: {entry!r}: give a network without a zone, IPv4 as IPv4")
                self._networks.append(network)

    def names(self, host: str) -> bool:
        """Return whether *host* is exempt by its name."""
        return host.rstrip(".").casefold() in self._names

    def covers(self, host: str, target: Target) -> bool:
        """Return whether *target*, which belongs to *host*, is exempt."""
        if target.reach == "any":
            return False
        return self.names(host) or (
            bool(self._networks) and any(ip_address(target.host) in network for network in self._networks)
        )
