"""Which visual tokens matter: equations (6) to (9), and published attention scores, on what the deployed layer computed
anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quota import ops
from quota.core.errors import UsageError
from quota.core.formats import INT4, scheme_of
from quota.nn.attention import AttentionTrace
from quota.nn.linear import row_norm
from quota.quant.affine import dequantize_symmetric, quantize_symmetric

if TYPE_CHECKING:
    from quota.core.recipe import Percentiles, ScoreWeights

_EPS = 1e-12
_ROWS_AT_ONCE = 128


def text_queries(visual: Tensor, valid: Tensor) -> Tensor:
    """visual, valid [B, S] bool -> [B, S] bool: real tokens after the row's last visual token; its last token where
    there are none."""
    column = torch.arange(visual.shape[1], device=visual.device)
    last_visual = torch.where(visual, column, -1).amax(-1, keepdim=True)
    text = valid & (column > last_visual)
    none = ~text.any(-1, keepdim=True)
    return text | (none & valid & (column == visual.shape[1] - 1))


def token_signals(
    trace: AttentionTrace, hidden: Tensor, layer: Any, visual: Tensor, text: Tensor, quant: bool
) -> dict[str, Tensor]:
    """Equation (6), float32 [B, S] each, 0 where not visual: inter, intra, mag and, if asked, quant.

    record: attention of the layer before; hidden [B, S, hidden]: input of `layer`; visual, text [B, S] bool.
    """
    q, k, lse = _filled(trace)
    inter, intra = ops.token_score(q, k, lse, text, visual, trace.scaling)
    tokens = hidden[visual]
    signals = {"inter": inter, "intra": intra, "mag": _spread(row_norm(tokens), visual)}
    if quant:
        signals["quant"] = _spread(quant_risk(layer, tokens), visual)
    return signals


def _filled(trace: AttentionTrace) -> tuple[Tensor, Tensor | ops.Kv, Tensor]:
    if trace.q is None or trace.k is None or trace.lse is None:
        raise UsageError(
            "attention: the layer before a pruning layer recorded nothing; it was replaced after the recipe was"
            " installed"
        )
    return trace.q, trace.k, trace.lse


def text_attention(trace: AttentionTrace, visual: Tensor, text: Tensor) -> Tensor:
    """Attention of the text queries to each visual token, mean over heads and queries: float32 [B, S], 0 where not
    visual."""
    return _column_mean(trace, visual, text, torch.mean)


def last_token_attention(trace: AttentionTrace, visual: Tensor) -> Tensor:
    """The same for the last token of each row: what FastV's and PyramidDrop's code rank by."""
    last = torch.zeros_like(visual)
    last[:, -1] = True
    return _column_mean(trace, visual, last, torch.mean)


def cross_self(trace: AttentionTrace, visual: Tensor, text: Tensor) -> Tensor:
    """FitPrune: of the largest head, mean attention from text queries times mean attention from visual queries. float32
    [B, S]."""
    return head_max_attention(trace, visual, text) * head_max_attention(trace, visual, visual)


def head_max_attention(trace: AttentionTrace, visual: Tensor, queries: Tensor) -> Tensor:
    """Attention of the largest head, mean over `queries` [B, S]: float32 [B, S], 0 where not visual."""
    return _column_mean(trace, visual, queries, torch.amax)


def _column_mean(trace: AttentionTrace, visual: Tensor, queries: Tensor, over_heads: Callable[..., Tensor]) -> Tensor:
    """queries [B, S]: whose attention. Softmax rows in float64, rounded once, so that the order of summation cannot
    show."""
    (q, _, lse), k = _filled(trace), trace.float_keys()
    out = q.new_zeros(visual.shape)
    for row in range(len(visual)):
        columns, asking = visual[row].nonzero()[:, 0], queries[row].nonzero()[:, 0]
        if not len(columns) or not len(asking):
            continue
        keys = k[row, :, columns].double().repeat_interleave(q.shape[1] // k.shape[1], 0)
        total = torch.zeros(len(columns), dtype=torch.float64, device=q.device)
        for block in asking.split(_ROWS_AT_ONCE):
            p = torch.exp(
                q[row, :, block].double() @ keys.transpose(-1, -2) * trace.scaling - lse[row, :, block, None].double()
            )
            total += over_heads(p * (columns[None, :] <= block[:, None]), 0).sum(0)
        out[row, columns] = (total / len(asking)).float()
    return out


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
