"""Coverage-guided fuzzing of what reads foreign input: the grammar of sources, and the parser of netlink messages.

    python tests/fuzz.py grammar --seconds 60
    python tests/fuzz.py netlink --seconds 60 --seed 7

libFuzzer, by way of atheris, changes inputs and keeps those that reach new branches. A finding ends the run with a
traceback, exit status 77 and the input in a file named ``crash-...``; ``python tests/fuzz.py grammar FILE`` tries that
one again. What counts as a finding stands in `grammar` and `netlink`.
"""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

with atheris.instrument_imports(include=["aiobind", "ipaddress"]):
    from aiobind import InvalidSource, parse_source
    from aiobind._interfaces import InterfaceTable
    from aiobind._platform.base import AddressGone, AddressSeen, LinkGone, LinkSeen
    from aiobind._platform.linux import Netlink, messages, parse

    from aiobind import _sources  # isort: skip

#: Seconds of CPU: generous for a machine that is busy and code that is instrumented, far below what hangs.
_AT_LEAST, _PER_UNIT = 0.5, 0.0005


def grammar(text: str) -> None:
    """Any text is a source that its own text names, or an InvalidSource that can be shown to anyone."""
    _sources._read.cache_clear()
    started = time.process_time()
    refused = source = None
    try:
        source = parse_source(text)
    except InvalidSource as error:
        refused = error
    _in_time(started, len(text), "characters")
    if refused is not None:
        shown = str(refused)
        assert refused.text == text
        assert shown.isascii(), shown
        assert shown.isprintable(), shown
        assert str(pickle.loads(pickle.dumps(refused))) == shown
        return
    again = parse_source(str(source))
    assert again == source, (source, again)
    assert hash(again) == hash(source)
    assert type(again) is type(source)
    assert str(again) == str(source), (source, again)
    assert pickle.loads(pickle.dumps(source)) == source


def netlink(data: bytes) -> None:
    """Any bytes are records or nothing, a table takes them all in, and what it holds agrees with itself."""
    started = time.process_time()
    table = InterfaceTable()
    split = list(messages(data))
    assert len(split) <= len(data) // 16
    for kind, _, _, body in split:
        record = parse(kind, body)
        if record is None:
            continue
        assert isinstance(record, (LinkSeen, LinkGone, AddressSeen, AddressGone)), record
        if isinstance(record, LinkSeen):
            for text in (record.name, record.kind, *record.altnames):
                os.fsencode(text)
        table.apply(record)
    _in_time(started, len(data), "bytes")
    for link in table._links.values():
        assert table.name_of(link.index) == link.name
        for text, address in link.addresses.items():
            assert str(address.ip) == text
            assert any(holder == link.index for holder, _ in table.own[text]), (link, table.own)
    for text, entries in table.own.items():
        assert entries
        for holder, _ in entries:
            assert text in table._links[holder].addresses, (text, entries)


def feed(data: bytes) -> None:
    """The same by way of the socket's reader, whose answers to a list are errors of the system, and nothing else."""
    reader = Netlink.__new__(Netlink)
    reader._socket = _Mute()
    reader._sequence, reader._listing, reader._whole, reader._lost = 0, 0, True, 0
    with suppress(OSError):
        list(reader._records(data))


class _Mute:
    """A netlink socket to ask by, with nobody there."""

    def sendto(self, data: bytes, _: object) -> int:
        return len(data)

    def close(self) -> None:
        pass


def _in_time(started: float, size: int, unit: str) -> None:
    took = time.process_time() - started
    assert took < _AT_LEAST + _PER_UNIT * size, f"{took:.2f} s for {size} {unit}"


# What libFuzzer starts from, made on the spot.

