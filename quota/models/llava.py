"""LLaVA-1.5 layout: CLIP vision tower, two-layer projector, LLaMA decoder."""

from __future__ import annotations

import re
from typing import Any

from quota.core.errors import CheckpointError
from quota.models.base import ArchSpec, text_sizes

DESCRIPTION = "llava: CLIP vision tower + two-layer projector + LLaMA decoder"
_VISION_DIMS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")

# Published checkpoints name their tensors in several ways; the module path inside the model is the canonical one.
_KEY_RULES = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\."), "model.language_model."),
    (re.compile(r"^(?:model\.)?vision_tower\.vision_model\."), "model.vision_tower."),
    (re.compile(r"^vision_tower\."), "model.vision_tower."),
    (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
)


def describe(config: Any) -> ArchSpec:
    """The layout of a LLaVA configuration; CheckpointError for parts of another make."""
    text, vision = config.text_config, config.vision_config
    if text.model_type != "llama" or vision.model_type != "clip_vision_model":
        raise CheckpointError(f"model_type: expected {DESCRIPTION}, got llava with {vision.model_type!r} and {text.model_type!r}")
    feature = config.vision_feature_layer
    if not isinstance(feature, int):
        raise CheckpointError(f"vision_feature_layer: expected one integer, got {feature!r}; concatenated feature layers are not supported")
    total = vision.num_hidden_layers
    used = feature if feature >= 0 else total + 1 + feature  # index into hidden_states: entry i is the input of layer i
    if not 0 <= used <= total:
        raise CheckpointError(f"vision_feature_layer: expected an index into {total + 1} hidden states, got {feature}")
    drops_cls = config.vision_feature_select_strategy == "default"
    tokens = (vision.image_size // vision.patch_size) ** 2 + (0 if drops_cls else 1)
    dims = {"vision": [getattr(vision, name) for name in _VISION_DIMS], "vision_layers_used": used, "visual_tokens": tokens}
    return ArchSpec(
        name="llava", model_class="LlavaForConditionalGeneration", vision_layers_used=used, vision_layers_total=total,
        vision_hidden_size=vision.hidden_size, vision_intermediate_size=vision.intermediate_size, vision_heads=vision.num_attention_heads,
        image_token_id=_image_token_id(config), visual_tokens=tokens, dims=dims, drops_cls=drops_cls, key_rules=_KEY_RULES,
        vision_path="model.vision_tower", vision_embed_path="model.vision_tower.embeddings", encoder_path="model.vision_tower.encoder.layers",
        projector_path="model.multi_modal_projector", **text_sizes(text),
    )  # fmt: skip


def _image_token_id(config: Any) -> int:
    token = getattr(config, "image_token_id", None)
    return int(config.image_token_index if token is None else token)


def vision_macs(config: Any) -> int:
    """Multiply-accumulates of tower and projector for one picture: patch embedding, the layers whose output is used, two projector layers."""
    v, d = config.vision_config, config.text_config.hidden_size
    patches = (v.image_size // v.patch_size) ** 2
    n, h, m = patches + 1, v.hidden_size, v.intermediate_size
    feature = config.vision_feature_layer
    used = v.num_hidden_layers + 1 + feature if isinstance(feature, int) and feature < 0 else v.num_hidden_layers
    block = 4 * n * h * h + 2 * n * n * h + 2 * n * h * m
    return patches * v.num_channels * v.patch_size**2 * h + used * block + patches * (h * d + d * d)
