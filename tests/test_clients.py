"""The table of clients: each row of ``clients.py``, each column, each loop is one test, judged from the far side.

The table is printed at the end of the run. All rows share one lab, and each real server is started once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import os
import socket
import time
from collections import defaultdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import asyncpg
import clients
import clients_edges
import clients_services
import nats.aio.client
import psycopg
import pytest
import redis.asyncio
import servers
import sniffio
from clients import COLUMNS, Client
from conftest import _blockbuster, _need_lab
from dns_server import DnsServer
from nats.aio.transport import TcpTransport
from redis.asyncio.connection import AbstractConnection
from servers import NAME

import aiobind
from aiobind.lab import Lab, replace_file

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aiobind.lab import Packet

ROWS = (*clients.ROWS, *clients_edges.ROWS, *clients_services.ROWS)
DNS, SYSTEM = "203.0.113.53", "203.0.113.54"
#: on the link of n1, and nobody's
BLACK_HOLE = "198.18.1.99"
#: where the target accepts, and says nothing
SILENT = 7


class Cell(NamedTuple):
    client: Client
    column: str
    loop: str

    def __str__(self) -> str:
        return "-".join(map(str, self))


CELLS = [Cell(client, column, loop) for client in ROWS for column in COLUMNS for loop in client.loops]
BY_NAME = {str(cell): cell for cell in CELLS}


# --- the stage ---------------------------------------------------------------------------------------------------


class Stage:
    """A lab, its witness, and the servers of the rows that are going to be tested."""

    def __init__(self, lab: Lab, ports: dict[object, int | BaseException]) -> None:
        self.lab = lab
        self.host = lab.target_v4
        self._ports = ports
        self._witness = lab.witness()
        self._packets: list[Packet] = []

    def port(self, server: object) -> int:
        """Return its port, or raise why it does not run."""
        port = self._ports[server]
        if isinstance(port, BaseException):
            raise port
        return port

    def begin(self) -> None:
        """Forget what came so far."""
        self._witness.packets()
        self._packets.clear()

    def queries(self) -> list[Packet]:
        """Return the packets to name servers."""
        self._packets += self._witness.packets()
        return [packet for packet in self._packets if packet.dport == 53]

    def seen(self, port: int) -> list[Packet]:
        """Return the packets to this port, of connections that have begun meanwhile: others may be closing yet."""
        self._packets += self._witness.packets()
        packets = [packet for packet in self._packets if packet.dport == port]
        begun = {packet.sport for packet in packets if packet.syn or packet.protocol == "udp"}
        return [packet for packet in packets if packet.sport in begun]

    async def cut(self, port: int) -> None:
        """Have the kernel reset what the server on this port has open (ss(8))."""
        far = f"--net=/proc/{os.getpid()}/fd/{self.lab.far.fileno()}"
        command = ["nsenter", far, "ss", "-K", "-Htn", "state", "established", "sport", "=", str(port)]
        done = await anyio.run_process(command)
        if not done.stdout:
            reason = "ss -K cut nothing: no connection is open, or the kernel has no CONFIG_INET_DIAG_DESTROY"
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    _need_lab()
    chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    request.config.pluginmanager.register(Table())
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(3))
        for address in (DNS, SYSTEM):
            lab.add_target(address)
        lab.near.ip(f"neigh add {BLACK_HOLE} lladdr 02:00:00:00:00:99 dev n1")
        files = {
            "resolv.conf": f"nameserver {SYSTEM}\n",
            "hosts": "127.0.0.1 localhost\n",
            "nsswitch.conf": "hosts: files dns\n",
        }
        for name, text in files.items():
            stack.enter_context(replace_file(f"/etc/{name}", text))
        dns = stack.enter_context(DnsServer(DNS, SYSTEM, namespace=lab.far))
        dns.add(NAME, lab.target_v4)
        wanted = [params["cell"].client.server if "cell" in params else params.get("server") for params in chosen]
        ports: dict[object, int | BaseException] = {}
        for server in filter(callable, dict.fromkeys(wanted)):
            folder = tmp_path_factory.mktemp(server.__name__)
            try:
                ports[server] = stack.enter_context(server(lab, folder))
            except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
                ports[server] = error  # of its own rows
        yield Stage(lab, ports)


class Table:
    """A plugin of pytest that prints what came of the cells."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = defaultdict(dict)  # by client and column, by loop

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = BY_NAME.get(report.nodeid.partition("[")[2].removesuffix("]"))
        if cell is None:
            return
        outcomes = self.cells[f"{cell.client}-{cell.column}"]
        if report.failed:
            outcomes[cell.loop] = "FAILED"
        elif report.skipped and isinstance(report.longrepr, tuple):
            outcomes[cell.loop] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.when == "call":
            outcomes[cell.loop] = "ok"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.cells:
            return
        terminalreporter.section("clients")
        for line in self.lines():
            terminalreporter.line(line)

    def lines(self) -> Iterator[str]:
        reasons: dict[str, int] = {}
        yield f"{'':<28}{''.join(f'{column:<11}' for column in COLUMNS)}"
        for client in ROWS:
            if not any(f"{client}-{column}" in self.cells for column in COLUMNS):
                continue
            row = ""
            for column in COLUMNS:
                outcomes = self.cells.get(f"{client}-{column}", {})
                failed = [loop for loop, outcome in outcomes.items() if outcome == "FAILED"]
                why = [outcome for outcome in outcomes.values() if outcome not in ("ok", "FAILED")]
                text = "ok" if outcomes else "not run"
                if failed:
                    text = f"FAILED{'' if len(failed) == len(outcomes) else ' on ' + ' '.join(failed)} "
                elif why:
                    text = f"[{reasons.setdefault(why[0], len(reasons) + 1)}]"
                row += f"{text:<11}"
            release = f" {version(client.package)}" if client.package else ""
            yield f"{client.name + release:<28}{row}on {', '.join(client.loops)}"
        yield ""
        yield from (f"{column:<11}{meaning}" for column, meaning in COLUMNS.items())
        yield from (f"[{number}]        {reason}" for reason, number in reasons.items())


