"""`python -m benchmarks model`: make or reuse the synthetic checkpoint, then one process per variant, and the float
baseline beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import machine, rows
from benchmarks.model.archs import config_of
from benchmarks.model.measure import Job, checkpoint_bytes, float_layers, measure, row
from benchmarks.model.synthetic import make_checkpoint
from quota.core.checkpoint import Manifest
from quota.core.errors import CheckpointError, UsageError

_KEY = ("shape", "implementation", "threads", "commit", "library", "cpu", "layers")


@dataclass(frozen=True)
class Request:
    """What to measure. floats: dtypes of transformers' model beside ours; requests: timed ones per variant."""

    arch: str
    folder: Path
    keep: float | None = 0.3
    layers: int | None = None
    floats: tuple[str, ...] = ("bfloat16", "float32")
    threads: int = 1
    requests: int = 3
    again: bool = False


def ensure_checkpoint(request: Request, progress: Callable[[int, int], None] | None = None) -> Path:
    """The synthetic checkpoint of the request, made when it is not there yet."""
    name = request.arch if request.layers is None else f"{request.arch}-{request.layers}-layers"
    folder = request.folder / name
    if folder.exists():
        try:
            Manifest.load(folder)
        except CheckpointError as error:
            raise UsageError(f"--out: {folder} is in the way: {error}") from None
        return folder
    return make_checkpoint(config_of(request.arch, request.layers), folder, progress)


def run(request: Request, checkpoint: Path, out: Path | None) -> Iterator[dict[str, Any]]:
    """One row per variant, as each ends; a variant that `out` already holds for this commit and machine comes from
    there."""
    layers = request.layers or config_of(request.arch).text_config.num_hidden_layers
    known = {_key(r): r for r in (rows.read(out) if out and not request.again else ()) if r["op"] == "model"}
    jobs = [
        Job(request.arch, str(checkpoint), keep, threads=request.threads, requests=request.requests)
        for keep in dict.fromkeys((None, request.keep))
    ]
    for job in jobs:
        yield _remember(job, known, out, layers, partial(_own_row, job, checkpoint))
    for dtype in request.floats:
        fit = min(layers, float_layers(request.arch, dtype))
        job = Job(request.arch, None, None, dtype, fit, request.threads, request.requests)
        yield _remember(job, known, out, layers, partial(_float_row, job, layers))


def _remember(
    job: Job, known: dict[str, dict[str, Any]], out: Path | None, layers: int, work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    key = _key(
        {
            **machine.source(),
            **machine.cpu(),
            "shape": job.arch,
            "implementation": job.name,
            "threads": job.threads,
            "layers": layers,
        }
    )
    if key in known:
        return known[key]
    made = work()
    if out:
        rows.append(out, [made])
    return made


def _own_row(job: Job, checkpoint: Path) -> dict[str, Any]:
    return row(job, measure(job), checkpoint_bytes(checkpoint))


def _float_row(job: Job, layers: int) -> dict[str, Any]:
    """The row of a float model; when only some layers fit, the rest is added at the time per layer that two depths
    tell."""
    found = measure(job)
    fit = found["layers"]
    if fit < layers:
        half = measure(Job(job.arch, None, None, job.float_dtype, max(1, fit // 2), job.threads, job.requests))
        for name in ("ttft_ms", "ttft_cpu_ms", "decode_ms", "decode_cpu_ms"):
            per_layer = (found[name] - half[name]) / (fit - half["layers"])
            found[name] = round(found[name] + (layers - fit) * per_layer, 3)
        found |= {"layers": layers, "layers_measured": [half["layers"], fit]}
    return row(job, found, None)


def _key(r: dict[str, Any]) -> str:
    return json.dumps([r.get(name) for name in _KEY])
