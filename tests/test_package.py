"""What holds the package together: its public names, its layers, its imports, its wheel, and its papers."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module, metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from packaging.requirements import Requirement

import aiobind
import aiobind.aiohttp
import aiobind.anyio
import aiobind.dns
import aiobind.httpx
import aiobind.lab
import aiobind.metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

ROOT = Path(__file__).parent.parent
PACKAGE = Path(aiobind.__file__).parent
PUBLIC = [aiobind, aiobind.aiohttp, aiobind.anyio, aiobind.dns, aiobind.httpx, aiobind.lab, aiobind.metrics]
if util.find_spec("scrapy"):  # which the oldest aiohttp is too old for
    PUBLIC.append(import_module("aiobind.scrapy"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def paper(name: str) -> str:
    path = ROOT / name
    if not path.exists():  # an unpacked sdist has not all of them
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"there is no {name}")
    return path.read_text()


# --- the public names ---------------------------------------------------------------------------------------

#: Parameters and their defaults; what their types are is held by typing_checks.py.
API = {
    "aiobind": """
Address(ip)
Address.ip
AiobindError(errno, strerror, *, source=None, destination=None)
AiobindError.destination
AiobindError.source
Attempt(source, address, error)
Attempt.address
Attempt.error
Attempt.source
BindError(errno, strerror, *, source=None, destination=None)
BoundSource(source, interface, address, port)
BoundSource.address
BoundSource.interface
BoundSource.port
BoundSource.source
ConnectError(errno, strerror, *, source=None, destination=None, attempts=())
ConnectError.attempts
Connector(*sources, policy=None, happy_eyeballs_delay=0.25, local_ports=None, socket_options=(), dns='system', \
strict=True, borrow=False, direct=(), fast_connect=False, ttl_dns_cache=10.0, limit_per_source=0, \
limit_per_source_host=0, rate_per_source=None, rate_per_source_host=None, abort_on_link_down=False, \
sticky_prefix=False, on_event=None)
async Connector.aclose()
Connector.add(source)
Connector.as_loop(*, source=None)
async Connector.connect(host, port, *, source=None, family=0, proto=0)
async Connector.create_connection(protocol_factory, host, port, *, source=None, family=0, proto=0, flags=0, ssl=None, \
server_hostname=None, **options)
async Connector.create_datagram_endpoint(protocol_factory, local_addr=None, remote_addr=None, *, source=None, \
family=0, proto=0, flags=0, reuse_port=None, allow_broadcast=None, sock=None)
async Connector.open_connection(host, port, *, limit=65536, **options)
Connector.remove(source, *, drain=True)
Connector.report(source, *, host, ok=False, seconds=None)
Connector.stats()
Connector.use_source(source)
Event(kind, source, destination=None, error=None, seconds=None)
Event.destination
Event.error
Event.kind
Event.seconds
Event.source
Failover
Failover.order(sources, host)
Host(name)
Host.name
Interface(name, local=None)
Interface.local
Interface.name
InvalidSource(text, reason, hint='')
LeastConnections()
LeastConnections.changed(source)
LeastConnections.order(sources, host)
Policy
Policy.order(sources, host)
Prefix(network)
Prefix.network
Prefix.pick(seed=None)
Random(seed=None)
Random.order(sources, host)
ResolveError(errno, strerror, *, source=None, destination=None)
RoundRobin()
RoundRobin.order(sources, host)
Source
SourceStats(source, connections, in_use, idle, connects, failures, suspended_until, latency_p50, latency_p99, \
bytes_sent, bytes_received, ports)
SourceStats.bytes_received
SourceStats.bytes_sent
SourceStats.connections
SourceStats.connects
SourceStats.failures
SourceStats.idle
SourceStats.in_use
SourceStats.latency_p50
SourceStats.latency_p99
SourceStats.ports
SourceStats.source
SourceStats.suspended_until
SourceView
SourceView.connecting
SourceView.connections
SourceView.failures
SourceView.in_use
SourceView.source
Sticky()
Sticky.order(sources, host)
Weighted(weights)
Weighted.order(sources, host)
Weighted.weights
bound_source(connection)
async connect(host, port, *, source, family=0, proto=0, **options)
parse_source(source)
socket_factory(source, *, socket_options=())
use_source(source)
""",
    "aiobind.aiohttp": """
