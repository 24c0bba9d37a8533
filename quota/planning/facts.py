"""What a recipe says about the model it is for."""

from __future__ import annotations

from statistics import median
from typing import Any

from torch import Tensor

from quota.allocate.compute import decoder_sizes
from quota.calib.samples import Sample, Samples, check_texts, encode
from quota.core.errors import SampleError
from quota.core.recipe import ModelFacts
from quota.models import find_family, model_fingerprint, vision_macs


def inputs_of(model: Any, processor: Any, sample: Sample) -> dict[str, Tensor]:
    """What `model` reads of a sample, on its device and, pixels, in its dtype."""
    found = {name: value.to(model.device) for name, value in encode(processor, sample).items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in found.items()}


def measured_facts(model: Any, processor: Any, samples: Samples) -> ModelFacts:
    """Sizes of `model`, and the visual and text tokens of a typical prompt of `samples`. Nothing is run."""
    check_texts(processor, samples)
    family = find_family(model)
    rows = [family.visual(encode(processor, sample))[0] for sample in samples]
    visual = [int(row.sum()) for row in rows if bool(row.any())]
    if not visual:
        raise SampleError("samples: expected at least one with an image, got none; budgets count an image's tokens")
    return model_facts(model, model_fingerprint(model), visual, [int((~row).sum()) for row in rows])


def model_facts(model: Any, fingerprint: str, visual_tokens: list[int], text_tokens: list[int]) -> ModelFacts:
    """What recipes and the cost model need: sizes, and medians of the tokens per prompt."""
    sizes = decoder_sizes(model.config)
    text = model.config.text_config
    return ModelFacts(
        architecture=type(model).__name__,
        fingerprint=fingerprint,
        layers=sizes.layers,
        visual_tokens=round(median(visual_tokens)),
        hidden_size=sizes.hidden_size,
        kv_size=sizes.kv_size,
        intermediate_size=sizes.intermediate_size,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        text_tokens=max(1, round(median(text_tokens))),
        vision_macs=vision_macs(model.config, round(median(visual_tokens))),
    )
