"""Attention whose key bias never enters the 4-bit cache.

Qwen2.5's key projections have biases whose norm reaches 600-900 in the first and last layers, dozens of times the
content W x they are added to. One (scale, zero) per token and head over k = R_j (W x_j + b) spends its fifteen steps on
the bias and rounds the content away; a transform of the head dimension cannot help, because whatever shrinks the bias's
directions in the keys enlarges their rounding errors in the queries by as much. The softmax forgives a term that is the
same for every key of a query, but R_j b turns with the key's position, so it may not be dropped either.

It need not be stored, though: b is a constant of the layer and R_j follows from the position. By linearity of the score

    q_i . k_j = q_i . R_j W x_j + q_i . R_j b,

only the first part is quantized (k_j without bias, through P_h as usual). The second is exact in float32 and cheap,
because a rotary embedding is linear in the cosines and sines of position j: per pair of channels (f, f') of the rotated
query q and of b,

    q . R_j b = sum_f  (q_f b_f + q_f' b_f') cos_jf  +  (q_f' b_f - q_f b_f') sin_jf.

So a query brings D more channels (its coefficients) and a key D more (its cosines and sines), which are the same for
all heads and, between two prune points, for all layers: one float32 table [B, D, slots] per segment instead of anything
per layer and head. The kernel adds one chain over them to each score: D more multiply-adds per score, whatever was
pruned (the table is filled with the positions that are really there, gapped or compact), and equal bits for any batch,
padding, or cut between prefill and decode. Nothing is thresholded: every layer with a key bias goes this way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from quota import ops
from quota.core.formats import KV4
from quota.nn.attention import AttentionTrace, QuantAttention
from quota.nn.cache import Kv4Layer, kv_layer
from quota.nn.kv import Stored
from quota.nn.linear import SchemeLinear, as_dtype_of, as_float32, without_grad
from quota.nn.padding import start_of_mask

_GROWTH_TOKENS = 64


class AngleTable:
    """Cosines and sines of the cached positions, float32 [B, D, slots] (cosines first), shared by the layers of a
    segment; `length` slots are filled."""

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self.length = 0
        self.source: Tensor | None = (
            None  # the cosines appended last: layers that are given the same tensor have the same positions
        )

    def append(self, cos: Tensor, angles: Tensor, at: int) -> None:
        """angles [B, D, T] of the slots from `at` on; a slot another layer of the segment has filled already is left
        alone."""
        tokens = angles.shape[2]
        if self.length == at + tokens:
            return
        if self.length != at:
            raise RuntimeError(f"angles: expected {at} filled slots, found {self.length}")
        self._reserve(angles, at)
        assert self.slots is not None
        self.slots[..., at : at + tokens] = angles
        self.length, self.source = at + tokens, cos

    def _reserve(self, angles: Tensor, at: int) -> None:
        batch, dim, tokens = angles.shape
        capacity = 0 if self.slots is None else self.slots.shape[2]
        if self.slots is not None and at + tokens <= capacity:
            return
        new = angles.new_zeros(
            batch, dim, -(-max(at + tokens, capacity + capacity // 2) // _GROWTH_TOKENS) * _GROWTH_TOKENS
        )
        if self.slots is not None:
            new[..., :at] = self.slots[..., :at]
        self.slots = new

    def crop(self, length: int) -> None:
        self.length, self.source = min(self.length, length), None

    def moved(self, move: Callable[[Tensor], Tensor]) -> AngleTable:
        """A table of its own for a layer whose rows move."""
        new = AngleTable()
        new.slots, new.length = None if self.slots is None else move(self.slots).contiguous(), self.length
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of the filled slots."""
        return 0 if self.slots is None else self.slots[..., : self.length].numel() * self.slots.element_size()


