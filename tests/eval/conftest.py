"""A random LLaVA of the embedded model's form, small enough to answer at once."""

from __future__ import annotations

from typing import Any

import pytest

from quota.scenes.model import build_config, build_model, build_processor


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    """(model, processor): 16 visual tokens, 2 decoder layers, width 64."""
    return build_model(build_config(56, 64, 2)).eval(), build_processor(56)
