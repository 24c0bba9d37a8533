"""The wheel: one per platform for every Python, with the native library or, on request, without."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(tmp_path: Path, mode: str) -> tuple[str, list[str]]:
    """Builds from a copy without build products, so that nothing stale slips in."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "assets")
    source.mkdir()
    for name in ("quota", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path / "dist"),
        str(source),
    ]
    subprocess.run(command, check=True, env={**os.environ, "QUOTA_BUILD": mode})
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_wheel_without_native_code(tmp_path: Path) -> None:
    name, files = build(tmp_path, "none")
    assert name.endswith("-py3-none-any.whl")
    assert "quota/py.typed" in files and not [f for f in files if f.endswith(".so")]
    assert "quota_kernels/w4a4_linear.py" in files
    assert not [f for f in files if f.startswith(("tests/", "csrc/", "kernels/"))]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_wheel_with_native_code(tmp_path: Path) -> None:
    name, files = build(tmp_path, "cpu")
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    assert [f for f in files if f.endswith(".so")] == ["quota/_native/libquota_cpu.so"]


def test_unknown_build_mode_is_refused() -> None:
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "QUOTA_BUILD": "cuda12"}, check=False
    )
    assert result.returncode and "QUOTA_BUILD: expected one of auto, cpu, cuda, none" in result.stderr
