"""`calibrate`: float checkpoint + samples -> quantized checkpoint, one block in memory at a time."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch
from tqdm import tqdm

from quota.arch.processing import image_backend
from quota.calib import prune
from quota.calib.blocks import Block
from quota.calib.export import processor_of, write_checkpoint
from quota.calib.families import PLANS, Grid
from quota.calib.learn import Lesson, learn_block
from quota.calib.samples import Samples, encode
from quota.calib.settings import METHODS, MODULES, Settings, default_settings
from quota.calib.stream import FloatSource, Stream, advance, embed_images, embed_text, select_features
from quota.calib.weight_only import quantize_weights
from quota.calib.work import WorkFolder
from quota.core.errors import SampleError, UsageError
from quota.core.recipe import BEFORE, Recipe
from quota.core.version import VERSION
from quota.nn.checkpoint import Manifest
from quota.nn.pictures import Pictures, Shown, shown_pictures


class Options(TypedDict, total=False):
    """Keyword options of `calibrate`.

    method: "flatquant" (W4A4KV4), or weight-only (W4A16) "gptq", "awq" and, without calibration, "rtn". modules: some of "vision", "projector", "llm"; the
    rest stays float. seed: same seed, same bytes (same machine and thread count). steps: optimiser steps per block of flatquant (None: the default of
    Settings). recipe: calibrate the decoder on the graph this recipe prunes. progress: a bar on stderr. resume: continue from `<out>.partial` when it
    belongs to the same run. settings: everything else; None: `default_settings(method)`.
    """

    method: str
    modules: Collection[str]
    seed: int
    steps: int | None
    recipe: Recipe | None
    progress: bool
    resume: bool
    settings: Settings | None


@dataclass(frozen=True)
class CheckpointReport:
    """What was written. blocks: one BlockReport dictionary per quantized block, in model order. seconds: wall time of this call (not stored)."""

    checkpoint: str
    method: str
    regime: str
    modules: tuple[str, ...]
    source_fingerprint: str
    samples_fingerprint: str
    samples: int
    seed: int
    settings: dict[str, Any]
    blocks: list[dict[str, Any]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """One unit of work; `kind` block steps read and write the stream, the others change its shape. index: layer number."""

    kind: Literal["images", "vision", "features", "projector", "text", "score", "gather", "decoder"]
    path: str
    index: int = 0


def calibrate(model: str | Path, samples: Samples | str | Path, *, out: str | Path, **options: Unpack[Options]) -> CheckpointReport:
    """Quantize a float checkpoint (folder or hub name) on `samples` and write the quantized checkpoint folder `out`.

    Decoder, vision and projector blocks are calibrated one after the other on the float model's hidden states (FlatQuant: learned Kronecker transforms,
    per-channel scales, clips; GPTQ and AWQ: `quota.calib.weight_only`). Killed in the middle, the same call continues; `out` appears only when it is complete.
    Raises UsageError (options), CheckpointError (model), SampleError (samples), RecipeError (recipe of another model).
    """
    started = time.monotonic()
    job = Job(FloatSource(model), samples if isinstance(samples, Samples) else Samples.load(samples), Path(out), options)
    work = WorkFolder(job.out.with_name(job.out.name + ".partial"), job.key(), options.get("resume", True))
    try:
        with job.bar(work) as bar:
            for step in job.steps[work.done :]:
                bar.set_description_str(step.path.removeprefix("model."))
                work.commit(_run_step(job, work, step, bar))
        write_checkpoint(job.source, job.quantized_paths(), work, job.out, job.manifest(work.reports))
    finally:
        work.close()
    work.remove()
    return CheckpointReport(
        checkpoint=str(job.out), method=job.method, regime=job.regime, modules=job.modules, source_fingerprint=job.source.fingerprint,
        samples_fingerprint=job.samples.fingerprint, samples=len(job.samples), seed=job.seed, settings=job.settings.to_dict(), blocks=work.reports,
        seconds=time.monotonic() - started,
    )  # fmt: skip


class Job:
    """The checked inputs of one calibration and the steps it consists of."""

    def __init__(self, source: FloatSource, samples: Samples, out: Path, options: Options) -> None:
        self.source, self.samples, self.out = source, samples, out
        self.method, self.seed = options.get("method", "flatquant"), options.get("seed", 0)
        self.progress = options.get("progress", True)
        self.recipe = options.get("recipe")
        if self.method not in METHODS:
            raise UsageError(f"method: expected one of {list(METHODS)}, got {self.method!r}")
        self.regime = METHODS[self.method]
        self.modules = _check_modules(options.get("modules", MODULES))
        settings, steps = options.get("settings") or default_settings(self.method), options.get("steps")
        if self.regime == "w4a16" and (steps is not None or settings.inputs == "mixed"):
            what = "inputs: 'mixed'" if steps is None else f"steps: {steps}"
            raise UsageError(f"{what}: only method 'flatquant' learns in steps from batches; leave it out with {self.method!r}")
        self.settings = settings if steps is None else replace(settings, steps=steps)
        if self.recipe is not None:
            self.recipe.check_model(source.fingerprint, source.arch.layers)
        if out.exists() and not out.is_dir():
            raise UsageError(f"out {out}: expected a folder or a new path, found a file")
        self.pictures = sum(sample.image_bytes is not None for sample in samples)
        if not self.pictures and {"vision", "projector"} & set(self.modules):
            raise SampleError("samples: expected at least one picture to calibrate the vision tower and projector, found text only; use modules=('llm',)")
        self.processor = processor_of(source.folder)
        self.steps = list(self._steps())

    def _steps(self) -> Iterator[Step]:
        arch = self.source.arch
        yield Step("images", arch.vision_path)
        for index in range(arch.vision_layers_used):
            yield Step("vision", arch.vision_layer(index), index)
        yield Step("features", arch.vision_path)
        yield Step("projector", arch.projector_path)
        if "llm" not in self.modules:
            return
        yield Step("text", arch.embed_path)
        candidates = self.recipe.candidates if self.recipe else ()
        if BEFORE in candidates:
            yield Step("score", arch.decoder_layer(0), BEFORE)
            yield Step("gather", arch.decoder_layer(0), BEFORE)
        for index in range(arch.layers):
            if index in candidates:
                yield Step("gather", arch.decoder_layer(index), index)
            if index + 1 in candidates:
                yield Step("score", arch.decoder_layer(index), index + 1)
            yield Step("decoder", arch.decoder_layer(index), index)

    def is_quantized(self, step: Step) -> bool:
        """Whether the step calibrates a block."""
        return {"vision": "vision", "projector": "projector", "decoder": "llm"}.get(step.kind) in self.modules

    def quantized_paths(self) -> list[str]:
        """Module paths of the blocks that are quantized."""
        return [step.path for step in self.steps if self.is_quantized(step)]

    def key(self) -> str:
        """Digest of everything the result depends on."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(self.source.folder.glob("*.safetensors"))]
        parts = {
            "source": self.source.fingerprint, "files": files, "samples": self.samples.fingerprint, "settings": self.settings.to_dict(), "seed": self.seed,
            "method": self.method, "modules": self.modules, "recipe": self.recipe and self.recipe.dumps(), "version": VERSION,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def manifest(self, blocks: list[dict[str, Any]]) -> Manifest:
        """What quota.json says about this calibration; no times, so equal runs write equal bytes."""
        recipe = None if self.recipe is None else "sha256:" + hashlib.sha256(self.recipe.dumps().encode()).hexdigest()
        calibration = {
            "method": self.method, "image_backend": image_backend(self.processor),
            "samples": len(self.samples), "samples_fingerprint": self.samples.fingerprint, "seed": self.seed,
            "settings": self.settings.to_dict(), "pruned_by": recipe, "report": blocks,
        }  # fmt: skip
        return Manifest(self.regime, self.modules, self.source.fingerprint, calibration)

    def bar(self, work: WorkFolder) -> tqdm:
        """One tick per optimiser step, or per projection group that is rounded."""

        def ticks_of(step: Step) -> int:
            if not self.is_quantized(step):
                return 1
            return 1 + (self.settings.steps if self.regime == "w4a4kv4" else len(PLANS[self.source.arch.name][step.kind]))

        ticks = [ticks_of(step) for step in self.steps]
        return tqdm(total=sum(ticks), initial=sum(ticks[: work.done]), disable=not self.progress, unit="step")


def _check_modules(modules: Collection[str]) -> tuple[str, ...]:
    wrong = sorted(set(modules) - set(MODULES))
    if wrong or not modules or isinstance(modules, str):
        raise UsageError(f"modules: expected some of {list(MODULES)}, got {modules if isinstance(modules, str) else wrong or 'none'}")
    return tuple(name for name in MODULES if name in modules)


def _run_step(job: Job, work: WorkFolder, step: Step, bar: tqdm) -> dict[str, Stream]:
    """Do one step and return the streams it leaves: "float", and "quantized" where blocks learn from quantized inputs."""
    if step.kind in ("vision", "projector", "decoder"):
        return _run_block(job, work, step, bar)
    bar.update(1)
    if step.kind == "images":
        return {"float": _embed_images(job, work)}
    if step.kind == "score":
        assert job.recipe is not None
        before = None if step.index == BEFORE else _decoder_block(job, step.index - 1)
        pair = (before, _decoder_block(job, max(step.index, 0)))
        masks = prune.keep_masks(job.recipe, step.index, pair, work.streams["float"], partial(_pictures, job, work), job.settings.device)
        work.notes["keep"] = [mask.astype(int).tolist() for mask in masks]
        return work.streams
    return {name: _reshape(job, work, step, name) for name in work.streams}


def _decoder_block(job: Job, index: int) -> Block:
    return job.source.block("decoder", job.source.arch.decoder_layer(index), job.settings.device)


def _pictures(job: Job, work: WorkFolder, item: int) -> Pictures:
    shown = [Shown(digest, grid and (grid[0], grid[1])) for digest, grid in work.notes["shown"][item]]
    return Pictures.of(job.source.arch.image_index(torch.tensor(work.notes["ids"][item])[None]), shown)


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
    grids = _grids(job)
    shown: list[list[tuple[str, tuple[int, int] | None]]] = []

    def pixels() -> Iterator[torch.Tensor]:
        for sample in job.samples:
            encoded = encode(job.processor, sample, answer=True)
            ids.append(encoded["input_ids"][0].tolist())
            pictures = shown_pictures(encoded["pixel_values"], encoded.get("image_grid_thw"), job.source.arch.merge) if "pixel_values" in encoded else []
            shown.append([(picture.digest, picture.grid) for picture in pictures])
            if "pixel_values" in encoded:
                yield encoded["pixel_values"]

    stream = embed_images(job.source, pixels(), grids, work.stream_path("float"), job.settings.stream_dtype)
    work.notes["ids"], work.notes["grids"], work.notes["shown"] = ids, [grid for grid in grids if grid is not None], shown
    return stream


def _grids(job: Job) -> list[Grid | None]:
    """The patch grid of every picture, where resolution is dynamic: the stream must know its lengths before pixels arrive."""
    if job.source.arch.visual_tokens is not None:
        return [None] * job.pictures
    with_picture = (encode(job.processor, sample) for sample in job.samples if sample.image_bytes is not None)
    return [tuple(encoded["image_grid_thw"][0].tolist()) for encoded in with_picture]


def _run_block(job: Job, work: WorkFolder, step: Step, bar: tqdm) -> dict[str, Stream]:
    settings, source = job.settings, job.source
    block = source.block(step.kind, step.path, settings.device)
    width = source.arch.hidden_size if step.kind == "projector" else None
    inputs = work.streams["float"]
    outputs = inputs.like(work.stream_path("float"), width)
    advance(block, inputs, outputs, settings.batch, settings.device)
    quantized = work.streams.get("quantized")
    if not job.is_quantized(step):
        bar.update(1)
        return {"float": outputs, **_advance_quantized(block, work, quantized, width, settings)}
    if quantized is None and settings.inputs != "float":
        quantized = inputs
    lesson = Lesson(inputs, outputs, quantized, seed=zlib.crc32(f"{job.seed}:{step.path}".encode()))
    if job.regime == "w4a16":
        tensors, report = quantize_weights(block, lesson, job.method, settings, progress=lambda _: bar.update(1))
    else:
        block.quantize_linears()
        report = learn_block(block, lesson, settings, progress=lambda _: bar.update(1))
        tensors = block.export()
    bar.update(1)
    work.save_block(step.path, tensors)
    work.reports.append(report.to_dict())
    return {"float": outputs, **_advance_quantized(block, work, quantized, width, settings)}


def _advance_quantized(block: Block, work: WorkFolder, quantized: Stream | None, width: int | None, settings: Settings) -> dict[str, Stream]:
    if quantized is None:
        return {}
    target = quantized.like(work.stream_path("quantized"), width)
    advance(block, quantized, target, settings.batch, settings.device)
    return {"quantized": target}
