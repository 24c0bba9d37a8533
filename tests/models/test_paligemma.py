"""PaliGemma beyond the contract: what is refused, loaded by published names, calibrated, pruned and served; a prompt
whose tokens see each other is one step, and shares pages with its like alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from PIL import Image

import quota
from quota.calib import run as calibration
from quota.calib.blocks import Batch
from quota.calib.settings import Settings
from quota.calib.stream import FloatSource
from quota.core.errors import CheckpointError
from quota.core.formats import MODULES
from quota.models import find_family
from quota.models.config import read_config
from quota.models.quantize import quantized_linears
from quota.models.rtn import quantize_rtn
from quota.nn.padding import prefix_end
from quota.runtime.engine.model import EngineModel
from quota.runtime.export import _hub as exported_name
from quota.runtime.prompts import PromptBuilder
from tests.calib.calibration import assert_stream_keeps, paligemma_folder, picture_samples, selected
from tests.engine.asking import (
    asked,
    assert_serves_as_generate,
    engine,
    generated,
    picture,
    pixels_of,
    prompt,
    run,
    tokens,
)
from tests.tiny import paligemma_inputs, tiny_paligemma

QUICK = Settings(steps=2, evaluate_every=1, batch=2, search_rows=64, held_out=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return paligemma_folder(tmp_path_factory.mktemp("float") / "model")


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    calibration.calibrate(folder, picture_samples(), out=out, progress=False, settings=QUICK)
    return quota.load(out)


def prompts(model):
    """Prompts of the scenes' vocabulary: one image, several, text alone."""
    a, b = picture(1), picture(2)
    made = [prompt(model, a, 5, seed=2), prompt(model, a, b, 6, seed=4), prompt(model, 9, seed=1)]
    for case in made:
        case.ids[:] = [model.config.image_token_id if i == 120 else i % 60 + 5 for i in case.ids]
    return made


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("text_config.attention_bias", True, "attention_bias: expected false, got True"),
        ("text_config.use_bidirectional_attention", False, "use_bidirectional_attention: expected true, got False"),
        ("text_config.model_type", "gemma2", "sliding_window: expected null, got 4096"),
        ("projection_dim", 32, "projection_dim: expected the decoder's width 64, got 32"),
        ("image_token_index", 128, "image_token_index: expected one of 128 words, got 128"),
    ],
)
def test_what_it_is_not_made_for_is_refused(folder, tmp_path, field, value, reason):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    data = json.loads(path.read_text())
    part, _, name = field.rpartition(".")
    (data[part] if part else data)[name] = value
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=reason):
        read_config(tmp_path / "copy")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_published_names(prefix):
    family = find_family(tiny_paligemma())
    for name in tiny_paligemma().state_dict():
        stored = name.replace("model.vision_tower.", f"{prefix}vision_tower.vision_model.")
        stored = stored.replace("model.language_model.", f"{prefix}language_model.model.")
        stored = stored.replace("model.multi_modal_projector.", f"{prefix}multi_modal_projector.")
        stored = stored.replace("lm_head.", "language_model.lm_head." if not prefix else "lm_head.")
        assert family.canonical_key(stored) == name and (prefix or exported_name(family, name) == stored)


