"""The timing sections of `make gpu-check` with their own code and stand-ins for the device: no line of theirs runs for
the first time on a GPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import fast, models, peers, times
from benchmarks.gpu.cublaslt import WORKSPACE_BYTES, Int8Product
from benchmarks.gpu.options import Options
from benchmarks.shapes import Attention, Decoder, Linear
from quota import ops
from quota.runtime.engine.decode import OPS


class Event:
    """A clock that goes on by a millisecond between two records."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        Event.now += 1.0
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's streams, graphs and events without a device; the ops' CUDA implementations are the references."""
    fakes: dict[str, Any] = {
        "Stream": lambda: None,
        "stream": nullcontext,
        "synchronize": lambda *_: None,
        "graph": nullcontext,
        "Event": Event,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1 << 10),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(times, "DEVICE", "cpu")
    for library in (times.cuda, times.triton):
        for op in (ops.w4a4_linear, ops.w4a16_linear, ops.quantize_act, ops.kv4_attention, ops.kv4_paged_attention):
            monkeypatch.setattr(library, op.name, op.implementations[-1].run, raising=False)
    monkeypatch.setattr(times, "cublaslt_runs", lambda x, weights: peers.cublaslt_runs(x, weights, Lt()))


class Lt:
    """cuBLASLt's calls, computed by NumPy the way its documentation defines them: matrices column by column, op(A)
    op(B)."""

    def __init__(self, algorithms: int = 1) -> None:
        self.algorithms, self.made, self.workspace, self.wrong = algorithms, {}, 0, 0

    def _new(self, out: Any, value: Any) -> int:
        out._obj.value = len(self.made) + 1
        self.made[out._obj.value] = value
        return 0

    def cublasLtCreate(self, out: Any) -> int:
        return self._new(out, "handle")

    def cublasLtMatmulDescCreate(self, out: Any, compute: Any, scale: Any) -> int:
        return self._new(out, {"types": (compute.value, scale.value)})

    def cublasLtMatmulDescSetAttribute(self, of: Any, attribute: Any, value: Any, size: Any) -> int:
        self.made[of.value][attribute.value] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(self, out: Any, kind: Any, rows: Any, columns: Any, stride: Any) -> int:
        return self._new(out, (kind.value, rows.value, columns.value, stride.value))

    def cublasLtMatmulPreferenceCreate(self, out: Any) -> int:
        return self._new(out, "preference")

    def cublasLtMatmulPreferenceSetAttribute(self, of: Any, attribute: Any, value: Any, size: Any) -> int:
        assert (attribute.value, size.value) == (1, 8)
        self.workspace = value._obj.value
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        assert ctypes.sizeof(arguments[-2]._obj) == 96 and arguments[-3].value == 1
        arguments[-1]._obj.value = self.algorithms
        return 0

    def _matrix(self, at: Any, layout: Any) -> np.ndarray:
        kind, rows, columns, stride = self.made[layout.value]
        flat = np.frombuffer(
            (ctypes.c_char * (stride * columns * (1 if kind == 3 else 4))).from_address(at.value),
            np.int8 if kind == 3 else np.int32,
        )
        return flat.reshape(columns, stride)[:, :rows].T

    def cublasLtMatmul(
        self,
        handle: Any,
        product: Any,
        alpha: Any,
        a: Any,
        a_of: Any,
        b: Any,
        b_of: Any,
        beta: Any,
        c: Any,
        c_of: Any,
        d: Any,
        d_of: Any,
        best: Any,
        workspace: Any,
        size: Any,
        stream: Any,
    ) -> int:
        described = self.made[product.value]
        assert (
            described["types"] == (72, 10)
            and (alpha._obj.value, beta._obj.value) == (1, 0)
            and size.value == self.workspace == WORKSPACE_BYTES
        )
        left = self._matrix(a, a_of).astype(np.int32)
        self._matrix(d, d_of)[:] = (left.T if described.get(3) else left) @ self._matrix(b, b_of).astype(
            np.int32
        ) + self.wrong
        return 0


def test_the_int8_peer_asks_cublaslt_for_the_product_we_mean() -> None:
    x, w = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((3, 32), (5, 32)))
    (run,) = peers.cublaslt_runs(x, [w], Lt())
    assert torch.equal(run(), (x.int() @ w.int().T))
    wrong = Lt()
    wrong.wrong = 1
    with pytest.raises(RuntimeError, match="not exact"):
        peers.cublaslt_runs(x, [w], wrong)
    with pytest.raises(RuntimeError, match="no int8 algorithm for M=3 N=5 K=32"):
        Int8Product(3, 5, 32, "cpu", Lt(algorithms=0))


class HummingLayer(torch.nn.Module):
    """The part of humming 0.1.19's layer that is called: int4 weights, quantized rows or float ones."""

    def __init__(
        self, shape_n: int, shape_k: int, weight_config: dict, input_config: dict, torch_dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert (weight_config, input_config, torch_dtype) == ({"dtype": "int4"}, {"dtype": "int8"}, torch.bfloat16)
        self.shape, self.humming_config, self.off = (shape_n, shape_k), None, 0.0

    def load_from_unquantized(self, w: torch.Tensor) -> None:
        assert tuple(w.shape) == self.shape
        self.register_buffer("w", w.float())

    def transform(self) -> None:
        self.humming_config = "made"

    def forward(self, x: torch.Tensor, input_scale: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.float() if input_scale is None else x.float() * input_scale[:, None]
        return (rows @ self.w.T * (1.0 + self.off)).bfloat16()


def quantized(config: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert config == "made"
    scale = x.float().abs().amax(1) / 127
    return (x.float() / scale[:, None]).round().to(torch.int8), scale


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HummingLayer]]:
    monkeypatch.setitem(sys.modules, "humming.layer", SimpleNamespace(HummingLayer=HummingLayer))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "humming.forward", SimpleNamespace(may_quant_input=quantized))  # type: ignore[arg-type]
    yield HummingLayer


