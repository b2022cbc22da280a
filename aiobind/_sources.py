"""Law: a source is a value. Nothing here does I/O or reads a clock.

    source  = "if!" NAME                    Interface(NAME)
            | ADDRESS                       Address(ADDRESS)
            | "host!" end                   Host(HOST), or the Address
            | "ifhost!" NAME "!" end        Interface(NAME, local=end)
            | "net!" ADDRESS "/" LENGTH     Prefix(ADDRESS/LENGTH), no bit set after LENGTH
    end     = HOST | ADDRESS                a link-local ADDRESS takes its zone from NAME
    ADDRESS = what ``ipaddress`` reads, with "%" NAME if it is link-local IPv6, and only then
    HOST    = labels of letters, digits, "-" and "_"; the last one is no number
    NAME    = what Linux takes for the name of a device: at most 15 bytes

The canonical text is the identity of a source: ``==``, ``hash``, ``str`` and pickling all go by it.
Reading and advising are apart: a reader says what is wrong, and ``_hint`` offers only what a reader takes.
"""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, final

from ._errors import InvalidSource, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Address", "Host", "Interface", "Prefix", "Source", "is_fixed", "parse_source"]

_Kind = TypeVar("_Kind", bound="_Value")


class _Value:
    """What the four kinds share: the canonical text is the identity, and a ``str`` caches its own hash."""

    __slots__ = ("_text",)
    _text: str

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, _Value) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple[Callable[[str], Source], tuple[str]]:
        return parse_source, (self._text,)


@final
@dataclass(frozen=True, slots=True, init=False, eq=False, repr=False)
class Interface(_Value):
    """An interface of this host: traffic leaves by it, or not at all.

    Args:
        name: the name of the device, by the rule of the Linux kernel (``dev_valid_name``).
        local: the source address on it, or the host name that stands for one; by default the kernel picks.

    Raises:
        InvalidSource: no device can have this name, or *local* has the zone of another one.
    """

    name: str
    local: Address | Host | None

    def __new__(cls, name: str, local: Address | Host | None = None) -> Interface:
        name = _spelled(name, "the name of an Interface")
        if type(local) not in {Address, Host, NoneType}:
            raise TypeError(f"local of an Interface is Address, Host or None, not {type(local).__name__}")
        try:
            return _interface(name, local)
        except _Fault as fault:
            text = f"if!{name}"
            if local is not None:
                text = f"ifhost!{name}!{local.name if isinstance(local, Host) else local}"
            raise _refusal(text, fault) from None

    def __repr__(self) -> str:
        local = "" if self.local is None else f", local={self.local!r}"
        return f"Interface({self.name!r}{local})"


@final
@dataclass(frozen=True, slots=True, init=False, eq=False, repr=False)
class Address(_Value):
    """A source address; the route, not the address, decides by which interface traffic leaves.

    Args:
        ip: the address; link-local IPv6 with its zone, as in ``fe80::1%eth0``.

    Raises:
        InvalidSource: not an address, or one that no connection can come from.
    """

    ip: IPv4Address | IPv6Address

    def __new__(cls, ip: str | IPv4Address | IPv6Address) -> Address:
        text = _spelled(ip, "the ip of an Address", IPv4Address, IPv6Address)
        try:
            return _address(text)
        except _Fault as fault:
            raise _refusal(text, fault) from None

    def __repr__(self) -> str:
        return f"Address({self._text!r})"


@final
@dataclass(frozen=True, slots=True, init=False, eq=False, repr=False)
class Host(_Value):
    """A host name whose addresses, looked up for each connection, are the source addresses.

    Args:
        name: an ASCII host name; its case and a final dot are kept as they are given.

    Raises:
        InvalidSource: not a host name, or one that a resolver would read as an address.
    """

    name: str

    def __new__(cls, name: str) -> Host:
        name = _spelled(name, "the name of a Host")
        try:
            return _host(name)
        except _Fault as fault:
            raise _refusal(f"host!{name}", fault) from None

    def __repr__(self) -> str:
        return f"Host({self.name!r})"


