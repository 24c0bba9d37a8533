"""The whole calibration on a tiny model: same bytes, resume after a kill, module selection, packed execution, pruned
graph, errors."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

import quota.calib
from quota.calib import run
from quota.calib.job import Job
from quota.calib.samples import encode
from quota.calib.schedule import Schedule
from quota.calib.settings import DEFAULTS, MODULES, WORDS, Settings
from quota.calib.steps import Ticks
from quota.cli.main import app
from quota.core import checkpoint
from quota.core.errors import CheckpointError, QuotaError, RecipeError, SampleError, UsageError
from quota.core.recipe import Recipe
from quota.models import family_class
from quota.ops import quantize_act
from quota.quant.affine import quantize_symmetric
from quota.quant.pack import unpack_int4
from tests.calib.calibration import counted, float_folder, killed, picture_samples

QUICK = Settings(steps=4, evaluate_every=2, batch=2, search_rows=64, held_out=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return float_folder(tmp_path_factory.mktemp("float") / "model")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    return out, run.calibrate(folder, picture_samples(), out=out, progress=False, settings=QUICK)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def recipe_for(source, **changes):
    model = {
        "architecture": "LlavaForConditionalGeneration",
        "fingerprint": source.fingerprint,
        "layers": 4,
        "visual_tokens": 16,
    }
    data = {
        "method": "uniform",
        "regime": "w4a4kv4",
        "model": model,
        "candidates": [1, 2],
        "keep": [0.75, 0.5],
        "final_keep": 0.5,
        "tau": 1.0,
        "reference_tokens": 16,
        "weights": {"inter": 0.5, "mag": 0.3, "intra": 0.2, "quant": 0.0},
    }
    return Recipe.parse({**data, **changes})


def test_report_and_manifest(finished):
    out, report = finished
    names = [block["name"] for block in report.blocks]
    assert names == [
        *(f"model.vision_tower.encoder.layers.{i}" for i in range(2)),
        "model.multi_modal_projector",
        *(f"model.language_model.layers.{i}" for i in range(4)),
    ]
    for block in report.blocks:
        assert 0 < block["mse"] < block["mse_rtn"] * 1.5
        assert block["sqnr_db"] > 5
    manifest = json.loads((out / "quota.json").read_text())
    assert manifest["calibration"]["report"] == report.blocks
    assert manifest["source_fingerprint"] == report.source_fingerprint
    assert not out.with_name(out.name + ".partial").exists()
    json.dumps(report.to_dict())


def test_same_seed_same_bytes_other_seed_other_bytes(folder, finished, tmp_path):
    run.calibrate(folder, picture_samples(), out=tmp_path / "again", progress=False, settings=QUICK)
    assert contents(tmp_path / "again") == contents(finished[0])
    run.calibrate(folder, picture_samples(), out=tmp_path / "other", progress=False, settings=replace(QUICK, seed=1))
    assert contents(tmp_path / "other")["model.safetensors"] != contents(finished[0])["model.safetensors"]


@pytest.mark.parametrize("survived", [0, 2, 4, 8])
def test_resumes_after_a_kill_with_the_same_bytes(folder, finished, tmp_path, monkeypatch, survived):
    """The process dies inside step number `survived`; the next call starts there, not at the beginning."""
    out = tmp_path / "out"

    def calibrate():
        run.calibrate(folder, picture_samples(), out=out, progress=False, settings=QUICK)

    killed(monkeypatch, survived, calibrate)
    assert not out.exists()
    done = counted(monkeypatch)
    calibrate()
    assert len(done) + survived == 10  # images, 2 vision, features, projector, text, 4 decoder
    assert contents(out) == contents(finished[0])


def test_work_of_other_settings_is_refused_and_kept(folder, tmp_path, monkeypatch):
    def calibrate(**options):
        settings = replace(QUICK, seed=options.pop("seed", 0))
        run.calibrate(folder, picture_samples(), out=tmp_path / "out", progress=False, settings=settings, **options)

    killed(monkeypatch, 4, calibrate)  # in the projector
    done = counted(monkeypatch)
    before = {path: path.read_bytes() for path in (tmp_path / "out.partial").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"seed is 0 there, 5 here.*--overwrite"):
        calibrate(seed=5)
    assert not done and before == {
        path: path.read_bytes() for path in (tmp_path / "out.partial").rglob("*") if path.is_file()
    }
    calibrate(seed=5, overwrite=True)
    assert len(done) == 10


def test_two_calibrations_do_not_share_a_work_folder(folder, tmp_path):
    from quota.calib.work import WorkFolder

    held = WorkFolder(tmp_path / "out.partial", {})
    with pytest.raises(UsageError, match="another calibration"):
        run.calibrate(folder, picture_samples(2), out=tmp_path / "out", progress=False, settings=QUICK)
    held.close()


@pytest.mark.parametrize("modules", [("llm",), ("vision",), ("projector", "llm")])
def test_left_out_modules_stay_float(folder, tmp_path, modules):
    report = run.calibrate(
        folder,
        picture_samples(4),
        out=tmp_path / "out",
        progress=False,
        settings=replace(QUICK, modules=modules, steps=0),
    )
    quantized, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    parts = {
        "vision": "vision_tower.encoder.layers.0.mlp.fc1",
        "projector": "projector.linear_1",
        "llm": "layers.0.mlp.down_proj",
    }
    for name, part in parts.items():
        assert any(key.endswith(f"{part}.w_q") for key in quantized) == (name in modules)
    from quota.calib.stream import FloatSource

    canonical_key = FloatSource(folder).family.canonical_key
    for key, tensor in original.items():
        if canonical_key(key) in quantized and "norm" not in key:
            assert torch.equal(quantized[canonical_key(key)], tensor)
    assert report.modules == modules


def test_text_only_samples(folder, tmp_path):
    run.calibrate(
        folder,
        picture_samples(4, text_only=2),
        out=tmp_path / "mixed",
        progress=False,
        settings=replace(QUICK, steps=0),
    )
    run.calibrate(
        folder,
        picture_samples(3, text_only=3),
        out=tmp_path / "llm",
        progress=False,
        settings=replace(QUICK, steps=0, modules=("llm",)),
    )
    with pytest.raises(SampleError, match="at least one image"):
        run.calibrate(folder, picture_samples(3, text_only=3), out=tmp_path / "all", progress=False, settings=QUICK)


def test_packed_model_computes_what_calibration_simulated(folder, tmp_path):
    """quota.nn's packed modules, fed the written tensors, against the frozen calibration blocks: equal weight integers,
    equal activations up to rounding."""
    from quota.calib.learn import BlockData, learn_block
    from quota.calib.stream import FloatSource, Stream, advance
    from quota.models.quantize import quantize_structure

    source = FloatSource(folder)
    for kind, path, width in (
        ("decoder", "model.language_model.layers.1", 64),
        ("vision", "model.vision_tower.encoder.layers.0", 32),
    ):
        stream = Stream(tmp_path / kind, width, [19, 23, 17], "float32", create=True)
        for item in range(3):
            stream.write(item, torch.randn(stream.lengths[item], width, generator=torch.Generator().manual_seed(item)))
            stream.positions[stream.rows(item)] = range(stream.lengths[item])
        block, out = source.block(kind, path), stream.like(tmp_path / f"{kind}-out")
        advance(block, stream, out, 2, "cpu")
        block.quantize_linears()
        learn_block(block, BlockData(stream, out, None, 0), QUICK)
        tensors = block.export()
        model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        quantize_structure(model, ("vision", "llm"), {name: tuple(t.shape) for name, t in tensors.items()})
        layer = model.get_submodule(path)
        layer.load_state_dict({name.removeprefix(path + "."): tensor for name, tensor in tensors.items()}, strict=True)
        batch = stream.batch([1])
        with torch.no_grad(), block.observing():
            simulated = block(batch)
            groups = block.projection_groups()
            for plan, group in zip(family_class("llava").groups[kind], groups, strict=True):
                merged = torch.ones(group.out_features)
                if plan.name == "mlp.gate_up_proj":  # up's rows carry the next group's diag
                    merged[-groups[-1].in_features :] = groups[-1].diag()
                _same_integers(group, layer.get_submodule(plan.name), merged)
            if kind == "decoder":
                rope = model.model.language_model.rotary_emb(batch.hidden, batch.positions)
                packed = layer(batch.hidden, position_embeddings=rope, attention_mask=None)
            else:
                packed = layer(batch.hidden, attention_mask=None)
        packed = packed[0] if isinstance(packed, tuple) else packed
        difference = (packed - simulated).norm() / (simulated - out.read(1)[None]).norm()
        assert difference < 0.3, (
            kind,
            float(difference),
        )  # activations on a rounding boundary flip, nothing like the quantization error


def _same_integers(group, linear, merged):
    """One group on one input: equal weight integers by construction; equal activation integers except on a rounding
    boundary; then equal outputs."""
    x = group.observed[0] if group.diag() is None else group.observed[0] / group.diag()
    group_u = group.transform(group.observed[0])
    wanted, scale = quantize_symmetric(group_u, float(linear.clip))
    x_q, x_scale = quantize_act(x.contiguous(), linear.left, linear.right, float(linear.clip))
    got = unpack_int4(x_q, x.shape[1])
    ties = ((group_u / scale[:, None]) % 1 - 0.5).abs() < 1e-3
    assert ((got == wanted) | ties).all()
    torch.testing.assert_close(x_scale, scale, rtol=1e-4, atol=0)
    rows = (got == wanted).all(-1)
    assert rows.any()
    torch.testing.assert_close((linear(x) * merged)[rows], group(group.observed[0])[rows], rtol=1e-3, atol=1e-3)


def test_loaded_model_predicts_what_the_frozen_blocks_predict(folder, finished):
    """The folder opens through the runtime's loader (checked by name, so this half stays independent of it) and gives
    finite logits."""
    load = pytest.importorskip("quota.runtime.load").load
    model = load(finished[0])
    sample = encode(model.processor, picture_samples()[0])
    with torch.no_grad():
        logits = model(**sample).logits
    assert torch.isfinite(logits).all()


def test_pruned_graph_changes_only_later_decoder_layers(folder, finished, tmp_path):
    from quota.calib.stream import FloatSource

    recipe = recipe_for(FloatSource(folder))
    report = run.calibrate(
        folder, picture_samples(), out=tmp_path / "out", progress=False, settings=QUICK, recipe=recipe
    )
    before, after = load_file(finished[0] / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert all(name in same for name in before if "layers.0." in name and "language_model" in name)
    assert any(name not in same for name in before if "language_model.layers.2." in name)
    manifest = json.loads((tmp_path / "out" / "quota.json").read_text())
    assert manifest["calibration"]["pruned_by"].startswith("sha256:")
    assert len(report.blocks) == 7


def selected(*selections, candidates=(1, 2), keep=(0.75, 0.5), method="custom", **fields):
    return dict(
        method=method,
        candidates=list(candidates),
        keep=list(keep),
        final_keep=keep[-1],
        selections=list(selections),
        **fields,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_policy": "compact"},
        selected({"score": "last_token"}),
        selected({"score": "own_last_token"}, position_policy="compact"),
        selected({"score": "random"}),
        selected({"score": "none", "policy": "maxmin"}, candidates=(0,), keep=(0.25,)),
        selected(
            {"score": "relevance", "policy": "dpp"},
            {"policy": "grid", "grid_share": 0.5},
            candidates=(0, 2),
            keep=(0.5, 0.25),
        ),
        selected({"score": "none"}, candidates=(2,), keep=(0.0,), method="vtw"),
    ],
    ids=["original", "compact", "fastv", "pyramiddrop", "random", "divprune", "mixed", "vtw"],
)
def test_pruned_stream_keeps_what_the_pruner_keeps(folder, tmp_path, changes):
    """The tokens the stream loses are those the installed recipe drops from the float model, and the hidden states
    agree."""
    from quota.calib.stream import FloatSource
    from quota.calib.work import WorkFolder
    from quota.prune.pruner import Pruner

    source, samples = FloatSource(folder), picture_samples(3)
    recipe = recipe_for(source, **changes)
    schedule = Schedule(Job(source, samples, tmp_path / "out", replace(QUICK, steps=0), recipe=recipe))
    work = WorkFolder(tmp_path / "work", {})
    with schedule.bar(work, progress=False) as bar:
        for step in schedule.steps[:-1]:
            work.hand_on(step.run(schedule.job, work, Ticks(bar, 0.0, 0.0)).streams)
            work.commit()
    assert schedule.steps[-1].path == "model.language_model.layers.3"
    stream = work.streams["float"]  # input of the last layer
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()
    pruner, seen = Pruner(model, recipe), []
    last = model.model.language_model.layers[3]
    last.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for item, sample in enumerate(samples):
        with torch.no_grad():
            model(**encode(schedule.job.processor, sample, answer=True))
        kept = pruner.kept[recipe.candidates[-1]][0]
        assert int(kept.sum()) < len(kept)
        if recipe.position_policy == "original":
            assert stream.positions[stream.rows(item)].tolist() == kept.nonzero()[:, 0].tolist()
        assert stream.lengths[item] == int(kept.sum())
        torch.testing.assert_close(stream.read(item), seen[item][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", ["quantized", "mixed"])
def test_learning_from_quantized_inputs(folder, tmp_path, inputs):
    report = run.calibrate(
        folder, picture_samples(4), out=tmp_path / "out", progress=False, settings=replace(QUICK, inputs=inputs)
    )
    assert len(report.blocks) == 7


def test_errors(folder, finished, tmp_path):
    samples = picture_samples(2)
    from quota.calib.stream import FloatSource

    def attempt(model=folder, **options):
        run.calibrate(model, samples, out=tmp_path / "out", progress=False, settings=QUICK, **options)

    with pytest.raises(CheckpointError, match="quantized"):
        attempt(finished[0])
    with pytest.raises(CheckpointError, match="folder or a hub name"):
        attempt("./no/such/place")
    data = recipe_for(FloatSource(folder)).model_dump(mode="json")
    data["model"]["fingerprint"] = "sha256:" + "0" * 64
    data.pop("provenance")
    with pytest.raises(RecipeError, match="fingerprint"):
        attempt(recipe=Recipe.parse(data))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(QuotaError, match=r"model\.safetensors"):
        attempt(broken)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "best"}, "method: expected one of flatquant, gptq, awq, rtn, got 'best'"),
        ({"modules": ("vision", "ears")}, "modules: expected some of vision, projector, llm, got"),
        ({"modules": ()}, "modules: "),
        ({"modules": "llm"}, "modules: .* got 'llm'"),
        ({"inputs": "wrong"}, "inputs: "),
        ({"steps": -1}, "steps: "),
        ({"batch": 0}, "batch: "),
        ({"text_share": 1.0}, "text_share: "),
        ({"stream_dtype": "int8"}, "stream_dtype: "),
    ],
)
def test_a_setting_out_of_range_is_named(given, words):
    with pytest.raises(UsageError, match=words):
        Settings(**given)


def test_settings_say_themselves():
    """One place for a default and its words: the signature and the class show them, the command line reads them."""
    shown = f"{inspect.signature(quota.calib.calibrate)}"
    for field in fields(Settings):
        assert f"{field.name}={field.default!r}" in shown and f"{field.name}: {WORDS[field.name]}" in Settings.__doc__
    said = re.sub(r"[\s│]+", " ", CliRunner().invoke(app, ["calibrate", "--help"], env={"COLUMNS": "400"}).output)
    for name in ("method", "modules", "seed", "steps"):
        default = getattr(DEFAULTS, name)
        words = ",".join(default) if isinstance(default, tuple) else str(default)
        assert f"--{name}" in said and f"{WORDS[name]} [default: {words}]" in said
    assert MODULES == checkpoint.MODULES
    assert Settings(method="gptq").learns_from == "quantized" and Settings(method="awq").learns_from == "float"
