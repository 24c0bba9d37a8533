"""Calibration of a family with planes (`Family.taps`): what goes along with a row is never lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quota.calib import run as calibration
from quota.calib.samples import encode
from quota.calib.settings import Settings
from quota.calib.work import WorkFolder
from quota.models import find_family
from quota.models.processing import open_processor
from quota.runtime.load import load
from quota.runtime.patch import patched
from tests.calib.calibration import killed, mixed_samples, qwen_folder
from tests.prune.recipes import recipe_for
from tests.tiny import tiny_qwen3

QUICK = Settings(method="rtn", batch=2, held_out=1, modules=("llm",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return qwen_folder(tmp_path_factory.mktemp("float") / "model", tiny_qwen3)


@pytest.mark.parametrize("position_policy", [None, "original", "compact"])
@torch.no_grad()
def test_the_float_stream_is_the_model(folder, tmp_path, monkeypatch, position_policy):
    """What the last layer gives, of all tokens and of those that a recipe keeps."""
    model, processor, samples = load(folder), open_processor(folder), mixed_samples()
    recipe = None
    if position_policy is not None:
        recipe = recipe_for(model, reference="per_image", position_policy=position_policy)
    streamed, commit = [], WorkFolder.commit

    def commits(self):
        commit(self)
        streamed[:] = [self.streams["float"].read(item) for item in range(len(self.streams["float"]))]

    monkeypatch.setattr(WorkFolder, "commit", commits)
    calibration.calibrate(folder, samples, out=tmp_path / "out", progress=False, settings=QUICK, recipe=recipe)
    last, seen = find_family(model).decoder_layer(3), []
    model.get_submodule(last).register_forward_hook(lambda module, args, out: seen.append(out[0]))
    for sample, rows in zip(samples, streamed, strict=True):
        inputs = encode(processor, sample, answer=True)
        if recipe is None:
            model(**inputs)
        else:
            with patched(model, recipe):
                model(**inputs)
        torch.testing.assert_close(rows, seen.pop(), rtol=1e-4, atol=1e-4)


def test_a_killed_calibration_goes_on_with_what_goes_along(folder, tmp_path, monkeypatch):
    """Between tower blocks and taps, between projectors, and where planes are added."""

    def calibrate(name):
        settings = replace(QUICK, modules=("projector", "llm"))
        calibration.calibrate(folder, mixed_samples(), out=tmp_path / name, progress=False, settings=settings)

    calibrate("whole")
    for survived in (2, 6, 3):
        killed(monkeypatch, survived, lambda: calibrate("cut"))
    calibrate("cut")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()