BoundTCPConnector(*sources, policy=None, limit_per_source=0, happy_eyeballs_delay=0.25, interleave=None, \
local_ports=None, socket_options=(), dns='system', strict=True, borrow=False, direct=(), fast_connect=False, \
limit_per_source_host=0, rate_per_source=None, rate_per_source_host=None, abort_on_link_down=False, \
sticky_prefix=False, on_event=None, use_dns_cache=True, ttl_dns_cache=10, resolver=None, **keywords)
BoundTCPConnector.add(source)
BoundTCPConnector.clear_dns_cache(host=None, port=None)
BoundTCPConnector.close(**keywords)
async BoundTCPConnector.connect(req, traces, timeout)
BoundTCPConnector.limit_per_source
BoundTCPConnector.remove(source, *, drain=True)
BoundTCPConnector.report(source, *, host, ok=False, seconds=None)
BoundTCPConnector.stats()
BoundTCPConnector.use_dns_cache
BoundTCPConnector.use_source(source)
""",
    "aiobind.anyio": """
TCPConnectable(host, port, *, source=None, connector=None)
async TCPConnectable.connect()
TCPConnectable.connector
TCPConnectable.host
TCPConnectable.port
TCPConnectable.source
async connect_tcp(remote_host, remote_port, *, source=None, connector=None, local_host=None, local_port=None, \
tls=False, ssl_context=None, tls_standard_compatible=True, tls_hostname=None, happy_eyeballs_delay=None)
""",
    "aiobind.dns": """
SourceLookup(reach, servers, *, ttl)
SourceLookup.by_source
SourceLookup.close()
async SourceLookup.find(host, *, via, family=0, flags=0)
SourceLookup.forget(host=None)
""",
    "aiobind.lab": """
Lab(nics=3)
Lab.add_target(address)
Lab.far
Lab.near
Lab.nic(name)
Lab.nics
Lab.target_v4
Lab.target_v6
Lab.witness(*, syn_only=False)
Namespace(fd)
Namespace.close()
Namespace.current()
Namespace.fileno()
Namespace.ip(*commands)
Namespace.new()
Namespace.sysctl(name, value)
Nic(name, v4, v6, link_local, far_name, gateway_v4, gateway_v6, gateway_link_local)
Nic.far_name
Nic.gateway_link_local
Nic.gateway_v4
Nic.gateway_v6
Nic.link_local
Nic.name
Nic.v4
Nic.v6
Packet(nic, source, destination, sport, dport, protocol, syn)
Packet.destination
Packet.dport
Packet.nic
Packet.protocol
Packet.source
Packet.sport
Packet.syn
Witness(near_names, namespace, *, syn_only=False)
Witness.close()
Witness.packets()
available()
isolate()
replace_file(path, text)
""",
    "aiobind.metrics": """
Collector(connector, name='')
Collector.add(connector, name)
Collector.collect()
Collector.describe()
Instruments(meter, connector, name='')
Instruments.add(connector, name)
""",
    "aiobind.httpx": """
BoundBackend(*sources, connector=None, **options)
async BoundBackend.connect_tcp(host, port, timeout=None, local_address=None, socket_options=None)
async BoundBackend.connect_unix_socket(path, timeout=None, socket_options=None)
async BoundBackend.sleep(seconds)
BoundTransport(*sources, policy=None, happy_eyeballs_delay=0.25, local_ports=None, socket_options=(), dns='system', \
strict=True, borrow=False, direct=(), fast_connect=False, ttl_dns_cache=10.0, limit_per_source=0, \
limit_per_source_host=0, rate_per_source=None, rate_per_source_host=None, abort_on_link_down=False, \
sticky_prefix=False, on_event=None, verify=True, cert=None, trust_env=True, http1=True, http2=False, limits=None, \
proxy=None, retries=0)
async BoundTransport.aclose()
BoundTransport.add(source)
async BoundTransport.handle_async_request(request)
BoundTransport.handle_request(request)
BoundTransport.remove(source, *, drain=True)
BoundTransport.report(source, *, host, ok=False, seconds=None)
BoundTransport.stats()
BoundTransport.use_source(source)
""",
    "aiobind.scrapy": """
