"""The crawler as its user runs it: every URL has one page, whatever is interrupted, killed, refused or pulled."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import runpy
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from test_examples import CRAWLER, ENVIRONMENT, EXAMPLES, command, run, serving, started, terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from aiobind.lab import Lab, Witness

LOOPBACK = {"if!lo": "127.0.0.1", "127.0.0.2": "127.0.0.2", "127.0.0.3": "127.0.0.3"}
A, B = "127.0.0.2", "127.0.0.3"


def sources(*texts: str) -> list[str]:
    return [argument for text in texts for argument in ("--source", text)]


def results(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


# --- a web site that does what its paths say -------------------------------------------------------------------


class Site(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.getsockname()[:2], Page, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.url = "http://{}:{}".format(*listener.getsockname())
        self.seen: list[tuple[str, str]] = []  # path, address of the client
        self.times: list[float] = []
        self.connects: list[float] = []
        self.under_way, self.most = Counter[str](), Counter[str]()  # requests, by client and in all
        self.lock, self.let_go = threading.Lock(), threading.Event()

    def urls(self, *paths: object) -> list[str]:
        return [f"{self.url}/{path}" for path in paths]

    def asked(self, path: str, times: int = 1) -> None:
        """Wait until somebody has asked for it."""
        deadline = time.monotonic() + 20
        while sum(seen == f"/{path}" for seen, _ in self.seen) < times:
            assert time.monotonic() < deadline, self.seen
            time.sleep(0.01)

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that go away."""


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def setup(self) -> None:
        self.server.connects.append(time.monotonic())
        super().setup()

    def do_GET(self) -> None:
        site, client = self.server, self.client_address[0]
        with site.lock:
            site.seen.append((self.path, client))
            site.times.append(time.monotonic())
            times = sum(path == self.path for path, _ in site.seen)
        kind, *rest = self.path.strip("/").split("/")
        status, headers, body = 200, {}, b"page"
        if kind == "slow":
            site.let_go.wait(30)
        elif kind == "nap":
            keys = client, "all"
            with site.lock:
                site.under_way.update(keys)
                site.most |= site.under_way  # the greater of both
            time.sleep(0.03)
            with site.lock:
                site.under_way.subtract(keys)
        elif kind == "big":
            body = bytes(300_000)
        elif kind == "drip":
            body = bytes(100)
        elif kind == "reset" and times <= 2:  # aiohttp itself tries once more
            self.close_connection = True
            return
        elif kind == "status" and times <= int(rest[1]):  # /status/CODE/TIMES/RETRY-AFTER
            status = int(rest[0])
            headers = {"Retry-After": rest[2]} if rest[2:] else {}
        elif kind == "only" and client != rest[0]:  # /only/CLIENT/CODE
            status, headers = int(rest[1]), {"Retry-After": "40"}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if kind != "drip":
            self.wfile.write(body)
            return
        for _ in body:
            self.wfile.write(b"-")
            site.let_go.wait(0.2)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(socket.create_server(("127.0.0.1", 0)), Site) as site:
        yield site


# --- pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [[], ["--uvloop"]], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("way", ["arguments", "stdin", "file"])
def test_the_pages_are_spread_over_the_sources(way: str, loop: list[str], site: Site, tmp_path: Path) -> None:
    urls = site.urls(*range(30))
    (tmp_path / "urls").write_text("\n".join(urls))
    given: dict[str, tuple[list[str], str]] = {
        "arguments": (urls, ""),
        "stdin": ([], "\n".join(urls)),
        "file": (["--input", str(tmp_path / "urls")], ""),
    }
    arguments, stdin = given[way]
    ended = run(CRAWLER, *sources(*LOOPBACK), *loop, "--concurrency", "4", *arguments, stdin=stdin)
    assert ended.returncode == 0, ended.stderr
    lines = results(ended.stdout)
    assert sorted(line["url"] for line in lines) == sorted(urls)
    assert Counter(line["source"] for line in lines) == dict.fromkeys(LOOPBACK, 10)
    assert {(line["source"], line["local"]) for line in lines} == set(LOOPBACK.items())
    assert sorted(site.seen) == sorted((line["url"].removeprefix(site.url), line["local"]) for line in lines)
    assert all((line["status"], line["bytes"], line["tries"]) == (200, 4, 1) and line["ms"] > 0 for line in lines)
    *_, last, summary = ended.stderr.splitlines()
    assert last.split()[:2] == [B, "ok"]
    assert last.split()[4] == "10"
    assert summary.startswith("30 pages, 0 failed, ")
    assert "\x1b" not in ended.stderr