class BiasedKv4Layer(Kv4Layer):
    """A 4-bit layer that knows its positions. Only the layer that made a table counts its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.angles: AngleTable | None = None
        self.owns_angles = False

    def place(self, cos: Tensor, angles: Tensor, neighbour: Any) -> AngleTable:
        """Fill the table for the tokens about to be appended; at the start of a prompt the table of the layer before is
        shared where it fits."""
        self.check_admitted()
        if self.angles is None or self.length == 0:
            near = getattr(neighbour, "angles", None)
            self.owns_angles = near is None or near.source is not cos or near.length != angles.shape[2]
            self.angles = AngleTable() if self.owns_angles else near
        assert self.angles is not None
        self.angles.append(cos, angles, self.length)
        return self.angles

    @property
    def nbytes(self) -> int:
        own = self.angles.nbytes if self.angles is not None and self.owns_angles else 0
        return super().nbytes + own

    def reset(self) -> None:
        super().reset()
        self.angles, self.owns_angles = None, False

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.angles is not None:
            self.angles.crop(self.length)

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        super()._move(move)
        if self.angles is not None:
            self.angles, self.owns_angles = self.angles.moved(move), True


def biased_layer(cache: Cache, index: int) -> BiasedKv4Layer:
    """Layer `index` of `cache` as a 4-bit layer with positions, under the same conditions as `kv_layer`."""
    layer = kv_layer(cache, index)
    if not isinstance(layer, BiasedKv4Layer):
        new = BiasedKv4Layer()
        new.start, new.dropped, new.removed, new.guarded, new.admitted = (
            layer.start,
            layer.dropped,
            layer.removed,
            layer.guarded,
            layer.admitted,
        )
        cache.layers[index] = layer = new
    return layer


def bias_coefficients(q: Tensor, bias: Tensor) -> Tensor:
    """q [B, H, T, D] rotated, bias [Hkv, D] -> [B, H, T, D]: what multiplies the cosines, then the sines, of a key's
    position in q . R_j b."""
    b_1, b_2 = bias.repeat_interleave(q.shape[1] // bias.shape[0], 0)[:, None].chunk(2, -1)
    q_1, q_2 = q.chunk(2, -1)
    return torch.cat([q_1 * b_1 + q_2 * b_2, q_2 * b_1 - q_1 * b_2], -1)


def key_angles(cos: Tensor, sin: Tensor) -> Tensor:
    """cos, sin [B, T, D] of positions -> [B, D, T]: what `bias_coefficients` are multiplied by."""
    half = cos.shape[-1] // 2
    return torch.cat([cos[..., :half], sin[..., :half]], -1).transpose(1, 2)


def wide_keys(keys: Tensor, angles: Tensor) -> Tensor:
    """keys [B, Hkv, S, D], angles [B, D, S] -> [B, Hkv, S, 2 D]: keys whose dot product with a wide query is the whole
    score."""
    return torch.cat([keys, angles[:, None].transpose(-1, -2).expand(-1, keys.shape[1], -1, -1)], -1)


class QuantBiasedAttention(QuantAttention):
    """As QuantAttention, with `k_bias` [Hkv, D] float32 kept apart; the k rows of `qkv_proj.bias` are zero."""

    k_bias: Tensor

    def __init__(self, qkv_proj: SchemeLinear, o_proj: SchemeLinear, **sizes: Any) -> None:
        super().__init__(qkv_proj, o_proj, **sizes)
        if self.kv.form != KV4:
            raise ValueError(f"scheme {self.scheme.name}: a key bias is kept apart from 4-bit keys alone")
        self.register_buffer(
            "k_bias", torch.zeros(self.kv_heads, self.head_dim, dtype=torch.float32, device=self.k_clip.device)
        )

    @without_grad
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        quota_trace: AttentionTrace | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As QuantAttention.forward; position_embeddings are required."""
        assert position_embeddings is not None
        batch, tokens, _ = hidden_states.shape
        cos, sin = as_float32(position_embeddings[0]), as_float32(position_embeddings[1])
        qkv = self.qkv_proj(as_float32(hidden_states))
        cache = BiasedKv4Layer() if past_key_values is None else biased_layer(past_key_values, self.layer_idx)
        if attention_mask is not None and (cache.length == 0 or tokens > 1):
            found = start_of_mask(attention_mask, batch)
            cache.start = found if bool(found.any()) else None
        angles = key_angles(cos, sin).expand(batch, -1, -1)
        neighbour = (
            past_key_values.layers[self.layer_idx - 1] if past_key_values is not None and self.layer_idx else None
        )
        table = cache.place(position_embeddings[0], angles, neighbour)
        position = cache.grow(batch, self.kv_heads, tokens, self.head_dim, qkv)
        wide = self.append(qkv, (cos, sin), cache.key, cache.value, position)
        out, lse = ops.kv4_attention(wide, cache.key, cache.value, cache.length, cache.start, self.scaling, table.slots)
        if quota_trace is not None:
            assert table.slots is not None
            quota_trace.q, quota_trace.k = wide, wide_keys(cache.dequantize_keys(), table.slots[..., : cache.length])
            quota_trace.lse, quota_trace.scaling = lse, self.scaling
        return as_dtype_of(self.o_proj(out.view(batch, tokens, -1)), hidden_states), None

    def append(
        self, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None, keys: Stored, values: Stored, position: int
    ) -> Tensor:
        """As QuantAttention.append; q is [B, H, T, 2 D]: rotated and transformed, then the coefficients of the key
        angles."""
        # the coefficients need q as the rotary embedding left it
        q_factor, k_factor = self.factors
        q = ops.qkv_append(qkv, rotary, (None, k_factor), keys, values, position, self.clips)
        return torch.cat([_transform(q, q_factor), bias_coefficients(q, self.k_bias)], -1)


def _transform(x: Tensor, factor: ops.Factor | None) -> Tensor:
    if factor is None:
        return x
    return ops.transform(x.reshape(-1, x.shape[-1]).contiguous(), None, factor).view(x.shape)
