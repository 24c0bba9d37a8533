"""torch's float linear: MKL in float32, oneDNN in bfloat16. What transformers runs."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.own import torch_bfloat16_unit, torch_float_unit
from benchmarks.ops.peers import weight
from benchmarks.shapes import Linear


class TorchFloat:
    """`torch.nn.functional.linear` in one dtype."""

    takes = "floats"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        half = dtype == torch.bfloat16
        self.name = "torch-bf16" if half else "torch-fp32"
        self.tolerance = 1e-2 if half else 1e-5  # bfloat16 keeps 8 bits, of the output too
        self.unit = torch_bfloat16_unit() if half else torch_float_unit()

    def why_not(self) -> str | None:
        return None

    def prepare(self, shape: Linear, threads: int) -> None:
        self.w = weight(shape).to(self.dtype)
        self.weight_bytes = self.w.numel() * self.w.element_size()

    def feed(self, x: Tensor) -> None:
        self.x = x.to(self.dtype)

    def run(self) -> None:
        self.y = torch.nn.functional.linear(self.x, self.w)

    def result(self) -> Tensor:
        return self.y.float()

    def expected(self, rows: slice, columns: slice) -> Tensor:
        return self.x[rows].double() @ self.w[columns].double().T
