"""LLaVA with a DINOv2 tower, beyond the contract: what it refuses, calibrated, loaded, pruned, and in the engine
against generate.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import quota
from quota.calib import run as calibration
from quota.calib.settings import Settings
from quota.core.checkpoint import MODULES
from quota.core.errors import CheckpointError
from quota.models import find_family, submodule
from quota.models.config import read_config
from quota.models.llava_dinov2 import LlavaDinov2, UnusedDinov2Layer
from quota.models.quantize import quantized_linears
from quota.models.rtn import quantize_rtn
from quota.runtime.patch import patched
from tests.calib.calibration import float_folder, picture_samples
from tests.engine.asking import asked, engine, generated, picture, prompt, recipes, run, tokens
from tests.tiny import llava_inputs, tiny_dinov2, tiny_llava

QUICK = Settings(steps=2, evaluate_every=1, batch=2, search_rows=64, held_out=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return float_folder(tmp_path_factory.mktemp("float") / "model", tiny_dinov2)


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    calibration.calibrate(folder, picture_samples(), out=out, progress=False, settings=QUICK)
    return quota.load(out)


def test_layout():
    family = find_family(tiny_dinov2())
    assert type(family) is LlavaDinov2 and family.name == "llava" and type(find_family(tiny_llava())) is not LlavaDinov2
    assert (family.visual_tokens, family.vision_layers_used, family.vision_layers_total) == (16, 2, 3)
    assert family.dims["vision"] == [32, 64, 3, 2, 56, 14] and family.dims["tower"] == "dinov2"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("use_swiglu_ffn", True, "use_swiglu_ffn: expected false"),
        ("mlp_ratio", "four", "mlp_ratio: expected a number"),
        ("mlp_ratio", 1e9, "mlp_ratio: expected a number"),
        ("model_type", "siglip_vision_model", "got llava with 'siglip_vision_model'"),
    ],
)
def test_other_towers_are_refused(folder, tmp_path, field, value, reason):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    data = json.loads(path.read_text())
    data["vision_config"][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=reason):
        read_config(tmp_path / "copy")


@torch.no_grad()
def test_the_layer_that_feeds_nothing_is_not_computed():
    model, inputs = quantize_rtn(tiny_dinov2()), llava_inputs(tiny_dinov2())
    wanted = model(**inputs).logits
    last = model.model.vision_tower.encoder.layer[-1]
    assert isinstance(last, UnusedDinov2Layer)
    last.mlp.fc1.weight.fill_(float("nan"))
    assert torch.equal(model(**inputs).logits, wanted)


@torch.no_grad()
def test_layer_scale_stays_beside_the_quantized_projections():
    model, inputs = tiny_dinov2(), llava_inputs(tiny_dinov2())
    family = find_family(model)
    wanted = torch.stack(family.encode(model, family.images(inputs)))
    quantize_rtn(model, ("vision",))
    assert set(quantized_linears(model)) == {f"{path}.{group.name}" for path, group in family.group_paths(("vision",))}

    def distance():
        got = torch.stack(family.encode(model, family.images(inputs)))
        return float((got - wanted).norm() / wanted.norm())

    rounded = distance()
    for path in family.blocks("vision"):  # what the tower would be with others
        submodule(model, path).layer_scale1.lambda1.neg_()
        submodule(model, path).layer_scale2.lambda1.neg_()
    assert 0 < rounded < 0.6 * distance(), (rounded, distance())


def test_calibrated_it_holds_every_module(calibrated):
    family = find_family(calibrated)
    assert type(family) is LlavaDinov2
    assert set(quantized_linears(calibrated)) == {f"{path}.{group.name}" for path, group in family.group_paths(MODULES)}
    assert calibrated.lm_head.weight.data_ptr() == calibrated.model.language_model.embed_tokens.weight.data_ptr()
    scale = submodule(calibrated, family.blocks("vision")[0]).layer_scale1.lambda1
    assert torch.equal(scale.float(), tiny_dinov2().model.vision_tower.encoder.layer[0].layer_scale1.lambda1)


@pytest.mark.parametrize("recipe", [None, "pruned"])
@pytest.mark.parametrize("kind", ["rtn", "calibrated"])
def test_the_engine_agrees_with_generate(kind, recipe, request):
    model = quantize_rtn(tiny_dinov2()) if kind == "rtn" else request.getfixturevalue("calibrated")
    a, b = picture(1), picture(2)
    cases = {"one": prompt(model, 3, a, 5, seed=2), "two": prompt(model, 2, a, 3, b, 6, seed=4)}
    if kind == "calibrated":  # the scenes' vocabulary is smaller, and its image token another
        visual = model.config.image_token_id
        for case in cases.values():
            case.ids[:] = [visual if i == 120 else i % 60 + 5 for i in case.ids]
    want = {}
    for name, case in cases.items():
        if recipe is None:
            want[name] = generated(model, case)
        else:
            with patched(model, recipes(model)[recipe]):
                want[name] = generated(model, case)
    together = run(engine(model, default=recipe), [asked(name, case) for name, case in cases.items()])
    assert {name: tokens(out) for name, out in together.items()} == want


@torch.no_grad()
def test_rows_alone_and_in_a_batch():
    model, inputs = quantize_rtn(tiny_dinov2()), llava_inputs(tiny_dinov2(), rows=((3, 5), (3, 5)))
    together = model(**inputs).logits
    for row in range(2):
        assert torch.equal(
            model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits[0], together[row]
        )
