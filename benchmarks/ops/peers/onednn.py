"""oneDNN's int8 linear through torch: 8-bit weights per channel, 8-bit activations per tensor. The ceiling of W8A8 on a
CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.ops.peers import weight
from benchmarks.ops.peers.quantizers import int8_unit, symmetric_blocks
from benchmarks.shapes import Linear

_X_SCALE, _X_ZERO = 1 / 32, 128


class OneDnnInt8:
    """`onednn.qlinear_pointwise` on a prepacked weight, float32 output, as torch.compile's int8 path calls it."""

    name, takes, tolerance = "onednn-w8a8", "codes", 1e-5

    def __init__(self) -> None:
        self.unit = int8_unit(machine.cpu()["features"])

    def why_not(self) -> str | None:
        return None if hasattr(torch.ops.onednn, "qlinear_pointwise") else "this torch has no oneDNN"

    def prepare(self, shape: Linear, threads: int) -> None:
        codes, scale = symmetric_blocks(weight(shape), shape.k, 8)
        self.codes, self.scale, self.zero = codes, scale[:, 0].contiguous(), torch.zeros(shape.n, dtype=torch.int64)
        self.packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self.weight_bytes = shape.n * shape.k

    def feed(self, x: Tensor) -> None:
        self.x = (x / _X_SCALE + _X_ZERO).round().clamp(0, 255).to(torch.uint8)

    def run(self) -> None:
        self.y = torch.ops.onednn.qlinear_pointwise(
            self.x, _X_SCALE, _X_ZERO, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )

    def result(self) -> Tensor:
        return self.y

    def expected(self, rows: slice, columns: slice) -> Tensor:
        a = (self.x[rows].double() - _X_ZERO) * _X_SCALE
        return a @ (self.codes[columns].double() * self.scale[columns, None].double()).T
