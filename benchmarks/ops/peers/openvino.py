"""OpenVINO: int4 weights per output channel and activations quantized on the fly in groups of 128, or weights in groups
of 128 and activations float."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.ops.own import torch_float_unit
from benchmarks.ops.peers import weight
from benchmarks.ops.peers.quantizers import int8_unit, symmetric_blocks
from benchmarks.shapes import Linear

_GROUP = 128


class OpenVinoInt4:
    """A compressed MatMul compiled for the CPU. precision: inference precision hint, "f32" or "bf16" (OpenVINO's
    default on AMX machines). whole: keep the activations float32, and scale the weights in groups."""

    takes = "floats"

    def __init__(self, precision: str, whole: bool = False) -> None:
        self.precision, self.whole = precision, whole
        self.name = f"openvino-i4{'-bf16' * (precision == 'bf16')}{'-g128-f32' * whole}"
        self.tolerance = 1e-5 if whole else 2e-2  # 8-bit activations in groups of 128, and bfloat16 outputs
        self.unit = torch_float_unit() if whole else int8_unit(machine.cpu()["features"])

    def why_not(self) -> str | None:
        if importlib.util.find_spec("openvino") is None:
            return "openvino is not installed; pip install -e '.[bench]' in the clone"
        if self.precision == "bf16" and "avx512_bf16" not in machine.cpu()["features"]:
            return "this CPU has no bfloat16"
        return None

    def prepare(self, shape: Linear, threads: int) -> None:
        import openvino as ov
        from openvino import opset13

        self.block = _GROUP if self.whole else shape.k
        self.codes, self.scale = symmetric_blocks(weight(shape), self.block, 4)
        nibbles = (self.codes.numpy().reshape(-1) & 15).astype(np.uint8)
        self.packed = nibbles[0::2] | (nibbles[1::2] << 4)  # kept: OpenVINO reads it in place
        size = [shape.n, shape.k // self.block, self.block]
        constant = opset13.constant(ov.Tensor(self.packed, size if self.whole else [shape.n, shape.k], ov.Type.i4))
        scale = self.scale.numpy()
        scaled = opset13.multiply(
            opset13.convert(constant, "f32"), opset13.constant(scale[..., None] if self.whole else scale)
        )
        if self.whole:
            scaled = opset13.reshape(scaled, opset13.constant([shape.n, shape.k]), False)
        x = opset13.parameter([-1, shape.k], np.float32)
        model = ov.Model([opset13.matmul(x, scaled, False, True)], [x])
        settings: dict[str, Any] = {
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0" if self.whole else str(_GROUP),
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        self.weight_bytes = shape.n * shape.k // 2 + 4 * self.scale.numel()

    def feed(self, x: Tensor) -> None:
        import openvino as ov

        self.x = x
        self.request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

    def run(self) -> None:
        self.request.infer()

    def result(self) -> Tensor:
        return torch.from_numpy(np.array(self.request.get_output_tensor().data))

    def expected(self, rows: slice, columns: slice) -> Tensor:
        w = self.codes[columns].double().unflatten(1, (-1, self.block)) * self.scale[columns, :, None].double()
        return self.x[rows].double() @ w.flatten(1).T
