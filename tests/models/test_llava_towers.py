"""LLaVA with a DINOv2 or a SigLIP tower, beyond the contract: what is refused, calibrated, loaded, pruned, and in the
engine against generate.
"""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import quota
from quota.calib import run as calibration
from quota.calib.settings import Settings
from quota.core.checkpoint import MODULES
from quota.core.errors import CheckpointError
from quota.models import find_family, submodule
from quota.models.config import read_config
from quota.models.llava import Llava
from quota.models.llava_dinov2 import LlavaDinov2, UnusedDinov2Layer
from quota.models.llava_siglip import LlavaSiglip, UnusedSiglipLayer
from quota.models.quantize import quantized_linears
from quota.models.rtn import quantize_rtn
from quota.runtime.patch import patched
from tests.calib.calibration import float_folder, picture_samples
from tests.engine.asking import asked, engine, generated, picture, pixels_of, prompt, recipes, run, tokens
from tests.tiny import llava_inputs, tiny_dinov2, tiny_llava, tiny_siglip

QUICK = Settings(steps=2, evaluate_every=1, batch=2, search_rows=64, held_out=1)
TOWERS = {"dinov2": (tiny_dinov2, LlavaDinov2), "siglip": (tiny_siglip, LlavaSiglip)}


@pytest.fixture(scope="module", params=TOWERS)
def tower(request):
    return request.param


@pytest.fixture(scope="module")
def tiny(tower):
    return TOWERS[tower][0]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return float_folder(tmp_path_factory.mktemp("float") / "model", tiny)


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    calibration.calibrate(folder, picture_samples(), out=out, progress=False, settings=QUICK)
    return quota.load(out)


def test_a_tower_decides_the_class():
    found = {tower: find_family(tiny()) for tower, (tiny, _) in TOWERS.items()}
    assert {tower: type(family) for tower, family in found.items()} == {name: row[1] for name, row in TOWERS.items()}
    assert type(find_family(tiny_llava())) is Llava and {family.name for family in found.values()} == {"llava"}
    used = {tower: (f.vision_layers_used, f.vision_layers_total) for tower, f in found.items()}
    assert used == {"dinov2": (2, 3), "siglip": (2, 2)} and {f.visual_tokens for f in found.values()} == {16}
    assert found["dinov2"].dims["vision"] == [32, 64, 3, 2, 56, 14] and found["siglip"].tower_rows(None) == 16
    assert {f.dims["tower"] for f in found.values()} == {"dinov2", "siglip_vision_model"}


@pytest.mark.parametrize(
    ("tower", "field", "value", "reason"),
    [
        ("dinov2", "vision_config.use_swiglu_ffn", True, "use_swiglu_ffn: expected false"),
        ("dinov2", "vision_config.mlp_ratio", "four", "mlp_ratio: expected a number"),
        ("dinov2", "vision_config.mlp_ratio", 1e9, "mlp_ratio: expected a number"),
        ("dinov2", "vision_config.model_type", "siglip2_vision_model", "got llava with 'siglip2_vision_model'"),
        ("siglip", "vision_feature_select_strategy", "default", "vision_feature_select_strategy: expected full"),
        ("siglip", "text_config.use_sliding_window", True, "use_sliding_window: expected false"),
    ],
    indirect=["tower"],
)
def test_other_towers_are_refused(folder, tmp_path, field, value, reason):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    data = json.loads(path.read_text())
    part, _, name = field.rpartition(".")
    (data[part] if part else data)[name] = value
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=reason):
        read_config(tmp_path / "copy")


@torch.no_grad()
@pytest.mark.parametrize(
    ("made", "unused"),
    [(tiny_dinov2, UnusedDinov2Layer), (partial(tiny_siglip, feature=-2, vision_layers=3), UnusedSiglipLayer)],
)
def test_the_layer_that_feeds_nothing_is_not_computed(made, unused):
    model, inputs = quantize_rtn(made()), llava_inputs(made())
    wanted = model(**inputs).logits
    encoder = model.model.vision_tower.encoder
    last = getattr(encoder, "layer", None) or encoder.layers
    assert isinstance(last[-1], unused)
    last[-1].mlp.fc1.weight.fill_(float("nan"))
    assert torch.equal(model(**inputs).logits, wanted)


@torch.no_grad()
def test_the_pooling_head_of_siglip_is_not_computed():
    model, inputs = quantize_rtn(tiny_siglip(decoder="llama")), llava_inputs(tiny_siglip())
    model.model.vision_tower.head.probe.fill_(float("nan"))
    assert model.model.vision_tower(inputs["pixel_values"]).pooler_output is None
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("prefix", ["", "model."])
def test_published_names(tiny, prefix):
    """LLaVA's checkpoints of transformers 4 hold the tower below `vision_tower.vision_model`, the decoder below
    `language_model.model`; later ones have `model.` before both."""
    family = find_family(tiny())
    for name in tiny().state_dict():
        stored = name.replace("model.vision_tower.", f"{prefix}vision_tower.vision_model.")
        stored = stored.replace("model.language_model.", f"{prefix}language_model.model.")
        stored = stored.replace("lm_head.", "language_model.lm_head." if not prefix else "lm_head.")
        stored = stored.replace("model.multi_modal_projector.", f"{prefix}multi_modal_projector.")
        assert family.canonical_key(stored) == name


@torch.no_grad()
def test_loaded_float_it_answers_as_transformers(tiny, folder):
    """Several images of a row, an image in a later turn, a row of text alone."""
    mine, theirs = quota.load(folder), LlavaForConditionalGeneration.from_pretrained(folder).eval()
    visual = theirs.config.image_token_id
    a, b = picture(1), picture(2)
    for case in (prompt(mine, 3, a, 5), prompt(mine, 2, a, 3, b, 6), prompt(mine, 9)):
        case.ids[:] = [visual if i == 120 else i % 60 + 5 for i in case.ids]
        inputs = {"input_ids": torch.tensor([list(case.ids)]), **pixels_of(mine, case)}
        torch.testing.assert_close(mine(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
        assert generated(mine, case) == generated(theirs, case)


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


def test_calibrated_it_holds_every_module(calibrated, tower):
    family = find_family(calibrated)
    assert type(family) is TOWERS[tower][1]
    assert set(quantized_linears(calibrated)) == {f"{path}.{group.name}" for path, group in family.group_paths(MODULES)}


@pytest.mark.parametrize("tower", ["dinov2"], indirect=True)
def test_calibrated_it_keeps_layer_scale_and_tied_words(calibrated):
    family = find_family(calibrated)
    assert calibrated.lm_head.weight.data_ptr() == calibrated.model.language_model.embed_tokens.weight.data_ptr()
    scale = submodule(calibrated, family.blocks("vision")[0]).layer_scale1.lambda1
    assert torch.equal(scale.float(), tiny_dinov2().model.vision_tower.encoder.layer[0].layer_scale1.lambda1)


@pytest.mark.parametrize("recipe", [None, "pruned"])
@pytest.mark.parametrize("kind", ["rtn", "calibrated"])
def test_the_engine_agrees_with_generate(tiny, kind, recipe, request):
    model = quantize_rtn(tiny()) if kind == "rtn" else request.getfixturevalue("calibrated")
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
def test_rows_alone_and_in_a_batch(tiny):
    model, inputs = quantize_rtn(tiny()), llava_inputs(tiny(), rows=((3, 5), (3, 5)))
    together = model(**inputs).logits
    for row in range(2):
        assert torch.equal(
            model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits[0], together[row]
        )
