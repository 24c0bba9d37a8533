"""The decode step: the next token of every decoding request, as a function of static buffers.

All a step reads is in one `Buffers` and the pool, and nothing in it waits for the device. So on a GPU a step is
captured as a CUDA graph, one per number of rows and width of tables, both rounded up to powers of two, and replayed;
rows that fill a graph up store nothing and see nothing. On a CPU the same function runs on buffers of exactly the size
asked for. No row depends on the others, so both give every row the bits it has alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from quota import ops
from quota.core.errors import UsageError
from quota.core.formats import DEFAULT, Scheme
from quota.core.registry import Context
from quota.models.quantize import linear_class
from quota.nn.kv import kv_kind
from quota.runtime.engine.chunk import Chunk
from quota.runtime.engine.kv_storage import KvStorage
from quota.runtime.engine.model import EngineModel
from quota.runtime.engine.sampling import Logits, Row
from quota.runtime.engine.segments import Segments

OPS = (ops.rms_norm, ops.float_linear)
"""What a decode step calls besides the scheme's linears and the ops of its cache."""

Step = Callable[[], tuple[Tensor, Tensor]]
Capture = Callable[[Step], Step]

_ALIGNMENT = 16  # bytes, of every buffer


def chosen(device: torch.device, scheme: Scheme = DEFAULT) -> dict[str, str]:
    """Op -> the implementation a decode step of a scheme on `device` uses. UsageError where a GPU has none or is
    told to run a reference, which reads lengths on the host."""
    ctx = Context(device.type, device.index or 0)
    called = (*OPS, *kv_kind(scheme.kv).page_ops, *linear_class(scheme).OPS)
    found = {op.name: op.choose(ctx).name for op in called}
    forced = next((name for name, implementation in found.items() if implementation == "ref"), None)
    if device.type != "cpu" and forced is not None:
        raise UsageError(
            f"QUOTA_IMPL: {forced}=ref cannot decode on {device}: a reference reads lengths on the host; leave it out,"
            " or serve on the CPU"
        )
    return found


def describe(device: torch.device) -> str:
    """One line for `quota doctor`."""
    try:
        found = chosen(device)
    except UsageError as error:
        return str(error)
    return (
        f"{'eager' if device.type == 'cpu' else 'CUDA graphs'}, pages read in place by {found['kv4_paged_attention']},"
        f" head by {found['float_linear']}"
    )


def cuda_graphs(device: torch.device) -> Capture:
    """Runs a step once, which packs weights and compiles kernels, then captures it; what comes back replays it into the
    same outputs. Graphs share memory: one step's outputs hold until the next step."""
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=pool, capture_error_mode="thread_local"
            ):  # other threads may use the device meanwhile
                outputs = step()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return outputs

        return replay

    return capture


