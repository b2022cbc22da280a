"""Law: whatever is asked of DNS for a connection leaves by a socket of its source, or is not asked.

The name of a ``host!`` source, which has no address before, is asked for by the way that the routing table names.

    files      /etc/hosts and /etc/resolv.conf, read in a thread, and again when they have changed
    names      the search list and ndots of resolv.conf(5); localhost is never asked for (RFC 6761 section 6.3)
    ask        A and AAAA at the same time; dnspython speaks to the servers, by UDP and by TCP when that was truncated
    wait       RFC 8305 section 3: once there is an address, the other family has 50 ms to be in the same answer
    keep       for each source on its own, as long as the answer says; failures are not kept

dnspython, because it takes sockets that others made: each query has its own, made for the source as every connection's
is. Needs the extra: ``pip install "aiobind[dns]"``.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import os
import re
import socket
import time
from collections import OrderedDict
from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar, cast

try:
    import dns.asyncbackend
    import dns.asyncquery
    import dns.asyncresolver
    import dns.exception
    import dns.name
    import dns.nameserver
    import dns.rdata
    import dns.rdataclass
    import dns.rdatatype
    import dns.resolver
except ImportError as error:
    raise ImportError('aiobind.dns needs dnspython 2.6.1 or later: pip install "aiobind[dns]"') from error

from ._binding import Target
from ._errors import BindError, ResolveError, is_sources_fault, quoted
from ._resolve import Resolved, in_thread, literal
from ._sockets import is_own
from ._sources import Interface

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dns.message import Message, QueryMessage

    from ._dial import Reach
    from ._sockets import BoundSocket
    from ._sources import Source

__all__ = ["SourceLookup"]

#: Names whose last answer is kept.
MAX_CACHED = 1000
#: RFC 8305 section 3, the Resolution Delay in seconds.
RESOLUTION_DELAY = 0.05
#: Top-level domains that nobody may ask for: RFC 7686 section 2, RFC 6761 section 6.4.
_NEVER_ASKED = {b"onion", b"invalid"}
#: AAAA first: `_race.interleave` begins with the family that comes first (RFC 8305 section 4).
_TYPES = {socket.AF_INET6: dns.rdatatype.AAAA, socket.AF_INET: dns.rdatatype.A}
_NO_DATA: int = getattr(socket, "EAI_NODATA", socket.EAI_NONAME)
_LABEL = re.compile(rb"[A-Za-z0-9_-]+")

# dnspython imports what it reads answers with when it first meets it: here, and not on the loop.
_BACKEND = dns.asyncbackend.get_backend("asyncio")  # only its sleep is used
_load: Any = dns.rdata.get_rdata_class
for _type in ("A", "AAAA", "CNAME", "DNAME", "NS", "OPT", "RRSIG", "SOA"):
    _load(dns.rdataclass.IN, dns.rdatatype.from_text(_type))

_T = TypeVar("_T")
_Key: TypeAlias = "tuple[Source | None, str, int]"
_Outcome: TypeAlias = "tuple[Resolved, ...] | OSError"


# ── files ──


class _File(Generic[_T]):
    """What a file says. A missing file is an empty one."""

    def __init__(self, path: str, parse: Callable[[str], _T]) -> None:
        self._path, self._parse = path, parse
        self._read: tuple[object, _T] | None = None

    def content(self) -> _T:
        """Return what it says, read anew when it has changed. Blocks."""
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                if self._read is None or self._read[0] != state:
                    self._read = state, self._parse(file.read().decode("utf-8", "replace"))
        except OSError:
            self._read = None, self._parse("")
        return self._read[1]


class _Config(NamedTuple):
    """What resolv.conf(5) says; *timeout* is for one try, and there are *attempts* tries of each server."""

    servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    ndots: int = 1
    timeout: float = 2.0  # dnspython's; the system's is 5
    attempts: int = 2
    rotate: bool = False
    edns: bool = False
    tcp: bool = False


#: The numbers in resolv.conf, each with its bounds, and the words there.
_NUMBERS = {"ndots": (0, 15), "timeout": (1, 30), "attempts": (1, 5)}
_WORDS = {"rotate": "rotate", "edns0": "edns", "use-vc": "tcp"}


def _resolv_conf(text: str) -> _Config:
    servers: list[str] = []
    search = [domain for domain in (socket.gethostname().partition(".")[2],) if domain]
    options: dict[str, Any] = {}
    for line in text.splitlines():
        match line.split():
            case ["nameserver", server, *_] if _is_ip(server):
                servers.append(server)
            case ["domain", domain, *_]:
                search = [domain]
            case ["search", *domains]:
                search = domains
            case ["options", *words]:
                for word, _, value in (word.partition(":") for word in words):
                    if word in _WORDS:
                        options[_WORDS[word]] = True
                    elif word in _NUMBERS and value.isdecimal():
                        low, high = _NUMBERS[word]
                        options[word] = min(max(int(value), low), high)
    return _Config(tuple(servers), tuple(search), **options)


def _hosts(text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if _is_ip(address):
            for name in names:
                known = name.lower().rstrip(".")
                found[known] = (*found.get(known, ()), address)
    return found


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


_HOSTS = _File("/etc/hosts", _hosts)
_RESOLV_CONF = _File("/etc/resolv.conf", _resolv_conf)


# ── names ──


def _name(host: str) -> dns.name.Name:
    """Return the name that *host* is, absolute when it ends with a dot."""
    try:
        if len(host) > 254:  # RFC 1035 section 2.3.4, and the dot
            raise ValueError("it is too long")
        if "\\" in host:  # from_text takes "\\097" for "a" (RFC 1035 section 5.1); nobody else does
            raise ValueError("it holds what no host name does")
        name = dns.name.from_text(host, None)
        labels = _labels(name)
        if not labels or not all(map(_LABEL.fullmatch, labels)):
            raise ValueError("it holds what no host name does")
    except (dns.exception.DNSException, ValueError) as error:  # UnicodeError is one: no DNS name can be made of it
        raise socket.gaierror(socket.EAI_NONAME, f"not a host name: {quoted(host)}: {error}") from None
    if labels[-1].lower() in _NEVER_ASKED:
        raise socket.gaierror(socket.EAI_NONAME, f"no name under .{labels[-1].decode()} may be asked of DNS")
    return name


def _labels(name: dns.name.Name) -> list[bytes]:
    return [label for label in name.labels if label]


def _candidates(name: dns.name.Name, config: _Config) -> list[dns.name.Name]:
    """Return the absolute names to ask for, in the order of resolv.conf(5)."""
    if name.is_absolute():
        return [name]
    found: list[dns.name.Name] = []
    for domain in config.search:
        with suppress(dns.exception.DNSException, UnicodeError):  # the whole is too long; or it is no domain
            found.append(name + dns.name.from_text(domain))
    found.insert(0 if len(name) > config.ndots else len(found), name + dns.name.root)
    return list(dict.fromkeys(found))


def _known(name: dns.name.Name, family: int, hosts: dict[str, tuple[str, ...]]) -> tuple[Resolved, ...]:
    """Return the addresses of *name* that nobody need be asked for."""
    known = hosts.get(name.to_text(omit_final_dot=True).lower(), ())
    found = _of_family(known, family)
    if not found and _labels(name)[-1].lower() == b"localhost":
        return _of_family(("::1", "127.0.0.1"), family)
    return found


def _of_family(addresses: Sequence[str], family: int) -> tuple[Resolved, ...]:
    found: dict[Resolved, None] = {}
    for address in addresses:
        with suppress(OSError):  # its zone is no interface of this host
            if resolved := literal(address):
                found[resolved] = None
    version = {socket.AF_INET: 4, socket.AF_INET6: 6}.get(socket.AddressFamily(family))
    return tuple(resolved for resolved in found if version in (None, resolved.ip.version))


# ── ask ──


class _Socket:
    """A connected socket as dnspython uses one, by datagrams or as a stream. The whole query has one timeout."""

    def __init__(self, sock: BoundSocket) -> None:
        self.family, self.type = sock.family, sock.type
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._peer: Any = None

    async def sendto(self, what: bytes, destination: Any, timeout: float | None) -> int:
        self._peer = destination
        await self._loop.sock_sendall(self._sock, what)
        return len(what)

    async def recvfrom(self, size: int, timeout: float | None) -> tuple[bytes, Any]:
        return await self._loop.sock_recv(self._sock, size), self._peer  # from nobody else: it is connected

    async def sendall(self, what: bytes, timeout: float | None) -> None:
        await self._loop.sock_sendall(self._sock, what)

    async def recv(self, size: int, timeout: float | None) -> bytes:
        return await self._loop.sock_recv(self._sock, size)

    async def getpeername(self) -> Any:
        return self._sock.getpeername()


class _Server(dns.nameserver.Nameserver):
    """A server, asked from a source."""

    def __init__(self, address: str, reach: Reach, via: Source | None, *, named: bool) -> None:
        self.address = address
        self._reach, self._via, self._named = reach, via, named

    def __str__(self) -> str:
        return self.address

    def is_always_max_size(self) -> bool:
        return False

    def answer_nameserver(self) -> str:
        return self.address

    def answer_port(self) -> int:
        return 53

    async def async_query(  # noqa: PLR0917 - dnspython's
        self,
        request: QueryMessage,
        timeout: float,
        source: str | None,
        source_port: int,
        max_size: bool,
        backend: Any,
        one_rr_per_rrset: bool = False,
        ignore_trailing: bool = False,
    ) -> Message:
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                with await self._connected(socket.SOCK_STREAM if max_size else socket.SOCK_DGRAM) as sock:
                    where, ours = sock.getpeername()[0].partition("%")[0], cast("Any", _Socket(sock))
                    if max_size:
                        return await dns.asyncquery.tcp(request, where, sock=ours)
                    return await dns.asyncquery.udp(
                        request, where, sock=ours, raise_on_truncation=True, ignore_errors=True
                    )
        except TimeoutError:
            if limit.expired():
                raise dns.exception.Timeout from None
            raise  # connect(2): ETIMEDOUT

    async def _connected(self, kind: int) -> BoundSocket:
        found = literal(self.address)
        assert found is not None
        target = Target.of(found.ip, 53, found.scope_id)
        try:
            sock = await self._reach(self._via, target, kind)
        except BindError as error:
            if target.reach != "loopback" or error.errno != errno.ENETUNREACH:
                raise
            raise BindError(errno.ENETUNREACH, f"{error.strerror}; {self._advice()}") from None
        if self._via is not None and not self._named and is_own(target):
            local = sock.getsockname()[0]
            if not ip_address(local).is_loopback:
                sock.close()
                raise BindError(errno.ENETUNREACH, f"it is on this host itself; {self._advice()}")
        return sock

    def _advice(self) -> str:
        link = f" {self._via.name}" if isinstance(self._via, Interface) else ""
        return (
            f"a server here (the stub of systemd-resolved?) asks the world by sockets of its own, not from {self._via}:"
            f" name the servers of the link in dns=(...), as 'resolvectl dns{link}' lists them"
        )


class _Answer(NamedTuple):
    """What the servers say of a name: its addresses of some type, and how many seconds that holds."""

    found: tuple[Resolved, ...]
    ttl: float
    exists: bool = True


async def _ask(resolver: dns.asyncresolver.Resolver, name: dns.name.Name, kind: Any, tcp: bool) -> _Answer | OSError:
    try:
        said = await resolver.resolve(name, kind, tcp=tcp, raise_on_no_answer=False, search=False, backend=_BACKEND)
    except dns.resolver.NXDOMAIN:
        return _Answer((), 0, exists=False)
    except (dns.resolver.NoNameservers, dns.resolver.LifetimeTimeout) as error:
        return _failure(error.kwargs["errors"])
    except Exception as error:  # somebody waits for it
        return socket.gaierror(socket.EAI_FAIL, _reason(error))
    # The lowest TTL of the CNAME chain; for an empty answer that of the SOA record (RFC 2308 section 5).
    return _Answer(tuple(Resolved(ip_address(rdata.address), 0) for rdata in said), said.chaining_result.minimum_ttl)


def _failure(errors: Sequence[tuple[Any, ...]]) -> OSError:
    """Return the one error of all servers, of each the last; it is the source's when it is to blame for all."""
    last: dict[str, Any] = {server: error for server, _, _, error, _ in errors}
    reasons = "; ".join(f"{server}: {_reason(error)}" for server, error in last.items())
    faults = [error for error in last.values() if isinstance(error, OSError) and _is_sources(error)]
    if not faults or len(faults) < len(last):
        return socket.gaierror(socket.EAI_AGAIN, f"no DNS server has answered: {reasons or 'there was no time'}")
    kind = ResolveError if isinstance(faults[0], ResolveError) else BindError
    return kind(faults[0].errno or errno.EINVAL, f"no DNS server can be asked: {reasons}")


