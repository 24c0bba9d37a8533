"""Calibration beside what every family promises (test_family.py): work folders, modules, kinds of samples, packed
execution, settings and errors."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

import quota.calib
from quota.calib import run
from quota.calib.settings import DEFAULTS, MODULES, WORDS, Settings
from quota.cli.main import app
from quota.core import checkpoint
from quota.core.errors import CheckpointError, QuotaError, RecipeError, SampleError, UsageError
from quota.core.recipe import Recipe
from quota.models import family_class
from quota.ops import quantize_act
from quota.quant.affine import quantize_symmetric
from quota.quant.pack import unpack_int4
from tests.calib.calibration import QUICK, counted, float_folder, killed, picture_samples, recipe_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return float_folder(tmp_path_factory.mktemp("float") / "model")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    return out, run.calibrate(folder, picture_samples(), out=out, progress=False, settings=QUICK)


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
    from quota.calib.feed import advance
    from quota.calib.learn import BlockData, learn_block
    from quota.calib.stream import FloatSource, Stream
    from quota.models.quantize import quantize_structure

    source = FloatSource(folder)
    for kind, path, width, lengths in (
        ("decoder", "model.language_model.layers.1", 64, [19, 23, 17]),
        ("vision", "model.vision_tower.encoder.layers.0", 32, [17, 17, 17]),  # 16 patches and the class token
    ):
        stream = Stream(tmp_path / kind, width, lengths, "float32", create=True)
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
    """One group on one input: equal weight integers by construction; equal activation integers, except on a rounding
    boundary where the producer's division by a diag is in between; then equal outputs."""
    x = group.observed[0] if group.diag() is None else group.observed[0] / group.diag()
    group_u = group.deployed_transform(group.observed[0])
    wanted, scale = quantize_symmetric(group_u, float(linear.clip))
    x_q, x_scale = quantize_act(x.contiguous(), *linear.factors, float(linear.clip))
    got = unpack_int4(x_q, x.shape[1])
    ties = ((group_u / scale[:, None]) % 1 - 0.5).abs() < 1e-3
    assert ((got == wanted) | ties).all() and (group.diag() is not None or torch.equal(got, wanted))
    torch.testing.assert_close(x_scale, scale, rtol=1e-4, atol=0)
    rows = (got == wanted).all(-1)
    assert rows.any()
    torch.testing.assert_close((linear(x) * merged)[rows], group(group.observed[0])[rows], rtol=1e-3, atol=1e-3)


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
    assert f"{WORDS['method']} Left out: the first of --scheme, or {DEFAULTS.method}." in said
    for name in ("modules", "seed", "steps"):
        default = getattr(DEFAULTS, name)
        words = ",".join(default) if isinstance(default, tuple) else str(default)
        assert f"--{name}" in said and f"{WORDS[name]} [default: {words}]" in said
    assert MODULES == checkpoint.MODULES
    assert Settings(method="gptq").learns_from == "quantized" and Settings(method="awq").learns_from == "float"