DownloadHandler(crawler)
DownloadHandler.connector
DownloadHandler.from_crawler(crawler)
DownloadHandler.lazy
DownloadHandler.supports_per_request_bindaddress
""",
}


def is_ours(thing: object) -> bool:
    return getattr(thing, "__module__", "").partition(".")[0] == "aiobind"


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(function)
    return {name: each for name, each in signature.parameters.items() if name not in {"self", "cls", "_cls"}}


def written(name: str, thing: object) -> str:
    """Write a callable as the snapshot has it, and anything else by its name."""
    function = getattr(thing, "__func__", thing)  # of a class method
    if not inspect.isfunction(function):
        return name
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters(function).values()]
    awaited = "async " if inspect.iscoroutinefunction(function) else ""
    return f"{awaited}{name}{inspect.Signature(bare)}"


def constructor(cls: type) -> Callable[..., Any] | None:
    if getattr(cls, "_is_protocol", False):
        return None
    own = [vars(base) for base in cls.__mro__ if is_ours(base)]
    return next((names[maker] for names in own for maker in ("__init__", "__new__") if maker in names), None)


def members(cls: type) -> Iterator[tuple[str, object]]:
    # What it shares with others by a base of ours that is not public itself is its own.
    bases = [base for base in cls.__mro__ if base is cls or (is_ours(base) and not hasattr(aiobind, base.__name__))]
    for name in sorted({name for base in bases for name in (*vars(base), *inspect.get_annotations(base))}):
        if not name.startswith("_"):
            yield name, inspect.getattr_static(cls, name, None)


def api(module: ModuleType) -> Iterator[str]:
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing):
            yield written(name, constructor(thing))
            yield from (written(f"{name}.{member}", value) for member, value in members(thing))
        else:
            yield written(name, thing)


def test_public_namespace_is_all() -> None:
    public = {name for name, value in vars(aiobind).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public == set(aiobind.__all__)


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_public_api(module: ModuleType) -> None:
    assert sorted(module.__all__) == module.__all__
    assert "\n".join(api(module)) == API[module.__name__].strip()


def public_files() -> set[str]:
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" and not path.stem.startswith("_")}


def test_public_modules_are_the_public_files() -> None:
    assert {f"aiobind.{name}" for name in public_files()} | {"aiobind"} == set(API)


# --- the docstrings -----------------------------------------------------------------------------------------


def documented() -> Iterator[tuple[str, Callable[..., Any], str, bool]]:
    """Yield what the main public modules offer: name, function, docstring, and whether it is a method."""
    for module in (aiobind, aiobind.aiohttp, aiobind.anyio, aiobind.httpx):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield name, thing, thing.__doc__ or "", False
            if not inspect.isclass(thing):
                continue
            if make := constructor(thing):
                bases = [base.__doc__ or "" for base in thing.__mro__ if is_ours(base)]
                yield name, make, "\n".join(bases), False
            inherited = {name for base in thing.__mro__ if not is_ours(base) for name in vars(base)}
            for member, value in members(thing):
                if inspect.isfunction(value) and member not in inherited:
                    protocol = aiobind.Policy.order.__doc__ if member == "order" else ""
                    yield f"{name}.{member}", value, f"{value.__doc__ or ''}{protocol}", True


@pytest.mark.parametrize(("name", "function", "text", "is_method"), list(documented()))
def test_docstring_says_what_is_taken_and_raised(
    name: str, function: Callable[..., Any], text: str, is_method: bool
) -> None:
    taken = parameters(function)
    for parameter in taken:
        entry = rf"^ +\**(\w+, )*{parameter}(, \w+)*: "
        if is_method:  # which may as well name it in a sentence
            entry += rf"|\*{parameter}\*"
        assert re.search(entry, text, re.MULTILINE), parameter
    if any("str | Source" in str(parameter.annotation) for parameter in taken.values()):
        assert re.search(
            r"Raises:\n.*InvalidSource: |``Connector\(.*whose errors it raises|as in ``connect``", text, re.DOTALL
        )


# --- the layers ---------------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    """Read the table of the architecture: names of modules from the left, then words."""
    table = re.search(r"imports only rows below it::\n\n(.*?)\n\n", aiobind.__doc__ or "", re.DOTALL)
    assert table, "the table is gone from the docstring of aiobind"
    modules = {path.stem for path in PACKAGE.iterdir()}
    found: list[list[str]] = []
    for line in table[1].splitlines():
        cells = re.split(r" {3,}", line.strip())
        words = next((i for i, cell in enumerate(cells) if cell not in modules), len(cells))
        found.append(cells[:words])
    return found


def imports(path: Path) -> set[str]:
    """Return the modules that are imported when the file runs, as ``aiobind.x`` or ``x``; not for types only."""
    found: set[str] = set()
    package = ("aiobind", *path.relative_to(PACKAGE).parts[:-1])

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *([node.module] if node.module else [])))
            found.update([origin] if origin != "aiobind" else [f"aiobind.{alias.name}" for alias in node.names])
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            children: list[ast.stmt] = node.orelse
            for child in children:
                visit(child)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(path.read_text()))
    return found


def module_files(name: str) -> list[Path]:
    return sorted((PACKAGE / name).glob("*.py")) if (PACKAGE / name).is_dir() else [PACKAGE / f"{name}.py"]


def test_table_of_layers_has_each_module_once() -> None:
    found = [name for row in rows() for name in row]
    files = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(found) == sorted(files - {"__init__"})


def test_each_row_imports_only_rows_below_it() -> None:
    layers = rows()
    level = {f"aiobind.{name}": number for number, row in enumerate(layers) for name in row}
    wrong: list[str] = []
    for number, row in enumerate(layers):
        for name in row:
            for path in module_files(name):
                for imported in imports(path):
                    top = ".".join(imported.split(".")[:2])
                    inside = top == f"aiobind.{name}"
                    if imported.partition(".")[0] == "aiobind" and not inside and level.get(top, -1) <= number:
                        wrong.append(f"{path.name} imports {imported}")
    assert not wrong


# --- aiohttp's private names --------------------------------------------------------------------------------


def private_names(path: Path, *, of_self: bool = True) -> set[str]:
    """Return the private attributes that a file touches, overrides or asks for by name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(value=ast.Name(id="self")) if not of_self:
                pass
            case ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=name), *_]):
                found.add(str(name))
            case _:
                pass
    return {name for name in found if re.match(r"_[a-z]", name)} - {"_asdict", "_fields", "_make", "_replace"}


