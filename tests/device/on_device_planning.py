"""What recipes are made from, measured on the fake device: float model and quantized model, whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quota.calib.samples import Sample, Samples
from quota.core.formats import MODULES
from quota.models.rtn import quantize_rtn
from quota.planning.profile import profile
from quota.planning.request import measure_search, recipe_context
from quota.scenes.model import build_config, build_model, build_processor
from tests.calib.test_samples import picture
from tests.device.fake import NAME, fake_device


@pytest.fixture(autouse=True)
def one_arithmetic():
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="module")
def models():
    model = build_model(build_config(56, width=64, layers=2)).eval()
    return model, quantize_rtn(copy.deepcopy(model), MODULES).eval()


@pytest.fixture(scope="module")
def samples():
    return Samples.of([Sample("s", "what color is the star ?", picture(0, (70, 60)))])


def on_device(*models):
    return [copy.deepcopy(model).to(NAME) for model in models]


def test_the_profile_is_the_cpu_s(models, samples, monkeypatch):
    here = profile(*models, build_processor(56), samples)
    with fake_device(monkeypatch):
        there = profile(*on_device(*models), build_processor(56), samples)
    assert there.dumps() == here.dumps()


@pytest.mark.parametrize(("method", "which"), [("vtw", 0), ("fitprune", 1)])
def test_searches_are_the_cpu_s(models, samples, monkeypatch, method, which):
    model, processor = models[which], build_processor(56)
    here, facts = (
        measure_search(method, model, processor, samples, quiet=True),
        recipe_context(model, processor, samples),
    )
    with fake_device(monkeypatch):
        (moved,) = on_device(model)
        there = measure_search(method, moved, processor, samples, quiet=True)
        assert recipe_context(moved, processor, samples) == facts
    for one, other in zip(here.attention or (), there.attention or (), strict=True):
        torch.testing.assert_close(torch.from_numpy(one.cross), torch.from_numpy(other.cross))
        torch.testing.assert_close(torch.from_numpy(one.self_), torch.from_numpy(other.self_))
    assert there.withdrawal == pytest.approx(here.withdrawal)
    assert here.attention or here.withdrawal