@final
@dataclass(frozen=True, slots=True, init=False, eq=False, repr=False)
class Prefix(_Value):
    """A network that is routed to this host: each connection comes from an address that ``pick`` chooses.

    Args:
        network: the network with its length, as in ``2001:db8:7::/64``.

    Raises:
        InvalidSource: not a network, or one with addresses that no connection can come from.
    """

    network: IPv4Network | IPv6Network

    def __new__(cls, network: str | IPv4Network | IPv6Network) -> Prefix:
        text = _spelled(network, "the network of a Prefix", IPv4Network, IPv6Network)
        try:
            return _prefix(text)
        except _Fault as fault:
            raise _refusal(f"net!{text}", fault) from None

    def __repr__(self) -> str:
        return f"Prefix({str(self.network)!r})"

    def pick(self, seed: bytes | None = None) -> IPv4Address | IPv6Address:
        """Return an address of the network that a host may have: a random one, or the one that *seed* stands for.

        That is not the first one, which names an IPv4 network and any router of an IPv6 one (RFC 4291 2.6.1),
        nor the last one of an IPv4 network, its broadcast address. A network of one or two addresses has
        neither (RFC 3021, RFC 6164).

        Args:
            seed: the same one gives the same address of this network, and another one any other address alike. Who
                knows the seed knows the address.
        """
        network = self.network
        size = network.num_addresses
        usable = range(size) if size <= 2 else range(1, size - 1 if network.version == 4 else size)
        if seed is None:
            import random  # noqa: PLC0415 - 1 ms that few need

            return network[random.randrange(usable.start, usable.stop)]
        from hashlib import blake2b  # noqa: PLC0415 - brings OpenSSL along: 2 ms that few need

        # Of 512 bits the remainder is uniform, but for one part in 2**384. The key tells networks of one size apart.
        drawn = int.from_bytes(blake2b(seed, key=self._text.encode()).digest(), "big")
        return network[usable[drawn % (usable.stop - usable.start)]]


Source: TypeAlias = Interface | Address | Host | Prefix


def is_fixed(source: Source) -> bool:
    """Return whether *source* stands for the same addresses as long as the interfaces stay what they are."""
    return isinstance(source, Address) or (isinstance(source, Interface) and not isinstance(source.local, Host))


def parse_source(source: str | Source) -> Source:
    """Return the source that a text names; a source is returned as it is.

    ``parse_source(str(source)) == source`` for every source.

    Args:
        source: ``if!NAME``, an IP address, ``host!NAME``, ``ifhost!NAME!IP-or-host`` or ``net!PREFIX``;
            nothing is stripped, and ``if!`` and the others are lower-case.

    Raises:
        InvalidSource: the text names no source; says what is wrong and what was probably meant.
        TypeError: neither text nor a source.
    """
    if isinstance(source, _Value):
        return source
    text = _spelled(source, "a source", Interface, Address, Host, Prefix)
    try:
        return _read(text)
    except _Fault as fault:
        raise _refusal(text, fault) from None


# Reading: a text becomes a value, or a fault.


class _Fault(Exception):  # noqa: N818 - never leaves this module
    """What is wrong, and at which part."""


_NAME_BYTES: Final = 15  # IFNAMSIZ less the final NUL
#: dev_valid_name (linux/net/core/dev.c): no "/", no ":" and no isspace(), which is true of the byte 0xA0 too
#: (linux/lib/ctype.c). Measured on 6.18: "à" (C3 A0) is refused, "é" (C3 A9) is not.
_NOT_IN_NAME: Final = frozenset(b"/:\0\t\n\v\f\r \xa0")
# Texts, which the module re keeps compiled once they are used: to compile them here would cost each import 1 ms.
_ALIAS: Final = r"[^:]+:[^:]+"

