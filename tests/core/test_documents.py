"""Reading files of other programs within bounds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from quota.core.documents import read_text


def test_a_large_bound_takes_no_memory_before_the_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text("{}")
    tracemalloc.start()
    try:
        assert read_text(path, 1 << 30) == "{}"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_the_bound_is_exact_beyond_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"a" * (3 << 20))
    assert len(read_text(path, 3 << 20)) == 3 << 20
    with pytest.raises(ValueError, match=f"it has more than {(3 << 20) - 1} bytes"):
        read_text(path, (3 << 20) - 1)
