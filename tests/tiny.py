"""Tiny random models and inputs for tests: no hub, no files, about 0.2 M parameters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

from tests.pixtral import pixtral_inputs, tiny_mistral3, tiny_pixtral
from tests.tiled import TILE_ROWS, tile_inputs, tiny_internvl, tiny_next, tiny_onevision
from tests.weights import IMAGE_TOKEN, PAD_TOKEN, scatter


def tiny_llava(
    layers: int = 4, heads: int = 4, kv_heads: int = 2, image_size: int = 56, seed: int = 0, vision_layers: int = 3
) -> LlavaForConditionalGeneration:
    """A float32 LLaVA: hidden 64, ffn 128, vocabulary 128, (image_size / 14)^2 visual tokens, the last CLIP layer
    unused; sdpa attention, eval mode.

    Weights are larger than a usual initialisation so that greedy decoding is not degenerate. Deterministic under
    `seed`.
    """
    patch = 14
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=vision_layers,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=2048,
            pad_token_id=PAD_TOKEN,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch) ** 2,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed + 7)
    scatter(model, generator)
    return model


def llava_inputs(
    model: LlavaForConditionalGeneration, rows: tuple[tuple[int, int], ...] = ((3, 5), (9, 4)), seed: int = 1
) -> dict[str, torch.Tensor]:
    """A left-padded batch with one picture per row; rows: (text tokens before the picture, after it).

    Returns input_ids, attention_mask int64 [B, S] and pixel_values float32 [B, 3, size, size].
    """
    generator = torch.Generator().manual_seed(seed)
    visual = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2

    def words(count: int) -> torch.Tensor:
        return torch.randint(3, 119, (count,), generator=generator)

    samples = [torch.cat([torch.tensor([1]), words(a), torch.full((visual,), IMAGE_TOKEN), words(b)]) for a, b in rows]
    longest = max(map(len, samples))
    ids = torch.stack([torch.cat([torch.full((longest - len(s),), PAD_TOKEN), s]) for s in samples])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(s)), torch.ones(len(s))]) for s in samples]).long()
    size = model.config.vision_config.image_size
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(len(rows), 3, size, size, generator=generator),
    }


def tiny_dinov2(**options: Any) -> LlavaForConditionalGeneration:
    """`tiny_llava` with a DINOv2 tower of the same sizes, its LayerScale far from one; tied word embeddings.
    Deterministic under `seed`."""
    clip = tiny_llava(**options)
    config, seed = clip.config, options.get("seed", 0)
    clip_vision = config.vision_config
    vision = Dinov2Config(
        hidden_size=32,
        mlp_ratio=2,
        num_hidden_layers=clip_vision.num_hidden_layers,
        num_attention_heads=2,
        image_size=clip_vision.image_size,
        patch_size=clip_vision.patch_size,
    )
    tied = LlavaConfig(
        vision_config=vision,
        text_config=config.text_config,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=config.image_seq_length,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration._from_config(tied, attn_implementation="sdpa", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed + 7)
    scatter(model, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lambda1"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def tiny_siglip(seed: int = 0, vision_layers: int = 2, feature: int = -1, decoder: str = "qwen2") -> Any:
    """`tiny_llava`'s sizes with a SigLIP tower whose every layer feeds the projector, and a Qwen2 decoder (or
    "llama"). Deterministic under `seed`."""
    text = tiny_llava(layers=4).config.text_config if decoder == "llama" else None
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=vision_layers,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        text_config=text
        or Qwen2Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            pad_token_id=PAD_TOKEN,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=feature,
        vision_feature_select_strategy="full",
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    scatter(model, torch.Generator().manual_seed(seed + 7))
    return model


QWEN_IDS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}


QWEN_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD_TOKEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]},
}


def _qwen(model_class: Any, config: Any, seed: int, key_bias: float = 0.0) -> Any:
    model = model_class._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed + 7)
    scatter(model, generator)
    if key_bias:
        for layer in (model.model.language_model.layers[0], model.model.language_model.layers[-1]):
            _plant(layer.self_attn, key_bias, generator)
    return model


def tiny_qwen(
    layers: int = 4, heads: int = 4, kv_heads: int = 2, seed: int = 0, key_bias: float = 0.0, tied: bool = False
) -> Any:
    """A float32 Qwen2.5-VL: hidden 64, ffn 128, vocabulary 128, patches of 4 px in windows of 4 x 4 (2 x 2 visual
    tokens), one tower block of three with full attention. Deterministic under `seed`.

    key_bias: norm of a key bias planted in the first and last decoder layer, in one slow and one fast rotary pair of
    every head, with queries whose part there is small (as trained models have it: the bias must not decide everything).
    """
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 64,
    }
    text = {
        **QWEN_TEXT,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied, **QWEN_IDS)
    return _qwen(Qwen2_5_VLForConditionalGeneration, config, seed, key_bias)


def tiny_qwen2(layers: int = 4, seed: int = 0, key_bias: float = 0.0) -> Any:
    """A float32 Qwen2-VL of `tiny_qwen`'s decoder and patches; two tower blocks."""
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "hidden_size": 64}
    config = Qwen2VLConfig(
        vision_config=vision,
        text_config={**QWEN_TEXT, "num_hidden_layers": layers},
        tie_word_embeddings=True,
        **QWEN_IDS,
    )
    return _qwen(Qwen2VLForConditionalGeneration, config, seed, key_bias)


