"""Where things are inside the supported architectures."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quota.core.errors import CheckpointError
from quota.models import base, llava, qwen2_5_vl
from quota.models.base import ArchSpec, submodule

FAMILIES = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}

__all__ = ["FAMILIES", "ArchSpec", "find_family", "fingerprint", "model_fingerprint", "submodule", "vision_macs"]


def find_family(model_or_config: Any) -> ArchSpec:
    """The layout of a model or of its configuration. Raises CheckpointError with the list of supported architectures for anything else."""
    config = getattr(model_or_config, "config", model_or_config)
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in FAMILIES or getattr(config, "text_config", None) is None or getattr(config, "vision_config", None) is None:
        raise CheckpointError(f"model_type: expected one of {[family.DESCRIPTION for family in FAMILIES.values()]}, got {kind!r}")
    return FAMILIES[kind].describe(config)


def fingerprint(config: Any, embed: Tensor) -> str:
    """Identity of a model from its configuration and word embedding [vocabulary, hidden]; see `quota.models.base.fingerprint`."""
    return base.fingerprint(find_family(config), config, embed)


def model_fingerprint(model: nn.Module) -> str:
    """`fingerprint` of a loaded model, float or quantized."""
    embed: Any = submodule(model, find_family(model).embed_path)
    return fingerprint(model.config, embed.weight)


def vision_macs(config: Any, visual_tokens: int) -> int:
    """Multiply-accumulates of tower and projector for one picture that becomes `visual_tokens` tokens."""
    if find_family(config).visual_tokens is not None:
        return llava.vision_macs(config)
    return qwen2_5_vl.vision_macs(config, visual_tokens)
