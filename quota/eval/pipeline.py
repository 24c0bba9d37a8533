"""A float model through calibration, profile, recipes and answers. Every stage is made once and kept under the content
it depends on. `quota demo` and `quota study` are its users, so a row they share is one row with one figure."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from quota.allocate.baselines import RecipeContext, SearchStats
from quota.allocate.profile import Profile
from quota.calib.parts import assemble
from quota.calib.samples import Samples
from quota.calib.stream import FloatSource
from quota.core import formats
from quota.core.files import atomic_write_text, claim_folder
from quota.core.folders import resolve_folder
from quota.core.formats import KV4, MODULES
from quota.core.methods import METHODS
from quota.core.recipe import Recipe
from quota.eval.benchmark import RowSpec, Settings, weight_bytes
from quota.eval.cache import StageCache, code_fingerprint
from quota.eval.compare import answer_rows, bars, cache_dtype, folder_fingerprint
from quota.eval.generation import Cost, measure_cost
from quota.eval.questions import Question, questions_fingerprint
from quota.models.quantize import weight_bytes as tensor_bytes
from quota.planning.request import RecipeRequest, measure_search, profile_models, recipe_context
from quota.runtime.load import ON_CPU, Placement

FLOAT, QUANTIZED, WEIGHT_ONLY = formats.FLOAT.name, formats.DEFAULT.name, formats.WEIGHT_ONLY.name
ROUNDED = "the float checkpoint, rounded to nearest in memory"
"""A checkpoint of an entry that is in no folder: quantized without calibration or transforms."""


@dataclass(frozen=True)
class Options:
    """How stages are made and rows answered. out: a folder of quota's outputs; the stages are in out/cache. reference:
    what the ratios of recipes are of. place: where rows are answered and what they are made of (checkpoints, profiles,
    recipes) is computed. in_memory: how many loaded models stay."""

    out: Path
    reference: str
    steps: int | None = None
    seed: int = 0
    batch: int = 16
    max_new_tokens: int = 6
    place: Placement = ON_CPU
    in_memory: int = 1
    quiet: bool = False


@dataclass(frozen=True)
class Entry:
    """A row to be: a checkpoint folder or ROUNDED, perhaps a recipe, and what they are called. recipe_file: its name in
    the report."""

    name: str
    checkpoint: str
    weights: str
    recipe: Recipe | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    recipe_file: str | None = None


class Pipeline:
    """One session: a float checkpoint, calibration samples, the cache, and the models loaded last."""

    def __init__(self, float_checkpoint: str, samples: Path, options: Options) -> None:
        self.float_checkpoint, self.options = float_checkpoint, options
        claim_folder(options.out)
        self.console = Console(stderr=True, quiet=options.quiet)
        self.samples = Samples.load(samples)
        self.source = FloatSource(float_checkpoint)
        self.code = code_fingerprint()
        self.cache = StageCache(options.out / "cache", self.code)
        self._fingerprints: dict[str, str] = {}
        self._evidence: dict[str, SearchStats] = {}
        self._loaded: dict[tuple[str, Placement], tuple[Any, Any]] = {}

    @property
    def _placed(self) -> dict[str, str]:
        """What of `place` a stage depends on; nothing on the CPU in float32."""
        return {"place": self.options.place.key} if self.options.place.key else {}

    # checkpoints

    def quantized(self, modules: Sequence[str] = MODULES, recipe: Recipe | None = None) -> str:
        """A quantized checkpoint of the float model; `recipe`: the decoder calibrated on the graph it prunes.

        Blocks learn from the float model's hidden states, so those of the tower, the projector and the decoder are the
        same whichever of them are asked for: they are calibrated once, and a checkpoint of some of them takes the
        finished blocks. Pruning inside the language model concerns the decoder alone.
        """
        whole = MODULES if recipe is None else ("llm",)
        calibrated = self._calibrated(whole, recipe)
        if recipe is None and tuple(modules) == MODULES:
            return calibrated
        sources = {name: calibrated if name in whole else self._calibrated(MODULES, None) for name in modules}
        parts = {
            "float": self.content(self.float_checkpoint),
            "sources": {name: self.content(folder) for name, folder in sources.items()},
        }
        folders = {name: Path(folder) for name, folder in sources.items()}
        return str(self.cache.make("assembled", parts, lambda path: assemble(self.source, folders, path)))

    def weight_only(self, method: str) -> str:
        """A W4A16 checkpoint of the float model by `method`: rtn, gptq or awq."""
        return self._calibrated(MODULES, None, method)

    def _calibrated(self, modules: Sequence[str], recipe: Recipe | None, method: str = "flatquant") -> str:
        from quota.calib.run import calibrate
        from quota.calib.settings import DEFAULTS
        from quota.calib.settings import Settings as CalibrationSettings

        o, steps = self.options, self.options.steps if method == "flatquant" else None
        parts = {
            "float": self.content(self.float_checkpoint),
            "samples": self.samples.fingerprint,
            "modules": list(modules),
            "steps": steps,
            "seed": o.seed,
            "recipe": recipe and recipe.dumps(),
            "method": method,
            **self._placed,
        }

        # what a recipe does not touch was calibrated before
        unpruned = self._calibrated(MODULES, None) if recipe is not None and method == "flatquant" else None

        def work(path: Path) -> None:
            self.console.print(
                f"calibrating {'+'.join(modules)} by"
                f" {method}{f' on the graph {recipe.method} prunes' if recipe else ''}"
            )
            calibrate(
                self.float_checkpoint,
                self.samples,
                out=path,
                settings=CalibrationSettings(
                    method=method,
                    modules=modules,
                    seed=o.seed,
                    steps=DEFAULTS.steps if steps is None else steps,
                    device=o.place.device,
                    dtype=o.place.dtype,
                ),
                recipe=recipe,
                unpruned=unpruned,
                progress=not o.quiet,
                overwrite=True,
            )

        return str(self.cache.make("quantized" if recipe is None else "quantized-pruned", parts, work))

    # recipes

    @cached_property
    def profile(self) -> Profile:
        """Profile of the float model beside the fully quantized one."""
        quantized = self.quantized()
        parts = {
            "float": self.content(self.float_checkpoint),
            "quantized": self.content(quantized),
            "samples": self.samples.fingerprint,
            **self._placed,
        }
        o = self.options

        def work(path: Path) -> None:
            profile_models(self.float_checkpoint, quantized, self.samples, place=o.place, quiet=o.quiet).save(path)

        return Profile.load(self.cache.make("profile", parts, work))

    def planned(
        self,
        method: str,
        keep: float | None = None,
        compute: float | None = None,
        checkpoint: str | None = None,
        tau: float = 1.0,
    ) -> Recipe:
        """A recipe by any method; the searches of published methods run on `checkpoint` (default: the quantized
        model)."""
        asked = RecipeRequest(method, keep, compute, tau=tau, reference=self.options.reference)
        if METHODS[method].search == "profile":
            return asked.from_profile(self.profile)
        where = checkpoint or self.quantized()
        if (key := f"{method} {where}") not in self._evidence:
            opened = self.loaded(where, self.options.place)
            self._evidence[key] = measure_search(method, *opened, self.samples, quiet=self.options.quiet)
        return asked.from_context(self.basis, self._evidence[key])

    @cached_property
    def basis(self) -> RecipeContext:
        model, processor = self.loaded(self.quantized(), self.options.place)
        return recipe_context(model, processor, self.samples, seed=self.options.seed, reference=self.options.reference)

    # answers

    def answers(
        self, entries: Sequence[Entry], questions: list[Question]
    ) -> dict[str, tuple[dict[str, np.ndarray], float]]:
        """row name -> (task -> bool [questions], seconds); every batch of answers is on disk before the next begins, so
        what was killed goes on from there.

        Rows of the same weights and recipe are answered once, whoever asks first.
        """
        o, specs = self.options, {}
        for entry in entries:
            spec = self.spec(entry)
            method = entry.recipe.method if entry.recipe else "unpruned"
            # the name of the file: what answers, not what the row is called
            specs[entry.name] = replace(spec, name=f"{method}-{hashlib.sha256(spec.key.encode()).hexdigest()[:8]}")
        once = {spec.name: spec for spec in specs.values()}
        settings = Settings(batch=o.batch, max_new_tokens=o.max_new_tokens)
        folder = self.cache.folder / "answers"
        done = answer_rows(list(once.values()), questions, folder, settings, lambda spec: spec.open(), quiet=o.quiet)
        return {name: done[spec.name] for name, spec in specs.items()}

    def costs(self, entries: Sequence[Entry], questions: Sequence[Question]) -> dict[str, Cost]:
        """row name -> what single requests take, rows taking turns; the models of all rows are in memory together."""
        specs = [self.spec(entry) for entry in entries]
        parts = {
            "rows": [[spec.name, spec.key] for spec in specs],
            "questions": questions_fingerprint(questions),
            "machine": platform.node(),
        }

        def work(path: Path) -> None:
            with bars(self.options.quiet) as progress:
                bar = progress.add_task("timing", total=len(specs) * (len(questions) + 1))
                opened = {spec.weights: spec.open() for spec in specs}
                rows = {spec.name: (*opened[spec.weights], spec.plan) for spec in specs}
                measured = measure_cost(rows, questions, progress=partial(progress.advance, bar))
            atomic_write_text(path, json.dumps({name: asdict(cost) for name, cost in measured.items()}) + "\n")

        path = self.cache.make("cost", parts, work)
        return {name: Cost(**values) for name, values in json.loads(path.read_text()).items()}

    def spec(self, entry: Entry) -> RowSpec:
        """The row as evaluation takes it."""
        place, rounded = self.options.place, entry.checkpoint == ROUNDED
        folder = resolve_folder(self.float_checkpoint if rounded else entry.checkpoint)
        weights = self.content(entry.checkpoint) + place.key
        return RowSpec(
            name=entry.name,
            checkpoint=entry.weights,
            recipe=entry.recipe_file,
            key=f"{weights} {entry.recipe.dumps() if entry.recipe else 'none'} {self.code}",
            checkpoint_bytes=tensor_bytes(self.loaded(ROUNDED, place)[0]) if rounded else weight_bytes(folder),
            kv_dtype=KV4.dtype if rounded else cache_dtype(folder, place.dtype),
            weights=weights,
            plan=entry.recipe,
            open=partial(self.loaded, entry.checkpoint, place),
        )

    # models

    def loaded(self, checkpoint: str, place: Placement = ON_CPU) -> tuple[Any, Any]:
        """(model without a recipe, processor); the last `in_memory` stay loaded."""
        key = (checkpoint, place)
        found = self._loaded.pop(key, None)
        if found is None:
            for old in list(self._loaded)[: max(0, len(self._loaded) + 1 - self.options.in_memory)]:
                del self._loaded[old]
            found = self._rounded(place) if checkpoint == ROUNDED else place.open(checkpoint)
        self._loaded[key] = found
        return found

    def _rounded(self, place: Placement) -> tuple[Any, Any]:
        from quota.models.rtn import quantize_rtn

        model, processor = place.open(self.float_checkpoint)
        return quantize_rtn(model, MODULES, transforms=False).eval(), processor

    def content(self, checkpoint: str) -> str:
        """Fingerprint of a folder's files, taken once."""
        if checkpoint not in self._fingerprints:
            found = f"{self.content(self.float_checkpoint)} rtn" if checkpoint == ROUNDED else None
            self._fingerprints[checkpoint] = found or folder_fingerprint(checkpoint)
        return self._fingerprints[checkpoint]
