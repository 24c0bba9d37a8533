from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quota.ops import native, token_gather, token_select
from quota.ops.token_score import token_score_ref
from tests.ops.kv import cache


def case(b: int, h: int, hkv: int, s: int, d: int) -> tuple:
    g = torch.Generator().manual_seed(s)
    q, k = torch.randn(b, h, s, d, generator=g), torch.randn(b, hkv, s, d, generator=g)
    scores = q @ k.repeat_interleave(h // hkv, 1).transpose(-1, -2) * d**-0.5
    lse = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), -float("inf")).logsumexp(-1)
    visual, text = torch.zeros(b, s, dtype=torch.bool), torch.zeros(b, s, dtype=torch.bool)
    visual[:, 2 : s - 6] = True
    visual[:, s // 2] = False
    text[:, s - 6 :] = True
    if b > 1:
        visual[1], text[1] = False, True  # a row without a picture
    return q, k, lse, text, visual, d**-0.5


@pytest.mark.parametrize("shape", [(1, 1, 1, 9, 2), (2, 4, 2, 40, 16), (3, 3, 3, 150, 20)])
def test_scores_are_close_to_the_float64_reference(isa: str, shape: tuple[int, ...]) -> None:
    args = case(*shape)
    for got, want in zip(native.token_score(*args), token_score_ref(*args), strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max() and not got[~args[4]].any()


@pytest.mark.parametrize("shape", [(1, 1, 1, 9, 2), (2, 4, 2, 40, 16), (3, 3, 3, 150, 20), (1, 2, 1, 150, 130)])
def test_scores_of_packed_keys_are_close_to_the_float64_reference(isa: str, shape: tuple[int, ...]) -> None:
    q, k, lse, *rest = case(*shape)
    packed = cache(k, shape[3])
    for got, want in zip(native.token_score(q, packed, lse, *rest), token_score_ref(q, packed, lse, *rest), strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max() and not got[~rest[1]].any()


@pytest.mark.parametrize("packed", [False, True])
def test_scores_do_not_depend_on_batch_threads_or_instruction_set(threads: Callable[[int], None], packed: bool) -> None:
    args = list(case(3, 4, 2, 140, 18))
    if packed:
        args[1] = cache(args[1], 140)
    results = []
    for name in native.supported_isas() or pytest.skip("the native library is not built"):
        native.set_isa(name)
        for n in (1, 3):
            threads(n)
            results.append(native.token_score(*args))
    alone = [native.token_score(*(_row(x, i) for x in args[:5]), args[5]) for i in range(3)]
    results.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
    native.set_isa(None)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def _row(x: torch.Tensor | tuple, i: int) -> torch.Tensor | tuple:
    return x[i : i + 1] if isinstance(x, torch.Tensor) else tuple(t[i : i + 1] for t in x)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30), st.integers(0, 35))
def test_select_keeps_the_largest_and_breaks_ties_low(tokens: list[tuple[int, bool]], keep: int) -> None:
    score = torch.tensor([[float(s) for s, _ in tokens]])
    eligible = torch.tensor([[e for _, e in tokens]])
    mask = token_select(score, eligible, torch.tensor([keep]))
    order = sorted((i for i, (_, e) in enumerate(tokens) if e), key=lambda i: (-tokens[i][0], i))
    assert mask[0].nonzero()[:, 0].tolist() == sorted(order[:keep])


def test_gather_takes_rows_in_order() -> None:
    x = torch.arange(24.0).view(2, 4, 3)
    index = torch.tensor([[0, 3], [2, 2]])
    assert torch.equal(token_gather(x, index), torch.stack((x[0, [0, 3]], x[1, [2, 2]])))
    assert torch.equal(token_gather(x[..., 0], index), torch.stack((x[0, [0, 3], 0], x[1, [2, 2], 0])))