def _is_sources(error: OSError) -> bool:
    return isinstance(error, ResolveError) or is_sources_fault(error)


def _reason(error: object) -> str:
    if isinstance(error, str):
        return error  # a response code, for example SERVFAIL
    if isinstance(error, dns.exception.Timeout):
        return "no answer"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"


# ── wait, keep ──


class _UnderWay:
    """A look-up, those who wait for it, and what they will be told."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.outcome: asyncio.Future[_Outcome] = loop.create_future()
        self.waiting = 0
        self.task: asyncio.Task[None]

    def tell(self, outcome: _Outcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class _Kept(NamedTuple):
    found: tuple[Resolved, ...]
    until: float


class SourceLookup:
    """Asks DNS servers for the addresses of names, from the source that is going to connect.

    Args:
        reach: makes the sockets.
        servers: the addresses of the servers; None: those of ``/etc/resolv.conf``. Its search list and its options
            (ndots, timeout, attempts, rotate, edns0, use-vc) are heeded in either case.
        ttl: the longest time in seconds for which an answer is kept; None: as long as the answer itself says; 0: not
            at all.

    Raises:
        ValueError: a server is not a literal address, or there is none.
    """

    by_source = True

    def __init__(self, reach: Reach, servers: Sequence[str] | None, *, ttl: float | None) -> None:
        if servers is not None:
            if not servers:
                raise ValueError(
                    "dns=() names no server: give the addresses of some, or 'source' for those of the system"
                )
            for server in servers:
                if not isinstance(server, str) or not _is_ip(server):  # pyright: ignore[reportUnnecessaryIsInstance]
                    raise ValueError(
                        f"a DNS server is given by its address as a text, and {quoted(str(server))} is none"
                    )
            servers = tuple(servers)
        self._reach = reach
        self._servers = servers
        self._ttl = ttl
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._under_way: dict[_Key, _UnderWay] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def find(self, host: str, *, via: Source | None, family: int = 0, flags: int = 0) -> tuple[Resolved, ...]:
        """Return the addresses of *host*, IPv6 first.

        Args:
            host: a name.
            via: the source that asks; None leaves the way to the routing table.
            family: ``AF_INET``, ``AF_INET6``, or 0 for both: what is asked for.
            flags: ``AI_*`` flags of getaddrinfo(3), of which only ``AI_NUMERICHOST`` has a meaning here.

        Raises:
            BindError: no server can be asked from this source.
            ResolveError: the source's own name could not be resolved.
            socket.gaierror: EAI_NONAME, there is no such name; EAI_NODATA (where the system has it), it has no
                address; EAI_AGAIN, no server has answered; EAI_FAMILY.
            RuntimeError: the look-up is closed.
        """
        if self._closed:
            raise RuntimeError("the connector is closed")
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, f"{quoted(host)} is not an address, and no name may be looked up")
        if family not in (0, *_TYPES):
            raise socket.gaierror(socket.EAI_FAMILY, f"names have addresses of the Internet, not of {family!r}")
        name = _name(host)
        key = (via, host.lower(), family)
        kept = self._kept.get(key)
        if kept is not None and time.monotonic() < kept.until:
            self._kept.move_to_end(key)
            return kept.found
        under_way = self._under_way.get(key) or self._start(key, name)
        under_way.waiting += 1
        try:
            # Shielded: it belongs to all who wait for it, and a cancelled one must not take it from the others.
            outcome = await asyncio.shield(under_way.outcome)
        finally:
            under_way.waiting -= 1
            if not under_way.waiting and not under_way.outcome.done():
                self._end(key, under_way)
        if isinstance(outcome, OSError):
            raise copy.copy(outcome)  # each of those who wait raises an error of its own
        return outcome

    def forget(self, host: str | None = None) -> None:
        """Drop the answers that are kept, of *host* or of all; those that are under way are told, and not kept."""
        entries: tuple[dict[_Key, Any], ...] = (self._kept, self._under_way)
        for entry in entries:
            for key in [key for key in entry if host is None or key[1] == host.lower()]:
                del entry[key]

    def close(self) -> None:
        """End what is under way; those who wait for it are told so."""
        self._closed = True
        self.forget()
        for task in self._tasks:
            task.cancel()

    def _start(self, key: _Key, name: dns.name.Name) -> _UnderWay:
        loop = asyncio.get_running_loop()
        under_way = self._under_way[key] = _UnderWay(loop)
        under_way.task = task = loop.create_task(self._run(key, name, under_way))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return under_way

    def _end(self, key: _Key, under_way: _UnderWay) -> None:
        if self._under_way.get(key) is under_way:
            del self._under_way[key]
        under_way.task.cancel()

    async def _run(self, key: _Key, name: dns.name.Name, under_way: _UnderWay) -> None:
        try:
            await self._look_up(key, name, under_way)
        except OSError as error:
            under_way.tell(error.with_traceback(None))
        except Exception as error:  # somebody waits for it
            under_way.tell(socket.gaierror(socket.EAI_FAIL, _reason(error)))
        finally:
            under_way.tell(socket.gaierror(socket.EAI_AGAIN, "the connector was closed during the look-up"))
            if self._under_way.get(key) is under_way:
                del self._under_way[key]

    async def _look_up(self, key: _Key, name: dns.name.Name, under_way: _UnderWay) -> None:
        via, _, family = key
        try:
            hosts, config = await in_thread(lambda: (_HOSTS.content(), _RESOLV_CONF.content()))
        except RuntimeError as error:  # no thread can be started
            raise socket.gaierror(socket.EAI_AGAIN, str(error)) from None
        if known := _known(name, family, hosts):
            under_way.tell(known)
            return
        resolver = self._resolver(config, via)
        exists = False
        for candidate in _candidates(name, config):
            asking = [
                asyncio.create_task(_ask(resolver, candidate, kind, config.tcp))
                for asked, kind in _TYPES.items()
                if family in (0, asked)
            ]
            try:
                pending = await _first_answer(asking)
                answers = _answers(asking)
                if any(answer.found for answer in answers):
                    kept = self._keep(key, under_way, answers)
                    if kept and pending:  # the other family arrives for those who ask later
                        await asyncio.wait(pending)
                        if self._kept.get(key) is kept:
                            joined = self._joined(_answers(asking))
                            # What came first has aged meanwhile.
                            self._kept[key] = joined._replace(until=min(kept.until, joined.until))
                    return
                for task in asking:
                    if isinstance(result := task.result(), OSError):
                        raise result
            finally:
                for task in asking:
                    task.cancel()
            exists = exists or any(answer.exists for answer in answers)
        says = f"(asked: {', '.join(map(str, resolver.nameservers))})"
        if exists:
            raise socket.gaierror(_NO_DATA, f"the name has no address {says}")
        raise socket.gaierror(socket.EAI_NONAME, f"there is no such name {says}")

    def _resolver(self, config: _Config, via: Source | None) -> dns.asyncresolver.Resolver:
        servers = config.servers if self._servers is None else self._servers
        if not servers:
            raise socket.gaierror(
                socket.EAI_AGAIN, "/etc/resolv.conf names no server: name the servers to ask in dns=(...)"
            )
        named = self._servers is not None
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers = [_Server(server, self._reach, via, named=named) for server in servers]
        resolver.timeout = config.timeout
        resolver.lifetime = config.timeout * config.attempts * len(servers)
        resolver.rotate = config.rotate
        if config.edns:
            resolver.use_edns(payload=1232)
        return resolver

    def _keep(self, key: _Key, under_way: _UnderWay, answers: Sequence[_Answer]) -> _Kept | None:
        """Tell those who wait, and keep it where that is wanted."""
        answer = self._joined(answers)
        under_way.tell(answer.found)
        if self._under_way.get(key) is not under_way:
            return None  # forgotten meanwhile
        del self._under_way[key]
        if answer.until <= time.monotonic():
            return None  # it holds for this moment only
        self._kept[key] = answer
        self._kept.move_to_end(key)
        if len(self._kept) > MAX_CACHED:
            self._kept.popitem(last=False)
        return answer

    def _joined(self, answers: Sequence[_Answer]) -> _Kept:
        ttl = min(answer.ttl for answer in answers if answer.exists)
        if self._ttl is not None:
            ttl = min(ttl, self._ttl)
        found = dict.fromkeys(resolved for answer in answers for resolved in answer.found)
        return _Kept(tuple(found), time.monotonic() + ttl)


async def _first_answer(asking: Sequence[asyncio.Task[_Answer | OSError]]) -> set[asyncio.Task[_Answer | OSError]]:
    """Wait for an address, and a little for the others; return the tasks that are late."""
    pending = set(asking)
    while pending and not any(answer.found for answer in _answers(asking)):
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    if pending:
        _, pending = await asyncio.wait(pending, timeout=RESOLUTION_DELAY)
    return pending


def _answers(asking: Sequence[asyncio.Task[_Answer | OSError]]) -> list[_Answer]:
    results = [task.result() for task in asking if task.done()]
    return [result for result in results if isinstance(result, _Answer)]
