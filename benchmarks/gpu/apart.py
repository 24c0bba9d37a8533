"""One section in a process of its own, whose lines are kept whatever becomes of it, and whose children end with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gpu.options import ROOT, Options, collected

_HASHED = ("quota/**/*.py", "benchmarks/**/*.py", "kernels/**/*.py", "csrc/**/*.*", "setup.py")


@cache
def source() -> dict[str, str]:
    """commit: of the repository, with "+" where files differ from it, "unknown" without git; digest: of everything that
    is built or run."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")[:12] + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    files = sorted({path for pattern in _HASHED for path in ROOT.glob(pattern) if path.is_file()})
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return {"commit": commit, "digest": digest.hexdigest()[:12]}


def apart(name: str, options: Options, limit_s: float, lines: Path) -> dict[str, Any]:
    """The section's record; its lines also lie in `lines` while it runs. What it started is killed with it, at
    `limit_s` or when it ends."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "benchmarks",
        "gpu",
        "--worker",
        "--sections",
        name,
        "--seed",
        str(options.seed),
    ]
    command += [
        flag
        for flag, on in (("--small", options.small), ("--no-poison", not options.poison), ("--reuse", options.reuse))
        if on
    ]
    with lines.open("wb") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        worker = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, start_new_session=True)
        try:
            code = worker.wait(timeout=limit_s)
            ended = None if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {limit_s:.0f} s"
        finally:  # also when this process is told to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        err.seek(0)
        errors = err.read()
    found = collected(read_lines(lines))
    if ended and (worker.returncode != 1 or not found.get("failures")):
        found.setdefault("failures", []).append(f"{ended}: {errors.strip()[-1500:]}")
    return found


def read_lines(lines: Path) -> list[dict[str, Any]]:
    """The whole lines among what a section printed; the last one may be cut off, and libraries print what they like."""
    found = []
    for text in lines.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                found.append(line)
    return found