# --- the columns -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def connector_of(client: Client, *sources: str, **options: Any) -> AsyncIterator[Any]:
    """Make a connector; at the end nothing of it may be open."""
    connector = client.connector(*sources, **options)
    try:
        yield connector
    finally:
        for _ in range(100):  # transports close in the next turn of the loop
            if not (left := [each for each in connector.stats() if each.connections]):
                break
            await anyio.sleep(0.01)
        closing = (connector.aclose if hasattr(connector, "aclose") else connector.close)()
        if inspect.isawaitable(closing):
            await closing
    assert not left


def came_by(packets: list[Packet]) -> set[tuple[str, str]]:
    return {(packet.nic, packet.source) for packet in packets}


async def source(client: Client, stage: Stage, port: int) -> None:
    async with connector_of(client, "198.18.2.2") as connector, client.use(connector, stage.host, port) as talk:
        await talk()
        assert sum(each.connections for each in connector.stats()) >= 1
    assert {packet.source for packet in stage.seen(port)} == {"198.18.2.2"}


async def egress(client: Client, stage: Stage, port: int) -> None:
    for named, nic, address in (("if!n1", "n1", "198.18.1.2"), ("ifhost!n2!198.18.2.2", "n2", "198.18.2.2")):
        stage.begin()
        async with connector_of(client, named) as connector, client.use(connector, stage.host, port) as talk:
            await talk()
        assert came_by(stage.seen(port)) == {(nic, address)}


async def reconnect(client: Client, stage: Stage, port: int) -> None:
    async with connector_of(client, "if!n1") as connector, client.use(connector, stage.host, port) as talk:
        await talk()
        await stage.cut(port)
        deadline = time.monotonic() + 20
        while True:
            try:
                await talk()
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
            await anyio.sleep(0.05)
    packets = stage.seen(port)
    assert came_by(packets) == {("n1", "198.18.1.2")}
    assert len({packet.sport for packet in packets if packet.syn}) >= 2


async def missing(client: Client, stage: Stage, port: int) -> None:
    async with connector_of(client, "if!n9") as connector:
        with pytest.raises(client.error) as caught:
            async with client.use(connector, stage.host, port) as talk:
                await talk()
    ours = [error for error in chain(caught.value) if isinstance(error, aiobind.BindError)]
    assert ours, "our error is not in its chain"
    assert ours[0].errno == errno.ENODEV
    assert not stage.seen(port)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    waiting, told = [error], set[int]()
    while waiting:
        error = waiting.pop()
        if error is not None and id(error) not in told:
            told.add(id(error))
            yield error
            context = None if error.__suppress_context__ else error.__context__  # `from None` is no chain
            waiting += [*getattr(error, "exceptions", ()), context, error.__cause__]


async def cancel(client: Client, stage: Stage, port: int) -> None:
    await _cancelled(client, stage, BLACK_HOLE, port, lambda packet: packet.syn or packet.protocol == "udp")


async def silent(client: Client, stage: Stage, port: int) -> None:
    with stage.lab.far:
        listener = socket.create_server((stage.host, SILENT))
    with listener:
        await _cancelled(client, stage, stage.host, SILENT, lambda packet: not packet.syn)


async def _cancelled(client: Client, stage: Stage, host: str, port: int, when: Callable[[Packet], bool]) -> None:
    """Cancel it just after a packet that tells how far it has come."""
    async with connector_of(client, "if!n1") as connector:

        async def connect() -> None:
            async with client.use(connector, host, port) as talk:
                await talk()

        async def so_far() -> None:
            with anyio.fail_after(10):
                while not any(map(when, stage.seen(port))):
                    await anyio.sleep(0.01)
            await anyio.sleep(0.02)  # it says what it has to say

        if sniffio.current_async_library() == "trio":
            async with anyio.create_task_group() as group:
                group.start_soon(connect)
                await so_far()
                group.cancel_scope.cancel()
        else:  # once, as asyncio does it; the scopes of anyio repeat it
            task = asyncio.create_task(connect())
            await so_far()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def dns(client: Client, stage: Stage, port: int) -> None:
    async with connector_of(client, "if!n1", dns=(DNS,)) as connector, client.use(connector, NAME, port) as talk:
        await talk()
    questions = {(packet.nic, packet.source, packet.destination) for packet in stage.queries()}
    assert questions == {("n1", "198.18.1.2", DNS)}
    assert came_by(stage.seen(port)) == {("n1", "198.18.1.2")}


