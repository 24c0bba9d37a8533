"""What is trained: the projector, and LoRA of rank 16 on every projection of the language model. Tower and language
model stay as they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK, SCALE = 16, 2.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class Lora(nn.Module):
    """base(x) + SCALE * b a x. a: [RANK, in], b: [out, RANK], which starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(RANK, base.in_features) / math.sqrt(base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.lora_a.T) @ (self.lora_b.T * SCALE)


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, blocks: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of images with segments behind them, without the products that the mask would throw away: half of them,
    and of the time.

    query, key, value [1, heads, S, head dim] (fewer heads of keys and values). The tokens before the first block see
    each other causally; those of a block see them and, where attention_mask [1, 1, T, T] over the tokens behind the
    images is true, each other. blocks: (first, end) from 0 on.
    """
    attention_mask = attention_mask[0, 0]
    first = query.shape[2] - len(attention_mask)
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    lead_query, *lead = (x[:, :, :first] for x in (query, key, value))
    out = [F.scaled_dot_product_attention(lead_query, lead[0], lead[1], is_causal=True)]
    for begin, end in blocks:
        seen = torch.cat([attention_mask.new_ones(end - begin, first), attention_mask[begin:end, begin:end]], 1)
        own = slice(first + begin, first + end)
        keys, values = (torch.cat([start, x[:, :, own]], 2) for start, x in zip(lead, (key, value), strict=True))
        out.append(F.scaled_dot_product_attention(query[:, :, own], keys, values, attn_mask=seen))
    return torch.cat(out, 2).transpose(1, 2), None


class Projector(nn.Module):
    """LLaVA's two linear layers over features standardized per channel; `folded` gives the same function without the
    standardizing.

    Features of the layer LLaVA reads have seen no norm: channels differ in size by orders of magnitude, which plain
    training does not get over.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(vision_width))
        self.register_buffer("deviation", torch.ones(vision_width))
        self.linear_1, self.linear_2 = nn.Linear(vision_width, width), nn.Linear(width, width)

    def standardize(self, features: Tensor) -> None:
        """Take mean and deviation from features [..., vision width]."""
        flat = features.flatten(0, -2).double()
        self.mean.copy_(flat.mean(0))
        self.deviation.copy_(flat.std(0).clamp(min=1e-4))

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1((features - self.mean) / self.deviation)))

    @torch.no_grad()
    def unfold(self, state: dict[str, Tensor], mean: Tensor, deviation: Tensor) -> None:
        """Take LLaVA's projector state and its standardizing: the inverse of `folded`."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        self.linear_1.weight.copy_(state["linear_1.weight"] * deviation)
        self.linear_1.bias.copy_(state["linear_1.bias"] + state["linear_1.weight"] @ mean)
        self.linear_2.weight.copy_(state["linear_2.weight"])
        self.linear_2.bias.copy_(state["linear_2.bias"])

    def folded(self) -> dict[str, Tensor]:
        """State of LLaVA's own projector."""
        weight = self.linear_1.weight.detach() / self.deviation
        bias = self.linear_1.bias.detach() - weight @ self.mean
        return {
            "linear_1.weight": weight,
            "linear_1.bias": bias,
            "linear_2.weight": self.linear_2.weight.detach(),
            "linear_2.bias": self.linear_2.bias.detach(),
        }


class Student(nn.Module):
    """The frozen parts, float32, with what is trained between and inside them."""

    def __init__(self, parts: Path) -> None:
        super().__init__()
        from transformers import AttentionInterface, LlavaForConditionalGeneration

        AttentionInterface.register("packed", packed_attention)
        llava: Any = LlavaForConditionalGeneration.from_pretrained(
            parts, dtype=torch.float32, attn_implementation="sdpa"
        )
        llava.model.language_model.config._attn_implementation = "packed"
        llava.requires_grad_(False)
        self.tower: Any = llava.model.vision_tower.eval()
        layers = self.tower.encoder.layer
        del layers[len(layers) - 1 :]  # LLaVA reads the input of the last layer
        self.language: Any = llava.model.language_model
        self.words: Tensor = llava.lm_head.weight.detach()
        torch.manual_seed(0)
        for layer in self.language.layers:
            for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
                for name in names:
                    setattr(part, name, Lora(getattr(part, name)))
        self.projector = Projector(self.tower.config.hidden_size, self.words.shape[1])

    def trained(self) -> dict[str, nn.Parameter]:
        """Name -> parameter: `projector.*` and `layers.N.<module>.lora_a|lora_b`."""
        named = {f"projector.{name}": p for name, p in self.projector.named_parameters()}
        return named | {name: p for name, p in self.language.named_parameters() if ".lora_" in name}

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [B, 3, 336, 336] -> [B, 576, vision width]: what LLaVA's projector reads."""
        hidden = self.tower.embeddings(pixels)
        for layer in self.tower.encoder.layer:
            hidden = layer(hidden)
        return hidden[:, 1:]

    def forward(self, embeds: Tensor, positions: Tensor, seen: Tensor, blocks: Any) -> Tensor:
        """embeds [1, S, D], positions [1, S], seen and blocks as in `packed_attention` -> states [S, D] after the last
        norm."""
        mask = seen[None, None]
        out = self.language(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False, blocks=blocks
        )
        return out.last_hidden_state[0]