def tiny_qwen3(layers: int = 4, seed: int = 0) -> Any:
    """A float32 Qwen3-VL: heads wider together than the hidden state, positions of 5 x 5 patches, two planes. Two of
    three tower blocks are tapped."""
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {**QWEN_TEXT, "num_hidden_layers": layers, "head_dim": 32, "rope_parameters": rope}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **QWEN_IDS)
    return _qwen(Qwen3VLForConditionalGeneration, config, seed)


@torch.no_grad()
def _plant(attention: Any, norm: float, generator: torch.Generator) -> None:
    pairs = torch.tensor([1, 6, 9, 14])  # channels (1, 9) turn fast, (6, 14) slowly, at head dimension 16
    bias = torch.zeros(attention.k_proj.bias.numel() // 16, 16)
    bias[:, pairs] = torch.randn(len(bias), 4, generator=generator)
    attention.k_proj.bias.copy_((bias / bias.norm(dim=-1, keepdim=True) * norm).flatten())
    for tensor in (attention.q_proj.weight, attention.q_proj.bias):
        tensor.view(-1, 16, *tensor.shape[1:])[:, pairs] *= 4 / norm


def qwen_inputs(
    model: Any, rows: Any = ((3, ((8, 8),), 5), (9, ((4, 6),), 4)), seed: int = 1
) -> dict[str, torch.Tensor]:
    """A left-padded batch. rows: (text tokens before, (rows, columns) of each picture's patch grid, text tokens after);
    no grid is a text-only row.

    Returns input_ids, attention_mask, mm_token_type_ids [B, S], and, where there are pictures, pixel_values [patches,
    96] and image_grid_thw [pictures, 3].
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> torch.Tensor:
        return torch.randint(3, 119, (count,), generator=generator)

    start, end = (torch.tensor([QWEN_IDS[f"vision_{name}_token_id"]]) for name in ("start", "end"))
    samples = []
    for before, grids, after in rows:
        pictures = [part for h, w in grids for part in (start, torch.full((h * w // 4,), IMAGE_TOKEN), end)]
        samples.append(torch.cat([torch.tensor([1]), words(before), *pictures, words(after)]))
    longest = max(map(len, samples))
    ids = torch.stack([torch.cat([torch.full((longest - len(s),), PAD_TOKEN), s]) for s in samples])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(s)), torch.ones(len(s))]) for s in samples]).long()
    out = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}
    sizes = [(1, h, w) for _, grids, _ in rows for h, w in grids]
    if sizes:
        out["image_grid_thw"] = torch.tensor(sizes)
        out["pixel_values"] = torch.randn(sum(h * w for _, h, w in sizes), 96, generator=generator)
    return out


def tiny_paligemma(seed: int = 0) -> Any:
    """A float32 PaliGemma: `tiny_siglip`'s tower without its head, 16 visual tokens, one key and value head for four
    wider ones."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )
    text = GemmaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
    )
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, projection_dim=64)
    model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    scatter(model, torch.Generator().manual_seed(seed + 7))
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if "norm" in name:
                parameter.sub_(1)  # they multiply by 1 + weight
        model.model.language_model.embed_tokens.weight.div_(24)  # scaled by the root of the width, and tied
    return model.eval()


def paligemma_inputs(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    """As `llava_inputs`, with token_type_ids: all of it is prompt."""
    inputs = llava_inputs(model, **options)
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


MIXED_ROWS = ((3, ((8, 8),), 5), (9, ((4, 6),), 4), (6, (), 2), (1, ((4, 4), (8, 6)), 3))

# per file of a family in quota.models: a tiny model, and inputs for it
TINY = {
    "llava": (tiny_llava, llava_inputs),
    "llava_dinov2": (tiny_dinov2, llava_inputs),
    "llava_pixtral": (tiny_pixtral, pixtral_inputs),
    "llava_siglip": (tiny_siglip, llava_inputs),
    "llava_next": (tiny_next, tile_inputs),
    "llava_onevision": (tiny_onevision, tile_inputs),
    "internvl": (tiny_internvl, tile_inputs),
    "mistral3": (tiny_mistral3, pixtral_inputs),
    "paligemma": (tiny_paligemma, paligemma_inputs),
    "qwen2_vl": (tiny_qwen2, qwen_inputs),
    "qwen2_5_vl": (tiny_qwen, qwen_inputs),
    "qwen3_vl": (tiny_qwen3, qwen_inputs),
}

# rows of a mixed batch: a short and a long prompt, an image first; where resolution is dynamic also two images and none
ROWS = {
    "llava": ((3, 5), (9, 4), (0, 2)),
    "llava_dinov2": ((3, 5), (9, 4), (0, 2)),
    "llava_siglip": ((3, 5), (9, 4), (0, 2)),
    "paligemma": ((3, 5), (9, 4), (0, 2)),
    **dict.fromkeys(("llava_next", "llava_onevision", "internvl"), TILE_ROWS),
    **dict.fromkeys(("llava_pixtral", "mistral3"), MIXED_ROWS),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), MIXED_ROWS),
}
# families that show an image in tiles
TILED = ("llava_next", "llava_onevision", "internvl")
# families whose tiny model can be made with a large bias of the keys
KEY_BIASED = ("qwen2_vl", "qwen2_5_vl")
