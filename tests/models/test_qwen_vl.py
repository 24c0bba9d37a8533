"""The Qwen-VL families, beyond the contract: loaded by published names, calibrated, pruned and served."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from safetensors import safe_open

import quota
from quota.calib import run as calibration
from quota.calib.settings import Settings
from quota.core.errors import CheckpointError, UsageError
from quota.core.formats import MODULES
from quota.models import find_family
from quota.models.images import ImageInput
from quota.models.quantize import quantized_linears
from quota.models.rtn import quantize_rtn
from quota.runtime.engine import Prompt
from tests.calib.calibration import mixed_samples, qwen_folder
from tests.engine.asking import (
    asked,
    assert_serves_as_generate,
    engine,
    generated,
    patches,
    pixels_of,
    qwen_prompt,
    run,
    tokens,
)
from tests.tiny import IMAGE_TOKEN, TINY

QUICK = Settings(steps=2, evaluate_every=1, batch=2, search_rows=64, held_out=1)
FAMILIES = [name for name, (tiny, _) in TINY.items() if name.startswith("qwen")]
NEW = [name for name in FAMILIES if name != "qwen2_5_vl"]  # that one has files of its own


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return qwen_folder(tmp_path_factory.mktemp("float") / "model", TINY[name][0])


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    calibration.calibrate(folder, mixed_samples(), out=out, progress=False, settings=QUICK)
    return quota.load(out)


def prompts(model):
    """Prompts of the scenes' vocabulary: images of several sizes, an image in a later turn, text alone."""
    a, b, c = patches(8, 8, 1), patches(4, 6, 2), patches(2, 14, 3)
    made = [qwen_prompt(3, a, 5, seed=2), qwen_prompt(2, b, 3, c, 6, seed=4), qwen_prompt(9, seed=1)]
    names = {120: "image_token_id", 122: "vision_start_token_id", 123: "vision_end_token_id"}
    ids = {mark: getattr(model.config, name) for mark, name in names.items()}
    for case in made:
        case.ids[:] = [ids.get(i, i % 60 + 20) for i in case.ids]
    return made


def test_published_names(name):
    """`visual.*` beside `model.*`, or below `model.visual` and `model.language_model`."""
    model = TINY[name][0]()
    family = find_family(model)
    for key in model.state_dict():
        flat = key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        assert family.canonical_key(flat) == key == family.canonical_key(key)


def test_saved_checkpoints_have_known_names(name, folder):
    model = TINY[name][0]()
    family = find_family(model)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {family.canonical_key(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    assert set(model.state_dict()) - stored <= {"lm_head.weight"}


@torch.no_grad()
def test_loaded_float_it_answers_as_transformers(name, folder):
    mine = quota.load(folder)
    theirs = getattr(transformers, find_family(mine).model_class).from_pretrained(folder).eval()
    for case in prompts(mine):
        inputs = {"input_ids": torch.tensor([list(case.ids)]), **pixels_of(mine, case)}
        torch.testing.assert_close(mine(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
        assert generated(mine, case) == generated(theirs, case)
    assert mine.processor.image_token_id == mine.config.image_token_id


@pytest.mark.parametrize("name", NEW, indirect=True)
def test_calibrated_it_holds_every_module(calibrated):
    family = find_family(calibrated)
    assert set(quantized_linears(calibrated)) == {f"{path}.{group.name}" for path, group in family.group_paths(MODULES)}
    reported = [block["name"] for block in calibrated.quota_manifest.calibration["report"]]
    assert reported == [path for part in ("vision", "projector", "decoder") for path in family.blocks(part)]


@pytest.mark.parametrize("name", NEW, indirect=True)
def test_it_opens_through_transformers_own_door(calibrated):
    case, folder = prompts(calibrated)[1], calibrated.name_or_path
    again = getattr(transformers, find_family(calibrated).model_class).from_pretrained(folder).eval()
    assert generated(again, case) == generated(calibrated, case)


@pytest.mark.parametrize("recipe", [None, "pruned", "compact"])
@pytest.mark.parametrize("name", NEW, indirect=True)
def test_calibrated_it_serves_what_generate_answers(calibrated, recipe):
    assert_serves_as_generate(calibrated, prompts(calibrated), recipe)


@pytest.mark.parametrize("name", NEW, indirect=True)
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_weights_alone(folder, tmp_path, method):
    settings = Settings(method=method, batch=2, held_out=1, scheme="w4a16kv4")
    calibration.calibrate(folder, mixed_samples(), out=tmp_path / "out", progress=False, settings=settings)
    model = quota.load(tmp_path / "out")
    case = prompts(model)[1]
    assert tokens(run(engine(model, default=None), [asked("a", case)])["a"]) == generated(model, case)


def test_videos_are_refused(name):
    family, pixels = find_family(TINY[name][0]()), torch.zeros(32, 96)
    with pytest.raises(UsageError, match="videos are not supported"):
        family.image_tokens(ImageInput(pixels, (2, 4, 4)))
    with pytest.raises(CheckpointError, match="videos are not supported"):
        family.tower_input(lambda path: lambda x: torch.zeros(len(x), 32), ImageInput(pixels, (2, 4, 4)))


def test_a_run_of_image_tokens_of_another_length_is_refused(name):
    made = engine(quantize_rtn(TINY[name][0]()))
    with pytest.raises(UsageError, match=re.escape("[4] visual tokens, got [5]")):
        made.submit(asked("a", Prompt([122, *[IMAGE_TOKEN] * 5, 123, 5], [patches(4, 4)])))
