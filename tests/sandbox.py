"""A sandbox: threads to whom the kernel refuses a system call (seccomp(2), classic BPF over struct seccomp_data)."""

from __future__ import annotations

import ctypes
import platform
import struct
import threading
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

_NUMBERS = {
    "socket": {"x86_64": 41, "aarch64": 198, "riscv64": 198},
    "sendto": {"x86_64": 44, "aarch64": 206, "riscv64": 206},
    "bind": {"x86_64": 49, "aarch64": 200, "riscv64": 200},
    "setsockopt": {"x86_64": 54, "aarch64": 208, "riscv64": 208},
    "timerfd_create": {"x86_64": 283, "aarch64": 85, "riscv64": 85},
}
_LOAD, _EQUAL, _GIVE = 0x20, 0x15, 0x06
_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000


class Sandbox:
    """Where *call* fails with *number*.

    Args:
        call: the name of a system call.
        number: the errno.
        argument: only when its argument at this place (from 0) has this value.
    """

    def __init__(self, call: str, number: int, argument: tuple[int, int] | None = None) -> None:
        at = _NUMBERS[call].get(platform.machine())
        if at is None:
            pytest.skip(f"the number of {call}(2) on {platform.machine()} is not known here")
        condition: tuple[tuple[int, int, int, int], ...] = ()
        if argument is not None:
            place, value = argument
            condition = (_LOAD, 0, 0, 16 + 8 * place), (_EQUAL, 0, 1, value)  # args[place], low half
        program = (
            (_LOAD, 0, 0, 0),  # nr
            (_EQUAL, 0, len(condition) + 1, at),
            *condition,
            (_GIVE, 0, 0, _ERRNO | number),
            (_GIVE, 0, 0, _ALLOW),
        )
        self._lines = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
        self._program = struct.pack("HP", len(program), ctypes.addressof(self._lines))

    def run(self, work: Callable[[], None]) -> None:
        """Run *work* in a thread that is confined, as are those that it starts; raise what it raises."""
        failures: list[BaseException] = []

        def confined() -> None:
            try:
                prctl = ctypes.CDLL(None, use_errno=True).prctl
                if prctl(38, 1, 0, 0, 0) or prctl(22, 2, self._program, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
                    raise OSError(ctypes.get_errno(), "prctl")
                work()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=confined)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
