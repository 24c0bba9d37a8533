"""The inputs of one calibration, checked before it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from quota.calib.export import processor_of
from quota.calib.samples import Prompts, Samples, check_texts
from quota.calib.settings import METHODS, Settings
from quota.calib.stream import FloatSource
from quota.calib.work import difference
from quota.core.checkpoint import MANIFEST, Manifest, check_destination
from quota.core.checkpoint_files import verify_files
from quota.core.errors import CheckpointError, SampleError, UsageError
from quota.core.recipe import Recipe
from quota.core.version import VERSION
from quota.models.processing import image_backend


class Job:
    """The checked inputs of one calibration. resume, overwrite: as of `quota.calib.run.calibrate`."""

    def __init__(
        self,
        source: FloatSource,
        samples: Samples | None,
        out: Path,
        settings: Settings,
        *,
        recipe: Recipe | None = None,
        resume: bool = True,
        overwrite: bool = False,
    ) -> None:
        self.source, self.out, self.settings = source, out, settings
        self.recipe, self.resume, self.overwrite = recipe, resume, overwrite
        if recipe is not None:
            recipe.check_model(source.fingerprint, source.family.layers, source.family.model_class)
        self.folder = _check_out(out, source.folder)
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.samples, self.images = samples, sum(sample.image_bytes is not None for sample in samples or ())
        if samples is None and METHODS[settings.method].samples:
            raise UsageError(
                f"samples: method {settings.method!r} learns from samples; give a samples file (only 'rtn' rounds"
                " without)"
            )
        if samples is not None and not self.images and {"vision", "projector"} & set(settings.modules):
            raise SampleError(
                "samples: expected at least one image to calibrate the vision tower and projector, found text only;"
                " use modules=('llm',)"
            )
        self.processor = processor_of(source.folder)
        check_texts(self.processor, samples or ())

    @property
    def candidates(self) -> tuple[int, ...]:
        """Candidate layers of the recipe, if there is one."""
        return () if self.recipe is None else tuple(self.recipe.candidates)

    @cached_property
    def prompts(self) -> Prompts:
        """The samples, encoded once, before the work."""
        return Prompts.of(self.processor, self.source.family, self.samples or ())

    def rows_after(self, candidates: Iterable[int]) -> list[int]:
        """Tokens of each prompt, about, when these candidates have dropped theirs."""
        keep = dict(zip(self.candidates, self.recipe.keep, strict=True)) if self.recipe else {}
        share = min((keep[candidate] for candidate in candidates), default=1.0)
        visual = [ids.count(self.source.family.image_token_id) for ids in self.prompts.ids]
        return [len(ids) - n + round(share * n) for ids, n in zip(self.prompts.ids, visual, strict=True)]

    def settings_of_result(self) -> dict[str, Any]:
        """What the result depends on and a manifest tells, under the names a reader of a refusal knows."""
        return {
            "model": self.source.fingerprint,
            "samples": self.samples and self.samples.fingerprint,
            "method": self.settings.method,
            "scheme": self.settings.makes.name,
            "modules": list(self.settings.modules),
            "seed": self.settings.seed,
            "recipe": self.recipe and self.recipe.digest,
            "quota version": VERSION,
            **{f"settings.{name}": value for name, value in self.settings.numbers().items()},
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
        other = difference(settings_of(manifest), self.settings_of_result())
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
            "method": self.settings.method,
            "image_backend": image_backend(self.processor),
            "samples": len(self.samples or ()),
            "samples_fingerprint": self.samples and self.samples.fingerprint,
            "seed": self.settings.seed,
            "settings": self.settings.numbers(),
            "pruned_by": self.recipe and self.recipe.digest,
            "source_files": self.source.digest,
            "report": blocks,
        }
        return Manifest(self.settings.makes, tuple(self.settings.modules), self.source.fingerprint, calibration)


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


def settings_of(manifest: Manifest) -> dict[str, Any]:
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
