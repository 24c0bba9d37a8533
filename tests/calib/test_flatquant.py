"""Fake quantizers against the number formats, gradients, clip search, projection groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quota.calib.fake import fake_asymmetric, fake_symmetric, search_clip, search_weight_clip
from quota.calib.flatquant import GroupPart, HeadTransforms, ProjectionGroup, ValueMerge
from quota.calib.learn import split
from quota.core.formats import KV4
from quota.ops import Factor
from quota.ops.quantize_act import quantize_act_ref
from quota.ops.transform import transform_ref
from quota.quant.affine import dequantize_kv, dequantize_symmetric, quantize_kv, quantize_symmetric
from quota.quant.fixed import fixed_factor, rounded_factor
from quota.quant.pack import unpack_int4


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 7), (1, 1)])
def test_fake_quantizers_are_the_formats(shape, clip):
    x = noise(*shape)
    x[0] = 0
    assert torch.equal(fake_symmetric(x, clip), dequantize_symmetric(*quantize_symmetric(x, clip)))
    assert torch.equal(fake_asymmetric(x, clip), dequantize_kv(*quantize_kv(x, clip)))


@pytest.mark.parametrize("fake", [fake_symmetric, fake_asymmetric])
def test_learning_and_looking_compute_the_same_bits(fake):
    """With gradients, and without; rows of ties and of zeros included."""
    x, clip = noise(6, 32), torch.tensor(0.7)
    x[1], x[2, ::2] = 0, 3.0
    with torch.no_grad():
        seen = fake(x, clip)
    assert torch.equal(fake(x.requires_grad_(), clip.requires_grad_()), seen)


@pytest.mark.parametrize("fake", [fake_symmetric, fake_asymmetric])
def test_gradients_are_those_of_torchs_own_amax(fake):
    """Ties share a gradient and rows of zeros have none, as with torch's reductions."""

    def plain(x, clip):
        if fake is fake_symmetric:
            scale, zero = (x.abs().amax(-1, keepdim=True) * clip).clamp_min(1e-8) / 7, torch.zeros(())
        else:
            zero = x.amin(-1, keepdim=True) * clip
            scale = (x.amax(-1, keepdim=True) * clip - zero).clamp_min(1e-8) / 15
        low, high = (-8, 7) if fake is fake_symmetric else (0, 15)
        ratio = (x - zero).detach() * (1.0 / scale.detach())
        code = torch.round(ratio).clamp(low, high)
        inside = torch.round(ratio) == code
        residual = torch.where(inside, code - ratio, code)
        return x * inside + scale * residual + zero * ~inside

    x, clip, upstream = noise(7, 33), torch.tensor(0.6), noise(7, 33, seed=1)
    x[1], x[2, ::2] = 0, 3.0
    got, wanted = ([t.clone().requires_grad_() for t in (x, clip)] for _ in range(2))
    (fake(*got) * upstream).sum().backward()
    (plain(*wanted) * upstream).sum().backward()
    torch.testing.assert_close(got[0].grad, wanted[0].grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].grad, wanted[1].grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fake", [fake_symmetric, fake_asymmetric])
def test_straight_through_gradients(fake):
    """Rounding replaced by its value at this point: inside the range x passes through, the clip moves scale (and
    zero)."""
    x, clip = noise(6, 32).double().requires_grad_(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    upstream = noise(6, 32, seed=1).double()
    (fake(x, clip) * upstream).sum().backward()
    with torch.no_grad():
        if fake is fake_symmetric:
            reach, low, high, zero = x.abs().amax(-1, keepdim=True), -8, 7, torch.zeros(6, 1, dtype=torch.float64)
            scale = reach * clip / 7
        else:
            low, high, zero = 0, 15, x.amin(-1, keepdim=True) * clip
            scale = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) * clip / 15
        offset = torch.round((x - zero) / scale) - (x - zero) / scale
        inside = ((x - zero) / scale).round().clamp(low, high) == ((x - zero) / scale).round()
    a, c = x.detach().clone().requires_grad_(), clip.detach().clone().requires_grad_()
    if fake is fake_symmetric:
        s, z = a.abs().amax(-1, keepdim=True) * c / 7, 0.0
    else:
        z, s = a.amin(-1, keepdim=True) * c, (a.amax(-1, keepdim=True) - a.amin(-1, keepdim=True)) * c / 15
    surrogate = torch.where(inside, (a - z) / s + offset, ((a - z) / s).detach().round().clamp(low, high)) * s + z
    (surrogate * upstream).sum().backward()
    torch.testing.assert_close(x.grad, a.grad)
    torch.testing.assert_close(clip.grad, c.grad)


