"""What every study shares: the pipeline, its questions, and what rows cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quota.allocate.compute import Cost, DecoderSizes, cost
from quota.allocate.explain import recipe_cost
from quota.calib.stream import FloatSource
from quota.core.devices import checked_device
from quota.core.errors import UsageError
from quota.core.methods import baselines
from quota.core.recipe import ModelFacts, Recipe
from quota.demo.embedded import reference_of, sources
from quota.eval.pipeline import Entry, Options, Pipeline
from quota.eval.questions import Question
from quota.runtime.load import ON_CPU, Placement
from quota.study.tasks import load_questions


@dataclass(frozen=True)
class StudySettings:
    """What `quota study` was asked for. family: of the embedded model; None where `model` names another one, or for the
    default. tasks: "scenes" (held-out generated questions) or a samples file with answers. methods: the published ones
    that `pipelines` and `compute` have rows for. place: where rows are answered, and where what they are
    made of (checkpoints, profiles, recipes) is computed."""

    out: Path = Path("study-out")
    family: str | None = None
    model: str | None = None
    samples: Path | None = None
    tasks: str = "scenes"
    questions: int = 2000
    keep: float = 0.3
    methods: tuple[str, ...] = baselines()
    batch: int = 16
    max_new_tokens: int = 6
    steps: int | None = None
    seed: int = 0
    resamples: int = 10_000
    quiet: bool = False
    place: Placement = ON_CPU


class Bench(Pipeline):
    """One session of studies."""

    def __init__(self, settings: StudySettings) -> None:
        s = self.settings = settings
        checked_device(s.place.device)
        unknown = sorted(set(s.methods) - set(baselines()))
        if unknown:
            raise UsageError(f"--methods: expected some of {', '.join(baselines())}, got {unknown[0]!r}")
        checkpoint, samples = sources(s.family, s.model, s.samples)
        reference = reference_of(FloatSource(checkpoint).config)
        options = Options(
            s.out,
            reference,
            steps=s.steps,
            seed=s.seed,
            batch=s.batch,
            max_new_tokens=s.max_new_tokens,
            place=s.place,
            quiet=s.quiet,
        )
        super().__init__(checkpoint, samples, options)

    @cached_property
    def questions(self) -> list[Question]:
        return load_questions(self.settings.tasks, self.settings.questions, self.source.config)

    @property
    def family(self) -> str:
        """Architecture of the float model."""
        return self.source.family.name

    @property
    def facts(self) -> ModelFacts:
        return self.basis.model

    def cost(self, recipe: Recipe | None) -> Cost:
        """Equations (10)-(13) for one reference image."""
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

    def answered(self, entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
        """row name -> task -> bool [questions]."""
        return {name: right for name, (right, _) in self.answers(entries, self.questions).items()}
