"""LLaVA and Mistral-Small-3 with a Pixtral tower, beyond the contract: loaded by published names, images told apart by
their end tokens, calibrated, pruned and served."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import quota
from quota.calib import run as calibration
from quota.calib.settings import Settings
from quota.core.errors import CheckpointError, UsageError
from quota.core.formats import MODULES
from quota.models import find_family
from quota.models.config import read_config
from quota.models.images import ImageInput
from quota.models.quantize import quantized_linears
from quota.models.rtn import quantize_rtn
from quota.runtime.engine.model import EngineModel
from quota.runtime.export import _hub as exported_name
from quota.runtime.prompts import PromptBuilder
from tests.calib.calibration import mixed_samples, pixtral_folder
from tests.engine.asking import (
    asked,
    assert_serves_as_generate,
    engine,
    generated,
    pixels_of,
    pixtral_prompt,
    run,
    sized,
    tokens,
)
from tests.pixtral import PIXTRAL_BREAK, PIXTRAL_END, pixtral_ids, tiny_mistral3, tiny_pixtral
from tests.tiny import IMAGE_TOKEN

QUICK = Settings(steps=2, evaluate_every=1, batch=2, search_rows=64, held_out=1)
MODELS = {"llava_pixtral": tiny_pixtral, "mistral3": tiny_mistral3}


@pytest.fixture(scope="module", params=MODELS)
def tiny(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return pixtral_folder(tmp_path_factory.mktemp("float") / "model", tiny)


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    calibration.calibrate(folder, mixed_samples(), out=out, progress=False, settings=QUICK)
    return quota.load(out)


def prompts(model):
    """Prompts of the scenes' vocabulary: images of several sizes, an image in a later turn, text alone."""
    a, b, c = sized(model, 8, 8, 1), sized(model, 4, 6, 2), sized(model, 2, 14, 3)
    made = [
        pixtral_prompt(model, 3, a, 5, seed=2),
        pixtral_prompt(model, 2, b, c, 3, a, 6, seed=4),
        pixtral_prompt(model, 9, seed=1),
    ]
    first = model.processor.image_token_id
    marks = {IMAGE_TOKEN: first, PIXTRAL_BREAK: first + 1, PIXTRAL_END: first + 2}
    for case in made:
        case.ids[:] = [marks.get(i, i % 60 + 5) for i in case.ids]
    return made


