"""Weights lie once on a GPU, and Triton's kernels are found wherever quota is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quota.ops import cuda
from quota.ops.placement import beside, to_host
from quota.ops.w4a4_linear import PackedWeight

ROOT = Path(__file__).resolve().parents[2]


class Codes:
    """A tensor that says it is on a GPU until its data is replaced by another's."""

    def __init__(self, device: str) -> None:
        self.place = device

    @property
    def is_cuda(self) -> bool:
        return self.place == "cuda"

    @property
    def device(self) -> str:
        return self.place

    def cpu(self) -> Codes:
        return Codes("cpu")

    def to(self, device: str) -> Codes:
        return Codes(device)

    @property
    def data(self) -> Codes:
        return self

    @data.setter
    def data(self, other: Codes) -> None:
        self.place = other.place


def test_codes_leave_the_device_and_come_back() -> None:
    codes: Any = Codes("cuda")
    to_host(codes)
    assert codes.device == "cpu"
    assert beside(codes, SimpleNamespace(device="cuda")) is codes and codes.device == "cuda"  # type: ignore[arg-type]
    kept = torch.arange(4, dtype=torch.uint8)
    to_host(kept)
    assert beside(kept, torch.ones(1)) is kept and kept.tolist() == [0, 1, 2, 3]


def test_packing_for_cuda_leaves_the_portable_codes_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = PackedWeight(torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2), 6)
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(cuda, "_library", SimpleNamespace(w4a4_pack=lambda w_q, k: (w_q.clone(), w_q.sum(1))))
    monkeypatch.setattr(cuda, "to_host", moved.append)
    assert len(cuda._packed(weight)) == len(cuda._packed(weight)) == 2
    assert moved == [weight.w_q] and weight.codes() is weight.w_q


def test_kernels_are_found_in_a_checkout_without_installing(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the Triton kernels need triton: pip install 'quota[gpu]' (Linux)")
    site = next(path for path in sys.path if path.endswith("site-packages"))
    # -S: nothing installed in place
    code = f"import sys; sys.path.append({site!r}); from quota.ops import triton; sys.exit(triton.why_not())"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