@torch.no_grad()
def test_loaded_float_it_answers_as_transformers(folder):
    mine = quota.load(folder)
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
    for case in prompts(mine):
        inputs = {"input_ids": torch.tensor([list(case.ids)]), **pixels_of(mine, case)}
        torch.testing.assert_close(mine(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
        assert generated(mine, case) == generated(theirs, case)


@torch.no_grad()
def test_norms_of_a_narrow_dtype_keep_the_digits_of_their_weight():
    """1 + w of a bfloat16 w has more digits than bfloat16."""
    model = tiny_paligemma().bfloat16()
    norm = model.model.language_model.layers[0].input_layernorm
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    wanted = norm(x)
    quantize_rtn(model, ("llm",))
    ours = model.model.language_model.layers[0].input_layernorm
    torch.testing.assert_close(ours(x), wanted, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_quantized_prompt_sees_what_a_float_one_sees(implementation):
    """What the first token's output depends on: the last token of the prompt, not the answer."""
    for model in (tiny_paligemma(), quantize_rtn(tiny_paligemma())):
        model.set_attn_implementation(implementation)
        inputs = paligemma_inputs(model)
        kinds = inputs["token_type_ids"].clone()
        kinds[:, -2:] = 1
        wanted = model(**{**inputs, "token_type_ids": kinds}).logits
        for column, seen in ((-3, True), (-2, False), (-1, False)):
            other = inputs["input_ids"].clone()
            other[:, column] += 1
            got = model(**{**inputs, "input_ids": other, "token_type_ids": kinds}).logits
            first = [int(row.argmax()) for row in inputs["attention_mask"]]
            assert [bool((got[r, c] != wanted[r, c]).any()) for r, c in enumerate(first)] == [seen, seen], column


def test_the_prefix_of_a_mask():
    seen = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    additive = torch.zeros(5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert prefix_end(seen[None, None], 5) == prefix_end(additive[None, None], 5) == 4
    assert prefix_end(torch.ones(3, 3).tril().bool()[None, None], 3) == 1
    assert prefix_end(None, 7) == prefix_end(torch.ones(2, 7), 7) == 7


def test_calibrated_it_holds_every_module(calibrated):
    family = find_family(calibrated)
    assert set(quantized_linears(calibrated)) == {f"{path}.{group.name}" for path, group in family.group_paths(MODULES)}
    words = calibrated.model.language_model.embed_tokens
    assert calibrated.lm_head.weight.data_ptr() == words.weight.data_ptr() and float(words.embed_scale) == 8


def test_calibration_looks_at_no_padding(folder):
    block = FloatSource(folder).block("decoder", "model.language_model.layers.0")
    hidden = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    padded, place = torch.cat([hidden, torch.full((1, 4, 64), 9.0)], 1), torch.arange(1, 14)[None]
    alone = block(Batch(hidden, torch.ones(1, 9, dtype=torch.bool), place[:, :9]))
    together = block(Batch(padded, torch.arange(13)[None] < 9, place))
    torch.testing.assert_close(together[:, :9], alone, rtol=1e-5, atol=1e-5)
    shown = block(Batch(padded, torch.ones(1, 13, dtype=torch.bool), place))
    assert (shown[:, 0] - alone[:, 0]).abs().max() > 0.01


@pytest.mark.parametrize("changes", [{}, selected({"score": "own_last_token"}, position_policy="compact")])
def test_the_calibration_drops_what_the_pruner_drops(folder, tmp_path, changes):
    assert_stream_keeps(folder, picture_samples(2), tmp_path, changes)


@pytest.mark.parametrize("recipe", [None, "pruned", "compact"])
def test_calibrated_it_serves_what_generate_answers(calibrated, recipe):
    assert_serves_as_generate(calibrated, prompts(calibrated), recipe)


def test_it_opens_through_transformers_own_door(calibrated):
    case, folder = prompts(calibrated)[1], calibrated.name_or_path
    again = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
    assert generated(again, case) == generated(calibrated, case)


def test_a_prompt_shares_pages_with_its_like_alone(calibrated):
    """Its first tokens are computed from its last, so a longer prompt with the same beginning shares nothing."""
    one = prompts(calibrated)[0]
    longer = type(one)([*one.ids, 9, 8], one.images)
    made = engine(calibrated, default=None)
    assert run(made, [asked("one", one)])["one"][-1].usage.cached_tokens == 0
    assert run(made, [asked("longer", longer)])["longer"][-1].usage.cached_tokens == 0
    assert run(made, [asked("again", one)])["again"][-1].usage.cached_tokens >= len(one.ids) - 4


def test_a_conversation_is_one_prompt(calibrated):
    builder = PromptBuilder(calibrated.processor, EngineModel(calibrated))
    image, words = Image.new("RGB", (20, 30), (200, 40, 10)), [{"type": "text", "text": "what color ?"}]
    turns = [
        {"role": "user", "content": [{"type": "image"}, *words]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": words},
    ]
    made, token = builder.chat(turns, [image]), calibrated.config.image_token_id
    assert made.selection_tokens is None and made.ids[:17] == [token] * 16 + [
        calibrated.processor.tokenizer.bos_token_id
    ]


@pytest.mark.parametrize(("method", "scheme"), [("awq", "w4a16kv4"), ("gptq", "w4a16")])
def test_weights_alone(folder, tmp_path, method, scheme):
    settings = Settings(method=method, batch=2, held_out=1, scheme=scheme)
    calibration.calibrate(folder, picture_samples(), out=tmp_path / "out", progress=False, settings=settings)
    model = quota.load(tmp_path / "out")
    case = prompts(model)[1]
    assert tokens(run(engine(model, default=None), [asked("a", case)])["a"]) == generated(model, case)
