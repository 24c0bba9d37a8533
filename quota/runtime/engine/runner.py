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

from quota.nn.attention import AttentionTrace, seeing_all
from quota.nn.kv import Stored
from quota.runtime.engine.chunk import Chunk
from quota.runtime.engine.decode import Decoder
from quota.runtime.engine.kv_storage import KvStorage
from quota.runtime.engine.model import EngineModel
from quota.runtime.engine.sampling import Logits, Row
from quota.runtime.engine.segments import Segments
from quota.runtime.engine.selection import Attended


class _Batch:
    """The rows of several chunks as one matrix."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self.x = torch.cat([chunk.hidden for chunk in chunks]) if len(chunks) > 1 else chunks[0].hidden
        self.ends = np.cumsum([len(chunk.rows) for chunk in chunks]).tolist()

    def spans(self) -> list[tuple[Chunk, int, int]]:
        return list(zip(self.chunks, [0, *self.ends], self.ends, strict=False))

    def keep_last(self) -> None:
        """Drop all rows but the last of each chunk."""
        last = [self.x[max(begin, end - 1) : end] for _, begin, end in self.spans()]
        self.x, self.ends = torch.cat(last), np.cumsum([len(row) for row in last]).tolist()

    def give_back(self) -> None:
        for chunk, begin, end in self.spans():
            chunk.x = self.x[begin:end]


class _Slots:
    """Slots of the rows of a batch in one segment: slot int64 [layers, M]; of each chunk the tables int32 [layers, 1,
    W], length int32 [1] and, where the family asks for them, angles [1, D, length] of all slots.
    """

    def __init__(self, batch: _Batch, segment: int, page_size: int, model: EngineModel) -> None:
        slots = [chunk.slots(segment, page_size) for chunk in batch.chunks]
        ends = [chunk.base[segment] + len(chunk.rows) for chunk in batch.chunks]
        self.slot = _on(np.concatenate(slots, axis=1), model)
        self.tables = [
            _on(chunk.tables[segment][:, None, : -(-end // page_size)], model)
            for chunk, end in zip(batch.chunks, ends, strict=True)
        ]
        self.lengths = _on(np.array(ends, dtype=np.int32), model).split(1)
        self.angles = (
            [model.angles(_on(chunk.filled(segment)[:, None], model)) for chunk in batch.chunks]
            if model.biased
            else None
        )


def _on(array: np.ndarray, model: EngineModel) -> Tensor:
    """A copy on the model's device, or on the host the array itself."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(model.device)


