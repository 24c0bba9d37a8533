import copy

import pytest
import torch
from torch import nn

from quota.nn.head import HeadLinear
from quota.ops import FloatWeight, native
from quota.ops.float_linear import float_linear_ref


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 33, 63), (70, 20, 64), (3, 192, 65), (129, 7, 200)])
def test_native_equals_reference_bit_for_bit(isa: str, m: int, k: int, n: int, dtype: torch.dtype) -> None:
    x, weight = random(m, k), FloatWeight(random(n, k).to(dtype))
    assert torch.equal(native.float_linear(x, weight), float_linear_ref(x, weight))


def test_a_bfloat16_weight_stays_one(isa: str) -> None:
    x, weight = random(2, 8), FloatWeight(random(70, 8).bfloat16())
    assert torch.equal(native.float_linear(x, weight), native.float_linear(x, FloatWeight(weight.w.float())))
    assert (
        weight.layouts["native"].dtype == torch.bfloat16
    )  # as float32 a head of 7B models would take twice its memory, and twice its time


def test_rows_and_threads_change_nothing(isa: str, threads) -> None:
    x, weight = random(50, 96), FloatWeight(random(300, 96))
    threads(1)
    whole = native.float_linear(x, weight)
    assert all(torch.equal(native.float_linear(x[i : i + 1], weight)[0], whole[i]) for i in range(50))
    threads(2)
    assert torch.equal(native.float_linear(x, weight), whole)
    assert native.float_linear(x[:0], weight).shape == (0, 300)


def test_head_layer_follows_its_weight() -> None:
    old = nn.Linear(16, 10, bias=True)
    head = HeadLinear.replacing(old)
    assert head.state_dict().keys() == old.state_dict().keys()
    x = random(2, 3, 16)
    assert torch.allclose(head(x), old(x), atol=1e-5) and head(x).shape == (2, 3, 10)
    clone = copy.deepcopy(head)
    with torch.no_grad():
        head.weight.mul_(2)
        assert torch.allclose(head(x), old(x), atol=1e-5) and not torch.allclose(clone(x), old(x), atol=1e-2)
    assert head.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
