"""Causal attention of a quantized model over the cache its scheme stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from quota import ops
from quota.core.formats import KV4
from quota.nn.cache import LAYERS, KvLayer, kv_layer
from quota.nn.kv import KINDS, Stored, kv_kind
from quota.nn.linear import Float32State, SchemeLinear, as_dtype_of, as_float32, without_grad
from quota.nn.norm import RmsNorm
from quota.nn.padding import prefix_end, start_of_mask


@dataclass
class AttentionTrace:
    """What one attention leaves for scoring tokens, as deployed: q [B, H, T, D] and lse [B, H, T] float32, and k [B,
    Hkv, T, D] float32 or its T packed slots of the cache."""

    q: Tensor | None = None
    k: Tensor | ops.Kv | None = None
    lse: Tensor | None = None
    scaling: float = 1.0

    def float_keys(self) -> Tensor:
        """k as float32 [B, Hkv, T, D]; call it on a filled record."""
        assert self.k is not None
        return self.k if isinstance(self.k, Tensor) else KINDS[KV4].floats(self.k)

    def first(self, tokens: int) -> AttentionTrace:
        """The trace of the first `tokens`: by causality the one they have without the others. For a filled record."""
        if self.q is None or self.k is None or self.lse is None or self.q.shape[2] == tokens:
            return self
        k = self.k[:, :, :tokens] if isinstance(self.k, Tensor) else tuple(t[:, :, :tokens] for t in self.k)
        return AttentionTrace(self.q[:, :, :tokens].contiguous(), k, self.lse[:, :, :tokens].contiguous(), self.scaling)  # type: ignore[arg-type]


def seeing_all(attend: Callable[[Tensor], tuple[Tensor, Tensor]], q: Tensor) -> tuple[Tensor, Tensor]:
    """What queries q [B, H, T, D] find that see every slot alike -> (out float32 [B, T, H, D], lse [B, H, T]). attend:
    attention over these slots, of one query in as many heads: T queries of a head share its keys as T heads do."""
    b, h, t, d = q.shape
    out, lse = attend(q.reshape(b, h * t, 1, d))
    return out.view(b, h, t, -1).transpose(1, 2), lse.view(b, h, t)


class QuantAttention(Float32State):
    """Causal attention over a cache of the scheme's format; prefill reads the same stored keys and values that decode
    will read.

    `qkv_proj` holds the rows of q, k, v. `q_transform` and `k_transform` [D, D] (each may be absent) act on rows of D
    after the rotary
    embedding and are inverse-transposes of each other. `o_proj` has a [H, H] left factor; the right one is merged into
    the v rows. `q_norm` and `k_norm` (both or none) normalise each head before the rotary embedding. prefix: the tokens
    of a prompt see all of it (`Family.prefix`), not only what is before them.
    """

    q_transform: Tensor | None
    k_transform: Tensor | None
    k_clip: Tensor
    v_clip: Tensor
    prefix = False

    def __init__(
        self,
        qkv_proj: SchemeLinear,
        o_proj: SchemeLinear,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        layer_idx: int,
        transforms: tuple[bool, bool] = (True, True),
        norms: Sequence[RmsNorm] = (),
    ) -> None:
        super().__init__()
        self.scheme = qkv_proj.scheme
        try:
            self.kv = kv_kind(self.scheme.kv)
        except ValueError as error:
            raise ValueError(f"scheme {self.scheme.name}: {error}") from None
        self.heads, self.kv_heads, self.head_dim, self.layer_idx = heads, kv_heads, head_dim, layer_idx
        self.scaling = head_dim**-0.5
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self.q_norm: RmsNorm | None
        self.k_norm: RmsNorm | None
        self.q_norm, self.k_norm = norms or (None, None)
        float32: Any = {"dtype": torch.float32, "device": next(qkv_proj.buffers()).device}
        for name, present in zip(("q_transform", "k_transform"), transforms, strict=True):
            self.register_buffer(name, torch.zeros(head_dim, head_dim, **float32) if present else None)
        self.register_buffer("k_clip", torch.ones((), **float32))
        self.register_buffer("v_clip", torch.ones((), **float32))
        self.forget()

    def forget(self) -> None:
        self._clips: tuple[float, float] | None = None
        self._factors: tuple[ops.Factor | None, ops.Factor | None] | None = None

    @property
    def factors(self) -> tuple[ops.Factor | None, ops.Factor | None]:
        """`q_transform` and `k_transform` in fixed point, made at first use."""
        if self._factors is None:
            self._factors = ops.factor_of(self.q_transform), ops.factor_of(self.k_transform)
        return self._factors

    @property
    def clips(self) -> tuple[float, float]:
        """(k_clip, v_clip) as floats, read from the device once."""
        if self._clips is None:
            self._clips = float(self.k_clip), float(self.v_clip)
        return self._clips

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
        """hidden_states [B, T, hidden]; position_embeddings cos, sin [B or 1, T, D]; attention_mask as transformers
        makes it, or [B, S] bool, or None (no padding, or the rows the cache layer remembers) -> (output, None)."""
        batch, tokens, _ = hidden_states.shape
        qkv = self.qkv_proj(as_float32(hidden_states))
        cache = self.cache_layer(past_key_values)
        if attention_mask is not None and (cache.length == 0 or tokens > 1):
            found = start_of_mask(attention_mask, batch)
            cache.start = found if bool(found.any()) else None
        rotary = (
            None
            if position_embeddings is None
            else (as_float32(position_embeddings[0]), as_float32(position_embeddings[1]))
        )
        position = cache.grow(batch, self.kv_heads, tokens, self.head_dim, qkv)
        q = self.append(qkv, rotary, cache.key, cache.value, position)
        whole = prefix_end(attention_mask, tokens) if self.prefix and not position else 0
        out, lse = self._attend(q, cache, whole)
        if quota_trace is not None:
            quota_trace.q, quota_trace.k, quota_trace.lse, quota_trace.scaling = (
                q,
                self.kv.scored(cache.filled_key),
                lse,
                self.scaling,
            )
        return as_dtype_of(self.o_proj(out.reshape(batch, tokens, -1)), hidden_states), None

    def _attend(self, q: Tensor, cache: KvLayer, whole: int) -> tuple[Tensor, Tensor]:
        """q as `append` gives it for the last tokens of the cache, of which the first `whole` see each other -> out
        float32 [B, T, H, D], lse [B, H, T]."""

        def attend(q: Tensor, length: int) -> tuple[Tensor, Tensor]:
            return self.kv.attend(q, cache.key, cache.value, length, cache.start, self.scaling)

        if not whole:
            return attend(q, cache.length)
        first = seeing_all(lambda one: attend(one, whole), q[:, :, :whole])
        if whole == q.shape[2]:
            return first
        rest = attend(q[:, :, whole:], cache.length)
        return torch.cat([first[0], rest[0]], 1), torch.cat([first[1], rest[1]], 2)

    def cache_layer(self, cache: Cache | None) -> KvLayer:
        """This layer's place in a cache; a new one where there is none."""
        return LAYERS[self.kv]() if cache is None else kv_layer(cache, self.layer_idx, self.kv)

    def append(
        self, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None, keys: Stored, values: Stored, position: int
    ) -> Tensor:
        """qkv [B, T, (H + 2 Hkv) D] float32; rotary cos, sin [B or 1, T, D] float32 -> q [B, H, T, ...] as
        attention takes it. Keys and values go into slots position .. position + T of the caches, in place."""
        if self.q_norm is not None and self.k_norm is not None:
            qkv = self._normalised(qkv, self.q_norm, self.k_norm)
        return self.kv.append(qkv, rotary, self.factors, keys, values, position, self.clips)

    def _normalised(self, qkv: Tensor, q_norm: RmsNorm, k_norm: RmsNorm) -> Tensor:
        """qkv as `append` takes it, the heads of q and k normalised."""
        q, k, v = qkv.split([self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2], -1)
        normed = [norm(part.reshape(-1, self.head_dim)).view(part.shape) for norm, part in ((q_norm, q), (k_norm, k))]
        return torch.cat([*normed, v], -1)
