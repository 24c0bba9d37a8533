from collections.abc import Callable

import pytest
import torch

from quota.core.env import CPU_ISAS
from quota.nn.attention import seeing_all
from quota.ops import native
from quota.ops.kv4_attention import dequantized, kv4_attention_ref
from tests.ops.kv import cache, filled

SHAPES = [
    (1, 1, 1, 1, 1, 2),
    (2, 4, 2, 5, 9, 16),
    (1, 3, 3, 30, 30, 64),
    (2, 2, 1, 1, 70, 22),
    (1, 2, 2, 65, 131, 36),
    (1, 8, 2, 14, 64, 130),
    (1, 7, 1, 12, 200, 128),
    (1, 2, 1, 1, 129, 192),
    (1, 40, 1, 1, 70, 256),
]


def case(b: int, h: int, hkv: int, t: int, s: int, d: int) -> tuple:
    g = torch.Generator().manual_seed(s * 10 + d)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((b, h, t, d), (b, hkv, s, d), (b, hkv, s, d)))
    start = torch.arange(b, dtype=torch.int32) * min(3, s - 1)
    return q, cache(k, s + 5), cache(v, s + 5), s, start, d**-0.5


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_close_to_the_float64_reference(isa: str, shape: tuple[int, ...]) -> None:
    args = case(*shape)
    (out, lse), (want, want_lse) = native.kv4_attention(*args), kv4_attention_ref(*args)
    assert out.shape == want.shape and relative(out, want) < 5e-7
    seen = want_lse.isfinite()
    assert torch.equal(seen, lse.isfinite()) and (lse[seen] - want_lse[seen]).abs().max() < 1e-5
    assert (out[~seen.transpose(1, 2)] == 0).all()


def test_every_instruction_set_and_thread_count_gives_the_same_bits(threads: Callable[[int], None]) -> None:
    args = case(2, 4, 2, 100, 131, 24)
    results = []
    for name in native.supported_isas() or pytest.skip("the native library is not built"):
        native.set_isa(name)
        for n in (1, 3):
            threads(n)
            results.append(native.kv4_attention(*args))
    native.set_isa(None)
    assert all(torch.equal(a[0], results[0][0]) and torch.equal(a[1], results[0][1]) for a in results)
    assert set(native.supported_isas()) <= set(CPU_ISAS)


def test_prefill_equals_prefill_then_decode(isa: str) -> None:
    q, k, v, s, start, scaling = case(2, 4, 2, 40, 40, 16)
    out, lse = native.kv4_attention(q, k, v, s, start, scaling)
    for begin, end in ((0, 13), (13, 39), (39, 40)):
        part, part_lse = native.kv4_attention(q[:, :, begin:end], k, v, end, start, scaling)
        assert torch.equal(part, out[:, begin:end]) and torch.equal(part_lse, lse[:, :, begin:end])


def test_left_padding_and_batch_change_no_bit(isa: str) -> None:
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 2, 37, 20, generator=g) for _ in range(3))
    alone = native.kv4_attention(q, cache(k, 37), cache(v, 37), 37, torch.zeros(1, dtype=torch.int32), 0.2)
    for pad in (1, 16, 29):
        padded = torch.cat((torch.randn(1, 2, pad, 20), q), 2).repeat(3, 1, 1, 1)
        kp, vp = (filled(cache(x.repeat(3, 1, 1, 1), 37 + pad, pad), pad) for x in (k, v))
        out, lse = native.kv4_attention(padded, kp, vp, 37 + pad, torch.tensor([0, pad, pad], dtype=torch.int32), 0.2)
        assert torch.equal(out[1:2, pad:], alone[0]) and torch.equal(lse[1:2, :, pad:], alone[1])
        assert (out[1:, :pad] == 0).all() and lse[1:, :, :pad].eq(-float("inf")).all()