def test_linear_rows(device: None) -> None:
    found = {row["implementation"]: row for row in times.linear_rows(Linear("tiny", 128, 48), 3)}
    assert list(found) == [
        "quota",
        "quota+quantize",
        "quota-triton",
        "quota-triton-w4a16",
        "cublas-bf16",
        "cublaslt-int8",
        "torch._int_mm",
        "fp8",
    ]
    ran = [name for name, row in found.items() if "us" in row]
    assert set(ran) >= set(list(found)[:7]), found
    assert [row["implementation"] for row in times.linear_rows(Linear("tiny", 128, 48), 3, peers=False)] == [
        "quota",
        "quota+quantize",
        "cublas-bf16",
    ]
    assert found["quota"]["us"] == 500.0  # two copies of the weight in one millisecond


def test_humming_is_checked_then_timed(
    device: None, humming: type[HummingLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(times.humming_rows(Linear("tiny", 64, 8), 3))
    assert [row["implementation"] for row in found] == ["quota", "humming-w4a8", "humming-w4a8+quantize"] and all(
        "us" in row for row in found
    )
    monkeypatch.setattr(peers, "_HUMMING_TOLERANCE", 0.0)
    _, *wrong = times.humming_rows(Linear("tiny", 64, 8), 3)
    assert all("from the float product" in row["failed"] for row in wrong)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert list(fast.humming(Options(dry=False, seed=0))) == [{"facts": {"absent": "humming-kernels is not installed"}}]


def test_attention_rows(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times.importlib.util, "find_spec", lambda name: None)
    found = list(times.attention_rows(Attention("tiny", 4, 2, 16), 2, 70))
    assert [row["implementation"] for row in found] == ["quota", "quota, paged", "sdpa-bf16", "flash-attn"] and all(
        "us" in row for row in found[:3]
    )


def test_pages_hold_the_cache() -> None:
    kv = times.kv_of(torch.randn(2, 3, 37, 8), 37)
    pages, table = times._pages(kv, 3), torch.arange(6, dtype=torch.int32).view(2, 3)
    for got, want in zip(
        ops.kv4_page_read.implementations[-1].run(pages, table, torch.tensor([37, 37], dtype=torch.int32), 37),
        kv,
        strict=True,
    ):
        assert torch.equal(got[:, :, :37], want)


def test_every_op_that_the_engine_calls_is_timed(device: None) -> None:
    """As the registry chooses them: on the CPU, where this runs, the native library's or the references."""
    model, found = Decoder("tiny", 16, 24, 4, 2, 4), {}
    for m in (3, times._PROMPT):
        for row in times.layer_rows(model, m):
            assert "us" in row and row["case"] == f"tiny M={m} {row['op']}", row
            found[row["op"].partition(" ")[0].rstrip(",")] = row["implementation"]
    called = {op.name for op in OPS} - {"kv4_paged_attention"} | {"attention", "token_score"}
    assert called <= set(found) and "attention, prefill" in {op for op, _, _ in times.layer_calls(model, times._PROMPT)}


def test_ceilings(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "LARGE", (1 << 10, 32))
    found = list(times.ceiling_rows())
    assert [row["implementation"] for row in found] == list(times.CEILINGS) and all("us" in row for row in found), found
    assert found[0]["note"] == f"{2048 / 1e3 / found[0]['us']:.4g} GB/s"


def test_a_failing_row_of_ours_fails_its_section(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "require_library", lambda: None)
    rows = [{"case": "a", "implementation": name, "failed": "no"} for name in ("quota", "fp8")]
    assert list(fast._rows(Options(dry=False, seed=0), [], iter(rows))) == [
        {"row": rows[0]},
        {"failure": "a, quota: no"},
        {"row": rows[1]},
    ]


def test_flash_attention_is_timed_where_it_is_installed(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    fake = SimpleNamespace(flash_attn_with_kvcache=lambda q, k, v: shapes.append((tuple(q.shape), tuple(k.shape))))
    monkeypatch.setitem(sys.modules, "flash_attn", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(times.importlib.util, "find_spec", lambda name: object())
    found = list(times.attention_rows(Attention("tiny", 4, 2, 16), 2, 70))
    assert (
        found[-1]["implementation"] == "flash-attn"
        and "us" in found[-1]
        and set(shapes) == {((2, 1, 4, 16), (2, 70, 2, 16))}
    )


@pytest.mark.parametrize(("arch", "batches"), [("embedded", (1, 2)), ("embedded-qwen", (2,))])
def test_whole_models_answer_alone_and_in_batches(arch: str, batches: tuple[int, ...]) -> None:
    found = list(models.rows(arch, models.Sizes("cpu", layers=3, batches=batches, repeats=1)))
    assert not models.failures(found) and not any("failed" in row for row in found), found
    names = ("quota", "quota, keep 0.3", "quota, engine", "quota, engine, keep 0.3", "transformers bf16, sdpa")
    assert [(row["implementation"], row["case"]) for row in found] == [
        (name, f"{arch} B={batch}") for name in names for batch in batches
    ]
    whole, pruned, served, served_pruned, floats = found[:: len(batches)]
    assert 0 < served_pruned["kv_bytes"] < served["kv_bytes"] and min(served["ttft_ms"], served["decode_ms"]) > 0
    assert (
        whole["cache_tokens"] == floats["cache_tokens"] == 640 + 31
        and pruned["cache_tokens"] == 640 + 31 - (576 - 173) / 3
    )
    if len(batches) > 1:
        assert (
            pruned["kv_bytes"] < whole["kv_bytes"] < floats["kv_bytes"]
            and found[1]["kv_bytes"] == 2 * whole["kv_bytes"]
        )
    assert models.table(found).count("\n") == len(found) + 1 and f"| {arch} B=2 | quota, keep 0.3 |" in models.table(
        found
    )


def test_a_model_that_cannot_run_is_a_failure_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_pydantic(model: Any, recipe: Any) -> None:
        raise ModuleNotFoundError("No module named 'pydantic'")

    monkeypatch.setattr(models, "patched", without_pydantic)
    monkeypatch.setattr(models, "float_model", without_pydantic)
    found = list(models.rows("embedded", models.Sizes("cpu", layers=3, batches=(1,), repeats=1)))
    assert ["failed" in row for row in found] == [False, True, False, False, True]
    assert models.failures(found) == ["embedded, quota, keep 0.3: ModuleNotFoundError: No module named 'pydantic'"]
    assert "No module named 'pydantic'" in models.table(found)
