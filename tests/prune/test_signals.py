from __future__ import annotations

import numpy as np
import pytest
import torch

from quota.core.errors import UsageError
from quota.core.recipe import Percentiles, ScoreWeights
from quota.nn.attention import AttentionTrace
from quota.nn.padding import real_columns, row_start, start_of_mask
from quota.prune.attention import text_queries
from quota.prune.recording import causal_lse
from quota.prune.signals import combine, robust_scale, token_signals


def test_text_queries():
    visual = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    valid = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    want = [[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1]]
    assert text_queries(visual, valid).int().tolist() == want


def test_robust_scale_is_numpy_percentile():
    x = torch.randn(37, generator=torch.Generator().manual_seed(0))
    low, high = np.percentile(x.double().numpy(), [5, 95])
    np.testing.assert_allclose(
        robust_scale(x, Percentiles()).numpy(),
        np.clip((x.double().numpy() - low) / (high - low + 1e-12), 0, 1),
        rtol=1e-9,
    )
    assert robust_scale(torch.ones(4), Percentiles()).tolist() == [0, 0, 0, 0]
    assert robust_scale(torch.ones(1), Percentiles()).tolist() == [0]


def test_combination_is_the_weighted_sum_per_row():
    generator = torch.Generator().manual_seed(1)
    signals = {name: torch.rand(2, 9, generator=generator) for name in ("inter", "mag", "intra", "quant")}
    visual = torch.zeros(2, 9, dtype=torch.bool)
    visual[0, 2:8] = True
    score = combine(signals, visual, ScoreWeights(), Percentiles())
    want = sum(
        w * robust_scale(signals[n][0, 2:8], Percentiles())
        for n, w in (("inter", 0.45), ("mag", 0.25), ("intra", 0.10), ("quant", 0.20))
    )
    torch.testing.assert_close(score[0, 2:8], want.float())
    assert float(score[~visual].abs().sum()) == 0
    other = combine({n: s[:1] for n, s in signals.items()}, visual[:1], ScoreWeights(), Percentiles())
    assert torch.equal(other[0], score[0])


def test_unrecorded_attention_is_an_error():
    with pytest.raises(UsageError, match="recorded nothing"):
        token_signals(
            AttentionTrace(), torch.zeros(1, 2, 4), None, torch.ones(1, 2).bool(), torch.ones(1, 2).bool(), quant=False
        )


def test_causal_lse():
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 4, 6, 8, generator=generator), torch.randn(2, 2, 6, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    got = causal_lse(q, k, mask, 0.3)
    for b, h, t in ((0, 0, 0), (0, 3, 5), (1, 2, 4), (1, 1, 2)):
        first = 0 if b == 0 else 2
        want = (0.3 * (k[b, h // 2, first : t + 1] @ q[b, h, t])).logsumexp(0)
        torch.testing.assert_close(got[b, h, t], want)
    assert bool(got[1, :, :2].isneginf().all())


def test_padding():
    assert row_start(torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]])).tolist() == [1, 0, 3]
    assert real_columns(torch.tensor([1, 0]), 3).int().tolist() == [[0, 1, 1], [1, 1, 1]]
    for holes in ([[1, 1, 0]], [[1, 0, 1]]):
        with pytest.raises(UsageError, match="padding_side"):
            row_start(torch.tensor(holes))
    causal = torch.ones(4, 4).tril().bool()[None, None]
    assert start_of_mask(causal, 3).tolist() == [0, 0, 0]
    additive = torch.zeros(2, 1, 1, 5)
    additive[1, ..., :2] = torch.finfo(torch.float32).min
    assert start_of_mask(additive, 2).tolist() == [0, 2]
    with pytest.raises(UsageError, match="sdpa"):
        start_of_mask({}, 1)
