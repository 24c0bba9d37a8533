"""Layout, checkpoint names and identity of LLaVA models."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig

from quota.core.errors import CheckpointError
from quota.models import find_family, model_fingerprint, submodule
from tests.tiny import tiny_llava

ARCH = find_family(tiny_llava())


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def test_layout(model):
    arch = find_family(model)
    assert (arch.layers, arch.vision_layers_total, arch.vision_layers_used) == (4, 3, 2)
    assert (arch.hidden_size, arch.heads, arch.kv_heads, arch.head_dim) == (64, 4, 2, 16)
    assert (arch.visual_tokens, arch.image_token_id, arch.drops_cls) == (16, 120, True)
    for path in (
        arch.decoder_layer(3),
        arch.vision_layer(2),
        arch.projector_path,
        arch.embed_path,
        arch.lm_head_path,
        arch.text_path,
    ):
        assert submodule(model, path) is model.get_submodule(path)
    assert find_family(model.config).dims == arch.dims
    with pytest.raises(CheckpointError, match=r"no\.such"):
        submodule(model, "no.such")


@pytest.mark.parametrize(("feature", "used"), [(-1, 3), (-2, 2), (1, 1), (0, 0)])
def test_vision_feature_layer(model, feature, used):
    config = LlavaConfig(
        vision_config=model.config.vision_config, text_config=model.config.text_config, vision_feature_layer=feature
    )
    assert find_family(config).vision_layers_used == used


@pytest.mark.parametrize("feature", [[-2, -1], -9])
def test_unsupported_feature_layers(model, feature):
    config = LlavaConfig(
        vision_config=model.config.vision_config, text_config=model.config.text_config, vision_feature_layer=feature
    )
    with pytest.raises(CheckpointError, match="vision_feature_layer"):
        find_family(config)


def test_other_architectures_are_named():
    with pytest.raises(CheckpointError, match=r"llava.*llama"):
        find_family(LlamaConfig())
    with pytest.raises(CheckpointError, match="mistral"):
        find_family(LlavaConfig(text_config={"model_type": "mistral", "sliding_window": None}))


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias", "model.vision_tower.encoder.layers.1.mlp.fc1.bias"),
        ("vision_tower.encoder.layers.1.mlp.fc1.bias", "model.vision_tower.encoder.layers.1.mlp.fc1.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1.weight"),
        ("model.language_model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    ],
)
def test_canonical_keys(stored, canonical):
    assert ARCH.canonical_key(stored) == canonical
    assert ARCH.canonical_key(canonical) == canonical


def test_fingerprint_survives_dtype_and_not_another_model(model):
    first = model_fingerprint(model)
    assert first.startswith("sha256:") and len(first) == 71
    assert model_fingerprint(tiny_llava().to(torch.float16)) == first
    assert model_fingerprint(tiny_llava().to(torch.bfloat16)) == first
    assert model_fingerprint(tiny_llava(seed=1)) != first
    assert model_fingerprint(tiny_llava(layers=5)) != first
