"""What a calibration will take: tokens, memory, disk and time, known before it starts.

The time is an estimate: the work of every step at the speed at which this machine does such work, timed for a moment
before (`quota.calib.speed`). The progress bar counts the same work.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from quota.calib.learn import split
from quota.calib.settings import METHODS, Method, Settings
from quota.calib.speed import Speed
from quota.core.formats import Scheme
from quota.core.shards import DEFAULT_SHARD_BYTES
from quota.models.base import Family
from quota.models.groups import Part
from quota.quant.transform import decompose

# Fitted on the embedded LLaVA's blocks, one thread: what a look costs of a learning step's rounding.
_LOOK = 0.4
_COLUMN = 0.05  # what rounding a column of a weight alone costs of a group in a step: its operations, counted
_LIBRARIES = 64 << 20  # bytes of optimiser, code and allocator that appear with the first step
_DEVICE_LIBRARIES = 3 << 30  # of the host, that CUDA's libraries and its context take; assumed


@dataclass(frozen=True)
class Plan:
    """tokens: of all samples, images included, before any drop. images: of the samples. blocks: quantized,
    blocks_all: passed through.

    Bytes: peak_memory of the process, device_memory of `device` (0: that is the CPU), disk_needed at the fullest moment
    (streams, finished blocks and the result together), disk_free where they go. seconds: an estimate; by: for what, in
    words.
    """

    samples: int
    images: int
    tokens: int
    blocks: int
    blocks_all: int
    peak_memory: int
    device: str
    device_memory: int
    disk_needed: int
    disk_free: int
    seconds: float
    by: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same as text."""
        apart = f", and {_size(self.device_memory)} on {self.device}" if self.device_memory else ""
        return [
            f"samples   {self.samples} ({self.images} images), {self.tokens} tokens",
            f"blocks    {self.blocks} quantized of {self.blocks_all}",
            f"memory    at most about {_size(self.peak_memory)}{apart} (an estimate)",
            f"disk      about {_size(self.disk_needed)} needed, {_size(self.disk_free)} free",
            f"time      about {duration(self.seconds)} {self.by} (an estimate)",
        ]


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class BlockSize:
    """Sizes of one block: its projection groups' (outputs, inputs), all its parameters, the width of its output, and
    its attention heads (0: it has none)."""

    groups: tuple[tuple[int, int], ...]
    parameters: int
    width: int
    heads: int

    @classmethod
    def of(cls, module: nn.Module, family: Family, kind: Part) -> BlockSize:
        """Works on meta tensors."""
        linears: list[list[Any]] = [[module.get_submodule(part) for part in plan.parts] for plan in family.groups[kind]]
        groups = tuple((sum(linear.out_features for linear in parts), parts[0].in_features) for parts in linears)
        width = family.vision_hidden_size if kind == "vision" else family.hidden_size
        attention: Any = None if kind == "projector" else module.get_submodule(family.attention[kind])
        heads = 0 if attention is None else width // attention.head_dim
        return cls(groups, sum(p.numel() for p in module.parameters()), width, heads)

    @property
    def linear(self) -> int:
        """Parameters of its linears."""
        return sum(n * k for n, k in self.groups)

    def rounded(self, rows: int) -> int:
        """Elements that a quantized pass over so many rows rounds: what the groups read, their weights, and what
        attention reads."""
        return rows * sum(k for _, k in self.groups) + self.linear + (3 * rows * self.width if self.heads else 0)

    def written(self, rows: int) -> int:
        """Elements that a float pass over so many rows writes: outputs of groups, norms, activations, residuals."""
        return rows * (sum(n for n, _ in self.groups) + 8 * self.width)

    def quantized_bytes(self, scheme: Scheme) -> int:
        """At most what the exported block takes in a file: packed weights, scales, transforms or zeros, and what stays
        float32."""
        assert scheme.weights is not None
        total = 4 * (self.parameters - self.linear) + 1024
        for outputs, inputs in self.groups:
            left, right = decompose(inputs) if scheme.transforms else (0, 0)
            total += outputs * (scheme.weights.vector_bytes(inputs) + 12)
            total += 4 * (left * left + right * right + inputs) + 1024
        return total


