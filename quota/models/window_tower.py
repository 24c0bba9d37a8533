"""Quantized parts that only Qwen2.5-VL has: M-RoPE, the windowed vision tower, its merger."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLRotaryEmbedding

from quota.nn.float_attention import float_attention
from quota.nn.linear import QuantLinear, as_dtype_of, as_float32


class MultimodalRotary(nn.Module):
    """Replaces the decoder's M-RoPE: same angles, cosine and sine rounded once from float64, so that a token's do not depend on its neighbours."""

    def __init__(self, config: Any, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.inner = Qwen2_5_VLRotaryEmbedding(config=config)
        if device is not None:
            self.inner.to(device)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x: only its dtype is used; position_ids [3, B or 1, T] (time, row, column), or [B, T] where the three are one -> cos, sin [B or 1, T, D]."""
        if self.inner.rope_type != "default":
            return self.inner(x, position_ids)
        position_ids = position_ids.expand(3, *position_ids.shape[-2:])
        angles = position_ids[..., None].float() * self.inner.inv_freq.float()
        # the channels are shared out between the three axes: first those of time, then of rows, then of columns
        angles = torch.cat([part[axis % 3] for axis, part in enumerate(angles.split(self.inner.mrope_section, -1))], -1).double()
        scale = self.inner.attention_scaling
        cos, sin = (torch.cat([part, part], -1).mul(scale).float().to(x.dtype) for part in (angles.cos(), angles.sin()))
        return cos, sin


class QuantWindowAttention(nn.Module):
    """The tower's attention: quantized projections, float scores inside each window. Windows of one size run together; as a call holds one
    picture (`PictureByPicture`), what they run with is a function of the picture alone."""

    def __init__(self, qkv: QuantLinear, proj: QuantLinear, *, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = qkv, proj, heads

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        """hidden_states [n, hidden] in window order, cu_seqlens [windows + 1] -> same shape."""
        n, hidden = hidden_states.shape
        q, k, v = self.qkv(hidden_states.float()).view(n, 3, self.heads, hidden // self.heads).unbind(1)
        cos, sin = (t.float()[:, None] for t in position_embeddings)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        sizes, out = torch.diff(cu_seqlens).tolist(), torch.empty_like(v)
        for size in sorted(set(sizes)):
            first = torch.tensor([int(at) for at, length in zip(cu_seqlens[:-1], sizes, strict=True) if length == size], device=v.device)
            rows = first[:, None] + torch.arange(size, device=v.device)  # [windows, size]
            inside_q, inside_k, inside_v = (t[rows].transpose(1, 2).contiguous() for t in (q, k, v))
            out[rows] = float_attention(inside_q, inside_k, inside_v, hidden_states.dtype).transpose(1, 2)
        return self.proj(out.reshape(n, hidden)).to(hidden_states.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class QuantMerger(nn.Sequential):
    """The merger's two linears, "0" and "2" upstream; the GELU between them is the second one's prologue."""

    def __init__(self, first: QuantLinear, second: QuantLinear) -> None:
        super().__init__(OrderedDict([("0", first), ("2", second)]))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 4 vision hidden] -> [n, text hidden], same dtype."""
        first, second = self
        return as_dtype_of(second(first(as_float32(x)), "gelu"), x)


class PictureByPicture(Qwen2_5_VisionTransformerPretrainedModel):
    """The upstream tower, run on one picture at a time: its features are the same alone and in any batch."""

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """hidden_states [patches of all pictures, patch], grid_thw [pictures, 3] -> as upstream."""
        parts = hidden_states.split(grid_thw.prod(-1).tolist())
        outs: list[Any] = [super(PictureByPicture, self).forward(part, grid_thw=grid[None], **kwargs) for part, grid in zip(parts, grid_thw, strict=True)]
        return BaseModelOutputWithPooling(
            last_hidden_state=torch.cat([out.last_hidden_state for out in outs]), pooler_output=torch.cat([out.pooler_output for out in outs])
        )
