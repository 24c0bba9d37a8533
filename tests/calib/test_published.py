"""Published int4 checkpoints: equal dequantized weights, and one sentence for what is not read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quota.calib.published import Weight, _packed, _regrouped, import_checkpoint
from quota.cli.main import app
from quota.core.errors import CheckpointError, UsageError
from quota.models import find_family
from quota.models.quantize import linear_paths, quantized_linears
from quota.runtime import load
from quota.runtime.export import words
from quota.runtime.llm import why_not
from tests.calib.calibration import float_folder, qwen_folder

MAKERS = {
    "compressed-tensors": {
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
    },
    "awq": {"bits": 4, "group_size": -1, "zero_point": True, "version": "gemm"},
    "gptq": {"bits": 4, "group_size": -1, "desc_act": False, "sym": False},
}
AWQ_PACKED = [0, 2, 4, 6, 1, 3, 5, 7]  # the neighbour that lies at each place of a word
Codes = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def written(method: str, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> dict[str, torch.Tensor]:
    """codes, zero uint8 [N, K] and [N, 1], scale float16 [N, 1] as the method's own tools lay them out."""
    if method == "compressed-tensors":
        return {
            "weight_packed": words(codes),
            "weight_scale": scale,
            "weight_zero_point": words(zero.T).T.contiguous(),
            "weight_shape": torch.tensor(codes.shape),
        }
    if method == "awq":
        order = lambda t: t.unflatten(1, (-1, 8))[..., AWQ_PACKED].flatten(1)  # noqa: E731
        return {"qweight": words(order(codes.T)), "qzeros": words(order(zero.T)), "scales": scale.T.contiguous()}
    return {
        "qweight": words(codes).T.contiguous(),
        "qzeros": words(zero.T - 1),
        "scales": scale.T.contiguous(),
        "g_idx": torch.zeros(codes.shape[1], dtype=torch.int32),
    }


def published(folder: Path, method: str, make=float_folder) -> Codes:
    """A tiny float folder whose decoder is int4; returns codes, scale and zero of every linear."""
    make(folder)
    model = load(folder)
    family, g = find_family(model), torch.Generator().manual_seed(0)
    tensors, out = {family.canonical_key(k): v for k, v in load_file(folder / "model.safetensors").items()}, {}
    for parts in linear_paths(family, ("llm",)).values():
        for name in parts:
            n, k = tensors.pop(f"{name}.weight").shape
            codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
            zero = torch.randint(1, 16, (n, 1), generator=g, dtype=torch.uint8)
            scale = (torch.rand(n, 1, generator=g) * 0.02 + 0.001).half()
            out[name] = codes, scale, zero
            tensors |= {f"{name}.{key}": tensor for key, tensor in written(method, codes, scale, zero).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **MAKERS[method]}
    (folder / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("method", "make"), [("compressed-tensors", float_folder), ("awq", qwen_folder), ("gptq", float_folder)]
)
def test_dequantized_weights_are_equal(tmp_path, method, make):
    wanted = published(tmp_path / "theirs", method, make)
    manifest = import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert manifest.modules == ("llm",) and manifest.calibration == {"method": "imported", "from": method}
    model = load(tmp_path / "ours")
    groups = linear_paths(find_family(model), ("llm",))
    for path, linear in quantized_linears(model).items():
        parts = [(codes.float() - zero.float()) * scale.float() for codes, scale, zero in map(wanted.get, groups[path])]
        assert torch.equal(linear.dequantized_weight(), torch.cat(parts))
    assert why_not(model) is None and model.processor is not None
    attention = model.get_submodule(find_family(model).decoder_layer(0)).self_attn
    if attention.qkv_proj.bias is not None:
        stored = load_file(tmp_path / "theirs" / "model.safetensors")
        name = f"{find_family(model).decoder_layer(0)}.self_attn.k_proj.bias"
        rows = attention.heads * attention.head_dim
        assert torch.equal(attention.qkv_proj.bias[rows : rows + len(stored[name])], stored[name].float())


def test_groups_become_ours():
    codes = torch.randint(0, 16, (3, 512), dtype=torch.uint8)
    for groups in (1, 2, 4):
        scale, zero = torch.rand(3, groups).half(), torch.randint(0, 16, (3, groups), dtype=torch.uint8)
        made = _regrouped(Weight(codes, scale, zero), 3, 512)
        size = 512 // groups
        assert made.scale.dtype == torch.float32 and made.scale.shape == made.zero.shape == (3, 4)
        assert torch.equal(made.scale.repeat_interleave(128, 1), scale.float().repeat_interleave(size, 1))
        assert torch.equal(made.zero.repeat_interleave(128, 1), zero.repeat_interleave(size, 1))
    with pytest.raises(ValueError, match="groups of 64 inputs; the kernels read multiples of 128"):
        _regrouped(Weight(codes, torch.ones(3, 8), torch.zeros(3, 8, dtype=torch.uint8)), 3, 512)
    with pytest.raises(ValueError, match=r"expected codes \[3, 500\]"):
        _regrouped(Weight(codes, torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.uint8)), 3, 500)


