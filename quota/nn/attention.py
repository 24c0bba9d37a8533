"""Quantized attention: LLaMA's with a 4-bit cache, CLIP's with float scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from quota import ops
from quota.nn.cache import Kv4Layer, kv4_layer
from quota.nn.embedding import apply_rotary
from quota.nn.linear import Float32State, QuantLinear
from quota.nn.padding import start_of_mask


@dataclass
class Record:
    """What one attention leaves for scoring tokens: q [B, H, T, D], k [B, Hkv, T, D] and lse [B, H, T], float32, as deployed."""

    q: Tensor | None = None
    k: Tensor | None = None
    lse: Tensor | None = None
    scaling: float = 1.0


class QuantAttention(Float32State):
    """Causal attention over a 4-bit cache; prefill reads the same dequantized keys and values that decode will read.

    `qkv_proj` holds the rows of q, k, v. `q_transform` and `k_transform` [D, D] (each may be absent) act on rows of D after the rotary
    embedding and are inverse-transposes of each other. `o_proj` has a [H, H] left factor; the right one is merged into the v rows.
    """

    q_transform: Tensor | None
    k_transform: Tensor | None
    k_clip: Tensor
    v_clip: Tensor

    def __init__(self, qkv_proj: QuantLinear, o_proj: QuantLinear, *, heads: int, kv_heads: int, head_dim: int, layer_idx: int,
                 transforms: tuple[bool, bool] = (True, True)) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.layer_idx = heads, kv_heads, head_dim, layer_idx
        self.scaling = head_dim**-0.5
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        float32: Any = {"dtype": torch.float32, "device": qkv_proj.w_q.device}
        for name, present in zip(("q_transform", "k_transform"), transforms, strict=True):
            self.register_buffer(name, torch.zeros(head_dim, head_dim, **float32) if present else None)
        self.register_buffer("k_clip", torch.ones((), **float32))
        self.register_buffer("v_clip", torch.ones((), **float32))

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, attention_mask: Tensor | None = None,
                past_key_values: Cache | None = None, quota_record: Record | None = None, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
        """hidden_states [B, T, hidden]; position_embeddings cos, sin [B or 1, T, D]; attention_mask as transformers makes it, or
        [B, S] bool, or None (no padding, or the rows the cache layer remembers) -> (output, None)."""
        batch, tokens, _ = hidden_states.shape
        q, k, v = self._project(hidden_states.float(), position_embeddings)
        cache = Kv4Layer() if past_key_values is None else kv4_layer(past_key_values, self.layer_idx)
        if attention_mask is not None and (cache.length == 0 or tokens > 1):
            found = start_of_mask(attention_mask, batch)
            cache.start = found if bool(found.any()) else None
        cache.append(k, v, float(self.k_clip), float(self.v_clip))
        start = torch.zeros(batch, dtype=torch.int32, device=q.device) if cache.start is None else cache.start
        out, lse = ops.kv4_attention(q, cache.key, cache.value, cache.length, start, self.scaling)
        if quota_record is not None:
            quota_record.q, quota_record.k, quota_record.lse, quota_record.scaling = q, cache.dequantize_keys(), lse, self.scaling
        return self.o_proj(out.reshape(batch, tokens, -1)).to(hidden_states.dtype), None

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, hidden] float32 -> q [B, H, T, D], k, v [B, Hkv, T, D], rotated and transformed."""
        heads = self.qkv_proj(x).view(*x.shape[:2], self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if position_embeddings is not None:
            cos, sin = (t.float() for t in position_embeddings)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return _transform(q, self.q_transform), _transform(k, self.k_transform), v.contiguous()


def _transform(x: Tensor, matrix: Tensor | None) -> Tensor:
    if matrix is None:
        return x.contiguous()
    return ops.transform(x.reshape(-1, x.shape[-1]).contiguous(), None, matrix).view(x.shape)


class QuantClipAttention(nn.Module):
    """CLIP's bidirectional attention: quantized projections, float scores. Images are attended one at a time, so that an image gives
    the same features alone and in a batch."""

    def __init__(self, qkv_proj: QuantLinear, out_proj: QuantLinear, *, heads: int) -> None:
        super().__init__()
        self.qkv_proj, self.out_proj, self.heads = qkv_proj, out_proj, heads

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        """hidden_states [B, T, hidden] -> (output of the same shape, None)."""
        batch, tokens, hidden = hidden_states.shape
        x = self.qkv_proj(hidden_states.float()).view(batch, tokens, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        masks = [None] * batch if attention_mask is None else [attention_mask.expand(batch, -1, -1, -1)[b : b + 1] for b in range(batch)]
        rows = []
        for image, mask in enumerate(masks):
            q, k, v = x[:, image : image + 1].contiguous()
            rows.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        out = torch.cat(rows).transpose(1, 2).reshape(batch, tokens, hidden)
        return self.out_proj(out).to(hidden_states.dtype), None
