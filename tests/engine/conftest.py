"""A tiny quantized model."""

from __future__ import annotations

import pytest

from quota.nn import quantize_rtn
from tests.models import tiny_llava
from tests.one_thread import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def model():
    return quantize_rtn(tiny_llava())
