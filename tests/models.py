"""Tiny random LLaVA models and inputs for tests: no hub, no files, about 0.2 M parameters."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN, PAD_TOKEN = 120, 0


def tiny_llava(
    layers: int = 4, heads: int = 4, kv_heads: int = 2, image_size: int = 56, seed: int = 0, vision_layers: int = 3
) -> LlavaForConditionalGeneration:
    """A float32 LLaVA: hidden 64, ffn 128, vocabulary 128, (image_size / 14)^2 visual tokens, the last CLIP layer unused; sdpa attention, eval mode.

    Weights are larger than a usual initialisation so that greedy decoding is not degenerate. Deterministic under `seed`.
    """
    patch = 14
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=vision_layers, num_attention_heads=2, image_size=image_size, patch_size=patch,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            max_position_embeddings=2048, pad_token_id=PAD_TOKEN, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=(image_size // patch) ** 2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                std = 1.0 if "embed_tokens" in name or "lm_head" in name else 1.6 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def llava_inputs(model: LlavaForConditionalGeneration, rows: tuple[tuple[int, int], ...] = ((3, 5), (9, 4)), seed: int = 1) -> dict[str, torch.Tensor]:
    """A left-padded batch with one picture per row; rows: (text tokens before the picture, after it).

    Returns input_ids, attention_mask int64 [B, S] and pixel_values float32 [B, 3, size, size].
    """
    generator = torch.Generator().manual_seed(seed)
    visual = model.config.image_seq_length

    def words(count: int) -> torch.Tensor:
        return torch.randint(3, 119, (count,), generator=generator)

    samples = [torch.cat([torch.tensor([1]), words(a), torch.full((visual,), IMAGE_TOKEN), words(b)]) for a, b in rows]
    longest = max(map(len, samples))
    ids = torch.stack([torch.cat([torch.full((longest - len(s),), PAD_TOKEN), s]) for s in samples])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(s)), torch.ones(len(s))]) for s in samples]).long()
    size = model.config.vision_config.image_size
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(len(rows), 3, size, size, generator=generator)}
