"""Each example as its user runs it: a process of its own, a real server, a wrong source, Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import http.server
import os
import pty
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import aiobind
from aiobind import lab as aiobind_lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiobind.lab import Lab

EXAMPLES = Path(__file__).parent.parent / "examples"
#: The package under test, which need not be the one beside the examples.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in {"COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"}},
    "PYTHONPATH": str(Path(aiobind.__file__).parent.parent),
    "TERM": "xterm-256color",
}
PINNED, CRAWLER, GATEWAY, POLICY, DEMO, TRIO = (
    f"{name}.py" for name in ("pinned_session", "crawler", "per_connection", "own_policy", "demo", "trio_stream")
)


def command(example: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / example), *arguments]


def run(example: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(example, *arguments),
        env=ENVIRONMENT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@contextlib.contextmanager
def started(example: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command(example, *arguments), env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def interrupted(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C; see that the program ends at once and in order; return what it says."""
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert time.monotonic() - start < 3
    return errors


# --- a web site that remembers who asked for what -----------------------------------------------------------


class Site(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.getsockname()[:2], Page, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.url = "http://{}:{}".format(*listener.getsockname())
        self.seen: list[tuple[str, str]] = []  # path, address of the client
        self.asked, self.let_go = threading.Event(), threading.Event()

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that go away."""


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.client_address[0]))
        self.server.asked.set()
        if self.path.startswith("/slow"):
            self.server.let_go.wait(20)
        if self.path == "/flaky" and len(self.server.seen) <= 2:  # aiohttp itself tries once more
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"page")

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(listener: socket.socket, kind: Callable[[socket.socket], Any] = Site) -> Iterator[Any]:
    with kind(listener) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield site
        finally:
            site.let_go.set()
            site.shutdown()
            thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(socket.create_server(("127.0.0.1", 0))) as site:
        yield site


# --- all of them ---------------------------------------------------------------------------------------------


def test_readme_lists_every_example() -> None:
    listed = re.findall(r"^- `(\w+\.py)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([PINNED, "eth0", "http://127.0.0.1:1/"], "did you mean 'if!eth0'"),
        ([PINNED, "if!no-such-nic", "http://127.0.0.1:1/"], "no interface named 'no-such-nic' (have: "),
        ([PINNED, "if!lo", "http://127.0.0.1:1/"], "connect from if!lo to 127.0.0.1:1: connection refused"),
        ([PINNED, "if!lo", "nonsense"], "nonsense"),
        ([PINNED, "if!lo"], "usage: "),
        ([CRAWLER, "--source", "eth0", "http://127.0.0.1:1/"], "did you mean 'if!eth0'"),
        ([CRAWLER, "--source", "if!lo", "--source", "if!lo", "http://127.0.0.1:1/"], "named twice"),
        ([GATEWAY, "0", "*=eth0"], "did you mean 'if!eth0'"),
        ([GATEWAY, "0", "10.0.0.1/8=if!lo"], "10.0.0.1/8 has host bits set"),
        ([GATEWAY, "0"], "usage: "),
        ([POLICY, "*=eth0", "http://127.0.0.1:1/"], "did you mean 'if!eth0'"),
        ([POLICY, "*=if!no-such-nic", "http://127.0.0.1:1/"], "no interface named 'no-such-nic' (have: "),
        ([POLICY, "*=if!lo", "http://127.0.0.1:1/"], "connect from if!lo to 127.0.0.1:1: connection refused"),
        ([POLICY, "10.0.0.1/8=if!lo", "http://127.0.0.1:1/"], "10.0.0.1/8 has host bits set"),
        ([POLICY, "10.0.0.0/33=if!lo", "http://127.0.0.1:1/"], "'10.0.0.0/33' does not appear to be"),
        ([POLICY, "if!lo", "http://127.0.0.1:1/"], "neither a rule WHERE=SOURCE nor an http URL: 'if!lo'"),
        ([POLICY, "=if!lo", "http://127.0.0.1:1/"], "neither a rule WHERE=SOURCE nor an http URL: '=if!lo'"),
        ([POLICY, "*=if!lo", "gopher://127.0.0.1/"], "neither a rule WHERE=SOURCE nor an http URL: 'gopher:"),
        ([POLICY, "http://127.0.0.1:1/"], "usage: "),
        ([POLICY, "*=if!lo"], "usage: "),
        ([TRIO, "eth0", "127.0.0.1", "1"], "did you mean 'if!eth0'"),
        ([TRIO, "if!no-such-nic", "127.0.0.1", "1"], "no interface named 'no-such-nic' (have: "),
        ([TRIO, "if!lo", "127.0.0.1", "1"], "connect from if!lo to 127.0.0.1:1: connection refused"),
        ([TRIO, "if!lo", "127.0.0.1", "http"], "'http'"),
        ([TRIO, "if!lo"], "usage: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], said: str) -> None:
    ended = run(*arguments)
    assert ended.returncode in {1, 2}
    (line,) = ended.stderr.splitlines()
    assert said in line
    assert not ended.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [PINNED, "if!lo"],
        [POLICY, "*=if!lo"],
    ],
    ids=lambda value: value[0],
)
def test_ctrl_c_in_the_middle_of_a_page(arguments: list[str], site: Site) -> None:
    with started(*arguments, f"{site.url}/slow") as process:
        assert site.asked.wait(20)
        interrupted(process)


def test_ctrl_c_while_trio_waits() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        started(TRIO, "if!lo", *map(str, mute.getsockname())) as process,
        mute.accept()[0],
    ):
        interrupted(process)


# --- trio_stream ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "address", "pin"),
    [("if!n1", "198.18.1.2", "n1"), ("198.18.1.2", "198.18.1.2", "no interface")],
)
def test_trio_stream_leaves_from_its_source(source: str, address: str, pin: str, lab: Lab) -> None:
    with lab.far:
        listener = socket.create_server((lab.target_v4, 80))
    with serving(listener):
        ended = run(TRIO, source, lab.target_v4, "80")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.fullmatch(f"HTTP/1.[01] \\d+ .*\nfrom {source}: {address}, pinned to {pin}\n", ended.stdout)


# --- pinned_session, own_policy ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "address", "pin"),
    [("if!lo", "127.0.0.1", "lo"), ("127.0.0.2", "127.0.0.2", "no interface")],
)
def test_pinned_session_leaves_from_its_source(source: str, address: str, pin: str, site: Site) -> None:
    ended = run(PINNED, source, f"{site.url}/")
    assert (ended.returncode, ended.stderr) == (0, "")
    port = r"\d+"
    assert re.fullmatch(f"200 OK\nfrom {source}: {address} port {port}, pinned to {pin}\n", ended.stdout)
    assert site.seen == [("/", address)]


def test_own_policy_chooses_by_pattern_and_goes_on_to_the_next_rule_that_fits(site: Site) -> None:
    by_name = site.url.replace("127.0.0.1", "LOCALhost")
    rules = ["LocalHost=127.0.0.2", "127.*=if!no-such-nic", "127.0.0.*=127.0.0.3"]
    ended = run(POLICY, *rules, f"{by_name}/a", f"{site.url}/b", f"{by_name}/c")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert site.seen == [("/a", "127.0.0.2"), ("/b", "127.0.0.3"), ("/c", "127.0.0.2")]
    assert ended.stdout.splitlines()[1] == f"200 {site.url}/b from 127.0.0.3"


def test_own_policy_chooses_by_network_if_the_host_is_an_address(site: Site) -> None:
    by_name = site.url.replace("127.0.0.1", "localhost")
    rules = ["10.0.0.0/8=127.0.0.2", "::/0=127.0.0.2", "127.0.0.0/8=127.0.0.3", "local*=127.0.0.4", "*=127.0.0.3"]
    ended = run(POLICY, *rules, f"{site.url}/a", f"{by_name}/b")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert site.seen == [("/a", "127.0.0.3"), ("/b", "127.0.0.4")]


def test_own_policy_refuses_a_host_that_fits_no_rule_and_goes_on(site: Site) -> None:
    by_name = site.url.replace("127.0.0.1", "localhost")
    ended = run(POLICY, "127.0.0.0/8=127.0.0.2", f"{by_name}/a", f"{site.url}/b")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"own_policy: {by_name}/a: ")
    assert site.seen == [("/b", "127.0.0.2")]


@pytest.mark.parametrize(
    ("rule", "host", "fits"),
    [
        ("*", "example.com", True),
        ("*.example.com", "www.example.com", True),
        ("*.Example.com", "WWW.EXAMPLE.COM.", True),
        ("*.example.com", "example.com", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "10.example.com", False),
        ("0.0.0.0/0", "example.com", False),
        ("10.*", "10.1.2.3", True),
        ("2001:db8::/32", "2001:db8:1::2", True),
        ("fe80::/10", "fe80::1%eth0", True),
        ("::/0", "10.1.2.3", False),
    ],
)
def test_own_policy_reads_its_rules(rule: str, host: str, fits: bool) -> None:
    example = runpy.run_path(str(EXAMPLES / POLICY), run_name="own_policy")
    where, _ = example["parsed"](f"{rule}=if!lo")
    assert example["fits"](where, host) is fits


# --- per_connection ------------------------------------------------------------------------------------------


class Backend:
    """A TCP server whose first connection belongs to the test."""

    def __init__(self, address: str) -> None:
        self.listener = socket.create_server((address, 0))
        self.listener.settimeout(10)
        self.port: int = self.listener.getsockname()[1]

    def accept(self) -> tuple[socket.socket, str]:
        sock, (host, _) = self.listener.accept()
        sock.settimeout(10)
        return sock, host


@contextlib.contextmanager
def gateway(*rules: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], socket.socket]]]:
    """Run it; yield its process, and how to ask it for a tunnel."""
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(started(GATEWAY, "0", *rules))
        assert process.stdout is not None
        port = int(process.stdout.readline().removeprefix("listening on 127.0.0.1:"))

        def ask(request: str) -> socket.socket:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            sock.sendall(f"{request}\r\nHost: x\r\n\r\n".encode())
            return sock

        yield process, ask


def answer(sock: socket.socket) -> str:
    """Read the status line, and no byte more than the head."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, head
        head += byte
    return head.decode().removeprefix("HTTP/1.1 ").strip()


def test_per_connection_chooses_by_network_and_domain_first_rule_first() -> None:
    near, other = Backend("127.0.0.1"), Backend("127.0.1.1")
    rules = ["127.0.0.1/32=127.0.0.2", "localhost=127.0.0.3", "127.0.1.0/24=127.0.0.4", "*=if!lo"]
    with near.listener, other.listener, gateway(*rules) as (process, ask):
        assert process.stdout is not None
        for backend, host, address in (
            (other, "127.0.1.1", "127.0.0.4"),
            (near, "127.0.0.1", "127.0.0.2"),
            (near, "localhost", "127.0.0.3"),
        ):
            client = ask(f"CONNECT {host}:{backend.port} HTTP/1.1")
            far, peer = backend.accept()
            with far:
                assert answer(client) == "200 OK"
                assert peer == address
            assert process.stdout.readline() == f"{host}:{backend.port} from {address}: {address}\n"


@pytest.mark.parametrize("first", ["client", "server"])
def test_per_connection_half_closes_in_both_directions(first: str) -> None:
    backend = Backend("127.0.0.1")
    with backend.listener, gateway("*=127.0.0.2") as (_, ask):
        client = ask(f"CONNECT 127.0.0.1:{backend.port} HTTP/1.1")
        far, _ = backend.accept()
        with far:
            assert answer(client) == "200 OK"
            one, two = (client, far) if first == "client" else (far, client)
            size = 3_000_000  # more than the buffers on the way hold
            sending = threading.Thread(target=lambda: (one.sendall(b"x" * size), one.shutdown(socket.SHUT_WR)))
            sending.start()
            assert sum(map(len, iter(lambda: two.recv(65536), b""))) == size
            sending.join()
            two.sendall(b"and back")
            two.close()
            assert b"".join(iter(lambda: one.recv(65536), b"")) == b"and back"


def test_per_connection_says_nothing_of_a_tunnel_that_breaks() -> None:
    backend = Backend("127.0.0.1")
    with backend.listener, gateway("*=127.0.0.2") as (process, ask):
        client = ask(f"CONNECT 127.0.0.1:{backend.port} HTTP/1.1")
        far, _ = backend.accept()
        assert answer(client) == "200 OK"
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()  # with a reset
        with contextlib.suppress(ConnectionError):
            assert client.recv(100) == b""
        assert not interrupted(process)


@pytest.mark.parametrize(
    ("request_line", "said"),
    [
        ("CONNECT 127.0.0.1:1 HTTP/1.1", "502 connect from 127.0.0.2 to 127.0.0.1:1: connection refused"),
        ("CONNECT 127.9.0.1:80 HTTP/1.1", "502 no rule for CONNECT 127.9.0.1:80"),
        ("CONNECT elsewhere.test:80 HTTP/1.1", "502 no rule for CONNECT elsewhere.test:80"),
        ("GET http://127.0.0.1/ HTTP/1.1", "502 no rule for GET "),
        ("CONNECT 127.0.0.1:99999 HTTP/1.1", "502 the port must be 1 to 65535"),
        ("nonsense", "502 "),
    ],
)
def test_per_connection_refuses(request_line: str, said: str) -> None:
    with gateway("127.0.0.0/16=127.0.0.2") as (_, ask):
        assert answer(ask(request_line)).startswith(said)


def test_per_connection_is_bounded_and_ends_with_open_tunnels() -> None:
    backend = Backend("127.0.0.1")
    with backend.listener, gateway("*=127.0.0.2") as (process, ask), contextlib.ExitStack() as stack:
        request = f"CONNECT 127.0.0.1:{backend.port} HTTP/1.1"
        clients = [ask(request) for _ in range(100)]
        far = [stack.enter_context(backend.accept()[0]) for _ in clients]
        assert {answer(client) for client in clients} == {"200 OK"}
        assert answer(ask(request)) == "503 too many tunnels"
        clients.pop().close()
        far_ends = {sock.fileno(): sock for sock in far}
        (ended,) = select.select(list(far_ends), [], [], 10)[0]
        far_ends[ended].close()
        deadline = time.monotonic() + 10
        while answer(ask(request)) != "200 OK":
            assert time.monotonic() < deadline
        assert not interrupted(process)


def test_a_web_client_goes_through_per_connection(site: Site) -> None:
    with gateway("*=127.0.0.2") as (_, ask):
        client = ask(f"CONNECT 127.0.0.1:{site.server_address[1]} HTTP/1.1")
        assert answer(client) == "200 OK"
        connection = http.client.HTTPConnection("127.0.0.1", site.server_address[1])
        connection.sock = client
        connection.request("GET", "/through")
        assert connection.getresponse().read() == b"page"
    assert site.seen == [("/through", "127.0.0.2")]


# --- demo ----------------------------------------------------------------------------------------------------

SOURCES = {
    "127.0.0.2": "127.0.0.2",
    "127.0.0.3": "127.0.0.3",
    "127.0.0.4": "127.0.0.4",
    "ifhost!lo!127.0.0.5": "127.0.0.5",
    "if!lo": "127.0.0.1",
}


def rows(output: str) -> list[list[str]]:
    return [re.split(r" {2,}", line.strip()) for line in output.splitlines()]


def shows_loopback(output: str) -> bool:
    found = [(row[0], row[1], row[3]) for row in rows(output) if len(row) == 6 and row[1].isdigit()]
    return found == [(source, "120", address) for source, address in SOURCES.items()]


def test_demo_shows_all_parts() -> None:
    ended = run(DEMO)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert shows_loopback(ended.stdout), ended.stdout
    assert "\x1b" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert "/120" not in ended.stdout  # the progress
    if aiobind_lab.available() is not None:
        assert "no lab can be made here" in ended.stdout
        return
    nics = "n0", "n1", "n2"
    v4, v6 = "198.18.{}.2", "2001:db8:{:x}::2"
    counts = {nic: ["20" if nic == other else "-" for other in nics] for nic in nics}
    expected = [
        [f"if!{nic}", family, nic, *counts[nic], f"only by {nic}"] for nic in nics for family in ("IPv4", "IPv6")
    ]
    for family, address in (("IPv4", v4), ("IPv6", v6)):
        expected.append([f"ifhost!n1!{address.format(1)}", family, "n1", *counts["n1"], "only by n1"])
    for family, address in (("IPv4", v4), ("IPv6", v6)):
        expected.append([address.format(2), family, "n0", *counts["n0"], "by n0: no pin"])
    shown = [row for row in rows(ended.stdout) if len(row) == 7]
    assert [row for row in shown if row[-1] != "longest wait" and "ms" not in row[-1]] == expected
    phases = {row[0]: row[1:6] for row in shown if row[-1].endswith(" ms")}
    assert phases["all are up"] == phases["n1 is back"] == ["100", "100", "100", "-", "0"]
    assert phases["without n1"] == ["150", "-", "150", "-", "0"]
    assert phases["n1 goes down"][4] == "0"
    assert "No page was lost" in ended.stdout


def test_demo_says_when_no_lab_can_be_made() -> None:
    """Root of a user namespace that may neither make another one nor a network namespace: as in many containers."""
    setpriv, unshare = shutil.which("setpriv"), shutil.which("unshare")
    if setpriv is None or unshare is None:
        pytest.skip("no setpriv or unshare command")
    limit = "echo 0 > /proc/sys/user/max_user_namespaces"
    script = f'{limit} && exec {setpriv} --bounding-set=-all --inh-caps=-all -- "$@"'
    jailed = [unshare, "--user", "--map-root-user", "sh", "-c", script, "sh"]
    if subprocess.run([*jailed, "true"], check=False).returncode:
        pytest.skip("no user namespaces")
    ended = subprocess.run(
        [*jailed, *command(DEMO)], env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert shows_loopback(ended.stdout)
    last = ended.stdout.splitlines()[-1]
    assert last.startswith("2. Three NICs: no lab can be made here: ")


def test_demo_fails_when_it_is_not_as_promised(make_lab: Callable[[int], Lab]) -> None:
    make_lab(0).near.ip("addr del 127.0.0.1/8 dev lo", "addr add 127.0.0.1/32 dev lo")  # 127.0.0.2 is nobody's now
    ended = run(DEMO)
    assert ended.returncode == 1, ended.stdout
    assert "This is not what was promised!" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert "only by n2" in ended.stdout  # the second part is shown all the same


@pytest.mark.parametrize(
    ("syns", "from_its_address", "as_promised"),
    [
        ({"n0": 0, "n1": 20, "n2": 0}, True, True),
        ({"n0": 0, "n1": 21, "n2": 0}, True, True),  # one was sent twice
        ({"n0": 1, "n1": 20, "n2": 0}, True, False),
        ({"n0": 0, "n1": 19, "n2": 0}, True, False),
        ({"n0": 20, "n1": 0, "n2": 0}, True, False),
        ({"n0": 0, "n1": 0, "n2": 0}, True, False),
        ({"n0": 0, "n1": 20, "n2": 0}, False, False),
    ],
)
def test_demo_judges_the_nics(syns: dict[str, int], from_its_address: bool, as_promised: bool) -> None:
    row = runpy.run_path(str(EXAMPLES / DEMO), run_name="demo")["Row"]
    assert row("if!n1", "IPv4", "n1", syns, from_its_address).as_promised() is as_promised


@contextlib.contextmanager
def terminal(*arguments: str, **streams: Any) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[str], str], int]]:
    """Run on a terminal of 80 columns; yield the process, how to read until some text has come, and the keyboard."""
    keyboard, screen = pty.openpty()
    fcntl.ioctl(
        screen, termios.TIOCSWINSZ, (40).to_bytes(2, sys.byteorder) + (80).to_bytes(2, sys.byteorder) + bytes(4)
    )
    shell = [sys.executable, "-c", "import fcntl, os, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0);"]
    shell[-1] += "os.execv(sys.argv[1], sys.argv[1:])"
    streams = {"stdin": screen, "stdout": screen, "stderr": screen, **streams}
    seen = ""

    def until(text: str) -> str:
        nonlocal seen
        deadline = time.monotonic() + 20
        while not re.search(text, seen):
            assert time.monotonic() < deadline, seen
            if select.select([keyboard], [], [], 0.1)[0]:
                try:
                    seen += os.read(keyboard, 65536).decode(errors="replace")
                except OSError:  # EIO: the program has ended
                    break
        return seen

    try:
        with subprocess.Popen(
            [*shell, *command(*arguments)], env=ENVIRONMENT, start_new_session=True, **streams
        ) as process:
            os.close(screen)
            try:
                yield process, until, keyboard
            finally:
                process.kill()
    finally:
        os.close(keyboard)


@pytest.mark.parametrize("moment", [r" [1-9]\d*/120", r"making a lab"])
def test_demo_on_a_terminal_ends_at_once_by_ctrl_c(moment: str) -> None:
    with terminal(DEMO) as (process, until, keyboard):
        until(moment)
        start = time.monotonic()
        os.write(keyboard, b"\x03")
        assert process.wait(10) == 130
        assert time.monotonic() - start < 3
        seen = until("interrupted")
    assert (
        "KeyboardInterrupt" not in seen
    )  # subprocess itself may warn of a pipe, when it is cut short in its very start
    assert "Error" not in seen
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h")  # the cursor is back
