"""`kv4_attention`: causal attention over packed 4-bit keys and values, prefill and decode, without replicating KV
heads."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.registry import Op
from quota.ops import cuda, native, triton
from quota.ops.weights import Kv
from quota.quant.affine import dequantize_kv
from quota.quant.pack import unpack_uint4


def dequantized(kv: Kv, length: int, d: int) -> Tensor:
    """The first `length` slots as float32 [B, Hkv, length, D]."""
    q, scale, zero = (t[:, :, :length] for t in kv)
    return dequantize_kv(unpack_uint4(q, d), scale, zero)


def kv4_attention_ref(
    q: Tensor, k: Kv, v: Kv, length: int, start: Tensor | None, scaling: float, shared: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q float32 [B, H, T, D] for the last T of `length` slots, start int32 [B] (first real slot; None: 0) -> (out
    float32 [B, T, H, D], lse [B, H, T]).

    shared float32 [B, E, C >= length]: more key channels, not quantized and common to all heads; q is then [B, H, T, D
    + E].

    Query t sees slots start[b] .. length - T + t; head h reads KV head h // (H / Hkv). Rows that see nothing give out
    0, lse -inf. Exactness: float stage, compared by relative RMS; an implementation's bits must not depend on T, B,
    left padding or threads. The native one takes q and, in blocks of 64 slots from `start`, the weights of the values
    as 24-bit fixed point, so that all its dot products are exact integers (csrc/cpu/kv4_attention.h); the shared
    channels are one chain of fused multiply-adds, added to the score of the packed ones. The Triton kernels do the same
    and give the same `out`; their `lse` differs by the rounding of the logarithm.
    """
    d, heads = 2 * k[0].shape[-1], q.shape[1]
    keys, values = (dequantized(kv, length, d) for kv in (k, v))
    if shared is not None:
        wide = shared[:, None, :, :length].transpose(-1, -2).expand(-1, heads, -1, -1)
        keys = torch.cat([keys.repeat_interleave(heads // keys.shape[1], 1), wide], -1)
    return exact_attention(q, keys, values, start, scaling)


def exact_attention(
    q: Tensor, keys: Tensor, values: Tensor, start: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """What `kv4_attention` says of q, with float keys and values [B, some heads, length, ...], in float64."""
    b, h, t, _ = q.shape
    length = keys.shape[2]
    first = torch.zeros(b, dtype=torch.int32, device=q.device) if start is None else start
    keys, values = (x.double().repeat_interleave(h // x.shape[1], 1) for x in (keys, values))
    score = q.double() @ keys.transpose(-1, -2) * scaling
    slot = torch.arange(length, device=q.device)
    seen = (slot[None, None, :] >= first[:, None, None]) & (slot[None, None, :] <= slot[length - t :][None, :, None])
    score = score.masked_fill(~seen[:, None], float("-inf"))
    lse = score.logsumexp(-1)
    p = torch.exp(score - lse.masked_fill(lse.isinf(), 0)[..., None])
    return (p @ values).transpose(1, 2).float().contiguous(), lse.float()


kv4_attention = Op(kv4_attention_ref, cuda, native, triton)  # the first that supports the device
