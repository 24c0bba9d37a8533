"""What was trained, as a small file: the projector in LLaVA's form and LoRA factors, bfloat16, with the digest of the
checkpoint they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.pretrained.model import SCALE, Projector

_PROJECTOR, _FEATURES = "projector.", "features."  # in LLaVA's form; by which features are standardized in training


@torch.no_grad()
def load_start(path: Path, parameters: dict[str, Any], projector: Projector) -> bool:
    """Copy the LoRA factors of a file into parameters of the same names, and its projector where the file says how
    features are standardized. Returns whether it does: else the projector has its dense stage to go through."""
    found = load_file(path)
    for name, p in parameters.items():
        if ".lora_" in name:
            p.copy_(found[name].float())
    if f"{_FEATURES}mean" not in found:
        return False
    mean, deviation = (found[f"{_FEATURES}{name}"] for name in ("mean", "deviation"))
    given = {name.removeprefix(_PROJECTOR): t.float() for name, t in found.items() if name.startswith(_PROJECTOR)}
    projector.unfold(given, mean, deviation)
    return True


def rounded(projector: Projector, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file: the projector in LLaVA's form and named LoRA factors in bfloat16, and in float32 by what
    features are standardized in training."""
    state = {f"{_PROJECTOR}{name}": tensor for name, tensor in projector.folded().items()}
    state |= {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    out = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    return out | {f"{_FEATURES}mean": projector.mean.clone(), f"{_FEATURES}deviation": projector.deviation.clone()}


def write(path: Path, state: dict[str, Tensor], **metadata: str) -> None:
    """Replace the file as a whole. metadata: `digest` of the checkpoint, and how far training was."""
    partial = path.with_suffix(".part")
    save_file(state, partial, metadata={"lora_scale": str(SCALE), **metadata})
    partial.replace(path)


def digest_of(path: Path) -> str:
    """The digest of the checkpoint that a file makes; "" where it does not say."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("digest", "")


def apply(model: Any, path: Path) -> None:
    """Put a file into a float16 `LlavaForConditionalGeneration` of the parts: the projector as it is, LoRA added to the
    weights.

    Sums in float64, rounded once: the same bits on every machine.
    """
    found = load_file(path)
    projector = {name.removeprefix(_PROJECTOR): tensor for name, tensor in found.items() if name.startswith(_PROJECTOR)}
    model.model.multi_modal_projector.load_state_dict(projector)
    with torch.no_grad():
        for name, factor in found.items():
            if name.endswith(".lora_a"):
                path_of = name.removesuffix(".lora_a")
                linear = model.model.language_model.get_submodule(path_of)
                product = found[f"{path_of}.lora_b"].double() @ factor.double()
                linear.weight.copy_((linear.weight.double() + SCALE * product).half())
