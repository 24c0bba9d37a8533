"""A full-size quantized checkpoint or model with random weights, made a block at a time: its size on disk, memory and
speed are a real one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from quota.core.checkpoint import CheckpointWriter, Manifest
from quota.core.formats import DEFAULT, MODULES
from quota.models import find_family, fingerprint
from quota.models.quantize import quantize_structure
from quota.nn.linear import QuantLinear
from quota.quant.affine import quantize_weight
from quota.quant.transform import apply_kronecker, hadamard
from quota.runtime.load import fill_derived

FLOAT = torch.bfloat16  # of what is not quantized: embeddings, norms, head, patch embedding, unused vision layers
_SHARD_BYTES = 1024**3
_NUMBERS_AT_ONCE = 1 << 24  # of a weight, so that memory does not grow with the layer


def make_checkpoint(
    config: Any, folder: Path, progress: Callable[[int, int], None] | None = None, seed: int = 0
) -> Path:
    """Write a quantized checkpoint of `config` with weights drawn from `seed`; returns `folder`. progress(done, all)
    counts blocks.

    Weights are normal with variance 1 / K (and 1 / (2 layers) of that into the residual stream), so that activations
    keep a size. All layers hold the same ones: seconds per shape instead of minutes per model, and as much to store and
    to compute with.
    """
    model = quantized_skeleton(config)
    embed = _embedding(config, seed, "cpu")
    manifest = Manifest(
        DEFAULT,
        MODULES,
        fingerprint(config, embed),
        calibration={"method": "synthetic weights, round to nearest", "seed": seed},
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with CheckpointWriter(folder, manifest, max_shard_bytes=_SHARD_BYTES) as writer:
        writer.add_config(config)
        for number, (tensors, blocks) in enumerate(_blocks(model, embed, seed), start=1):
            writer.add(tensors)
            if progress:
                progress(number, blocks)
    return folder


def make_model(config: Any, device: str = "cpu", seed: int = 0) -> Any:
    """The model that `make_checkpoint` would write, made on `device` a block at a time, in memory of its own and
    without a file. In eval mode.

    Its random numbers are those of the device's generator, so only on the CPU do they equal the checkpoint's.
    """
    model = quantized_skeleton(config)
    embed = _embedding(config, seed, device)
    state: dict[str, Tensor] = {}
    for tensors, _ in _blocks(model, embed, seed):
        state |= {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    fill_derived(model)
    return model.to(device).eval().requires_grad_(False)


def quantized_skeleton(config: Any) -> Any:
    """The model of `config`, quantized, on the meta device: shapes and dtypes of everything a checkpoint holds."""
    with torch.device("meta"):
        model: Any = getattr(transformers, find_family(config).model_class)._from_config(config, dtype=FLOAT)
    return quantize_structure(model, MODULES)


def _embedding(config: Any, seed: int, device: str) -> Tensor:
    return _normal(seed, config.text_config.vocab_size, config.text_config.hidden_size, std=0.02, device=device).to(
        FLOAT
    )


def _blocks(model: Any, embed: Tensor, seed: int) -> Iterator[tuple[dict[str, Tensor], int]]:
    """(the tensors of a block, how many blocks there are), on the device of the embedding; equal groups are the same
    tensors again."""
    config, device = model.config, embed.device.type
    groups = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    tied = f"{find_family(config).lm_head_path}.weight" if config.tie_word_embeddings else None
    names = [name for name in model.state_dict() if name.rpartition(".")[0] not in groups and name != tied]
    blocks = len(names) + len(groups)
    for name, tensor in _floats(model, names, embed, seed):
        yield {name: tensor}, blocks
    made: dict[Any, dict[str, Tensor]] = {}
    for number, (path, group) in enumerate(groups.items(), start=len(names) + 1):
        kind = ".".join(part for part in path.split(".") if not part.isdigit()), group.in_features, group.out_features
        if kind not in made:
            residual = path.endswith(("o_proj", "down_proj", "out_proj", "fc2", "attn.proj"))
            std = (group.in_features * (2 * config.text_config.num_hidden_layers if residual else 1)) ** -0.5
            made[kind] = _group(group, std, seed + number, device)
        yield {f"{path}.{name}": tensor for name, tensor in made[kind].items()}, blocks


def _floats(model: Any, names: list[str], embed: Tensor, seed: int) -> Iterator[tuple[str, Tensor]]:
    shapes, head, device = model.state_dict(), find_family(model).head_dim, embed.device.type
    for number, name in enumerate(names):
        meta = shapes[name]
        if name.endswith("embed_tokens.weight"):
            yield name, embed
        elif name.endswith(("q_transform", "k_transform")):
            yield name, hadamard(head).float().to(device)
        elif name.endswith("_clip"):
            yield name, torch.ones((), device=device)
        elif meta.ndim == 1:  # norm weights, biases, the class token
            scale = "norm" in name or name.endswith("ln_q.weight")
            yield (
                name,
                torch.full(meta.shape, float(scale and name.endswith("weight")), dtype=meta.dtype, device=device),
            )
        else:
            yield name, _normal(seed - 1 - number, *meta.shape, std=0.02, device=device).to(meta.dtype)


def _group(group: QuantLinear, std: float, seed: int, device: str) -> dict[str, Tensor]:
    """The tensors of one projection group, its weight quantized some rows at a time. Hadamard factors are orthogonal:
    W' = W P."""
    k, n = group.in_features, group.out_features
    factors = {
        name: hadamard(f.shape[0]).float().to(device)
        for name in ("left", "right")
        if (f := getattr(group, name)) is not None
    }
    generator, step = torch.Generator(device).manual_seed(seed), max(1, _NUMBERS_AT_ONCE // k)
    parts = []
    for first in range(0, n, step):
        w = torch.randn(min(step, n - first), k, generator=generator, device=device).mul_(std)
        parts.append(quantize_weight(apply_kronecker(w, factors.get("left"), factors.get("right"))))
    tensors = {
        **factors,
        "clip": torch.ones((), device=device),
        "w_q": torch.cat([q for q, _ in parts]),
        "w_scale": torch.cat([s for _, s in parts]),
    }
    return tensors if group.bias is None else {**tensors, "bias": torch.zeros(n, device=device)}


def _normal(seed: int, *shape: int, std: float, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed % (1 << 32)), device=device).mul_(std)