_LABEL: Final = r"(?i:[a-z0-9_-]*)"
#: getaddrinfo takes 127.1, 0x7f.1 and 2130706433 for addresses.
_NUMBER: Final = r"(?i:0x[0-9a-f]+|[0-9]+)"
_NUMBERS: Final = rf"{_NUMBER}(?:\.{_NUMBER})*"
_ADDRESSLIKE: Final = r"(?i:[][0-9a-fx.:]*[.:][][0-9a-fx.:]*|0x[0-9a-f]+|[0-9]+)"
_LENGTH: Final = r"[0-9]{1,3}"
_ADDRESS_LONGEST: Final = 64  # 45 characters of IPv6, "%" and a zone; longer texts are not worth a look

_LINK_LOCAL: Final = IPv6Network("fe80::/10")
_BINDS_AND_LEAKS: Final = "Linux binds it and then connects from another address"
_NO_SOURCE: Final = tuple(
    (ip_network(network), reason)
    for network, reason in (
        ("0.0.0.0/32", "unspecified: it stands for every address"),
        ("::/128", "unspecified: it stands for every address"),
        ("224.0.0.0/4", f"multicast: {_BINDS_AND_LEAKS}"),
        ("ff00::/8", "multicast: it is never a source (RFC 4291 2.7)"),
        ("255.255.255.255/32", f"broadcast: {_BINDS_AND_LEAKS}"),
        ("::ffff:0:0/96", "IPv4-mapped: it is IPv4 in disguise"),
    )
)


# The texts of a busy caller are few: 0.2 us instead of 2 to 20 (3.13). A refusal is not cached.
@lru_cache(1024)
def _read(text: str) -> Source:
    prefix, bang, rest = text.partition("!")
    match prefix + bang:
        case "if!":
            return _interface(rest)
        case "host!":
            return _end(rest)
        case "ifhost!":
            # NAME may hold a "!", and so may the zone of an address, but no NAME holds a ":".
            cut = rest.partition(":")[0].rfind("!")
            cut = rest.rfind("!") if cut < 0 else cut
            if cut < 0 or not rest[cut + 1 :]:
                raise _Fault("the address or host is missing, as in 'ifhost!eth0!192.0.2.7'")
            name = _name(rest[:cut])
            return _interface(name, _end(rest[cut + 1 :], name))
        case "net!":
            return _prefix(rest)
        case _ if bang and _literal(text) is None:
            raise _Fault("it starts with none of if!, host!, ifhost! and net! (exactly so, in lower case)")
        case _:
            return _address(text)


def _name(name: str, part: str = "interface name") -> str:
    """Return *name* if ``dev_valid_name`` takes it, spelled as ``os.fsdecode`` does."""
    if not name:
        raise _Fault(f"the {part} is empty")
    try:
        raw = name[: _NAME_BYTES + 1].encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise _Fault(f"the {part} holds a lone surrogate, which stands for no byte") from None
    if len(raw) > _NAME_BYTES:
        raise _Fault(f"the {part} is longer than {_NAME_BYTES} bytes")
    if name in {".", ".."}:
        raise _Fault(f"the {part} cannot be {name!r}")
    if part != "zone" and re.fullmatch(_ALIAS, name):
        label = f"{quoted(name)} is an address label (alias), not an interface"
        raise _Fault(f"{label}: give the interface, or the address itself")
    for byte in raw:
        if byte in _NOT_IN_NAME:
            note = ", white space to the kernel" if byte == 0xA0 else ", which no interface name may hold"
            raise _Fault(f"the {part} holds the byte {bytes([byte])!r}{note}")
    return raw.decode("utf-8", "surrogateescape")


def _interface(name: str, local: Address | Host | None = None) -> Interface:
    name = _name(name)
    if local is None:
        return _value(Interface, f"if!{name}", name=name, local=None)
    zone = local.ip.scope_id if isinstance(local, Address) and isinstance(local.ip, IPv6Address) else None
    if zone not in {None, name}:
        raise _Fault(f"the address is on the zone {quoted(str(zone))}, and the interface is {quoted(name)}")
    end = local.name if isinstance(local, Host) else str(local).partition("%")[0]
    return _value(Interface, f"ifhost!{name}!{end}", name=name, local=local)


