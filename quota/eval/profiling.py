"""From checkpoints and samples to a profile or a baseline's evidence, and from those to a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota.allocate.baselines import VTW_THRESHOLD, RecipeContext, SearchStats, at_compute, build_baseline
from quota.core.methods import METHODS
from quota.core.recipe import Provenance, Recipe
from quota.eval.asking import load_model


def profile_models(model: str | Path, checkpoint: str | Path, samples: Any, *, quiet: bool = False) -> Any:
    """Profile float `model` against quantized `checkpoint`. `samples`: a Samples, or the path of a samples file."""
    from quota.calib.profile import profile
    from quota.calib.samples import Samples

    loaded = samples if isinstance(samples, Samples) else Samples.load(samples)
    float_model, processor = load_model(model)
    quantized, _ = load_model(checkpoint)
    return profile(float_model, quantized, processor, loaded, progress=not quiet)


def allocate(
    profile: Any,
    *,
    keep: float,
    layers: str | list[int] | None = None,
    tau: float = 1.0,
    method: str = "quota",
    reference: str = "recorded",
    position_policy: str = "original",
) -> Any:
    """A recipe of `method` that ends at `keep`."""
    from quota.allocate.recipe_builder import build_recipe

    return build_recipe(
        profile, keep=keep, layers=layers, tau=tau, method=method, reference=reference, position_policy=position_policy
    )


SEARCH_SAMPLES = 20  # VTW's published number


def basis_of(model: Any, processor: Any, samples: Any, **fields: Any) -> RecipeContext:
    """What every baseline recipe of this loaded model shares. fields: reference, position_policy, seed."""
    from quota.calib.evidence import measured_facts
    from quota.core.version import VERSION
    from quota.models.quantize import model_scheme

    source = Provenance(calibration_fingerprint=samples.fingerprint, tool_version=VERSION, samples=len(samples))
    return RecipeContext(measured_facts(model, processor, samples), model_scheme(model).name, source, **fields)


def measure_evidence(
    method: str, model: Any, processor: Any, samples: Any, *, threshold: float = VTW_THRESHOLD, quiet: bool = False
) -> SearchStats:
    """What the method's own search reads, measured on a loaded model; empty for methods that search nothing."""
    from quota.calib.evidence import attention_statistics, withdrawal_divergence
    from quota.eval.compare import bars

    needs = METHODS[method].search
    if needs not in ("withdrawal", "attention"):
        return SearchStats()
    with bars(quiet) as progress:
        task = progress.add_task(f"{METHODS[method].title}: search", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if needs == "attention":
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

    def from_profile(self, profile: Any) -> Recipe:
        """By method quota or uniform."""

        def build(keep: float) -> Recipe:
            return allocate(
                profile,
                keep=keep,
                layers=self.layers,
                tau=self.tau,
                method=self.method,
                reference=self.reference,
                position_policy=self.position_policy,
            )

        return self._matched(build, profile.model.visual_tokens)

    def from_basis(self, basis: RecipeContext, evidence: SearchStats) -> Recipe:
        """By a published method."""
        if self.method == "vtw":
            return build_baseline(basis, self.method, None, self.layers, evidence)
        return self._matched(
            lambda keep: build_baseline(basis, self.method, keep, self.layers, evidence), basis.model.visual_tokens
        )

    def from_checkpoint(
        self, checkpoint: str, samples: Path, *, seed: int = 0, threshold: float = VTW_THRESHOLD, quiet: bool = False
    ) -> Recipe:
        """By a published method for a checkpoint, float or quantized."""
        from quota.calib.samples import Samples

        loaded = Samples.load(samples)
        model, processor = load_model(checkpoint)
        searched = self.method if self.layers is None else "fastv"  # a given layer is not searched for
        evidence = measure_evidence(searched, model, processor, loaded, threshold=threshold, quiet=quiet)
        basis = basis_of(
            model, processor, loaded, reference=self.reference, position_policy=self.position_policy, seed=seed
        )
        return self.from_basis(basis, evidence)

    def _matched(self, build: Callable[[float], Recipe], tokens: int) -> Recipe:
        if self.compute is not None:
            return at_compute(build, self.compute, tokens)
        return build(METHODS[self.method].keep if self.keep is None else self.keep)
