"""W4A16 by GPTQ, AWQ and rounding: scaling alone changes nothing, checkpoints of both families load, answer, take
recipes and resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quota.calib import run
from quota.calib.samples import encode
from quota.calib.settings import Settings
from quota.calib.stream import FloatSource
from quota.calib.weight_only import InputStats, _scale
from quota.core.errors import CheckpointError, UsageError
from quota.core.formats import DEFAULT, INT4_GROUPS, KV4, MODULES, SCHEMES
from quota.eval.compare import cache_dtype
from quota.models import find_family
from quota.models.quantize import linear_paths, model_scheme, quantized_linears, quantized_modules
from quota.models.rtn import quantize_rtn
from quota.nn.weight_linear import WeightLinear
from quota.planning.profile import profile
from quota.runtime import load, patched
from quota.runtime.engine import Prompt
from quota.runtime.engine.model import EngineModel
from tests.calib.calibration import batch_for, float_folder, killed, mixed_samples, picture_samples, qwen_folder
from tests.engine.asking import asked, engine, tokens
from tests.engine.asking import run as answer
from tests.prune.recipes import greedy, recipe_for

QUICK = {"batch": 2, "search_rows": 128, "held_out": 1}
FAMILIES = {"llava": (float_folder, picture_samples), "qwen2_5_vl": (qwen_folder, mixed_samples)}


def quick(method):
    return Settings(method=method, **QUICK)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make(tmp_path_factory.mktemp(family) / "model") for family, (make, _) in FAMILIES.items()}


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    made = {}
    for family, method in (
        ("llava", "rtn"),
        ("llava", "gptq"),
        ("llava", "awq"),
        ("qwen2_5_vl", "gptq"),
        ("qwen2_5_vl", "awq"),
    ):
        out = tmp_path_factory.mktemp("out") / f"{family}-{method}"
        report = run.calibrate(folders[family], FAMILIES[family][1](), out=out, progress=False, settings=quick(method))
        made[family, method] = out, report
    return made


@pytest.mark.parametrize(
    ("kind", "path", "kept"),
    [
        ("decoder", "model.language_model.layers.0", {"self_attn.o_proj"}),
        ("vision", "model.visual.blocks.0", set()),
        ("projector", "model.visual.merger", {"mlp.0", "mlp.2"}),
    ],
)
@torch.no_grad()
def test_scaling_alone_changes_nothing(folders, kind, path, kept):
    block = FloatSource(folders["qwen2_5_vl"]).block(kind, path)
    batch = batch_for("qwen2_5_vl", kind)
    before, scales = block(batch), {}
    for plan in block.plans:
        linear = block.layer.get_submodule(plan.parts[0])
        seen = InputStats(linear.in_features, "awq", 64, "cpu")
        seen.add(
            torch.randn(64, linear.in_features, generator=torch.Generator().manual_seed(1))
            * torch.linspace(0.1, 9, linear.in_features)
        )
        rows = _scale(block, plan, seen, scales, INT4_GROUPS)
        assert rows.std(0).max() < 0.9 * seen.rows.std(0).max()  # something was scaled
    for name, scale in scales.items():
        linear = block.layer.get_submodule(name)
        linear.weight.data = linear.weight * scale
    assert set(scales) == kept
    valid = batch.valid
    assert torch.allclose(block(batch)[valid], before[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrated_checkpoints(finished, folders, family):
    for (its, method), (out, report) in finished.items():
        if its != family:
            continue
        manifest = json.loads((out / "quota.json").read_text())
        assert manifest["regime"] == report.regime == "w4a16" and manifest["calibration"]["method"] == method
        model, source = load(out), FloatSource(folders[family])
        assert quantized_modules(model) == ("vision", "projector", "llm") and cache_dtype(out) == "float16"
        assert all(isinstance(module, WeightLinear) for module in quantized_linears(model).values())
        assert torch.equal(model.lm_head.weight, source.tensor("lm_head.weight"))
        # what was calibrated is what runs
        text = find_family(model).decoder_layer(0)
        last = model.get_submodule(text).mlp.down_proj
        x = torch.randn(3, last.in_features, generator=torch.Generator().manual_seed(0))
        scaled = x if last.input_scale is None else x * last.input_scale
        assert torch.allclose(last(x), scaled @ last.dequantized_weight().T, rtol=1e-4, atol=1e-4)
        assert last(x.half()).dtype == torch.float16
        error = sum(block["mse"] for block in report.blocks)
        nearest = sum(block["mse_rtn"] for block in report.blocks)
        assert error == nearest if method == "rtn" else error < nearest


@pytest.mark.parametrize(("family", "method"), [("llava", "gptq"), ("qwen2_5_vl", "awq")])
def test_it_computes_what_its_tensors_say_and_recipes_work(finished, folders, family, method):
    out, report = finished[family, method]
    assert all(block["update_sqnr_db"] > 10 for block in report.blocks)
    model, exact, twin = load(out), load(folders[family]), load(folders[family])
    twin.load_state_dict(model.state_dict(), strict=False)  # norms and biases
    groups = linear_paths(find_family(model), MODULES)
    for path, linear in quantized_linears(model).items():
        weight = linear.dequantized_weight()
        parts = [twin.get_submodule(part) for part in groups[path]]
        rows = [part.out_features for part in parts]
        for part, own in zip(
            parts, (weight * (linear.input_scale if linear.input_scale is not None else 1)).split(rows), strict=True
        ):
            part.weight.data = own
        for part, own in zip(parts, () if linear.bias is None else linear.bias.split(rows), strict=False):
            part.bias.data = own
    samples = FAMILIES[family][1]()
    inputs = encode(model.processor, next(iter(samples)))
    with torch.no_grad():
        got, expected = (m(**inputs).logits for m in (model, twin))
    assert (got - expected).norm() / expected.norm() < 1e-3  # the cache has eleven binary digits
    weights = {"inter": 0.45, "mag": 0.25, "intra": 0.1, "quant": 0.2}
    recipe = recipe_for(model, regime="w4a16", weights=weights)
    with patched(model, recipe) as handle:
        sequences = greedy(model, inputs).sequences
        lengths = handle.cache_lengths
    assert lengths[0] > lengths[1] > lengths[2] > lengths[3]
    with patched(model, recipe):
        assert torch.equal(greedy(model, inputs).sequences, sequences)
    measured = profile(exact, model, model.processor, samples.first(2))
    assert measured.regime == "w4a16" and all(s > 0 for s in measured.sensitivity[1:])


KV4_SCHEME = next(row for row in SCHEMES.values() if "gptq" in row.methods and row.kv is KV4)


@pytest.fixture(scope="module")
def served(folders, tmp_path_factory):
    made = {}
    for family, method in (("llava", "rtn"), ("llava", "awq"), ("qwen2_5_vl", "rtn"), ("qwen2_5_vl", "gptq")):
        out = tmp_path_factory.mktemp("served") / f"{family}-{method}"
        samples = None if method == "rtn" else FAMILIES[family][1]()
        settings = replace(quick(method), scheme=KV4_SCHEME.name)
        run.calibrate(folders[family], samples, out=out, progress=False, settings=settings)
        made[family, method] = load(out)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_before_a_quantized_cache_rounding_is_that_in_memory(folders, served, family):
    model, wanted = served[family, "rtn"], quantize_rtn(load(folders[family]), scheme=KV4_SCHEME).state_dict()
    assert model_scheme(model) is KV4_SCHEME and cache_dtype(Path(model.name_or_path)) == "int4"
    found = model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(("family", "method"), [("llava", "awq"), ("qwen2_5_vl", "gptq")])
def test_before_a_quantized_cache_it_is_served_bitwise(finished, served, family, method):
    model, twin = served[family, method], load(finished[family, method][0])
    inputs = encode(model.processor, next(iter(FAMILIES[family][1]())))
    with torch.no_grad():
        got, expected = (m(**inputs).logits for m in (model, twin))
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.2  # the same weights, and a cache that is rounded
    image = EngineModel(model).images(inputs)
    ids = inputs["input_ids"][0].tolist()
    prompts = {"a": Prompt(ids, image), "b": Prompt([*ids, *ids[-3:]], image), "c": Prompt(ids[-4:])}
    for recipe in (None, "pruned"):
        requests = {name: asked(name, prompt, recipe=recipe) for name, prompt in prompts.items()}
        together = engine(model)
        outputs = answer(together, requests.values())
        for name, request in requests.items():
            alone = engine(model)
            answer(alone, [request])
            assert all((x == y).all() for x, y in zip(alone.seen[name], together.seen[name], strict=True))
        if recipe is None:
            expected = greedy(model, inputs).sequences[0, len(ids) :].tolist()
            assert expected and tokens(outputs["a"])[: len(expected)] == expected


def test_a_scheme_that_a_method_does_not_make_is_refused():
    for method, scheme in (("flatquant", KV4_SCHEME.name), ("gptq", DEFAULT.name), ("awq", "w2a2")):
        with pytest.raises(UsageError, match=f"scheme: method '{method}' makes .*, got '{scheme}'"):
            Settings(method=method, scheme=scheme)


def test_resumes_after_a_kill_with_the_same_bytes(folders, finished, tmp_path, monkeypatch):
    arguments = {"out": tmp_path / "out", "progress": False, "settings": quick("gptq")}
    killed(monkeypatch, 6, lambda: run.calibrate(folders["llava"], picture_samples(), **arguments))
    assert not (tmp_path / "out").exists()
    run.calibrate(folders["llava"], picture_samples(), **arguments)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    whole = finished["llava", "gptq"][0]
    assert all((tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_refusals(folders, finished, tmp_path):
    out, _ = finished["llava", "rtn"]
    for options, words in (
        ({"method": "best"}, "method: .* flatquant"),
        ({"method": "awq", "steps": 3}, "steps: .* steps 3 out"),
        ({"method": "gptq", "inputs": "mixed"}, "inputs: .* 'mixed'"),
    ):
        with pytest.raises(UsageError, match=words):
            Settings(**options)
    data = json.loads((out / "quota.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in out.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "quota.json").write_text(json.dumps({**data, "regime": "w2a2"}))
    with pytest.raises(CheckpointError, match=r"regime: this quota reads w4a4kv4, w4a16, w4a16kv4, .*, got 'w2a2'"):
        load(copy)


@pytest.mark.parametrize(("name", "method"), [("w8a8", "gptq"), ("fp8", "rtn"), ("nvfp4", "rtn")])
def test_other_schemes_are_calibrated_and_loaded(folders, tmp_path, name, method):
    settings = replace(quick(method), scheme=name)
    report = run.calibrate(
        folders["qwen2_5_vl"], mixed_samples(), out=tmp_path / "out", progress=False, settings=settings
    )
    model, exact = load(tmp_path / "out"), load(folders["qwen2_5_vl"])
    assert model_scheme(model) is SCHEMES[name] and report.regime == name
    coarse = {"w8a8": 0.2, "fp8": 0.5}.get(name, 1.0)  # of random weights, whose errors grow from layer to layer
    inputs = encode(model.processor, next(iter(mixed_samples())))
    with torch.no_grad():
        got, expected = (m(**inputs).logits for m in (model, exact))
    assert 0 < (got - expected).norm() / expected.norm() < coarse
    if method == "rtn":  # what is rounded in memory
        wanted = quantize_rtn(exact, scheme=SCHEMES[name]).state_dict()
        found = model.state_dict()
        same = {key: torch.equal(found[key], tensor) for key, tensor in wanted.items()}
        assert found.keys() == wanted.keys() and all(same.values())