CHECKS = {check.__name__: check for check in (source, egress, reconnect, missing, cancel, silent, dns)}


def test_each_column_has_its_check() -> None:
    assert list(CHECKS) == list(COLUMNS)
    assert len({client.name for client in ROWS}) == len(ROWS)
    for client in ROWS:
        assert client.reasons.keys() <= COLUMNS.keys()


# --- the cells ---------------------------------------------------------------------------------------------------


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    given = request.node.callspec.params
    loop = given["cell"].loop if "cell" in given else given["loop"]
    return ("trio", {}) if loop == "trio" else ("asyncio", {"use_uvloop": loop == "uvloop"})


_OURS = _blockbuster("aiobind")


@pytest.fixture(autouse=True)
def no_blocking(no_leaks: None) -> Iterator[None]:
    """Raise where aiobind would block the loop. Clients do read files on it: their version, a password."""
    _OURS.activate()
    yield
    _OURS.deactivate()


@pytest.mark.anyio
@pytest.mark.parametrize("cell", CELLS, ids=str)
async def test_cell(cell: Cell, stage: Stage) -> None:
    if reason := cell.client.reasons.get(cell.column):
        pytest.skip(reason)
    stage.begin()
    with anyio.fail_after(40):
        await CHECKS[cell.column](cell.client, stage, stage.port(cell.client.server))


# --- beyond the columns --------------------------------------------------------------------------------------------

SLEEP = "SELECT pg_sleep(50)"


@pytest.mark.anyio
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("server", [servers.postgres], ids=[""])
@pytest.mark.parametrize("by", ["asyncpg", "psycopg"])
async def test_a_query_is_cancelled_from_the_same_source(by: str, server: Any, loop: str, stage: Stage) -> None:
    """PostgreSQL is told so by another connection."""
    port = stage.port(server)
    stage.begin()
    async with aiobind.Connector("if!n1") as connector:
        if by == "asyncpg":
            asked = await asyncpg.connect(host=stage.host, port=port, user="postgres", loop=connector.as_loop())
            with pytest.raises(TimeoutError):
                await asked.execute(SLEEP, timeout=0.2)
            await asked.close()
        else:
            async with (
                clients.libpq(connector, stage.host, port) as options,
                await psycopg.AsyncConnection.connect(**options) as connection,
            ):
                task = asyncio.create_task(connection.execute(SLEEP))
                await asyncio.sleep(0.2)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(task, 20)
                await connection.rollback()
    packets = stage.seen(port)
    assert came_by(packets) == {("n1", "198.18.1.2")}
    assert len({packet.sport for packet in packets}) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("server", [servers.postgres], ids=[""])
async def test_a_relay_leaves_tls_to_the_client_and_the_server(server: Any, loop: str, stage: Stage) -> None:
    """Whoever answers by another name than the client was told is found out."""
    port = stage.port(server)
    async with (
        aiobind.Connector("if!n1") as connector,
        clients.libpq(connector, stage.host, port, tls=True) as options,
    ):
        with pytest.raises(psycopg.OperationalError, match="does not match host name"):
            await psycopg.AsyncConnection.connect(**{**options, "host": "other.lab.test"})


def test_the_private_names_that_the_hooks_touch() -> None:
    """What is no hook of the client's own; the table shows that they do what they are taken for."""
    streams = {"_io_reader", "_io_writer", "_bare_io_reader", "_bare_io_writer"}
    assert vars(TcpTransport()) == dict.fromkeys(streams)
    assert vars(nats.aio.client.Client())["_transport"] is None
    connection = redis.asyncio.Connection(host="host", port=1)
    assert AbstractConnection._connect.__isabstractmethod__
    assert connection._connection_arguments() == {"host": "host", "port": 1}
    assert (connection._reader, connection._writer) == (None, None)


# --- what the columns would notice -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _careless(connector: aiobind.Connector, host: str, port: int) -> AsyncIterator[clients.Talk]:
    """Connect by itself, whatever the connector is for; and once the far side has cut it, once more."""
    writers: list[asyncio.StreamWriter] = []

    async def connect() -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection(host, port)
        writers.append(writer)
        return reader

    reader = await connect()

    async def talk() -> None:
        nonlocal reader
        try:
            writers[-1].write(b"PING\r\n")
            await reader.readuntil(b"\n")
        except (OSError, EOFError):
            reader = await connect()
            raise

    try:
        yield talk
    finally:
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "cell",
    [
        Cell(Client("", "", servers.redis, _careless, OSError), column, "asyncio")
        for column in COLUMNS
        if column not in ("cancel", "silent")
    ],
    ids=lambda cell: cell.column,
)
async def test_a_client_that_goes_its_own_way_is_found_out(cell: Cell, stage: Stage) -> None:
    stage.begin()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        await CHECKS[cell.column](cell.client, stage, stage.port(cell.client.server))
