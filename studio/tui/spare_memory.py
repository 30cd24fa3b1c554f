"""Keeps the C library from holding memory that Python has given back. Does nothing where there is no glibc."""

import sys
from typing import Any

_ARENA_MAX = -8
"""M_ARENA_MAX of glibc's malloc.h."""


def share_one_arena() -> None:
    """Let all threads allocate from one heap: ours look and wait, and each heap of its own would keep its peak."""
    if (libc := _libc()) is not None:
        libc.mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Return free memory to the system, such as what the start took and needs no more."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def _libc() -> Any | None:
    if sys.platform != "linux":
        return None
    import ctypes  # noqa: PLC0415  5 ms

    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
