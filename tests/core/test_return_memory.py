"""Released pages leave memory and come back with the same contents."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quota.core.malloc import release_pages, return_freed_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise(MADV_PAGEOUT) is Linux's")
_BYTES = 32 << 20


def _resident_bytes(kind: str) -> int:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(1024 * int(parts[1]) for parts in lines if parts[0] == f"Rss{kind}:")


def test_a_mapped_tensor_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    data = torch.randint(0, 256, (_BYTES,), dtype=torch.uint8)
    save_file({"x": data}, str(tmp_path / "x.safetensors"))
    with safe_open(str(tmp_path / "x.safetensors"), framework="pt") as tensors:
        mapped = tensors.get_tensor("x")
    assert torch.equal(mapped, data)
    before = _resident_bytes("File")
    assert release_pages(mapped.data_ptr(), _BYTES)
    assert before - _resident_bytes("File") > 0.9 * _BYTES
    assert torch.equal(mapped, data)


def test_memory_without_a_file_is_unharmed() -> None:
    data = torch.arange(_BYTES // 8)
    release_pages(data.data_ptr(), _BYTES)
    assert torch.equal(data, torch.arange(_BYTES // 8))


def test_small_buffers_are_left_alone() -> None:
    data = torch.zeros(100)
    assert not release_pages(data.data_ptr(), 400)


def test_what_is_freed_between_objects_that_stay_is_returned() -> None:
    blocks = [bytearray(64 << 10) for _ in range(1000)]
    kept = blocks[::10]
    del blocks
    before = _resident_bytes("Anon")
    assert return_freed_memory()
    assert before - _resident_bytes("Anon") > 40 << 20 and len(kept) == 100
