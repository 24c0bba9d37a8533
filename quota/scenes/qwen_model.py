"""The second embedded model's architecture and processor: a small but real `Qwen2_5_VLForConditionalGeneration`."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from quota.models.qwen2_5_vl import Qwen2_5_VLProcessor
from quota.scenes.vocabulary import QWEN_PATCH_SIZE, QWEN_SPECIAL_TOKENS, QWEN_WINDOW_PX, QWEN_WORDS

WIDTH, LAYERS = 192, 8
_IDS = {word: i for i, word in enumerate(QWEN_WORDS)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `QWEN_WORDS`: lower case, punctuation apart, the markers of Qwen's chat form as
    special tokens."""
    tokenizer = Tokenizer(models.WordLevel(_IDS, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        additional_special_tokens=list(QWEN_SPECIAL_TOKENS[2:]),
    )


def build_processor(patch_px: int = QWEN_PATCH_SIZE) -> Qwen2_5_VLProcessor:
    """Images from 4 visual tokens to 16 x 16 keep their size (rounded to whole tokens); larger ones are reduced."""
    token = (2 * patch_px) ** 2
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=patch_px, merge_size=2, size={"shortest_edge": 4 * token, "longest_edge": 256 * token}
    )
    return Qwen2_5_VLProcessor(image_processor=image_processor, tokenizer=build_tokenizer())


def build_config(width: int = WIDTH, layers: int = LAYERS) -> Qwen2_5_VLConfig:
    """About 4 M parameters: four tower blocks (the second and fourth attend to everything), three query heads per KV
    head of 64, tied embeddings.

    The sections of the rotary frequencies are not the published shares: time has one, rows the next four (a turn in 8
    to 20 rows) and columns begin at a turn in 26, because images have at most 16 x 16 tokens; with [4, 14, 14] a
    column would hardly turn.
    """
    if width % 192:
        raise ValueError(f"width: expected a multiple of 192 (groups of three heads of 64), got {width}")
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "num_heads": 2,
        "intermediate_size": 320,
        "patch_size": QWEN_PATCH_SIZE,
        "window_size": QWEN_WINDOW_PX,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": width,
        "hidden_act": "silu",
    }
    text = {
        "vocab_size": len(QWEN_WORDS),
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 4, 27]},
        "pad_token_id": _IDS["<|endoftext|>"],
        "bos_token_id": None,
        "eos_token_id": _IDS["<|im_end|>"],
    }
    ids: Any = {
        f"{name}_token_id": _IDS[f"<|{word}|>"]
        for name, word in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **ids)


def build_model(config: Any, seed: int = 0) -> Any:
    """A freshly initialised float32 model, deterministic under `seed`."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        # unit-scale word vectors: the dense stage classifies visual tokens against them
        model.get_input_embeddings().weight.normal_(0, config.text_config.hidden_size**-0.5)
    return model