def test_blank_lines_comments_and_what_is_listed_twice_are_left_out(site: Site, tmp_path: Path) -> None:
    (tmp_path / "urls").write_text(f"# mine\n\n  {site.url}/a  \r\n{site.url}/b\n#{site.url}/c\n{site.url}/a\n")
    ended = run(CRAWLER, *sources(A), "--input", str(tmp_path / "urls"), f"{site.url}/b", f"{site.url}/d")
    assert ended.returncode == 0, ended.stderr
    assert sorted(site.seen) == [("/a", A), ("/b", A), ("/d", A)]
    assert len(results(ended.stdout)) == 3
    assert "3 pages, 0 failed, 2 skipped" in ended.stderr


def test_a_line_that_comes_is_worked_on_at_once_and_none_is_read_too_early(site: Site) -> None:
    with started(CRAWLER, *sources(A), "--concurrency", "1", "--input", "-") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{site.url}/first\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["url"] == f"{site.url}/first"
        process.stdin.write(f"{site.url}/slow\n")
        process.stdin.flush()
        site.asked("slow")
        os.set_blocking(process.stdin.fileno(), False)
        written, full = 0, 0
        for number in range(2_000_000):  # until the pipe stays full
            line = b"# %050d\n" % number if number % 2 else f"{site.url}/{number:050}\n".encode()
            try:
                written += os.write(process.stdin.fileno(), line)
                full = 0
            except BlockingIOError:
                full += 1
                if full > 20:
                    break
                time.sleep(0.02)
        assert written < 1_000_000


def test_a_page_is_read_so_far_and_no_further(site: Site) -> None:
    ended = run(CRAWLER, *sources(A), "--max-bytes", "100000", *site.urls("big", "x"))
    assert ended.returncode == 0, ended.stderr
    by_size = {line["bytes"]: line.get("truncated") for line in results(ended.stdout)}
    assert by_size == {100_000: True, 4: None}


# --- what fails --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "tries", "status", "error", "asked"),
    [
        ("reset", 2, 200, None, 3),
        ("status/503/2", 3, 200, None, 3),
        ("status/429/1", 2, 200, None, 2),
        ("status/408/1", 2, 200, None, 2),
        ("status/404/9", 1, 404, None, 1),
        ("status/401/9", 1, 401, None, 1),
        ("status/500/9", 3, 500, "500 Internal Server Error", 3),
        ("status/403/9", 1, 403, "403 Forbidden", 1),
        ("status/503/9/3600", 1, 503, "503 Service Unavailable", 1),
        ("drip", 3, None, "TimeoutError", 3),
        ("slow", 3, None, "SocketTimeoutError: Timeout on reading data from socket", 3),
    ],
)
def test_what_may_be_repeated_is(
    path: str, tries: int, status: int | None, error: str | None, asked: int, site: Site
) -> None:
    ended = run(CRAWLER, *sources(A), "--tries", "3", "--timeout", "1", f"{site.url}/{path}")
    (line,) = results(ended.stdout)
    assert (line["tries"], line.get("status"), len(site.seen)) == (tries, status, asked)
    assert line.get("error", "").startswith(error or "")
    assert ("error" in line) is (error is not None)
    assert ended.returncode == int(error is not None)
    assert "Traceback" not in ended.stderr


