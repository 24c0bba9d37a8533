"""Calibrating Qwen2.5-VL: equivalence, pictures of several sizes, text-only samples, pruned graph, and the checkpoint
it makes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from quota.calib import run, steps
from quota.calib import stream as streaming
from quota.calib.blocks import Batch
from quota.calib.rows import select_features
from quota.calib.samples import encode
from quota.calib.settings import Settings
from quota.calib.state import StreamLayout
from quota.calib.stream import FloatSource
from quota.core.recipe import Recipe
from quota.models import find_family
from quota.models.qwen_tower import geometry_of
from quota.nn.key_bias import QuantBiasedAttention
from quota.planning.profile import profile
from quota.runtime import load, patched
from tests.calib.calibration import killed, mixed_samples, qwen_folder
from tests.calib.test_equivalence import TOLERANCE, relative, scramble

QUICK = Settings(steps=4, evaluate_every=2, batch=2, search_rows=64, held_out=1)
GRIDS = [(1, 8, 8), (1, 4, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return qwen_folder(tmp_path_factory.mktemp("float") / "model", key_bias=800)


@pytest.fixture(scope="module")
def source(folder):
    return FloatSource(folder)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    return out, run.calibrate(folder, mixed_samples(), out=out, progress=False, settings=QUICK)


def batch_for(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "vision":
        valid = torch.arange(64)[None] < torch.tensor([[64], [24]])
        return Batch(torch.randn(2, 64, 32, generator=generator), valid, grids=GRIDS)
    if kind == "projector":
        return Batch(torch.randn(2, 16, 128, generator=generator), torch.ones(2, 16, dtype=torch.bool))
    positions = torch.stack([torch.arange(17), torch.arange(17) // 3, torch.arange(17) % 5], -1)
    return Batch(
        torch.randn(2, 17, 64, generator=generator), torch.ones(2, 17, dtype=torch.bool), positions.expand(2, -1, -1)
    )


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("decoder", "model.language_model.layers.0"),
        ("decoder", "model.language_model.layers.1"),
        ("projector", "model.visual.merger"),
        ("vision", "model.visual.blocks.0"),
        ("vision", "model.visual.blocks.1"),
    ],
)
def test_transforms_alone_change_nothing(source, kind, path):
    block, batch = source.block(kind, path), batch_for(kind)
    wanted = block(batch)
    block.quantize_linears()
    scramble(block)
    block.set_mode("float")
    real = batch.valid
    assert relative(block(batch)[real], wanted[real]) < TOLERANCE
    block.set_mode("learn")
    assert relative(block(batch)[real], wanted[real]) > 10 * TOLERANCE


def test_planted_key_biases_do_not_reach_the_key_quantizer(source):
    """Layer 0 has a key bias of norm 800: its 4-bit error is like that of layer 1, which has none."""
    errors = []
    for index in (0, 1):
        block, batch = source.block("decoder", f"model.language_model.layers.{index}"), batch_for("decoder")
        update = block(batch) - batch.hidden
        block.quantize_linears()
        block.set_mode("rtn")
        errors.append(relative(block(batch) - batch.hidden, update))
    assert errors[0] < 1.6 * errors[1], errors


def test_streamed_blocks_reproduce_the_model(source, tmp_path):
    """Pictures of two sizes and a text-only prompt, through all blocks chained by hand: upstream's hidden states,
    M-RoPE positions included."""
    model = load(source.folder)
    arch, samples = source.family, mixed_samples(((32, 32), None, (24, 16)))
    encoded = [encode(model.processor, sample) for sample in samples]
    grids = [tuple(e["image_grid_thw"][0].tolist()) for e in encoded if "image_grid_thw" in e]
    assert grids == GRIDS
    current = streaming.embed_images(
        source, [image for e in encoded for image in arch.images(e)], grids, tmp_path / "0", "float32"
    )
    for index in range(arch.vision_layers_used):
        following = current.like(tmp_path / f"v{index}")
        streaming.advance(source.block("vision", arch.vision_layer(index)), current, following, 2, "cpu")
        current = following
    features = select_features(source, current, tmp_path / "features")
    projected = features.like(tmp_path / "projected", width=arch.hidden_size)
    streaming.advance(source.block("projector", arch.projector_path), features, projected, 2, "cpu")
    current = streaming.embed_text(source, [e["input_ids"][0] for e in encoded], projected, tmp_path / "text", grids)
    with torch.no_grad():
        wanted = [model(**e, output_hidden_states=True).hidden_states for e in encoded]
    for index in range(arch.layers):
        for item in range(3):
            assert relative(current.read(item), wanted[item][index][0]) < 1e-5, (index, item)
        if index < arch.layers - 1:
            following = current.like(tmp_path / f"t{index}")
            streaming.advance(source.block("decoder", arch.decoder_layer(index)), current, following, 3, "cpu")
            current = following
    assert current.images == [(16,), (), (6,)]
    reopened = streaming.Stream.reopen(
        tmp_path, StreamLayout.model_validate_json(current.layout().model_dump_json(), strict=True)
    )
    assert (
        reopened.images == current.images
        and (reopened.positions == current.positions).all()
        and (reopened.columns == current.columns).all()
    )


def test_report_and_checkpoint(finished):
    out, report = finished
    assert [block["name"].removeprefix("model.") for block in report.blocks] == [
        *(f"visual.blocks.{i}" for i in range(3)),
        "visual.merger",
        *(f"language_model.layers.{i}" for i in range(4)),
    ]
    assert all(0 < block["mse"] < 1.5 * block["mse_rtn"] and block["sqnr_db"] > 5 for block in report.blocks)
    assert json.loads((out / "quota.json").read_text())["calibration"]["image_backend"] == "pil"


def test_loaded_model_runs_what_was_calibrated(finished, folder):
    """Every decoder layer of the opened checkpoint, on real inputs, equals the float one up to the error the report
    states; answers can be generated."""
    out, report = finished
    model, original = load(out), load(folder)
    assert all(isinstance(layer.self_attn, QuantBiasedAttention) for layer in model.model.language_model.layers)
    bias = original.model.language_model.layers[0].self_attn.k_proj.bias
    assert torch.equal(model.model.language_model.layers[0].self_attn.k_bias.flatten(), bias.detach())
    inputs = encode(model.processor, mixed_samples()[3])
    seen = []
    layer, float_layer = (m.model.language_model.layers[1] for m in (model, original))
    hook = float_layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    with torch.no_grad():
        original(**inputs, use_cache=False)
    hook.remove()
    args, kwargs, wanted = seen[0]
    error = float((layer(*args, **{**kwargs, "past_key_values": None}) - wanted).square().mean())
    stated = next(block for block in report.blocks if block["name"].endswith("layers.1"))["mse"]
    assert error < 4 * stated
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3


def test_same_bytes_again_and_through_transformers_own_door(finished, folder, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    run.calibrate(folder, mixed_samples(), out=tmp_path / "again", progress=False, settings=QUICK)
    for name in ("model.safetensors", "quota.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (finished[0] / name).read_bytes()
    ours, theirs = load(finished[0]), Qwen2_5_VLForConditionalGeneration.from_pretrained(finished[0])
    inputs = encode(ours.processor, mixed_samples()[0])
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


def test_resumes_after_a_kill(finished, folder, tmp_path, monkeypatch):
    killed(
        monkeypatch,
        7,
        lambda: run.calibrate(folder, mixed_samples(), out=tmp_path / "out", progress=False, settings=QUICK),
    )
    run.calibrate(folder, mixed_samples(), out=tmp_path / "out", progress=False, settings=QUICK)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


BEFORE_LAYERS = {
    "candidates": [0, 2],
    "selections": [{"score": "none", "policy": "grid"}, {"score": "text", "policy": "mmr"}],
    "method": "custom",
}


@pytest.mark.parametrize(
    ("reference", "plan"),
    [("per_image", {}), ("recorded", {}), ("per_image", BEFORE_LAYERS), ("recorded", BEFORE_LAYERS)],
)
def test_pruned_graph(source, folder, tmp_path, reference, plan):
    """Prune-then-quantize keeps each picture's own share, and the tokens the float model keeps when it runs under the
    same recipe."""
    model = load(folder)
    facts = {
        "architecture": "Qwen2_5_VLForConditionalGeneration",
        "fingerprint": source.fingerprint,
        "layers": 4,
        "visual_tokens": 12,
    }
    recipe = Recipe.parse(
        {
            "method": "quota",
            "regime": "w4a4kv4",
            "model": facts,
            "candidates": [1, 3],
            "keep": [0.6, 0.3],
            "final_keep": 0.3,
            "reference": reference,
            "reference_tokens": 12,
            **plan,
        }
    )
    first, last = recipe.candidates
    samples, found = mixed_samples(), []
    real = steps.prune.keep_masks

    def watch(*args):
        found.append(real(*args))
        return found[-1]

    steps.prune.keep_masks = watch
    try:
        run.calibrate(
            folder,
            samples,
            out=tmp_path / "out",
            progress=False,
            settings=replace(QUICK, steps=0, modules=("llm",)),
            recipe=recipe,
        )
    finally:
        steps.prune.keep_masks = real
    with patched(model, recipe) as handle, torch.no_grad():
        for item, sample in enumerate(samples):
            inputs = encode(model.processor, sample, answer=True)
            model(**inputs)
            alive = handle.kept[first][0]
            assert torch.equal(torch.from_numpy(found[0][item]), alive)
            assert torch.equal(torch.from_numpy(found[1][item]), handle.kept[last][0][alive])


def test_profile_of_mixed_sizes(folder, finished):
    original, quantized = load(folder), load(finished[0])
    made = profile(original, quantized, original.processor, mixed_samples())
    assert (
        made.samples == 6 and made.model.visual_tokens == 10 and len(made.sensitivity) == 4
    )  # tokens of the six: 16, 6, none, 10, 25, 8
    assert all(0 < x < 1.5 for x in made.sensitivity[1:]) and made.model.vision_macs
    assert (
        find_family(original).visual_tokens is None
        and geometry_of(original.config.vision_config, GRIDS[0]).patches == 64
    )
