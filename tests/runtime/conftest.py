from __future__ import annotations

import pytest

from quota.models.rtn import quantize_rtn
from tests.one_thread import one_thread
from tests.prune.recipes import recipe_for
from tests.runtime.calls import CASES, PAIRS, RECIPES, TINY

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def built():
    made = {}
    for family, (model, _) in TINY.items():
        made[family, "float"] = model()
        made[family, "quantized"] = quantize_rtn(model(**({"key_bias": 40.0} if family == "qwen2_5_vl" else {})))
    return made


@pytest.fixture(params=CASES, ids=" ".join)
def model(request, built):
    return built[request.param]


@pytest.fixture(params=PAIRS, ids=lambda found: " ".join((*found[0], found[1])))
def pair(request, built):
    """(model, recipe)."""
    case, name = request.param
    model = built[case]
    return model, recipe_for(model, **RECIPES[name])
