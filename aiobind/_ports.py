"""Law: the local port is the kernel's choice, made by connect(2) for each destination, unless that would be wrong.

A socket is bound with one of three ports: None leaves the choice to connect(2), which shares a port among destinations;
0 has the kernel reserve one for this socket alone; any other number is that port.

The choice of connect(2) is wrong where sockets with and without a device share a source address and a target. The
kernel's check for a free 4-tuple (``__inet_check_established``) takes a live connection that is pinned to a device, and
a later socket that is not, for different: the later one may be given the very same 4-tuple, and its SYN resets the
pinned connection (measured on Linux 6.18: with 300 held in a range of 1,000 ports, 73 of 300 more took one of theirs).
The check of bind(2) knows no such difference (``inet_bind_conflict``), and connect(2) leaves alone what bind(2)
reserved. So whoever finds one of the other kind at the same address and target reserves its port (`claim`).
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, TypeAlias

from ._platform import platform

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from ._binding import Target

__all__ = ["ANY_PORT", "Claim", "LocalPorts", "claim", "claim_of", "enter", "release"]

#: A search for a free port ends after so many: a few milliseconds of system calls.
_TRIED = 1000


class LocalPorts:
    """The ports that a connection may leave from.

    Args:
        ports: the caller's range; None for the automatic one (net.ipv4.ip_local_port_range).

    Raises:
        TypeError: not a range.
        ValueError: empty, with a step, or not within 1 to 65535.
    """

    def __init__(self, ports: range | None = None) -> None:
        if ports is not None:
            if not isinstance(ports, range):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"local_ports is a range, as in range(40000, 40100), not {type(ports).__name__}")
            if not ports or ports.step != 1 or ports[0] < 1 or ports[-1] > 65535:
                raise ValueError(f"local_ports is a range of ports from 1 to 65535 without a step, not {ports}")
        self._ports = ports
        self._kept: bool | None = None if ports else True

    @property
    def kept_by_system(self) -> bool:
        """Whether connect(2) chooses among these ports; if not, each socket is given one of them."""
        if self._kept is None:
            assert self._ports is not None
            self._kept = platform.keeps_to(self._ports)
        return self._kept

    def doubt(self) -> None:
        """Ask the system anew what it keeps to, the next time."""
        self._kept = None if self._ports else True

    def prepare(self, sock: socket.socket) -> None:
        """Tell the system what to choose from for *sock*, where it is the system that chooses."""
        if self._ports is None:
            platform.prepare(sock)
        elif self.kept_by_system:
            platform.limit(sock, self._ports)

    def ways(self) -> Iterator[int | None]:
        """Yield what to bind a socket with, again and again until the connect finds a free port.

        After connect(2) has found none, one may still be reserved: a port that somebody else has reserved at another
        address is lost to its search, and not to that of bind(2).
        """
        if self._ports is None or self.kept_by_system:
            yield None
            yield 0
            return
        import random  # noqa: PLC0415 - 1 ms that few need

        first = random.randrange(len(self._ports))
        for offset in range(min(len(self._ports), _TRIED)):
            yield self._ports[(first + offset) % len(self._ports)]

    def __len__(self) -> int:
        return len(self._ports) if self._ports is not None else platform.port_count()

    def __contains__(self, port: int) -> bool:
        return self._ports is None or port in self._ports

    def __str__(self) -> str:
        return "ephemeral port" if self._ports is None else f"port from {self._ports[0]} to {self._ports[-1]}"


ANY_PORT: Final = LocalPorts()

#: Source address, the target's address and port, and whether a device is pinned.
Claim: TypeAlias = tuple[str, str, int, bool]

_claims: dict[Claim, int] = {}
_lock = threading.Lock()
#: Claims that have ended. The collector ends some, in any thread and amid any statement, so that takes no lock.
_ended: deque[Claim] = deque()
#: Those of sockets that were closed with bytes left to send: the kernel sends them from the same 4-tuple.
_lingering: deque[tuple[float, Claim]] = deque()
#: For so many seconds: net.ipv4.tcp_orphan_retries is 8, and the last of them comes after a quarter of an hour at most.
_LINGER = 1000.0


def claim(address: str, target: Target, *, pinned: bool) -> tuple[Claim, bool]:
    """Enter a socket at *address* for *target*; return its claim, and whether it has to reserve its port."""
    mine = claim_of(address, target, pinned=pinned)
    return mine, enter(mine, claim_of(address, target, pinned=not pinned))


def claim_of(address: str, target: Target, *, pinned: bool) -> Claim:
    """Return the claim of a socket at *address* for *target*."""
    return (address, target.host, target.port, pinned)


def enter(mine: Claim, other: Claim) -> bool:
    """Enter the claim of a socket; return whether it has to reserve its port, for there is one of the other kind."""
    with _lock:
        if _lingering:
            due = time.monotonic() - _LINGER
            while _lingering and _lingering[0][0] < due:
                _ended.append(_lingering.popleft()[1])
        while _ended:
            key = _ended.popleft()
            left = _claims[key] - 1
            if left:
                _claims[key] = left
            else:
                del _claims[key]
        _claims[mine] = _claims.get(mine, 0) + 1
        return other in _claims


def release(mine: Claim, *, unsent: bool = False) -> None:
    """End a claim that was entered; with *unsent* bytes it goes on for a while."""
    if unsent:
        _lingering.append((time.monotonic(), mine))
    else:
        _ended.append(mine)


def _after_fork() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()  # another thread of the parent may have held it; the sockets are the child's as well


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
