"""The examples of mail, SSH, websockets, MQTT, S3 and DNS as their user runs them: against real servers, in the lab."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import aiomqtt
import clients  # which finds the examples  # noqa: F401
import dns.asyncbackend
import dns_query
import paho.mqtt.client
import paho.mqtt.publish
import pytest
import servers_more as servers
from conftest import _need_lab
from servers import CA, NAME
from test_examples import ENVIRONMENT, EXAMPLES, command

from aiobind.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

HOST = Lab.target_v4
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


@pytest.mark.parametrize("example", ["dns_query", "mqtt_client", "s3_list", "smtp_send", "ssh_run", "websocket_client"])
def test_an_example_is_short(example: str) -> None:
    assert len((EXAMPLES / f"{example}.py").read_text().splitlines()) < 40


def test_smtp_send(lab: Lab, tmp_path: Path, serving: Callable[..., int]) -> None:
    port = serving(servers.exim)
    CA.cert_pem.write_to_path(tmp_path / "ca.pem")
    mail = f"From: me@near.test\nTo: {servers.USER}@{NAME}\nSubject: from n1\n\nHello.\n"
    with witnessed(lab, port):
        ended = run("smtp_send.py", "if!n1", HOST, stdin=mail, SSL_CERT_FILE=str(tmp_path / "ca.pem"))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("OK id=")
    (kept,) = (tmp_path / "spool/input").glob("*-D")
    assert kept.read_text().endswith("\nHello.\n")
    said = (tmp_path / "mainlog").read_text()
    assert "[198.18.1.2] P=esmtps X=TLS1." in said  # by STARTTLS


def test_ssh_run(lab: Lab, tmp_path: Path, serving: Callable[..., int]) -> None:
    port = serving(servers.sshd)
    for place in (f"{servers.USER}@{HOST}", HOST):  # that is who runs it
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
    port = serving(servers.websocket_server)
    started = listening("websocket_client.py", "if!n1", f"ws://{HOST}:{port}/feed")
    with witnessed(lab, port, connections=2), started as line:
        assert line() == "198.18.1.2\n"
        cut(lab, port)
        assert line() == "198.18.1.2\n"


def test_mqtt_client(lab: Lab, serving: Callable[..., int]) -> None:
    port = serving(servers.mosquitto)
    with lab.far:
        paho.mqtt.publish.single("sensors/1", "21.5", hostname=HOST, retain=True)
    with witnessed(lab, port), listening("mqtt_client.py", "if!n1", HOST, "sensors/#") as line:
        assert line() == "sensors/1 b'21.5'\n"


def test_s3_list(lab: Lab, serving: Callable[..., int]) -> None:
    port = serving(servers.s3)
    with witnessed(lab, port):
        ended = run("s3_list.py", "if!n1", f"http://{HOST}:{port}", **KEYS)
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", f"{servers.BUCKET}\n")


def test_dns_query_by_udp_and_tcp(lab: Lab, serving: Callable[..., int]) -> None:
    port = serving(servers.dnsmasq, port=53)
    with witnessed(lab, port):
        ended = run("dns_query.py", "if!n1", HOST, NAME, "A")
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", f"{HOST}\n")
    with witnessed(lab, port, connections=2):
        ended = run("dns_query.py", "if!n1", HOST, "long.lab.test", "TXT")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(ended.stdout) > 1500


@pytest.mark.parametrize(
    "arguments",
    [
        ["dns_query.py", "if!n9", HOST, NAME, "A"],
        ["mqtt_client.py", "if!n9", HOST, "sensors/#"],
        ["s3_list.py", "if!n9", f"http://{HOST}:9000"],
        ["smtp_send.py", "if!n9", HOST],
        ["ssh_run.py", "if!n9", HOST, "true"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_missing_interface_is_named(lab: Lab, arguments: list[str]) -> None:
    with lab.witness() as witness:
        ended = run(*arguments, **KEYS)
        assert not witness.packets()
    assert ended.returncode == 1
    assert "no interface named 'n9' (have: lo, n0, n1, n2)" in ended.stderr


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
    port = serving(servers.grpc_server)
    with witnessed(lab, port), listening("per_connection.py", "0", f"{HOST}/32=if!n1") as line:
        proxy = line().removeprefix("listening on ").strip()
        call = [sys.executable, "-c", _GRPC, f"{HOST}:{port}", f"http://{proxy}"]
        ended = subprocess.run(call, capture_output=True, text=True, timeout=30, check=False)
    assert ended.stdout.startswith("ipv4:198.18.1.2:"), ended.stderr
