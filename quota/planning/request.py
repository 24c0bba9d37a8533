"""A recipe as it is asked for: from checkpoints and samples, by what its method measures, to the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota.allocate.baselines import VTW_THRESHOLD, RecipeContext, SearchStats, at_compute, build_baseline
from quota.allocate.profile import Profile
from quota.allocate.recipe_builder import build_recipe
from quota.calib.samples import Samples
from quota.core.methods import METHODS
from quota.core.recipe import Provenance, Recipe
from quota.core.version import VERSION
from quota.models.quantize import model_scheme
from quota.planning.facts import measured_facts
from quota.planning.profile import profile
from quota.planning.progress import shown
from quota.planning.search import attention_statistics, withdrawal_divergence
from quota.runtime.load import ON_CPU, Placement

SEARCH_SAMPLES = 20  # VTW's published number


def profile_models(
    model: str | Path,
    checkpoint: str | Path,
    samples: Samples | str | Path,
    *,
    place: Placement = ON_CPU,
    quiet: bool = False,
) -> Profile:
    """Profile float `model` against quantized `checkpoint`. samples: or the path of a samples file. place: where both
    models run, whole."""
    loaded = samples if isinstance(samples, Samples) else Samples.load(samples)
    float_model, processor = place.open(model)
    quantized, _ = place.open(checkpoint)
    return profile(float_model, quantized, processor, loaded, progress=not quiet)


def recipe_context(model: Any, processor: Any, samples: Samples, **fields: Any) -> RecipeContext:
    """What every baseline recipe of this loaded model shares. fields: reference, position_policy, seed."""
    source = Provenance(calibration_fingerprint=samples.fingerprint, tool_version=VERSION, samples=len(samples))
    return RecipeContext(measured_facts(model, processor, samples), model_scheme(model).name, source, **fields)


def measure_search(
    method: str, model: Any, processor: Any, samples: Samples, *, threshold: float = VTW_THRESHOLD, quiet: bool = False
) -> SearchStats:
    """What the method's own search reads, measured on a loaded model; empty for methods that search nothing."""
    search = METHODS[method].search
    if search not in ("withdrawal", "attention"):
        return SearchStats()
    with shown(not quiet, f"{METHODS[method].title}: search") as tell:
        if search == "attention":
            return SearchStats(attention=attention_statistics(model, processor, samples, tell))
        few = samples.first(SEARCH_SAMPLES)
        return SearchStats(
            withdrawal=withdrawal_divergence(model, processor, few, tell), samples=len(few), threshold=threshold
        )


@dataclass(frozen=True)
class RecipeRequest:
    """A recipe as it was asked for. keep None is the method's default; `compute` instead finds the keep that costs as
    much."""

    method: str
    keep: float | None = None
    compute: float | None = None
    layers: str | None = None
    tau: float = 1.0
    reference: str = "recorded"
    position_policy: str = "original"

    def from_profile(self, profile: Profile) -> Recipe:
        """The recipe by method quota or uniform."""

        def build(keep: float) -> Recipe:
            return build_recipe(
                profile,
                keep,
                layers=self.layers,
                tau=self.tau,
                method=self.method,
                reference=self.reference,
                position_policy=self.position_policy,
            )

        return self._matched(build, profile.model.visual_tokens)

    def from_context(self, context: RecipeContext, stats: SearchStats) -> Recipe:
        """The recipe by a published method, from recorded attention."""
        if METHODS[self.method].withdraws:
            return build_baseline(context, self.method, None, self.layers, stats)
        return self._matched(
            lambda keep: build_baseline(context, self.method, keep, self.layers, stats), context.model.visual_tokens
        )

    def from_checkpoint(
        self,
        checkpoint: str,
        samples: Path,
        *,
        place: Placement = ON_CPU,
        seed: int = 0,
        threshold: float = VTW_THRESHOLD,
        quiet: bool = False,
    ) -> Recipe:
        """The recipe by a published method for a checkpoint, float or quantized, which runs at `place`."""
        loaded = Samples.load(samples)
        model, processor = place.open(checkpoint)
        stats = SearchStats()
        if self.layers is None:  # a given layer is not searched for
            stats = measure_search(self.method, model, processor, loaded, threshold=threshold, quiet=quiet)
        context = recipe_context(
            model, processor, loaded, reference=self.reference, position_policy=self.position_policy, seed=seed
        )
        return self.from_context(context, stats)

    def _matched(self, build: Callable[[float], Recipe], tokens: int) -> Recipe:
        if self.compute is not None:
            return at_compute(build, self.compute, tokens)
        return build(METHODS[self.method].keep if self.keep is None else self.keep)
