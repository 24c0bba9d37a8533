"""What published methods measure before they prune: attention statistics (FitPrune) and the cost of withdrawing every
visual token (VTW)."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quota.allocate.baselines import RecipeContext, build_baseline
from quota.allocate.fitprune import AttentionSample
from quota.calib.samples import Samples, check_texts
from quota.core.errors import SampleError
from quota.core.recipe import ModelFacts, Recipe
from quota.models import find_family, model_fingerprint
from quota.models.quantize import model_scheme
from quota.nn.attention import AttentionTrace
from quota.planning.facts import inputs_of
from quota.planning.progress import Tell
from quota.prune.attention import head_max_attention, text_queries
from quota.prune.pruner import Pruner
from quota.prune.recording import attending


@torch.inference_mode()
def attention_statistics(
    model: Any, processor: Any, samples: Samples, tell: Tell | None = None
) -> list[AttentionSample]:
    """FitPrune's input: per sample with an image, attention of the largest head to each visual token in every layer,
    unpruned."""
    check_texts(processor, samples)
    family = find_family(model)
    out = []
    for done, sample in enumerate(samples, start=1):
        inputs = inputs_of(model, processor, sample)
        visual = family.visual(inputs)
        if bool(visual.any()):
            shown = inputs["input_ids"] == family.image_token_id
            out.append(_attention_sample(model, inputs, visual, text_queries(shown, torch.ones_like(shown))))
        if tell:
            tell(done, len(samples))
    return out


def _attention_sample(model: Any, inputs: Any, visual: Tensor, text: Tensor) -> AttentionSample:
    rows: list[tuple[np.ndarray, np.ndarray]] = []

    def read(layer: int, trace: AttentionTrace) -> None:
        from_text, from_visual = (
            head_max_attention(trace, visual, queries)[visual].cpu().numpy() for queries in (text, visual)
        )
        rows.append((from_text, from_visual))

    with attending(model, read):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return AttentionSample(np.stack([cross for cross, _ in rows]), np.stack([own for _, own in rows]))


@torch.inference_mode()
def withdrawal_divergence(model: Any, processor: Any, samples: Samples, tell: Tell | None = None) -> dict[int, float]:
    """VTW's search: decoder layer >= 1 -> mean over samples of KL(withdrawn || whole) of the next-token distribution,
    in nats, when all visual tokens leave before that layer."""
    check_texts(processor, samples)
    family = find_family(model)
    plans = {layer: _withdrawal(model, layer) for layer in range(1, family.layers)}
    seen: dict[int, list[float]] = {layer: [] for layer in plans}
    for done, sample in enumerate(samples, start=1):
        inputs = inputs_of(model, processor, sample)
        if bool((inputs["input_ids"] == family.image_token_id).any()):
            whole = _next(model, inputs)
            for layer, plan in plans.items():
                pruner = Pruner(model, plan)
                try:
                    part = _next(model, inputs)
                finally:
                    pruner.remove()
                seen[layer].append(float((part.exp() * (part - whole)).sum()))
        if tell:
            tell(done, len(samples))
    if not all(seen.values()):
        raise SampleError("samples: expected at least one with an image, got none; VTW measures what images add")
    return {layer: fmean(values) for layer, values in seen.items()}


def _next(model: Any, inputs: Any) -> Tensor:
    return model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1].double().log_softmax(-1)


def _withdrawal(model: Any, layer: int) -> Recipe:
    family = find_family(model)
    tokens = family.visual_tokens or 1  # unused: the recipe keeps none
    facts = ModelFacts(
        architecture=type(model).__name__,
        fingerprint=model_fingerprint(model),
        layers=family.layers,
        visual_tokens=tokens,
    )
    return build_baseline(RecipeContext(facts, model_scheme(model).name), "vtw", layers=[layer])
