"""Configurations of published sizes on the meta device: memory, costs and groups of models too large for a test."""

from __future__ import annotations

import pytest
import torch
import transformers

from quota.core.formats import MODULES
from quota.models import find_family
from quota.models.quantize import linear_paths, quantize_structure, quantized_linears, weight_bytes

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 152_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
LLAVA = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": 151_646}
QWEN2_VL_VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
QWEN2_VL_TEXT = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN3_VL_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2560,
    "deepstack_visual_indexes": [5, 11, 17],
}
QWEN3_VL_TEXT = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32_064,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": None,
}
QWEN2_SMALL = {
    **QWEN2,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "silu",
}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 131_072,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
}
# configuration, visual tokens of an image; written from the families' public configurations
PUBLISHED = {
    "llava interleave 0.5B": (
        lambda: transformers.LlavaConfig(vision_config=SIGLIP, text_config=QWEN2, **LLAVA),
        729,
    ),
    "LLaVA-1.6-Mistral-7B": (
        lambda: transformers.LlavaNextConfig(vision_config=CLIP, text_config=MISTRAL_7B),
        5 * 576,
    ),
    "LLaVA-OneVision-0.5B": (
        lambda: transformers.LlavaOnevisionConfig(
            vision_config={**SIGLIP, "num_hidden_layers": 26}, text_config=QWEN2_SMALL, tie_word_embeddings=True
        ),
        10 * 729,
    ),
    "InternVL3.5-8B": (
        lambda: transformers.InternVLConfig(
            vision_config=transformers.InternVLVisionConfig(attention_bias=True),
            text_config=QWEN3,
            tie_word_embeddings=False,
        ),
        13 * 256,
    ),
    "Mistral-Small-3.1-24B": (
        lambda: transformers.Mistral3Config(
            vision_config={**PIXTRAL, "patch_size": 14, "image_size": 1540},
            text_config={**MISTRAL, "intermediate_size": 32_768},
            tie_word_embeddings=False,
        ),
        3025,
    ),
    "PaliGemma-3B": (
        lambda: transformers.PaliGemmaConfig(
            vision_config={**SIGLIP, "image_size": 224},
            text_config={
                "model_type": "gemma",
                "vocab_size": 257_216,
                "hidden_size": 2048,
                "intermediate_size": 16_384,
                "num_hidden_layers": 18,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
            },
            image_token_index=257_152,
        ),
        256,
    ),
    "Pixtral-12B": (
        lambda: transformers.LlavaConfig(
            vision_config={**PIXTRAL, "patch_size": 16, "image_size": 1024},
            text_config={**MISTRAL, "intermediate_size": 14_336},
            **{**LLAVA, "image_token_index": 10},
        ),
        4096,
    ),
    "Qwen2-VL-2B": (
        lambda: transformers.Qwen2VLConfig(
            vision_config=QWEN2_VL_VISION, text_config=QWEN2_VL_TEXT, tie_word_embeddings=True
        ),
        1024,
    ),
    "Qwen3-VL-4B": (
        lambda: transformers.Qwen3VLConfig(
            vision_config=QWEN3_VL_VISION, text_config=QWEN3_VL_TEXT, tie_word_embeddings=True
        ),
        1024,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size(name):
    """Costs are those counted over the modules; every linear of every block is packed, and the bytes go down by it."""
    make, tokens = PUBLISHED[name]
    config = make()
    family = find_family(config)
    with torch.device("meta"):
        model = getattr(transformers, family.model_class)._from_config(config, dtype=torch.float16)
    blocks = {part: [model.get_submodule(path) for path in family.blocks(part)] for part in family.groups}
    shape, grid = family.pixel_shape(tokens)
    tiles = shape[0] if len(shape) == 4 else 1  # each of its own in the tower
    rows = {"vision": family.tower_rows(grid), "projector": tokens}
    linears = {
        part: sum(one.weight.numel() for block in found for one in block.modules() if isinstance(one, torch.nn.Linear))
        for part, found in blocks.items()
    }
    embedded = rows["vision"] - tiles * getattr(family, "class_tokens", 0)
    patches = embedded * getattr(family, "patch", 3 * 14**2) * family.vision_hidden_size
    attention = 2 * rows["vision"] ** 2 // tiles * family.vision_hidden_size * family.vision_layers_used
    counted = patches + attention + sum(linears[part] * rows[part] for part in rows)
    assert family.vision_macs(tokens) == counted
    before, paths = weight_bytes(model), linear_paths(family, MODULES)
    quantize_structure(model, MODULES)
    assert set(quantized_linears(model)) == set(paths)
    saved = 2 * sum(linears.values()) - sum(linears.values()) // 2
    assert before - saved < weight_bytes(model) < before - 0.9 * saved
