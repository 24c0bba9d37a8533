"""Who runs in the next step: decoding requests first, then prefills in order of arrival, within a budget of rows and
the pages there are."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from quota.runtime.engine.kv_storage import KvStorage
from quota.runtime.engine.pool import OutOfPages, PagePool
from quota.runtime.engine.segments import Segments
from quota.runtime.engine.sequence import Sequence


@dataclass(frozen=True)
class Turn:
    """Tokens begin .. end of a request through layers enter .. leave."""

    sequence: Sequence
    begin: int
    end: int
    enter: int
    leave: int


class Scheduler:
    """First come, first served. When pages run out the youngest running request gives all of its pages back and is
    computed again later; the oldest always gets on, so everything ends."""

    def __init__(
        self, pool: PagePool, storage: KvStorage, segments: Segments, max_running: int, step_tokens: int
    ) -> None:
        self.pool, self.storage, self.segments, self.page_size = pool, storage, segments, storage.page_size
        self.max_running, self.step_tokens = max_running, step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def remove(self, sequence: Sequence) -> None:
        """Forget a request and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.release(self.pool)

    def decodes(self) -> list[Turn]:
        """One token of every decoding request that has, or gets, room for it."""
        turns = []
        for sequence in sorted(self.running, key=lambda s: s.order):
            if sequence.decoding and self._make_room(sequence):
                turns.append(Turn(sequence, sequence.computed, sequence.computed + 1, 0, self.segments.layers))
        return turns

    def _make_room(self, sequence: Sequence) -> bool:
        """Pages for one more token; younger requests are preempted for it, and the request itself when it is the
        youngest."""
        while sequence in self.running:
            try:
                self._own_last_pages(sequence)
                self._grow(sequence, sequence.computed + 1)
                return True
            except OutOfPages:
                self.preempt(max(self.running, key=lambda s: s.order))
        return False

    def _own_last_pages(self, sequence: Sequence) -> None:
        """Copy the pages the next token is written to where others hold them too."""
        for segment in range(len(self.segments)):
            last = sequence.slots(segment, sequence.computed) // self.page_size
            if last < len(sequence.pages[segment]) and sequence.pages[segment][last].refs > 1:
                own = self.pool.allocate(segment)
                self.storage.copy(sequence.pages[segment][last].blocks, own.blocks)
                self.pool.release(sequence.replace(segment, last, own))

    def fork(self, parent: Sequence, sibling: Sequence) -> bool:
        """Let a request of the same prompt go on from the leader's pages, just computed; False where no more may
        run."""
        if len(self.running) >= self.max_running:
            return False
        for segment, pages in enumerate(parent.pages):
            for page in pages[: -(-parent.slots(segment, parent.computed) // self.page_size)]:
                sibling.hold(segment, self.pool.share(page))
        sibling.fork_from(parent)
        self.running.append(sibling)
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> None:
        for segment in range(len(self.segments)):
            while len(sequence.pages[segment]) * self.page_size < sequence.slots(segment, tokens):
                sequence.hold(segment, self.pool.allocate(segment))

    def preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue; its tokens stay, its pages go."""
        sequence.release(self.pool)
        sequence.preemptions += 1
        self.preemptions += 1
        self.running.remove(sequence)
        self.queue(sequence)

    def queue(self, sequence: Sequence) -> None:
        """To its place in the queue, by order of arrival."""
        at = sum(waiting.order < sequence.order for waiting in self.waiting)
        self.waiting.insert(at, sequence)

    def prefills(self, budget: int) -> list[Turn]:
        """Prefills under way, then new ones, until `budget` rows are given out. A request whose images are not
        encoded yet waits."""
        turns: list[Turn] = []
        for sequence in sorted((s for s in self.running if not s.decoding), key=lambda s: s.order):
            budget -= self._prefill(sequence, budget, turns)
        while budget > 0 and self.waiting and len(self.running) < self.max_running and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._prefill(sequence, budget, turns)
        return turns

    def _prefill(self, sequence: Sequence, budget: int, turns: list[Turn]) -> int:
        """Rows given to one prefill.

        Where tokens are still to be chosen, pieces go only as far as the first layer that drops, because a choice needs
        the whole prompt; the rest of the layers runs in one step, on fewer rows. Everywhere else a piece passes all
        layers.
        """
        if budget <= 0 or any(part is None for part in sequence.features):
            return 0
        total, first = len(sequence.tokens), sequence.plan.first_layer
        if not sequence.chooses or first is None:
            end = min(total, sequence.computed + budget)
            turns.append(Turn(sequence, sequence.computed, end, 0, self.segments.layers))
            return end - sequence.computed
        # tokens are chosen before the first layer: from the whole prompt, and what is dropped passes no layer at all
        if not first:
            turns.append(Turn(sequence, sequence.computed, total, 0, self.segments.layers))
            return total - sequence.computed - sequence.plan.dropped[0]
        begin = sequence.computed + sum(len(piece.hidden) for piece in sequence.ahead)
        if begin == total:
            turns.append(Turn(sequence, sequence.computed, total, first, self.segments.layers))
            return total - sequence.computed - sequence.plan.dropped[-1]
        end = min(total, begin + budget)
        whole = begin == sequence.computed and end == total
        turns.append(Turn(sequence, begin, end, 0, self.segments.layers if whole else first))
        return end - begin

    def _admit(self, sequence: Sequence) -> bool:
        """Take every page the known tokens need, sharing what is there; all or nothing."""
        matched = [0] * len(self.segments)
        for segment, names in enumerate(sequence.names):
            count = 0
            while count < len(names) and (page := self.pool.acquire(names[count])) is not None:
                sequence.hold(segment, page)
                count += 1
            matched[segment] = count * self.page_size
        held = sum(len(pages) * layers for pages, layers in zip(sequence.pages, self.pool.segment_layers, strict=True))
        # every running request can still take one more page per segment
        need = sequence.blocks(len(sequence.tokens), self.page_size) - held + len(self.running) * self.segments.layers
        if need > self.pool.available:
            sequence.release(self.pool)
            return False
        self._grow(sequence, len(sequence.tokens))
        sequence.shared = matched
        sequence.published = [slots // self.page_size for slots in matched]
        sequence.computed = sequence.reusable(matched)
        sequence.cached = max(sequence.cached, min(sequence.computed, sequence.prompt_tokens))
        return True
