"""Rotary and patch embeddings whose values do not depend on what else is in the batch.

Vectorised float32 `cos` differs from its scalar tail in the last bit, and a convolution may choose another algorithm
for another batch size; int4 rounding would turn such a bit into a visible difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

_FIXED_FREQUENCIES = ("default", "linear", "llama3", "yarn", "proportional")


class Rotary(nn.Module):
    """Replaces LLaMA's rotary embedding: same angles, cosine and sine rounded once from float64."""

    def __init__(self, config: Any, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.inner = LlamaRotaryEmbedding(config=config)
        if device is not None:
            self.inner.to(device)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x: only its dtype is used; position_ids [B or 1, T] -> cos, sin [B or 1, T, D]."""
        if self.inner.rope_type not in _FIXED_FREQUENCIES:
            return self.inner(x, position_ids)
        angles = (position_ids[..., None].float() * self.inner.inv_freq.float()).double()
        scale = self.inner.attention_scaling
        cos, sin = (torch.cat([part, part], -1).mul(scale).float().to(x.dtype) for part in (angles.cos(), angles.sin()))
        return cos, sin


class PatchEmbedding(nn.Conv2d):
    """A patch convolution that runs one image at a time. State is that of the convolution it replaces."""

    @classmethod
    def replacing(cls, conv: nn.Conv2d) -> PatchEmbedding:
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            device="meta",
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(
            enabled=True, deterministic=True, allow_tf32=False
        ):  # CUDA only: float32 stays float32
            return (
                torch.cat([super(PatchEmbedding, self).forward(image[None]) for image in x])
                if len(x)
                else super().forward(x)
            )
