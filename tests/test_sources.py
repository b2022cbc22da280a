"""Sources: tables of exact texts, and properties that hold for any text."""

import ast
import copy
import dataclasses
import enum
import ipaddress
import pickle
import random
import re
import socket
import time
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiobind import _sources
from aiobind._errors import InvalidSource, quoted
from aiobind._sources import Address, Host, Interface, Prefix, parse_source

few = settings(deadline=None, max_examples=200)
many = settings(deadline=None, max_examples=1000)


# Texts that name a source.

LABEL_63 = "a" * 63
LABELS_253 = ".".join([LABEL_63, LABEL_63, LABEL_63, "a" * 61])
CANONICAL = [
    ("if!eth0", Interface("eth0"), "Interface('eth0')"),
    ("if!eth0.100", Interface("eth0.100"), "Interface('eth0.100')"),
    ("if!192.0.2.7", Interface("192.0.2.7"), "Interface('192.0.2.7')"),
    ("if!a!b%c", Interface("a!b%c"), "Interface('a!b%c')"),
    ("if!...", Interface("..."), "Interface('...')"),
    ("if!ETH0", Interface("ETH0"), "Interface('ETH0')"),
    ("if!\xe9", Interface("\xe9"), "Interface('\xe9')"),
    ("if!\udcff", Interface("\udcff"), r"Interface('\udcff')"),
    ("if!123456789012345", Interface("123456789012345"), "Interface('123456789012345')"),
    ("192.0.2.7", Address("192.0.2.7"), "Address('192.0.2.7')"),
    ("127.0.0.1", Address("127.0.0.1"), "Address('127.0.0.1')"),
    ("169.254.1.1", Address("169.254.1.1"), "Address('169.254.1.1')"),
    ("0.0.0.1", Address("0.0.0.1"), "Address('0.0.0.1')"),
    ("223.255.255.255", Address("223.255.255.255"), "Address('223.255.255.255')"),
    ("240.0.0.0", Address("240.0.0.0"), "Address('240.0.0.0')"),
    ("::1", Address("::1"), "Address('::1')"),
    ("2001:db8::7", Address("2001:db8::7"), "Address('2001:db8::7')"),
    ("fe80::1%eth0", Address("fe80::1%eth0"), "Address('fe80::1%eth0')"),
    ("fe80::1%a!b", Address("fe80::1%a!b"), "Address('fe80::1%a!b')"),
    ("fec0::1", Address("fec0::1"), "Address('fec0::1')"),
    ("host!crawler3.example", Host("crawler3.example"), "Host('crawler3.example')"),
    ("host!crawler3.example.", Host("crawler3.example."), "Host('crawler3.example.')"),
    ("host!Crawler", Host("Crawler"), "Host('Crawler')"),
    ("host!_a-_b.x", Host("_a-_b.x"), "Host('_a-_b.x')"),
    ("host!1.2.3.4.x", Host("1.2.3.4.x"), "Host('1.2.3.4.x')"),
    ("host!1.0xfg", Host("1.0xfg"), "Host('1.0xfg')"),
    (f"host!{LABEL_63}", Host(LABEL_63), f"Host({LABEL_63!r})"),
    (f"host!{LABELS_253}", Host(LABELS_253), f"Host({LABELS_253!r})"),
    (f"host!{LABELS_253}.", Host(LABELS_253 + "."), f"Host({LABELS_253 + '.'!r})"),
    ("host!dead", Host("dead"), "Host('dead')"),
    ("host!xn--bcher-kva.example", Host("xn--bcher-kva.example"), "Host('xn--bcher-kva.example')"),
    (
        "ifhost!eth0!192.0.2.7",
        Interface("eth0", local=Address("192.0.2.7")),
        "Interface('eth0', local=Address('192.0.2.7'))",
    ),
    (
        "ifhost!eth0!host.example",
        Interface("eth0", Host("host.example")),
        "Interface('eth0', local=Host('host.example'))",
    ),
    (
        "ifhost!eth0!fe80::1",
        Interface("eth0", Address("fe80::1%eth0")),
        "Interface('eth0', local=Address('fe80::1%eth0'))",
    ),
    (
        "ifhost!a!b!fe80::1",
        Interface("a!b", Address("fe80::1%a!b")),
        "Interface('a!b', local=Address('fe80::1%a!b'))",
    ),
    ("ifhost!a!b!h", Interface("a!b", Host("h")), "Interface('a!b', local=Host('h'))"),
    ("net!2001:db8:7::/64", Prefix("2001:db8:7::/64"), "Prefix('2001:db8:7::/64')"),
    ("net!192.0.2.0/24", Prefix("192.0.2.0/24"), "Prefix('192.0.2.0/24')"),
    ("net!192.0.2.7/32", Prefix("192.0.2.7/32"), "Prefix('192.0.2.7/32')"),
    ("net!128.0.0.0/2", Prefix("128.0.0.0/2"), "Prefix('128.0.0.0/2')"),
    ("net!::1/128", Prefix("::1/128"), "Prefix('::1/128')"),
    ("net!2000::/3", Prefix("2000::/3"), "Prefix('2000::/3')"),
]
SOURCES = [source for _, source, _ in CANONICAL]


