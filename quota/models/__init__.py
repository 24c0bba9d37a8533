"""The supported model families, each in a file of its own; see `quota.models.base`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from quota.core.errors import CheckpointError
from quota.models.base import Family, submodule

# model_type -> module and class; a family's model library is imported when a model of it is met
FAMILIES = {
    "llava": ("llava", "Llava"),
    "llava_next": ("llava_next", "LlavaNext"),
    "llava_onevision": ("llava_onevision", "LlavaOnevision"),
    "internvl": ("internvl", "InternVL"),
    "mistral3": ("mistral3", "Mistral3"),
    "paligemma": ("paligemma", "PaliGemma"),
    "qwen2_vl": ("qwen2_vl", "Qwen2VL"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen25VL"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VL"),
}

__all__ = [
    "FAMILIES",
    "Family",
    "family_class",
    "find_family",
    "fingerprint",
    "model_fingerprint",
    "submodule",
    "vision_macs",
]


def family_class(name: str) -> type[Family]:
    """The family of a model_type in FAMILIES."""
    module, attribute = FAMILIES[name]
    found: type[Family] = getattr(import_module(f"quota.models.{module}"), attribute)
    return found


def find_family(model_or_config: Any) -> Family:
    """The family of a model or of its configuration. Raises CheckpointError with the list of supported ones for
    anything else."""
    config = getattr(model_or_config, "config", model_or_config)
    kind = getattr(config, "model_type", type(config).__name__)
    if (
        kind not in FAMILIES
        or getattr(config, "text_config", None) is None
        or getattr(config, "vision_config", None) is None
    ):
        raise CheckpointError(f"model_type: expected one of {', '.join(FAMILIES)}, got {kind!r}")
    return family_class(kind).kind_of(config)(config)


def fingerprint(config: Any, embed: Tensor) -> str:
    """Identity of a model from its configuration and word embedding [vocabulary, hidden]; see `Family.fingerprint`."""
    return find_family(config).fingerprint(embed)


def model_fingerprint(model: nn.Module) -> str:
    """`fingerprint` of a loaded model, float or quantized."""
    family = find_family(model)
    embed: Any = submodule(model, family.embed_path)
    return family.fingerprint(embed.weight)


def vision_macs(config: Any, visual_tokens: int) -> int:
    """Multiply-accumulates of tower and projector for one image that becomes `visual_tokens` tokens."""
    return find_family(config).vision_macs(visual_tokens)
