"""Runs the kernels in Triton's interpreter: it is chosen when a kernel is defined, so its tests need a process of their
own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("triton", reason="the Triton kernels need triton: pip install -e '.[gpu]' in the clone (Linux)")


@pytest.mark.interp
@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("kernels_*.py")))
def test_kernels_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]
