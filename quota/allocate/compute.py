"""Equations (10) to (13): multiply-accumulates of a pruned forward pass, its ratio to the unpruned one, and KV bytes.

Counts are multiply-accumulates of one prefill, whatever the bit width; they are not a speed-up.

Of the published ratios, those of schedules with fixed layers and ratios follow from these equations on visual tokens
alone (FastV, PyramidDrop, VTW, everything before the language model; `tests/allocate/test_compute.py` has the figures).
QUOTA's own 40.89 % and 55.80 % do not: they depend on sensitivities that were not published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quota.core.formats import KV4, Format


@dataclass(frozen=True)
class DecoderSizes:
    """What the cost of one decoder layer depends on."""

    layers: int
    hidden_size: int  # d
    kv_size: int  # d_kv = key/value heads x head dimension; d without grouped queries
    intermediate_size: int  # m


@dataclass(frozen=True)
class Cost:
    """Cost of a plan for one prompt. Ratios are pruned / unpruned."""

    average_visual_tokens: float
    final_visual_tokens: int
    macs: int
    ratio: float  # vision tower, projector and language model, text included
    ratio_language: float  # language model only, text included
    ratio_visual: float  # language model only, visual tokens alone
    kv_bytes: int  # 4-bit cache, text included
    kv_bytes_unpruned: int
    kv_bytes_float16: int  # the unpruned cache in float16


def layer_macs(n: int, sizes: DecoderSizes) -> int:
    """F_layer(n) = 2 n d^2 + 2 n d d_kv + 2 n^2 d + 3 n d m, n the executed length."""
    d = sizes.hidden_size
    return 2 * n * d * d + 2 * n * d * sizes.kv_size + 2 * n * n * d + 3 * n * d * sizes.intermediate_size


def language_macs(visual_tokens: Sequence[int], text_tokens: int, sizes: DecoderSizes) -> int:
    """Sum of F_layer(V_l + T_text) over the decoder layers."""
    if len(visual_tokens) != sizes.layers:
        raise ValueError(
            f"visual_tokens: expected one entry per decoder layer ({sizes.layers}), got {len(visual_tokens)}"
        )
    return sum(layer_macs(v + text_tokens, sizes) for v in visual_tokens)


def decoder_sizes(config: Any) -> DecoderSizes:
    """Sizes of the language model in a vision-language configuration."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DecoderSizes(
        text.num_hidden_layers, text.hidden_size, text.num_key_value_heads * head_dim, text.intermediate_size
    )


def kv_token_bytes(kv_size: int, head_dim: int, form: Format | None = KV4) -> int:
    """Bytes one token takes in one layer's K and V: of a format, or float16 (None)."""
    return 2 * (2 * kv_size if form is None else kv_size // head_dim * form.vector_bytes(head_dim))


def cost(
    visual_tokens: Sequence[int],
    unpruned: int,
    text_tokens: int,
    sizes: DecoderSizes,
    tower_macs: int = 0,
    head_dim: int = 64,
) -> Cost:
    """Cost of a prompt with `unpruned` visual tokens of which `visual_tokens[l]` are alive inside layer l, and
    `text_tokens` of text."""
    full = [unpruned] * sizes.layers
    pruned, whole = language_macs(visual_tokens, text_tokens, sizes), language_macs(full, text_tokens, sizes)
    alone, alone_whole = language_macs(visual_tokens, 0, sizes), language_macs(full, 0, sizes)
    cached, cached_full = (sum(v + text_tokens for v in tokens) for tokens in (visual_tokens, full))
    low, high = kv_token_bytes(sizes.kv_size, head_dim), kv_token_bytes(sizes.kv_size, head_dim, None)
    return Cost(
        average_visual_tokens=sum(visual_tokens) / sizes.layers,
        final_visual_tokens=visual_tokens[-1],
        macs=tower_macs + pruned,
        ratio=(tower_macs + pruned) / max(1, tower_macs + whole),
        ratio_language=pruned / max(1, whole),
        ratio_visual=alone / max(1, alone_whole),
        kv_bytes=cached * low,
        kv_bytes_unpruned=cached_full * low,
        kv_bytes_float16=cached_full * high,
    )