def aiohttps_private_names() -> set[str]:
    client = [Path(aiohttp.__file__).parent / f"{name}.py" for name in ("connector", "client_reqrep", "client_proto")]
    return {name for path in client for name in private_names(path)}


def test_only_the_edge_imports_aiohttp() -> None:
    importing = [path.name for path in PACKAGE.rglob("*.py") if any(re.match(r"aiohttp\b", n) for n in imports(path))]
    assert importing == ["aiohttp.py"]


def test_the_edge_lists_the_private_names_that_it_touches() -> None:
    touched = private_names(PACKAGE / "aiohttp.py") & aiohttps_private_names()
    assert touched, "this test sees nothing"
    listed = set(re.findall(r"\b_[a-z_]+\b", aiobind.aiohttp.__doc__ or ""))
    assert touched - listed == set()
    # A name that nobody touches any more is not left behind in the list.
    assert listed - private_names(PACKAGE / "aiohttp.py") - {"_PerHost"} == set()


def test_no_other_module_touches_a_private_name_of_aiohttp() -> None:
    listed = set(re.findall(r"\b_[a-z_]+\b", aiobind.aiohttp.__doc__ or ""))
    for path in PACKAGE.rglob("*.py"):
        if path.name not in {"aiohttp.py", "lab.py"}:
            assert private_names(path, of_self=False) & listed == set(), path.name


# --- the import ---------------------------------------------------------------------------------------------

#: What aiobind takes of the standard library beyond asyncio and ipaddress. The last ones come with the others.
STDLIB = {"__future__", "dataclasses", "random"} | {
    "_bisect",
    "_blake2",
    "_endian",
    "_hashlib",
    "_random",
    "_sha2",
    "_sha512",
    "bisect",
    "copy",
    "hashlib",
}


def loaded(statement: str) -> set[str]:
    program = f"import json, sys, asyncio, ipaddress; seen = set(sys.modules)\n{statement}\n"
    program += "print(json.dumps(sorted(set(sys.modules) - seen)))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    return set(json.loads(run.stdout))


def test_import_of_aiobind_takes_a_few_modules_of_the_standard_library() -> None:
    extra = {name for name in loaded("import aiobind") if name.partition(".")[0] != "aiobind"}
    assert extra - STDLIB == set()


def test_import_of_aiobind_takes_no_edge() -> None:
    assert loaded("import aiobind") & {f"aiobind.{name}" for name in public_files()} == set()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("aiohttp", {"aiohttp"}), ("anyio", {"anyio"}), ("httpx", {"anyio"}), ("lab", set()), ("metrics", set())],
)
def test_import_of_an_edge_takes_only_its_library(name: str, wanted: set[str]) -> None:
    optional = {"aiohttp", "anyio", "opentelemetry", "prometheus_client", "uvloop", "rich", "pytest"}
    assert {name.partition(".")[0] for name in loaded(f"import aiobind.{name}")} & optional == wanted


# --- the wheel and what it needs ----------------------------------------------------------------------------


