"""Attention over float16 keys and values: close to float64, and the same bits however it is cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quota.core.formats import KV16
from quota.nn.kv import KINDS
from quota.ops import native
from quota.ops.kv16_attention import kv16_attention_ref
from quota.ops.kv16_paged_attention import kv16_paged_attention, kv16_paged_attention_ref
from tests.ops.test_kv4_attention import SHAPES, relative

HALVES = KINDS[KV16]


def cache(x: torch.Tensor, capacity: int) -> torch.Tensor:
    """x [B, Hkv, S, D] as the first slots of an otherwise poisoned float16 cache."""
    out = x.new_full((*x.shape[:2], capacity, x.shape[3]), float("nan"), dtype=torch.float16)
    out[:, :, : x.shape[2]] = x
    return out


def case(b: int, h: int, hkv: int, t: int, s: int, d: int) -> tuple:
    g = torch.Generator().manual_seed(s * 10 + d)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((b, h, t, d), (b, hkv, s, d), (b, hkv, s, d)))
    start = torch.arange(b, dtype=torch.int32) * min(3, s - 1)
    return q, cache(k, s + 5), cache(v, s + 5), s, start, d**-0.5


@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 1, 70, 150, 7)])
def test_native_is_close_to_the_float64_reference(isa: str, shape: tuple[int, ...]) -> None:
    args = case(*shape)
    (out, lse), (want, want_lse) = native.kv16_attention(*args), kv16_attention_ref(*args)
    assert out.shape == want.shape and relative(out, want) < 5e-7
    seen = want_lse.isfinite()
    assert torch.equal(seen, lse.isfinite()) and (lse[seen] - want_lse[seen]).abs().max() < 1e-5
    assert (out[~seen.transpose(1, 2)] == 0).all()


def test_every_instruction_set_and_thread_count_gives_the_same_bits(threads: Callable[[int], None]) -> None:
    q, k, v, *rest = case(2, 4, 2, 100, 131, 24)
    k[0, 0, 3, :5] = torch.tensor([6e-8, -3e-5, 65504.0, -0.0, 1e-4]).half()  # subnormal and largest values
    results = []
    for name in native.supported_isas() or pytest.skip("the native library is not built"):
        native.set_isa(name)
        for n in (1, 3):
            threads(n)
            results.append(native.kv16_attention(q, k, v, *rest))
    native.set_isa(None)
    assert all(torch.equal(a[0], results[0][0]) and torch.equal(a[1], results[0][1]) for a in results)


def test_a_row_depends_on_its_own_slots_alone(isa: str) -> None:
    q, k, v, s, start, scaling = case(2, 4, 2, 90, 140, 20)
    whole, lse = native.kv16_attention(q, k, v, s, start, scaling)
    for first, last in ((0, 1), (1, 40), (40, 90)):  # pieces of a prefill, one row of the batch
        end = s - 90 + last
        part = native.kv16_attention(q[1:, :, first:last], k[1:], v[1:], end, start[1:], scaling)
        assert torch.equal(part[0][0], whole[1, first:last]) and torch.equal(part[1][0], lse[1, :, first:last])
    padded = [torch.cat([torch.full_like(x[1:, :, :9], float("nan")), x[1:]], 2) for x in (k, v)]
    moved = native.kv16_attention(q[1:], *padded, s + 9, start[1:] + 9, scaling)
    assert torch.equal(moved[0][0], whole[1])


def test_nan_reaches_the_rows_that_see_it_and_no_other(isa: str) -> None:
    q, k, v, s, _, scaling = case(1, 2, 2, 80, 80, 16)
    v[0, 0, 70, 3] = k[0, 1, 40, 2] = float("nan")
    out = native.kv16_attention(q, k, v, s, None, scaling)[0][0]
    assert out[:70, 0].isfinite().all() and out[70:, 0, 3].isnan().all()
    assert out[:40, 1].isfinite().all() and out[40:, 1].isnan().all()
    assert native.kv16_attention(q * 1e4, k.nan_to_num(), v.nan_to_num(), s, None, 5.0)[0].isfinite().all()


# heads, KV heads, head size, places of a page, query rows, lengths
PAGED = [(4, 2, 16, 4, 1, (4, 5, 0, 63, 64, 65)), (3, 3, 22, 7, 1, (130, 1, 70)), (2, 1, 64, 100, 70, (70, 140))]


def paged_case(heads: int, kv_heads: int, d: int, places: int, rows: int, lengths: tuple[int, ...]) -> tuple:
    """Rows in pages that lie in no order; what no row holds is poison."""
    g = torch.Generator().manual_seed(heads * 100 + d)
    widths = [-(-n // places) for n in lengths]
    units = sum(widths) + 2
    pool = [HALVES.pages(units, kv_heads, places, d, torch.device("cpu")) for _ in "kv"]
    for (pages,) in pool:
        pages.fill_(float("nan"))
    order = iter(torch.randperm(units, generator=g).tolist())
    table = torch.full((len(lengths), max(widths) + 1), 10**6, dtype=torch.int32)
    for row, (n, width) in enumerate(zip(lengths, widths, strict=True)):
        table[row, :width] = torch.tensor([next(order) for _ in range(width)], dtype=torch.int32)
        at = torch.arange(n)
        slot = table[row, at // places].long() * places + at % places
        for pages in pool:
            HALVES.page_write(pages, (torch.randn(1, kv_heads, n, d, generator=g).half(),), slot)
    q = torch.randn(len(lengths), heads, rows, d, generator=g)
    return q, pool[0][0], pool[1][0], table, torch.tensor(lengths, dtype=torch.int32), d**-0.5


@pytest.mark.parametrize("sizes", PAGED)
def test_pages_change_no_bit(isa: str, sizes: tuple) -> None:
    args = paged_case(*sizes)
    out, lse = native.kv16_paged_attention(*args)
    want = kv16_paged_attention_ref(*args)  # reads the pages in order and attends to them as they then lie
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


def test_slots_that_are_not_stored_change_no_page() -> None:
    pages = HALVES.pages(3, 2, 4, 6, torch.device("cpu"))
    before = pages[0][:3].clone()
    HALVES.page_write(pages, (torch.randn(1, 2, 2, 6).half(),), torch.tensor([-1, -1]))
    assert torch.equal(pages[0][:3], before)
    HALVES.page_write(pages, (torch.ones(1, 2, 3, 6).half(),), torch.tensor([0, -1, 11]))
    assert pages[0][0, :, 0].eq(1).all() and pages[0][2, :, 3].eq(1).all() and pages[0][:3].sum() == 24


def test_impossible_pages_are_refused(isa: str) -> None:
    q, k, v, table, length, scaling = paged_case(2, 1, 8, 4, 1, (5, 3))
    with pytest.raises(RuntimeError, match="length"):
        kv16_paged_attention(q, k, v, table, length + 100, scaling)
    with pytest.raises(RuntimeError, match="table"):
        kv16_paged_attention(q, k, v, table + 1000, length, scaling)
    with pytest.raises(RuntimeError, match="k: expected"):
        kv16_paged_attention(q, k.float(), v.float(), table, length, scaling)
