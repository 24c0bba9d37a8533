"""A tiny quantized model."""

from __future__ import annotations

import pytest

from quota.models.rtn import quantize_rtn
from tests.one_thread import one_thread
from tests.tiny import tiny_llava

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def model():
    return quantize_rtn(tiny_llava())