def test_a_server_that_asks_for_a_pause_gets_it(site: Site) -> None:
    ended = run(CRAWLER, *sources(A), f"{site.url}/status/503/1/2")
    assert ended.returncode == 0, ended.stderr
    first, second = site.times
    assert second - first >= 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", 0), ("7", 7), ("-7", 0), ("soon", 0), ("1e3", 0), ("9" * 400, 3600), ("٣", 0)],
)
def test_asked_pause(text: str, seconds: float) -> None:
    asked_pause = runpy.run_path(str(EXAMPLES / CRAWLER), run_name="crawler")["asked_pause"]
    assert asked_pause(text) == seconds
    assert 90 < asked_pause(formatdate(time.time() + 100, usegmt=True)) < 101
    assert asked_pause(formatdate(time.time() - 100, usegmt=True)) == 0


def test_a_wrong_certificate_is_no_less_wrong_the_second_time() -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    listener = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
    with serving(listener, Site) as site:
        ended = run(CRAWLER, *sources(A), site.url.replace("http:", "https:"))
    (line,) = results(ended.stdout)
    assert line["tries"] == 1
    assert "certificate" in line["error"].lower()


def test_it_tells_of_what_it_could_not_get(site: Site) -> None:
    wrong = ["nonsense", "http://[::1", "http://127.0.0.1:99999/", "ftp://127.0.0.1/", "http://ü..x/"]
    ended = run(CRAWLER, *sources(A), "--tries", "2", "http://127.0.0.1:1/", *wrong, *site.urls("x"))
    assert ended.returncode == 1
    by_url = {line["url"]: line for line in results(ended.stdout)}
    assert by_url["http://127.0.0.1:1/"]["error"].endswith("connection refused")
    assert by_url["http://127.0.0.1:1/"]["tries"] == 2
    assert [by_url[url]["tries"] for url in wrong] == [1] * 5
    assert all(by_url[url]["error"].endswith(url) for url in wrong)
    assert by_url[f"{site.url}/x"]["status"] == 200
    assert "1 pages, 6 failed" in ended.stderr
    ended = run(CRAWLER, *sources("if!no-such-nic"), "--tries", "1", *site.urls("x"))
    assert ended.returncode == 1
    (line,) = results(ended.stdout)
    assert set(line) == {"url", "error", "tries"}
    assert "no interface named 'no-such-nic'" in line["error"]