def _end(text: str, name: str = "") -> Address | Host:
    ip = _literal(text)
    if ip is None:
        return _host(text)
    return _address(f"{text}%{name}" if name and ip in _LINK_LOCAL and "%" not in text else text)


def _literal(text: str) -> IPv4Address | IPv6Address | None:
    """Return the address that *text* is, without its zone."""
    if len(text) <= _ADDRESS_LONGEST:
        with suppress(ValueError):
            return ip_address(text.partition("%")[0])
    return None


def _address(text: str) -> Address:
    ip = _literal(text)
    if ip is None:
        raise _Fault(
            "not an IP address: four decimal numbers (no zero in front), or IPv6; without brackets and port"
            if len(text) <= _ADDRESS_LONGEST and re.fullmatch(_ADDRESSLIKE, text)
            else "neither an IP address nor a text that starts with if!, host!, ifhost! or net!"
        )
    for network, reason in _NO_SOURCE:
        if ip in network:
            raise _Fault(f"{ip} is {reason}")
    _, percent, zone = text.partition("%")
    if ip in _LINK_LOCAL:
        if not percent:
            raise _Fault(f"{ip} is link-local: it needs its interface as a zone, as in '{ip}%eth0'")
        zone = _name(zone, "zone")
        if "%" in zone:
            raise _Fault("the zone holds a '%'")  # ipaddress refuses it
        ip = IPv6Address(f"{ip}%{zone}")
    elif percent:
        raise _Fault(f"{ip} takes no zone: only link-local IPv6 has one")
    return _value(Address, str(ip), ip=ip)


def _host(name: str) -> Host:
    """Return the host if *name* is one by RFC 952 and 1123, or has "_" as DNS names may (RFC 2181 11)."""
    bare = name.removesuffix(".")
    if not bare:
        raise _Fault("the host name is empty")
    if len(bare) > 253:
        raise _Fault("the host name is longer than 253 characters")
    if not bare.isascii():
        raise _Fault("the host name is not ASCII: give its IDNA form (xn--)")
    for number, label in enumerate(labels := bare.split("."), 1):
        if not label:
            raise _Fault(f"label {number} of the host name is empty")
        if not re.fullmatch(_LABEL, label):
            odd = next(character for character in label if not re.fullmatch(_LABEL, character))
            raise _Fault(f"label {number} of the host name holds {odd!r}, no letter, digit, '-' or '_'")
        if len(label) > 63:
            raise _Fault(f"label {number} of the host name is longer than 63 characters")
        if label[0] == "-" or label[-1] == "-":
            raise _Fault(f"label {number} of the host name starts or ends with '-'")
    if re.fullmatch(_NUMBER, labels[-1]):
        raise _Fault("the last label of the host name is a number: a resolver would read an address")
    return _value(Host, f"host!{name}", name=name)


def _prefix(text: str) -> Prefix:
    address, slash, length = text.partition("/")
    ip = _literal(address)
    if ip is None or "%" in address:
        raise _Fault("not a network: an IP address without a zone, '/' and a length, as in 'net!192.0.2.0/24'")
    if not slash:
        raise _Fault("the length is missing, as in 'net!192.0.2.0/24'")
    if not re.fullmatch(_LENGTH, length) or int(length) > ip.max_prefixlen:
        raise _Fault(f"the length after '/' is no decimal number from 0 to {ip.max_prefixlen}")
    network = ip_network((ip, int(length)), strict=False)
    if network.network_address != ip:
        raise _Fault(f"{ip} has bits set after the first {int(length)}")
    for refused, reason in ((_LINK_LOCAL, "link-local, and needs a zone"), *_NO_SOURCE):
        # Of two networks that overlap, one begins inside the other.
        if network.network_address in refused or refused.network_address in network:
            raise _Fault(f"{network} overlaps {refused}, which is {reason}")
    return _value(Prefix, f"net!{network}", network=network)


def _value(kind: type[_Kind], text: str, **fields: object) -> _Kind:
    value = object.__new__(kind)
    for field, content in {"_text": text, **fields}.items():
        object.__setattr__(value, field, content)  # frozen for all others
    return value