@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 70, 22), (1, 8, 1, 5, 9, 256)])
def test_queries_that_see_every_slot(isa: str, shape: tuple[int, ...]) -> None:
    """As so many heads of one query: plain attention without a mask, and of the last one what it has in any case."""
    q, k, v, s, start, scaling = case(*shape)
    out, lse = seeing_all(lambda one: native.kv4_attention(one, k, v, s, start, scaling), q)
    keys, values = (dequantized(kv, s, shape[-1]).double().repeat_interleave(shape[1] // shape[2], 1) for kv in (k, v))
    score = (q.double() @ keys.transpose(-1, -2)) * scaling
    score = score.masked_fill(torch.arange(s) < start[:, None, None, None], float("-inf"))
    assert relative(out, (score.softmax(-1) @ values).transpose(1, 2)) < 5e-7
    assert (lse - score.logsumexp(-1)).abs().max() < 1e-5
    causal = native.kv4_attention(q, k, v, s, start, scaling)
    assert torch.equal(causal[0][:, -1], out[:, -1]) and torch.equal(causal[1][..., -1], lse[..., -1])


def test_no_start_is_slot_zero(isa: str) -> None:
    q, k, v, s, start, scaling = case(1, 4, 2, 5, 9, 16)
    a, b = native.kv4_attention(q, k, v, s, start, scaling), native.kv4_attention(q, k, v, s, None, scaling)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_nan_reaches_the_rows_that_see_it(isa: str) -> None:
    q, k, v, s, start, scaling = case(1, 1, 1, 70, 70, 16)
    for at in (k[1], v[1], v[2]):
        before = at[0, 0, 40].item()
        at[0, 0, 40] = float("nan")
        out = native.kv4_attention(q, k, v, s, start, scaling)[0][0, :, 0]
        assert out[40:].isnan().all() and out[:40].isfinite().all()
        at[0, 0, 40] = before
    q[0, 0, 3, 5] = float("nan")
    rows = native.kv4_attention(q, k, v, s, start, scaling)[0][0, :, 0].isnan().any(-1)
    assert rows.nonzero().flatten().tolist() == [3]


def test_large_scores_do_not_overflow(isa: str) -> None:
    q, k, v, s, start, _ = case(1, 2, 2, 8, 8, 16)
    args = (q * 100, k, v, s, start, 5.0)
    assert relative(native.kv4_attention(*args)[0], kv4_attention_ref(*args)[0]) < 1e-3


def test_strided_caches(isa: str) -> None:
    q, k, v, s, start, scaling = case(2, 4, 2, 5, 9, 16)
    row = native.kv4_attention(q[1:], tuple(t[1:] for t in k), tuple(t[1:] for t in v), s, start[1:], scaling)
    assert torch.equal(row[0], native.kv4_attention(q, k, v, s, start, scaling)[0][1:])


def test_wrong_length_is_refused(isa: str) -> None:
    q, k, v, s, start, scaling = case(1, 1, 1, 4, 8, 16)
    with pytest.raises(RuntimeError, match="length"):
        native.kv4_attention(q, k, v, s + 6, start, scaling)


def shared_case() -> tuple:
    """22 packed and 10 shared float channels of a grouped, padded batch."""
    q, k, v, s, start, scaling = case(2, 4, 2, 40, 75, 22)
    g = torch.Generator().manual_seed(9)
    shared = torch.randn(2, 10, s + 3, generator=g)
    shared[..., s:] = float("nan")
    return torch.cat([q, 50 * torch.randn(2, 4, 40, 10, generator=g)], -1), k, v, s, start, scaling, shared


def test_shared_channels_add_to_the_packed_ones(isa: str) -> None:
    q, k, v, s, start, scaling, shared = shared_case()
    out, lse = native.kv4_attention(q, k, v, s, start, scaling, shared)
    want, want_lse = kv4_attention_ref(q, k, v, s, start, scaling, shared)
    assert out.shape == (2, 40, 4, 22) and relative(out, want) < 1e-5
    assert (lse - want_lse).abs().max() < 1e-4
    plain = native.kv4_attention(q[..., :22], k, v, s, start, scaling)[0]
    assert relative(plain, want) > 0.1  # they matter
    silent = torch.cat([q[..., :22], torch.zeros_like(q[..., 22:])], -1)
    assert torch.equal(
        native.kv4_attention(silent, k, v, s, start, scaling, shared[..., :s])[0], plain
    )  # zeros add nothing


def test_shared_channels_are_exact_in_every_way_of_running(threads: Callable[[int], None]) -> None:
    q, k, v, s, start, scaling, shared = shared_case()
    results = []
    for name in native.supported_isas() or pytest.skip("the native library is not built"):
        native.set_isa(name)
        for n in (1, 3):
            threads(n)
            results.append(native.kv4_attention(q, k, v, s, start, scaling, shared))
        row = native.kv4_attention(
            q[1:], *(tuple(t[1:] for t in kv) for kv in (k, v)), s, start[1:], scaling, shared[1:]
        )
        assert torch.equal(row[0][0], results[-1][0][1])
        last = native.kv4_attention(q[:, :, -1:], k, v, s, start, scaling, shared)
        assert torch.equal(last[0], results[-1][0][:, -1:])
    native.set_isa(None)
    assert all(torch.equal(a[0], results[0][0]) and torch.equal(a[1], results[0][1]) for a in results)
