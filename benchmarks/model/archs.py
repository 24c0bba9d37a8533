"""The model configurations that `python -m benchmarks model` makes with synthetic weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

from quota.core.errors import UsageError

VISUAL_TOKENS = 576  # LLaVA: 336 pixels in patches of 14; Qwen2.5-VL: 672 pixels, four patches of 14 a token


def llava_7b() -> LlavaConfig:
    """LLaVA-1.5-7B: CLIP-L/14 at 336 pixels, Vicuna-7B."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=32001,
        tie_word_embeddings=False,
    )
    return _llava(vision, text, image_token=32000)


def llama_135m() -> LlavaConfig:
    """A 135M-class LLaMA (30 layers of 576) behind a CLIP-B-sized tower: many small ops, so overhead per op decides."""
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=336,
        patch_size=14,
        projection_dim=512,
    )
    text = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return _llava(vision, text, image_token=49151)


def qwen_7b() -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B: 28 heads on 4 KV heads, biases, M-RoPE, a windowed tower of 32 blocks."""
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": 3584,
    }
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    ids: Any = {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)


def embedded() -> LlavaConfig:
    """The embedded model's sizes."""
    from quota.scenes.model import build_config

    return build_config()


def embedded_qwen() -> Qwen2_5_VLConfig:
    """The second embedded model's sizes."""
    from quota.scenes.qwen_model import build_config

    return build_config()


def _llava(vision: CLIPVisionConfig, text: LlamaConfig, image_token: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
    )


ARCHS: dict[str, Callable[[], Any]] = {
    "llava-1.5-7b": llava_7b,
    "qwen2.5-vl-7b": qwen_7b,
    "135m": llama_135m,
    "embedded": embedded,
    "embedded-qwen": embedded_qwen,
}


def config_of(arch: str, layers: int | None = None) -> Any:
    """The configuration of `arch`, cut to its first `layers` decoder layers."""
    if arch not in ARCHS:
        raise UsageError(f"--arch: expected one of {', '.join(ARCHS)}; got {arch!r}")
    config = ARCHS[arch]()
    text = config.text_config
    if layers is not None:
        if not 1 <= layers <= text.num_hidden_layers:
            raise UsageError(f"--layers: expected 1 to {text.num_hidden_layers} for {arch}, got {layers}")
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config
