"""What calibration promises for every family: with the quantizers off its blocks compute what the float blocks compute,
streamed blocks are the model, the same bytes come out again and after a kill, and what is opened is what was
calibrated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from quota.calib import run
from quota.calib import stream as streaming
from quota.calib.blocks import Batch
from quota.calib.feed import advance
from quota.calib.rows import select_features
from quota.calib.samples import encode
from quota.calib.state import StreamLayout
from quota.calib.stream import FloatSource
from quota.runtime import load
from tests.calib.calibration import (
    MADE,
    QUICK,
    assert_stream_keeps,
    batch_for,
    contents,
    counted,
    killed,
    mixed_samples,
    picture_samples,
    recipe_for,
    relative,
    scramble,
    selected,
)

TOLERANCE = 1e-3  # relative, float32
BLOCKS = {
    "llava": [
        *(f"model.vision_tower.encoder.layers.{i}" for i in range(2)),
        "model.multi_modal_projector",
        *(f"model.language_model.layers.{i}" for i in range(4)),
    ],
    "qwen2_5_vl": [
        *(f"model.visual.blocks.{i}" for i in range(3)),
        "model.visual.merger",
        *(f"model.language_model.layers.{i}" for i in range(4)),
    ],
}
STEPS = {name: len(blocks) + 3 for name, blocks in BLOCKS.items()}  # images, features and text beside


@pytest.fixture(scope="module", params=MADE)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    make, _, options = MADE[family]
    return make(tmp_path_factory.mktemp("float") / "model", **options)


@pytest.fixture(scope="module")
def source(folder):
    return FloatSource(folder)


@pytest.fixture(scope="module")
def calibrated(family, folder):
    """calibrated(out, **settings): the family's samples, four steps a block."""

    def calibrate(out, **settings):
        samples = MADE[family][1]()
        return run.calibrate(folder, samples, out=out, progress=False, settings=replace(QUICK, **settings))

    return calibrate


