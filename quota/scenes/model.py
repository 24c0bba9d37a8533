"""The embedded model's architecture and processor: a small but real `LlavaForConditionalGeneration`."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from quota.scenes.vocabulary import IMAGE_SIZE, PATCH_SIZE, WORDS

# Rendered form: "USER: <image>\nwhat color is the star ? ASSISTANT:", as LLaVA-1.5 renders it.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ message['role'].upper() + ': ' }}{%- if message['content'] is string -%}{{"
    " message['content'] + ' ' }}{%- else -%}{%- for part in message['content'] | selectattr('type', 'equalto',"
    " 'image') -%}{{ '<image>\\n' }}{%- endfor -%}{%- for part in message['content'] | selectattr('type', 'equalto',"
    " 'text') -%}{{ part['text'] + ' ' }}{%- endfor -%}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{"
    " 'ASSISTANT:' }}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `vocabulary.WORDS`: lower case, punctuation apart, `<s>` in front."""
    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(size_px: int = IMAGE_SIZE) -> LlavaProcessor:
    """Processor in LLaVA-1.5 form; `num_additional_image_tokens=1` is the CLS token, so 336 px gives exactly 576 visual
    tokens."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size_px}, crop_size={"height": size_px, "width": size_px}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_config(size_px: int = IMAGE_SIZE, width: int = 192, layers: int = 8) -> LlavaConfig:
    """About 5 M parameters: CLIP-style tower (penultimate features), two-layer GELU projector, LLaMA with head_dim
    64."""
    if width % 64:
        raise ValueError(f"width: expected a multiple of head_dim 64, got {width}")
    ids = {word: i for i, word in enumerate(WORDS)}
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=size_px,
        patch_size=PATCH_SIZE,
        projection_dim=128,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(size_px // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
    )


def build_model(config: Any, seed: int = 0) -> Any:
    """A freshly initialised float32 `LlavaForConditionalGeneration` for a `LlavaConfig`, deterministic under `seed`."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    embeddings = model.model.vision_tower.embeddings
    with torch.no_grad():
        # unit-scale word vectors: the dense stage classifies visual tokens against them
        model.get_input_embeddings().weight.normal_(0, config.text_config.hidden_size**-0.5)
        # bright patches drown the place: without this, their embeddings are eighty times its size and "where" is never
        # learned
        embeddings.patch_embedding.weight.mul_(0.05)
        embeddings.position_embedding.weight[1:] += smooth_places(
            config.vision_config.image_size // PATCH_SIZE, config.vision_config.hidden_size
        )
    return model


def smooth_places(side: int, width: int, size: float = 0.05) -> torch.Tensor:
    """Plane waves of random direction, at most one cycle per image: float32 [side * side, width] of standard
    deviation about 0.7 `size`."""
    generator = torch.Generator().manual_seed(0)
    frequency = (torch.rand(2, width, generator=generator) * 2 - 1) * 2 * torch.pi
    phase = torch.rand(width, generator=generator) * 2 * torch.pi
    at = (torch.arange(side) + 0.5) / side
    rows, columns = torch.meshgrid(at, at, indexing="ij")
    return size * torch.cos(rows.reshape(-1, 1) * frequency[0] + columns.reshape(-1, 1) * frequency[1] + phase)
