"""Keeps the process small and its answers prompt: when garbage is looked for, and what the C library may hold.

A full collection walks every object there is: 70 to 200 ms in which no key is answered, most of them spent on what the
imports made and nothing ever drops. So the start is not searched at all, and what has survived it is set aside.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ARENA_MAX = -8
"""M_ARENA_MAX of glibc's malloc.h."""


@contextmanager
def importing() -> Iterator[None]:
    """Import the screens: without looking for garbage, and with all that they bring set aside.

    Also without `ssl`, 5.6 MiB and 17 ms, which asyncio loads for encrypted streams and can do without. The screens
    open none; what asks the hub later finds `ssl` as ever.
    """
    without_ssl = sys.modules.keys().isdisjoint(("asyncio", "ssl"))
    gc.disable()
    try:
        if without_ssl:
            sys.modules["ssl"] = None  # type: ignore[assignment] # how an import is refused
            import asyncio  # noqa: F401, PLC0415
    finally:
        if without_ssl:
            del sys.modules["ssl"]
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def share_one_arena() -> None:
    """Let all threads allocate from one heap: ours look and wait, and each heap of its own would keep its peak."""
    if (libc := _libc()) is not None:
        libc.mallopt(_ARENA_MAX, 1)


def settle() -> None:
    """Set aside what the first screens are made of, and return free memory to the system."""
    gc.freeze()
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def _libc() -> Any | None:
    if sys.platform != "linux":
        return None
    import ctypes  # noqa: PLC0415  5 ms

    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
