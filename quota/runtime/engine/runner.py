"""One step of the model for a mixed batch: rows of many requests go through the decoder layers together.

Linear layers, norms and feed-forward blocks see one matrix of rows; attention and the choice of tokens see requests. No result depends on
what else is in the batch: a row's dot products are exact integers or chains in a fixed order, whatever the number of rows and threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quota import ops
from quota.nn.attention import Record
from quota.ops.kv4_attention import Kv
from quota.runtime.engine.choice import Attended, Choice
from quota.runtime.engine.family import Family
from quota.runtime.engine.plan import Segments
from quota.runtime.engine.storage import KvStorage

Tables = list[np.ndarray]  # per segment int32 [layers, pages]: units


@dataclass(frozen=True)
class Work:
    """Consecutive tokens of one request, and the decoder layers enter .. leave they pass in this step.

    ids: the tokens, used where there is no `hidden` [rows, d] (input of layer `enter`). positions int64 [A, rows]: rotary positions. base, shared: per
    segment, slots before the first row, and slots that hold shared content already and are not written. attended: of layer enter - 1, where a choice is
    due at `enter`. compact: segments whose rotary positions count the tokens alive. cached: per segment int64 [A, base], positions of the slots before
    the first row, where the family asks for them.
    """

    ids: Sequence[int]
    positions: np.ndarray
    base: tuple[int, ...]
    shared: tuple[int, ...]
    tables: Tables
    enter: int
    leave: int
    hidden: Tensor | None = None
    choice: Choice | None = None
    attended: Attended | None = None
    compact: tuple[bool, ...] = ()
    cached: tuple[np.ndarray | None, ...] = ()


@dataclass(frozen=True)
class Result:
    """logits float32 [vocabulary] of the last row where the last layer was passed; else the rows' hidden states, and what the last layer
    attended to where a choice is due next. kept: layer -> rows alive from there on, where some were dropped."""

    logits: np.ndarray | None
    hidden: Tensor | None = None
    attended: Attended | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)


class _Flight:
    """A Work on its way through the layers."""

    def __init__(self, work: Work, x: Tensor) -> None:
        self.work, self.x = work, x
        self.rows = torch.arange(len(x))  # of the work, still alive
        self.attended = work.attended
        self.kept: dict[int, Tensor] = {}

    def drop(self, layer: int, kept: Tensor) -> None:
        """Go into `layer` with the rows of kept bool [rows] only."""
        self.x, self.rows, self.attended = self.x[kept], self.rows[kept], None
        self.kept[layer] = self.rows

    def recorded_at(self, layer: int) -> bool:
        """Whether the layer after this one chooses by the attention of this one."""
        return self.work.choice is not None and self.work.choice.reads_attention(layer + 1)

    def positions(self, segment: int) -> np.ndarray:
        """int64 [A, rows]: rotary positions of the rows."""
        if not self.work.compact[segment]:
            return self.work.positions[:, self.rows.numpy()]
        first = self.work.base[segment]
        return np.broadcast_to(np.arange(first, first + len(self.rows)), (len(self.work.positions), len(self.rows)))

    def filled(self, segment: int) -> np.ndarray:
        """int64 [A, base + rows]: positions of every slot up to the last row, where the family asks for them."""
        cached = self.work.cached[segment]
        assert cached is not None
        return np.concatenate([cached, self.positions(segment)], axis=1)


class _Batch:
    """The rows of several flights as one matrix: single rows first, which share one call of attention."""

    def __init__(self, flights: list[_Flight]) -> None:
        self.flights = sorted(flights, key=lambda flight: len(flight.rows) > 1 or flight.work.choice is not None)
        self.single = sum(len(flight.rows) == 1 and flight.work.choice is None for flight in flights)
        self.x = torch.cat([flight.x for flight in self.flights]) if len(flights) > 1 else flights[0].x
        self.ends = np.cumsum([len(flight.rows) for flight in self.flights]).tolist()

    def spans(self) -> list[tuple[_Flight, int, int]]:
        return list(zip(self.flights, [0, *self.ends], self.ends, strict=False))

    def give_back(self) -> None:
        for flight, begin, end in self.spans():
            flight.x = self.x[begin:end]


class _Slots:
    """Where the rows of a batch lie in one segment: slot int64 [layers, M]; of the single rows the tables int32 [layers, B, W] and lengths int32 [B].
    angles: of all slots, where the family asks for them; first [B, D, capacity] of the single rows, then [1, D, length] of each other flight.
    """

    def __init__(self, batch: _Batch, segment: int, places: int, family: Family) -> None:
        works = [flight.work for flight in batch.flights]
        singles = works[: batch.single]
        at = np.array([work.base[segment] for work in singles], dtype=np.int64)
        capacity = int(at.max(initial=-1)) + 1
        table = np.full((works[0].tables[segment].shape[0], len(singles), -(-capacity // places)), -1, dtype=np.int32)
        for row, work in enumerate(singles):
            pages = -(-(work.base[segment] + 1) // places)
            table[:, row, :pages] = work.tables[segment][:, :pages]
        slot = table[:, np.arange(len(at)), at // places].astype(np.int64) * places + at % places
        slot[:, at < [work.shared[segment] for work in singles]] = -1
        others = [_slots(f.work, segment, len(f.rows), places) for f in batch.flights[batch.single :]]
        self.slot = torch.from_numpy(np.concatenate([slot, *others], axis=1) if others else slot)
        self.table = torch.from_numpy(table)
        self.length = torch.from_numpy((at + 1).astype(np.int32))
        self.angles: list[Tensor] | None = self._angles(batch, segment, family, capacity) if family.biased else None

    def _angles(self, batch: _Batch, segment: int, family: Family, capacity: int) -> list[Tensor]:
        singles = np.zeros((family.axes, batch.single, capacity), dtype=np.int64)
        for row, flight in enumerate(batch.flights[: batch.single]):
            filled = flight.filled(segment)
            singles[:, row, : filled.shape[1]] = filled
        others = [flight.filled(segment)[:, None] for flight in batch.flights[batch.single :]]
        return [family.angles(torch.from_numpy(positions)) for positions in (singles, *others)]


def _slots(work: Work, segment: int, rows: int, places: int) -> np.ndarray:
    """int64 [layers, rows]; -1 where the content is there already."""
    first = work.base[segment]
    at = np.arange(first, first + rows)
    slot = work.tables[segment][:, at // places].astype(np.int64) * places + at % places
    slot[:, at < work.shared[segment]] = -1
    return slot


class Runner:
    """Runs works on one model and one pool. Nothing but the pool's own slots of a work is changed, so a step can be run again."""

    def __init__(self, family: Family, storage: KvStorage, segments: Segments) -> None:
        self.family, self.storage, self.segments = family, storage, segments
        self._segment_of = [s for s, span in enumerate(segments.spans) for _ in span]

    @torch.no_grad()
    def run(self, works: Sequence[Work]) -> list[Result]:
        """One result per work."""
        flights = [_Flight(work, x) for work, x in zip(works, self._inputs(works), strict=True)]
        events = {layer for work in works for layer in (work.enter, work.leave, *(work.choice.keep if work.choice is not None else ()))}
        compact = any(any(work.compact) for work in works)
        results: dict[int, Result] = {}
        batch: _Batch | None = None
        for layer, segment in enumerate(self._segment_of):
            if layer == self.segments.bounds[segment]:  # drops, entries and exits happen here only
                if layer in events:
                    batch = self._regroup(batch, [f for f in flights if f.work.enter <= layer < f.work.leave], layer)
                if batch is not None:
                    slots = _Slots(batch, segment, self.storage.places, self.family)
                    if layer in events or compact:
                        positions = np.concatenate([flight.positions(segment) for flight in batch.flights], axis=1)
                        rotary = self.family.rotary(torch.from_numpy(positions))
            if batch is not None:
                self._layer(layer, segment, batch, slots, rotary)
        if batch is not None:
            batch.give_back()
        self._logits(flights, results)
        return [results.get(id(f)) or Result(None, f.x, f.attended, f.kept) for f in flights]

    def _regroup(self, batch: _Batch | None, active: list[_Flight], layer: int) -> _Batch | None:
        """The batch that goes into `layer`, after what is dropped there."""
        if batch is not None:
            batch.give_back()
        for flight in active:
            self._choose(flight, layer)
        return _Batch(active) if active else None

    def _choose(self, flight: _Flight, layer: int) -> None:
        """Drop what is dropped at the input of `layer`."""
        choice = flight.work.choice
        if choice is None or layer not in choice.keep:
            return
        n = int((flight.rows < choice.selecting).sum())
        record = flight.attended.record(n, self.family.scaling) if flight.attended is not None else None
        module = self.family.decoder_layer(layer)
        flight.drop(layer, choice.kept_rows(layer, module, flight.x, flight.rows, record, lambda: self._own_record(flight, layer, n)))

    def _own_record(self, flight: _Flight, layer: int, rows: int) -> Record:
        """What the attention of `layer` makes of the first rows before any is dropped there; nothing is stored."""
        segment = self._segment_of[layer]
        positions = flight.positions(segment - 1)[:, :rows].copy()
        q, keys, values = self.family.project(layer, flight.x[:rows], self.family.rotary(torch.from_numpy(positions)))
        base = flight.work.base[segment]
        cached = (keys, values)
        if base:
            before = self.storage.read(self._table(flight, segment, 0, base), torch.tensor([base], dtype=torch.int32), base)
            cached = _joined(before[0], keys), _joined(before[1], values)
        angles = None
        if q.shape[-1] > self.family.head_dim:
            known = flight.work.cached[segment]
            assert known is not None
            angles = self.family.angles(torch.from_numpy(np.concatenate([known, positions], axis=1)[:, None]))
        _, lse = ops.kv4_attention(q, *cached, base + rows, torch.zeros(1, dtype=torch.int32), self.family.scaling, angles)
        return Attended(q, keys, lse, None if angles is None else angles[..., base:]).record(rows, self.family.scaling)

    def _table(self, flight: _Flight, segment: int, local: int, length: int) -> Tensor:
        """int32 [1, W]: the units of a flight's first `length` slots in one layer of a segment."""
        return torch.from_numpy(flight.work.tables[segment][local][None, : -(-length // self.storage.places)])

    def _inputs(self, works: Sequence[Work]) -> list[Tensor]:
        counts = [0 if work.hidden is not None else len(work.ids) for work in works]
        ids = [token for work in works if work.hidden is None for token in work.ids]
        embedded = iter(self.family.embed(torch.tensor(ids, dtype=torch.int64)).split([n for n in counts if n])) if ids else iter(())
        return [next(embedded) if work.hidden is None else work.hidden for work in works]

    def _logits(self, flights: list[_Flight], results: dict[int, Result]) -> None:
        done = [f for f in flights if f.work.leave == self.segments.layers]
        if done:
            rows = self.family.logits(torch.cat([f.x[-1:] for f in done])).numpy()
            results.update({id(f): Result(row, kept=f.kept) for f, row in zip(done, rows, strict=True)})

    def _layer(self, layer: int, segment: int, batch: _Batch, slots: _Slots, rotary: tuple[Tensor, Tensor]) -> None:
        local = layer - self.segments.bounds[segment]
        q, keys, values = self.family.project(layer, batch.x, rotary)
        self.storage.write(keys, values, slots.slot[local])
        outs = []
        if batch.single:
            rows = q[0, :, : batch.single].transpose(0, 1)[:, :, None].contiguous()
            out, _ = self.storage.attend(rows, slots.table[local], slots.length, self.family.scaling, self._shared(rows, slots, 0))
            outs.append(out.reshape(batch.single, -1))
        for number, (flight, begin, end) in enumerate(batch.spans()[batch.single :], start=1):
            outs.append(self._attend(flight, layer, segment, q[:, :, begin:end].contiguous(), _cut(keys, begin, end), self._shared(q, slots, number)))
        batch.x = self.family.finish(layer, batch.x, torch.cat(outs) if len(outs) > 1 else outs[0])

    def _shared(self, q: Tensor, slots: _Slots, number: int) -> Tensor | None:
        """The angles for queries q, where these are wide."""
        return slots.angles[number] if slots.angles is not None and q.shape[-1] > self.family.head_dim else None

    def _attend(self, flight: _Flight, layer: int, segment: int, q: Tensor, new: Kv, angles: Tensor | None) -> Tensor:
        """Several rows of one request: q [1, H, n, ...], their own packed keys, angles [1, D, length] of all slots -> [n, H * D]."""
        work, rows = flight.work, q.shape[2]
        length = work.base[segment] + rows
        table = self._table(flight, segment, layer - self.segments.bounds[segment], length)
        out, lse = self.storage.attend(q, table, torch.tensor([length], dtype=torch.int32), self.family.scaling, angles)
        own = None if angles is None else angles[..., work.base[segment] :]
        flight.attended = Attended(q, new, lse, own) if flight.recorded_at(layer) else None
        return out.reshape(rows, -1)


def _joined(first: Kv, second: Kv) -> Kv:
    q, scale, zero = (torch.cat(pair, 2) for pair in zip(first, second, strict=True))
    return q, scale, zero


def _cut(packed: Kv, begin: int, end: int) -> Kv:
    q, scale, zero = (t[:, :, begin:end] for t in packed)
    return q, scale, zero
