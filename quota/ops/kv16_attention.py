"""`kv16_attention`: causal attention over float16 keys and values, prefill and decode, in an order of sums that depends
on the row alone."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.kv4_attention import exact_attention


def kv16_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, length: int, start: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """q float32 [B, H, T, D] for the last T of `length` slots; k, v float16 [B, Hkv, C >= length, D]; start int32 [B]
    (first real slot; None: 0) -> (out float32 [B, T, H, D], lse [B, H, T]).

    Query t sees slots start[b] .. length - T + t; head h reads KV head h // (H / Hkv). Rows that see nothing give out
    0, lse -inf. Exactness: float stage, compared by relative RMS; an implementation's bits must not depend on T, B,
    left padding or threads. The native one, on every instruction set, and the Triton kernel take blocks of 64 slots
    from `start` (csrc/cpu/kv16_attention.h): scores and weighted values are ascending chains of fused multiply-adds.
    They give the same `out`; their `lse` differs by the rounding of the logarithm.
    """
    return exact_attention(q, k[:, :, :length], v[:, :, :length], start, scaling)


kv16_attention = Op(kv16_attention_ref, native, triton)  # the first that supports the device
