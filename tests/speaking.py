"""Tiny random models of the embedded benchmark's form with its processors: they read text and images, and what they
say differs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import PixtralImageProcessorPil, SiglipImageProcessorPil

from quota.models.llava_pixtral import PixtralProcessor
from quota.models.paligemma import PaliGemmaProcessor
from quota.models.rtn import quantize_rtn
from quota.scenes import model as llava
from quota.scenes import qwen_model as qwen
from tests.pixtral import tiny_mistral3
from tests.tiny import tiny_paligemma

INSTRUCTED = (
    "{%- for message in messages -%}{%- if message['role'] != 'assistant' -%}[INST]{%- endif -%}{%- if"
    " message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}{{"
    " '[IMG]' if part['type'] == 'image' else part['text'] }}{%- endfor -%}{%- endif -%}{%- if message['role'] !="
    " 'assistant' -%}[/INST]{%- endif -%}{%- endfor -%}"
)


def pixtral_processor(merge: int, longest: int = 40) -> PixtralProcessor:
    """The scenes' words in the form of Mistral's models; patches of 4 px, images of at most `longest` px a side."""
    tokenizer = llava.build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    images = PixtralImageProcessorPil(patch_size=4, size={"longest_edge": longest})
    return PixtralProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        spatial_merge_size=merge,
        chat_template=INSTRUCTED,
    )


def paligemma_processor() -> PaliGemmaProcessor:
    """The scenes' words; images of 56 px, 16 visual tokens."""
    images = SiglipImageProcessorPil(size={"height": 56, "width": 56}, image_seq_length=16)
    return PaliGemmaProcessor(image_processor=images, tokenizer=llava.build_tokenizer())


def speaking(family: str, layers: int = 4) -> Any:
    """A float model in eval mode, its processor on it; of LLaVA 16 visual tokens and width 64."""
    if family == "llava":
        made, processor = llava.build_model(llava.build_config(56, 64, layers), seed=1), llava.build_processor(56)
    elif family == "paligemma":
        made, processor = tiny_paligemma(), paligemma_processor()
        made.config.image_token_id = processor.image_token_id
    elif family == "mistral3":
        made, processor = tiny_mistral3(), pixtral_processor(2, 100)
        made.config.image_token_id = processor.image_token_id
    else:
        made, processor = qwen.build_model(qwen.build_config(layers=layers), seed=1), qwen.build_processor()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim >= 2:  # larger than a usual initialisation, so that greedy answers differ
                std = 1.0 if "embed_tokens" in name or "lm_head" in name else 1.6 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        if family == "paligemma":  # scaled by the root of the width, and tied
            made.model.language_model.embed_tokens.weight.div_(24)
    made.eval().processor = processor
    return made


@cache
def served(family: str) -> Any:
    """The same, W4A4KV4 whole; it is shared, so leave it as it was."""
    made = speaking(family)
    processor = made.processor
    made = quantize_rtn(made)
    made.processor = processor
    return made
