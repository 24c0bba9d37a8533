"""Exports: the format's reader gets our numbers, every tensor under its published name, or one sentence and nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from quota.cli.main import app
from quota.core.checkpoint import Manifest, save_checkpoint
from quota.core.errors import CheckpointError, UsageError
from quota.core.formats import SCHEMES
from quota.models import find_family, model_fingerprint
from quota.models.quantize import linear_paths, quantized_linears, quantized_modules
from quota.models.rtn import quantize_rtn
from quota.runtime import load
from quota.runtime.export import export
from tests.tiny import TINY

CASES = [
    ("llava", "w8a8", ("vision", "projector", "llm")),
    ("llava", "w4a16", ("vision", "projector", "llm")),
    ("qwen2_5_vl", "w4a16kv4", ("llm",)),
    ("qwen2_5_vl", "w8a8", ("vision", "projector", "llm")),
    ("qwen3_vl", "fp8", ("vision", "projector", "llm")),
    ("llava_siglip", "fp8", ("llm",)),
    ("llava_next", "w8a8", ("vision", "projector", "llm")),
    ("llava_onevision", "fp8", ("llm",)),
    ("internvl", "fp8", ("vision", "projector", "llm")),
    ("llava_pixtral", "w4a16", ("llm",)),
    ("mistral3", "w8a8", ("vision", "projector", "llm")),
    ("paligemma", "fp8", ("vision", "projector", "llm")),
]


def saved(folder: Path, family: str, scheme: str, modules: tuple[str, ...]) -> Path:
    options = {"key_bias": 20} if family == "qwen2_5_vl" else {}
    model = quantize_rtn(TINY[family][0](**options), modules, scheme=SCHEMES[scheme])
    save_checkpoint(model, folder, Manifest(SCHEMES[scheme], modules, model_fingerprint(model)))
    return folder


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}-{scheme}" for family, scheme, _ in CASES])
def exported(request, tmp_path_factory):
    """(our model, config.json, tensors of the export by their names inside the model)."""
    folder = tmp_path_factory.mktemp("export")
    export(saved(folder / "ours", *request.param), folder / "out")
    model = load(folder / "ours")
    family = find_family(model)
    stored = load_file(folder / "out" / "model.safetensors")
    assert family.name in ("qwen3_vl", "internvl") or not any(
        name.startswith(("model.visual", "model.language")) for name in stored
    )
    return (
        model,
        json.loads((folder / "out" / "config.json").read_text()),
        {family.canonical_key(name): tensor for name, tensor in stored.items()},
    )


def ours(model) -> dict[str, torch.Tensor]:
    """Float linear -> our dequantized weight."""
    groups, out = linear_paths(find_family(model), quantized_modules(model)), {}
    with torch.device("meta"):
        skeleton = type(model)._from_config(model.config)
    for path, linear in quantized_linears(model).items():
        rows = [skeleton.get_submodule(part).out_features for part in groups[path]]
        out.update(zip(groups[path], linear.dequantized_weight().split(rows), strict=True))
    return out


def nibbles(words: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], -1).flatten(-2)[:, :columns]


def decoded(stored: dict[str, torch.Tensor], name: str, group: int | None) -> torch.Tensor:
    """As the format's documents say it: codes minus zeros, times scales."""
    scale = stored[f"{name}.weight_scale"]
    if group is None:
        return stored[f"{name}.weight"].float() * scale
    n, k = stored[f"{name}.weight_shape"].tolist()
    codes = nibbles(stored[f"{name}.weight_packed"], k).unflatten(1, (-1, group))
    zero = nibbles(stored[f"{name}.weight_zero_point"].T, n).T
    assert codes.shape == (n, k // group, group) and scale.shape == zero.shape == (n, k // group)
    return ((codes - zero[..., None]) * scale[..., None]).flatten(1)


def test_codes_and_scales_are_our_weights(exported):
    model, config, stored = exported
    group = config["quantization_config"]["config_groups"]["group_0"]["weights"].get("group_size")
    wanted = ours(model)
    assert wanted and all(torch.equal(decoded(stored, name, group), weight) for name, weight in wanted.items())


def test_everything_else_is_there_and_named(exported):
    model, config, stored = exported
    with torch.device("meta"):
        skeleton = type(model)._from_config(model.config)
    wanted, own = ours(model), model.state_dict()
    floats = {name for name in skeleton.state_dict() if name.rpartition(".")[0] not in wanted}
    floats -= {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert all(torch.equal(stored[name], own[name]) for name in floats)
    biases = {f"{name}.bias" for name in wanted if skeleton.get_submodule(name).bias is not None}
    coded = {name for name in stored if ".weight_" in name or name.removesuffix(".weight") in wanted}
    assert stored.keys() == floats | biases | coded
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors" and "transformers_weights" not in config
    linears = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    canonical = find_family(model).canonical_key
    assert {canonical(f"{name}.")[:-1] for name in quantization["ignore"]} == linears - wanted.keys()
    attention = model.get_submodule(find_family(model).decoder_layer(0)).self_attn
    if hasattr(attention, "k_bias"):
        name = f"{find_family(model).decoder_layer(0)}.self_attn.k_proj.bias"
        assert torch.equal(stored[name], attention.k_bias.flatten()) and stored[name].norm() > 10


@pytest.mark.compressed
def test_the_package_s_own_reader_decompresses_them_to_our_weights(exported):
    reason = "pip install compressed-tensors (vLLM pins 0.17.0) to read exports with its own reader"
    compressed = pytest.importorskip("compressed_tensors", reason=reason)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    assert compressed
    model, config, stored = exported
    told = QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = told.config_groups.values()
    reader = BaseCompressor.get_value_from_registry(told.format)
    for name, weight in ours(model).items():
        own = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.rpartition(".")[0] == name}
        got = reader.decompress(own, scheme)["weight"]
        assert got.dtype == torch.float32 and torch.equal(got, weight), name


def test_what_cannot_be_exported_leaves_nothing(tmp_path):
    good = saved(tmp_path / "w8a8", "llava", "w8a8", ("llm",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    cases = [
        (good, tmp_path / "full", "full: exists; expected a new or empty folder"),
        (good, tmp_path / "full" / "mine.txt", "mine.txt: exists"),
        (saved(tmp_path / "w4a4", "llava", "w4a4kv4", ("llm",)), None, "w4a4kv4 cannot be exported: its transforms"),
        (saved(tmp_path / "nv", "llava", "nvfp4", ("llm",)), None, "nvfp4 cannot be exported: no export"),
        (saved(tmp_path / "dino", "llava_dinov2", "w8a8", ("llm",)), None, "DINOv2 with this tower has no names"),
        (saved(tmp_path / "narrow", "qwen2_5_vl", "w4a16", ("vision",)), None, "groups that divide .* 16 inputs"),
    ]
    before = sorted(tmp_path.iterdir())
    for checkpoint, out, words in cases:
        with pytest.raises(UsageError, match=words):
            export(checkpoint, out or tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(UsageError, match="--to: expected one of vllm, got 'tgi'"):
        export(good, tmp_path / "out", "tgi")
    weights = good / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or altered"):
        export(good, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_scales_of_inputs_are_refused(tmp_path):
    from quota.nn.weight_linear import WeightLinear

    model = quantize_rtn(TINY["llava"][0](), ("llm",), scheme=SCHEMES["w4a16"])
    linear = next(m for m in model.modules() if isinstance(m, WeightLinear))
    linear.register_buffer("input_scale", torch.ones(linear.in_features))
    save_checkpoint(model, tmp_path / "awq", Manifest(SCHEMES["w4a16"], ("llm",), model_fingerprint(model)))
    with pytest.raises(UsageError, match="qkv_proj keeps AWQ's scale of its input"):
        export(tmp_path / "awq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verb(tmp_path):
    good, out = saved(tmp_path / "ours", "llava", "fp8", ("llm",)), tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(good), "--out", str(out), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["quantization_config"]["format"] == "float-quantized"
    again = CliRunner().invoke(app, ["export", str(good), "--out", str(out)])
    assert again.exit_code != 0 and "exists; expected a new or empty folder" in again.output
