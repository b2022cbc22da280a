"""Real servers on the far side of a lab, as Debian packages them: one function each, which returns a context manager.

    with postgres(lab, folder) as port: ...      # listens at every address of lab.far; folder is its own, and empty

It listens when the block begins and has ended when the block is left, or this process has died (PR_SET_PDEATHSIG).
Without the program the test is skipped, or fails when ``CI=true``. To add one: ``run`` its command in the foreground.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
import trustme

from aiobind.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["CA", "NAME", "nats", "nats_tls", "nginx", "nginx_tls", "postgres", "program", "redis", "redis_tls", "run"]

#: the name of all servers, and who has certified it
NAME, CA = "server.lab.test", trustme.CA()


def program(name: str, package: str, *folders: str) -> str:
    """Return the path of a program of Debian's *package*."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", *folders])
    found = shutil.which(name, path=path)
    if found is None:
        missing = f"no {name} here: apt-get install {package}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    return found


@contextlib.contextmanager
def run(lab: Lab, folder: Path, command: list[str], port: int, end: int = signal.SIGTERM) -> Iterator[int]:
    """Run a server, in the foreground and in *folder*, until the block is left; yield its port once it listens.

    Args:
        end: the signal that has it end at once and in order.
    """
    command = ["setpriv", "--pdeathsig", "TERM", "--", *command]
    with (folder / "log").open("w+") as log:
        with lab.far:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
        with process:  # waits for it
            try:
                _wait(lab, process, port, folder / "log")
                yield port
            finally:
                process.send_signal(end)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def _wait(lab: Lab, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            with lab.far:
                socket.create_connection((lab.target_v4, port), timeout=10).close()
        except OSError as error:
            if error.errno != errno.ECONNREFUSED or process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{process.args} does not listen at port {port} ({error}):\n{log.read_text()}")
            time.sleep(0.02)
        else:
            return


def certificate(folder: Path) -> tuple[str, str]:
    """Write a server's certificate and its key to *folder*; return the paths."""
    issued, paths = CA.issue_cert(NAME, Lab.target_v4, Lab.target_v6), (folder / "server.crt", folder / "server.key")
    issued.cert_chain_pems[0].write_to_path(paths[0])
    issued.private_key_pem.write_to_path(paths[1])
    paths[1].chmod(0o600)  # PostgreSQL insists
    return str(paths[0]), str(paths[1])


def _redis(lab: Lab, folder: Path, port: int, *options: str) -> AbstractContextManager[int]:
    command = [program("redis-server", "redis-server"), "--bind", "0.0.0.0", "::", "--protected-mode", "no"]
    return run(lab, folder, [*command, "--save", "", *options], port)


def redis(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    return _redis(lab, folder, 6379, "--port", "6379")


def redis_tls(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    cert, key = certificate(folder)
    files = ("--tls-cert-file", cert, "--tls-key-file", key, "--tls-auth-clients", "no")
    return _redis(lab, folder, 6380, "--port", "0", "--tls-port", "6380", *files)


def _nats(lab: Lab, folder: Path, port: int, *options: str) -> AbstractContextManager[int]:
    command = [program("nats-server", "nats-server"), "--addr", "::", "--port", str(port)]
    return run(lab, folder, [*command, *options], port)


def nats(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    return _nats(lab, folder, 4222)


def nats_tls(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    cert, key = certificate(folder)
    return _nats(lab, folder, 4223, "--tls", "--tlscert", cert, "--tlskey", key)


def _nginx(lab: Lab, folder: Path, port: int, options: str) -> AbstractContextManager[int]:
    """A web server: each page says from where it was asked for."""
    (folder / "nginx.conf").write_text(
        "user root; daemon off; master_process off; pid nginx.pid; error_log stderr; events {}\n"
        "http { access_log off; keepalive_requests 1000; default_type text/plain;\n"
        "  client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;\n"
        f"  server {{ listen {port} {options}; listen [::]:{port} {options};\n"
        "    ssl_certificate server.crt; ssl_certificate_key server.key;\n"
        '    location / { return 200 "$remote_addr"; } } }\n'
    )
    certificate(folder)
    command = [program("nginx", "nginx-light"), "-p", f"{folder}/", "-c", "nginx.conf", "-e", "stderr"]
    return run(lab, folder, command, port)


def nginx(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    return _nginx(lab, folder, 80, "")


def nginx_tls(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    """It speaks HTTP/2 as well."""
    return _nginx(lab, folder, 443, "ssl http2")


def postgres(lab: Lab, folder: Path) -> AbstractContextManager[int]:
    """PostgreSQL: user and database ``postgres``, no password, and TLS for whoever wants it."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    binary, initdb = (program(name, "postgresql", *folders) for name in ("postgres", "initdb"))
    # It refuses to run as root; in a user namespace of its own it is somebody else, and the files are still ours.
    somebody = pwd.getpwnam("nobody")
    user = ["unshare", "--user", f"--map-user={somebody.pw_uid}", f"--map-group={somebody.pw_gid}", "--"]
    options = ["--no-sync", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
    made = subprocess.run([*user, initdb, "-D", folder / "data", *options], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    (folder / "data/pg_hba.conf").write_text("host all all all trust\n")
    settings = {"listen_addresses": "*", "unix_socket_directories": "", "fsync": "off", "shared_buffers": "1MB"}
    settings |= {"max_connections": "20", "autovacuum": "off", "ssl": "on"}
    settings |= dict(zip(("ssl_cert_file", "ssl_key_file"), certificate(folder), strict=True))
    command = [*user, "setpriv", "--pdeathsig", "INT", "--", binary, "-D", str(folder / "data")]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    return run(lab, folder, command, 5432, signal.SIGINT)  # SIGTERM would wait for its clients
