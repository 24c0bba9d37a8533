"""Tiny random models that show an image in tiles, and inputs for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from quota.models import find_family
from quota.models.images import ImageInput
from tests.weights import IMAGE_TOKEN, PAD_TOKEN, scatter

TILE_PX, TILE_PATCH = 28, 7
RESOLUTIONS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]
DECODER = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD_TOKEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_next(layers: int = 4, seed: int = 0) -> Any:
    """A float32 LLaVA-NeXT of `tiny_llava`'s widths over tiles of 16 visual tokens, up to four of them; a Mistral
    decoder. Deterministic under `seed`."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=TILE_PX,
        patch_size=TILE_PATCH,
        projection_dim=32,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=MistralConfig(**DECODER, num_hidden_layers=layers, sliding_window=None),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=RESOLUTIONS,
    )
    return _tiled(LlavaNextForConditionalGeneration, config, seed)


def tiny_onevision(layers: int = 4, seed: int = 0) -> Any:
    """A float32 LLaVA-OneVision of the same tiles, SigLIP and Qwen2; a grid of more than two tiles shrinks. Tied word
    embeddings. Deterministic under `seed`."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=TILE_PX,
        patch_size=TILE_PATCH,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**DECODER, num_hidden_layers=layers),
        image_token_index=IMAGE_TOKEN,
        video_token_index=121,
        image_grid_pinpoints=[[28, 28], *RESOLUTIONS],
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=True,
    )
    return _tiled(LlavaOnevisionForConditionalGeneration, config, seed)


def tiny_internvl(layers: int = 4, seed: int = 0, decoder: str = "qwen3", qk_norm: bool = True) -> Any:
    """A float32 InternVL of tiles of 4 visual tokens: RMS norms, norms of queries and keys and LayerScale far from one
    in the tower (or, without `qk_norm`, LayerNorms), a Qwen3 decoder (or "qwen2"). Deterministic under `seed`."""
    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=not qk_norm,
        use_qk_norm=qk_norm,
        norm_type="rms_norm" if qk_norm else "layer_norm",
        image_size=[TILE_PX, TILE_PX],
        patch_size=[TILE_PATCH, TILE_PATCH],
    )
    kinds = {"qwen2": Qwen2Config, "qwen3": partial(Qwen3Config, head_dim=32)}
    config = InternVLConfig(
        vision_config=vision,
        text_config=kinds[decoder](**DECODER, num_hidden_layers=layers),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = _tiled(InternVLForConditionalGeneration, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def _tiled(model_class: Any, config: Any, seed: int) -> Any:
    model = model_class._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    scatter(model, torch.Generator().manual_seed(seed + 7))
    return model


def tiles_of(model: Any, height: int, width: int, seed: int = 0) -> ImageInput:
    """An image of that size as the processor of a model in tiles makes it."""
    family, generator = find_family(model), torch.Generator().manual_seed(seed)
    if family.newline_path:
        count = 1 + math.prod(family.lines((0, height, width)).tiles)
        grid = (count, height, width)
    else:
        columns, rows = get_optimal_tiled_canvas((height, width), (TILE_PX, TILE_PX), 1, 4)
        count = 1 + rows * columns if rows * columns > 1 else 1
        grid = (count, 1, 1)
    return ImageInput(torch.randn(count, 3, TILE_PX, TILE_PX, generator=generator), grid)


def tile_pixels(images: Sequence[ImageInput]) -> dict[str, torch.Tensor]:
    """The model's inputs for images in tiles: padded to the one with most, or one below the other."""
    if images[0].grid[1:] == (1, 1):
        return {"pixel_values": torch.cat([image.pixels for image in images])}
    most = max(len(image.pixels) for image in images)
    padded = [torch.cat([i.pixels, torch.zeros(most - len(i.pixels), 3, TILE_PX, TILE_PX)]) for i in images]
    return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([i.grid[1:] for i in images])}


def tile_inputs(
    model: Any, rows: Any = ((3, ((56, 30),), 5), (9, ((30, 100),), 4)), seed: int = 1
) -> dict[str, torch.Tensor]:
    """A left-padded batch. rows: (text tokens before, (height, width) of each image, text tokens after); a word stands
    between images, no size is a text-only row.

    Returns input_ids, attention_mask [B, S], and, where there are images, pixel_values [images, tiles, 3, px, px] and
    image_sizes [images, 2], or pixel_values [tiles, 3, px, px].
    """
    generator, family = torch.Generator().manual_seed(seed), find_family(model)

    def words(count: int) -> torch.Tensor:
        return torch.randint(3, 119, (count,), generator=generator)

    samples, images = [], []
    for before, sizes, after in rows:
        own = [tiles_of(model, *size, seed=seed + len(images) + number) for number, size in enumerate(sizes)]
        images += own
        shown = [part for i in own for part in (torch.full((family.image_tokens(i),), IMAGE_TOKEN), words(1))]
        samples.append(torch.cat([torch.tensor([1]), words(before), *shown, words(after)]))
    longest = max(map(len, samples))
    ids = torch.stack([torch.cat([torch.full((longest - len(s),), PAD_TOKEN), s]) for s in samples])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(s)), torch.ones(len(s))]) for s in samples]).long()
    return {"input_ids": ids, "attention_mask": mask, **(tile_pixels(images) if images else {})}


TILE_ROWS = ((3, ((56, 30),), 5), (9, ((30, 100),), 4), (6, (), 2), (1, ((40, 41), (100, 20)), 3))