@pytest.mark.parametrize(("text", "source", "shown"), CANONICAL)
def test_canonical(text, source, shown):
    assert parse_source(text) == source
    assert type(parse_source(text)) is type(source)
    assert str(source) == str(parse_source(text)) == text
    assert repr(source) == shown
    assert eval(shown) == source


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("host!192.0.2.7", "192.0.2.7"),
        ("host!::1", "::1"),
        ("host!fe80::1%eth0", "fe80::1%eth0"),
        ("2001:DB8:0:0::7", "2001:db8::7"),
        ("FE80::1%ETH0", "fe80::1%ETH0"),
        ("ifhost!eth0!fe80::1%eth0", "ifhost!eth0!fe80::1"),
        ("ifhost!a!b!fe80::1%a!b", "ifhost!a!b!fe80::1"),
        ("ifhost!a!!fe80::1%a!", "ifhost!a!!fe80::1"),
        ("fe80:0000:0000:0000:0000:0000:255.255.255.255%123456789012345", "fe80::ffff:ffff%123456789012345"),
        ("ifhost!eth0!2001:DB8::7", "ifhost!eth0!2001:db8::7"),
        ("net!2001:DB8:7::/064", "net!2001:db8:7::/64"),
        # The bytes C3 A9, once as escapes and once as the character that os.fsdecode makes of them.
        ("if!\udcc3\udca9", "if!\xe9"),
    ],
)
def test_other_spellings(text, canonical):
    assert str(parse_source(text)) == canonical
    assert parse_source(text) == parse_source(canonical)


def test_fields():
    interface = parse_source("ifhost!eth0!fe80::1")
    assert interface.name == "eth0"
    assert interface.local.ip == ipaddress.ip_address("fe80::1%eth0")
    assert interface.local.ip.scope_id == "eth0"
    assert parse_source("if!eth0").local is None
    assert parse_source("192.0.2.7").ip == ipaddress.IPv4Address("192.0.2.7")
    assert parse_source("host!a.example.").name == "a.example."
    assert parse_source("net!192.0.2.0/24").network == ipaddress.IPv4Network("192.0.2.0/24")


def test_constructors_take_ipaddress_objects():
    assert Address(ipaddress.ip_address("192.0.2.7")) == Address("192.0.2.7")
    assert Address(ipaddress.ip_address("fe80::1%eth0")) == Address("fe80::1%eth0")
    assert Prefix(ipaddress.ip_network("2001:db8::/64")) == Prefix("2001:db8::/64")


def test_members_of_an_enumeration_of_texts():
    class Names(str, enum.Enum):  # noqa: UP042 - unlike StrEnum, it formats as its name
        NIC = "eth0"
        SOURCE = "if!eth0"

    assert str(Interface(Names.NIC)) == "if!eth0"
    assert type(Interface(Names.NIC).name) is str
    assert str(Host(Names.NIC)) == "host!eth0"
    assert type(Host(Names.NIC).name) is str
    assert parse_source(Names.SOURCE) == Interface("eth0")


# Texts that do not: what the message says, and the sources that it offers.