def _spelled(value: object, what: str, *kinds: type[Any]) -> str:
    """Return *value* as a plain ``str``: members of an enumeration of texts would format as their names."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, kinds):
        return str(value)
    names = " or ".join(["str", *(kind.__name__ for kind in kinds)])
    raise TypeError(f"{what} is {names}, not {type(value).__name__}")


# Advice: what was probably meant.


def _refusal(text: str, fault: _Fault) -> InvalidSource:
    return InvalidSource(text, str(fault), _hint(text))


def _hint(text: str) -> str:
    if len(text) > 300:  # longer than any source: 7 + 15 + 1 + 254
        return ""
    head, *rest = (part.strip() for part in text.split("!"))
    parts = [head.lower(), *rest] if rest else [head]
    tidy = "!".join(parts)
    respelled = [
        "!".join([*parts[:at], other, *parts[at + 1 :]]) for at, part in enumerate(parts) for other in _respelled(part)
    ]
    meant = _readable([tidy]) or _readable([*respelled, *_reprefixed(parts)])
    if not meant and not rest:
        words = [word for word in (tidy, *respelled) if not re.fullmatch(_NUMBERS, word)]
        meant += _readable(f"if!{word}" for word in words)
        meant += _readable(f"host!{word}" for word in (*words, _idna(tidy)))
    return f"did you mean {' or '.join(map(quoted, meant))}?" if meant else ""


def _readable(texts: Iterable[str]) -> list[str]:
    """Return the canonical form of those *texts* that name a source, each once."""
    found: dict[str, None] = {}
    for text in texts:
        with suppress(_Fault):
            found[str(_read(text))] = None
    return list(found)


def _reprefixed(parts: list[str]) -> Iterator[str]:
    """Yield *parts* with another prefix, or none, or in the spelling of a host."""
    match parts:
        case [name, end] if name not in {"if", "host", "ifhost", "net"} and _literal(end):
            yield f"ifhost!{name}!{end}"  # first, for the other reading drops the interface
    yield "!".join(parts[1:])
    match parts:
        case [text] if assigned := re.fullmatch(r"(if|host|ifhost|net)[:=](.+)", text):
            yield f"{assigned[1]}!{assigned[2]}"
        case [address] if "%" in address:
            ip, _, zone = address.partition("%")
            yield f"ifhost!{zone}!{ip}"
        case [address] if "/" in address:  # with host bits too, as "ip address" shows it
            yield address.partition("/")[0]
            yield from (f"net!{network}" for network in (address, *_respelled(address)))
        case ["ifhost", name] | ["ifhost", name, ""]:
            yield f"if!{name}"
        case ["if", name] if "." in name:
            yield f"host!{name}"
        case ["if", name, end]:
            yield f"ifhost!{name}!{end}"
        case ["if", _]:
            pass
        case ["net", address]:
            yield f"net!{address}/{32 if '.' in address else 128}"
        case _:
            yield "!".join([*parts[:-1], _idna(parts[-1])])


def _respelled(part: str) -> Iterator[str]:
    """Yield what *part* may have been meant for; a reader decides which of it makes sense."""
    if bracketed := re.fullmatch(r"\[(.*)\](?::[0-9]*)?", part):
        yield bracketed[1]
    if labelled := re.fullmatch(r"([^:/]+):\w*", part):  # a port, or the label of an address
        yield labelled[1]
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+){3}", part):
        yield ".".join(str(int(number)) for number in part.split("."))
    if re.fullmatch(_NUMBERS, part):
        with suppress(OSError):
            packed = socket.inet_aton(part)  # as getaddrinfo reads it: pure, and 010 is 8
            if packed[0]:  # a small number is no address to anyone
                yield str(IPv4Address(packed))
    if "/" in part:
        with suppress(ValueError):
            yield str(ip_network(part, strict=False))
    ip = _literal(part)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
        yield str(ip.ipv4_mapped)
    if ip and "%" in part:
        yield str(ip)


def _idna(host: str) -> str:
    with suppress(UnicodeError):
        return host.encode("idna").decode("ascii")
    return ""
