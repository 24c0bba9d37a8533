"""One step of the model for a mixed batch: requests that decode go through `Decoder`, rows of prefills through the
decoder layers together, here.

Linear layers, norms and feed-forward blocks see one matrix of rows; attention and the choice of tokens see requests. No
result depends on what else is in the batch: a row's dot products are exact integers or chains in a fixed order,
whatever the number of rows and threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quota import ops
from quota.nn.attention import AttentionTrace
from quota.ops.weights import Kv
from quota.runtime.engine.decode import Decoder
from quota.runtime.engine.forward_batch import Result, Work
from quota.runtime.engine.kv_storage import KvStorage
from quota.runtime.engine.model import EngineModel
from quota.runtime.engine.sampling import Logits
from quota.runtime.engine.segments import Segments
from quota.runtime.engine.selection import Attended


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
    """The rows of several flights as one matrix."""

    def __init__(self, flights: list[_Flight]) -> None:
        self.flights = flights
        self.x = torch.cat([flight.x for flight in flights]) if len(flights) > 1 else flights[0].x
        self.ends = np.cumsum([len(flight.rows) for flight in flights]).tolist()

    def spans(self) -> list[tuple[_Flight, int, int]]:
        return list(zip(self.flights, [0, *self.ends], self.ends, strict=False))

    def give_back(self) -> None:
        for flight, begin, end in self.spans():
            flight.x = self.x[begin:end]


class _Slots:
    """Where the rows of a batch lie in one segment: slot int64 [layers, M]; of each flight the tables int32 [layers, 1,
    W], length int32 [1] and, where the family asks for them, angles [1, D, length] of all slots.
    """

    def __init__(self, batch: _Batch, segment: int, page_size: int, model: EngineModel) -> None:
        works = [(flight.work, len(flight.rows)) for flight in batch.flights]
        slots = [_slots(work, segment, rows, page_size) for work, rows in works]
        ends = [work.base[segment] + rows for work, rows in works]
        self.slot = _on(np.concatenate(slots, axis=1), model)
        self.tables = [
            _on(work.tables[segment][:, None, : -(-end // page_size)], model)
            for (work, _), end in zip(works, ends, strict=True)
        ]
        self.lengths = _on(np.array(ends, dtype=np.int32), model).split(1)
        self.angles = (
            [model.angles(_on(flight.filled(segment)[:, None], model)) for flight in batch.flights]
            if model.biased
            else None
        )


def _on(array: np.ndarray, model: EngineModel) -> Tensor:
    """A copy on the model's device, or on the host the array itself."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(model.device)


