"""Threads that each compute in themselves, one for every processor."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch

MOST_WORKERS = 8
"""Reading is soon bound by memory and disk."""


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
    """Give a thread to every processor.

    Args:
        alone: Each computes in itself only, so that together they do not wait for each other.
    """
    count = min(torch.get_num_threads(), MOST_WORKERS)
    with one_thread() if alone else nullcontext(), ThreadPoolExecutor(count) as pool:
        yield pool
