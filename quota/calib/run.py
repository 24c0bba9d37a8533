"""`calibrate`: float checkpoint + samples -> quantized checkpoint, one block in memory at a time."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import torch
from tqdm import tqdm

from quota.calib import prune
from quota.calib.blocks import Block
from quota.calib.export import write_checkpoint
from quota.calib.job import Job, Options, Step
from quota.calib.learn import BlockData, learn_block
from quota.calib.plan import Plan
from quota.calib.samples import Samples, encode
from quota.calib.settings import Settings
from quota.calib.stream import FloatSource, Stream, advance, embed_images, embed_text, select_features
from quota.calib.weight_only import quantize_weights, round_weights
from quota.calib.work import WorkFolder
from quota.core.errors import UsageError
from quota.core.files import check_space
from quota.core.malloc import keep_freed_memory
from quota.core.recipe import BEFORE
from quota.models.base import Part
from quota.models.images import ImageInfo, ImageInput, ImageTokens


@dataclass(frozen=True)
class CheckpointReport:
    """What was written. blocks: one BlockReport dictionary per quantized block, in model order (its name alone where
    there are no samples). seconds: wall time of this call (not stored)."""

    checkpoint: str
    method: str
    regime: str
    modules: tuple[str, ...]
    source_fingerprint: str
    samples_fingerprint: str | None
    samples: int
    seed: int
    settings: dict[str, Any]
    blocks: list[dict[str, Any]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def calibrate(
    model: str | Path, samples: Samples | str | Path | None, *, out: str | Path, **options: Unpack[Options]
) -> CheckpointReport:
    """Quantize a float checkpoint (folder or hub name) on `samples` and write the quantized checkpoint folder `out`.

    Decoder, vision and projector blocks are calibrated one after the other on the float model's hidden states
    (FlatQuant: learned Kronecker transforms, per-channel scales, clips; GPTQ and AWQ: `quota.calib.weight_only`).
    Killed in the middle, the same call continues; `out` appears only when it is complete. A checkpoint that the same
    call has made is reported as it is. samples may be None for method "rtn", whose report then has no errors to tell.
    Raises UsageError (options, `out` holds something else, too little disk), CheckpointError (model), SampleError
    (samples), RecipeError (recipe of another model), all of them before the work.
    """
    started = time.monotonic()
    keep_freed_memory()
    job = _job(model, samples, out, options)
    finished = job.finished()
    if finished is not None:
        return _report(job, finished.calibration["report"], started)
    work = WorkFolder(
        job.partial, job.key(), resume=job.resume, overwrite=job.overwrite, reuse_blocks=job.settings.inputs == "float"
    )
    try:
        plan = job.plan()
        if job.progress:
            print(*plan.lines(), sep="\n", file=sys.stderr)
        try:
            check_space(job.folder, plan.disk_needed - work.bytes())
        except UsageError:
            if not work.done:
                work.remove()
            raise
        with job.bar(work) as bar:
            for step, cost in list(zip(job.steps, job.costs, strict=True))[work.done :]:
                bar.set_description_str(step.path.removeprefix("model."))
                work.commit(_run_step(job, work, step, Ticks(bar, *cost)))
        reports = [work.blocks[path]["report"] for path in job.quantized_paths()]
        write_checkpoint(
            job.source, job.quantized_paths(), work, job.folder, job.manifest(reports), overwrite=job.overwrite
        )
    finally:
        work.close()
    work.remove()
    return _report(job, reports, started)


def plan_calibration(
    model: str | Path, samples: Samples | str | Path | None, *, out: str | Path, **options: Unpack[Options]
) -> Plan:
    """What `calibrate` with the same arguments takes: tokens, blocks, memory, disk and time. Writes nothing; raises
    what `calibrate` raises before its work."""
    job = _job(model, samples, out, options)
    job.finished()
    return job.plan()


def _job(model: str | Path, samples: Samples | str | Path | None, out: str | Path, options: Options) -> Job:
    return Job(
        FloatSource(model), Samples.load(samples) if isinstance(samples, str | Path) else samples, Path(out), options
    )


def _report(job: Job, blocks: list[dict[str, Any]], started: float) -> CheckpointReport:
    return CheckpointReport(
        checkpoint=str(job.out),
        method=job.method,
        regime=job.regime,
        modules=job.modules,
        source_fingerprint=job.source.fingerprint,
        samples_fingerprint=job.samples.fingerprint if job.samples else None,
        samples=len(job.samples or ()),
        seed=job.seed,
        settings=job.settings.to_dict(),
        blocks=blocks,
        seconds=time.monotonic() - started,
    )


class Ticks:
    """One step's share of the bar. passing, calibrating: its estimated seconds."""

    def __init__(self, bar: tqdm, passing: float, calibrating: float) -> None:
        self.bar, self.passing, self.calibrating = bar, passing, calibrating

    def passed(self) -> None:
        """The samples went through the step."""
        self.bar.update(self.passing)

    def calibrated(self, share: float) -> None:
        """That share of the calibration is done."""
        self.bar.update(self.calibrating * share)


