"""`emulated`: the CUDA kernels' own source, compiled by g++ against emulation.h, behind the wrappers of
`quota.ops.cuda`."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quota.ops import cuda

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "emulated"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-DQUOTA_EMULATED",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-w",
]
FOLDERS = ("csrc/cuda", "csrc/include", "csrc/torch", "tests/native")


def sources() -> list[Path]:
    return [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/torch/bindings_cuda.cpp"]


def build() -> Path:
    """The emulated library, kept by the digest of everything it is made of."""
    texts = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in (".cu", ".h", ".cpp"))
    digest = hashlib.sha256("".join([torch.__version__, *FLAGS, *(p.read_text() for p in texts)]).encode()).hexdigest()[
        :16
    ]
    library = BUILT / f"libquota_emulated_{digest}.so"
    if library.exists():
        return library
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side: one compiles, the others find its library
        if not library.exists():
            _compile(library)
    return library


def _compile(library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{ROOT / folder}" for folder in FOLDERS] + [f"-I{torch_folder / 'include'}"]
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:

        def compiled(source: Path) -> str:
            target = f"{folder}/{source.stem}.o"
            subprocess.run(["g++", *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compiled, sources()))
        subprocess.run(
            ["g++", "-shared", "-o", f"{folder}/out.so", *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"],
            check=True,
        )
        Path(f"{folder}/out.so").rename(library)


@pytest.fixture(scope="session")
def emulated() -> Iterator[ModuleType]:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the CUDA kernels cannot be emulated")
    spec = importlib.util.spec_from_file_location("quota_ops_cuda_emulated", cuda.__file__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)  # a copy of its own: `quota.ops.cuda` may hold the real library
    spec.loader.exec_module(module)
    assert module.load_failure(build(), "quota_emulated") is None
    yield module


@pytest.fixture(params=["0", "1", "7"], ids=["ascending", "descending", "shuffled"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The order in which threads of a block get their turns."""
    monkeypatch.setenv("QUOTA_EMULATION_ORDER", request.param)
    return request.param
