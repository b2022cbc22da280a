"""The servers of mail, SSH, MQTT, DNS, websockets, gRPC and S3, in the manner of ``servers``."""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from servers import NAME, certificate, program, run

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from aiobind.lab import Lab

__all__ = [
    "BUCKET",
    "HOMES",
    "USER",
    "dnsmasq",
    "exim",
    "grpc_server",
    "mosquitto",
    "s3",
    "sshd",
    "websocket_server",
    "websocket_server_tls",
]

BUCKET = "bucket-of-the-far-side"
USER = pwd.getpwuid(os.geteuid()).pw_name
#: the ~/.ssh that each sshd was started with
HOMES: list[Path] = []


def _need_root(name: str) -> None:
    """Skip where root is somebody else outside, as in a user namespace: these servers change to other users."""
    if os.geteuid() or Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{name} takes root")


def exim(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    """Mail for NAME is kept in ``folder/spool/input``; any other is refused. It has STARTTLS."""
    _need_root("exim4")
    cert, key = certificate(folder)
    (folder / "exim.conf").write_text(
        f"exim_user = root\nexim_group = root\nspool_directory = {folder}/spool\nlog_file_path = {folder}/%slog\n"
        f"primary_hostname = {NAME}\nlocal_interfaces = 0.0.0.0\nkeep_environment =\n"
        f"tls_advertise_hosts = *\ntls_certificate = {cert}\ntls_privatekey = {key}\n"
        "queue_only\nhost_lookup =\nrfc1413_query_timeout = 0s\nacl_smtp_rcpt = check\n"
        f"begin acl\ncheck:\n  accept domains = {NAME}\n  deny\nbegin routers\nbegin transports\n"
    )
    command = [program("exim4", "exim4-daemon-light"), "-C", str(folder / "exim.conf"), "-bdf", "-oX", "25"]
    return run(lab, folder, [*command, "-oP", str(folder / "pid")], 25)


def sshd(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    """USER gets in by ``folder/.ssh/id_ed25519``, a home's; ``known_hosts`` is there too. Nobody gets in otherwise."""
    _need_root("sshd")
    home = folder / ".ssh"
    home.mkdir(mode=0o700)
    HOMES.append(home)
    keygen = program("ssh-keygen", "openssh-client")
    for key in (folder / "host_key", home / "id_ed25519"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = (folder / "host_key.pub").read_text()
    (home / "known_hosts").write_text(f"{lab.target_v4},{NAME} {public}")
    (folder / "sshd_config").write_text(
        f"Port 22\nHostKey {folder}/host_key\nAuthorizedKeysFile {home}/id_ed25519.pub\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n"
        "PidFile none\nUseDNS no\nMaxStartups 100\nPrintLastLog no\n"
    )
    command = [program("sshd", "openssh-server"), "-D", "-e", "-f", str(folder / "sshd_config")]
    # It wants /run/sshd, which a machine that never ran it has not.
    script = f"mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec {shlex.join(command)}"
    return run(lab, folder, ["unshare", "--mount", "--", "sh", "-c", script], 22)


def mosquitto(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    (folder / "mosquitto.conf").write_text("listener 1883\nallow_anonymous true\nuser root\nlog_dest stderr\n")
    return run(lab, folder, [program("mosquitto", "mosquitto"), "-c", str(folder / "mosquitto.conf")], 1883)


def dnsmasq(lab: Lab, folder: Path, port: int = 5353) -> AbstractContextManager[int]:
    """A name server, by UDP and TCP: NAME has the target's address, ``long.lab.test`` a text too long for UDP."""
    options = ["--no-daemon", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--pid-file=", "--user=root"]
    options += [f"--port={port}", "--bind-interfaces", f"--listen-address={lab.target_v4}"]
    options += [f"--host-record={NAME},{lab.target_v4}"]
    options += [f"--txt-record=long.lab.test,{','.join([str(number) * 200 for number in range(1, 9)])}"]
    return run(lab, folder, [program("dnsmasq", "dnsmasq-base"), *options], port)


#: Says where the connection came from: at /feed at once, elsewhere to each message. With arguments, by TLS.
_WEBSOCKETS = """
import asyncio
import ssl
import sys
import websockets

async def answer(websocket):
    address = websocket.remote_address[0]
    if websocket.request.path == "/feed":
        await websocket.send(address)
    async for message in websocket:
        await websocket.send(address)

async def main():
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if sys.argv[2:] else None
    if context is not None:
        context.load_cert_chain(*sys.argv[2:])
    async with websockets.serve(answer, "0.0.0.0", int(sys.argv[1]), ssl=context):
        await asyncio.Event().wait()

asyncio.run(main())
"""


def websocket_server(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    return run(lab, folder, [sys.executable, "-c", _WEBSOCKETS, "8765"], 8765)


def websocket_server_tls(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    return run(lab, folder, [sys.executable, "-c", _WEBSOCKETS, "8766", *certificate(folder)], 8766)


#: Answers /lab/Whence with the address that the call came from.
_GRPC = """
from concurrent import futures
import grpc

def whence(request, context):
    return context.peer().encode()

server = grpc.server(futures.ThreadPoolExecutor(2))
methods = {"Whence": grpc.unary_unary_rpc_method_handler(whence)}
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("lab", methods),))
server.add_insecure_port("0.0.0.0:50051")
server.start()
server.wait_for_termination()
"""


def grpc_server(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    return run(lab, folder, [sys.executable, "-c", _GRPC], 50051)


#: As S3's ListBuckets answers (Amazon S3 API Reference), to whoever has signed the request.
_S3 = """
from aiohttp import web

async def list_buckets(request):
    if not request.headers.get("Authorization", "").startswith("AWS4-HMAC-SHA256 "):
        return web.Response(status=403)
    bucket = "<Bucket><Name>BUCKET</Name><CreationDate>2024-01-01T00:00:00.000Z</CreationDate></Bucket>"
    owner = f"<Owner><ID>1</ID><DisplayName>{request.remote}</DisplayName></Owner>"
    namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
    text = f'<ListAllMyBucketsResult xmlns="{namespace}">{owner}<Buckets>{bucket}</Buckets></ListAllMyBucketsResult>'
    return web.Response(text=text, content_type="application/xml")

app = web.Application()
app.router.add_get("/", list_buckets)
web.run_app(app, host="0.0.0.0", port=9000, print=None)
"""


def s3(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    """Debian has no S3 server: this one lists one bucket, and says in the owner's name whence it was asked."""
    return run(lab, folder, [sys.executable, "-c", _S3.replace("BUCKET", BUCKET)], 9000)
