"""`calibrate`: float checkpoint + samples -> quantized checkpoint, one block in memory at a time, or of small ones one
per thread."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quota.calib.crew import Crew
from quota.calib.export import write_checkpoint
from quota.calib.job import Job
from quota.calib.parts import take_unpruned
from quota.calib.plan import Plan
from quota.calib.samples import Samples
from quota.calib.schedule import Schedule
from quota.calib.settings import DEFAULTS, Settings
from quota.calib.stream import FloatSource
from quota.calib.work import WorkFolder
from quota.core.devices import checked_device, named_device
from quota.core.errors import CheckpointError, UsageError
from quota.core.files import check_space
from quota.core.malloc import keep_freed_memory
from quota.core.recipe import Recipe
from quota.core.registry import Context
from quota.ops import token_score


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
    model: str | Path,
    samples: Samples | str | Path | None,
    *,
    out: str | Path,
    settings: Settings = DEFAULTS,
    recipe: Recipe | None = None,
    unpruned: str | Path | None = None,
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
) -> CheckpointReport:
    """Quantize a float checkpoint (folder or hub name) on `samples` and write the quantized checkpoint folder `out`.

    Vision, projector and decoder blocks are calibrated on the float model's hidden states, one after the other or,
    small ones, side by side (FlatQuant: learned Kronecker transforms, per-channel scales, clips; GPTQ and AWQ:
    `quota.calib.weight_only`). Killed in the middle, the same call continues; `out` appears only when it is complete. A
    checkpoint that the same call has made is reported as it is.

    samples may be None for method "rtn", whose report then has no errors to tell. recipe: calibrate the decoder on the
    graph this recipe prunes. unpruned: the checkpoint that the same call without a recipe made; the blocks before the
    first candidate are taken from it, where they depend on the float model alone. progress: the plan and a bar on
    stderr. resume: continue from `<out>.partial` (which must belong to the same run), or empty it. overwrite: replace a
    finished checkpoint of other settings, discard the `<out>.partial` of another run. Same inputs, same bytes (on the
    same machine; large blocks also need the same number of threads: `quota.calib.schedule.Schedule.apart`). Raises
    UsageError (options, `out` holds something else, too little disk), CheckpointError (model, an altered
    `<out>.partial`), SampleError (samples), RecipeError (recipe of another model), all of them before the work.

    On another device than the CPU (`settings.device`) samples and streams stay on the host, the device holds a block
    and the batches at hand; in float32 each block's errors are within 1 % of the CPU's before and 15 % after learning
    (docs/numerics.md). A calibration is continued on the kind of device, and in the dtype, that it was begun with.
    """
    started = time.monotonic()
    keep_freed_memory()
    where = checked_device(settings.device)
    if recipe is not None and any(recipe.selection_at(candidate).score == "quota" for candidate in recipe.candidates):
        token_score.choose(Context(where.type, where.index or 0))  # the one op a calibration calls
    job = _job(FloatSource(model), samples, out, settings, recipe=recipe, resume=resume, overwrite=overwrite)
    finished = job.finished()
    if finished is not None:
        return _report(job, finished.calibration["report"], started)
    schedule = Schedule(job)
    work = WorkFolder(
        job.partial, job.key(), resume=resume, overwrite=overwrite, reuse_blocks=settings.learns_from == "float"
    )
    try:
        schedule.check(work)
        plan = schedule.plan()
        if progress:
            print(*plan.lines(), sep="\n", file=sys.stderr)
        try:
            if unpruned is not None and job.samples is not None and settings.learns_from == "float":
                take_unpruned(job, work, Path(unpruned))
            check_space(job.folder, plan.disk_needed - work.bytes())
        except (UsageError, CheckpointError):
            if not work.done:
                work.remove()
            raise
        with schedule.threads(), schedule.bar(work, progress) as bar, Crew(job, work, bar, schedule.crew) as crew:
            crew.run(list(zip(schedule.steps, schedule.seconds, strict=True))[work.done :])
        reports = [work.report(path) for path in schedule.paths]
        write_checkpoint(job.source, schedule.paths, work, job.folder, job.manifest(reports), overwrite=overwrite)
    finally:
        work.close()
    work.remove()
    return _report(job, reports, started)


def plan_calibration(
    model: str | Path,
    samples: Samples | str | Path | None,
    *,
    out: str | Path,
    settings: Settings = DEFAULTS,
    recipe: Recipe | None = None,
    resume: bool = True,
    overwrite: bool = False,
) -> Plan:
    """What `calibrate` with the same arguments takes: tokens, blocks, memory, disk and time. Writes nothing; raises
    what `calibrate` raises before its work, but for two things a plan does without: the weights of `model` (their sizes
    follow from its configuration) and a CUDA device (the time is then that of an H200 by its data sheet)."""
    named_device(settings.device)
    source = FloatSource(model, planned=True)
    job = _job(source, samples, out, settings, recipe=recipe, resume=resume, overwrite=overwrite)
    job.finished()
    return Schedule(job).plan()


def _job(
    source: FloatSource, samples: Samples | str | Path | None, out: str | Path, settings: Settings, **options: Any
) -> Job:
    read = Samples.load(samples) if isinstance(samples, str | Path) else samples
    return Job(source, read, Path(out), settings, **options)


def _report(job: Job, blocks: list[dict[str, Any]], started: float) -> CheckpointReport:
    return CheckpointReport(
        checkpoint=str(job.out),
        method=job.settings.method,
        regime=job.settings.makes.name,
        modules=tuple(job.settings.modules),
        source_fingerprint=job.source.fingerprint,
        samples_fingerprint=job.samples.fingerprint if job.samples else None,
        samples=len(job.samples or ()),
        seed=job.settings.seed,
        settings=job.settings.numbers(),
        blocks=blocks,
        seconds=time.monotonic() - started,
    )
