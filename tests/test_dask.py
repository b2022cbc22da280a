"""The crawl over many machines: two workers with NICs of their own, one is killed in the middle, nothing is lost.

control                       near of a                           far of a
  the scheduler, the crawls     worker a: if!n0 if!n1 if!n2  ══     the web site
        │                       near of b                           far of b
        └──── control ────      worker b: if!n0 if!n1 if!n3  ══     the web site, at the same address
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from socket import create_server
from typing import TYPE_CHECKING, Any

import pytest
from test_examples import ENVIRONMENT, EXAMPLES, Page, Site, command, run, serving

from aiobind.lab import Lab, Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from socket import socket

CRAWL, SCHEDULER, DASHBOARD, SITE = "dask_crawl.py", "10.9.0.1", "http://10.9.0.1:8787", f"http://{Lab.target_v4}"
PAGES, ENOUGH = 4, 25  # of each worker at once; of each site before it stalls
DASK = [sys.executable, "-W", "default::ResourceWarning", "-m", "dask"]
BROWSER = """
import json, sys
from bokeh.client import pull_session
with pull_session(url=sys.argv[1]) as session:
    (bars,) = [model.data for model in session.document.models if "done" in getattr(model, "data", ())]
    print(json.dumps(dict(zip(bars["name"], bars["done"]))))
"""


class Held(Page):
    server: Uplink

    def do_GET(self) -> None:
        if self.path == "/held" or len(self.server.seen) >= ENOUGH:
            self.server.held.append(self.path)
            self.server.let_go.wait(30)
        super().do_GET()


class Uplink(Site):
    """Has some pages, and holds the others until they are let go."""

    def __init__(self, listener: socket) -> None:
        super().__init__(listener)
        self.RequestHandlerClass = Held
        self.held: list[str] = []


class Machine:
    """A lab of its own, wired to the scheduler's namespace; the sources of its worker; the site at its far end."""

    def __init__(self, cluster: Cluster, name: str, lab: Lab, address: str, *sources: str) -> None:
        self.name, self.lab, self.address, self.sources = name, lab, address, sources
        self.witness = lab.witness()
        with lab.far:
            listener = create_server((lab.target_v4, 80))
        self.site: Uplink = cluster.stack.enter_context(serving(listener, Uplink))
        lab.near.ip(
            f"link add control type veth peer name to-{name} netns /proc/{os.getpid()}/fd/{cluster.control.fileno()}",
            f"addr add {address}/24 dev control",
            "link set control up",
        )
        cluster.control.ip(f"link set to-{name} up", f"route add {address} dev to-{name} src {SCHEDULER}")


