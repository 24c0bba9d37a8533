import torch
from hypothesis import given
from hypothesis import strategies as st

from quota.quant.pack import pack_int4, pack_uint4, unpack_int4, unpack_uint4


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_int4_round_trip(values: list[int]) -> None:
    q = torch.tensor([values, values[::-1]], dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8 and packed.shape == (2, (len(values) + 1) // 2)
    assert torch.equal(unpack_int4(packed, len(values)), q)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=33))
def test_uint4_round_trip(values: list[int]) -> None:
    q = torch.tensor(values, dtype=torch.uint8)
    assert torch.equal(unpack_uint4(pack_uint4(q), len(values)), q)


def test_layout_is_low_nibble_first_and_zero_padded() -> None:
    assert pack_int4(torch.tensor([1, -1, -8], dtype=torch.int8)).tolist() == [0xF1, 0x08]
