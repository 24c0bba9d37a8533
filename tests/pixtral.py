"""Tiny random models with a Pixtral tower, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from tests.weights import IMAGE_TOKEN, PAD_TOKEN, scatter

PIXTRAL_BREAK, PIXTRAL_END = 121, 122


def _pixtral(config_class: Any, model_class: Any, seed: int, vision: dict[str, Any], head: int, **fields: Any) -> Any:
    tower = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, image_size=40, patch_size=4, **vision
    )
    text = MistralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head,
        max_position_embeddings=2048,
        sliding_window=None,
        pad_token_id=PAD_TOKEN,
    )
    config = config_class(vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN, **fields)
    model = model_class._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    scatter(model, torch.Generator().manual_seed(seed + 7))
    return model


def tiny_pixtral(seed: int = 0) -> Any:
    """A float32 LLaVA with a Pixtral tower: `tiny_llava`'s sizes, patches of 4 px, the last of three tower layers
    unused, Mistral decoder."""
    vision = {"num_hidden_layers": 3, "hidden_act": "silu"}
    fields = {"vision_feature_layer": -2, "vision_feature_select_strategy": "full"}
    return _pixtral(LlavaConfig, LlavaForConditionalGeneration, seed, vision, 16, **fields)


def tiny_mistral3(seed: int = 0) -> Any:
    """A float32 Mistral-Small-3: two tower layers with a GELU gate, 2 x 2 merger, heads wider together than the hidden
    state, untied words."""
    vision, fields = {"num_hidden_layers": 2, "hidden_act": "gelu"}, {"tie_word_embeddings": False}
    return _pixtral(Mistral3Config, Mistral3ForConditionalGeneration, seed, vision, 32, **fields)


def pixtral_ids(rows: int, columns: int) -> list[int]:
    """The tokens of one picture of rows x columns visual tokens."""
    ids = ([IMAGE_TOKEN] * columns + [PIXTRAL_BREAK]) * rows
    return [*ids[:-1], PIXTRAL_END]


def pixtral_inputs(
    model: Any, rows: Any = ((3, ((8, 8),), 5), (9, ((4, 6),), 4)), seed: int = 1
) -> dict[str, torch.Tensor]:
    """As `qwen_inputs`, with as many visual tokens. Returns input_ids, attention_mask [B, S], and, where there are
    pictures, padded pixel_values [pictures, 3, H, W] and image_sizes [pictures, 2]."""
    generator = torch.Generator().manual_seed(seed)
    side = 4 * getattr(model.config, "spatial_merge_size", 1)

    def words(count: int) -> torch.Tensor:
        return torch.randint(3, 119, (count,), generator=generator)

    samples = []
    for before, grids, after in rows:
        pictures = [torch.tensor(pixtral_ids(h // 2, w // 2)) for h, w in grids]
        samples.append(torch.cat([torch.tensor([1]), words(before), *pictures, words(after)]))
    longest = max(map(len, samples))
    ids = torch.stack([torch.cat([torch.full((longest - len(s),), PAD_TOKEN), s]) for s in samples])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(s)), torch.ones(len(s))]) for s in samples]).long()
    sizes = [(h // 2 * side, w // 2 * side) for _, grids, _ in rows for h, w in grids]
    if not sizes:
        return {"input_ids": ids, "attention_mask": mask}
    pictures = [torch.randn(3, h, w, generator=generator) for h, w in sizes]
    return {"input_ids": ids, "attention_mask": mask, **pixtral_pixels(pictures)}


def pixtral_pixels(pictures: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pictures [3, h, w] as the processor hands them over: padded to one size, with the size of each."""
    sizes = torch.tensor([picture.shape[-2:] for picture in pictures])
    height, width = sizes.amax(0).tolist()
    padded = [torch.nn.functional.pad(p, (0, width - p.shape[-1], 0, height - p.shape[-2])) for p in pictures]
    return {"pixel_values": torch.stack(padded), "image_sizes": sizes}
