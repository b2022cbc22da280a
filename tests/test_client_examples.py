"""The examples of clients as their user runs them: against real servers, in the lab."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import aiomqtt
import clients  # which finds the examples  # noqa: F401
import dns.asyncbackend
import dns_query
import paho.mqtt.client
import paho.mqtt.publish
import pytest
import servers
import servers_services
from conftest import _need_lab
from servers import CA, NAME
from test_examples import ENVIRONMENT, EXAMPLES, command

from aiobind.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

HOST = Lab.target_v4
#: which have more than 40 lines
LONGER = {"crawler.py", "dask_crawl.py", "demo.py", "own_policy.py", "per_connection.py"}
KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "far",
    "AWS_MAX_ATTEMPTS": "1",
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    _need_lab()
    with Lab(3) as lab:
        yield lab


@contextlib.contextmanager
def witnessed(lab: Lab, port: int, *, connections: int = 1) -> Iterator[None]:
    """Have all that goes to *port* meanwhile leave by n1, in so many connections at least."""
    with lab.witness() as witness:
        yield
        packets = [packet for packet in witness.packets() if packet.dport == port]
    begun = {(packet.protocol, packet.sport) for packet in packets if packet.syn or packet.protocol == "udp"}
    came_by = {(packet.nic, packet.source) for packet in packets if (packet.protocol, packet.sport) in begun}
    assert came_by == {("n1", "198.18.1.2")}
    assert len(begun) >= connections


def run(example: str, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(example, *arguments),
        env={**ENVIRONMENT, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture
def serving(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., int]]:
    with contextlib.ExitStack() as stack:

        def enter(server: Callable[..., AbstractContextManager[int]], **options: int) -> int:
            return stack.enter_context(server(lab, tmp_path, **options))

        yield enter


def cut(lab: Lab, port: int) -> None:
    with lab.far:
        subprocess.run(["ss", "-K", "-Htn", "state", "established", "sport", "=", str(port)], check=True)


def test_the_private_names_that_the_hooks_touch() -> None:
    """What is no hook of the client's own; the table shows that they do what they are taken for."""

    async def paho_of_aiomqtt() -> object:
        return aiomqtt.Client("host")._client

    def parameters(function: Callable[..., object]) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert isinstance(asyncio.run(paho_of_aiomqtt()), paho.mqtt.client.Client)
    assert parameters(paho.mqtt.client.Client._create_socket_connection) == ["self"]
    assert issubclass(dns_query.Datagrams, dns.asyncbackend.DatagramSocket)
    assert parameters(dns_query.Datagrams) == ["family", "transport", "protocol"]
    assert issubclass(dns_query.Stream, dns.asyncbackend.StreamSocket)
    assert parameters(dns_query.Stream) == ["af", "reader", "writer"]
    assert parameters(dns_query.Protocol) == []


@pytest.mark.parametrize("example", [path.name for path in EXAMPLES.glob("*.py") if path.name not in LONGER])
def test_an_example_is_short(example: str) -> None:
    assert len((EXAMPLES / example).read_text().splitlines()) < 40


