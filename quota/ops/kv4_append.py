"""`kv4_append`: quantize new keys or values to 4 bits and write them into the cache."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op
from quota.ops import cuda, native, triton
from quota.quant.affine import quantize_kv
from quota.quant.pack import pack_uint4


def kv4_append_ref(
    cache_q: Tensor, cache_scale: Tensor, cache_zero: Tensor, x: Tensor, position: int, clip: float
) -> None:
    """Writes slots position .. position+T of a cache, in place.

    cache_q uint8 [B, Hkv, C, D/2], cache_scale and cache_zero float32 [B, Hkv, C], x float32 [B, Hkv, T, D], clip in
    (0, 1]. One (scale, zero) per token and head: low = min * clip, scale = (max * clip - low) / 15, x ~ q * scale +
    low. Exactness: equal bits everywhere.
    """
    t = x.shape[2]
    if position + t > cache_q.shape[2]:
        raise ValueError(
            f"kv4_append: expected room for slots {position}..{position + t}, the cache holds {cache_q.shape[2]}"
        )
    q, scale, zero = quantize_kv(x, clip)
    cache_q[:, :, position : position + t] = pack_uint4(q)
    cache_scale[:, :, position : position + t] = scale
    cache_zero[:, :, position : position + t] = zero


kv4_append = Op(kv4_append_ref, cuda, native, triton)  # the first that supports the device
