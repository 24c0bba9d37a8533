"""A tiny quantized model."""

from __future__ import annotations

import pytest

from tests.engine.asking import mixed_requests, quantized
from tests.one_thread import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def model():
    return quantized("llava")


@pytest.fixture(scope="session")
def mixed():
    """Requests of every kind, and the logits each has alone."""
    return mixed_requests("llava")