class Runner:
    """Runs chunks on one model and one pool. Beside the chunks nothing is changed but their own slots of the pool, so
    chunks that are filled in anew can be run again."""

    def __init__(self, model: EngineModel, storage: KvStorage, segments: Segments, decoder: Decoder) -> None:
        self.model, self.storage, self.segments, self.decoder = model, storage, segments, decoder
        self._segment_of = [s for s, span in enumerate(segments.spans) for _ in span]

    @torch.no_grad()
    def run(self, chunks: Sequence[Chunk]) -> list[Row | None]:
        """For each chunk the logits of its last row where it passed the last layer; hidden states, attention
        traces and kept tokens are left in the chunk."""
        decoding = [chunk.decodes(self.segments.layers) for chunk in chunks]
        single = [chunk for chunk, decodes in zip(chunks, decoding, strict=True) if decodes]
        others = [chunk for chunk, decodes in zip(chunks, decoding, strict=True) if not decodes]
        decoded = iter(self.decoder.run(single) if single else ())
        prefilled = iter(self._prefill(others) if others else ())
        return [next(decoded) if decodes else next(prefilled) for decodes in decoding]

    def _prefill(self, chunks: Sequence[Chunk]) -> list[Row | None]:
        for chunk, x in zip(chunks, self._inputs(chunks), strict=True):
            chunk.go_in(x)
        events = {
            layer
            for chunk in chunks
            for layer in (chunk.enter, chunk.leave, *(chunk.choice.keep if chunk.choice is not None else ()))
        }
        compact = any(any(chunk.compact) for chunk in chunks)
        batch: _Batch | None = None
        for layer, segment in enumerate(self._segment_of):
            if layer == self.segments.bounds[segment]:  # drops, entries and exits happen here only
                if layer in events:
                    active = [chunk for chunk in chunks if chunk.enter <= layer < chunk.leave]
                    batch = self._regroup(batch, active, layer)
                if batch is not None:
                    slots = _Slots(batch, segment, self.storage.page_size, self.model)
                    if layer in events or compact:
                        positions = np.concatenate([chunk.positions(segment) for chunk in batch.chunks], axis=1)
                        rotary = self.model.rotary(_on(positions, self.model))
            if batch is not None:
                self._layer(layer, segment, batch, slots, rotary)
        if batch is not None:
            batch.give_back()
        return self._logits(chunks)

    def _regroup(self, batch: _Batch | None, active: list[Chunk], layer: int) -> _Batch | None:
        """The batch that goes into `layer`, after what is dropped there."""
        if batch is not None:
            batch.give_back()
        for chunk in active:
            self._choose(chunk, layer)
        return _Batch(active) if active else None

    def _choose(self, chunk: Chunk, layer: int) -> None:
        """Drop what is dropped at the input of `layer`."""
        choice = chunk.choice
        if choice is None or layer not in choice.keep:
            return
        n = int((chunk.rows < choice.selecting).sum())
        trace = chunk.attended.trace(n, self.model.scaling) if chunk.attended is not None else None
        module, x = self.model.decoder_layer(layer), chunk.hidden[:, : self.model.width]
        kept = choice.kept_rows(layer, module, x, chunk.rows, trace, lambda: self._own_record(chunk, layer, n))
        chunk.drop(layer, kept)

    def _own_record(self, chunk: Chunk, layer: int, rows: int) -> AttentionTrace:
        """What the attention of `layer` makes of the first rows before any is dropped there; nothing is stored."""
        segment = self._segment_of[layer]
        positions = chunk.positions(segment - 1)[:, :rows]
        x = chunk.hidden[:rows, : self.model.width]
        q, keys, values = self.model.project(layer, x, self.model.rotary(_on(positions, self.model)))
        base = chunk.base[segment]
        cached = (keys, values)
        if base:
            table = _on(chunk.tables[segment][:1, : -(-base // self.storage.page_size)], self.model)
            before = self.storage.read(table, _on(np.array([base], dtype=np.int32), self.model), base)
            cached = _joined(before[0], keys), _joined(before[1], values)
        angles = None
        if q.shape[-1] > self.model.head_dim:
            known = chunk.cached[segment]
            assert known is not None
            angles = self.model.angles(_on(np.concatenate([known, positions], axis=1)[:, None], self.model))
        kind, scaling = self.model.kv, self.model.scaling
        _, lse = (
            seeing_all(lambda one: kind.attend(one, *cached, base + rows, None, scaling), q)
            if chunk.prefix
            else kind.attend(q, *cached, base + rows, None, scaling, angles)
        )
        near = None if angles is None else angles[..., base:]
        return Attended(kind, q, keys, lse, near).trace(rows, scaling)

    def _inputs(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        counts = [0 if chunk.x is not None else len(chunk.ids) for chunk in chunks]
        ids = [token for chunk in chunks if chunk.x is None for token in chunk.ids]
        embedded = (
            iter(self.model.embed(torch.tensor(ids, dtype=torch.int64)).split([n for n in counts if n]))
            if ids
            else iter(())
        )
        return [self.model.with_planes(next(embedded)) if chunk.x is None else chunk.x for chunk in chunks]

    def _logits(self, chunks: Sequence[Chunk]) -> list[Row | None]:
        done = [chunk.leave == self.segments.layers for chunk in chunks]
        if not any(done):
            return [None] * len(done)
        last = [chunk.hidden[-1:] for chunk, through in zip(chunks, done, strict=True) if through]
        values = self.model.logits(torch.cat(last))
        rows = iter(Logits(values, values.argmax(-1)).rows(len(last)))
        return [next(rows) if through else None for through in done]

    def _layer(self, layer: int, segment: int, batch: _Batch, slots: _Slots, rotary: tuple[Tensor, Tensor]) -> None:
        local, final = layer - self.segments.bounds[segment], layer == self.segments.layers - 1
        x, planes = batch.x[:, : self.model.width], batch.x[:, self.model.width :]
        q, keys, values = self.model.project(layer, x, rotary)
        self.storage.write(keys, values, slots.slot[local])
        outs = []
        for number, (chunk, begin, end) in enumerate(batch.spans()):
            first = max(begin, end - 1) if final else begin  # nothing reads the last layer but logits
            own = q[:, :, first:end].contiguous()
            angles = slots.angles[number] if slots.angles is not None and q.shape[-1] > self.model.head_dim else None
            table, length = slots.tables[number][local], slots.lengths[number]
            whole = 0 if final else chunk.whole  # a last row sees every slot in any case
            out, lse = self._attend(own, table, length, whole, angles)
            outs.append(out.reshape(end - first, -1))
            chunk.attended = None
            if chunk.recorded_at(layer):
                near = None if angles is None else angles[..., chunk.base[segment] :]
                chunk.attended = Attended(self.model.kv, own, _cut(keys, begin, end), lse, near)
        if final:
            batch.keep_last()
            x, planes = batch.x[:, : self.model.width], batch.x[:, self.model.width :]
        x = self.model.finish(layer, x, torch.cat(outs) if len(outs) > 1 else outs[0])
        batch.x = self.model.raised(x, planes)

    def _attend(
        self, q: Tensor, table: Tensor, length: Tensor, whole: int, angles: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `KvStorage.attend`; the first `whole` queries see each other."""
        scaling = self.model.scaling
        if not whole:
            return self.storage.attend(q, table, length, scaling, angles)
        rest = q[:, :, whole:].contiguous()
        seen = length - rest.shape[2]
        first = seeing_all(lambda one: self.storage.attend(one, table, seen, scaling, angles), q[:, :, :whole])
        if not rest.shape[2]:
            return first
        causal = self.storage.attend(rest, table, length, scaling, angles)
        return torch.cat([first[0], causal[0]], 1), torch.cat([first[1], causal[1]], 2)


def _joined(first: Stored, second: Stored) -> Stored:
    return tuple(torch.cat(pair, 2) for pair in zip(first, second, strict=True))


def _cut(stored: Stored, begin: int, end: int) -> Stored:
    return tuple(t[:, :, begin:end] for t in stored)
