"""Families that show an image in tiles, beyond the contract: published names, calibrated, pruned and served."""

from __future__ import annotations

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open

import quota
from quota.calib import run as calibration
from quota.calib.settings import Settings
from quota.core.errors import CheckpointError, UsageError
from quota.core.formats import MODULES
from quota.models import find_family, submodule
from quota.models.config import read_config
from quota.models.images import ImageInput
from quota.models.quantize import quantized_linears
from quota.models.rtn import quantize_rtn
from quota.prune.budget import image_sizes, tile_sizes
from quota.runtime.engine import Prompt, Request
from quota.runtime.llm import LLM
from quota.runtime.patch import patched
from tests.calib.calibration import assert_stream_keeps, mixed_samples, selected, tiled_folder
from tests.engine.asking import asked, engine, generated, prompt, recipes, run, tokens
from tests.prune.recipes import recipe_for
from tests.tiled import tile_inputs, tiles_of, tiny_internvl
from tests.tiny import IMAGE_TOKEN, TILED, TINY

QUICK = Settings(steps=2, evaluate_every=1, batch=2, search_rows=64, held_out=1)
SIZES = ((60, 44), (200, 9), (9, 200), (1, 1), (300, 220))  # width, height; a thread of an image both ways
CASES = (("what color is the star ?", (0,)), ("how many rows are there ?", (1, 3)), ("what is red ?", ()))


@pytest.fixture(scope="module", params=TILED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return tiled_folder(tmp_path_factory.mktemp("float") / "model", name)


@pytest.fixture(scope="module")
def model(folder):
    return quota.load(folder)


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    calibration.calibrate(folder, samples(), out=out, progress=False, settings=QUICK)
    return quota.load(out)


def samples():
    return mixed_samples(((60, 44), None, (20, 20), (16, 80)))


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(*size) for size in SIZES]


def inputs_of(model, text, shown):
    marks = f"{model.processor.image_token} \n" * len(shown)
    return model.processor(text=[f"USER: {marks}{text} ASSISTANT:"], images=shown or None, return_tensors="pt")


# what is loaded and what is not


@pytest.mark.parametrize(
    ("name", "field", "value", "reason"),
    [
        (
            "llava_next",
            "vision_feature_select_strategy",
            "full",
            "vision_feature_select_strategy: expected what leaves",
        ),
        ("llava_next", "image_grid_pinpoints", [[28, 30]], "image_grid_pinpoints: expected pairs of multiples of 28"),
        ("llava_next", "image_grid_pinpoints", [], "image_grid_pinpoints: expected"),
        ("llava_next", "text_config.sliding_window", 64, "sliding_window: expected null, got 64"),
        ("llava_next", "vision_feature_layer", [-2, -1], "vision_feature_layer: expected one integer"),
        ("llava_onevision", "vision_aspect_ratio", "anyres", "vision_aspect_ratio: expected anyres_max_N"),
        ("llava_onevision", "vision_feature_select_strategy", "default", "expected full, got default"),
        ("internvl", "vision_feature_select_strategy", "full", "expected default, true and one over a divisor"),
        ("internvl", "downsample_ratio", 0.3, "expected default, true and one over a divisor of 4"),
        ("internvl", "vision_config.use_mean_pooling", False, "expected default, true"),
        ("internvl", "vision_config.image_size", (28, 56), "expected squares, got (28, 56)"),
        ("internvl", "text_config.attention_bias", True, "attention_bias: expected false"),
    ],
)
def test_what_is_refused(name, field, value, reason):
    config = copy.deepcopy(TINY[name][0]().config)
    part, _, leaf = field.rpartition(".")
    setattr(getattr(config, part) if part else config, leaf, value)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        find_family(config)


