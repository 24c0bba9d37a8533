"""Other engines' linear layers behind one protocol. Each is an optional package; one that is absent says how to get
it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.shapes import Linear
from benchmarks.timing import Sample, time_calls


class Layer(Protocol):
    """An engine's linear layer in this process, prepared for a shape once and fed batches of rows.

    takes: "codes" when its input is already quantized (compared with `w4a4_linear` alone), "floats" when a call
    includes whatever the engine does to its input (compared with `quantize_act` + `w4a4_linear`). unit: the arithmetic
    it is held against. tolerance: relative error it may have against float64 arithmetic on its own quantized weights;
    it covers its own rounding of activations and no more.
    """

    name: str
    takes: str
    unit: str
    tolerance: float
    weight_bytes: int

    def why_not(self) -> str | None:
        """None when it can run here, else the reason and the remedy."""

    def prepare(self, shape: Linear, threads: int) -> None:
        """Make the weight of `shape` (`weight(shape)`) ready in the engine's own layout."""

    def feed(self, x: Tensor) -> None:
        """x float32 [M, K]: the input of the following runs."""

    def run(self) -> None:
        """One call."""

    def result(self) -> Tensor:
        """float32 [M, N] of the last run."""

    def expected(self, rows: slice, columns: slice) -> Tensor:
        """float64 [rows, columns] from the operands the engine was given, after its own quantization of the weight."""


class Peer(Protocol):
    """What the benchmark asks of a layer, wherever it runs. Fields as in `Layer`."""

    name: str
    takes: str
    unit: str
    weight_bytes: int

    def why_not(self) -> str | None:
        """None when it can run here, else the reason and the remedy."""

    def prepare(self, shape: Linear, threads: int) -> None:
        """Make the weight of `shape` ready."""

    def check(self, m: int) -> str | None:
        """Feed M rows and pass the correctness gate: None, or what was wrong."""

    def sample(self, calls: int, cold: bool) -> Sample:
        """Time the layer on the rows it was fed."""

    def close(self) -> None:
        """Give back what it holds outside this process."""


class Here:
    """A layer in this process as a peer."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.name, self.takes, self.unit = layer, layer.name, layer.takes, layer.unit
        self.weight_bytes = 0
        self.why_not = layer.why_not

    def prepare(self, shape: Linear, threads: int) -> None:
        self.shape = shape
        self.layer.prepare(shape, threads)
        self.weight_bytes = self.layer.weight_bytes

    def check(self, m: int) -> str | None:
        self.layer.feed(activations(self.shape, m))
        return gate(self.layer, self.shape, m)

    def sample(self, calls: int, cold: bool) -> Sample:
        return time_calls(self.layer.run, calls, cold=cold)

    def close(self) -> None:
        pass


def weight(shape: Linear) -> Tensor:
    """float32 [N, K], the same in every process: normal, like a trained projection."""
    return torch.randn(shape.n, shape.k, generator=torch.Generator().manual_seed(shape.n * 31 + shape.k)) * 0.02


def activations(shape: Linear, m: int) -> Tensor:
    """float32 [M, K], the same in every process."""
    return torch.randn(m, shape.k, generator=torch.Generator().manual_seed(m))


def relative_error(y: Tensor, expected: Tensor) -> float:
    """||y - expected|| / ||expected||"""
    return float((y.double() - expected).norm() / expected.norm())


def gate(layer: Layer, shape: Linear, m: int) -> str | None:
    """Run once and compare a sample of the result: None when it agrees, else what was wrong."""
    rows, columns = slice(0, min(m, 8)), slice(0, min(shape.n, 512))
    layer.run()
    return verdict(relative_error(layer.result()[rows, columns], layer.expected(rows, columns)), layer.tolerance)


def verdict(error: float, tolerance: float) -> str | None:
    """Of a peer's relative error: None when it is rounding, else what the benchmark prints. A peer that is wrong is no
    fault of this project."""
    return (
        None if error <= tolerance else f"peer is wrong on this CPU by {error:.1e} (relative), allowed {tolerance:.0e}"
    )


def every_peer() -> dict[str, Callable[[], Peer]]:
    """Name -> maker, in the order tables show them."""
    from benchmarks.ops.peers.ggml import GgmlQ4
    from benchmarks.ops.peers.onednn import OneDnnInt8
    from benchmarks.ops.peers.onnxruntime import MatMulNBits
    from benchmarks.ops.peers.openvino import OpenVinoInt4
    from benchmarks.ops.peers.torch_float import TorchFloat
    from benchmarks.ops.peers.worker import ChildPeer

    return {
        "onednn-w8a8": lambda: Here(OneDnnInt8()),
        "onednn-w8a8-vnni": lambda: ChildPeer(
            "onednn-w8a8-vnni", OneDnnInt8(), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, unit="vpdpbusd"
        ),
        "openvino-i4": lambda: Here(OpenVinoInt4("f32")),
        "openvino-i4-bf16": lambda: Here(OpenVinoInt4("bf16")),
        "openvino-i4-g128-f32": lambda: Here(OpenVinoInt4("f32", whole=True)),
        "ort-nbits-128": lambda: Here(MatMulNBits(128)),
        "ort-nbits-128-f32": lambda: Here(MatMulNBits(128, whole=True)),
        "ort-nbits-32": lambda: Here(MatMulNBits(32)),
        "ggml-q4_0": lambda: Here(GgmlQ4(amx=False)),
        "ggml-q4_0-amx": lambda: ChildPeer("ggml-q4_0-amx", GgmlQ4(amx=True), {}, unit="tdpbusd"),
        "torch-fp32": lambda: Here(TorchFloat(torch.float32)),
        "torch-bf16": lambda: Here(TorchFloat(torch.bfloat16)),
    }
