"""The wheel: one per platform for every Python, with the native library or, on request, without."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
import zlib
from glob import glob
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("c++") or shutil.which("g++")


def build(tmp_path: Path, mode: str) -> tuple[str, list[str]]:
    """Builds from a copy without build products, so that nothing stale slips in; the compiler does not optimise: what
    is looked at is what the wheel holds."""
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
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {CXX} "$@" -O0\n')  # the later option wins
    compiler.chmod(0o755)
    subprocess.run(
        command, check=True, env={**os.environ, "QUOTA_BUILD": mode, "CC": str(compiler), "CXX": str(compiler)}
    )
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
@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_wheel_with_native_code(tmp_path: Path) -> None:
    name, files = build(tmp_path, "cpu")
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    assert [f for f in files if f.endswith(".so")] == ["quota/_native/libquota_cpu.so"]


def test_the_wheel_stays_small() -> None:
    """12 MB with the CPU library: what its files take compressed, listed as setuptools finds them."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(found["package-data"]) == {"quota"} and found["packages"]["find"]["include"] == ["quota*"]
    files = {*(ROOT / "quota").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")}
    for pattern in found["package-data"]["quota"]:
        names = glob(pattern, root_dir=ROOT / "quota", recursive=True)  # noqa: PTH207 - as setuptools does
        files |= {path for name in names if (path := ROOT / "quota" / name).is_file() and "cuda" not in name}
    assert sum(len(zlib.compress(path.read_bytes(), 6)) for path in files) < 12e6
    assert not [path for path in files if "qwen2_5_vl" in path.parts or path.suffix == ".jpg"]


def test_unknown_build_mode_is_refused() -> None:
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "QUOTA_BUILD": "cuda12"}, check=False
    )
    assert result.returncode and "QUOTA_BUILD: expected one of auto, cpu, cuda, none" in result.stderr