# --- limits and policies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "option", "most"),
    [
        ([A, B], ["--limit-per-source", "2"], {A: 2, B: 2, "all": 4}),
        ([A, B], ["--limit-per-host", "3"], {"all": 3}),
        ([A, B], ["--limit-per-source-host", "2"], {A: 2, B: 2, "all": 4}),
        ([A, B], ["--concurrency", "5"], {"all": 5}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_limits(names: list[str], option: list[str], most: dict[str, int], site: Site) -> None:
    urls = site.urls(*(f"nap/{number}" for number in range(100)))
    ended = run(CRAWLER, *sources(*names), "--concurrency", "20", "--timeout", "2", *option, stdin="\n".join(urls))
    assert ended.returncode == 0, ended.stderr
    assert len(results(ended.stdout)) == 100
    assert {key: site.most[key] for key in most} == most


@pytest.mark.parametrize("option", ["--rate-per-source", "--rate-per-source-host"])
def test_rates_are_of_connects(option: str, site: Site) -> None:
    urls = site.urls(*(f"nap/{number}" for number in range(40)))
    ended = run(CRAWLER, *sources(A), "--concurrency", "20", option, "10", stdin="\n".join(urls))
    assert ended.returncode == 0, ended.stderr
    # Ten in any one second; what the server sees of that is late at times.
    assert all(later - earlier > 0.5 for earlier, later in zip(site.connects, site.connects[10:], strict=False))


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        (["--policy", "round-robin"], {A: 15, B: 15}),
        (["--policy", "failover"], {A: 30}),
        (["--policy", "least-connections"], {A: 30}),
        (["--policy", "weighted"], {A: 15, B: 15}),
        (["--weight", A, "2"], {A: 20, B: 10}),
        (["--weight", A, "0.5", "--weight", B, "2.5", "--policy", "weighted"], {A: 5, B: 25}),
        (["--policy", "random"], 2),
        (["--policy", "sticky"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_policies(options: list[str], shares: dict[str, int] | int, site: Site) -> None:
    ended = run(CRAWLER, *sources(A, B), *options, "--concurrency", "1", *site.urls(*range(30)))
    assert ended.returncode == 0, ended.stderr
    clients = Counter(client for _, client in site.seen)
    assert (len(clients) if isinstance(shares, int) else clients) == shares


@pytest.mark.parametrize("status", ["403", "429"])
def test_a_source_that_is_banned_goes_to_that_host_no_more(status: str, site: Site) -> None:
    urls = site.urls(*(f"only/{B}/{status}/{number}" for number in range(20)))
    ended = run(CRAWLER, *sources(A, B), "--concurrency", "1", *urls)
    assert ended.returncode == 0, ended.stdout
    lines = results(ended.stdout)
    assert [line["source"] for line in lines] == [B] * 20
    assert [line["tries"] for line in lines] == [2] + [1] * 19
    assert Counter(client for _, client in site.seen) == {A: 1, B: 20}


def test_the_wait_for_a_connection_is_no_timeout(site: Site) -> None:
    urls = site.urls(*(f"nap/{number}" for number in range(50)))
    arguments = ["--concurrency", "100", "--limit-per-host", "1", "--timeout", "1", "--tries", "1"]
    ended = run(CRAWLER, *sources(A), *arguments, stdin="\n".join(urls))
    assert ended.returncode == 0, ended.stdout


# --- interrupted, and gone on with -------------------------------------------------------------------------------


def crawling(site: Site, output: Path, *paths: object, options: list[str] | None = None) -> list[str]:
    return [
        CRAWLER,
        *sources(A, B),
        "--concurrency",
        "3",
        "--output",
        str(output),
        *(options or []),
        *site.urls(*paths),
    ]


def ends(process: subprocess.Popen[str], status: int) -> tuple[str, float]:
    """Wait for the end; return what was said on standard error, and how long that took."""
    start = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status, errors
    for ugly in ("Traceback", "Fatal", "Exception", "never awaited"):
        assert ugly not in errors
    return errors, time.monotonic() - start


def had(output: Path) -> Counter[str]:
    """Return how many pages each URL has; every line must be whole."""
    text = output.read_text()
    assert text.endswith("\n") or not text
    return Counter(line["url"] for line in results(text) if "error" not in line)


PATHS = ["a", "slow", "b", *(f"nap/{number}" for number in range(100))]


@pytest.mark.parametrize("loop", [[], ["--uvloop"]], ids=["asyncio", "uvloop"])
def test_ctrl_c_lets_the_pages_under_way_end_and_the_next_run_goes_on(
    loop: list[str], site: Site, tmp_path: Path
) -> None:
    output = tmp_path / "pages.jsonl"
    with started(*crawling(site, output, *PATHS, options=loop)) as process:
        site.asked("nap/20")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        site.let_go.set()
        errors, _ = ends(process, 130)
    assert errors.endswith("interrupted; the same command goes on from here\n")
    first = had(output)
    assert first[f"{site.url}/slow"] == 1
    assert 20 < len(first) < len(PATHS)
    asked = len(site.seen)
    ended = run(*crawling(site, output, *PATHS, options=loop))
    assert ended.returncode == 0, ended.stderr
    assert had(output) == dict.fromkeys(site.urls(*PATHS), 1)
    assert len(site.seen) == len(PATHS)
    assert f"{len(PATHS) - asked} pages, 0 failed, {asked} skipped" in ended.stderr
    assert run(*crawling(site, output, *PATHS)).returncode == 0
    assert len(site.seen) == len(PATHS)


def test_after_ctrl_c_no_page_is_begun(site: Site, tmp_path: Path) -> None:
    with started(
        *crawling(site, tmp_path / "pages.jsonl", "slow", "a", "b", options=["--concurrency", "1"])
    ) as process:
        site.asked("slow")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        site.let_go.set()
        ends(process, 130)
    assert site.seen == [("/slow", A)]


@pytest.mark.parametrize("loop", [[], ["--uvloop"]], ids=["asyncio", "uvloop"])
def test_ctrl_c_twice_ends_at_once(loop: list[str], site: Site, tmp_path: Path) -> None:
    output = tmp_path / "pages.jsonl"
    with started(*crawling(site, output, *PATHS, options=loop)) as process:
        site.asked("slow")
        site.asked("nap/20")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, seconds = ends(process, 130)
    assert seconds < 4
    assert had(output)[f"{site.url}/slow"] == 0
    site.let_go.set()
    assert run(*crawling(site, output, *PATHS)).returncode == 0
    assert had(output) == dict.fromkeys(site.urls(*PATHS), 1)


@pytest.mark.parametrize(("path", "least", "most"), [("slow", 4, 10), ("status/503/99/50", 0, 4)])
def test_ctrl_c_waits_for_a_page_but_not_for_long_nor_for_its_next_try(
    path: str, least: float, most: float, site: Site, tmp_path: Path
) -> None:
    output = tmp_path / "pages.jsonl"
    with started(*crawling(site, output, path, "a")) as process:
        site.asked(path)
        site.asked("a")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, seconds = ends(process, 130)
    assert least < seconds < most
    assert had(output) == {f"{site.url}/a": 1}
    assert "error" not in output.read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_nothing_comes_in(number: signal.Signals, status: int, site: Site) -> None:
    with started(CRAWLER, *sources(A), "--input", "-") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{site.url}/a\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(number)
        assert process.wait(10) == status  # though the pipe is open
        errors, _ = ends(process, status)
    assert "1 pages, 0 failed" in errors
    assert errors.endswith("interrupted; with --output FILE the same command would go on from here\n")


def test_a_job_in_the_background_of_a_shell_has_no_ctrl_c(site: Site) -> None:
    pipe, ignore = subprocess.PIPE, ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    arguments = [*ignore, *command(CRAWLER, *sources(A), f"{site.url}/slow")]
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True) as process:
        site.asked("slow")
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        site.let_go.set()
        ends(process, 0)


@pytest.mark.parametrize(
    "half", ["", '{"url": "http://127.0.0.1/half', '{"u', '{"url": "http://127.0.0.1:1/", "status": 200}']
)
def test_a_kill_in_the_middle_of_a_line(half: str, site: Site, tmp_path: Path) -> None:
    output = tmp_path / "pages.jsonl"
    with started(*crawling(site, output, *PATHS)) as process:
        site.asked("nap/20")
        process.kill()
    with output.open("a") as file:
        file.write(half)
    assert sum(had(output).values()) > 10 if not half else output.read_text().endswith(half)
    site.let_go.set()
    ended = run(*crawling(site, output, *PATHS))
    assert ended.returncode == 0, ended.stderr
    assert had(output) == dict.fromkeys(site.urls(*PATHS), 1)


def test_only_half_a_line_and_lines_of_somebody_else_harm_nobody(site: Site, tmp_path: Path) -> None:
    output = tmp_path / "pages.jsonl"
    output.write_text('{"url')
    assert run(*crawling(site, output, "a")).returncode == 0
    assert had(output) == {f"{site.url}/a": 1}
    with output.open("a") as file:
        file.write('\n{"url": 7}\n[]\nnull\n\0\0\0{"url"\n{"url": "\\ud800"}\n')
    ended = run(*crawling(site, output, "a", "b"))
    assert ended.returncode == 0, ended.stderr
    assert "1 pages, 0 failed, 1 skipped" in ended.stderr
    assert Counter(path for path, _ in site.seen) == {"/a": 1, "/b": 1}


def test_what_had_an_error_is_tried_again_by_the_next_run(site: Site, tmp_path: Path) -> None:
    output, paths = tmp_path / "pages.jsonl", ("a", "status/500/1", "status/404/9")
    ended = run(*crawling(site, output, *paths, options=["--tries", "1"]))
    assert ended.returncode == 1
    assert "2 pages, 1 failed" in ended.stderr
    ended = run(*crawling(site, output, *paths, options=["--tries", "1"]))
    assert ended.returncode == 0
    assert "1 pages, 0 failed, 2 skipped" in ended.stderr
    assert had(output) == dict.fromkeys(site.urls(*paths), 1)
    assert len(results(output.read_text())) == 4


def test_two_crawls_do_not_write_to_the_same_output(site: Site, tmp_path: Path) -> None:
    output = tmp_path / "pages.jsonl"
    with started(*crawling(site, output, "slow")) as process:
        site.asked("slow")
        ended = run(*crawling(site, output, "a"))
        assert (ended.returncode, ended.stderr) == (1, f"crawler: {output}: another crawl is writing to it\n")
        site.let_go.set()
        ends(process, 0)
    assert had(output) == {f"{site.url}/slow": 1}


@pytest.mark.parametrize("text", ["http://127.0.0.1/a\nhttp://127.0.0.1/b", "{}", "\n", '{"URL": 1}\n'])
def test_a_file_that_holds_something_else_stays_as_it_is(text: str, site: Site, tmp_path: Path) -> None:
    output = tmp_path / "urls.txt"
    output.write_text(text)
    ended = run(*crawling(site, output, "a"))
    assert ended.returncode == 1
    assert re.fullmatch(f"crawler: {output}: it holds something else than results, .*\n", ended.stderr)
    assert output.read_text() == text
    assert not site.seen


# --- what cannot go well -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "/no/such/file"], "No such file or directory: '/no/such/file'"),
        (["--input", "/"], "Is a directory"),
        (["--output", "/no/such/file", "http://127.0.0.1:1/"], "No such file or directory: '/no/such/file'"),
        (["--output", "/dev/full", "--tries", "1", "http://127.0.0.1:1/"], "No space left on device"),
        (["--weight", A, "much", "http://127.0.0.1:1/"], "could not convert string to float: 'much'"),
        (["--weight", "eth0", "1", "http://127.0.0.1:1/"], "did you mean 'if!eth0'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], said: str) -> None:
    ended = run(CRAWLER, *sources(A), *arguments)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("crawler: ")
    assert said in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--concurrency", "0"],
        ["--tries", "-1"],
        ["--timeout", "0"],
        ["--timeout", "nan"],
        ["--progress", "inf"],
        ["--max-bytes", "x"],
        ["--policy", "mine"],
        ["--weight", "127.0.0.4", "1"],
        ["--weight", A, "1", "--policy", "random"],
    ],
    ids=" ".join,
)
def test_wrong_options(arguments: list[str]) -> None:
    ended = run(CRAWLER, *sources(A), *arguments, "http://127.0.0.1:1/")
    assert ended.returncode == 2
    assert ended.stderr.startswith("usage: ")
    assert arguments[0] in ended.stderr.splitlines()[-1]


def test_it_ends_quietly_when_nobody_reads_on(site: Site) -> None:
    with started(CRAWLER, *sources("if!lo"), "--concurrency", "1", *site.urls(*range(50))) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(10) == 1
    assert len(site.seen) < 50


# --- progress ----------------------------------------------------------------------------------------------------


def test_a_line_now_and_then_where_there_is_no_terminal(site: Site) -> None:
    with started(CRAWLER, *sources(A, B), "--progress", "0.2", *site.urls("a", "slow")) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        site.let_go.set()
        ends(process, 0)
    for line in lines:
        assert re.fullmatch(rf"1 pages, 0 failed, \d\.\d s, \d\.\d pages/s; {A} ok [01]; {B} ok [01]\n", line), line


def test_a_table_on_the_terminal_while_the_results_go_elsewhere(site: Site, tmp_path: Path) -> None:
    output = tmp_path / "pages.jsonl"
    arguments = [CRAWLER, *sources("if!lo"), *site.urls("", "slow")]
    with output.open("wb") as file, terminal(*arguments, stdout=file) as (process, until, _):
        until("1 pages")
        site.let_go.set()
        seen = until("2 pages, 0 failed")
        assert process.wait(10) == 0
    assert "\x1b[" in seen
    assert [line["status"] for line in results(output.read_text())] == [200, 200]


def test_ctrl_c_on_the_terminal(site: Site, tmp_path: Path) -> None:
    with terminal(*crawling(site, tmp_path / "pages.jsonl", "slow", "a")) as (process, until, keyboard):
        until("1 pages")
        os.write(keyboard, b"\x03")
        until("1 pages under way may end")
        os.write(keyboard, b"\x03")
        assert process.wait(10) == 130
        seen = until("goes on from here")
    assert "Error" not in seen
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h")  # the cursor is back


# --- NICs --------------------------------------------------------------------------------------------------------


def test_every_nic_is_used(lab: Lab, witness: Witness) -> None:
    with lab.far:
        listener = socket.create_server((lab.target_v4, 80))
    with serving(listener, Site) as site:
        nics = sources(*(f"if!{nic.name}" for nic in lab.nics))
        ended = run(CRAWLER, *nics, "--concurrency", "6", *site.urls(*range(12)))
    assert ended.returncode == 0, ended.stderr
    assert {line["source"]: line["local"] for line in results(ended.stdout)} == {
        f"if!{nic.name}": nic.v4 for nic in lab.nics
    }
    ways = {(packet.nic, packet.source) for packet in witness.packets() if packet.syn}
    assert ways == {(nic.name, nic.v4) for nic in lab.nics}


def unplug(lab: Lab) -> None:
    lab.far.ip("link set f1 down")


def plug_in(lab: Lab) -> None:
    lab.far.ip("link set f1 up")


def switch_off(lab: Lab) -> None:
    lab.near.ip("link set n1 down")


def switch_on(lab: Lab) -> None:
    lab.near.ip("link set n1 up", "route add default via 198.18.1.1 dev n1 metric 1001")


def pull_out(lab: Lab) -> None:
    lab.near.ip("link del n1")


def put_in(lab: Lab) -> None:
    lab.near.ip(f"link add n1 type veth peer name f1 netns /proc/{os.getpid()}/fd/{lab.far.fileno()}")
    lab.far.ip("addr add 198.18.1.1/24 dev f1", "link set f1 up")
    lab.near.ip("addr add 198.18.1.2/24 dev n1")
    switch_on(lab)


@pytest.mark.parametrize("loop", [[], ["--uvloop"]], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("goes", "comes"),
    [(unplug, plug_in), (switch_off, switch_on), (pull_out, put_in)],
    ids=["cable", "down", "deleted"],
)
def test_a_nic_is_pulled_in_the_middle_and_nothing_is_lost(
    goes: Callable[[Lab], None], comes: Callable[[Lab], None], loop: list[str], lab: Lab, tmp_path: Path
) -> None:
    with lab.far:
        listener = socket.create_server((lab.target_v4, 80))
    options = [*sources(*(f"if!{nic.name}" for nic in lab.nics)), "--concurrency", "12", *loop]
    # No page may ever wait for its timeout: what is under way on that NIC fails at once, and goes by another.
    options += ["--timeout", "90", "--progress", "0.2"]
    with serving(listener, Site) as site:
        urls = site.urls(*(f"nap/{number}" for number in range(800)))
        (tmp_path / "urls").write_text("\n".join(urls))
        with started(CRAWLER, *options, "--input", str(tmp_path / "urls")) as process:
            lines = map(json.loads, iter(process.stdout.readline, ""))  # type: ignore[union-attr]
            before = list(itertools.islice(lines, 150))
            goes(lab)
            meanwhile = list(itertools.islice(lines, 300))
            comes(lab)
            after = list(lines)
            errors, _ = ends(process, 0)
    pages = [*before, *meanwhile, *after]
    assert Counter(page["url"] for page in pages) == dict.fromkeys(urls, 1), errors
    assert all(page["status"] == 200 and "error" not in page for page in pages)
    assert {page["source"] for page in before} == {"if!n0", "if!n1", "if!n2"}
    assert sum(page["source"] == "if!n1" for page in meanwhile) < 50
    assert "; if!n1 down " in errors
    assert sum(page["source"] == "if!n1" for page in after) > 10  # of a carrier the kernel tells up to a second late
