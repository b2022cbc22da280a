"""Outgoing asyncio connections from the interface or address that you name.

You say *which source* a connection must leave from; you get a connected, non-blocking socket that does so, or a clear
error. It is ``CURLOPT_INTERFACE`` done right for asyncio: nothing blocks the loop, and what is pinned to an interface
never leaves by another one.

The whole in one page. Each row imports only rows below it::

    aiohttp   lab                        edges: a client library each; the lab is a place to try them in
    _connector   _factory                the doors: asyncio, and the synchronous form
    _dial   dns                          the story of one connect; names, asked through the source
    _plan   _race   _sockets   _policy   from a source to bindings; RFC 8305; one attempt; the order of sources
    _scope   _interfaces                 what the context pins; the host's interfaces
    _resolve   _ports                    names, off the loop; local ports
    _platform   _sources                 the operating system, one file each; the grammar of sources
    _binding   _errors                   values: decisions, failures
    _advice                              what to say of an errno

One connect: the destination becomes targets (``_dial.targets``); the policy orders the sources (``_dial.route``); for
the first of them each target gets a binding or a refusal (``_plan``, by the rules of ``_binding``); what is left is
raced (``_race``), each attempt being: open, pin, bind, connect (``_sockets``). It is held against the promise right
before the connect and right after it, and the connection is counted until it ends. When the source fails for a reason
of its own, nothing has been sent yet, and the next one is tried.

Sources::

    if!NAME          leaves by the interface NAME, from one of its addresses, or fails
    192.0.2.7        has this source address; the routing table chooses the interface
    host!NAME        the same, for the address that NAME has
    ifhost!NAME!IP   both
    net!PREFIX       a random address of PREFIX for each connection (needs a local route for it)
"""

from ._connector import Connector, connect
from ._dial import SourceStats
from ._errors import AiobindError, Attempt, BindError, ConnectError, InvalidSource, ResolveError
from ._factory import socket_factory
from ._policy import Policy, RoundRobin, SourceView
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
    "Host",
    "Interface",
    "InvalidSource",
    "Policy",
    "Prefix",
    "ResolveError",
    "RoundRobin",
    "Source",
    "SourceStats",
    "SourceView",
    "bound_source",
    "connect",
    "parse_source",
    "socket_factory",
    "use_source",
]