@pytest.fixture(scope="module")
def finished(calibrated, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    return out, calibrated(out)


# blocks


@pytest.mark.parametrize(
    ("kind", "index"), [("decoder", 0), ("decoder", 1), ("projector", 0), ("vision", 0), ("vision", 1)]
)
def test_transforms_alone_change_nothing(family, source, kind, index):
    block, batch = source.block(kind, source.family.blocks(kind)[index]), batch_for(family, kind)
    wanted, real = block(batch), batch.valid
    block.quantize_linears()
    scramble(block)
    block.set_mode("float")
    assert relative(block(batch)[real], wanted[real]) < TOLERANCE
    block.set_mode("learn")
    assert relative(block(batch)[real], wanted[real]) > 10 * TOLERANCE  # the quantizers do something


def test_right_padding_does_not_leak(family, source):
    block, batch = source.block("decoder", source.family.blocks("decoder")[0]), batch_for(family, "decoder")
    hidden = batch.hidden[:1, :9]
    padded = torch.cat([hidden, torch.full((1, 4, 64), 9.0)], 1)
    alone = block(Batch(hidden, torch.ones(1, 9, dtype=torch.bool), batch.positions[:1, :9]))
    together = block(Batch(padded, torch.ones(1, 13, dtype=torch.bool), batch.positions[:1, :13]))
    assert relative(together[:, :9], alone) < 1e-6


def test_streamed_blocks_reproduce_the_model(family, source, tmp_path):
    """All blocks chained by hand give upstream's hidden states, positions included: where resolution is dynamic, images
    of two sizes and a prompt without one."""
    model, arch = load(source.folder), source.family
    samples = picture_samples(3) if family == "llava" else mixed_samples(((32, 32), None, (24, 16)))
    encoded = [encode(model.processor, sample) for sample in samples]
    images = [image for e in encoded for image in arch.images(e)]
    grids = [image.grid for image in images]
    current = streaming.embed_images(source, images, grids, tmp_path / "0", "float32")
    for index, path in enumerate(arch.blocks("vision")):
        following = current.like(tmp_path / f"v{index}")
        advance(source.block("vision", path), current, following, 2, "cpu")
        current = following
    features = select_features(source, current, tmp_path / "features")
    projected = features.like(tmp_path / "projected", width=arch.hidden_size)
    advance(source.block("projector", arch.projector_path), features, projected, 2, "cpu")
    own = [[image.grid for image in arch.images(e)] for e in encoded]
    current = streaming.embed_text(source, [e["input_ids"][0] for e in encoded], projected, tmp_path / "text", own)
    with torch.no_grad():
        wanted = [model(**e, output_hidden_states=True).hidden_states for e in encoded]
    for index, path in enumerate(arch.blocks("decoder")):
        for item in range(len(encoded)):
            assert relative(current.read(item), wanted[item][index][0]) < 1e-5, (index, item)
        if index < arch.layers - 1:
            following = current.like(tmp_path / f"t{index}")
            advance(source.block("decoder", path), current, following, 3, "cpu")
            current = following
    layout = StreamLayout.model_validate_json(current.layout().model_dump_json(), strict=True)
    reopened = streaming.Stream.reopen(tmp_path, layout)
    assert (reopened.positions == current.positions).all() and (reopened.roles == current.roles).all()
    assert (reopened.columns == current.columns).all()


# the whole


def test_report_and_manifest(family, finished):
    out, report = finished
    assert [block["name"] for block in report.blocks] == BLOCKS[family]
    assert all(0 < block["mse"] < 1.5 * block["mse_rtn"] and block["sqnr_db"] > 5 for block in report.blocks)
    manifest = json.loads((out / "quota.json").read_text())
    assert manifest["calibration"]["report"] == report.blocks and manifest["calibration"]["image_backend"] == "pil"
    assert manifest["source_fingerprint"] == report.source_fingerprint
    assert not out.with_name(out.name + ".partial").exists()
    json.dumps(report.to_dict())


def test_loaded_model_runs_what_was_calibrated(finished, folder, family):
    """A decoder layer of the opened checkpoint, on real inputs, equals the float one up to the error the report states;
    logits are finite and answers can be generated."""
    out, report = finished
    model, original = load(out), load(folder)
    inputs = encode(model.processor, next(iter(MADE[family][1]())))
    seen = []
    layer, float_layer = (m.model.language_model.layers[1] for m in (model, original))
    hook = float_layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    with torch.no_grad():
        original(**inputs, use_cache=False)
        assert torch.isfinite(model(**inputs).logits).all()
    hook.remove()
    args, kwargs, wanted = seen[0]
    error = float((layer(*args, **{**kwargs, "past_key_values": None}) - wanted).square().mean())
    stated = next(block for block in report.blocks if block["name"].endswith("language_model.layers.1"))["mse"]
    assert error < 4 * stated
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3


def test_same_seed_same_bytes_other_seed_other_bytes(calibrated, finished, tmp_path):
    calibrated(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished[0])
    calibrated(tmp_path / "other", seed=1)
    assert contents(tmp_path / "other")["model.safetensors"] != contents(finished[0])["model.safetensors"]


def test_transformers_own_door_opens_the_same_model(finished, family):
    ours = load(finished[0])
    theirs = getattr(transformers, type(ours).__name__).from_pretrained(finished[0])
    inputs = encode(ours.processor, next(iter(MADE[family][1]())))
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize(
    ("family", "survived"),
    [*(("llava", survived) for survived in (0, 2, 4, 8)), ("qwen2_5_vl", 7)],
    indirect=["family"],
)
def test_resumes_after_a_kill_with_the_same_bytes(family, calibrated, finished, tmp_path, monkeypatch, survived):
    """The process dies inside step number `survived`; the next call starts there, not at the beginning."""
    out = tmp_path / "out"
    killed(monkeypatch, survived, lambda: calibrated(out))
    assert not out.exists()
    done = counted(monkeypatch)
    calibrated(out)
    assert len(done) + survived == STEPS[family]
    assert contents(out) == contents(finished[0])


# under a recipe


def test_pruned_graph_changes_only_later_decoder_layers(family, folder, source, finished, tmp_path):
    recipe, samples = recipe_for(source), MADE[family][1]()
    report = run.calibrate(folder, samples, out=tmp_path / "out", progress=False, settings=QUICK, recipe=recipe)
    before, after = load_file(finished[0] / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert all(name in same for name in before if "layers.0." in name and "language_model" in name)
    assert any(name not in same for name in before if "language_model.layers.2." in name)
    manifest = json.loads((tmp_path / "out" / "quota.json").read_text())
    assert manifest["calibration"]["pruned_by"].startswith("sha256:")
    assert [block["name"] for block in report.blocks] == BLOCKS[family]


BEFORE_LAYERS = selected({"score": "none", "policy": "grid"}, {"score": "text", "policy": "mmr"}, candidates=(0, 2))
PLANS = {
    "original": {},
    "compact": {"position_policy": "compact"},
    "fastv": selected({"score": "last_token"}),
    "pyramiddrop": selected({"score": "own_last_token"}, position_policy="compact"),
    "random": selected({"score": "random"}),
    "divprune": selected({"score": "none", "policy": "maxmin"}, candidates=(0,), keep=(0.25,)),
    "mixed": selected(
        {"score": "relevance", "policy": "dpp"},
        {"policy": "grid", "grid_share": 0.5},
        candidates=(0, 2),
        keep=(0.5, 0.25),
    ),
    "vtw": selected({"score": "none"}, candidates=(2,), keep=(0.0,), method="vtw"),
}
DYNAMIC = {  # an image's own share or a recorded number, where images have sizes of their own
    "per image": {"reference": "per_image"},
    "recorded": {"reference": "recorded"},
    "before layers, per image": {"reference": "per_image", **BEFORE_LAYERS},
    "before layers, recorded": {"reference": "recorded", **BEFORE_LAYERS},
}


@pytest.mark.parametrize(
    ("family", "plan"),
    [*(("llava", plan) for plan in PLANS), *(("qwen2_5_vl", plan) for plan in DYNAMIC)],
    indirect=["family"],
)
def test_pruned_stream_keeps_what_the_pruner_keeps(family, folder, tmp_path, plan):
    samples = picture_samples(3) if family == "llava" else mixed_samples()
    assert_stream_keeps(folder, samples, tmp_path, (PLANS | DYNAMIC)[plan])
