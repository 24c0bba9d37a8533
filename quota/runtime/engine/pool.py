"""The pages of the key/value pool: reference counts, sharing by content, eviction. No tensors here.

A page holds P tokens of all layers of one segment. It is made of blocks, one per layer of its segment; a block is P
tokens of one layer. All blocks have one size, so memory that pruning frees in late segments serves any request. A page
is filled from the front and never changed once full. Full pages get a key and are shared by content. A page that is not
full has several holders only where answers to one prompt were forked; a holder that goes on writing copies it first,
the last one need not.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

import numpy as np

from quota.core.errors import QuotaError


class OutOfPages(QuotaError):
    """The pool has fewer blocks than asked for, even after evicting every page without a holder."""


class Page:
    """Blocks of one page in layer order, the number of holders, and, once it is full and published, the key of its
    content and where needed the rotary positions int64 [A, P] of its tokens."""

    __slots__ = ("blocks", "key", "positions", "refs", "segment")

    def __init__(self, segment: int, blocks: tuple[int, ...]) -> None:
        self.segment, self.blocks, self.refs = segment, blocks, 1
        self.key: bytes | None = None
        self.positions: np.ndarray | None = None


class PagePool:
    """Allocates pages, counts their holders, and keeps published pages without holders until their blocks are
    needed."""

    def __init__(self, blocks: int, segment_layers: Iterable[int]) -> None:
        if blocks < 1:
            raise ValueError(f"blocks: expected at least one, got {blocks}")
        self.blocks = blocks
        self.segment_layers = tuple(segment_layers)
        self.evictions = 0
        self._free = list(range(blocks - 1, -1, -1))
        self._published: dict[bytes, Page] = {}
        self._idle: OrderedDict[bytes, Page] = OrderedDict()  # published, no holder; oldest first
        self._idle_blocks = 0
        self._held: Counter[int] = Counter()  # segment -> pages with a holder

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + self._idle_blocks

    def held_pages(self) -> list[int]:
        """Pages with a holder, per segment."""
        return [self._held[segment] for segment in range(len(self.segment_layers))]

    def idle_pages(self) -> int:
        """Published pages without a holder."""
        return len(self._idle)

    def allocate(self, segment: int) -> Page:
        """A page of its own for the caller; OutOfPages when the pool cannot give one."""
        need = self.segment_layers[segment]
        if self.available < need:
            raise OutOfPages(
                f"pool: a page of segment {segment} needs {need} blocks, {self.available} of {self.blocks} are"
                " available"
            )
        while len(self._free) < need:
            self._evict()
        blocks = tuple(self._free.pop() for _ in range(need))
        self._held[segment] += 1
        return Page(segment, blocks)

    def acquire(self, key: bytes) -> Page | None:
        """Share the published page with this content, or None."""
        page = self._published.get(key)
        if page is not None:
            if page.refs == 0:
                del self._idle[key]
                self._idle_blocks -= len(page.blocks)
                self._held[page.segment] += 1
            page.refs += 1
        return page

    def share(self, page: Page) -> Page:
        """One more holder of a page that has one."""
        if page.refs < 1:
            raise ValueError("page: shared without a holder")
        page.refs += 1
        return page

    def publish(self, page: Page, key: bytes) -> None:
        """Let others share this full page. Where another page has the same content already, this one stays private."""
        if page.refs < 1:
            raise ValueError("page: published without a holder")
        if page.key is None and key not in self._published:
            page.key = key
            self._published[key] = page

    def release(self, page: Page) -> None:
        """Give one hold back. The last one frees the page, or leaves it idle when it is published."""
        if page.refs < 1:
            raise ValueError("page: released more often than held")
        page.refs -= 1
        if page.refs:
            return
        self._held[page.segment] -= 1
        if page.key is None:
            self._free.extend(page.blocks)
        else:
            self._idle[page.key] = page
            self._idle_blocks += len(page.blocks)

    def forget(self) -> None:
        """Evict every idle page."""
        while self._idle:
            self._evict()

    def _evict(self) -> None:
        key, page = self._idle.popitem(last=False)
        del self._published[key]
        self._idle_blocks -= len(page.blocks)
        self._free.extend(page.blocks)
        self.evictions += 1

    def check_integrity(self, holders: Iterable[Page]) -> None:
        """AssertionError unless every block is free, idle or held, exactly once, and holds equal `holders` (one entry
        per hold)."""
        holders = list(holders)
        counts = Counter(id(page) for page in holders)
        pages = {id(page): page for page in holders} | {id(page): page for page in self._published.values()}
        for number, page in pages.items():
            assert page.refs == counts[number], (
                f"page of blocks {page.blocks}: {page.refs} holds counted, {counts[number]} found"
            )
            assert len(page.blocks) == self.segment_layers[page.segment], (
                f"page of blocks {page.blocks}: wrong size for segment {page.segment}"
            )
            assert (page.refs == 0) == (page.key is not None and self._idle.get(page.key) is page), (
                f"page of blocks {page.blocks}: idle or held, not both"
            )
        for key, page in self._published.items():
            assert page.key == key, "a published page has another key"
        found = Counter(self._free)
        for page in pages.values():
            found.update(page.blocks)
        assert found == Counter(range(self.blocks)), "blocks lost or given twice: " + str(
            [u for u in range(self.blocks) if found[u] != 1][:8]
        )
        assert self._idle_blocks == sum(len(page.blocks) for page in self._idle.values()), "idle blocks miscounted"
        held = Counter(page.segment for page in pages.values() if page.refs)
        assert +self._held == held, f"held pages miscounted: {self._held} for {held}"