REFUSED = [
    # a plain word
    ("", "neither an IP address nor a text that starts with if!, host!, ifhost! or net!", []),
    ("eth0", "neither an IP address", ["if!eth0", "host!eth0"]),
    ("eth0.100", "neither an IP address", ["if!eth0.100"]),  # as a host it would end in a number
    (
        "crawler3.example.com",
        "neither an IP address",
        ["host!crawler3.example.com"],
    ),  # no NAME: over 15 bytes
    ("wlan_0", "neither an IP address", ["if!wlan_0", "host!wlan_0"]),
    ("-", "neither an IP address", ["if!-"]),
    ("a b", "neither an IP address", []),
    ("eth0:1", "neither an IP address", ["if!eth0", "host!eth0"]),
    ("example.org:443", "neither an IP address", ["if!example.org", "host!example.org"]),
    ("b\xfccher", "neither an IP address", ["if!b\xfccher", "host!xn--bcher-kva"]),
    ("http://example.com/", "neither an IP address", []),
    (" 192.0.2.7", "neither an IP address", ["192.0.2.7"]),
    ("192.0.2.7\n", "neither an IP address", ["192.0.2.7"]),
    # the part before the first "!"
    ("foo!bar", "starts with none of if!, host!, ifhost! and net!", []),
    ("!eth0", "starts with none of if!, host!, ifhost! and net!", []),
    ("ip!192.0.2.7", "starts with none of", ["ifhost!ip!192.0.2.7", "192.0.2.7"]),
    ("eth0!192.0.2.7", "starts with none of", ["ifhost!eth0!192.0.2.7", "192.0.2.7"]),
    ("if:eth0", "neither an IP address", ["if!eth0"]),
    ("IF!eth0", "in lower case", ["if!eth0"]),
    ("Host!Example", "in lower case", ["host!Example"]),
    ("IfHost!eth0!192.0.2.7", "in lower case", ["ifhost!eth0!192.0.2.7"]),
    (" if!eth0", "starts with none of", ["if!eth0"]),
    ("if !eth0", "starts with none of", ["if!eth0"]),
    ("if", "neither an IP address", ["if!if", "host!if"]),
    # NAME
    ("if!", "the interface name is empty", []),
    ("if!.", "the interface name cannot be '.'", []),
    ("if!..", "the interface name cannot be '..'", []),
    ("if!1234567890123456", "the interface name is longer than 15 bytes", []),
    ("if!averyverylongname", "the interface name is longer than 15 bytes", []),
    ("if!\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9", "the interface name is longer than 15 bytes", []),
    ("if!a/b", "the interface name holds the byte b'/'", []),
    ("if!a b", "the interface name holds the byte b' '", []),
    ("if!a\0", "the interface name holds the byte b'\\x00'", []),
    ("if! eth0", "the interface name holds the byte b' '", ["if!eth0"]),
    ("if!eth0\n", "the interface name holds the byte b'\\n'", ["if!eth0"]),
    ("if!\xe0", "the interface name holds the byte b'\\xa0', white space to the kernel", []),
    ("if!\udca0", "the interface name holds the byte b'\\xa0', white space to the kernel", []),
    ("if!\ud800", "the interface name holds a lone surrogate", []),
    ("if!\udc7f", "the interface name holds a lone surrogate", []),
    ("if!\udd00", "the interface name holds a lone surrogate", []),
    ("if!eth0:1", "'eth0:1' is an address label (alias), not an interface: give the interface", ["if!eth0"]),
    ("if!eth0:web", "or the address itself", ["if!eth0"]),
    ("if!:1", "the interface name holds the byte b':'", []),
    ("if!2001:db8::1", "the interface name holds the byte b':'", ["2001:db8::1"]),
    ("if!eth0!192.168.100.1", "longer than 15 bytes", ["ifhost!eth0!192.168.100.1"]),
    ("if!crawler3.example.com", "longer than 15 bytes", ["host!crawler3.example.com"]),
    # ADDRESS: its spelling
    ("127.1", "not an IP address", ["127.0.0.1"]),
    ("0x7f.1", "not an IP address", ["127.0.0.1"]),
    ("0X7F000001", "not an IP address", ["127.0.0.1"]),
    ("2130706433", "not an IP address", ["127.0.0.1"]),
    ("010.1.1.1", "not an IP address", ["10.1.1.1", "8.1.1.1"]),
    ("192.0.2.08", "not an IP address", ["192.0.2.8"]),
    ("1", "not an IP address", []),
    ("300.1.1.1", "not an IP address", []),
    ("224.1", "not an IP address", []),
    ("1.2.3.4.5", "not an IP address", []),
    ("192.0.2.7:80", "not an IP address", ["192.0.2.7"]),
    ("[::1]", "without brackets and port", ["::1"]),
    ("[2001:db8::7]:80", "without brackets and port", ["2001:db8::7"]),
    ("[fe80::1%eth0]:80", "neither an IP address", ["fe80::1%eth0"]),
    ("2001:db8::1::2", "not an IP address", []),
    ("\uff11\uff19\uff12.0.2.7", "neither an IP address", ["192.0.2.7"]),
    # ADDRESS: what it is
    ("0.0.0.0", "0.0.0.0 is unspecified", []),
    ("::", ":: is unspecified", []),
    ("224.0.0.1", "224.0.0.1 is multicast: Linux binds it and then connects from another address", []),
    ("239.255.255.255", "is multicast", []),
    ("ff02::1%eth0", "ff02::1 is multicast", []),
    ("255.255.255.255", "255.255.255.255 is broadcast: Linux binds it and then connects", []),
    ("::ffff:192.0.2.7", "is IPv4-mapped", ["192.0.2.7"]),
    ("::ffff:c000:207", "is IPv4-mapped", ["192.0.2.7"]),
    ("::ffff:0.0.0.0", "is IPv4-mapped", []),
    ("::ffff:224.0.0.1", "is IPv4-mapped", []),
    # ADDRESS: its zone
    ("fe80::1", "fe80::1 is link-local: it needs its interface as a zone, as in 'fe80::1%eth0'", []),
    ("febf:ffff::1", "is link-local", []),
    ("fe80::1%", "the zone is empty", []),
    ("fe80::1%a b", "the zone holds the byte b' '", []),
    ("fe80::1%eth0:1", "the zone holds the byte b':'", []),
    ("fe80::1%..", "the zone cannot be '..'", []),
    ("fe80::1%a%b", "the zone holds a '%'", []),
    ("fe80::1%1234567890123456", "the zone is longer than 15 bytes", []),
    ("2001:db8::1%eth0", "takes no zone", ["2001:db8::1", "ifhost!eth0!2001:db8::1"]),
    ("192.0.2.7%eth0", "takes no zone", ["192.0.2.7", "ifhost!eth0!192.0.2.7"]),
    # HOST
    ("host!", "the host name is empty", []),
    ("host!.", "the host name is empty", []),
    ("host!a..b", "label 2 of the host name is empty", []),
    ("host!.a", "label 1 of the host name is empty", []),
    ("host!a..", "label 2 of the host name is empty", []),
    ("host!-a", "label 1 of the host name starts or ends with '-'", []),
    ("host!a.b-", "label 2 of the host name starts or ends with '-'", []),
    ("host!a b", "label 1 of the host name holds ' '", []),
    ("host!a.b\0", "label 2 of the host name holds '\\x00'", []),
    ("host!a\n", "label 1 of the host name holds '\\n'", ["host!a"]),
    ("host!a!b", "label 1 of the host name holds '!'", []),
    ("host!example.com:443", "label 2 of the host name holds ':'", ["host!example.com"]),
    ("host!" + "a" * 64, "label 1 of the host name is longer than 63 characters", []),
    (f"host!{LABELS_253}a", "the host name is longer than 253 characters", []),
    (f"host!{LABELS_253}a.", "the host name is longer than 253 characters", []),
    ("host!b\xfccher.example", "the host name is not ASCII", ["host!xn--bcher-kva.example"]),
    ("host!\xfc." + "a" * 64, "the host name is not ASCII", []),
    ("host!\u0661.\u0661", "the host name is not ASCII", ["host!xn--9hb.xn--9hb"]),
    ("host!\uff11\uff12\uff17.1", "the host name is not ASCII", []),
    ("host!\ud800", "the host name is not ASCII", []),
    ("host!127.1", "the last label of the host name is a number", ["127.0.0.1"]),
    ("host!0x7f.1", "the last label of the host name is a number", ["127.0.0.1"]),
    ("host!a.0XfF", "the last label of the host name is a number", []),
    ("host!a.1.", "the last label of the host name is a number", []),
    ("host!192.0.2.7:80", "holds ':'", ["192.0.2.7"]),
    ("host![::1]:80", "holds '['", ["::1"]),
    ("host!fe80::1", "fe80::1 is link-local", []),
    ("host!224.0.0.1", "224.0.0.1 is multicast", []),
    # ifhost!
    ("ifhost!", "the address or host is missing", []),
    ("ifhost!eth0", "the address or host is missing, as in 'ifhost!eth0!192.0.2.7'", ["if!eth0"]),
    ("ifhost!eth0!", "the address or host is missing", ["if!eth0"]),
    ("ifhost!!192.0.2.7", "the interface name is empty", []),
    ("ifhost!..!192.0.2.7", "the interface name cannot be '..'", []),
    ("ifhost!eth0:1!192.0.2.7", "is an address label (alias)", ["ifhost!eth0!192.0.2.7"]),
    ("ifhost!eth0:1!fe80::1", "is an address label (alias)", ["ifhost!eth0!fe80::1"]),
    ("ifhost!eth0!127.1", "the last label of the host name is a number", ["ifhost!eth0!127.0.0.1"]),
    ("ifhost!eth0!0.0.0.0", "0.0.0.0 is unspecified", []),
    ("ifhost!eth0![::1]", "holds '['", ["ifhost!eth0!::1"]),
    ("ifhost!eth0!b\xfccher.example", "not ASCII", ["ifhost!eth0!xn--bcher-kva.example"]),
    (
        "ifhost!eth1!fe80::1%eth0",
        "the address is on the zone 'eth0', and the interface is 'eth1'",
        ["ifhost!eth1!fe80::1"],
    ),
    ("ifhost!eth0!2001:db8::1%eth0", "takes no zone", ["ifhost!eth0!2001:db8::1"]),
    ("ifhost!a%b!fe80::1", "the zone holds a '%'", []),
    # net!
    ("net!", "not a network", []),
    ("net!eth0", "not a network", []),
    ("net!eth0/24", "not a network", []),
    ("net!fe80::%eth0/64", "not a network: an IP address without a zone", []),
    ("net!192.0.2.7", "the length is missing", ["192.0.2.7", "net!192.0.2.7/32"]),
    ("net!2001:db8::", "the length is missing", ["2001:db8::", "net!2001:db8::/128"]),
    ("net!192.0.2.0/", "the length after '/' is no decimal number from 0 to 32", []),
    ("net!192.0.2.0/33", "the length after '/' is no decimal number from 0 to 32", []),
    ("net!2001:db8::/129", "the length after '/' is no decimal number from 0 to 128", []),
    ("net!192.0.2.0/-1", "the length after '/' is no decimal number", []),
    ("net!192.0.2.0/+24", "the length after '/' is no decimal number", []),
    ("net!192.0.2.0/24/24", "the length after '/' is no decimal number", []),
    ("net!192.0.2.0/\u0662\u0664", "the length after '/' is no decimal number", []),
    ("net!192.0.2.0/255.255.255.0", "the length after '/' is no decimal number", ["net!192.0.2.0/24"]),
    ("net!192.0.2.7/24", "192.0.2.7 has bits set after the first 24", ["net!192.0.2.0/24"]),
    ("net!2001:db8::1/64", "2001:db8::1 has bits set after the first 64", ["net!2001:db8::/64"]),
    ("192.0.2.0/24", "neither an IP address", ["192.0.2.0", "net!192.0.2.0/24"]),
    ("192.0.2.7/24", "neither an IP address", ["192.0.2.7", "net!192.0.2.0/24"]),
    ("net!0.0.0.0/0", "overlaps 0.0.0.0/32, which is unspecified", []),
    ("net!::/64", "overlaps ::/128, which is unspecified", []),
    ("net!224.0.0.0/8", "overlaps 224.0.0.0/4, which is multicast", []),
    ("net!192.0.0.0/2", "overlaps 224.0.0.0/4, which is multicast", []),
    ("net!240.0.0.0/4", "overlaps 255.255.255.255/32, which is broadcast", []),
    ("net!ff00::/16", "overlaps ff00::/8, which is multicast", []),
    ("net!fe80::/64", "overlaps fe80::/10, which is link-local, and needs a zone", []),
    ("net!8000::/1", "overlaps fe80::/10, which is link-local", []),
    ("net!::ffff:192.0.2.0/120", "is IPv4-mapped", []),
]


