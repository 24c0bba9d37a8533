"""From two checkpoints and samples to a profile, and from a profile to a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    profile: Any, *, keep: float, layers: str | list[int] | None = None, tau: float = 1.0, method: str = "quota", reference: str = "recorded",
    position_policy: str = "original",
) -> Any:  # fmt: skip
    """A recipe of `method` that ends at `keep`."""
    from quota.allocate.recipe_builder import build_recipe

    return build_recipe(profile, keep=keep, layers=layers, tau=tau, method=method, reference=reference, position_policy=position_policy)
