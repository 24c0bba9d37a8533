"""What every supported architecture says about itself: module paths, sizes, and how its checkpoints name tensors.

Everything is read from configurations by attribute name, so no model library is imported here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quota.core.errors import CheckpointError

_FINGERPRINT_ROWS = 256
_TEXT_DIMS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip

KeyRules = Sequence[tuple[re.Pattern[str], str]]


@dataclass(frozen=True)
class ArchSpec:
    """Module paths and sizes of one model.

    Paths are relative to the conditional-generation model. `vision_layers_used` counts the encoder layers that feed the projector; the others
    (LLaVA drops the output of CLIP's last layer) are never quantized. `visual_tokens` of one picture; None where it follows the picture's size.
    `merge` x `merge` patches make one of them. `multimodal_positions`: a token's rotary position is one number per axis.
    `dims`: the vision sizes that are part of the fingerprint.
    """

    name: str
    model_class: str
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
    visual_tokens: int | None
    dims: dict[str, Any]
    key_rules: KeyRules = field(repr=False)
    vision_path: str
    vision_embed_path: str
    encoder_path: str
    projector_path: str
    drops_cls: bool = False
    merge: int = 1
    multimodal_positions: bool = False
    model_path: str = "model"
    text_path: str = "model.language_model"
    decoder_path: str = "model.language_model.layers"
    embed_path: str = "model.language_model.embed_tokens"
    norm_path: str = "model.language_model.norm"
    lm_head_path: str = "lm_head"

    def decoder_layer(self, index: int) -> str:
        """Path of decoder layer `index` (0-based)."""
        return f"{self.decoder_path}.{index}"

    def vision_layer(self, index: int) -> str:
        """Path of vision encoder layer `index` (0-based)."""
        return f"{self.encoder_path}.{index}"

    def canonical_key(self, key: str) -> str:
        """Checkpoint tensor name -> name inside the model (`model.language_model...`, the tower's path, `lm_head...`)."""
        for pattern, replacement in self.key_rules:
            renamed, hits = pattern.subn(replacement, key)
            if hits:
                return renamed
        return key

    def image_index(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> int64 [B, S]: which picture of its row a visual token belongs to (0, 1, ...), -1 for every other token.

        Pictures of one fixed length may stand side by side; with dynamic resolution markers stand between them, so a run is a picture.
        """
        visual = ids == self.image_token_id
        if self.visual_tokens is not None:
            number = (visual.long().cumsum(-1) - 1) // self.visual_tokens
        else:
            begins = visual & ~torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], -1)
            number = begins.long().cumsum(-1) - 1
        return number.masked_fill(~visual, -1)


def head_dim(text: Any) -> int:
    """Head dimension of a language model's configuration."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def text_sizes(text: Any) -> dict[str, Any]:
    """The ArchSpec fields that every language model's configuration answers alike."""
    return {
        "layers": text.num_hidden_layers, "hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size,
        "heads": text.num_attention_heads, "kv_heads": text.num_key_value_heads, "head_dim": head_dim(text),
    }  # fmt: skip


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`; CheckpointError naming the path when it is absent."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"module {path}: expected in the model, not found in {type(model).__name__}; use a ...ForConditionalGeneration model") from None


def fingerprint(arch: ArchSpec, config: Any, embed: Tensor) -> str:
    """Identity of a model: `sha256:<hex>` over its sizes and the sign bits of the first 256 rows of the word embedding.

    embed: [vocabulary, hidden], any float dtype. Signs survive every dtype change and embeddings are never quantized, so a float
    model and its quantized checkpoint have the same fingerprint while another model of the same sizes has not.
    """
    text = config.text_config
    sizes = [head_dim(text) if name == "head_dim" else getattr(text, name) for name in _TEXT_DIMS]
    dims = {"architecture": arch.name, "image_token_id": arch.image_token_id, "text": sizes, **arch.dims}
    digest = hashlib.sha256(json.dumps(dims, sort_keys=True, separators=(",", ":")).encode())
    digest.update(torch.signbit(embed[:_FINGERPRINT_ROWS].detach().cpu()).contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