@pytest.mark.parametrize(
    ("server", "example", "arguments"),
    [
        (servers.postgres, "postgres_asyncpg.py", ["postgresql://postgres@{host}:{port}/postgres"]),
        (servers.postgres, "postgres_psycopg.py", ["{host}", "{port}", "user=postgres"]),
        (servers.redis, "redis_client.py", ["{host}", "{port}"]),
        (servers.nats, "nats_client.py", ["nats://{host}:{port}"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_says_where_it_came_from(
    lab: Lab, serving: Callable[..., int], server: Any, example: str, arguments: list[str]
) -> None:
    port = serving(server)
    with witnessed(lab, port):
        ended = run(example, "if!n1", *(argument.format(host=HOST, port=port) for argument in arguments))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "198.18.1.2" in ended.stdout


def test_smtp_send(lab: Lab, tmp_path: Path, serving: Callable[..., int]) -> None:
    port = serving(servers_services.exim)
    CA.cert_pem.write_to_path(tmp_path / "ca.pem")
    mail = f"From: me@near.test\nTo: {servers_services.USER}@{NAME}\nSubject: from n1\n\nHello.\n"
    with witnessed(lab, port):
        ended = run("smtp_send.py", "if!n1", HOST, stdin=mail, SSL_CERT_FILE=str(tmp_path / "ca.pem"))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("OK id=")
    (kept,) = (tmp_path / "spool/input").glob("*-D")
    assert kept.read_text().endswith("\nHello.\n")
    said = (tmp_path / "mainlog").read_text()
    assert "[198.18.1.2] P=esmtps X=TLS1." in said  # by STARTTLS


def test_ssh_run(lab: Lab, tmp_path: Path, serving: Callable[..., int]) -> None:
    port = serving(servers_services.sshd)
    for place in (f"{servers_services.USER}@{HOST}", HOST):  # that is who runs it
        with witnessed(lab, port):
            arguments = ["if!n1", place, "echo from $SSH_CONNECTION; echo no >&2; exit 3"]
            ended = run("ssh_run.py", *arguments, HOME=str(tmp_path))
        assert (ended.returncode, ended.stderr) == (3, "no\n")
        assert ended.stdout.startswith("from 198.18.1.2 ")


@contextlib.contextmanager
def listening(*arguments: str) -> Iterator[Callable[[], str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command(*arguments), env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline
        finally:
            process.kill()


def test_websocket_client_comes_back(lab: Lab, serving: Callable[..., int]) -> None:
    port = serving(servers_services.websocket_server)
    started = listening("websocket_client.py", "if!n1", f"ws://{HOST}:{port}/feed")
    with witnessed(lab, port, connections=2), started as line:
        assert line() == "198.18.1.2\n"
        cut(lab, port)
        assert line() == "198.18.1.2\n"


def test_mqtt_client(lab: Lab, serving: Callable[..., int]) -> None:
    port = serving(servers_services.mosquitto)
    with lab.far:
        paho.mqtt.publish.single("sensors/1", "21.5", hostname=HOST, retain=True)
    with witnessed(lab, port), listening("mqtt_client.py", "if!n1", HOST, "sensors/#") as line:
        assert line() == "sensors/1 b'21.5'\n"


def test_s3_list(lab: Lab, serving: Callable[..., int]) -> None:
    port = serving(servers_services.s3)
    with witnessed(lab, port):
        ended = run("s3_list.py", "if!n1", f"http://{HOST}:{port}", **KEYS)
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", f"{servers_services.BUCKET}\n")


def test_dns_query_by_udp_and_tcp(lab: Lab, serving: Callable[..., int]) -> None:
    port = serving(servers_services.dnsmasq, port=53)
    with witnessed(lab, port):
        ended = run("dns_query.py", "if!n1", HOST, NAME, "A")
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", f"{HOST}\n")
    with witnessed(lab, port, connections=2):
        ended = run("dns_query.py", "if!n1", HOST, "long.lab.test", "TXT")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(ended.stdout) > 1500


#: what each takes beside the source
ARGUMENTS = {
    "dns_query": [HOST, NAME, "A"],
    "mqtt_client": [HOST, "sensors/#"],
    "nats_client": [f"nats://{HOST}"],
    "postgres_asyncpg": [f"postgresql://postgres@{HOST}/postgres"],
    "postgres_psycopg": [HOST, "5432", "user=postgres"],
    "redis_client": [HOST, "6379"],
    "s3_list": [f"http://{HOST}:9000"],
    "smtp_send": [HOST],
    "ssh_run": [HOST, "true"],
    "udp_query": [HOST],
    "websocket_client": [f"ws://{HOST}:8765/"],
}
#: these tell of each attempt, in words of their own
REPEATED = {"nats_client": "connect from if!n9", "websocket_client": "connect failed; reconnecting in"}


@pytest.mark.parametrize("example", ARGUMENTS)
def test_an_error_is_one_line(lab: Lab, example: str) -> None:
    with lab.witness() as witness:
        source, end = (
            ("n9", "?\n") if example in REPEATED else ("if!n9", ": no interface named 'n9' (have: lo, n0, n1, n2)\n")
        )
        ended = run(f"{example}.py", source, *ARGUMENTS[example], **KEYS)
        assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
        assert ended.stderr.startswith(f"{example}: "), ended.stderr
        assert ended.stderr.endswith(end), ended.stderr
        assert not witness.packets()


def test_what_is_missing_is_named() -> None:
    """By `command_line`, for all of them."""
    ended = run("udp_query.py")
    assert (ended.returncode, ended.stderr) == (1, "usage: udp_query.py SOURCE HOST PORT\n")


@pytest.mark.parametrize(("example", "words"), REPEATED.items())
def test_a_client_that_tries_again_says_why_until_ctrl_c(lab: Lab, example: str, words: str) -> None:
    arguments = command(f"{example}.py", "if!n9", *ARGUMENTS[example])
    with subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if line.startswith(f"{example}: {words}"))
            assert line.endswith("no interface named 'n9' (have: lo, n0, n1, n2)\n"), line
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


#: grpc.aio, whose C core makes the sockets: it takes no socket and no address to bind.
_GRPC = """
import asyncio, sys
import grpc

async def main(target, proxy):
    async with grpc.aio.insecure_channel(target, options=[("grpc.http_proxy", proxy)]) as channel:
        print((await channel.unary_unary("/lab/Whence")(b"", timeout=10)).decode())

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_client_without_a_hook_goes_through_the_proxy(lab: Lab, serving: Callable[..., int]) -> None:
    if importlib.util.find_spec("grpc") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no grpcio here")
    port = serving(servers_services.grpc_server)
    with witnessed(lab, port), listening("per_connection.py", "0", f"{HOST}/32=if!n1") as line:
        proxy = line().removeprefix("listening on ").strip()
        call = [sys.executable, "-c", _GRPC, f"{HOST}:{port}", f"http://{proxy}"]
        ended = subprocess.run(call, capture_output=True, text=True, timeout=30, check=False)
    assert ended.stdout.startswith("ipv4:198.18.1.2:"), ended.stderr