@pytest.mark.parametrize("kind", ["internvl_chat", "llava_next_video", "qwen3_moe"])
def test_other_kinds_are_named(kind, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(CheckpointError, match=f"model_type: .*internvl.* got '{kind}'"):
        read_config(tmp_path)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_published_names(name, prefix):
    """Of transformers 4, where the decoder is a whole model of its own, and later ones."""
    family = find_family(TINY[name][0]())
    inner = "vision_tower.vision_model." if name != "internvl" else "vision_tower."
    for key in TINY[name][0]().state_dict():
        stored = key.replace("model.vision_tower.", f"{prefix}{inner}")
        stored = stored.replace("model.language_model.", f"{prefix}language_model.{'' if prefix else 'model.'}")
        stored = stored.replace("lm_head.", "lm_head." if prefix else "language_model.lm_head.")
        stored = re.sub(r"^model\.(multi_modal_projector|image_newline)", rf"{prefix}\1", stored)
        assert family.canonical_key(stored) == key == family.canonical_key(key)


def test_saved_checkpoints_have_known_names(name, folder):
    family = find_family(TINY[name][0]())
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {family.canonical_key(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    assert set(TINY[name][0]().state_dict()) - stored <= {"lm_head.weight"}


@torch.no_grad()
def test_loaded_float_it_answers_as_transformers(name, model, folder):
    """And our own encoding, which the engine and calibration take, is what upstream puts in the place of the images."""
    family = find_family(model)
    theirs = getattr(transformers, family.model_class).from_pretrained(folder).eval()
    for text, numbers in CASES:
        inputs = inputs_of(model, text, [PICTURES[i] for i in numbers])
        torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
        answers = [m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (model, theirs)]
        assert torch.equal(*answers)
        if numbers:
            more = {key: inputs[key] for key in ("image_sizes", "batch_num_images") if key in inputs}
            wanted = theirs.model.get_image_features(inputs["pixel_values"], return_dict=True, **more).pooler_output
            wanted = torch.cat(list(wanted)) if name != "internvl" else wanted.flatten(0, 1)
            torch.testing.assert_close(
                torch.cat(family.encode(model, family.images(inputs))), wanted, rtol=1e-5, atol=1e-5
            )


# where tokens lie


def test_a_prompt_of_the_processor_is_understood(name, model):
    """Images of any shape: counted, told apart where they stand side by side, and not taken for others."""
    family = find_family(model)
    given = [inputs_of(model, "what", [image]) for image in PICTURES]
    images = [family.images(one)[0] for one in given]
    for image, one in zip(images, given, strict=True):
        assert family.image_tokens(image) == int((one["input_ids"] == family.image_token_id).sum())
        index = family.image_index(one["input_ids"], [image.grid])
        rasters = [raster.grid for raster in family.shown(image)]
        assert tile_sizes(index) == [[[rows * columns for rows, columns in rasters]]]
        assert image_sizes(index) == [[sum(map(int, index.visual[0]))]]
        assert len(family.pictures(PICTURES[0], image)) == len(rasters)
    if name != "internvl":  # its images have markers
        sizes = [family.image_tokens(image) for image in images]
        ids = torch.tensor(
            [
                [family.image_token_id] * sum(sizes[:2]),
                [7] * (sum(sizes[:2]) - sizes[2]) + [family.image_token_id] * sizes[2],
            ]
        )
        index = family.image_index(ids, [image.grid for image in images[:3]])
        assert index.image[0].bincount().tolist() == sizes[:2] and int((index.image[1] == 0).sum()) == sizes[2]
        twice = family.image_index(ids.repeat_interleave(2, 0), [image.grid for image in images[:3]])
        assert all(torch.equal(part.repeat_interleave(2, 0), both) for part, both in zip(index, twice, strict=True))
        unknown = family.image_index(ids, [images[0].grid])
        assert torch.equal(unknown.image, unknown.tile) and int(unknown.image.max()) == 0


@pytest.mark.parametrize("name", ["llava_onevision"], indirect=True)
def test_images_of_one_prompt_have_a_tile_each(model):
    family = find_family(model)
    mark = f"{model.processor.image_token} \n"
    both = model.processor(
        text=[f"USER: {mark}what ASSISTANT:", f"USER: {mark * 2}what ASSISTANT:"],
        images=PICTURES[:3],
        padding=True,
        return_tensors="pt",
    )
    assert both["batch_num_images"].tolist() == [1, 2]
    assert [image.grid[0] for image in family.images(both)] == [5, 1, 1]
    with torch.no_grad():
        assert model(**both).logits.isfinite().all()


@pytest.mark.parametrize("name", ["internvl"], indirect=True)
def test_tiles_are_drawn_where_the_processor_cut_them(model):
    """Each tile is a part of the image, row by row, and the whole image is behind them."""
    family, wide = find_family(model), Image.new("RGB", (112, 28))
    for number in range(4):
        wide.paste((60 * number + 10, 0, 0), (28 * number, 0, 28 * number + 28, 28))
    given = family.images(inputs_of(model, "what", [wide]))[0]
    parts = family.pictures(wide, given)
    assert [part.getpixel((14, 14))[0] for part in parts[:4]] == [10, 70, 130, 190]
    shades = given.pixels[:4, 0].mean((1, 2))
    assert parts[4] is wide and torch.equal(shades, shades.sort().values)


@torch.no_grad()
@pytest.mark.parametrize("reference", ["recorded", "per_image", "per_tile"])
def test_budgets_are_of_the_sets_that_the_recipe_names(name, reference):
    """Newlines are never dropped."""
    model = TINY[name][0]()
    family, inputs = find_family(model), tile_inputs(model, rows=((1, ((56, 50), (20, 100)), 3),))
    index = family.image_index(inputs["input_ids"], [image.grid for image in family.images(inputs)])
    ends = (index.image >= 0) & ~index.visual
    with patched(model, recipe_for(model, (1,), (0.3,), reference=reference, reference_tokens=20)) as handle:
        model(**inputs)
        kept = handle.kept[1]
    assert bool(kept[ends].all()) and bool(ends.any()) == (name != "internvl")
    images, tiles = image_sizes(index)[0], tile_sizes(index)[0]
    found = [int((kept & (index.image == i) & index.visual).sum()) for i in range(2)]
    each = [[int((kept & (index.tile == t)).sum()) for t in range(int(index.tile.max()) + 1)]]
    if reference == "recorded":
        assert sum(found) == 12
    elif reference == "per_image":
        assert found == [-(-3 * n // 10) for n in images]
    else:
        assert each[0] == [-(-3 * n // 10) for own in tiles for n in own]


@torch.no_grad()
def test_features_alone_need_the_sizes_of_their_images(name):
    """Where lines end is known of features that the model made under the recipe."""
    model = TINY[name][0]()
    inputs = tile_inputs(model)
    words = {key: inputs.pop(key) for key in ("input_ids", "attention_mask")}
    before = model.model.get_image_features(**inputs, return_dict=True)
    with patched(model, recipe_for(model, (1,), (0.3,), reference="per_tile")) as handle:
        wanted = model(**words, **inputs).logits
        seen = model.model.get_image_features(**inputs, return_dict=True)
        assert torch.equal(model(**words, mm_encoder_outputs={"image": seen}).logits, wanted)
        if name != "internvl":  # its markers tell
            with pytest.raises(UsageError, match="mm_encoder_outputs: expected features"):
                model(**words, mm_encoder_outputs={"image": before})
        assert handle.kept[1].any()
    assert "get_image_features" not in model.model.__dict__


def test_a_cap_counts_all_tiles_of_an_image(name):
    model = quantize_rtn(TINY[name][0]())
    made = engine(model)
    case = prompt(model, 3, tiles_of(model, 56, 50), 4)
    tiles = len(made.model.image_shown(case.images[0]))
    for cap in (tiles, 11):
        request = Request("a", case, keep_tokens=cap)
        recipe = made.recipes.of(request, tile_sizes(made.model.image_index(case))[0])
        own = [-(-round(recipe.final_keep * 1e6) * n // 10**6) for n in tile_sizes(made.model.image_index(case))[0][0]]
        assert recipe.reference == "per_tile" and tiles <= sum(own) <= cap
    with pytest.raises(UsageError, match=f"keep_tokens: expected at least {tiles}, one for each tile"):
        made.submit(Request("b", case, keep_tokens=1))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda image: ImageInput(image.pixels),
        lambda image: ImageInput(image.pixels[:-1], image.grid),
        lambda image: ImageInput(image.pixels[..., :-1], image.grid),
        lambda image: ImageInput(image.pixels, (0, *image.grid[1:])),
    ],
)
def test_what_is_no_image_is_refused(name, wrong):
    model = TINY[name][0]()
    with pytest.raises(UsageError, match="image: expected"):
        find_family(model).image_tokens(wrong(tiles_of(model, 56, 50)))


# calibrated


def test_calibrated_it_holds_every_module(calibrated):
    family = find_family(calibrated)
    assert set(quantized_linears(calibrated)) == {f"{path}.{group.name}" for path, group in family.group_paths(MODULES)}
    reported = [block["name"] for block in calibrated.quota_manifest.calibration["report"]]
    assert reported == [path for part in ("vision", "projector", "decoder") for path in family.blocks(part)]


@pytest.mark.parametrize("name", ["internvl"], indirect=True)
def test_calibrated_it_keeps_layer_scale_and_norms(calibrated):
    block = submodule(calibrated, find_family(calibrated).blocks("vision")[0])
    original = tiny_internvl().model.vision_tower.encoder.layer[0]
    assert torch.equal(block.lambda_1, original.lambda_1) and torch.equal(block.lambda_2, original.lambda_2)
    assert torch.equal(block.attention.q_norm.weight, original.attention.q_norm.weight)


def test_it_opens_through_transformers_own_door(calibrated):
    inputs = inputs_of(calibrated, "what color is the star ?", PICTURES[:1])
    again = getattr(transformers, find_family(calibrated).model_class).from_pretrained(calibrated.name_or_path).eval()
    answers = [m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (calibrated, again)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("recipe", [None, "pruned"])
def test_calibrated_it_serves_what_generate_answers(calibrated, recipe):
    """Prompts of the processor: an image, two, none."""
    family, cases, want = find_family(calibrated), {}, {}
    for number, (text, shown) in enumerate(CASES):
        inputs = inputs_of(calibrated, text, [PICTURES[i] for i in shown])
        cases[str(number)] = Prompt(inputs["input_ids"][0].tolist(), family.images(inputs))
        if recipe is None:
            out = calibrated.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        else:
            with patched(calibrated, recipes(calibrated)[recipe]):
                out = calibrated.generate(
                    **inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
                )
        want[str(number)] = out[0, inputs["input_ids"].shape[1] :].tolist()
    made = engine(calibrated, default=recipe, step_tokens=7)
    together = run(made, [asked(number, case) for number, case in cases.items()])
    assert {number: tokens(out) for number, out in together.items()} == want


def test_a_later_turn_keeps_the_first_choice(calibrated):
    """A conversation whose image came first: what chooses is the part of the prompt up to the first answer."""
    llm = LLM(calibrated, recipe=recipes(calibrated)["pruned"])
    turn = {
        "role": "user",
        "content": [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "what color"}],
    }
    turns, images = [turn], [PICTURES[0]]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the star ?"}]}]
    first = llm.prompts.chat(parts, images)
    answered = [*parts, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}, user("how many rows ?")]
    second = llm.prompts.chat(answered, images)
    assert first.selection_tokens is None and second.selection_tokens == len(first.ids)
    assert list(second.ids[: len(first.ids)]) == list(first.ids)
    answers = (
        llm.chat(turns),
        llm.chat([turn, {"role": "assistant", "content": "red"}, {"role": "user", "content": "and"}]),
    )
    assert answers[1].usage.visual_by_layer == answers[0].usage.visual_by_layer


def user(text):
    return {"role": "user", "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize(
    ("name", "method"), [("llava_next", "gptq"), ("llava_onevision", "gptq"), ("internvl", "awq")], indirect=["name"]
)
def test_weights_alone(folder, tmp_path, method):
    settings = Settings(method=method, batch=2, held_out=1, scheme="w4a16kv4")
    calibration.calibrate(folder, samples(), out=tmp_path / "out", progress=False, settings=settings)
    model = quota.load(tmp_path / "out")
    inputs = inputs_of(model, "what color is the star ?", PICTURES[:1])
    case = Prompt(inputs["input_ids"][0].tolist(), find_family(model).images(inputs))
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    made = run(engine(model, default=None), [asked("a", case)])["a"]
    assert tokens(made) == out[0, inputs["input_ids"].shape[1] :].tolist()


PLANS = {
    "per tile": {"reference": "per_tile", "position_policy": "compact"},
    "places and content": {
        "reference": "recorded",
        **selected({"score": "random", "policy": "grid"}, {"score": "text", "policy": "mmr"}, candidates=(0, 2)),
    },
}


@pytest.mark.parametrize("plan", PLANS)
def test_pruned_stream_keeps_what_the_pruner_keeps(folder, tmp_path, plan):
    assert_stream_keeps(folder, samples(), tmp_path, PLANS[plan])


# InternVL without norms of queries and keys, Qwen2


def test_the_other_kind_of_internvl():
    made = partial(tiny_internvl, decoder="qwen2", qk_norm=False)
    model, float_model = quantize_rtn(made(), ("vision", "projector")), made()
    family, inputs = find_family(model), tile_inputs(float_model)
    images = family.images(inputs)
    with torch.no_grad():
        wanted, got = (torch.cat(family.encode(m, images)) for m in (float_model, model))
    assert 0 < float((got - wanted).norm() / wanted.norm()) < 0.6
    quantize_rtn(model, ("llm",))
    assert family.head_norms == frozenset() and generated(model, prompt(model, 3, images[0], 2))
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == sum(map(family.image_tokens, images))
