"""Pools of threads of which each computes alone, one for every processor core."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch

MOST_WORKERS = 8
"""Most threads of a pool: more would only wait for memory and disk."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def workers(alone: bool = True) -> Iterator[ThreadPoolExecutor]:
    """Make a pool with a thread for every processor core that torch uses, at most `MOST_WORKERS`.

    Args:
        alone: Whether torch computes only in the calling thread meanwhile; the threads would otherwise wait for the
            same cores.
    """
    count = min(torch.get_num_threads(), MOST_WORKERS)
    with one_thread() if alone else nullcontext(), ThreadPoolExecutor(count) as pool:
        yield pool
