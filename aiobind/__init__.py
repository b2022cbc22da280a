"""Outgoing asyncio connections from the interface or address that you name.

You say *which source* a connection must leave from; you get a connected, non-blocking socket that does so, or a clear
error. It is ``CURLOPT_INTERFACE`` done right for asyncio: nothing blocks the loop, and what is pinned to an interface
never leaves by another one.

The whole in one page. Each row imports only rows below it::

    scrapy                               the edge that stands on another
    aiohttp   anyio   httpx   metrics   lab   edges: a library each, and a place to try them in
    _httpcore                            what httpcore is given, by itself or below httpx
    _connector   _factory                the doors: asyncio, and the synchronous form
    _as_loop   _guest   _streams         a loop with a connector's doors; asyncio's coroutines in trio; streams for all
    _dial   dns                          the story of one connect; names, asked through the source
    _roster                              which source is next
    _origin   _health   _policy          one source and its figures; what has failed; the order of sources
    _limits                              how many connections a source may have
    _plan   _race   _sockets   _faults   from a source to bindings; RFC 8305; one socket; whose fault it was
    _scope   _interfaces   _sketch       what the context pins; the host's interfaces; latencies
    _wait   _resolve   _ports   _events   how to wait for a connect; names, off the loop; local ports; what is told
    _loops                               what a loop reads for all of them
    _platform   _sources                 the operating system, one file each; the grammar of sources
    _binding   _errors                   values: decisions, failures
    _advice                              what to say of an errno

One connect: the policy orders the sources that are healthy (``_roster.order``); for the first of them that has room
(``_roster.Route``) the destination becomes targets (``_dial.targets``); each target gets a binding or a refusal
(``_plan``, by the rules of ``_binding``); what is left is raced (``_race``), each attempt being: open, pin, bind
(``_sockets``), connect (``_wait``). It is held against the promise before the connect and after it, and the connection
is counted until it ends (``_origin``). When the source fails for a reason of its own, nothing has been sent yet, and
the next one is tried; the one that failed is left alone for a while (``_health``).

As long as the interfaces stay what they are, all this is worked out once for each source and target, and then repeated
(``_sockets.Opening``): the short way, which is left for the long one whenever anything refuses or has changed.

Sources::

    if!NAME          leaves by the interface NAME, from one of its addresses, or fails
    192.0.2.7        has this source address; the routing table chooses the interface
    host!NAME        the same, for the address that NAME has
    ifhost!NAME!IP   both
    net!PREFIX       a random address of PREFIX for each connection (needs a local route for it)
"""

from ._connector import Connector, connect
from ._errors import AiobindError, Attempt, BindError, ConnectError, InvalidSource, ResolveError
from ._events import Event
from ._factory import socket_factory
from ._origin import SourceStats
from ._policy import Failover, LeastConnections, Policy, Random, RoundRobin, SourceView, Sticky, Weighted
from ._scope import use_source
from ._sockets import BoundSource, bound_source
from ._sources import Address, Host, Interface, Prefix, Source, parse_source

__all__ = [
    "Address",
    "AiobindError",
    "Attempt",
    "BindError",
    "BoundSource",
    "ConnectError",
    "Connector",
    "Event",
    "Failover",
    "Host",
    "Interface",
    "InvalidSource",
    "LeastConnections",
    "Policy",
    "Prefix",
    "Random",
    "ResolveError",
    "RoundRobin",
    "Source",
    "SourceStats",
    "SourceView",
    "Sticky",
    "Weighted",
    "bound_source",
    "connect",
    "parse_source",
    "socket_factory",
    "use_source",
]