def offered(error):
    """The sources that the hint of *error* names, but for long ones, which it cuts."""
    meant = error.hint.removeprefix("did you mean ").removesuffix("?")
    return [ast.literal_eval(text) for text in meant.split(" or ") if text and not text.endswith("characters)")]


@pytest.mark.parametrize(("text", "reason", "meant"), REFUSED)
def test_refused(text, reason, meant):
    with pytest.raises(InvalidSource) as caught:
        parse_source(text)
    assert caught.value.text == text
    assert reason in caught.value.reason
    assert offered(caught.value) == meant
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("construct", "text"),
    [
        (lambda: Interface(""), "if!"),
        (lambda: Interface("eth0:1"), "if!eth0:1"),
        (lambda: Interface("if!eth0"), None),
        (lambda: Interface("eth0:1", Address("192.0.2.7")), "ifhost!eth0:1!192.0.2.7"),
        (lambda: Interface("eth0:1", Host("a.example")), "ifhost!eth0:1!a.example"),
        (lambda: Interface("eth1", Address("fe80::1%eth0")), "ifhost!eth1!fe80::1%eth0"),
        (lambda: Address(""), ""),
        (lambda: Address("eth0"), "eth0"),
        (lambda: Address("010.1.1.1"), "010.1.1.1"),
        (lambda: Address(ipaddress.ip_address("224.0.0.1")), "224.0.0.1"),
        (lambda: Address(ipaddress.ip_interface("192.0.2.7/24")), "192.0.2.7/24"),
        (lambda: Host(""), "host!"),
        (lambda: Host("b\xfccher.example"), "host!b\xfccher.example"),
        (lambda: Prefix(""), "net!"),
        (lambda: Prefix("192.0.2.7/24"), "net!192.0.2.7/24"),
        (lambda: Prefix(ipaddress.ip_network("fe80::/64")), "net!fe80::/64"),
    ],
)
def test_construction_refuses_what_parsing_refuses(construct, text):
    if text is None:  # a NAME may hold a "!"
        assert construct().name == "if!eth0"
        return
    with pytest.raises(InvalidSource) as parsed:
        parse_source(text)
    with pytest.raises(InvalidSource) as constructed:
        construct()
    assert str(constructed.value) == str(parsed.value)
    assert constructed.value.args == parsed.value.args


