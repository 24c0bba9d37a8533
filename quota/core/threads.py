"""Whose thread does the work. Operations of a small model are too short to be shared out among threads: each of its
pieces of work (a block, a batch, a sample) has one thread, and several run side by side. So the bits of a float result,
whose sums are split as there are threads, do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[int]:
    """While open, torch's operations run on the thread that calls them, also on threads that begin now. Gives how many
    threads torch had: as many pieces of work may run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