def _run_step(job: Job, work: WorkFolder, step: Step, ticks: Ticks) -> dict[str, Stream]:
    """Do one step and return the streams it leaves: "float", and "quantized" where blocks learn from quantized
    inputs."""
    if step.kind in ("vision", "projector", "decoder"):
        return _run_block(job, work, step, ticks)
    ticks.passed()
    if step.kind == "images":
        return {"float": _embed_images(job, work)}
    if step.kind == "score":
        assert job.recipe is not None
        before = None if step.index == BEFORE else _decoder_block(job, step.index - 1)
        pair = (before, _decoder_block(job, max(step.index, 0)))
        masks = prune.keep_masks(
            job.recipe, step.index, pair, work.streams["float"], partial(_pictures, job, work), job.settings.device
        )
        work.notes["keep"] = [mask.astype(int).tolist() for mask in masks]
        return work.streams
    return {name: _reshape(job, work, step, name) for name in work.streams}


def _decoder_block(job: Job, index: int) -> Block:
    return job.source.block("decoder", job.source.family.decoder_layer(index), job.settings.device)


def _pictures(job: Job, work: WorkFolder, item: int) -> ImageTokens:
    shown = [ImageInfo(digest, grid and (grid[0], grid[1])) for digest, grid in work.notes["shown"][item]]
    return ImageTokens.of(job.source.family.image_index(torch.tensor(work.notes["ids"][item])[None]), shown)


def _reshape(job: Job, work: WorkFolder, step: Step, name: str) -> Stream:
    stream, path = work.streams[name], work.stream_path(name)
    if step.kind == "features":
        return select_features(job.source, stream, path)
    if step.kind == "text":
        grids = [(int(t), int(h), int(w)) for t, h, w in work.notes["grids"]]
        return embed_text(job.source, [torch.tensor(ids) for ids in work.notes["ids"]], stream, path, grids)
    assert job.recipe is not None
    masks = [np.asarray(mask, bool) for mask in work.notes["keep"]]
    target = stream.like(path, lengths=[int(mask.sum()) for mask in masks])
    return prune.gather(stream, masks, job.recipe.position_policy == "compact", target)


def _embed_images(job: Job, work: WorkFolder) -> Stream:
    ids: list[list[int]] = []
    grids = job.grids
    shown: list[list[tuple[str, tuple[int, int] | None]]] = []

    def images() -> Iterator[ImageInput]:
        for sample in job.samples or ():
            encoded = encode(job.processor, sample, answer=True)
            ids.append(encoded["input_ids"][0].tolist())
            own = job.source.family.images(encoded)
            shown.append([(seen.digest, seen.grid) for seen in map(job.source.family.shown, own)])
            yield from own

    stream = embed_images(job.source, images(), grids, work.stream_path("float"), job.settings.stream_dtype)
    work.notes["ids"], work.notes["grids"], work.notes["shown"] = (
        ids,
        [grid for grid in grids if grid is not None],
        shown,
    )
    return stream


def _run_block(job: Job, work: WorkFolder, step: Step, ticks: Ticks) -> dict[str, Stream]:
    settings, source = job.settings, job.source
    block = source.block(cast(Part, step.kind), step.path, settings.device)
    if job.samples is None:
        tensors = round_weights(block)
        work.save_block(step.path, tensors, {"name": step.path})
        ticks.calibrated(1)
        return {}
    width = source.family.hidden_size if step.kind == "projector" else None
    inputs = work.streams["float"]
    outputs = inputs.like(work.stream_path("float"), width)
    advance(block, inputs, outputs, settings.batch, settings.device)
    ticks.passed()
    quantized = work.streams.get("quantized")
    if not job.is_quantized(step):
        return {"float": outputs, **_advance_quantized(block, work, quantized, width, settings)}
    if step.path in work.blocks:  # kept when other files of the work folder were damaged
        ticks.calibrated(1)
        return {"float": outputs}
    if quantized is None and settings.inputs != "float":
        quantized = inputs
    lesson = BlockData(inputs, outputs, quantized, seed=zlib.crc32(f"{job.seed}:{step.path}".encode()))
    parts = 1 + (settings.steps if job.regime == "w4a4kv4" else len(block.plans))
    if job.regime == "w4a16":
        tensors, report = quantize_weights(
            block, lesson, job.method, settings, progress=lambda _: ticks.calibrated(1 / parts)
        )
    else:
        block.quantize_linears()
        report = learn_block(block, lesson, settings, progress=lambda _: ticks.calibrated(1 / parts))
        tensors = block.export()
    ticks.calibrated(1 / parts)
    work.save_block(step.path, tensors, report.to_dict())
    return {"float": outputs, **_advance_quantized(block, work, quantized, width, settings)}


def _advance_quantized(
    block: Block, work: WorkFolder, quantized: Stream | None, width: int | None, settings: Settings
) -> dict[str, Stream]:
    if quantized is None:
        return {}
    target = quantized.like(work.stream_path("quantized"), width)
    advance(block, quantized, target, settings.batch, settings.device)
    return {"quantized": target}