def test_clip_search_beats_no_clipping_on_gaussian_rows():
    x = noise(64, 1024)
    clip = search_clip(x)
    assert 0.5 < clip < 0.9
    assert (fake_symmetric(x, clip) - x).norm() < 0.85 * (fake_symmetric(x, 1.0) - x).norm()
    w_clip = search_weight_clip(x)
    assert w_clip.shape == (64,)
    assert ((fake_symmetric(x, w_clip) - x).norm(dim=-1) <= (fake_symmetric(x, 0.995) - x).norm(dim=-1) + 1e-6).all()


def group(bias=True, diag=True, out=(8, 8, 8), merge=None):
    torch.manual_seed(0)
    linears = [nn.Linear(24, n, bias=bias) for n in out]
    return linears, ProjectionGroup(linears, 4, 6, diag, merge)


def test_group_runs_once_per_input_and_serves_every_part():
    linears, fused = group()
    fused.mode = "float"
    calls = []
    fused.register_forward_hook(lambda *a: calls.append(1))
    parts = [GroupPart(fused, index) for index in range(3)]
    x = noise(2, 5, 24)
    for part, linear in zip(parts, linears, strict=True):
        torch.testing.assert_close(part(x), linear(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    parts[0](x)
    assert len(calls) == 2  # everything was handed out: the next input
    with pytest.raises(RuntimeError, match="part 2"):
        parts[2](x)


def test_value_transform_merges_into_rows_and_bias():
    heads = HeadTransforms(4, KV4)
    linears, fused = group(merge=ValueMerge(heads, slice(16, 24)))
    fused.mode = "float"
    x = noise(5, 24)
    value = fused(x)[:, 16:].view(5, 2, 4)
    torch.testing.assert_close(value, linears[2](x).view(5, 2, 4) @ heads.value, rtol=1e-4, atol=1e-5)


def test_frozen_group_is_its_exported_integers():
    _, fused = group()
    x = noise(50, 24)
    fused.initialise(x, alpha=0.3)
    fused.mode = "learn"
    learned = fused(x)
    fused.freeze()
    fused.mode = "frozen"
    torch.testing.assert_close(fused(x), learned, rtol=1e-3, atol=1e-3)
    tensors = fused.export()
    assert set(tensors) == {"left", "right", "clip", "w_q", "w_scale", "bias"}
    w = dequantize_symmetric(unpack_int4(tensors["w_q"], 24), tensors["w_scale"])
    assert all(torch.equal(tensors[name], rounded_factor(tensors[name])) for name in ("left", "right"))
    factors = Factor(tensors["left"]), Factor(tensors["right"])
    x_q, x_scale = quantize_act_ref(x * torch.exp(-fused.log_diag), *factors, float(tensors["clip"]))
    wanted = dequantize_symmetric(unpack_int4(x_q, 24), x_scale) @ w.T + tensors["bias"]
    assert (fused(x) - wanted).norm() / wanted.norm() < 1e-6


def test_initialisation_beats_round_to_nearest_with_an_outlier_channel():
    _, fused = group()
    x = noise(200, 24)
    x[:, 3] *= 40
    with torch.no_grad():
        wanted = x @ fused.weight.T + fused.bias
        fused.mode = "rtn"
        plain = (fused(x) - wanted).norm()
        fused.initialise(x, alpha=0.3)
        fused.mode = "learn"
        assert (fused(x) - wanted).norm() < 0.5 * plain


def test_head_transforms_keep_scores_without_quantization():
    heads = HeadTransforms(8, KV4)
    with torch.no_grad():
        heads.key.add_(0.05 * noise(8, 8))
    heads.mode = "float"
    q, k, v = noise(1, 4, 6, 8), noise(1, 2, 6, 8, seed=1), noise(1, 2, 6, 8, seed=2)
    q2, k2, _ = heads.attend(q, k, v)
    torch.testing.assert_close(q2[:, ::2] @ k2.transpose(-1, -2), q[:, ::2] @ k.transpose(-1, -2), rtol=1e-4, atol=1e-4)
    heads.freeze()
    exported = heads.export()
    rounding = 2.0 ** (fixed_factor(exported["q_transform"])[1] - 1)  # of a value of q's, at most
    product = exported["q_transform"].double().T @ exported["k_transform"].double()
    assert (product - torch.eye(8)).abs().max() <= rounding * exported["k_transform"].abs().sum(0).max()
    heads.mode = "frozen"
    q3, k3 = (
        transform_ref(x.flatten(0, 2), None, Factor(exported[name])).view(x.shape)
        for x, name in ((q, "q_transform"), (k, "k_transform"))
    )
    got = heads.attend(q, k, v)
    assert torch.equal(got[0], q3) and torch.equal(got[1], fake_asymmetric(k3, float(exported["k_clip"]), KV4))
    heads.mode = "learn"
    assert not torch.equal(heads.attend(q, k, v)[2], v)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 128])
def test_split_is_disjoint_and_never_empty(count):
    train, held = split(count, 8)
    assert train and held
    if count > 1:
        assert not set(train) & set(held)
        assert sorted(train + held) == list(range(count))
        assert len(held) <= max(1, count // 4)