class Cluster:
    """The scheduler and the workers of Dask, each a process in its namespace."""

    def __init__(self, make_lab: Callable[[int], Lab], path: Path, stack: contextlib.ExitStack) -> None:
        self.path, self.stack = path, stack
        self.control = stack.enter_context(contextlib.closing(Namespace.new()))
        self.control.ip(f"addr add {SCHEDULER}/32 dev lo")
        options = "--host", SCHEDULER, "--port", "8786", "--dashboard-address", f"{SCHEDULER}:8787"
        self.scheduler = self.start(self.control, "scheduler", [*DASK, "scheduler", *options])
        self.a = Machine(self, "a", make_lab(3), "10.9.0.2", "if!n0", "if!n1", "if!n2")
        self.b = Machine(self, "b", make_lab(4), "10.9.0.3", "if!n0", "if!n1", "if!n3")
        self.workers = {machine.name: self.worker(machine) for machine in (self.a, self.b)}

    def start(self, namespace: Namespace, name: str, words: list[str]) -> subprocess.Popen[str]:
        with open(self.path / f"{name}.log", "w") as log, namespace:
            process = subprocess.Popen(
                words, env=ENVIRONMENT, cwd=self.path, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.stack.callback(process.communicate)
        self.stack.callback(process.kill)
        return process

    def worker(self, machine: Machine) -> subprocess.Popen[str]:
        options = ["--no-nanny", "--no-dashboard", "--nthreads", str(PAGES), "--preload", str(EXAMPLES / CRAWL)]
        options += ["--name", machine.name, "--host", machine.address, "--local-directory", str(self.path)]
        options += ["--resources", " ".join(f"{source}={PAGES}" for source in machine.sources)]
        return self.start(machine.lab.near, machine.name, [*DASK, "worker", f"tcp://{SCHEDULER}:8786", *options])

    def crawl(self, name: str, seconds: float, *urls: str) -> subprocess.Popen[str]:
        return self.start(self.control, name, command(CRAWL, f"tcp://{SCHEDULER}:8786", str(seconds), *urls))

    def log(self, name: str) -> str:
        return (self.path / f"{name}.log").read_text()

    def dashboard(self, path: str) -> str:
        with self.control, urllib.request.urlopen(f"{DASHBOARD}/{path}", timeout=10) as response:
            return response.read().decode()

    def bars(self) -> dict[str, str]:
        """Return the bars of the dashboard's progress, as a browser gets them: their names, and how much is done."""
        with self.control:
            run = [sys.executable, "-c", BROWSER, f"{DASHBOARD}/individual-progress"]
            return json.loads(subprocess.check_output(run, env=ENVIRONMENT, text=True, timeout=20))


def until(true: Callable[[], Any], cluster: Cluster) -> Any:
    """Wait for it, and return it."""
    deadline = time.monotonic() + 20
    while not (value := true()):
        if time.monotonic() > deadline:
            pytest.fail("\n".join(log.read_text() for log in cluster.path.glob("*.log")))
        time.sleep(0.05)
    return value


@pytest.fixture
def cluster(make_lab: Callable[[int], Lab], tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        cluster = Cluster(make_lab, tmp_path, stack)
        until(lambda: "Registered to:" in cluster.log("a") and "Registered to:" in cluster.log("b"), cluster)
        yield cluster


def lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    return map(json.loads, process.stdout)


def test_one_of_two_machines_is_killed_in_the_middle_and_nothing_is_lost(cluster: Cluster) -> None:
    a, b = cluster.a, cluster.b
    anywhere = [f"{SITE}/{number}" for number in range(200)]
    shared = [f"{SITE}/shared/{number}" for number in range(10)]
    waiting = cluster.crawl("waiting", 40, f"if!n2={SITE}/held")
    until(lambda: a.site.held, cluster)
    crawl = cluster.crawl("crawl", 40, *anywhere, *(f"if!n1={url}" for url in shared), f"if!n3={SITE}/b")
    until(lambda: len(a.site.held) == len(b.site.held) == PAGES, cluster)
    pages = list(itertools.islice(lines(crawl), ENOUGH + PAGES + 1))  # more than one worker can have had
    bars = cluster.bars()
    cluster.workers["a"].kill()
    b.site.let_go.set()
    pages += lines(crawl)
    assert crawl.wait(10) == 0, cluster.log("crawl")

    # Each URL has one page, also those that the dead worker had under way.
    assert Counter(page["url"] for page in pages) == dict.fromkeys([*anywhere, *shared, f"{SITE}/b"], 1)
    assert all(page["status"] == 200 and page["bytes"] == 4 for page in pages)
    workers = {page["url"].removeprefix(SITE): page["worker"] for page in pages}
    assert set(workers.values()) == {"a", "b"}
    assert {workers[path] for path in a.site.held if path != "/held"} == {"b"}
    assert set(a.site.held) - {"/held"} <= {path for path, _ in b.site.seen}
    # Each left from where its line says: the sites have seen its address, and no address came by another NIC.
    for machine in (a, b):
        nics = {f"if!{nic.name}": nic for nic in machine.lab.nics}
        its = [page for page in pages if page["worker"] == machine.name]
        assert all(page["local"] == nics[page["source"]].v4 for page in its)
        assert {page["source"] for page in its if page["url"] in anywhere} == set(machine.sources)
        assert {(page["url"].removeprefix(SITE), page["local"]) for page in its} <= set(machine.site.seen)
        ways = {(packet.nic, packet.source) for packet in machine.witness.packets() if packet.syn}
        assert ways == {(nic.name, nic.v4) for source, nic in nics.items() if source in machine.sources}
    assert all(page["source"] == "if!n1" for page in pages if page["url"] in shared)
    assert re.fullmatch(r"\d+ / 1\d\d", bars["any source"])
    assert bars["if!n2"] == "0 / 1"

    # What only the dead one could do is told soon, or waits for it to come back.
    gone = cluster.crawl("gone", 1, f"if!n2={SITE}/gone")
    (line,) = lines(gone)
    assert line == {"url": f"{SITE}/gone", "source": "if!n2", "error": "TimeoutError: nothing has come for 1 s"}
    assert gone.wait(10) == 1
    a.site.let_go.set()
    cluster.workers["a"] = cluster.worker(a)
    (line,) = lines(waiting)
    assert (line["status"], line["source"], line["worker"]) == (200, "if!n2", "a")
    assert waiting.wait(10) == 0

    for path in ("status", "individual-progress"):
        assert "<title>Dask" in cluster.dashboard(path)
    assert cluster.log("waiting") == cluster.log("gone") == ""
    cluster.scheduler.terminate()  # it closes its workers
    for name, worker in cluster.workers.items():
        assert worker.wait(10) == 0
        assert "Run preload teardown" in cluster.log(name)


def test_a_worker_joins_with_sources_only_and_closes_its_session(tmp_path: Path) -> None:
    start = [*DASK, "worker", "tcp://127.0.0.1:1", "--no-nanny", "--no-dashboard", "--death-timeout", "1"]
    start += ["--local-directory", str(tmp_path), "--preload", str(EXAMPLES / CRAWL)]
    cases = {
        "^dask_crawl: --resources: name at least one source": [],
        "^dask_crawl: --resources: .*did you mean 'if!lo'": ["--resources", "lo=4"],
        "Timed out starting worker": ["--resources", "if!lo=4"],
    }
    workers = {
        said: subprocess.Popen([*start, *options], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for said, options in cases.items()
    }
    try:
        for said, worker in workers.items():
            _, errors = worker.communicate(timeout=20)
            assert worker.returncode == 1
            assert re.search(said, errors, re.MULTILINE), errors
            assert "Unclosed" not in errors
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tcp://127.0.0.1:1", "1"], "usage: "),
        (["tcp://127.0.0.1:1", "1", "lo=http://127.0.0.1/"], "did you mean 'if!lo'"),
    ],
    ids=["usage", "source"],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], said: str) -> None:
    ended = run(CRAWL, *arguments)
    (line,) = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout) == (1, "")
    assert said in line
