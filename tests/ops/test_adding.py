"""The op of docs/adding.md, run: the reference, the C++ kernel on portable vectors and the Triton kernel agree in every
bit."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from quota.core.registry import HOST, Op
from quota.ops import native, triton

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(python|cpp)\n(.*?)```", (ROOT / "docs" / "adding.md").read_text(encoding="utf-8"), re.DOTALL)
SIZES = [(1, 1), (3, 16), (5, 40), (2, 257), (0, 8), (4, 0)]
WRAPPER = """
#include "{header}"
extern "C" void row_peak(const float* x, float* y, int64_t m, int64_t k) {{ row_peaks<Vec>(x, y, k, 0, m); }}
"""
INTERPRETED = """
import sys, torch
from types import ModuleType
import quota_kernels
quota_kernels.__path__.append(sys.argv[1])
from quota_kernels.row_peak import row_peak
saved = torch.load(sys.argv[2])
torch.save([row_peak(x) for x in saved], sys.argv[2])
"""


def block(mark: str) -> str:
    return next(source for _, source in BLOCKS if mark in source)


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(m, k) * 3 for m, k in SIZES]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page's header with the portable vectors, as a function of x."""
    folder = tmp_path_factory.mktemp("row_peak")
    (folder / "row_peak.h").write_text(block("void row_peaks"), encoding="utf-8")
    source = (ROOT / "csrc/cpu/portable.cpp").read_text(encoding="utf-8")
    (folder / "row_peak.cpp").write_text(source + WRAPPER.format(header="row_peak.h"), encoding="utf-8")
    paths = [f"-I{ROOT / place}" for place in ("csrc/cpu", "csrc/include")]
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-w", "-shared", "-fPIC", *paths]
    subprocess.run([*command, "row_peak.cpp", "-o", "row_peak.so"], cwd=folder, check=True)
    function = ctypes.CDLL(str(folder / "row_peak.so")).row_peak

    def row_peak(x: Tensor) -> Tensor:
        y = torch.full((len(x),), torch.nan)
        function(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int64(len(x)),
            ctypes.c_int64(x.shape[1]),
        )
        return y

    return row_peak


@pytest.fixture
def op(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's op, registered until the test ends."""
    monkeypatch.setattr(Op, "_table", dict(Op._table))
    monkeypatch.setattr(native._bound, "row_peak", compiled, raising=False)
    for backend, body in ((native, block("_bound.row_peak")), (triton, block("_bound.row_peak"))):
        if backend is triton:
            body = body.replace("_bound.row_peak(x.contiguous())", '_kernel("row_peak")(x)')
        made = dict(vars(backend))
        exec(compile(body, "adding.md", "exec"), made)
        monkeypatch.setattr(backend, "row_peak", made["row_peak"], raising=False)
    module = ModuleType("quota.ops.row_peak")
    vars(module).update(Tensor=Tensor, Op=Op)
    exec(compile(block("row_peak_ref"), "adding.md", "exec"), vars(module))
    return module


def test_native_equals_the_reference(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert op.row_peak.choose(HOST).name == "native"
    for x in inputs():
        assert torch.equal(op.row_peak(x), op.row_peak_ref(x))
    monkeypatch.setenv("QUOTA_IMPL", "row_peak=ref")
    op.row_peak.rebind()
    assert op.row_peak.choose(HOST).name == "ref"


def test_triton_equals_the_reference(op: Any, tmp_path: Path) -> None:
    (tmp_path / "row_peak.py").write_text(block("row_peak_kernel"), encoding="utf-8")
    given = [x for x in inputs() if len(x)]
    torch.save(given, tmp_path / "rows.pt")
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    arguments = [str(tmp_path), str(tmp_path / "rows.pt")]
    subprocess.run([sys.executable, "-c", INTERPRETED, *arguments], env=environment, check=True)
    for x, found in zip(given, torch.load(tmp_path / "rows.pt"), strict=True):
        assert torch.equal(found, op.row_peak_ref(x))
