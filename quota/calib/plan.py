"""What a calibration will take: tokens, memory, disk and time, known before it starts.

The time is a rough estimate: the multiply-adds of every step at the speed of a matrix product measured here. The
progress bar counts the same work.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from quota.calib.learn import split
from quota.calib.settings import Settings
from quota.core.checkpoint import DEFAULT_SHARD_BYTES
from quota.quant.transform import decompose

# Rough estimates, not fitted to runs: how many times the products quantizing in the graph costs, and the seconds of a
# call of a block besides them.
_LEARNING, _CALL_S = 2.5, 2e-3
_SEARCHES = {
    "flatquant": 12,
    "gptq": 4,
    "awq": 40,
    "rtn": 2,
}  # as rough: products with a block's own weights that searching or factoring costs, in search_rows


@dataclass(frozen=True)
class Plan:
    """tokens: of all samples, images included, before any drop. images: of the samples. blocks: quantized,
    blocks_all: passed through.

    Bytes: peak_memory of the process, disk_needed at the fullest moment (streams, finished blocks and the result
    together), disk_free where they go. seconds: an estimate for this machine.
    """

    samples: int
    images: int
    tokens: int
    blocks: int
    blocks_all: int
    peak_memory: int
    disk_needed: int
    disk_free: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same as text."""
        return [
            f"samples   {self.samples} ({self.images} images), {self.tokens} tokens",
            f"blocks    {self.blocks} quantized of {self.blocks_all}",
            f"memory    about {_size(self.peak_memory)} at the peak",
            f"disk      about {_size(self.disk_needed)} needed, {_size(self.disk_free)} free",
            f"time      about {duration(self.seconds)} on this machine (a rough estimate)",
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
    """Of one block: parameters of its linears, all parameters, the linears' (outputs, inputs), and the width of its
    output."""

    linear: int
    parameters: int
    shapes: tuple[tuple[int, int], ...]
    width: int

    @classmethod
    def of(cls, module: nn.Module, width: int) -> BlockSize:
        """Works on meta tensors."""
        shapes = tuple((m.out_features, m.in_features) for m in module.modules() if isinstance(m, nn.Linear))
        return cls(sum(n * k for n, k in shapes), sum(p.numel() for p in module.parameters()), shapes, width)

    def quantized_bytes(self, method: str) -> int:
        """At most what the exported block takes in a file: packed weights, scales, transforms or zeros, and what stays
        float32."""
        total = 4 * (self.parameters - self.linear) + 4096
        for outputs, inputs in self.shapes:
            total += outputs * inputs // 2 + 16 * outputs
            left, right = decompose(inputs) if method == "flatquant" else (0, 0)
            total += (
                4 * (left * left + right * right + inputs)
                if method == "flatquant"
                else 8 * outputs * (-(-inputs // 128)) + 4 * inputs
            )
        return total + 1024 * len(self.shapes)


def block_seconds(
    size: BlockSize, lengths: Sequence[int], method: str | None, settings: Settings, rate: float
) -> tuple[float, float]:
    """(passing the samples through the float block, calibrating it) in seconds. lengths: rows of each item. method
    None: it stays float."""
    if not lengths:
        return 0.0, 0.0 if method is None else _search(size, method, settings, rate)
    rows, items = sum(lengths), len(lengths)

    def forward(share: float) -> float:
        attention = sum(n * n for n in lengths) * 2 * size.width
        return share * ((rows * size.linear + attention) / rate + -(-items // settings.batch) * _CALL_S)

    streams = 1 if settings.learns_from == "float" else 2
    passing = streams * forward(1.0)
    if method is None:
        return passing, 0.0
    _, held_out = split(items, settings.held_out)
    look = forward(len(held_out) / items)
    if method != "flatquant":
        seen = 0.0 if method == "rtn" else forward(1.0) * (2 if method == "gptq" else 1)
        return passing, seen + 2 * look + _search(size, method, settings, rate)
    looks = 3 + -(-settings.steps // settings.evaluate_every)
    step = 3 * _LEARNING * (forward(min(1.0, settings.batch / items)) + 4 * size.linear * 64 / rate) + 4 * _CALL_S
    return passing, _LEARNING * looks * look + settings.steps * step + _search(size, method, settings, rate)


def _search(size: BlockSize, method: str, settings: Settings, rate: float) -> float:
    factoring = sum(k**3 for _, k in size.shapes) if method == "gptq" else 0
    return (_SEARCHES[method] * size.linear * settings.search_rows + factoring) / rate


def peak_memory(sizes: Sequence[BlockSize], widest: int, settings: Settings, written: int) -> int:
    """Bytes of the process at its fullest: a block being learned in float32 (or the shard being written) above what is
    resident now. widest: rows of the longest item."""
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    inside = max(
        (
            4 * s.parameters * 6 + 4 * settings.batch * widest * (12 * s.width + 4 * sum(n for n, _ in s.shapes))
            for s in sizes
        ),
        default=0,
    )
    return now + max(inside, 2 * min(written, DEFAULT_SHARD_BYTES))


def measured_rate(device: str) -> float:
    """Multiply-adds per second of a float32 matrix product on `device`, now."""
    a, b = torch.ones(256, 1024, device=device), torch.ones(1024, 1024, device=device)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 256 * 1024 * 1024 / max(best, 1e-9)
