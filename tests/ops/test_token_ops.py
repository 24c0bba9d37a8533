import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quota.ops import native
from quota.ops.token_gather import token_gather_ref
from quota.ops.token_score import token_score_ref
from quota.ops.token_select import token_select_ref
from tests.ops.kv import cache

IMPLEMENTATIONS = ["ref", "native"]


def implementation(name: str, reference: Callable, own: Callable) -> Callable:
    if name == "native" and native.why_not():
        pytest.skip("the native library is not built")
    return own if name == "native" else reference


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
    for got, want in zip(
        native.token_score(q, packed, lse, *rest), token_score_ref(q, packed, lse, *rest), strict=True
    ):
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


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, 2.0, -math.inf, math.inf, math.nan, -0.0]), st.booleans()),
        min_size=1,
        max_size=30,
    ),
    st.integers(0, 35),
)
def test_select_keeps_the_largest_and_breaks_ties_low(name: str, tokens: list[tuple[float, bool]], keep: int) -> None:
    select = implementation(name, token_select_ref, native.token_select)
    mask = select(torch.tensor([[s for s, _ in tokens]]), torch.tensor([[e for _, e in tokens]]), torch.tensor([keep]))
    order = sorted(
        (i for i, (_, e) in enumerate(tokens) if e), key=lambda i: (not math.isnan(tokens[i][0]), -tokens[i][0], i)
    )
    assert mask.dtype == torch.bool and mask[0].nonzero()[:, 0].tolist() == sorted(order[:keep])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_select_takes_each_row_by_its_own_count(name: str) -> None:
    select = implementation(name, token_select_ref, native.token_select)
    score = torch.rand(3, 700, generator=torch.Generator().manual_seed(0))
    eligible = torch.arange(700).expand(3, -1) % 5 > 0
    mask = select(score, eligible, torch.tensor([0, 173, 9999]))
    assert mask.sum(-1).tolist() == [0, 173, 560] and not (mask & ~eligible).any()
    assert score[1, mask[1]].min() > score[1, eligible[1] & ~mask[1]].max()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_gather_takes_rows_in_order(name: str, dtype: torch.dtype) -> None:
    gather = implementation(name, token_gather_ref, native.token_gather)
    x = (torch.arange(24).view(2, 4, 3) % 7).to(dtype)
    index = torch.tensor([[0, 3], [2, 2]])
    assert torch.equal(gather(x, index), torch.stack((x[0, [0, 3]], x[1, [2, 2]])))
    assert torch.equal(gather(x[..., 0], index), torch.stack((x[0, [0, 3], 0], x[1, [2, 2], 0])))
    assert gather(x, index[:, :0]).shape == (2, 0, 3) and gather(x[:, :, :0], index).shape == (2, 2, 0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gather_refuses_what_is_not_there(name: str) -> None:
    with pytest.raises(RuntimeError, match="index"):
        implementation(name, token_gather_ref, native.token_gather)(torch.zeros(1, 4, 2), torch.tensor([[4]]))
