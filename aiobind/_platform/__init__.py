"""Law: the one place that knows which operating system this is. Above it nobody asks.

A new operating system is one file that fulfils `base.Platform`, and one line here.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Platform

__all__ = ["platform"]

platform: Platform
if sys.platform == "linux":
    from .linux import Linux

    platform = Linux()
else:
    from .fallback import Fallback

    platform = Fallback(sys.platform)