@pytest.mark.parametrize("ip", ["192.0.2.7", "127.1"])
def test_a_host_is_no_address(ip):
    with pytest.raises(InvalidSource, match="the last label of the host name is a number") as caught:
        Host(ip)
    assert offered(caught.value) == [str(ipaddress.IPv4Address(socket.inet_aton(ip)))]


def test_an_address_takes_no_prefix():
    with pytest.raises(InvalidSource, match="neither an IP address"):
        Address("host!192.0.2.7")


@pytest.mark.parametrize("given", [None, 5, b"if!eth0", ["if!eth0"], ipaddress.ip_address("::1"), ("eth0", 0)])
def test_neither_text_nor_source(given):
    name = type(given).__name__
    with pytest.raises(TypeError, match=rf"^a source is str or Interface or .* or Prefix, not {name}$"):
        parse_source(given)
    for kind in Interface, Host, Prefix:
        with pytest.raises(TypeError, match=rf"of an? {kind.__name__} is str.*, not {name}$"):
            kind(given)


@pytest.mark.parametrize("given", [None, 0x7F000001, b"\x7f\0\0\1", Address("::1")])
def test_an_address_is_not_made_of_numbers(given):
    with pytest.raises(TypeError, match=f"IPv4Address or IPv6Address, not {type(given).__name__}$"):
        Address(given)