_TEXTS = """
if!eth0|if!eth0.100|if!a!b%c|if!\xe9|if!eth0:1|IF!eth0|if:eth0|eth0|eth0:1|if!|if! eth0|if!123456789012345
192.0.2.7|010.1.1.1|0x7f.1|2130706433|192.0.2.7:80|192.0.2.7/24|255.255.255.255|224.0.0.1|0.0.0.0
2001:db8::7|::1|::|fe80::1%eth0|fe80::1|fe80::1%a!b|2001:db8::7%eth0|[2001:db8::7]:80|::ffff:192.0.2.7|ff02::1%eth0
host!crawler3.example|host!crawler3.example.|host!192.0.2.7|host!1.0xfg|host!b\xfccher|host!a..b|host!-a|host!1.2.3.4.x
ifhost!eth0!192.0.2.7|ifhost!eth0!host.example|ifhost!eth0!fe80::1|ifhost!a!b!fe80::1%a!b|ifhost!eth0!|ifhost!eth0
net!2001:db8:7::/64|net!192.0.2.0/24|net!192.0.2.7/24|net!128.0.0.0/2|net!fe80::/10|net!192.0.2.0|net!::/129|net!::/064
"""


def _texts() -> Iterator[bytes]:
    for text in _TEXTS.replace("\n", "|").split("|"):
        yield text.encode()


def _datagrams() -> Iterator[bytes]:
    """Yield what the kernel tells of this host's links and addresses, as a whole and message by message."""

    class Recorder(Netlink):
        def _records(self, data: bytes) -> Iterator[object]:
            told.append(data)
            return super()._records(data)

    told: list[bytes] = []
    if sys.platform == "linux":
        with closing(Recorder()) as recorder, suppress(OSError):
            recorder.ask()
            for _ in range(20):
                recorder.read()
    for data in told:
        yield data
        at = 0
        for _, _, _, body in messages(data):
            length = 16 + len(body)
            yield data[at : at + length]
            at += -(-length // 4) * 4
    # What an ordinary host has not: other names, a master, a wide flag, a peer, and the ends of a list.
    yield _message(16, _link(7, (3, b"eth0\0"), (52, _attributes((53, b"wan\0"))), (10, b"\1\0\0\0")))
    yield _message(16, _link(7, (3, b"br0\0"), (18, _attributes((1, b"bridge\0"))))) + _message(17, _link(7))
    yield _message(20, _address(2, 7, (1, bytes(4)), (2, b"\xc0\0\2\1"), (8, b"\x20\0\0\0")))
    address = _address(10, 7, (1, bytes(15) + b"\1"))
    yield _message(16, _link(7, (3, b"d0\0"))) + _message(20, address) + _message(21, address)
    yield _message(3, bytes(4)) + _message(2, struct.pack("=i", -16)) + _message(3, b"", flags=0x10)


def _message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body + bytes(-len(body) % 4)


def _attributes(*attributes: tuple[int, bytes]) -> bytes:
    packed = (struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4) for kind, value in attributes)
    return b"".join(packed)


def _link(index: int, *attributes: tuple[int, bytes]) -> bytes:
    return struct.pack("=BxHiII", 0, 1, index, 0x10001, 0) + _attributes(*attributes)


def _address(family: int, index: int, *attributes: tuple[int, bytes]) -> bytes:
    return struct.pack("=BBBBI", family, 24, 0, 0, index) + _attributes(*attributes)


def _on_grammar(data: bytes) -> None:
    # What is no UTF-8 becomes lone surrogates, as in a name from the command line.
    grammar(data.decode("utf-8", "surrogateescape"))


def _on_netlink(data: bytes) -> None:
    netlink(data)
    feed(data)


#: What is tried, what it starts from, and the longest input in bytes.
TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], Iterator[bytes]], int]] = {
    "grammar": (_on_grammar, _texts, 400),
    "netlink": (_on_netlink, _datagrams, 4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("file", nargs="?", help="an input to try, instead of fuzzing")
    parser.add_argument("--seconds", type=int, default=60, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="libFuzzer's; 0 chooses one (default)")
    options = parser.parse_args()
    test, corpus, longest = TARGETS[options.target]
    if options.file:
        test(Path(options.file).read_bytes())
        return
    with tempfile.TemporaryDirectory(prefix="aiobind-fuzz-") as folder:
        for number, data in enumerate(corpus()):
            Path(folder, str(number)).write_bytes(data)
        limits = [f"-max_total_time={options.seconds}", f"-max_len={longest}", "-timeout=20", "-rss_limit_mb=2048"]
        arguments = [sys.argv[0], *limits, f"-seed={options.seed}", "-print_final_stats=1", folder]
        child = os.fork()
        if not child:  # libFuzzer ends its process, without a clean-up
            atheris.Setup(arguments, test)
            atheris.Fuzz()
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
