import pytest
import torch

from quota.ops import native
from quota.ops.kv4_page_read import kv4_page_read_ref
from quota.ops.kv4_page_write import kv4_page_write_ref
from tests.ops.kv import cache

UNITS, HEADS, PLACES, DIM = 7, 3, 4, 10


def poisoned_pages():
    return torch.full((UNITS, HEADS, PLACES, DIM // 2), 99, dtype=torch.uint8), *(
        torch.full((UNITS, HEADS, PLACES), float("nan")) for _ in range(2)
    )


def equal(a, b) -> bool:
    return all(torch.equal(x.nan_to_num(-7), y.nan_to_num(-7)) for x, y in zip(a, b, strict=True))


@pytest.fixture
def rows():
    return cache(torch.randn(1, HEADS, 9, DIM, generator=torch.Generator().manual_seed(0)), 9)


def test_written_rows_are_read_back_in_order(rows) -> None:
    table = torch.tensor([[5, 0, 3]], dtype=torch.int32)
    slot = torch.cat([torch.arange(PLACES) + PLACES * u for u in table[0].tolist()])[:9]
    pages = poisoned_pages()
    kv4_page_write_ref(pages, rows, slot)
    read = kv4_page_read_ref(pages, table, torch.tensor([9], dtype=torch.int32), 12)
    assert equal([t[:, :, 3:] for t in read], rows)
    assert all(not t[:, :, :3].any() for t in read)


def test_native_equals_reference(rows) -> None:
    if native.why_not():
        pytest.skip(native.why_not())
    slot = torch.tensor([8, -1, 27, 3, -1, 11, 0, 20, 15])
    pages, again = poisoned_pages(), poisoned_pages()
    kv4_page_write_ref(pages, rows, slot)
    native.kv4_page_write(again, rows, slot)
    assert equal(pages, again)
    table = torch.tensor([[2, 6, -1], [0, 3, 4], [1, -1, -1]], dtype=torch.int32)
    length = torch.tensor([5, 12, 0], dtype=torch.int32)
    assert equal(kv4_page_read_ref(pages, table, length, 13), native.kv4_page_read(pages, table, length, 13))


def test_native_refuses_places_outside_the_pool(rows) -> None:
    if native.why_not():
        pytest.skip(native.why_not())
    pages, length = poisoned_pages(), torch.tensor([5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="slot"):
        native.kv4_page_write(pages, rows, torch.full((9,), UNITS * PLACES))
    with pytest.raises(RuntimeError, match="table"):
        native.kv4_page_read(pages, torch.tensor([[0, UNITS]], dtype=torch.int32), length, 8)
    with pytest.raises(RuntimeError, match="length"):
        native.kv4_page_read(pages, torch.tensor([[0]], dtype=torch.int32), length, 8)