@pytest.mark.parametrize("local", ["192.0.2.7", Interface("eth0"), Prefix("192.0.2.0/24"), 0])
def test_local_is_an_address_or_a_host(local):
    with pytest.raises(TypeError, match=f"^local of an Interface is .* not {type(local).__name__}$"):
        Interface("eth0", local)


# Values.


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_source_is_returned_as_it_is(source):
    assert parse_source(source) is source


@pytest.mark.parametrize("source", SOURCES, ids=ascii)
def test_frozen_and_slotted(source):
    with pytest.raises(TypeError):
        vars(source)
    for field in (*(field.name for field in dataclasses.fields(source)), "_text", "other"):
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
            setattr(source, field, "x")
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
            delattr(source, field)


def test_all_differ():
    assert len(set(SOURCES)) == len(SOURCES)
    for source in SOURCES:
        assert [other for other in SOURCES if other == source] == [source]
        assert source != str(source)
        assert str(source) != source


def test_match_and_replace():
    match parse_source("ifhost!eth0!192.0.2.7"):
        case Interface(name, Address(ip)):
            assert (name, str(ip)) == ("eth0", "192.0.2.7")
        case other:
            pytest.fail(repr(other))
    assert dataclasses.replace(Interface("eth0"), name="eth1") == Interface("eth1")


def test_union():
    assert all(isinstance(source, _sources.Source) for source in SOURCES)


def test_no_look_ups(monkeypatch):
    def refuse(*args):
        raise AssertionError(args)

    for name in "getaddrinfo", "gethostbyname", "if_nametoindex", "socket":
        monkeypatch.setattr(socket, name, refuse)
    for text in "host!a.example", "fe80::1%eth9", "ifhost!eth9!b.example":
        assert str(parse_source(text)) == text
    with pytest.raises(InvalidSource):
        parse_source("no-such-host.example")


# Prefix.pick


def allowed(network):
    """Every address that may be picked, by the RFCs and from collections import Counter
    from ipaddress's own idea of hosts."""
    addresses = set(network)
    if network.version == 4 and network.prefixlen < 31:
        return addresses - {network.network_address, network.broadcast_address}
    if network.version == 6 and network.prefixlen < 127:
        return addresses - {network.network_address}
    return addresses


@pytest.mark.parametrize(
    "text",
    [f"192.0.2.0/{length}" for length in range(27, 33)]
    + [f"2001:db8::/{length}" for length in range(123, 129)]
    + ["127.0.0.8/29", "2001:db8::ff0/124"],
)
def test_pick_covers_exactly_what_is_allowed(text):
    prefix = Prefix(text)
    network = prefix.network
    random.seed(text)
    # Missing one of 31 addresses in 1,000 picks has a probability below 1e-12.
    assert {prefix.pick() for _ in range(1000)} == allowed(network)
    assert allowed(network) == set(network.hosts())


