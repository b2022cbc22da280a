"""Law: one table, for every platform, from what the system answered and in which circumstance to plain words.

Steps: ``pin`` and ``bind`` prepare a socket, ``connect`` failed before anything was sent, ``answer`` failed after it.
The circumstances of ``bind`` are those which ``in_pcbbind_setup`` of FreeBSD tells apart, with what Linux has besides:

    EADDRNOTAVAIL  ""           no interface holds the address, and the option to bind it nevertheless is not set
                   no address   no interface has any address of this family
                   jail         the address is not one of the jail's
                   multicast    asked for no further: it would be bound, and the connection come from another address
    EINVAL         ""           an address of a wrong length
                   bound        the socket has an address or a port already
                   no zone      a link-local address without its interface (Linux)
    EAFNOSUPPORT   ""           not of the socket's family
                   jail         the jail has none of this family
"""

from __future__ import annotations

import errno

__all__ = ["ADVICE", "advice"]

ADVICE = {
    (
        "pin",
        errno.EPERM,
        "",
    ): "the pin to {subject} was refused: this system wants CAP_NET_RAW for it (Linux before 5.7, a"
    " sandbox, or socket_options that named a device already)",
    ("pin", errno.ENODEV, ""): "no interface named {subject}",
    (
        "bind",
        errno.EADDRNOTAVAIL,
        "",
    ): "{subject} is not usable on this host: no interface of this {place} holds it, or it is still tentative",
    ("bind", errno.EADDRNOTAVAIL, "no address"): "{subject} is not usable: no interface of this {place} has any"
    " {family} address; is one up?",
    ("bind", errno.EADDRNOTAVAIL, "jail"): "{subject} is not one of the addresses that this {place} may use",
    ("bind", errno.EADDRNOTAVAIL, "multicast"): "{subject} is no source: a {what} address is bound, and then the"
    " connection comes from another one",
    ("bind", errno.EADDRINUSE, ""): "no port is left on {subject} for this destination",
    (
        "bind",
        errno.EACCES,
        "",
    ): "{subject}: a port below net.ipv4.ip_unprivileged_port_start takes CAP_NET_BIND_SERVICE",
    ("bind", errno.EAFNOSUPPORT, ""): "{subject} is not of the socket's address family",
    ("bind", errno.EAFNOSUPPORT, "jail"): "{subject} cannot be used: this {place} has no {family}",
    ("bind", errno.EINVAL, ""): "{subject} was refused: its length is not that of an address of this family",
    ("bind", errno.EINVAL, "bound"): "{subject} was refused: the socket has an address or a port already, and takes no"
    " second one",
    (
        "bind",
        errno.EINVAL,
        "no zone",
    ): "{subject} is link-local: it needs its interface as a zone, as in {subject}%eth0",
    ("bind", errno.ENODEV, ""): "the zone of {subject} is no interface of this host",
    ("connect", errno.EACCES, ""): "the routing table or a filter of this host prohibits it",
    ("connect", errno.EADDRINUSE, ""): "no ephemeral port is left for this destination",
    ("connect", errno.EHOSTUNREACH, ""): "no route to host: the routing table says so",
    ("connect", errno.EINVAL, ""): "the system lets no packet go there from this source address",
    ("connect", errno.ENETUNREACH, ""): "network is unreachable: the source has no route there; is its interface up?",
    ("connect", errno.ENODEV, ""): "the interface is gone",
    ("connect", errno.EPERM, ""): "a filter of this host prohibits it",
    ("answer", errno.EHOSTUNREACH, ""): "no route to host: nobody answers there on the link, or a router says so",
    ("answer", errno.ENETUNREACH, ""): "network is unreachable: a router says so",
}


def advice(step: str, number: int, circumstance: str = "", **about: object) -> str | None:
    """Return what to say of *number*; what is not known of the circumstance is said of the errno; None: nothing is."""
    text = ADVICE.get((step, number, circumstance)) or ADVICE.get((step, number, ""))
    return None if text is None else text.format(**about)
