"""Layout, geometry, checkpoint names and identity of Qwen2.5-VL models."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from quota.core.errors import CheckpointError
from quota.models import find_family, model_fingerprint, submodule, vision_macs
from quota.models.qwen_tower import geometry_of, tower_rotary
from tests.tiny import IMAGE_TOKEN, tiny_qwen


@pytest.fixture(scope="module")
def model():
    return tiny_qwen()


def test_layout(model):
    arch = find_family(model)
    assert (arch.name, arch.layers, arch.vision_layers_used, arch.visual_tokens) == ("qwen2_5_vl", 4, 3, None)
    assert (arch.hidden_size, arch.heads, arch.kv_heads, arch.head_dim) == (64, 4, 2, 16)
    for path in (
        arch.decoder_layer(3),
        arch.vision_layer(2),
        arch.projector_path,
        arch.embed_path,
        arch.lm_head_path,
        arch.vision_embed_path,
        arch.text_path,
    ):
        assert submodule(model, path) is model.get_submodule(path)
    assert find_family(model.config).dims == arch.dims


def test_sliding_windows_are_refused(model):
    config = Qwen2_5_VLConfig(
        text_config={**model.config.text_config.to_dict(), "use_sliding_window": True},
        vision_config=model.config.vision_config,
    )
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        find_family(config)


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
        ("visual.merger.mlp.0.bias", "model.visual.merger.mlp.0.bias"),
        ("model.layers.3.self_attn.k_proj.bias", "model.language_model.layers.3.self_attn.k_proj.bias"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_canonical_keys(model, stored, canonical):
    arch = find_family(model)
    assert arch.canonical_key(stored) == canonical
    assert arch.canonical_key(canonical) == canonical
    assert all(arch.canonical_key(name) == name for name in model.state_dict())


def test_saved_checkpoints_have_canonical_names(model, tmp_path):
    from safetensors import safe_open

    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert any(name.startswith("visual.") for name in stored)  # transformers writes the published names
    assert {find_family(model).canonical_key(name) for name in stored} == set(model.state_dict())


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 4, 6), (1, 10, 14), (1, 2, 2)])
def test_geometry_is_upstreams(model, grid):
    vision, where = model.config.vision_config, geometry_of(model.config.vision_config, grid)
    order, bounds = get_vision_window_index(
        torch.tensor([grid]), spatial_merge_size=2, window_size=vision.window_size, patch_size=vision.patch_size
    )
    assert torch.equal(where.order, order) and torch.equal(where.order[where.inverse], torch.arange(len(order)))
    assert list(where.windows) == torch.diff(bounds).tolist()
    assert torch.equal(where.places, get_vision_position_ids(torch.tensor([grid]), 2).view(-1, 4, 2)[order].view(-1, 2))
    for got, want in zip(
        tower_rotary(where, vision), model.model.visual.rotary_pos_emb(torch.zeros(1), where.places), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match="videos"):
        geometry_of(vision, (2, *grid[1:]))


def test_pictures_are_runs_of_image_tokens(model):
    ids = torch.tensor(
        [
            [5, IMAGE_TOKEN, IMAGE_TOKEN, 6, 7, IMAGE_TOKEN, 8],
            [IMAGE_TOKEN, 4, IMAGE_TOKEN, IMAGE_TOKEN, 4, 4, 4],
            [3] * 7,
        ]
    )
    wanted = torch.tensor([[-1, 0, 0, -1, -1, 1, -1], [0, -1, 1, 1, -1, -1, -1], [-1] * 7])
    index = find_family(model).image_index(ids)
    assert torch.equal(index.image, wanted) and torch.equal(index.tile, wanted)


def test_fingerprint_survives_dtype_and_not_another_model(model):
    first = model_fingerprint(model)
    assert model_fingerprint(tiny_qwen().to(torch.bfloat16)) == first
    assert model_fingerprint(tiny_qwen(seed=1)) != first
    assert model_fingerprint(tiny_qwen(layers=5)) != first


def test_tower_cost(model):
    n, h, m = 16 * 4, 32, 48
    blocks = 3 * n * (4 * h * h + 3 * h * m) + 2 * h * n * (n + 2 * 16)
    assert vision_macs(model.config, 16) == n * 96 * h + blocks + 16 * (128 * 128 + 128 * 64)
