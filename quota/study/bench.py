"""What every study shares: calibrated checkpoints, recipes and answers, each made once and kept under the content it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from quota.allocate.baselines import Basis, Evidence
from quota.allocate.compute import Cost, DecoderSizes, cost
from quota.allocate.explain import recipe_cost
from quota.allocate.methods import METHODS
from quota.allocate.profile import Profile
from quota.calib.samples import Samples
from quota.calib.stream import resolve_folder
from quota.core.errors import CheckpointError
from quota.core.recipe import ModelFacts, Recipe
from quota.demo.cache import StageCache, code_fingerprint
from quota.eval.asking import load_model
from quota.eval.benchmark import RowSpec, Settings, weight_bytes
from quota.eval.compare import answer_rows, cache_dtype, folder_fingerprint
from quota.eval.profiling import Asked, basis_of, measure_evidence, profile_models
from quota.eval.questions import Question
from quota.scenes import assets
from quota.study.tasks import load_questions

MODULES = ("vision", "projector", "llm")
FLOAT, QUANTIZED = "float", "w4a4kv4"


@dataclass(frozen=True)
class StudySettings:
    """What `quota study` was asked for. tasks: "scenes" (held-out generated questions) or a samples file with answers."""

    out: Path = Path("study-out")
    model: str | None = None
    samples: Path | None = None
    tasks: str = "scenes"
    questions: int = 600
    keep: float = 0.3
    batch: int = 16
    max_new_tokens: int = 6
    steps: int | None = None
    seed: int = 0
    resamples: int = 10_000
    quiet: bool = False


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
        if settings.model is None and not (assets.CHECKPOINT / "config.json").exists():
            raise CheckpointError(f"--model: there is no embedded checkpoint at {assets.CHECKPOINT}; name a float LLaVA folder or hub name")
        self.float_checkpoint = settings.model or str(assets.CHECKPOINT)
        settings.out.mkdir(parents=True, exist_ok=True)
        self.samples = Samples.load(settings.samples or assets.SAMPLES)
        self.code = code_fingerprint()
        self.cache = StageCache(settings.out / "cache", self.code)
        self._fingerprints: dict[str, str] = {}
        self._evidence: dict[str, Evidence] = {}
        self._loaded: tuple[str, Any, Any] | None = None

    # -- things made once ----------------------------------------------------------------------------------------------

    @cached_property
    def questions(self) -> list[Question]:
        return load_questions(self.settings.tasks, self.settings.questions, self.loaded(self.float_checkpoint)[0])

    def quantized(self, modules: Sequence[str] = MODULES, recipe: Recipe | None = None) -> str:
        """A W4A4KV4 checkpoint of the float model; `recipe`: calibrated on the graph it prunes."""
        from quota.calib.run import calibrate

        s = self.settings
        parts = {
            "float": self.content(self.float_checkpoint), "samples": self.samples.fingerprint, "modules": list(modules), "steps": s.steps, "seed": s.seed,
            "recipe": recipe and recipe.dumps(),
        }  # fmt: skip

        def work(path: Path) -> None:
            self.console.print(f"calibrating {'+'.join(modules)}{' on a pruned graph' if recipe else ''}")
            calibrate(
                self.float_checkpoint, self.samples, modules=tuple(modules), out=path, seed=s.seed, steps=s.steps, recipe=recipe,
                progress=not s.quiet,
            )  # fmt: skip

        return str(self.cache.make("quantized", parts, work))

    @cached_property
    def profile(self) -> Profile:
        """Of the float model beside the fully quantized one."""
        quantized = self.quantized()
        parts = {"float": self.content(self.float_checkpoint), "quantized": self.content(quantized), "samples": self.samples.fingerprint}
        path = self.cache.make("profile", parts, lambda p: profile_models(self.float_checkpoint, quantized, self.samples, quiet=self.settings.quiet).save(p))
        return Profile.load(path)

    def planned(self, method: str, keep: float | None = None, compute: float | None = None, checkpoint: str | None = None, tau: float = 1.0) -> Recipe:
        """A recipe by any method; the searches of published methods run on `checkpoint` (default: the quantized model)."""
        asked = Asked(method, keep, compute, tau=tau)
        if METHODS[method].needs == "profile":
            return asked.from_profile(self.profile)
        where = checkpoint or self.quantized()
        if (key := f"{method} {where}") not in self._evidence:
            self._evidence[key] = measure_evidence(method, *self.loaded(where), self.samples, quiet=self.settings.quiet)
        return asked.from_basis(self.basis, self._evidence[key])

    @cached_property
    def basis(self) -> Basis:
        model, processor = self.loaded(self.quantized())
        return basis_of(model, processor, self.samples, seed=self.settings.seed)

    @property
    def facts(self) -> ModelFacts:
        return self.basis.model

    def cost(self, recipe: Recipe | None) -> Cost:
        """Equations (10)-(13) for one reference picture."""
        f = self.facts
        assert f.hidden_size and f.kv_size and f.intermediate_size and f.head_dim
        sizes = DecoderSizes(f.layers, f.hidden_size, f.kv_size, f.intermediate_size)
        if recipe is None:
            return cost([f.visual_tokens] * f.layers, f.visual_tokens, f.text_tokens or 0, sizes, f.vision_macs or 0, f.head_dim)
        spent = recipe_cost(recipe)
        assert spent is not None
        return spent

    # -- answers -------------------------------------------------------------------------------------------------------

    def answered(self, entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
        """row name -> task -> bool [questions]; every batch of answers is on disk before the next begins, so a killed study goes on from there."""
        s = self.settings
        plan = {self._key(e): e for e in entries}

        def opened(spec: RowSpec) -> tuple[Any, Any]:
            return self.opened_with(plan[spec.key].checkpoint, plan[spec.key].recipe)

        settings = Settings(batch=s.batch, max_new_tokens=s.max_new_tokens, resamples=s.resamples, seed=s.seed)
        done = answer_rows([self._spec(e) for e in entries], self.questions, self.cache.folder / "answers", settings, opened, quiet=s.quiet)
        return {name: right for name, (right, _) in done.items()}

    def _key(self, entry: Entry) -> str:
        return f"{self.content(entry.checkpoint)} {entry.recipe.dumps() if entry.recipe else 'none'} {self.code}"

    def _spec(self, entry: Entry) -> RowSpec:
        folder = resolve_folder(entry.checkpoint)
        name = entry.name.replace("/", "-").replace(" ", "-")
        return RowSpec(entry.name, entry.weights, f"{name}.json" if entry.recipe else None, self._key(entry), weight_bytes(folder), cache_dtype(folder), _never)

    def opened_with(self, checkpoint: str, recipe: Recipe | None) -> tuple[Any, Any]:
        """(model under the recipe, processor): loaded once for neighbouring rows of one checkpoint, the recipe exchanged."""
        from quota.runtime.patch import patched

        model, processor = self.loaded(checkpoint)
        if recipe is not None:
            patched(model, recipe)
        return model, processor

    def loaded(self, checkpoint: str) -> tuple[Any, Any]:
        """(model without a recipe, processor); one checkpoint stays in memory."""
        if self._loaded is None or self._loaded[0] != checkpoint:
            self._loaded = None
            self._loaded = (checkpoint, *load_model(checkpoint))
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
