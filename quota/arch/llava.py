"""LLaVA-1.5 layout (CLIP vision tower, two-layer projector, LLaMA decoder): module paths, sizes and identity.

Everything is read from the configuration by attribute name, so this module imports no model library.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quota.core.errors import CheckpointError

SUPPORTED = ("llava: CLIP vision tower + two-layer projector + LLaMA decoder",)

_FINGERPRINT_ROWS = 256
_TEXT_DIMS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
_VISION_DIMS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")

# Published LLaVA checkpoints name their tensors in several ways; the module path inside the model is the canonical one.
_KEY_RULES = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\."), "model.language_model."),
    (re.compile(r"^(?:model\.)?vision_tower\.vision_model\."), "model.vision_tower."),
    (re.compile(r"^vision_tower\."), "model.vision_tower."),
    (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
)


@dataclass(frozen=True)
class ArchSpec:
    """Module paths and sizes of one model.

    Paths are relative to the conditional-generation model. `vision_layers_used` counts the encoder layers that feed the
    projector: with `vision_feature_layer=-2` the last one runs but its output is dropped, so it is never quantized.
    """

    name: str
    layers: int
    vision_layers_used: int
    vision_layers_total: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_heads: int
    image_token_id: int
    visual_tokens: int
    drops_cls: bool
    model_path: str = "model"
    text_path: str = "model.language_model"
    decoder_path: str = "model.language_model.layers"
    embed_path: str = "model.language_model.embed_tokens"
    norm_path: str = "model.language_model.norm"
    vision_path: str = "model.vision_tower"
    vision_embed_path: str = "model.vision_tower.embeddings"
    vision_norm_path: str = "model.vision_tower.pre_layrnorm"
    encoder_path: str = "model.vision_tower.encoder.layers"
    projector_path: str = "model.multi_modal_projector"
    lm_head_path: str = "lm_head"

    def decoder_layer(self, index: int) -> str:
        """Path of decoder layer `index` (0-based)."""
        return f"{self.decoder_path}.{index}"

    def vision_layer(self, index: int) -> str:
        """Path of vision encoder layer `index` (0-based)."""
        return f"{self.encoder_path}.{index}"


def canonical_key(key: str) -> str:
    """Checkpoint tensor name -> name inside the model (`model.language_model...`, `model.vision_tower...`, `lm_head...`)."""
    for pattern, replacement in _KEY_RULES:
        renamed, hits = pattern.subn(replacement, key)
        if hits:
            return renamed
    return key


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`; CheckpointError naming the path when it is absent."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"module {path}: expected in a LLaVA model, not found in {type(model).__name__}; use a LlavaForConditionalGeneration") from None


def find_arch(model_or_config: Any) -> ArchSpec:
    """The layout of a LLaVA model or of its configuration.

    Raises CheckpointError with the list of supported architectures for anything else.
    """
    config = getattr(model_or_config, "config", model_or_config)
    kind = getattr(config, "model_type", type(config).__name__)
    text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    if kind != "llava" or text is None or vision is None:
        raise CheckpointError(f"model_type: expected one of {list(SUPPORTED)}, got {kind!r}")
    if text.model_type != "llama" or vision.model_type != "clip_vision_model":
        raise CheckpointError(f"model_type: expected one of {list(SUPPORTED)}, got llava with {vision.model_type!r} and {text.model_type!r}")
    feature = config.vision_feature_layer
    if not isinstance(feature, int):
        raise CheckpointError(f"vision_feature_layer: expected one integer, got {feature!r}; concatenated feature layers are not supported")
    total = vision.num_hidden_layers
    used = feature if feature >= 0 else total + 1 + feature  # index into hidden_states: entry i is the input of layer i
    if not 0 <= used <= total:
        raise CheckpointError(f"vision_feature_layer: expected an index into {total + 1} hidden states, got {feature}")
    drops_cls = config.vision_feature_select_strategy == "default"
    patches = (vision.image_size // vision.patch_size) ** 2
    return ArchSpec(
        name="llava", layers=text.num_hidden_layers, vision_layers_used=used, vision_layers_total=total,
        hidden_size=text.hidden_size, intermediate_size=text.intermediate_size, heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads, head_dim=_head_dim(text), vision_hidden_size=vision.hidden_size,
        vision_intermediate_size=vision.intermediate_size, vision_heads=vision.num_attention_heads,
        image_token_id=_image_token_id(config), visual_tokens=patches + (0 if drops_cls else 1), drops_cls=drops_cls,
    )  # fmt: skip


def fingerprint(config: Any, embed: Tensor) -> str:
    """Identity of a model: `sha256:<hex>` over its sizes and the sign bits of the first 256 rows of the word embedding.

    embed: [vocabulary, hidden], any float dtype. Signs survive every dtype change and embeddings are never quantized, so a float
    model and its quantized checkpoint have the same fingerprint while another model of the same sizes has not.
    """
    arch = find_arch(config)
    text, vision = config.text_config, config.vision_config
    dims = {
        "architecture": arch.name, "image_token_id": arch.image_token_id, "visual_tokens": arch.visual_tokens,
        "text": [_head_dim(text) if name == "head_dim" else getattr(text, name) for name in _TEXT_DIMS],
        "vision": [getattr(vision, name) for name in _VISION_DIMS], "vision_layers_used": arch.vision_layers_used,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(dims, sort_keys=True, separators=(",", ":")).encode())
    digest.update(torch.signbit(embed[:_FINGERPRINT_ROWS].detach().cpu()).contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def model_fingerprint(model: nn.Module) -> str:
    """`fingerprint` of a loaded model, float or quantized."""
    embed = submodule(model, find_arch(model).embed_path)
    return fingerprint(model.config, embed.weight)  # type: ignore[arg-type]


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _image_token_id(config: Any) -> int:
    token = getattr(config, "image_token_id", None)
    return int(config.image_token_index if token is None else token)
