"""Which requests run in the next step, and which give pages back.

Clients take fair turns (`turns.py`) at each kind of work: rows that decode, rows of prefills, images to encode. A
request is admitted when the pool has pages for all its known tokens; from then on it holds pages, and is in a step
whenever it has a turn. So a client with one short request waits for a few rows of each other client, however many
requests they have.

Where pages run out, the client that holds most gives some back: its youngest request goes back to the queue and is
computed again later, to the same bits.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable

from quota.runtime.engine.chunk import Chunk
from quota.runtime.engine.kv_storage import KvStorage
from quota.runtime.engine.pool import OutOfPages, PagePool
from quota.runtime.engine.segments import Segments
from quota.runtime.engine.sequence import Sequence
from quota.runtime.engine.turns import Turns

_MOST_PASSES = 16  # admissions of others' requests before one for which there are no pages


class Scheduler:
    """Everything ends: a request of another client is preempted only after it has gained tokens since it was admitted,
    twice as many every time; the oldest request of a client is not preempted for its others; and one that does not fit
    is passed by a bounded number of times, after which no other is admitted before it.

    max_running: most requests of one client that hold pages. running, waiting: in order of arrival.
    """

    def __init__(self, pool: PagePool, storage: KvStorage, segments: Segments, max_running: int) -> None:
        self.pool, self.storage, self.segments, self.page_size = pool, storage, segments, storage.page_size
        self.max_running = max_running
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._decoding, self._prefilling, self._encoding = Turns(), Turns(), Turns()

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self.running) or any(not sequence.paused for sequence in self.waiting)

    # coming and going

    def queue(self, sequence: Sequence) -> None:
        """Insert by order of arrival."""
        bisect.insort(self.waiting, sequence, key=lambda waiting: waiting.order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a request and free its pages."""
        for requests in (self.running, self.waiting):
            if sequence in requests:
                requests.remove(sequence)
        sequence.release(self.pool)

    def pause(self, sequence: Sequence) -> None:
        """No turns for a request until it is resumed; its pages go meanwhile, its tokens stay."""
        sequence.paused = True
        if sequence in self.running:
            self._back(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue; its tokens stay, its pages go."""
        sequence.preemptions += 1
        self.preemptions += 1
        self._back(sequence)

    def _back(self, sequence: Sequence) -> None:
        sequence.release(self.pool)
        self.running.remove(sequence)
        self.queue(sequence)

    def _admitted(self, sequence: Sequence) -> None:
        bisect.insort(self.running, sequence, key=lambda running: running.order)
        sequence.admitted_tokens = len(sequence.tokens)

    def _has_place(self, client: str) -> bool:
        return sum(sequence.client == client for sequence in self.running) < self.max_running

    def fork(self, parent: Sequence, sibling: Sequence) -> bool:
        """Let a request of the same prompt go on from the parent's pages, just computed; False where it may not
        run."""
        if sibling.paused or not self._has_place(sibling.client):
            return False
        for segment, pages in enumerate(parent.pages):
            for page in pages[: -(-parent.slots(segment, parent.computed) // self.page_size)]:
                sibling.hold(segment, self.pool.share(page))
        sibling.fork_from(parent)
        self._admitted(sibling)
        return True

    # decoding

    def decodes(self, rows: int) -> list[Chunk]:
        """One token each of at most `rows` decoding requests, whose turn it is and that have, or get, room for it."""
        chunks: list[Chunk] = []
        for sequence in self._decoding.start([s for s in self.running if s.decoding]):
            if len(chunks) >= rows:
                break
            if self._make_room(sequence):
                chunks.append(Chunk(sequence, sequence.computed, sequence.computed + 1, 0, self.segments.layers))
                self._decoding.charge(sequence.client, 1)
        return [chunk for chunk in chunks if chunk.sequence in self.running]  # a later one may have taken its pages

    def _make_room(self, sequence: Sequence) -> bool:
        """Pages for one more token. A client that holds more than this one gives its youngest request's for it, else
        this one's youngest request, which may be this."""
        while sequence in self.running:
            try:
                self._own_last_pages(sequence)
                self._grow(sequence, sequence.computed + 1)
                return True
            except OutOfPages:
                own = [other for other in self.running if other.client == sequence.client]
                mine = sum(self._blocks(other) for other in own) + self.segments.layers
                self.preempt(next(iter(self._victims(sequence.client, mine, 1)), own[-1]))
        return False

    def _own_last_pages(self, sequence: Sequence) -> None:
        """Copy the pages the next token is written to where others hold them too."""
        for segment in range(len(self.segments)):
            last = sequence.slots(segment, sequence.computed) // self.page_size
            if last < len(sequence.pages[segment]) and sequence.pages[segment][last].refs > 1:
                own = self.pool.allocate(segment)
                self.storage.copy(sequence.pages[segment][last].blocks, own.blocks)
                self.pool.release(sequence.replace(segment, last, own))

    def _grow(self, sequence: Sequence, tokens: int) -> None:
        for segment in range(len(self.segments)):
            while len(sequence.pages[segment]) * self.page_size < sequence.slots(segment, tokens):
                sequence.hold(segment, self.pool.allocate(segment))

    # pages

    def _blocks(self, sequence: Sequence, shared: bool = True) -> int:
        """Blocks a request holds; shared: those that others hold too count."""
        return sum(
            layers * sum(shared or page.refs == 1 for page in pages)
            for pages, layers in zip(sequence.pages, self.pool.segment_layers, strict=True)
        )

    def _victims(self, client: str, mine: int, shortage: int) -> list[Sequence]:
        """Requests of clients that hold more than `mine` blocks, always the youngest of the client that holds most,
        that give back `shortage` blocks; none where they would not."""
        held: Counter[str] = Counter()
        eligible: dict[str, list[Sequence]] = {}
        for sequence in self.running:
            held[sequence.client] += self._blocks(sequence)
            if sequence.client != client and sequence.gained >= 1 << sequence.preemptions:
                eligible.setdefault(sequence.client, []).append(sequence)
        victims: list[Sequence] = []
        while shortage > 0:
            holders = [(held[name], name) for name, left in eligible.items() if left and held[name] > mine]
            if not holders:
                return []
            name = max(holders)[1]
            victims.append(eligible[name].pop())
            held[name] -= self._blocks(victims[-1])
            shortage -= self._blocks(victims[-1], shared=False) + self.segments.layers
        return victims

    def _admit(self, sequence: Sequence) -> bool:
        """Take every page the known tokens need, sharing what is there; all or nothing."""
        matched = [0] * len(self.segments)
        for segment, names in enumerate(sequence.names):
            count = 0
            while count < len(names) and (page := self.pool.acquire(names[count])) is not None:
                sequence.hold(segment, page)
                count += 1
            matched[segment] = count * self.page_size
        need = sequence.blocks(len(sequence.tokens), self.page_size)
        # every running request can still take one more page per segment
        missing = need - self._blocks(sequence) + len(self.running) * self.segments.layers - self.pool.available
        if missing > 0:
            mine = need + sum(self._blocks(other) for other in self.running if other.client == sequence.client)
            victims = self._victims(sequence.client, mine, missing)
            if not victims:
                sequence.release(self.pool)
                return False
            for victim in victims:
                self.preempt(victim)
        self._grow(sequence, len(sequence.tokens))
        sequence.shared = matched
        sequence.published = [slots // self.page_size for slots in matched]
        sequence.computed = sequence.reusable(matched)
        sequence.cached = max(sequence.cached, min(sequence.computed, sequence.prompt_tokens))
        return True

    # prefills

    def admit(self, rows: int) -> None:
        """Let waiting requests in as their turns come, until those that prefill have `rows` rows to compute."""
        closed: set[str] = set()  # clients whose next request does not get in
        refused: list[Sequence] = []
        waiting = [sequence for sequence in self.waiting if not sequence.paused]
        overdue = next((s for s in waiting if s.passed_by >= _MOST_PASSES and self._has_place(s.client)), None)
        for sequence in self._prefilling.start([*self.prefilling(), *waiting]):
            if rows <= 0:
                return
            if sequence.client in closed:
                continue
            if sequence not in self.running:
                if not self._has_place(sequence.client) or overdue not in (None, sequence):
                    closed.add(sequence.client)
                    continue
                if not self._admit(sequence):
                    closed.add(sequence.client)
                    refused.append(sequence)
                    continue
                for other in refused:
                    other.passed_by += 1
                sequence.passed_by = 0
                self.waiting.remove(sequence)
                self._admitted(sequence)
            rows -= len(sequence.tokens) - sequence.computed

    def prefilling(self) -> list[Sequence]:
        """Admitted requests that do not decode yet."""
        return [sequence for sequence in self.running if not sequence.decoding]

    def images(self, tokens: int) -> list[tuple[Sequence, int]]:
        """(request, which of its images) to encode next, as turns come: at least one, about `tokens` visual tokens."""
        wanted: list[tuple[Sequence, int]] = []
        known: set[bytes] = set()
        for sequence in self._encoding.start(self.prefilling()):
            for number, (name, size) in enumerate(sequence.images):
                if sequence.features[number] is not None:
                    continue
                if name not in known:
                    if known and size > tokens:
                        return wanted
                    tokens -= size
                    known.add(name)
                    self._encoding.charge(sequence.client, size)
                wanted.append((sequence, number))
        return wanted

    def prefills(self, rows: int) -> list[Chunk]:
        """Prefills as turns come, until `rows` rows are given out. A request whose images are not encoded yet waits."""
        chunks: list[Chunk] = []
        ready = [s for s in self.prefilling() if all(part is not None for part in s.features)]
        for sequence in self._prefilling.order(ready):
            if rows <= 0:
                break
            chunk, computed = self._prefill(sequence, rows)
            chunks.append(chunk)
            self._prefilling.charge(sequence.client, self._work(sequence, chunk))
            rows -= computed
        return chunks

    def _prefill(self, sequence: Sequence, rows: int) -> tuple[Chunk, int]:
        """The next chunk of one prefill, about `rows` long, and rows it has in its last layer.

        Where tokens are still to be chosen, chunks go only as far as the first layer that drops, because a choice needs
        the whole prompt; the rest of the layers runs in one step, on fewer rows. Everywhere else a chunk passes all
        layers. A prompt whose tokens see each other is never cut.
        """
        total, first, layers = len(sequence.tokens), sequence.plan.first_layer, self.segments.layers
        if not sequence.chooses or first is None:
            end = max(min(total, sequence.computed + rows), sequence.prefix)
            return Chunk(sequence, sequence.computed, end, 0, layers), end - sequence.computed
        # tokens are chosen before the first layer: from the whole prompt, and what is dropped passes no layer at all
        if not first:
            computed = total - sequence.computed - sequence.plan.dropped[0]
            return Chunk(sequence, sequence.computed, total, 0, layers), computed
        begin = sequence.computed + sum(len(part.hidden) for part in sequence.ahead)
        if begin == total:
            computed = total - sequence.computed - sequence.plan.dropped[-1]
            return Chunk(sequence, sequence.computed, total, first, layers), computed
        end = max(min(total, begin + rows), sequence.prefix)
        whole = begin == sequence.computed and end == total
        return Chunk(sequence, begin, end, 0, layers if whole else first), end - begin

    def _work(self, sequence: Sequence, chunk: Chunk) -> int:
        """Rows times layers that are computed."""
        rows = chunk.end - chunk.begin
        dropped: Iterable[int] = sequence.plan.dropped if sequence.chooses else [0] * len(self.segments)
        passed = zip(self.segments.spans, dropped, strict=True)
        return sum(len(span) * (rows - less) for span, less in passed if chunk.enter <= span[0] < chunk.leave)