def _slots(work: Work, segment: int, rows: int, page_size: int) -> np.ndarray:
    """int64 [layers, rows]; -1 where the content is there already."""
    first = work.base[segment]
    at = np.arange(first, first + rows)
    slot = work.tables[segment][:, at // page_size].astype(np.int64) * page_size + at % page_size
    slot[:, at < work.shared[segment]] = -1
    return slot


class Runner:
    """Runs works on one model and one pool. Nothing but the pool's own slots of a work is changed, so a step can be run
    again."""

    def __init__(self, model: EngineModel, storage: KvStorage, segments: Segments, decoder: Decoder) -> None:
        self.model, self.storage, self.segments, self.decoder = model, storage, segments, decoder
        self._segment_of = [s for s, span in enumerate(segments.spans) for _ in span]

    @torch.no_grad()
    def run(self, works: Sequence[Work]) -> list[Result]:
        """One result per work."""
        decoding = [work.decodes(self.segments.layers) for work in works]
        single = [work for work, decodes in zip(works, decoding, strict=True) if decodes]
        others = [work for work, decodes in zip(works, decoding, strict=True) if not decodes]
        decoded = iter([Result(row) for row in self.decoder.run(single)] if single else ())
        prefilled = iter(self._prefill(others) if others else ())
        return [next(decoded if decodes else prefilled) for decodes in decoding]

    def _prefill(self, works: Sequence[Work]) -> list[Result]:
        flights = [_Flight(work, x) for work, x in zip(works, self._inputs(works), strict=True)]
        events = {
            layer
            for work in works
            for layer in (work.enter, work.leave, *(work.choice.keep if work.choice is not None else ()))
        }
        compact = any(any(work.compact) for work in works)
        results: dict[int, Result] = {}
        batch: _Batch | None = None
        for layer, segment in enumerate(self._segment_of):
            if layer == self.segments.bounds[segment]:  # drops, entries and exits happen here only
                if layer in events:
                    batch = self._regroup(batch, [f for f in flights if f.work.enter <= layer < f.work.leave], layer)
                if batch is not None:
                    slots = _Slots(batch, segment, self.storage.page_size, self.model)
                    if layer in events or compact:
                        positions = np.concatenate([flight.positions(segment) for flight in batch.flights], axis=1)
                        rotary = self.model.rotary(_on(positions, self.model))
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
        trace = flight.attended.trace(n, self.model.scaling) if flight.attended is not None else None
        module = self.model.decoder_layer(layer)
        flight.drop(
            layer,
            choice.kept_rows(layer, module, flight.x, flight.rows, trace, lambda: self._own_record(flight, layer, n)),
        )

    def _own_record(self, flight: _Flight, layer: int, rows: int) -> AttentionTrace:
        """What the attention of `layer` makes of the first rows before any is dropped there; nothing is stored."""
        segment = self._segment_of[layer]
        positions = flight.positions(segment - 1)[:, :rows]
        q, keys, values = self.model.project(layer, flight.x[:rows], self.model.rotary(_on(positions, self.model)))
        base = flight.work.base[segment]
        cached = (keys, values)
        if base:
            table = _on(flight.work.tables[segment][:1, : -(-base // self.storage.page_size)], self.model)
            before = self.storage.read(table, _on(np.array([base], dtype=np.int32), self.model), base)
            cached = _joined(before[0], keys), _joined(before[1], values)
        angles = None
        if q.shape[-1] > self.model.head_dim:
            known = flight.work.cached[segment]
            assert known is not None
            angles = self.model.angles(_on(np.concatenate([known, positions], axis=1)[:, None], self.model))
        _, lse = ops.kv4_attention(q, *cached, base + rows, None, self.model.scaling, angles)
        return Attended(q, keys, lse, None if angles is None else angles[..., base:]).trace(rows, self.model.scaling)

    def _inputs(self, works: Sequence[Work]) -> list[Tensor]:
        counts = [0 if work.hidden is not None else len(work.ids) for work in works]
        ids = [token for work in works if work.hidden is None for token in work.ids]
        embedded = (
            iter(self.model.embed(torch.tensor(ids, dtype=torch.int64)).split([n for n in counts if n]))
            if ids
            else iter(())
        )
        return [next(embedded) if work.hidden is None else work.hidden for work in works]

    def _logits(self, flights: list[_Flight], results: dict[int, Result]) -> None:
        done = [f for f in flights if f.work.leave == self.segments.layers]
        if done:
            values = self.model.logits(torch.cat([f.x[-1:] for f in done]))
            rows = Logits(values, values.argmax(-1)).rows(len(done))
            results.update({id(f): Result(row, kept=f.kept) for f, row in zip(done, rows, strict=True)})

    def _layer(self, layer: int, segment: int, batch: _Batch, slots: _Slots, rotary: tuple[Tensor, Tensor]) -> None:
        local = layer - self.segments.bounds[segment]
        q, keys, values = self.model.project(layer, batch.x, rotary)
        self.storage.write(keys, values, slots.slot[local])
        outs = []
        for number, (flight, begin, end) in enumerate(batch.spans()):
            own = q[:, :, begin:end].contiguous()
            angles = slots.angles[number] if slots.angles is not None and q.shape[-1] > self.model.head_dim else None
            out, lse = self.storage.attend(
                own, slots.tables[number][local], slots.lengths[number], self.model.scaling, angles
            )
            outs.append(out.view(end - begin, -1))
            flight.attended = None
            if flight.recorded_at(layer):
                near = None if angles is None else angles[..., flight.work.base[segment] :]
                flight.attended = Attended(own, _cut(keys, begin, end), lse, near)
        batch.x = self.model.finish(layer, batch.x, torch.cat(outs) if len(outs) > 1 else outs[0])


def _joined(first: Kv, second: Kv) -> Kv:
    q, scale, zero = (torch.cat(pair, 2) for pair in zip(first, second, strict=True))
    return q, scale, zero


def _cut(packed: Kv, begin: int, end: int) -> Kv:
    q, scale, zero = (t[:, :, begin:end] for t in packed)
    return q, scale, zero
