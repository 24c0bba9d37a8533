"""Samples on their way to the device: streams stay files of the host, the device sees a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from quota.calib.blocks import Batch, Block
from quota.calib.stream import Stream

Items = Sequence[int]


def feed(streams: Sequence[Stream], lists: Iterable[Items], device: str) -> Iterator[tuple[Batch, ...]]:
    """For each list of items a batch of them from every stream, on `device`.

    While the device computes on one, a thread reads the next from the files, into pinned memory where there is CUDA;
    its way to the device then waits for nothing. At most two lists of items are on the device: the one at hand and, as
    long as the caller holds it, the one before. On the CPU batches are read when they are asked for.
    """
    where = torch.device(device)

    def read(items: Items) -> tuple[Batch, ...]:
        batches = tuple(stream.batch(items) for stream in streams)
        return tuple(batch.pinned() for batch in batches) if where.type == "cuda" else batches

    if where.type == "cpu":
        yield from map(read, lists)
        return
    with ThreadPoolExecutor(1) as reader:
        ahead: Future[tuple[Batch, ...]] | None = None
        for items in lists:
            after = reader.submit(read, items)
            if ahead is not None:
                yield tuple(batch.to(where) for batch in ahead.result())
            ahead = after
        if ahead is not None:
            yield tuple(batch.to(where) for batch in ahead.result())


@torch.no_grad()
def advance(block: Block, source: Stream, target: Stream, batch: int, device: str) -> None:
    """Run `block`, which is on `device`, in its current mode over all items of `source` and write the outputs."""
    lists = list(source.batches(batch))
    for items, (at_hand,) in zip(lists, feed([source], lists, device), strict=True):
        out = block(at_hand).cpu()
        for row, item in enumerate(items):
            rest = source.read_rows(item)[1] if source.rest else None
            target.write(item, out[row, : source.lengths[item]], rest)
