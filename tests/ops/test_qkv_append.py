from collections.abc import Callable

import pytest
import torch

from quota.ops import native
from quota.ops.qkv_append import qkv_append_ref
from quota.ops.weights import Factor, Kv

SHAPES = [
    (1, 1, 1, 1, 2),
    (2, 4, 2, 5, 16),
    (1, 3, 1, 30, 36),
    (1, 2, 2, 3, 64),
    (2, 6, 2, 1, 22),
    (1, 1, 1, 2, 130),
    (1, 2, 1, 3, 256),
    (1, 2, 1, 0, 8),
]


def caches(b: int, hkv: int, slots: int, d: int) -> tuple[Kv, Kv]:
    def one() -> Kv:
        return (
            torch.full((b, hkv, slots, d // 2), 77, dtype=torch.uint8),
            torch.full((b, hkv, slots), 3.0),
            torch.full((b, hkv, slots), 4.0),
        )

    return one(), one()


def case(b: int, h: int, hkv: int, t: int, d: int) -> tuple:
    g = torch.Generator().manual_seed(b * 100 + t + d)
    qkv, cos, sin, a, m = (
        torch.randn(*s, generator=g) for s in ((b, t, (h + 2 * hkv) * d), (b, t, d), (1, t, d), (d, d), (d, d))
    )
    return qkv, (cos, sin.expand(b, -1, -1)), (Factor(a), Factor(m))


def same(a: tuple, b: tuple) -> bool:
    return torch.equal(a[0], b[0]) and all(
        torch.equal(x, y) for p, q in zip(a[1:], b[1:], strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_reference_bit_for_bit(isa: str, shape: tuple[int, ...]) -> None:
    b, _, hkv, t, d = shape
    qkv, (cos, sin), (a, m) = case(*shape)
    for rotary in (None, (cos, sin), (cos[:1], sin[:1])):
        for transforms in ((a, m), (None, m), (None, None)):
            got, want = caches(b, hkv, t + 4, d), caches(b, hkv, t + 4, d)
            q = native.qkv_append(qkv, rotary, transforms, *got, 3, (0.9, 0.8))
            assert same((q, *got), (qkv_append_ref(qkv, rotary, transforms, *want, 3, (0.9, 0.8)), *want))


def test_batch_threads_and_pieces_change_no_bit(isa: str, threads: Callable[[int], None]) -> None:
    qkv, (cos, sin), transforms = case(3, 4, 2, 50, 16)
    whole = caches(3, 2, 50, 16)
    threads(1)
    q = native.qkv_append(qkv, (cos, sin), transforms, *whole, 0, (0.9, 0.8))
    threads(3)
    again = caches(3, 2, 50, 16)
    assert same((native.qkv_append(qkv, (cos, sin), transforms, *again, 0, (0.9, 0.8)), *again), (q, *whole))
    row = caches(1, 2, 50, 16)
    for begin, end in ((0, 1), (1, 30), (30, 50)):
        part = native.qkv_append(
            qkv[1:2, begin:end], (cos[1:2, begin:end], sin[1:2, begin:end]), transforms, *row, begin, (0.9, 0.8)
        )
        assert torch.equal(part, q[1:2, :, begin:end])
    assert all(torch.equal(x, y[1:2]) for p, w in zip(row, whole, strict=True) for x, y in zip(p, w, strict=True))


def test_what_does_not_fit_is_refused(isa: str) -> None:
    qkv, rotary, transforms = case(1, 4, 2, 5, 16)
    with pytest.raises(RuntimeError, match=r"expected room for slots 3\.\.8"):
        native.qkv_append(qkv, rotary, transforms, *caches(1, 2, 7, 16), 3, (1.0, 1.0))
    with pytest.raises(RuntimeError, match="qkv: expected heads of 18 values"):
        native.qkv_append(qkv, rotary, transforms, *caches(1, 2, 9, 18), 0, (1.0, 1.0))
    with pytest.raises(RuntimeError, match=r"cos: expected shape \[any, 5, 16\]"):
        native.qkv_append(qkv, (rotary[0][:, :4], rotary[1]), transforms, *caches(1, 2, 9, 16), 0, (1.0, 1.0))
