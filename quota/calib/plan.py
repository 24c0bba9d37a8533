"""What a calibration will take: tokens, memory, disk and time, known before it starts.

The time is an estimate: the work of every step at the speed at which this machine does such work, timed for a moment
before. The progress bar counts the same work.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quota.calib.flatquant import ProjectionGroup
from quota.calib.learn import split
from quota.calib.settings import Method, Settings
from quota.core.checkpoint import DEFAULT_SHARD_BYTES
from quota.core.formats import Scheme
from quota.models.base import Family, Part
from quota.quant.transform import decompose

# Fitted on the embedded LLaVA's blocks, one thread: what a look costs of a learning step's rounding.
_LOOK = 0.4
_LIBRARIES = 64 << 20  # bytes of optimiser, code and allocator that appear with the first step


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
            f"memory    at most about {_size(self.peak_memory)} (an estimate)",
            f"disk      about {_size(self.disk_needed)} needed, {_size(self.disk_free)} free",
            f"time      about {duration(self.seconds)} on this machine (an estimate)",
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
    """Of one block: its projection groups' (outputs, inputs), all its parameters, the width of its output, and its
    attention heads (0: it has none)."""

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


@dataclass(frozen=True)
class Speed:
    """Of this machine, now. products: multiply-adds per second of a float32 product. Seconds: element_s of an
    elementwise operation, round_s of rounding an element in a learning step (forward and backward), search_s of
    searching the start for one, call_s of a group in a step however small."""

    products: float
    element_s: float
    round_s: float
    search_s: float
    call_s: float


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
        search += sum(k**3 for _, k in size.groups) / speed.products if method.factored else 0.0
    if not lengths:
        return 0.0, search

    def forward(share: float) -> float:
        return share * ((rows * linear + attention) / speed.products + size.written(rows) * speed.element_s)

    calls = len(size.groups) * speed.call_s
    streams = 1 if settings.learns_from == "float" else 2
    passing = streams * (forward(1.0) + -(-items // settings.batch) * calls)
    if method is None:
        return passing, 0.0
    held = len(split(items, settings.held_out)[1]) / items
    if not method.learns:
        return passing, (method.observed + 2 * held) * forward(1.0) + search
    looks = 4 + -(-settings.steps // settings.evaluate_every)
    look = forward(held) + _LOOK * speed.round_s * size.rounded(int(held * rows)) + calls
    taken = min(1.0, settings.batch / items)
    step = 3 * forward(taken) + speed.round_s * size.rounded(int(taken * rows)) + calls
    return passing, looks * look + settings.steps * step + search


def learning_memory(sizes: Sequence[BlockSize], widest: int, settings: Settings) -> int:
    """Bytes that the largest of these blocks takes in float32 while it learns. widest: rows of the longest item. An
    upper bound: a rounded element is held in a dozen forms until the backward pass has used it, a weight in eight."""
    rows = settings.batch * widest
    inside = (
        12 * (s.rounded(rows) - s.linear)
        + 8 * s.parameters
        + 2 * s.written(rows)
        + 2 * s.heads * settings.batch * widest**2
        for s in sizes
    )
    return 4 * max(inside, default=0)


def peak_memory(learning: int, written: int) -> int:
    """Bytes of the process at its fullest: blocks that learn (or the shard being written) above what is resident
    now."""
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + _LIBRARIES
    return now + max(learning, 2 * min(written, DEFAULT_SHARD_BYTES))


def measured_speed(device: str) -> Speed:
    """Times the operations calibration consists of on `device`, each for some milliseconds: FlatQuant's own group, a
    product and an elementwise operation."""
    a, b = torch.ones(256, 1024, device=device), torch.ones(1024, 1024, device=device)
    products = 256 * 1024 * 1024 / _best(lambda: (a @ b)[0, 0])
    group, x = _group(256, 256, device), torch.ones(256, 256, device=device)
    tiny, few = _group(16, 16, device), torch.ones(4, 16, device=device)
    rounded = x.numel() + 256 * 256
    elements = a.numel()
    call_s = _best(lambda: _step(tiny, few))
    round_s = max(_best(lambda: _step(group, x)) - 3 * 256**3 / products, 1e-6) / rounded
    search_s = max(_best(lambda: group.initialise(x, 0.3), 2) - 8 * 256**3 / products, 1e-6) / rounded
    return Speed(products, _best(lambda: torch.nn.functional.silu(a)[0, 0]) / elements, round_s, search_s, call_s)


def _group(inputs: int, outputs: int, device: str) -> ProjectionGroup:
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, device=device)  # draws no random numbers
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-1, 1, inputs * outputs).view(outputs, inputs))
    return ProjectionGroup([linear], *decompose(inputs), diag=True).to(device)


def _step(group: ProjectionGroup, x: Tensor) -> Tensor:
    with torch.enable_grad():
        loss = group(x).square().mean()
        loss.backward()
    return loss.detach()


def _best(work: Callable[[], Tensor | None], times: int = 5) -> float:
    """Seconds of the quickest of so many calls."""
    best = float("inf")
    for _ in range(times + 1):
        began = time.perf_counter()
        found = work()
        if found is not None:
            found.item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return max(best, 1e-9)