def test_compressed_tensors_of_other_layouts():
    """Symmetric weights have their zero in the middle; codes and zeros of a byte each, or of other sizes, are none."""
    codes = torch.randint(0, 16, (8, 128), dtype=torch.uint8)
    scale, zero = torch.rand(8, 1), torch.randint(0, 16, (8, 1), dtype=torch.uint8)
    own = written("compressed-tensors", codes, scale, zero)
    plain = {name: tensor for name, tensor in own.items() if name != "weight_zero_point"}
    assert torch.equal(_packed(own).zero, zero) and torch.equal(_packed(own).codes, codes)
    assert _packed(plain).zero.tolist() == [[8]] * 8
    for name, tensor, reason in (
        ("weight_zero_point", zero.to(torch.int8), "in int32"),
        ("weight_packed", codes.to(torch.int8), "in int32"),
        ("weight_packed", own["weight_packed"].repeat(1, 2), "expected 128 codes in whole words, got 256"),
    ):
        with pytest.raises(ValueError, match=reason):
            _packed({**own, name: tensor})


def test_what_is_not_read_leaves_nothing(tmp_path, monkeypatch):
    published(tmp_path / "good", "gptq")
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    weights = load_file(tmp_path / "good" / "model.safetensors")
    linear = next(name for name in weights if name.endswith("mlp.up_proj.qweight")).removesuffix(".qweight")

    def changed(quantization=None, tensors=None):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        if quantization is not None:
            told = {**config, "quantization_config": {**config["quantization_config"], **quantization}}
            (tmp_path / "bad" / "config.json").write_text(json.dumps(told))
        if tensors is not None:
            kept = {k: v.contiguous() for k, v in {**weights, **tensors}.items() if v is not None}
            save_file(kept, tmp_path / "bad" / "model.safetensors")

    cases = [
        ({"quant_method": "bitsandbytes"}, None, "quant_method: expected one of compressed-tensors, awq, gptq"),
        ({"quant_method": []}, None, "quant_method: expected one of"),
        ({"quant_method": "compressed-tensors", "config_groups": []}, None, "one group of int4 weights"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"R1": {}}},
            None,
            "transform_config: expected none",
        ),
        ({"bits": 8}, None, "bits: expected 4, got 8"),
        ({"checkpoint_format": "marlin"}, None, "checkpoint_format: expected gptq"),
        (None, {f"{linear}.scales": None}, f"lacks {linear}.scales"),
        (None, {f"{linear}.g_idx": weights[f"{linear}.g_idx"] + 1}, "g_idx: groups of chosen inputs"),
        (None, {f"{linear}.qweight": weights[f"{linear}.qweight"][:, 1:]}, r"expected codes \[128, 64\]"),
        (None, {f"{linear}.qweight": None, f"{linear}.weight": torch.zeros(128, 64)}, "up_proj is float and .* is not"),
        (None, {"lm_head.weight": None, "model.lm_head.weight": None}, "lacks lm_head.weight"),
    ]
    for quantization, tensors, words_ in cases:
        changed(quantization, tensors)
        with pytest.raises(CheckpointError, match=words_):
            import_checkpoint(tmp_path / "bad", tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]
    data = (tmp_path / "good" / "model.safetensors").read_bytes()
    (tmp_path / "bad" / "model.safetensors").write_bytes(data[:-50])
    with pytest.raises(CheckpointError, match="complete safetensors"):
        import_checkpoint(tmp_path / "bad", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="expected a new or empty folder"):
        import_checkpoint(tmp_path / "good", tmp_path / "full")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    import_checkpoint(tmp_path / "good", tmp_path / "link")  # a link is followed
    assert (tmp_path / "empty" / "quota.json").is_file() and (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "empty")
    for path in tmp_path.glob("empty/*"):
        path.unlink()
    with pytest.raises(UsageError, match="got the working folder or one that holds it"):
        import_checkpoint(tmp_path / "good", ".")
    assert not list(tmp_path.glob(".*"))
    float_folder(tmp_path / "float")
    done = CliRunner().invoke(app, ["import", str(tmp_path / "float"), "--out", str(tmp_path / "out")])
    assert done.exit_code != 0 and "quant_method" in done.output and not (tmp_path / "out").exists()
