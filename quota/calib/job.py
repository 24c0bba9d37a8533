"""One calibration before it runs: the checked inputs, the steps it consists of, and what they take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

from tqdm import tqdm

from quota.calib.export import float_names, processor_of
from quota.calib.plan import BlockSize, Plan, Speed, block_seconds, measured_speed, peak_memory
from quota.calib.samples import Samples, check_texts, encode
from quota.calib.settings import METHODS, Settings, default_settings
from quota.calib.stream import FloatSource
from quota.calib.work import WorkFolder, difference
from quota.core.checkpoint import MANIFEST, Manifest, check_destination
from quota.core.checkpoint_files import verify_files
from quota.core.errors import CheckpointError, SampleError, UsageError
from quota.core.files import free_bytes
from quota.core.formats import MODULES, scheme_made_by
from quota.core.recipe import Recipe
from quota.core.version import VERSION
from quota.models.base import Part
from quota.models.images import PatchGrid
from quota.models.processing import image_backend


class Options(TypedDict, total=False):
    """Keyword options of `calibrate`.

    method: "flatquant", or of weights alone "gptq", "awq" and, without calibration, "rtn". modules: some
    of "vision", "projector", "llm"; the rest stays float. scheme: one that the method makes, by name; None: the first
    of `quota.core.formats.SCHEMES` that lists it. seed: same seed, same bytes (same machine and thread count).
    steps: optimiser steps per block of flatquant (None: the default of Settings). recipe: calibrate the decoder on the
    graph this recipe prunes. progress: the plan and a bar on stderr. resume: continue from `<out>.partial` (which must
    belong to the same run), or empty it. overwrite: replace a finished checkpoint of other settings, discard the
    `<out>.partial` of another run. settings: everything else; None: `default_settings(method)`.
    """

    method: str
    scheme: str | None
    modules: Collection[str]
    seed: int
    steps: int | None
    recipe: Recipe | None
    progress: bool
    resume: bool
    overwrite: bool
    settings: Settings | None


@dataclass(frozen=True)
class Step:
    """One unit of work; `kind` block steps read and write the stream, the others change its shape. index: layer
    number."""

    kind: Literal["images", "vision", "features", "projector", "text", "score", "gather", "decoder"]
    path: str
    index: int = 0


class Job:
    """The checked inputs of one calibration and the steps it consists of."""

    def __init__(self, source: FloatSource, samples: Samples | None, out: Path, options: Options) -> None:
        self.source, self.out = source, out
        self.method, self.seed = options.get("method", "flatquant"), options.get("seed", 0)
        self.progress = options.get("progress", True)
        self.recipe = options.get("recipe")
        if self.method not in METHODS:
            raise UsageError(f"method: expected one of {list(METHODS)}, got {self.method!r}")
        try:
            self.scheme = scheme_made_by(self.method, options.get("scheme"))
        except ValueError as error:
            raise UsageError(f"scheme: {error}; leave it out, or choose another method") from None
        self.modules = _check_modules(options.get("modules", MODULES))
        settings, steps = options.get("settings") or default_settings(self.method), options.get("steps")
        if not METHODS[self.method].learns and (steps is not None or settings.inputs == "mixed"):
            what = "inputs: 'mixed'" if steps is None else f"steps: {steps}"
            raise UsageError(
                f"{what}: only method 'flatquant' learns in steps from batches; leave it out with {self.method!r}"
            )
        self.settings = settings if steps is None else replace(settings, steps=steps)
        if self.recipe is not None:
            self.recipe.check_model(source.fingerprint, source.family.layers, source.family.model_class)
        self.folder = _check_out(out, source.folder)
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.resume, self.overwrite = options.get("resume", True), options.get("overwrite", False)
        self.samples, self.pictures = samples, sum(sample.image_bytes is not None for sample in samples or ())
        if samples is None and METHODS[self.method].samples:
            raise UsageError(
                f"samples: method {self.method!r} learns from samples; give a samples file (only 'rtn' rounds without)"
            )
        if samples is not None and not self.pictures and {"vision", "projector"} & set(self.modules):
            raise SampleError(
                "samples: expected at least one image to calibrate the vision tower and projector, found text only;"
                " use modules=('llm',)"
            )
        self.processor = processor_of(source.folder)
        check_texts(self.processor, samples or ())
        self.steps = list(self._steps())

    def _steps(self) -> Iterator[Step]:
        every = self._every_step()
        return every if self.samples is not None else (step for step in every if self.is_quantized(step))

    def _every_step(self) -> Iterator[Step]:
        family = self.source.family
        yield Step("images", family.vision_path)
        for index in range(family.vision_layers_used):
            yield Step("vision", family.vision_layer(index), index)
        yield Step("features", family.vision_path)
        yield Step("projector", family.projector_path)
        if "llm" not in self.modules:
            return
        yield Step("text", family.embed_path)
        candidates = self.recipe.candidates if self.recipe else ()
        if 0 in candidates:
            yield Step("score", family.decoder_layer(0), 0)
        for index in range(family.layers):
            if index in candidates:
                yield Step("gather", family.decoder_layer(index), index)
            if index + 1 in candidates:
                yield Step("score", family.decoder_layer(index), index + 1)
            yield Step("decoder", family.decoder_layer(index), index)

    def is_quantized(self, step: Step) -> bool:
        """Whether the step calibrates a block."""
        return {"vision": "vision", "projector": "projector", "decoder": "llm"}.get(step.kind) in self.modules

    def quantized_paths(self) -> list[str]:
        """Module paths of the blocks that are quantized."""
        return [step.path for step in self.steps if self.is_quantized(step)]

    @cached_property
    def prompts(self) -> list[tuple[list[int], PatchGrid | None]]:
        """Of every sample its token ids and, where resolution is dynamic, its image's patch grid. Everything is
        encoded once, before the work."""
        out = []
        for sample in self.samples or ():
            encoded = encode(self.processor, sample, answer=True)
            grids = [image.grid for image in self.source.family.images(encoded)]
            out.append((encoded["input_ids"][0].tolist(), grids[0] if grids else None))
        return out

    @cached_property
    def grids(self) -> list[PatchGrid | None]:
        """Of every image, in order: None for a family of one image size."""
        return [
            grid
            for (_, grid), sample in zip(self.prompts, self.samples or (), strict=True)
            if sample.image_bytes is not None
        ]

    def settings_of_result(self) -> dict[str, Any]:
        """What the result depends on and a manifest tells, under the names a reader of a refusal knows."""
        return {
            "model": self.source.fingerprint,
            "samples": self.samples and self.samples.fingerprint,
            "method": self.method,
            "scheme": self.scheme.name,
            "modules": list(self.modules),
            "seed": self.seed,
            "recipe": self.recipe and self.recipe.digest,
            "quota version": VERSION,
            **{f"settings.{name}": value for name, value in self.settings.to_dict().items()},
        }

    def key(self) -> dict[str, Any]:
        """Everything the result depends on, as far as can be told without reading the weights."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.source.files()]
        return {**self.settings_of_result(), "model files": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}

    def finished(self) -> Manifest | None:
        """The manifest at `out` when this very calibration has already made it. UsageError when something else is there
        that may not be replaced."""
        if not (self.folder / MANIFEST).is_file():
            check_destination(self.folder)
            return None
        manifest = Manifest.load(self.folder)
        other = difference(_settings_of(manifest), self.settings_of_result())
        if other is None and manifest.calibration.get("source_files") != self.source.digest:
            other = "the model's files differ"
        if other is not None and not self.overwrite:
            raise UsageError(
                f"out {self.out}: holds a quantized checkpoint of other settings ({other}); choose another folder, or"
                " replace it with --overwrite"
            )
        if self.overwrite and (other is not None or not self.resume):
            check_destination(self.folder, overwrite=True)
            return None
        try:
            verify_files(self.folder, manifest)
        except CheckpointError as error:
            if self.overwrite:
                check_destination(self.folder, overwrite=True)
                return None
            raise UsageError(
                f"out {self.out}: holds this checkpoint, but damaged ({error}); make it again with --overwrite"
            ) from error
        if not self.resume:
            raise UsageError(f"out {self.out}: holds this checkpoint already; make it again with --fresh --overwrite")
        return manifest

    def manifest(self, blocks: list[dict[str, Any]]) -> Manifest:
        """What quota.json says about this calibration; no times, so equal runs write equal bytes."""
        calibration = {
            "method": self.method,
            "image_backend": image_backend(self.processor),
            "samples": len(self.samples or ()),
            "samples_fingerprint": self.samples and self.samples.fingerprint,
            "seed": self.seed,
            "settings": self.settings.to_dict(),
            "pruned_by": self.recipe and self.recipe.digest,
            "source_files": self.source.digest,
            "report": blocks,
        }
        return Manifest(self.scheme, self.modules, self.source.fingerprint, calibration)

    # -- what it takes -------------------------------------------------------------------------------------------------

    @cached_property
    def costs(self) -> list[tuple[float, float]]:
        """Of every step the estimated seconds (passing the samples through, calibrating its block)."""
        speed = measured_speed(self.settings.device)
        return [self.cost(step, speed) for step in self.steps]

    def cost(self, step: Step, speed: Speed) -> tuple[float, float]:
        """Of one step at this speed."""
        lengths = self._lengths(step)
        if step.kind in ("images", "features", "text", "gather"):
            return sum(lengths) * self.source.family.hidden_size * 16 * speed.element_s, 0.0
        method = self.method if self.is_quantized(step) else None
        passing, calibrating = block_seconds(self.block_size(step), lengths, method, self.settings, speed)
        return (2 * passing if step.kind == "score" else passing), calibrating

    def _lengths(self, step: Step) -> list[int]:
        """Rows of each item in the stream that the step reads."""
        family, text = self.source.family, step.kind not in ("images", "vision", "features", "projector")
        if not text:
            rows = [family.tower_rows(grid) for grid in self.grids]
            return [n // family.merge**2 for n in rows] if step.kind == "projector" else rows
        share = 1.0
        for candidate, keep in zip(self.recipe.candidates, self.recipe.keep, strict=True) if self.recipe else ():
            if candidate < step.index or (candidate == step.index and step.kind == "decoder"):
                share = keep
        visual = [sum(token == family.image_token_id for token in ids) for ids, _ in self.prompts]
        return [len(ids) - n + round(share * n) for (ids, _), n in zip(self.prompts, visual, strict=True)]

    def block_size(self, step: Step) -> BlockSize:
        """Of the block at the step's path."""
        kind: Part = "vision" if step.kind == "vision" else "projector" if step.kind == "projector" else "decoder"
        return BlockSize.of(self.source.skeleton.get_submodule(step.path), self.source.family, kind)

    def _widths(self, step: Step) -> tuple[int, int]:
        """Of the streams that the step reads and writes."""
        family = self.source.family
        tower, features, text = (
            family.vision_hidden_size,
            family.vision_hidden_size * family.merge**2,
            family.hidden_size,
        )
        return {
            "images": (0, tower),
            "vision": (tower, tower),
            "features": (tower, features),
            "projector": (features, text),
        }.get(step.kind, (text, text))

    def _disk(self, stored: int, rest: int) -> int:
        """Bytes at the fullest moment: a step's streams beside all blocks, or the last stream and the blocks beside the
        result."""
        element = (4 if self.settings.stream_dtype == "float32" else 2) * (1 if self.settings.inputs == "float" else 2)
        rows = [sum(self._lengths(step)) for step in self.steps]
        beside = [
            n * read + m * write
            for n, m, (read, write) in zip(rows, [*rows[1:], *rows[-1:]], map(self._widths, self.steps), strict=True)
        ]
        last = rows[-1] * self._widths(self.steps[-1])[1] if rows else 0
        state = (
            sum(rows[-1:]) * 32
            + sum(len(ids) for ids, _ in self.prompts) * 8
            + 1024 * len(self.quantized_paths())
            + 2**12
        )
        return max(element * max(beside, default=0) + stored, element * last + 2 * stored + rest) + 2 * state

    def plan(self) -> Plan:
        """What a run takes. Encodes the samples; writes nothing."""
        blocks = [step for step in self.steps if step.kind in ("vision", "projector", "decoder")]
        sizes = {step.path: self.block_size(step) for step in blocks}
        stored = sum(sizes[path].quantized_bytes(self.scheme) for path in self.quantized_paths())
        rest = sum(self.source.stored[name][1] + 256 for name in float_names(self.source, self.quantized_paths()))
        rest += sum(path.stat().st_size for path in self.source.files() if path.suffix != ".safetensors") + 2**16
        longest = max((max(self._lengths(step), default=0) for step in blocks), default=0)
        tokens = sum(len(ids) for ids, _ in self.prompts)
        return Plan(
            samples=len(self.samples or ()),
            images=self.pictures,
            tokens=tokens,
            blocks=len(self.quantized_paths()),
            blocks_all=len(blocks),
            peak_memory=peak_memory(
                [sizes[path] for path in self.quantized_paths()], longest, self.settings, stored + rest
            ),
            disk_needed=self._disk(stored, rest),
            disk_free=free_bytes(self.folder.parent),
            seconds=sum(map(sum, self.costs)),
        )

    def bar(self, work: WorkFolder) -> tqdm:
        """Counts estimated seconds, so that a step weighs what it takes; the time left is scaled by what the steps so
        far really took."""
        done = sum(map(sum, self.costs[: work.done]))
        shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        return tqdm(
            total=sum(map(sum, self.costs)), initial=done, disable=not self.progress, smoothing=0, bar_format=shown
        )


def _check_out(out: Path, model: Path) -> Path:
    """The folder that `out` stands for, links followed. UsageError where it is a file, the model's folder or one that
    holds it or the working folder."""
    folder = out.resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out {out}: expected a folder or a new path, found a file")
    for what, other in (("the model's folder", model.resolve()), ("the working folder", Path.cwd())):
        if folder == other or folder in other.parents:
            raise UsageError(f"out {out}: expected a new folder, got {what} or one that holds it")
    return folder


def _settings_of(manifest: Manifest) -> dict[str, Any]:
    """`Job.settings_of_result` as far as a manifest tells it; what it does not tell is None, which no job has."""
    told = manifest.calibration
    settings = told.get("settings")
    return {
        "model": manifest.source_fingerprint,
        "samples": told.get("samples_fingerprint"),
        "method": told.get("method"),
        "scheme": manifest.scheme.name,
        "modules": list(manifest.modules),
        "seed": told.get("seed"),
        "recipe": told.get("pruned_by"),
        "quota version": manifest.tool_version,
        **{f"settings.{name}": value for name, value in (settings if isinstance(settings, dict) else {}).items()},
    }


def _check_modules(modules: Collection[str]) -> tuple[str, ...]:
    wrong = sorted(set(modules) - set(MODULES))
    if wrong or not modules or isinstance(modules, str):
        raise UsageError(
            f"modules: expected some of {list(MODULES)}, got {modules if isinstance(modules, str) else wrong or 'none'}"
        )
    return tuple(name for name in MODULES if name in modules)
