"""Reading pages where they lie must change no bit of reading them one after the other."""

from collections.abc import Callable

import pytest
import torch

from quota.ops import native
from quota.ops.kv4_attention import kv4_attention_ref
from quota.ops.kv4_page_read import kv4_page_read_ref
from quota.ops.kv4_page_write import kv4_page_write_ref
from quota.ops.kv4_paged_attention import kv4_paged_attention, kv4_paged_attention_ref
from tests.ops.kv import cache
from tests.ops.test_kv4_attention import relative

# heads, KV heads, head size, places of a page, query rows, lengths
CASES = [
    (1, 1, 2, 4, 1, (1,)),
    (4, 2, 16, 4, 1, (4, 5, 0, 63, 64, 65)),
    (3, 3, 22, 7, 1, (130, 1, 70)),
    (8, 2, 64, 16, 1, (16, 128, 0, 129, 200)),
    (7, 1, 128, 16, 5, (37, 5, 192)),
    (2, 1, 36, 64, 1, (64, 63, 150)),
    (4, 4, 48, 100, 2, (100, 101, 260)),
    (2, 2, 64, 128, 70, (70, 140)),
    (40, 1, 256, 16, 1, (37, 70)),
]


def case(heads: int, kv_heads: int, d: int, places: int, rows: int, lengths: tuple[int, ...], extra: int = 0) -> tuple:
    """Rows in pages that lie in no order; every other slot of the pool, and every table entry past a row's end, is
    poison."""
    g = torch.Generator().manual_seed(heads * 100 + d)
    widths = [-(-n // places) for n in lengths]
    units = sum(widths) + 2
    pool = [
        (
            torch.full((units, kv_heads, places, d // 2), 255, dtype=torch.uint8),
            *(torch.full((units, kv_heads, places), torch.nan) for _ in "sz"),
        )
        for _ in "kv"
    ]
    order = iter(torch.randperm(units, generator=g).tolist())
    table = torch.full((len(lengths), max(widths) + 1), 10**6, dtype=torch.int32)
    for row, (n, width) in enumerate(zip(lengths, widths, strict=True)):
        table[row, :width] = torch.tensor([next(order) for _ in range(width)], dtype=torch.int32)
        at = torch.arange(n)
        for pages in pool:
            kv4_page_write_ref(
                pages,
                cache(torch.randn(1, kv_heads, n, d, generator=g), n),
                table[row, at // places].long() * places + at % places,
            )
    q = torch.randn(len(lengths), heads, rows, d + extra, generator=g)
    shared = torch.randn(len(lengths), extra, max(lengths) + 3, generator=g) if extra else None
    for row, n in enumerate(lengths if shared is not None else ()):
        shared[row, :, n:] = torch.nan
    return q, *pool, table, torch.tensor(lengths, dtype=torch.int32), d**-0.5, shared


def gathered(q, k, v, table, length, scaling, shared=None):
    """Each row alone, its pages as a contiguous cache."""
    parts = []
    for row, n in enumerate(length.tolist()):
        if n == 0:
            parts.append(
                (torch.zeros(1, q.shape[2], q.shape[1], 2 * k[0].shape[3]), torch.full((1, *q.shape[1:3]), -torch.inf))
            )
            continue
        one = slice(row, row + 1)
        keys, values = (kv4_page_read_ref(pages, table[one], length[one], n) for pages in (k, v))
        parts.append(
            native.kv4_attention(q[one], keys, values, n, None, scaling, None if shared is None else shared[one, :, :n])
        )
    return tuple(torch.cat(side) for side in zip(*parts, strict=True))


@pytest.mark.parametrize("extra", [0, 6])
@pytest.mark.parametrize("sizes", CASES)
def test_native_has_the_bits_of_gathered_pages(isa: str, sizes: tuple, extra: int) -> None:
    args = case(*sizes, extra=extra)
    for got, want in zip(native.kv4_paged_attention(*args), gathered(*args), strict=True):
        assert torch.equal(got, want)


def test_company_threads_and_instruction_sets_change_no_bit(threads: Callable[[int], None]) -> None:
    q, k, v, table, length, scaling, shared = case(6, 2, 40, 16, 3, (3, 300, 65, 16, 129), extra=4)
    results = []
    for name in native.supported_isas() or pytest.skip("the native library is not built"):
        native.set_isa(name)
        for n in (1, 2):
            threads(n)
            results.append(native.kv4_paged_attention(q, k, v, table, length, scaling, shared))
    native.set_isa(None)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    for row in range(len(length)):
        one = slice(row, row + 1)
        out, lse = native.kv4_paged_attention(
            q[one], k, v, table[one, : -(-int(length[row]) // 16)], length[one], scaling, shared[one]
        )
        assert torch.equal(out, results[0][0][one]) and torch.equal(lse, results[0][1][one])


def test_the_reference_is_close_to_float64() -> None:
    q, k, v, table, length, scaling, shared = case(4, 2, 16, 4, 1, (9, 66, 1), extra=3)
    out, lse = kv4_paged_attention_ref(q, k, v, table, length, scaling, shared)
    for row, n in enumerate(length.tolist()):
        one = slice(row, row + 1)
        keys, values = (kv4_page_read_ref(pages, table[one], length[one], n) for pages in (k, v))
        want, want_lse = kv4_attention_ref(q[one], keys, values, n, None, scaling, shared[one])
        assert relative(out[one], want) < 1e-5 and (lse[one] - want_lse).abs().max() < 1e-4


def test_native_is_preferred_on_the_cpu() -> None:
    if native.why_not():
        pytest.skip(native.why_not())
    assert kv4_paged_attention.choose().name == "native"


def test_native_refuses_what_lies_outside_the_pool(isa: str) -> None:
    q, k, v, table, length, scaling, _ = case(4, 2, 16, 4, 1, (9, 5))
    units = len(k[0])
    with pytest.raises(RuntimeError, match=rf"table: expected 0 <= unit < {units}"):
        native.kv4_paged_attention(q, k, v, table, length + 4, scaling)
    with pytest.raises(RuntimeError, match="length: expected at most 16 slots"):
        native.kv4_paged_attention(q, k, v, table, length + 8, scaling)
    with pytest.raises(RuntimeError, match="length: expected at most 7 slots"):
        native.kv4_paged_attention(torch.cat([q, q], -1), k, v, table, length, scaling, torch.zeros(2, 16, 7))
    with pytest.raises(RuntimeError, match="v: expected pages of 4 places, got 2"):
        native.kv4_paged_attention(q, k, tuple(t[:, :, :2] for t in v), table, length, scaling)
