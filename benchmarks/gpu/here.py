"""Sections about the machine and the build: what is here, the ceilings of its memory and products, both libraries,
their machine code, sanitizer, counters."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from benchmarks.gpu.options import ROOT, Line, Options, facts, failure

_PACKAGES = ("torch", "triton", "transformers", "humming-kernels", "flash-attn", "pydantic", "nvidia-ml-py")
_COUNTERS = (
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed.avg.per_cycle_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "gpu__time_duration.sum",
)
_COUNTED = "regex:(warpgroup|few|attention|transform|quantize|heads)_kernel"


def shell(command: list[str], **environment: str) -> str:
    """What it printed. RuntimeError with the end of it where it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{output[-3000:]}")
    return output


def _require(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise RuntimeError(f"{program} is not on PATH")
    return found


def require_library() -> None:
    from quota.ops import cuda

    if reason := cuda.why_not():  # None also means: it is loaded now
        raise RuntimeError(reason)


def machine(options: Options) -> Iterator[Line]:
    """What is here: GPU, driver, compiler, packages."""
    import torch

    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    yield facts(python=platform.python_version(), packages=versions, torch_cuda=torch.version.cuda)
    if shutil.which("nvcc"):
        yield facts(nvcc=shell(["nvcc", "--version"]).strip().splitlines()[-1])
    from quota.ops import cuda, triton

    if reason := triton.why_not():
        yield failure(f"Triton: {reason}")
    if options.dry:
        if torch.version.cuda and cuda.LIBRARY.exists() and (reason := cuda.load_failure()):
            yield failure(reason)
        return
    yield facts(
        smi=shell(
            [
                _require("nvidia-smi"),
                "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm",
                "--format=csv,noheader",
            ]
        ).strip()
    )
    found = torch.cuda.get_device_properties(0)
    yield facts(
        name=found.name,
        arch=f"{found.major}.{found.minor}",
        processors=found.multi_processor_count,
        l2_bytes=found.L2_cache_size,
    )


def ceilings(options: Options) -> Iterator[Line]:
    """What the device gives at best: memory, second-level cache, bf16 and int8 products, a launch inside a graph."""
    from benchmarks.gpu import times

    if options.dry:
        yield facts(would_time=list(times.CEILINGS))
        return
    for row in times.ceiling_rows():
        yield {"row": row}


def build(options: Options) -> Iterator[Line]:
    """Both libraries, for this GPU's architecture alone; with --reuse, those that are there, where they load."""
    import torch

    from quota.ops import cuda, native

    _require("nvcc")
    major, minor = (9, 0) if options.dry else torch.cuda.get_device_capability()
    archs = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if options.dry:
        yield facts(would_run=f"QUOTA_BUILD=cuda QUOTA_CUDA_ARCHS={archs} {' '.join(command)}")
        return
    if options.reuse and cuda.why_not() is None and native.why_not() is None:
        yield facts(reused=True)
        return
    began = time.perf_counter()
    shell(command, QUOTA_BUILD="cuda", QUOTA_CUDA_ARCHS=archs)
    yield facts(archs=archs, build_s=round(time.perf_counter() - began, 1))


def sass(options: Options) -> Iterator[Line]:
    """The intended instructions are there and nothing spills."""
    from benchmarks.gpu.sass import cuobjdump, kernels, table
    from quota.ops.cuda import LIBRARY

    if options.dry and not LIBRARY.exists():
        yield facts(
            would_run=f"python -m benchmarks.gpu.sass {LIBRARY.relative_to(ROOT)}", cuobjdump=Path(cuobjdump()).name
        )
        return
    found = kernels([LIBRARY])
    yield facts(table=table(found), kernels=len(found))
    yield from (failure(f"{k.name} {k.arch}: {fault}") for k in found if (fault := k.fault()))


def _sanitizer(tool: str, options: Options, *more: str) -> Iterator[Line]:
    worker = [
        sys.executable,
        "-m",
        "benchmarks",
        "gpu",
        "--worker",
        "--sections",
        "first",
        "--small",
        "--seed",
        str(options.seed),
    ]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *more, *worker]
    if tool == "initcheck":
        command.append("--no-poison")  # a tensor that was filled hides what nobody wrote
    if options.dry:
        yield facts(would_run=" ".join(command))
        return
    _require("compute-sanitizer")
    try:  # torch's caching allocator hides what is out of bounds of a tensor
        yield facts(said=shell(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1").strip().splitlines()[-1])
    except RuntimeError as error:
        yield failure(str(error))


def memcheck(options: Options) -> Iterator[Line]:
    """compute-sanitizer over the small checks: accesses out of bounds and misaligned."""
    yield from _sanitizer("memcheck", options)


def racecheck(options: Options) -> Iterator[Line]:
    """compute-sanitizer: races in shared memory, without the kernel whose bulk copies and mbarriers the tool does not
    follow."""
    yield from _sanitizer("racecheck", options, "--kernel-name-exclude", "kernel_substring=warpgroup_kernel")


def initcheck(options: Options) -> Iterator[Line]:
    """compute-sanitizer: reads of what nobody wrote."""
    yield from _sanitizer("initcheck", options)


def counters(options: Options) -> Iterator[Line]:
    """Nsight Compute on a few launches of the hot kernels: how busy memory, cache, issue slots and tensor cores are."""
    worker = [sys.executable, "-m", "benchmarks", "gpu", "--worker", "--sections", "hot", "--seed", str(options.seed)]
    command = [
        "ncu",
        "--clock-control",
        "none",
        "--csv",
        "--kernel-name",
        _COUNTED,
        "--metrics",
        ",".join(_COUNTERS),
        *worker,
    ]
    if options.dry:
        yield facts(would_run=" ".join(command))
        return
    if shutil.which("ncu") is None:
        yield facts(absent="ncu is not on PATH")
        return
    try:
        table = [line for line in shell(command).splitlines() if line.startswith('"')]
    except RuntimeError as error:  # where drivers keep counters for administrators; nothing of ours is wrong
        yield facts(absent=str(error)[-500:])
        return
    yield facts(csv=table)
