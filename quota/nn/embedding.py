"""Rotary and patch embeddings whose values do not depend on what else is in the batch.

Vectorised float32 `cos` differs from its scalar tail in the last bit, and a convolution may choose another algorithm
for another batch size; int4 rounding would turn such a bit into a visible difference.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class MultimodalRotary(nn.Module):
    """Replaces a decoder's rotary embedding over several position axes (M-RoPE): same angles, cosine and sine rounded
    once from float64, so that a token's do not depend on its neighbours."""

    def __init__(self, inner: Any, axis_of: Sequence[int], device: torch.device | str | None = None) -> None:
        """inner: upstream's embedding, with the frequencies. axis_of: the axis (time, row, column) that turns each of
        its D / 2 pairs of channels."""
        super().__init__()
        self.inner = inner
        self.axis_of = torch.tensor(list(axis_of), device="cpu")  # no buffer: loaders would leave one on meta empty
        if device is not None:
            self.inner.to(device)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x: only its dtype is used; position_ids [3, B or 1, T] (time, row, column), or [B, T] where the three are one
        -> cos, sin [B or 1, T, D]."""
        if self.inner.rope_type != "default":
            return self.inner(x, position_ids)
        position_ids = position_ids.expand(3, *position_ids.shape[-2:])
        angles = position_ids[..., None].float() * self.inner.inv_freq.float()
        angles = angles.gather(0, self.axis_of.to(angles.device).expand(1, *angles.shape[1:]))[0].double()
        scale = self.inner.attention_scaling
        cos, sin = (torch.cat([part, part], -1).mul(scale).float().to(x.dtype) for part in (angles.cos(), angles.sin()))
        return cos, sin


def axial_rotary(places: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """places [n, 2] (row, column) -> cos, sin [n, dim] float32 of a rotary embedding over an image, rounded once from
    float64.

    Rows turn the first quarter of the channels, columns the second, and both again in the upper half.
    """
    frequency = 1.0 / (theta ** (torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2)))
    angles = (places[..., None].float() * frequency).flatten(-2).double()
    cos, sin = (torch.cat([part, part], -1).float() for part in (angles.cos(), angles.sin()))
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