def test_wheel(tmp_path: Path) -> None:
    paper("README.md")  # without it there is no wheel
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (built,) = tmp_path.glob("*.whl")
    assert built.name == f"aiobind-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(built) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (about,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "aiobind").rglob("*.py")}
    assert names == sources | {"aiobind/py.typed"}
    needed = [line for line in about.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert needed == [f"Requires-Dist: {need}" for need in PROJECT["dependencies"]]


def requirements(*groups: str) -> dict[str, Requirement]:
    """Return what the project needs, with these extras."""
    extras = PROJECT["optional-dependencies"]
    found: dict[str, Requirement] = {}
    for text in [*PROJECT["dependencies"], *(text for group in groups for text in extras[group])]:
        need = Requirement(text)
        if need.name == "aiobind":
            found |= requirements(*need.extras)
        else:
            found[need.name] = need
    return found


def lower_bound(need: Requirement) -> tuple[int, ...]:
    """Return the oldest version that is allowed; versions are compared as numbers, so that 3.12 is 3.12.0."""
    (oldest,) = (spec.version for spec in need.specifier if spec.operator in {">=", "=="})
    numbers = [int(number) for number in oldest.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def oldest() -> dict[str, Requirement]:
    lines = (ROOT / "tests/constraints-oldest.txt").read_text().splitlines()
    return {need.name: need for need in (Requirement(line) for line in lines if line and line[0] != "#")}


def test_oldest_constraints_are_the_lower_bounds() -> None:
    constraints = oldest()
    for_users = requirements("all")
    for name, need in (requirements("test") | for_users).items():
        if name in constraints or name in for_users:  # of what only tests need, the clients that aiobind is tried with
            assert lower_bound(constraints.pop(name)) == lower_bound(need), name
    if lower_bound(oldest()["aiohttp"]) != lower_bound(Requirement(f"aiohttp=={aiohttp.__version__}")):
        return  # of what the oldest aiohttp needs only that one can tell
    needs = {need.name: need for need in map(Requirement, metadata.requires("aiohttp") or ()) if not need.marker}
    for name, constraint in constraints.items():
        assert lower_bound(constraint) == lower_bound(needs[name]), name


def test_all_has_every_extra_for_users() -> None:
    for_us = {"all", "bench", "examples", "lint", "test"}
    for_users = set(PROJECT["optional-dependencies"]) - for_us
    assert requirements("all") == requirements(*for_users)


def test_python_versions_agree() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=")
    classifiers = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
    tools = PYPROJECT["tool"]
    assert classifiers[0] == oldest
    assert tools["pyright"]["pythonVersion"] == tools["mypy"]["python_version"] == oldest
    assert tools["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    makefile = (ROOT / "Makefile").read_text()
    assert f"PYTHON_OLDEST ?= python{oldest}\n" in makefile
    assert f"version_info < ({oldest.replace('.', ', ')})" in makefile


def test_installed_version_is_this_one() -> None:
    try:
        installed = metadata.version("aiobind")
    except metadata.PackageNotFoundError:
        pytest.skip("aiobind is not installed, but imported from its folder")
    assert installed == PROJECT["version"]


# --- the papers ---------------------------------------------------------------------------------------------


def test_changelog_begins_with_this_version() -> None:
    newest = re.search(r"^## (.*)$", paper("CHANGELOG.md"), re.MULTILINE)
    assert newest
    assert PROJECT["version"] in newest[1]


def test_readme_names_the_two_commands_and_the_oldest_versions() -> None:
    readme = paper("README.md")
    for text in ("make demo", "make test", PROJECT["requires-python"].removeprefix(">=")):
        assert text in readme, text


def test_contributing_names_every_dependency_and_command() -> None:
    text = paper("CONTRIBUTING.md")
    assert {name for name in requirements(*PROJECT["optional-dependencies"]) if f"`{name}`" not in text} == set()
    commands = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert commands
    assert {name for name in commands[1].split() if f"`make {name}" not in text} - {"help"} == set()


def test_contributing_has_the_layers_of_the_package() -> None:
    text = paper("CONTRIBUTING.md")
    assert {name for row in rows() for name in row if f"`{name}" not in text and f"{name}.py" not in text} == set()


#: Where this was written, and the hosts of registries, are nobody's business.
FORBIDDEN = re.compile(
    r"(?<![\w.~-])/(root|work|home|Users)/"  # somebody's folders
    r"|/tmp/\w+/\w"
    r"|pypi\.org|python[h]osted|registry\."
    r"|\bissues? #?\d",
    re.IGNORECASE,
)


def texts() -> Iterator[tuple[str, str]]:
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name for name in folders if name == ".ci" or (name[0] not in "._" and name not in {"dist", "build"})
        ]
        for path in (Path(folder, name) for name in files):
            with contextlib.suppress(UnicodeDecodeError):
                yield path.relative_to(ROOT).as_posix(), path.read_text()


def test_no_text_has_what_belongs_to_one_machine() -> None:
    found = [f"{name}: {hit[0]}" for name, text in texts() for hit in FORBIDDEN.finditer(text)]
    assert not found
