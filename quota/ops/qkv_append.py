"""`qkv_append`: rotary embedding, head transforms and cache writes between the q/k/v projection and attention."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op
from quota.ops import cuda, native, triton
from quota.ops.kv4_append import kv4_append_ref
from quota.ops.transform import transform_ref
from quota.ops.weights import Factor, Kv


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D]; cos, sin [B or 1, T, D] -> rotated x, as LLaMA pairs channels (i, i + D/2)."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    out = x * cos
    out[..., :half] -= high * sin[..., :half]
    out[..., half:] += low * sin[..., half:]
    return out


def qkv_append_ref(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    transforms: tuple[Factor | None, Factor | None],
    k: Kv,
    v: Kv,
    position: int,
    clips: tuple[float, float],
) -> Tensor:
    """qkv float32 [B, T, (H + 2 Hkv) D] -> q float32 [B, H, T, D]; writes slots position .. position+T of the caches k
    and v, in place.

    rotary: cos, sin float32 [B or 1, T, D] for the heads of q and k; transforms: of q and of k, of size D or None,
    after the rotary embedding; k, v as in `kv4_append` (Hkv and D are theirs); clips: of k and of v. Exactness: equal
    bits everywhere; it is `transform` and `kv4_append` of the rotated heads, and rotating is two products and one sum.
    """
    batch, tokens, _ = qkv.shape
    kv_heads, d = k[0].shape[1], 2 * k[0].shape[3]
    heads = qkv.view(batch, tokens, qkv.shape[2] // d, d).transpose(1, 2)
    parts = list(heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1))
    for i, matrix in enumerate(transforms):
        part = parts[i] if rotary is None else apply_rotary(parts[i], *rotary)
        parts[i] = transform_ref(part.reshape(-1, d), None, matrix).view(part.shape)
    kv4_append_ref(*k, parts[1], position, clips[0])
    kv4_append_ref(*v, parts[2], position, clips[1])
    return parts[0].contiguous()


qkv_append = Op(qkv_append_ref, cuda, native, triton)  # the first that supports the device