@pytest.mark.parametrize("text", ["10.0.0.0/8", "2001:db8:7::/64", "2000::/3"])
def test_pick_spreads_over_a_large_network(text):
    prefix = Prefix(text)
    random.seed(text)
    picks = [prefix.pick() for _ in range(500)]
    assert all(ip in prefix.network for ip in picks)
    assert len(set(picks)) > 495
    offsets = [int(ip) - int(prefix.network.network_address) for ip in picks]
    size = prefix.network.num_addresses
    assert {offset * 4 // size for offset in offsets} == {0, 1, 2, 3}
    assert {offset % 4 for offset in offsets} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "text",
    [f"192.0.2.0/{length}" for length in range(28, 33)]
    + [f"2001:db8::/{length}" for length in range(124, 129)]
    + ["10.0.0.0/8", "128.0.0.0/2", "2001:db8:7::/64", "2000::/3"],
)
def test_a_seed_stands_for_one_address(text):
    prefix, network = Prefix(text), Prefix(text).network
    picks = {seed: prefix.pick(seed) for seed in (str(number).encode() for number in range(300))}
    assert all(Prefix(text).pick(seed) == ip for seed, ip in picks.items())
    if network.num_addresses <= 16:
        # One of 15 is missing among 300 with a probability below 1e-7, and these are always the same.
        assert set(picks.values()) == allowed(network)
        assert max(Counter(picks.values()).values()) < 3 * 300 / len(allowed(network)) + 1
    else:
        assert len(set(picks.values())) == 300
        offsets = [int(ip) - int(network.network_address) for ip in picks.values()]
        quarters = Counter(offset * 4 // network.num_addresses for offset in offsets)
        assert set(quarters) == {0, 1, 2, 3}
        assert min(quarters.values()) > 50
    assert all(ip in network for ip in picks.values())


def test_a_seed_stands_for_unrelated_addresses_of_two_networks():
    """Who sees one of a host's addresses learns nothing of the other."""
    here, there = Prefix("2001:db8:7::/64"), Prefix("2001:db8:8::/64")
    assert int(here.pick(b"x")) % 2**64 != int(there.pick(b"x")) % 2**64
    assert here.pick(b"") != here.pick() != here.pick()


# Properties.


def dev_valid_name(name):
    """linux/net/core/dev.c, in bytes; isspace() is the table of linux/lib/ctype.c."""
    if not 0 < len(name) < 16 or name in {b".", b".."}:
        return False
    return not any(byte in b"/:\0" or 9 <= byte <= 13 or byte in {0x20, 0xA0} for byte in name)


def is_interface(name):
    try:
        return Interface(name) is not None
    except InvalidSource:
        return False


def test_names_of_one_byte_and_of_three():
    for byte in range(256):
        for raw in bytes([byte]), b"a%cz" % byte:
            assert is_interface(raw.decode("utf-8", "surrogateescape")) == dev_valid_name(raw), raw


@few
@given(st.binary(max_size=20) | st.text(max_size=10).map(lambda text: text.encode("utf-8", "ignore")))
@example(b"\xc3\xa0")
@example(b"\xc3\xa9")
@example(b"\xe9" * 15)
@example("\u20ac".encode() * 5)
@example("\u20ac".encode() * 5 + b"a")
def test_names_are_the_kernels(raw):
    name = raw.decode("utf-8", "surrogateescape")
    assert is_interface(name) == dev_valid_name(raw)
    if is_interface(name):
        assert Interface(name).name.encode("utf-8", "surrogateescape") == raw
        assert Interface(name).name == name


names = (
    st.lists(
        st.sampled_from([byte for byte in range(256) if dev_valid_name(bytes([byte, 65]))]),
        min_size=1,
        max_size=15,
    )
    .map(bytes)
    .filter(dev_valid_name)
    .map(lambda raw: raw.decode("utf-8", "surrogateescape"))
)
zones = names.filter(lambda name: "%" not in name)
v4 = st.ip_addresses(v=4).filter(lambda ip: not (ip.is_multicast or ip.is_unspecified or str(ip) == "255.255.255.255"))
v6 = st.ip_addresses(v=6).filter(
    lambda ip: not (ip.is_multicast or ip.is_unspecified or ip.is_link_local or ip.ipv4_mapped)
)
link_local = st.integers(0, 2**118 - 1).map(lambda low: str(ipaddress.IPv6Address((0x3FA << 118) + low)))
hosts = st.builds(
    lambda labels, dot: ".".join(labels) + dot,
    st.lists(
        st.from_regex(r"[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?", fullmatch=True),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["", "."]),
).filter(
    lambda name: len(name.removesuffix(".")) <= 253 and not re.search(r"(?:^|\.)(?:0[xX][0-9a-fA-F]+|[0-9]+)\.?$", name)
)
networks = st.builds(
    lambda ip, length: ipaddress.ip_network((int(ip), length % (ip.max_prefixlen - 3) + 4), strict=False),
    v4 | v6,
    st.integers(0, 128),
).filter(
    lambda network: (
        not any(
            network.version == other.version and network.overlaps(other)
            for other in map(
                ipaddress.ip_network,
                ("0.0.0.0", "224.0.0.0/4", "255.255.255.255", "::", "ff00::/8", "fe80::/10", "::ffff:0:0/96"),
            )
        )
    )
)

addresses = (v4 | v6).map(Address) | st.builds(lambda ip, zone: Address(f"{ip}%{zone}"), link_local, zones)
sources = (
    names.map(Interface)
    | addresses
    | hosts.map(Host)
    | networks.map(Prefix)
    | st.builds(Interface, names, (v4 | v6).map(Address) | hosts.map(Host))
    | st.builds(lambda ip, zone: Interface(zone, Address(f"{ip}%{zone}")), link_local, zones)
)


@few
@given(sources)
def test_a_source_survives_everything(source):
    assert parse_source(str(source)) == source
    assert eval(repr(source)) == source
    copies = [parse_source(str(source)), copy.copy(source), copy.deepcopy(source)]
    copies += [pickle.loads(pickle.dumps(source, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies:
        assert type(other) is type(source)
        assert other == source
        assert hash(other) == hash(source)
        assert {source: 1}[other] == 1
        assert all(getattr(other, field.name) == getattr(source, field.name) for field in dataclasses.fields(source))


@few
@given(zones, link_local)
def test_both_spellings_of_a_link_local_address_of_an_interface(name, ip):
    source = Interface(name, Address(f"{ip}%{name}"))
    assert str(source) == f"ifhost!{name}!{ip}"
    assert parse_source(f"ifhost!{name}!{ip}%{name}") == source
    with pytest.raises(InvalidSource, match="the address is on the zone"):
        Interface("x" if name != "x" else "y", source.local)


@few
@given(networks)
def test_pick_is_always_in_range(network):
    size = network.num_addresses
    for ip in (Prefix(network).pick(), Prefix(network).pick(b"seed")):
        assert ip in network
        assert type(ip) is type(network.network_address)
        assert size <= 2 or ip != network.network_address
        assert size <= 2 or network.version == 6 or ip != network.broadcast_address
        assert isinstance(parse_source(str(ip)), Address)  # what is picked can be bound


def look(text):
    """Read *text*: a source round trips, and a refusal can be shown to anyone."""
    try:
        source = parse_source(text)
    except InvalidSource as refused:
        error = refused
    else:
        assert parse_source(str(source)) == source
        return
    shown = str(error)
    assert error.text == text
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) - len(quoted(text)) < 320
    assert str(pickle.loads(pickle.dumps(error))) == shown
    for meant in offered(error):
        assert str(parse_source(meant)) == meant != text


pieces = [
    "if!",
    "host!",
    "ifhost!",
    "net!",
    "!",
    "%",
    ":",
    "::",
    "/",
    ".",
    "[",
    "]",
    "-",
    "eth0",
    "fe80::1",
    "0x",
    "0",
]
pieces += [
    "192.0.2.7",
    "2001:db8::",
    "1",
    "24",
    "::ffff:",
    " ",
    "\n",
    "\0",
    "\ud800",
    "\udcff",
    "\xe0",
    "\xfc",
    "\u0661",
]
any_text = st.text(st.characters(), max_size=40) | st.text(max_size=400)


@many
@given(any_text | st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=8).map("".join))
@example("\U0001f600" * 300)
@example("host!" + "\xdf." * 126)
@example("IF!" + "\udcff" * 15)
@example("host!" + ".".join([LABEL_63] * 3) + ":80")
@example("0" * 300)
@example("''")
@example("if!'\"")
def test_any_text_is_a_source_or_refused(text):
    look(text)


@many
@given(sources.map(str), st.integers(0, 300), st.integers(0, 2), st.sampled_from(pieces) | st.characters())
def test_a_text_that_is_almost_a_source(text, at, cut, piece):
    at %= len(text) + 1
    look(text[:at] + piece + text[at + cut :])


@pytest.mark.parametrize(
    "head", ["", "if!", "host!", "ifhost!", "ifhost!eth0!", "net!", "net!::/", "fe80::1%", "foo!", "IF!"]
)
@pytest.mark.parametrize(
    "body",
    ["x", "0", "!", ":", ".", "1.", "%", "/", " ", "\0", "[", "\xe0", "a.", "\ud800", "\u0661", "\U0001f600"],
)
def test_a_megabyte_is_refused_at_once(head, body):
    text = head + body * (1_000_000 // len(body))
    start = time.process_time()
    with pytest.raises(InvalidSource) as caught:
        parse_source(text)
    shown = str(caught.value)
    assert time.process_time() - start < 0.1  # 0.1 to 5 ms
    assert len(shown) - len(quoted(text)) < 150
    assert caught.value.text == text


@pytest.mark.parametrize(
    "body", ["\xfc", "\xfc.", "\ufdfa", "\u0345", "1:1!", "[1]!", "010.1.1.1!", "0x1.", "1/1!", "!"]
)
@pytest.mark.parametrize("head", ["", "host!", "ifhost!", "IF!", "if!"])
def test_advice_is_quick(head, body):
    text = (head + body * 300)[:300]
    start = time.process_time()
    look(text)
    assert time.process_time() - start < 0.2  # 0.1 to 5 ms


def test_public_names():
    assert set(_sources.__all__) == {"Address", "Host", "Interface", "Prefix", "Source", "is_fixed", "parse_source"}
