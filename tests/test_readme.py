"""The README's Python is run as it stands, on a host with the NICs that it names, and prints what it says."""

from __future__ import annotations

import contextlib
import errno
import io
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from dns_server import DnsServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiobind.lab import Lab

README = Path(__file__).parent.parent / "README.md"
#: Each block of Python, with the output that stands right behind it, if any does.
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", README.read_text(), re.DOTALL)


class _Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 200


@pytest.fixture
def example_com(lab: Lab, resolv_conf: Callable[..., None]) -> Iterator[None]:
    resolv_conf("", hosts=f"127.0.0.1 localhost\n{lab.target_v4} example.com\n")
    for old, new in (("n0", "eth0"), ("n1", "wwan0")):
        lab.near.ip(f"link set {old} down", f"link set {old} name {new}", f"link set {new} up")
    lab.near.ip(
        "route add default via 198.18.0.1 dev eth0 metric 1", "route add default via 198.18.1.1 dev wwan0 metric 2"
    )
    with lab.far:
        server = _Server((lab.target_v4, 80), _Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with DnsServer("198.18.1.1", namespace=lab.far) as dns:
        dns.add("example.org", lab.target_v4)  # which no file knows
        yield
        assert set(dns.queries) == {("example.org", "A"), ("example.org", "AAAA")}
    server.shutdown()
    server.server_close()
    thread.join()


def test_it_has_examples() -> None:
    assert len(BLOCKS) >= 5
    assert sum(bool(output) for _, output in BLOCKS) >= 3


def test_examples(example_com: None) -> None:
    namespace: dict[str, Any] = {"__name__": "README"}
    for code, expected in BLOCKS:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, "README.md", "exec"), namespace)
        if expected:
            assert output.getvalue() == expected


def test_errnos_that_it_names_exist() -> None:
    for name in set(re.findall(r"\bE[A-Z]{4,}\b", README.read_text())):
        assert hasattr(errno, name), name
