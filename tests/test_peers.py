"""The benchmarks' peers do honest work: as many connections as they are measured for, from the source of the place."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.append(str(Path(__file__).parent.parent))  # last, so that an installed aiobind is the one that is tested

from aiobind.lab import available
from bench.compare import Load, Setting, cases, setting
from bench.meters import Worker
from bench.peers import WORKLOADS
from bench.server import compiled, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNT, AT_ONCE = 12, 4
#: An address of the NIC that nobody has who has not asked for it.
SECOND = "198.18.0.3"
PEERS = [(workload, label) for workload, peers in WORKLOADS.items() for label in peers]


@pytest.fixture(scope="module")
def here() -> Iterator[Setting]:
    if reason := available():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no lab: {reason}")
    with setting() as found:
        place = found.place
        found.lab.near.ip(f"address add {SECOND}/24 dev {place.device}")
        yield replace(found, place=replace(place, source=SECOND, pin=f"ifhost!{place.device}!{SECOND}"))


@pytest.mark.timeout(120)  # a cold Go takes half a minute to compile
@pytest.mark.parametrize(("workload", "label"), PEERS)
def test_peer(here: Setting, workload: str, label: str) -> None:
    peer, place = WORKLOADS[workload][label], here.place
    at_once = AT_ONCE if peer.many else 1
    found, skipped = cases(here, {"": Load(workload, at_once)}, [label])
    if not found:
        pytest.skip(skipped[label])
    nic, sources, crowd = place.device, [place.source], "100 sources" in label
    if crowd:
        nic, sources = place.crowd, place.crowd_addresses[:COUNT]
    elif "aiobind" in label:  # which names the interface alone
        sources = [here.lab.nic(nic).v4]
    for case in found:
        with here.lab.witness(syn_only=True) as witness, Worker(case) as worker:
            assert worker.run(COUNT, at_once) >= 0
            syns = [(packet.nic, packet.source, packet.destination) for packet in witness.packets()]
        assert set(syns) == {(nic, source, place.host) for source in sources}, case
        if workload != "keepalive" or crowd:  # the sources take turns, and each keeps a connection of its own
            assert len(syns) == COUNT, case
        else:  # Go begins one more while it waits for another to become idle
            assert at_once <= len(syns) < COUNT, case


@pytest.mark.parametrize("language", ["c", ""])
def test_server(tmp_path: Path, language: str) -> None:
    programs = compiled(str(tmp_path), [language] if language else [])
    if language not in ("", *programs):
        pytest.skip("there is no C compiler")
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as hold,
        closing(socket.create_server(("127.0.0.1", 0))) as http,
    ):
        places = hold.getsockname(), http.getsockname()
        with serving(programs.get(language), hold, http):
            with socket.create_connection(places[0], timeout=20) as held:
                held.shutdown(socket.SHUT_WR)
                assert held.recv(1) == b""
            with socket.create_connection(places[1], timeout=20) as asked:
                for _ in range(2):
                    asked.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
                    assert asked.recv(4096).endswith(b"\r\nContent-Length: 2\r\n\r\nok")
                asked.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
                assert asked.recv(4096).endswith(b"\r\nConnection: close\r\n\r\nok")
                assert asked.recv(1) == b""
