"""ONNX Runtime's MatMulNBits: int4 weights in blocks along K, activations quantized to int8 (accuracy_level 4) or
float32 (1)."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.ops.own import torch_float_unit
from benchmarks.ops.peers import weight
from benchmarks.ops.peers.quantizers import int8_unit, symmetric_blocks
from benchmarks.shapes import Linear

_FLOAT_COMPUTE, _INT8_COMPUTE = 1, 4


class MatMulNBits:
    """One-node model `y = x W^T`, symmetric blocks of `block` weights. whole: keep the activations float32."""

    takes = "floats"

    def __init__(self, block: int, whole: bool = False) -> None:
        self.block, self.name = block, f"ort-nbits-{block}{'-f32' if whole else ''}"
        self.accuracy_level = _FLOAT_COMPUTE if whole else _INT8_COMPUTE
        self.tolerance = 1e-5 if whole else 2e-2  # 8-bit activations per block
        self.unit = torch_float_unit() if whole else int8_unit(machine.cpu()["features"])

    def why_not(self) -> str | None:
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        return f"{missing[0]} is not installed; pip install -e '.[bench]' in the clone" if missing else None

    def prepare(self, shape: Linear, threads: int) -> None:
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        self.k = shape.k
        w = torch.nn.functional.pad(weight(shape), (0, -shape.k % self.block))
        self.codes, self.scale = symmetric_blocks(w, self.block, 4)
        unsigned = (self.codes + 8).numpy().astype(np.uint8).reshape(shape.n, -1, self.block)
        packed = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "s"],
            ["y"],
            domain="com.microsoft",
            K=shape.k,
            N=shape.n,
            bits=4,
            block_size=self.block,
            accuracy_level=self.accuracy_level,
        )
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", shape.k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", shape.n])],
            [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(self.scale.numpy().reshape(-1), "s")],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
        )
        onnx.checker.check_model(model)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.n, self.weight_bytes = shape.n, packed.size + 4 * self.scale.numel()

    def feed(self, x: Tensor) -> None:
        self.x, self.y = x, torch.empty(x.shape[0], self.n)
        self.binding = self.session.io_binding()
        for name, tensor, bind in (("x", self.x, self.binding.bind_input), ("y", self.y, self.binding.bind_output)):
            bind(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def result(self) -> Tensor:
        return self.y

    def expected(self, rows: slice, columns: slice) -> Tensor:
        w = (
            self.codes[columns].double().view(-1, self.scale.shape[1], self.block)
            * self.scale[columns, :, None].double()
        )
        return self.x[rows].double() @ w.flatten(1)[:, : self.k].T