def block_seconds(
    size: BlockSize, lengths: Sequence[int], method: Method | None, settings: Settings, speed: Speed
) -> tuple[float, float]:
    """(passing the samples through the float block, calibrating it) in seconds. lengths: rows of each item. method
    None: it stays float."""
    rows, items, linear = sum(lengths), max(1, len(lengths)), size.linear
    attention = 2 * size.width * sum(n * n for n in lengths) if size.heads else 0
    search = 0.0
    if method is not None:
        seen = min(rows, settings.search_rows)
        search = (
            method.searches * speed.search_s * size.rounded(seen) + method.products * seen * linear / speed.products
        )
        if method.factored:
            search += sum(k**3 / speed.products + _COLUMN * speed.call_s * k for _, k in size.groups)
    if not lengths:
        return 0.0, search

    streams = 1 if settings.learns_from == "float" else 2
    # on the host: the block's weights, 16 bits each, and rows in and out
    row_s = 4 * size.width * speed.byte_s
    moved = 2 * size.parameters * speed.byte_s + streams * 2 * rows * row_s

    def forward(share: float) -> float:
        return share * ((rows * linear + attention) / speed.products + size.written(rows) * speed.element_s)

    calls = len(size.groups) * speed.call_s
    passing = streams * (forward(1.0) + -(-items // settings.batch) * calls) + moved
    if method is None:
        return passing, 0.0
    held = len(split(items, settings.held_out)[1]) / items
    if not method.learns:
        return passing, (method.observed + 2 * held) * forward(1.0) + search
    looks = 4 + -(-settings.steps // settings.evaluate_every)
    look = forward(held) + _LOOK * speed.round_s * size.rounded(int(held * rows)) + calls
    taken = min(1.0, settings.batch / items)
    step = 3 * forward(taken) + speed.round_s * size.rounded(int(taken * rows)) + calls + 2 * taken * rows * row_s
    return passing, looks * look + settings.steps * step + search


def learning_memory(sizes: Sequence[BlockSize], widest: int, settings: Settings) -> int:
    """Bytes that the largest of these blocks takes in float32 while it is calibrated. widest: rows of the longest
    item. An upper bound: a rounded element is held in a dozen forms until the backward pass has used it, a weight in
    eight."""
    return max((_inside(size, settings.batch * widest, widest, settings) for size in sizes), default=0)


def peak_memory(
    sizes: Sequence[BlockSize], widest: int, settings: Settings, written: int, crew: int
) -> tuple[int, int]:
    """(bytes of the process, bytes on the device) at their fullest: `crew` blocks being learned in float32, or the
    shard being written, above what is resident now. widest: rows of the longest item. On the CPU all of it is the
    process's, on another device a block as it is stored and the batches that are on their way remain here."""
    rows = settings.batch * widest
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + _LIBRARIES
    blocks = crew * learning_memory(sizes, widest, settings)
    shard = 2 * min(written, DEFAULT_SHARD_BYTES)
    if settings.on_cpu:
        return now + max(blocks, shard), 0
    staged = max((4 * size.parameters + 4 * 6 * rows * max(k for _, k in size.groups) for size in sizes), default=0)
    return now + _DEVICE_LIBRARIES + max(staged, shard), blocks


def _inside(size: BlockSize, rows: int, widest: int, settings: Settings) -> int:
    """Bytes of a block of `size` being calibrated on batches of so many rows."""
    held = 12 * (size.rounded(rows) - size.linear) + 8 * size.parameters + 2 * size.written(rows)
    held += 2 * size.heads * settings.batch * widest**2
    inputs = [k for _, k in size.groups]
    seen = 8 * widest * sum(inputs)  # of up to eight items, by which the start is searched
    if METHODS[settings.method].factored:  # float64: a matrix of every group, and one in the forms of its inversion
        seen = 2 * (sum(k * k for k in inputs) + 6 * max(inputs) ** 2)
    return 4 * (held + seen)
