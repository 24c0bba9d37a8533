"""The CUDA library: what the build refuses, and, where nvcc is, that every source compiles for every architecture to
the intended instructions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import sass
from tests.native.conftest import kept, texts

ROOT = Path(__file__).resolve().parents[2]


def setup(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_asking_for_cuda_without_nvcc_is_an_error(tmp_path: Path) -> None:
    result = setup(tmp_path, "--version", QUOTA_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert result.returncode and "QUOTA_BUILD=cuda: nvcc was not found" in result.stderr


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    result = setup(tmp_path, "--version", QUOTA_BUILD="cuda", CUDA_HOME=str(tmp_path), QUOTA_CUDA_ARCHS="80;hopper")
    assert result.returncode and "got 'hopper'" in result.stderr


@pytest.fixture(scope="module")
def library() -> Path:
    """The CUDA library for every architecture, built with the torch at hand. Compiling takes minutes, so it is kept as
    long as nothing that it is made of changes."""

    def make(library: Path, folder: Path) -> None:
        places = ("--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp"))
        result = setup(folder, "-q", "build_ext", *places, QUOTA_BUILD="cuda")
        assert result.returncode == 0, result.stderr[-3000:]
        (folder / "lib/quota/_native/libquota_cuda.so").rename(library)

    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin/nvcc")) if home else "nvcc"
    compiler = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    asked = [f"{name}={os.environ.get(name)}" for name in ("QUOTA_CUDA_ARCHS", "NVCC_APPEND_FLAGS")]
    sources = texts("csrc/cuda", "csrc/include", "csrc/torch")
    return kept("libquota_cuda", [torch.__version__, compiler, *asked, (ROOT / "setup.py").read_text(), *sources], make)


needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not installed: the CUDA library is not compiled"
)


@pytest.mark.nvcc
@pytest.mark.slow
@needs_nvcc
def test_the_library_builds_for_every_architecture_with_the_intended_instructions(library: Path) -> None:
    try:
        sass.cuobjdump()
    except Exception as error:
        pytest.skip(f"machine code was not read: {error}")
    found = sass.kernels([library])
    assert not [f"{k.name} {k.arch}: {k.fault()}" for k in found if k.fault()]
    assert {k.arch for k in found} == {"sm_80", "sm_90a"}


def symbols(library: Path, which: str) -> set[str]:
    """Dynamic symbols without their versions: those that `library` defines, or those that it wants (weak ones
    aside)."""
    lines = subprocess.run(
        ["nm", "-D", f"--{which}-only", str(library)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.split()[-2] not in "wv"}


@pytest.mark.nvcc
@pytest.mark.slow
@needs_nvcc
def test_the_library_wants_nothing_that_only_a_cuda_build_of_torch_has(library: Path) -> None:
    """torch opens its CUDA libraries for itself alone, so a symbol of theirs would stay undefined in every process,
    with a CUDA build and without."""
    torch_lib = Path(torch.__file__).parent / "lib"
    wanted = symbols(library, "undefined")
    linked = subprocess.run(
        ["ldd", str(library)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(torch_lib)},
    ).stdout
    found = {
        path: symbols(Path(path), "defined") for path in re.findall(r"(/\S+) \(0x", linked)
    }  # the loader too: it has __tls_get_addr
    assert any(path.endswith("libtorch_cpu.so") for path in found) and not wanted - set().union(*found.values())
    # in whatever torch is here, in a process of its own: names are registered once
    loads = f"import torch; torch.ops.load_library({str(library)!r})"
    assert not subprocess.run([sys.executable, "-c", loads], check=False).returncode


# Installs gigabytes, so only where it is asked for: make test-cuda-torch.
@pytest.mark.nvcc
@pytest.mark.skipif(
    not os.environ.get("QUOTA_TEST_CUDA_TORCH"),
    reason="installs a CUDA build of torch, gigabytes: make test-cuda-torch",
)
@pytest.mark.parametrize("version", os.environ.get("QUOTA_TEST_CUDA_TORCH", "none").split())
def test_the_library_loads_in_cuda_builds_of_torch(library: Path, tmp_path: Path, version: str) -> None:
    """Where only the device is missing, `quota doctor` says that of every op of the library and nothing else."""
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"torch=={version}"], check=True
    )
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "rest.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("-packages"))
    )  # behind the venv's own: all but torch
    code = f"""
import json, pathlib, torch
from quota.ops import cuda
assert torch.version.cuda, "not a CUDA build"
assert (reason := cuda.load_failure(pathlib.Path({str(library)!r}))) is None, reason
from quota.cli.doctor import examine
rows = [row for row in examine()["ops"] if row["implementation"] == "cuda"]
print(json.dumps([torch.__version__, cuda.why_not(), rows]))
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found, reason, rows = json.loads(result.stdout.splitlines()[-1])
    assert found.startswith(version) and reason == "there is no CUDA device 0 (torch sees 0)"
    assert len(rows) == 7 and {row["state"] for row in rows} == {f"not here: {reason}"}


def test_names_of_kernels_are_readable() -> None:
    name = "_ZN5quota4cuda44_GLOBAL__N__00af6eb7_11_w4a4_few_cu_98725bd010few_kernelILb0ELi2EEEvNS_10LinearArgsEl"
    assert sass.readable(name) == "few_kernel<0, 2>"
    assert (
        sass.readable("_ZN5quota4cuda44_GLOBAL__N__00af6eb7_11_w4a4_few_cu_98725bd013append_kernelENS_10AppendArgsEl")
        == "append_kernel"
    )


def test_faults_are_found() -> None:
    def kernel(name: str, arch: str, local: int = 0, *instructions: str) -> sass.Kernel:
        return sass.Kernel(arch, name, 32, local, frozenset(instructions))

    assert kernel("few_kernel<1, 2>", "sm_89", 0, "IMMA.16864.S4.S4").fault() is None
    assert "IMMA.16864.S4.S4" in (kernel("few_kernel<1, 2>", "sm_86", 0, "IMMA.16832.S8.S8").fault() or "")
    assert kernel("tile_kernel<1, 64>", "sm_90a").fault() is None  # a trap there, never launched
    assert "IGMMA.64x96x32" in (kernel("warpgroup_kernel<96>", "sm_90a", 0, "IGMMA.64x32x32.S8.S8").fault() or "")
    assert "IMMA.16832.S8.U8" in (kernel("row_kernel", "sm_80", 0, "IMMA.16832.S8.S8").fault() or "")
    assert (
        "local memory" in (kernel("append_kernel", "sm_80", 16).fault() or "")
        and kernel("append_kernel", "sm_80", 0, "STL").fault()
    )
