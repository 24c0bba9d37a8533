from __future__ import annotations

import copy

import pytest
import torch

from quota.nn import mlp
from quota.nn.linear import QuantLinear, row_norm
from quota.quant.fixed import rounded_factor
from quota.quant.transform import apply_kronecker, decompose, hadamard

SIZES = [
    (64, 24, None),
    (12, 7, None),
    (60, 5, (4, None)),
    (30, 9, (None, 10)),
    (33, 3, (None, None)),
    (13, 4, (None, None)),
]


def group(
    k: int, n: int, bias: bool = True, factors: tuple[int | None, int | None] | None = None, clip: float = 1.0
) -> QuantLinear:
    generator = torch.Generator().manual_seed(k * 31 + n)
    left, right = decompose(k) if factors is None else factors
    layer = QuantLinear(k, n, bias=bias, left=left, right=right)
    filled = torch.randn(n, k, generator=generator), torch.randn(n, generator=generator) if bias else None
    layer.round_from(*filled, clip)
    return layer


def rows(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k))


@pytest.mark.parametrize("k, n, factors", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_dequantized_operands(k, n, factors, bias):
    layer, x = group(k, n, bias, factors), rows(17, k)
    torch.testing.assert_close(layer(x), layer.dequantized_forward(x), rtol=2e-6, atol=2e-5)


def test_transform_cancels_between_input_and_weight():
    layer, x = group(64, 24, bias=False), rows(9, 64)
    plain = group(64, 24, bias=False, factors=(None, None))
    u = apply_kronecker(x, layer.left, layer.right)
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(64 * 31 + 24))
    exact = x @ w.T
    for candidate in (layer(x), plain(x), u @ layer.dequantized_weight().T):
        assert float((candidate - exact).norm() / exact.norm()) < 0.25


def test_shapes_dtypes_and_empty_input():
    layer = group(64, 24)
    assert layer(torch.zeros(0, 64)).shape == (0, 24)
    assert layer(torch.randn(2, 3, 64)).shape == (2, 3, 24)
    assert layer(torch.randn(5, 64).bfloat16()).dtype == torch.bfloat16
    strided = torch.randn(64, 10).T
    assert torch.equal(layer(strided), layer(strided.contiguous()))


def test_rows_do_not_depend_on_their_batch():
    layer, x = group(96, 40), rows(33, 96)
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))


def test_casting_a_model_leaves_the_format_alone():
    layer, x = group(64, 24), rows(4, 64)
    want = layer(x)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        assert torch.equal(cast(copy.deepcopy(layer))(x), want)
    assert copy.deepcopy(layer).half().w_scale.dtype == torch.float32


def test_writing_buffers_is_seen_after_loading():
    layer, other, x = group(64, 24), group(64, 24, clip=0.5), rows(4, 64)
    layer(x)  # packs
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.load_state_dict(group(64, 24).state_dict(), assign=True)
    assert torch.equal(layer(x), group(64, 24)(x))


def test_quant_risk_is_the_error_of_the_deployed_quantizer():
    layer, x = group(64, 24, clip=0.8), rows(6, 64)
    u = apply_kronecker(x, layer.left, layer.right)
    scale = u.abs().amax(-1, keepdim=True) * 0.8 / 7
    want = (u - (u / scale).round().clamp(-8, 7) * scale).norm(dim=-1)
    torch.testing.assert_close(layer.quant_risk(x), want, rtol=1e-4, atol=1e-5)
    assert layer.quant_risk(x.view(2, 3, 64)).shape == (2, 3)


def test_row_norm_and_bad_factors():
    torch.testing.assert_close(row_norm(torch.tensor([[3.0, 4.0]])), torch.tensor([5.0]))
    with pytest.raises(ValueError, match="left \\* right"):
        QuantLinear(12, 4, left=2, right=3)
    with pytest.raises(ValueError, match="dividing"):
        QuantLinear(12, 4, left=5)


def test_meta_device():
    layer = QuantLinear(64, 24, bias=True, left=8, right=8, device="meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    layer.to_empty(device="cpu").load_state_dict(group(64, 24).state_dict())
    assert torch.equal(layer(rows(3, 64)), group(64, 24)(rows(3, 64)))


def test_hadamard_factors_are_rounded_and_their_rounding_is_in_the_weight():
    layer = group(48, 8)
    for factor in (layer.left, layer.right):
        assert factor is not None
        assert torch.equal(factor, rounded_factor(hadamard(len(factor))).float())
    w = torch.randn(8, 48, generator=torch.Generator().manual_seed(5))
    layer.round_from(w, None)
    moved = torch.linalg.solve(torch.kron(layer.left.double(), layer.right.double()), w.double().T).T
    assert ((layer.dequantized_weight() - moved).abs() <= layer.w_scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_blocks_of_rows_change_no_bit(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = mlp.QuantMLP(group(24, 2 * 40), group(40, 24), act), rows(23, 24)
    whole, seen = layer(x.view(1, 23, 24)), []
    layer.gate_up_proj.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    monkeypatch.setattr(mlp, "_BLOCK_BYTES", 4 * 80 * 6)
    assert torch.equal(layer(x.view(1, 23, 24)), whole) and seen == [6, 6, 6, 5]
    assert layer(x[:0]).shape == (0, 24)
