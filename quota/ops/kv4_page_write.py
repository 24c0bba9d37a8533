"""`kv4_page_write`: packed keys or values of new tokens go to their places in the pages of a pool."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.weights import Kv


def kv4_page_write_ref(pages: Kv, rows: Kv, slot: Tensor) -> None:
    """pages (q uint8 [U, Hkv, P, D/2], scale and zero float32 [U, Hkv, P]) are written in place from rows (q [1, Hkv,
    M, D/2], scale, zero [1, Hkv, M]); slot int64 [M]: row m goes to place slot % P of unit slot // P, a negative slot
    is not stored.

    Exactness: a copy.
    """
    places = pages[0].shape[2]
    stored = (slot >= 0).nonzero()[:, 0]
    unit, place = slot[stored] // places, slot[stored] % places
    for page, row in zip(pages, rows, strict=True):
        page[unit, :, place] = row[0].transpose(0, 1)[stored]


kv4_page_write = Op(kv4_page_write_ref, native, triton)  # the first that supports the device