class Buffers:
    """Inputs of a step of B rows whose tables have W pages: ids int64 [B]; per segment rotary positions int64 [S, A, B]
    and lengths int32 [S, B], the new token included; per layer tables int32 [L, B, W] and slots int64 [L, B]; where the
    family asks for them, positions of all slots int64 [S, A, B, W * P]. They lie in one piece of memory, on the host
    and on the device, so a step is told everything in one copy.
    """

    def __init__(self, model: EngineModel, segments: Segments, rows: int, width: int, page_size: int) -> None:
        self.rows, self.width, self.page_size, self.segments = rows, width, page_size, segments
        count, axes = len(segments), model.axes
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "ids": (torch.int64, (rows,)),
            "positions": (torch.int64, (count, axes, rows)),
            "slot": (torch.int64, (segments.layers, rows)),
            "cached": (torch.int64, (count, axes, rows, width * page_size if model.biased else 0)),
            "table": (torch.int32, (segments.layers, rows, width)),
            "length": (torch.int32, (count, rows)),
        }
        on_gpu = model.device.type == "cuda"
        sizes = {
            name: -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            for name, (dtype, shape) in shapes.items()
        }
        self._host = torch.zeros(sum(sizes.values()), dtype=torch.uint8, pin_memory=on_gpu)
        self._device = (
            self._host
            if model.device.type == "cpu"
            else torch.zeros(len(self._host), dtype=torch.uint8, device=model.device)
        )
        host: dict[str, np.ndarray] = {}
        device: dict[str, Tensor] = {}
        begin = 0
        for name, (dtype, shape) in shapes.items():
            end = begin + math.prod(shape) * dtype.itemsize
            host[name], device[name] = (
                self._host[begin:end].view(dtype).view(shape).numpy(),
                self._device[begin:end].view(dtype).view(shape),
            )
            begin += sizes[name]
        self._ids, self._positions, self._slot, self._cached, self._table, self._length = (
            host[name] for name in shapes
        )
        self.ids, self.positions, self.slot, self.cached, self.table, self.length = (device[name] for name in shapes)

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """The rows of these chunks, at most as many as there are, then rows without work."""
        n, page_size, biased = len(chunks), self.page_size, self._cached.shape[-1] > 0
        self._ids[:n], self._ids[n:] = [chunk.ids[0] for chunk in chunks], 0
        self._slot[:, n:] = -1
        self._table[:], self._length[:, n:], self._positions[..., n:], self._cached[:] = 0, 0, 0, 0
        for segment, span in enumerate(self.segments.spans):
            layers = slice(span[0], span[-1] + 1)
            for row, chunk in enumerate(chunks):
                at = chunk.base[segment]
                blocks = chunk.tables[segment][:, : at // page_size + 1]
                self._table[layers, row, : blocks.shape[1]] = blocks
                self._slot[layers, row] = (
                    -1
                    if at < chunk.shared[segment]
                    else blocks[:, at // page_size].astype(np.int64) * page_size + at % page_size
                )
                self._length[segment, row] = at + 1
                self._positions[segment, :, row] = position = (
                    chunk.origin + at if chunk.compact[segment] else chunk.rotary[:, 0]
                )
                if biased:
                    self._cached[segment, :, row, :at], self._cached[segment, :, row, at] = (
                        chunk.cached[segment],
                        position,
                    )
        if self._device is not self._host:
            self._device.copy_(
                self._host, non_blocking=True
            )  # the host writes again only after it has fetched this step's tokens


class Decoder:
    """Runs decode steps on one model and one pool. capture: what makes a step replayable, for buffers that stay; None
    runs it anew each time."""

    def __init__(self, model: EngineModel, storage: KvStorage, segments: Segments, capture: Capture | None) -> None:
        self.model, self.storage, self.segments, self.capture = model, storage, segments, capture
        self._ready: dict[tuple[int, int], tuple[Buffers, Step]] = {}

    def run(self, chunks: Sequence[Chunk]) -> list[Row]:
        """The logits after each work, all of which decode."""
        pages = max(max(chunk.base) for chunk in chunks) // self.storage.page_size + 1
        buffers, step = self._prepared(len(chunks), pages, chunks)
        buffers.fill(chunks)
        values, likeliest = step()
        return Logits(values, likeliest).rows(len(chunks))

    def _prepared(self, rows: int, pages: int, chunks: Sequence[Chunk]) -> tuple[Buffers, Step]:
        size = (rows, pages) if self.capture is None else (_power(rows), _power(pages))
        found = self._ready.get(size)
        if found is None:
            buffers = Buffers(self.model, self.segments, *size, self.storage.page_size)
            step = self.step_on(buffers)
            if self.capture is None:
                self._ready.clear()  # sizes change as answers grow
            else:
                buffers.fill(chunks)
                step = self.capture(step)
            found = self._ready[size] = buffers, step
        return found

    def step_on(self, buffers: Buffers) -> Step:
        """The step as a function of these buffers -> logits float32 [B, vocabulary], the likeliest token int64 [B]."""
        model, storage = self.model, self.storage

        def step() -> tuple[Tensor, Tensor]:
            x = model.embed(buffers.ids)
            for segment, span in enumerate(self.segments.spans):
                rotary, length = model.rotary(buffers.positions[segment]), buffers.length[segment]
                angles = model.angles(buffers.cached[segment]) if model.biased else None
                for layer in span:
                    q, keys, values = model.project(layer, x, rotary)
                    storage.write(keys, values, buffers.slot[layer])
                    q = q.transpose(0, 2)  # [B, H, 1, D]
                    shared = angles if q.shape[-1] > model.head_dim else None
                    out, _ = storage.attend(q, buffers.table[layer], length, model.scaling, shared)
                    x = model.finish(layer, x, out.view(buffers.rows, -1))
            logits = model.logits(x)
            return logits, logits.argmax(-1)

        return step


def _power(n: int) -> int:
    """The power of two from n on."""
    return 1 << (n - 1).bit_length()
