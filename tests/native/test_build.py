"""The CUDA library: what the build refuses, and, where nvcc is, that every source compiles for every architecture to the intended instructions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quota.bench import sass

ROOT = Path(__file__).resolve().parents[2]


def setup(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


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


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: the CUDA library is not compiled")
def test_the_library_builds_for_every_architecture_with_the_intended_instructions(tmp_path: Path) -> None:
    result = setup(tmp_path, "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"), QUOTA_BUILD="cuda")
    assert result.returncode == 0, result.stderr[-3000:]
    library = tmp_path / "lib/quota/_native/libquota_cuda.so"
    try:
        sass.cuobjdump()
    except Exception as error:
        pytest.skip(f"machine code was not read: {error}")
    found = sass.kernels([library])
    assert not [f"{k.name} {k.arch}: {k.fault()}" for k in found if k.fault()]
    assert {k.arch for k in found} == {"sm_80", "sm_86", "sm_89", "sm_90a"}


def test_names_of_kernels_are_readable() -> None:
    name = "_ZN5quota4cuda44_GLOBAL__N__00af6eb7_11_w4a4_few_cu_98725bd010few_kernelILb0ELi2EEEvNS_10LinearArgsEl"
    assert sass.readable(name) == "few_kernel<0, 2>"
    assert sass.readable("_ZN5quota4cuda44_GLOBAL__N__00af6eb7_11_w4a4_few_cu_98725bd013append_kernelENS_10AppendArgsEl") == "append_kernel"


def test_faults_are_found() -> None:
    def kernel(name: str, arch: str, local: int = 0, *instructions: str) -> sass.Kernel:
        return sass.Kernel(arch, name, 32, local, frozenset(instructions))

    assert kernel("few_kernel<1, 2>", "sm_89", 0, "IMMA.16864.S4.S4").fault() is None
    assert "IMMA.16864.S4.S4" in (kernel("few_kernel<1, 2>", "sm_86", 0, "IMMA.16832.S8.S8").fault() or "")
    assert kernel("tile_kernel<1, 64>", "sm_90a").fault() is None  # a trap there, never launched
    assert "IGMMA.64x96x32" in (kernel("warpgroup_kernel<96>", "sm_90a", 0, "IGMMA.64x32x32.S8.S8").fault() or "")
    assert "local memory" in (kernel("quantize_kernel", "sm_80", 16).fault() or "") and kernel("quantize_kernel", "sm_80", 0, "STL").fault()
