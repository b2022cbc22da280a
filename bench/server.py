"""Law: the far end is another process, fast enough never to be what is measured, and dies with its parent.

It is ``server.c``; without a C compiler it is `bench.apart.served`, which the tables then say.
"""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.apart import served

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Iterator

HERE = Path(__file__).parent

#: How the programs are compiled, by language.
COMPILERS = {"c": ("cc", "-O2", "-o"), "go": ("go", "build", "-o")}
PROGRAMS = {"c": HERE / "server.c", "go": HERE / "peer.go"}


def compiled(folder: str, languages: Iterable[str] = tuple(PROGRAMS)) -> dict[str, str]:
    """Return the programs, by language, of which there is a compiler that works."""
    found: dict[str, str] = {}
    for language in languages:
        command = [*COMPILERS[language], f"{folder}/{language}", str(PROGRAMS[language])]
        if shutil.which(command[0]) and subprocess.run(command, check=False).returncode == 0:
            found[language] = f"{folder}/{language}"
    return found


@contextmanager
def serving(program: str | None, hold: socket.socket, http: socket.socket) -> Iterator[None]:
    """Serve two listening sockets: connections that the client closes, and GET requests."""
    if program is None:
        with served(hold, http):
            yield
        return
    fds = [hold.fileno(), http.fileno()]
    die_with_us = ctypes.CDLL(None).prctl
    process = subprocess.Popen(
        [program, "serve", *map(str, fds)],
        pass_fds=fds,
        preexec_fn=lambda: die_with_us(1, signal.SIGKILL),  # noqa: PLW1509 - there are no threads yet
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()
