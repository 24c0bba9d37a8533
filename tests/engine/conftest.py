"""Tiny models are faster on one thread, above all on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quota.nn import quantize_rtn
from tests.models import tiny_llava


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model():
    return quantize_rtn(tiny_llava())
