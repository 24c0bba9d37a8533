"""What every study shares: calibrated checkpoints, recipes and answers, each made once and kept under the content it
depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from quota.allocate.baselines import RecipeContext, SearchStats
from quota.allocate.compute import Cost, DecoderSizes, cost
from quota.allocate.explain import recipe_cost
from quota.allocate.methods import BASELINES, METHODS
from quota.allocate.profile import Profile
from quota.calib.samples import Samples
from quota.calib.stream import FloatSource, resolve_folder
from quota.core.errors import UsageError
from quota.core.files import claim_folder
from quota.core.recipe import ModelFacts, Recipe
from quota.demo.cache import StageCache, code_fingerprint
from quota.demo.embedded import reference_of, sources
from quota.eval.asking import ON_CPU, Placement
from quota.eval.benchmark import RowSpec, Settings, weight_bytes
from quota.eval.compare import answer_rows, cache_dtype, folder_fingerprint
from quota.eval.profiling import RecipeRequest, basis_of, measure_evidence, profile_models
from quota.eval.questions import Question
from quota.runtime.load import checked_device
from quota.study.parts import assemble
from quota.study.tasks import load_questions

MODULES = ("vision", "projector", "llm")
FLOAT, QUANTIZED, WEIGHT_ONLY = "float", "w4a4kv4", "w4a16"


@dataclass(frozen=True)
class StudySettings:
    """What `quota study` was asked for. family: of the embedded model; None where `model` names another one, or for the
    default. tasks: "scenes" (held-out generated questions) or a samples file with answers. methods: the published ones
    that `pipelines` and `compute` have rows for. place: where rows are answered; what they are made of (checkpoints,
    profiles, recipes) comes from the CPU in float32 everywhere."""

    out: Path = Path("study-out")
    family: str | None = None
    model: str | None = None
    samples: Path | None = None
    tasks: str = "scenes"
    questions: int = 600
    keep: float = 0.3
    methods: tuple[str, ...] = BASELINES
    batch: int = 16
    max_new_tokens: int = 6
    steps: int | None = None
    seed: int = 0
    resamples: int = 10_000
    quiet: bool = False
    place: Placement = ON_CPU


@dataclass(frozen=True)
class Entry:
    """A row to be: a checkpoint folder, perhaps a recipe, and what they are called."""

    name: str
    checkpoint: str
    weights: str
    recipe: Recipe | None = None
    figures: dict[str, Any] = field(default_factory=dict)


class Bench:
    """One session of studies: settings, cache, and the model loaded last."""

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self.console = Console(stderr=True, quiet=settings.quiet)
        checked_device(settings.place.device)
        unknown = sorted(set(settings.methods) - set(BASELINES))
        if unknown:
            raise UsageError(f"--methods: expected some of {', '.join(BASELINES)}, got {unknown[0]!r}")
        self.float_checkpoint, samples = sources(settings.family, settings.model, settings.samples)
        claim_folder(settings.out)
        self.samples = Samples.load(samples)
        self.source = FloatSource(self.float_checkpoint)
        self.code = code_fingerprint()
        self.cache = StageCache(settings.out / "cache", self.code)
        self._fingerprints: dict[str, str] = {}
        self._evidence: dict[str, SearchStats] = {}
        self._loaded: tuple[tuple[str, Placement], Any, Any] | None = None

    # -- things made once ----------------------------------------------------------------------------------------------

    @cached_property
    def questions(self) -> list[Question]:
        return load_questions(self.settings.tasks, self.settings.questions, self.loaded(self.float_checkpoint)[0])

    def quantized(self, modules: Sequence[str] = MODULES, recipe: Recipe | None = None) -> str:
        """A W4A4KV4 checkpoint of the float model; `recipe`: the decoder calibrated on the graph it prunes.

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
        return str(
            self.cache.make(
                "assembled", parts, lambda path: assemble(self.source, {k: Path(v) for k, v in sources.items()}, path)
            )
        )

    def weight_only(self, method: str) -> str:
        """A W4A16 checkpoint of the float model by `method`: rtn, gptq or awq."""
        return self._calibrated(MODULES, None, method)

    def _calibrated(self, modules: Sequence[str], recipe: Recipe | None, method: str = "flatquant") -> str:
        from quota.calib.run import calibrate
        from quota.calib.settings import DEFAULTS
        from quota.calib.settings import Settings as CalibrationSettings

        s, steps = self.settings, self.settings.steps if method == "flatquant" else None
        parts = {
            "float": self.content(self.float_checkpoint),
            "samples": self.samples.fingerprint,
            "modules": list(modules),
            "steps": steps,
            "seed": s.seed,
            "recipe": recipe and recipe.dumps(),
            "method": method,
        }

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
                    method=method, modules=modules, seed=s.seed, steps=DEFAULTS.steps if steps is None else steps
                ),
                recipe=recipe,
                progress=not s.quiet,
                overwrite=True,
            )

        return str(self.cache.make("quantized", parts, work))

    @cached_property
    def profile(self) -> Profile:
        """Of the float model beside the fully quantized one."""
        quantized = self.quantized()
        parts = {
            "float": self.content(self.float_checkpoint),
            "quantized": self.content(quantized),
            "samples": self.samples.fingerprint,
        }
        path = self.cache.make(
            "profile",
            parts,
            lambda p: profile_models(self.float_checkpoint, quantized, self.samples, quiet=self.settings.quiet).save(p),
        )
        return Profile.load(path)

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
        asked = RecipeRequest(method, keep, compute, tau=tau, reference=self.reference)
        if METHODS[method].needs == "profile":
            return asked.from_profile(self.profile)
        where = checkpoint or self.quantized()
        if (key := f"{method} {where}") not in self._evidence:
            self._evidence[key] = measure_evidence(method, *self.loaded(where), self.samples, quiet=self.settings.quiet)
        return asked.from_basis(self.basis, self._evidence[key])

    @cached_property
    def basis(self) -> RecipeContext:
        model, processor = self.loaded(self.quantized())
        return basis_of(model, processor, self.samples, seed=self.settings.seed, reference=self.reference)

    @property
    def family(self) -> str:
        """Architecture of the float model."""
        return self.source.family.name

    @property
    def reference(self) -> str:
        """What the ratios of recipes are of."""
        return reference_of(self.source.config)

    @property
    def facts(self) -> ModelFacts:
        return self.basis.model

    def cost(self, recipe: Recipe | None) -> Cost:
        """Equations (10)-(13) for one reference picture."""
        f = self.facts
        assert f.hidden_size and f.kv_size and f.intermediate_size and f.head_dim
        sizes = DecoderSizes(f.layers, f.hidden_size, f.kv_size, f.intermediate_size)
        if recipe is None:
            return cost(
                [f.visual_tokens] * f.layers, f.visual_tokens, f.text_tokens or 0, sizes, f.vision_macs or 0, f.head_dim
            )
        spent = recipe_cost(recipe)
        assert spent is not None
        return spent

    # -- answers -------------------------------------------------------------------------------------------------------

    def answered(self, entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
        """row name -> task -> bool [questions]; every batch of answers is on disk before the next begins, so a killed
        study goes on from there.

        Rows of the same weights and recipe are answered once, in whichever study comes first.
        """
        s = self.settings
        plan = {self._key(e): e for e in entries}

        def opened(spec: RowSpec) -> tuple[Any, Any]:
            return self.opened_with(plan[spec.key].checkpoint, plan[spec.key].recipe)

        settings = Settings(batch=s.batch, max_new_tokens=s.max_new_tokens, resamples=s.resamples, seed=s.seed)
        specs = {key: self._spec(key, e) for key, e in plan.items()}
        done = answer_rows(
            list(specs.values()), self.questions, self.cache.folder / "answers", settings, opened, quiet=s.quiet
        )
        return {e.name: done[specs[self._key(e)].name][0] for e in entries}

    def _key(self, entry: Entry) -> str:
        return (
            f"{self.content(entry.checkpoint)} {entry.recipe.dumps() if entry.recipe else 'none'}"
            f" {self.code}{self.settings.place.key}"
        )

    def _spec(self, key: str, entry: Entry) -> RowSpec:
        """Named by what answers, not by the row: that name is the file of the answers."""
        folder = resolve_folder(entry.checkpoint)
        name = f"{entry.recipe.method if entry.recipe else 'unpruned'}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        stored = cache_dtype(folder, self.settings.place.dtype)
        return RowSpec(
            name, entry.weights, f"{name}.json" if entry.recipe else None, key, weight_bytes(folder), stored, _never
        )

    def opened_with(self, checkpoint: str, recipe: Recipe | None) -> tuple[Any, Any]:
        """(model under the recipe, processor) where rows are answered: loaded once for neighbouring rows of one
        checkpoint, the recipe exchanged."""
        from quota.runtime.patch import patched

        model, processor = self.loaded(checkpoint, self.settings.place)
        if recipe is not None:
            patched(model, recipe)
        return model, processor

    def loaded(self, checkpoint: str, place: Placement = ON_CPU) -> tuple[Any, Any]:
        """(model without a recipe, processor); one checkpoint stays in memory."""
        if self._loaded is None or self._loaded[0] != (checkpoint, place):
            self._loaded = None
            self._loaded = ((checkpoint, place), *place.open(checkpoint))
        handle = getattr(self._loaded[1], "quota_handle", None)
        if handle is not None:
            handle.undo()
        return self._loaded[1], self._loaded[2]

    def content(self, checkpoint: str) -> str:
        """Fingerprint of a folder's files, taken once."""
        if checkpoint not in self._fingerprints:
            self._fingerprints[checkpoint] = folder_fingerprint(checkpoint)
        return self._fingerprints[checkpoint]


def _never() -> tuple[Any, Any]:
    raise AssertionError("rows of a study are opened by their bench")
