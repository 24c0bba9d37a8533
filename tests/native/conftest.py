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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quota.ops import cuda

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "tests"
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


def kept(stem: str, made_of: Iterable[str], make: Callable[[Path, Path], None]) -> Path:
    """build/tests/<stem>_<digest of made_of>.so; where it is missing, `make(library, folder)` makes it, with a folder
    for what is in between. Test processes side by side: one makes it, the others find it."""
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    library = BUILT / f"{stem}_{digest}.so"
    if library.exists():
        return library
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / f"{stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=BUILT) as folder:
                made = Path(folder, "made.so")
                make(made, Path(folder))
                made.rename(library)
    return library


def texts(*folders: str) -> list[str]:
    """Names and contents of the native sources in these folders of the repository."""
    found = sorted(p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in (".cu", ".h", ".cpp"))
    return [text for path in found for text in (str(path.relative_to(ROOT)), path.read_text())]


def build() -> Path:
    """The emulated library."""
    return kept("libquota_emulated", [torch.__version__, *FLAGS, *texts(*FOLDERS)], _compile)


def _compile(library: Path, folder: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{ROOT / name}" for name in FOLDERS] + [f"-I{torch_folder / 'include'}"]

    def compiled(source: Path) -> str:
        target = f"{folder}/{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compiled, sources()))
    link = ["g++", "-shared", "-o", str(library), *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    subprocess.run(link, check=True)


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