def changed(folder, to, field, value):
    shutil.copytree(folder, to)
    path = to / "config.json"
    data = json.loads(path.read_text())
    part, _, name = field.rpartition(".")
    (data[part] if part else data)[name] = value
    path.write_text(json.dumps(data))
    return to


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("text_config.sliding_window", 4096, "sliding_window: expected null, got 4096"),
        ("vision_config.patch_size", [4, 4], "patch_size: expected a whole number"),
        ("vision_config.hidden_act", "none", "hidden_act: expected an activation"),
        ("vision_feature_layer", [-1, -2], "vision_feature_layer: expected one integer"),
        ("spatial_merge_size", 0, "spatial_merge_size: expected a whole number"),
        ("text_config.model_type", "llama", "Pixtral vision tower .* with 'pixtral' and 'llama'"),
    ],
)
def test_what_it_is_not_made_for_is_refused(folder, tmp_path, field, value, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_config(changed(folder, tmp_path / "copy", field, value))


def test_a_window_that_a_configuration_leaves_out_is_mistrals_default(folder, tmp_path):
    to = changed(folder, tmp_path / "copy", "text_config.vocab_size", 128)
    data = json.loads((to / "config.json").read_text())
    del data["text_config"]["sliding_window"]
    (to / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="sliding_window: expected null, got 4096"):
        read_config(to)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_published_names(tiny, prefix):
    family = find_family(tiny())
    for name in tiny().state_dict():
        stored = name.replace("model.vision_tower.", f"{prefix}vision_tower.")
        stored = stored.replace("model.language_model.", f"{prefix}language_model.model.")
        stored = stored.replace("lm_head.", "language_model.lm_head." if not prefix else "lm_head.")
        stored = stored.replace("model.multi_modal_projector.", f"{prefix}multi_modal_projector.")
        assert family.canonical_key(stored) == name and (prefix or exported_name(family, name) == stored)


def test_images_side_by_side_are_told_apart_by_the_end_token():
    family, one, two = find_family(tiny_pixtral()), pixtral_ids(2, 3), pixtral_ids(1, 3)
    rows = [[5, *one, *two, *one, 7, *two], [0] * 8 + [5, *two, 7, *two, *one], [0] * 22 + [1, 5, 7, 9]]
    found = family.image_index(torch.tensor(rows)).tile.tolist()
    whole, single = [0, 0, 0, -1, 0, 0, 0, -1], [0, 0, 0, -1]

    def numbered(*images):
        return [i if mark == 0 else -1 for i, image in enumerate(images) for mark in image]

    assert found[0] == [-1, *numbered(whole, single, whole), -1, *[3 if mark == 0 else -1 for mark in single]]
    assert found[1] == [-1] * 9 + numbered(single) + [-1] + [1, 1, 1, -1] + [2 if m == 0 else -1 for m in whole]
    assert found[2] == [-1] * 26
    cut = family.image_index(torch.tensor([[5, *one[:-1]]]))  # no token behind the last one closes anything
    assert cut.tile.tolist() == [[-1, *whole[:-1]]]


@torch.no_grad()
def test_loaded_float_it_answers_as_transformers(folder):
    mine = quota.load(folder)
    theirs = getattr(transformers, find_family(mine).model_class).from_pretrained(folder).eval()
    for case in prompts(mine):
        inputs = {"input_ids": torch.tensor([list(case.ids)]), **pixels_of(mine, case)}
        torch.testing.assert_close(mine(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
        assert generated(mine, case) == generated(theirs, case)


@torch.no_grad()
def test_features_of_an_image_are_those_of_transformers_and_its_own(tiny):
    """Encoded one by one: upstream runs all images as one sequence under a mask. Quantized, an image's neighbours
    change no bit."""
    model = tiny()
    shown = [sized(model, 8, 8, 1), sized(model, 2, 14, 2), sized(model, 2, 2, 3)]
    family, inputs = find_family(model), pixels_of(model, pixtral_prompt(model, *shown))

    def features(given):
        return model.model.get_image_features(**given, return_dict=True).pooler_output

    for got, want in zip(family.encode(model, shown), features(inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    quantize_rtn(model)
    alone = [features(pixels_of(model, pixtral_prompt(model, image)))[0] for image in shown]
    for given in (family.encode(model, shown), features(inputs)):
        assert all(torch.equal(a, b) for a, b in zip(given, alone, strict=True))


@torch.no_grad()
def test_the_layer_that_feeds_nothing_is_not_computed():
    model = quantize_rtn(tiny_pixtral())
    case = pixtral_prompt(model, 3, sized(model, 4, 6), 2)
    wanted, last = generated(model, case), model.model.vision_tower.transformer.layers[-1]
    last.feed_forward.up_proj.weight.fill_(float("nan"))
    assert generated(model, case) == wanted


def test_the_processor_writes_what_the_model_counts(folder):
    """Extreme aspect ratios, images larger and smaller than a token, several of them, against the model's own count."""
    model = quota.load(folder)
    family, processor = find_family(model), model.processor
    noise = np.random.default_rng(0)
    shapes = [(40, 40), (3, 100), (100, 3), (1, 1), (17, 23)]
    shown = [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in shapes]
    text = "what [IMG] and [IMG] is [IMG][IMG] the [IMG] star ?"
    inputs = processor(text=[text], images=shown, return_tensors="pt")
    number, images = family.image_index(inputs["input_ids"]).image[0], family.images(inputs)
    assert [int((number == i).sum()) for i in range(5)] == [family.image_tokens(image) for image in images]
    for i, image in enumerate(images):
        rows, columns = family.shown(image)[0].grid
        marks = "".join("v" if n == i else "." for n in number[number.eq(i).nonzero()[0, 0] :].tolist())
        assert marks.startswith(".".join(["v" * columns] * rows) + ".")
    saved = transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["[IMG_BREAK]", "[IMG_END]"])
    assert saved == [processor.image_break_token_id, processor.image_end_token_id]


@pytest.mark.parametrize("pixels", [torch.zeros(3, 8, 8), torch.zeros(3, 8, 12)])
def test_an_image_that_is_none_of_the_models_is_refused(tiny, pixels):
    family = find_family(tiny())
    with pytest.raises(UsageError, match="expected pixels and their grid"):
        family.image_tokens(ImageInput(pixels))
    with pytest.raises(UsageError, match=re.escape("expected pixels [3, 16, 16] for grid (1, 4, 4)")):
        family.image_tokens(ImageInput(pixels, (1, 4, 4)))
    with pytest.raises(UsageError, match="longer edge"):
        family.evaluation_pixels(None, (16, None))


def test_calibrated_it_holds_every_module(calibrated):
    family = find_family(calibrated)
    assert set(quantized_linears(calibrated)) == {f"{path}.{group.name}" for path, group in family.group_paths(MODULES)}
    reported = [block["name"] for block in calibrated.quota_manifest.calibration["report"]]
    assert reported == [path for part in ("vision", "projector", "decoder") for path in family.blocks(part)]


@pytest.mark.parametrize("recipe", [None, "pruned", "compact"])
def test_calibrated_it_serves_what_generate_answers(calibrated, recipe):
    assert_serves_as_generate(calibrated, prompts(calibrated), recipe)


def test_it_opens_through_transformers_own_door(calibrated):
    case, folder = prompts(calibrated)[1], calibrated.name_or_path
    again = getattr(transformers, find_family(calibrated).model_class).from_pretrained(folder).eval()
    assert generated(again, case) == generated(calibrated, case)


def test_a_later_turn_keeps_the_first_selection(calibrated):
    """The breaks between the rows of an image belong to the prompt of the first turn."""
    builder = PromptBuilder(calibrated.processor, EngineModel(calibrated))
    shown = [Image.new("RGB", (20, 30), (200, 40, 10)), Image.new("RGB", (36, 12), (10, 40, 200))]
    first = [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "what color ?"}]}]
    answer, more = ({"content": [{"type": "text", "text": text}]} for text in ("red", "where ?"))
    later = [*first, {"role": "assistant", **answer}, {"role": "user", **more}]
    asked_first, asked_later = builder.chat(first, shown), builder.chat(later, shown)
    head = len(asked_first.ids)
    assert asked_later.selection_tokens == head and asked_later.ids[:head] == asked_first.ids


@pytest.mark.parametrize(("method", "scheme"), [("awq", "w4a16kv4"), ("gptq", "w4a16")])
def test_weights_alone(folder, tmp_path, method, scheme):
    settings = Settings(method=method, batch=2, held_out=1, scheme=scheme)
    calibration.calibrate(folder, mixed_samples(), out=tmp_path / "out", progress=False, settings=settings)
    model = quota.load(tmp_path / "out")
    case = prompts(model)[1]
    assert tokens(run(engine(model, default=None), [asked("a", case)])["a"]) == generated(model, case)
