"""The quota score: equations (6) to (9), on what the deployed layer computed anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quota import ops
from quota.core.formats import INT4, scheme_of
from quota.nn.attention import AttentionTrace
from quota.nn.linear import row_norm
from quota.prune.attention import filled
from quota.quant.affine import dequantize_symmetric, quantize_symmetric

if TYPE_CHECKING:
    from quota.core.selection import Percentiles, ScoreWeights

_EPS = 1e-12


def token_signals(
    trace: AttentionTrace, hidden: Tensor, layer: Any, visual: Tensor, text: Tensor, quant: bool
) -> dict[str, Tensor]:
    """Equation (6), float32 [B, S] each, 0 where not visual: inter, intra, mag and, if asked, quant.

    trace: attention of the layer before; hidden [B, S, hidden]: input of `layer`; visual, text [B, S] bool.
    """
    q, k, lse = filled(trace)
    inter, intra = ops.token_score(q, k, lse, text, visual, trace.scaling)
    tokens = hidden[visual]
    signals = {"inter": inter, "intra": intra, "mag": _spread(row_norm(tokens), visual)}
    if quant:
        signals["quant"] = _spread(quant_risk(layer, tokens), visual)
    return signals


def quant_risk(layer: Any, tokens: Tensor) -> Tensor:
    """tokens [M, hidden] at the input of decoder layer `layer` -> [M] float32: error of the activation quantizer its
    attention deploys.

    A float layer is asked what per-token int4 rounding would cost it.
    """
    x = layer.input_layernorm(tokens)
    if scheme_of(layer.self_attn).activations is not None:
        return layer.self_attn.qkv_proj.quant_risk(x)
    q, scale = quantize_symmetric(x.float(), form=INT4)
    return row_norm(x.float() - dequantize_symmetric(q, scale))


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    out = values.new_zeros(mask.shape)
    out[mask] = values
    return out


def robust_scale(values: Tensor, percentiles: Percentiles) -> Tensor:
    """Equation (7) on the tokens of one row: float [n] -> float64 [n] in 0..1, percentiles interpolated linearly."""
    x = values.double()
    low, high = torch.quantile(
        x, torch.tensor([percentiles.low / 100, percentiles.high / 100], dtype=torch.float64, device=x.device)
    )
    return ((x - low) / (high - low + _EPS)).clamp(0, 1)


def combine(signals: Mapping[str, Tensor], visual: Tensor, weights: ScoreWeights, percentiles: Percentiles) -> Tensor:
    """Equation (8): signals and visual [B, S] -> score [B, S] float32, 0 where not visual. Each row is scaled on its
    own."""
    score = torch.zeros(visual.shape, dtype=torch.float64, device=visual.device)
    for row, mask in enumerate(visual):
        if bool(mask.any()):
            for name in ("inter", "mag", "intra", "quant"):
                weight = getattr(weights, name)
                if weight and name in signals:
                    score[row, mask] += weight * robust_scale(signals[name][row, mask], percentiles)
    return score.float()
