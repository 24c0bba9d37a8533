"""Replacing the float modules of a model by quantized ones: shapes only, on any device including meta."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from quota.core.checkpoint import MODULES
from quota.core.errors import CheckpointError
from quota.models import ArchSpec, find_family, submodule
from quota.models.clip import UnusedLayer
from quota.models.window_tower import MultimodalRotary, PictureByPicture, QuantMerger, QuantWindowAttention
from quota.nn.attention import QuantAttention, QuantClipAttention
from quota.nn.embedding import PatchEmbedding, Rotary
from quota.nn.head import HeadLinear
from quota.nn.key_bias import QuantBiasedAttention
from quota.nn.linear import QuantLinear
from quota.nn.mlp import QuantClipMLP, QuantMLP, QuantProjector
from quota.nn.norm import RmsNorm
from quota.nn.weight_linear import WeightLinear
from quota.quant.transform import decompose

Shapes = Mapping[str, tuple[int, ...]]


def check_modules(modules: Iterable[str]) -> tuple[str, ...]:
    """The selection in canonical order; CheckpointError for an unknown or empty one."""
    chosen = set(modules)
    unknown = sorted(chosen - set(MODULES))
    if unknown or not chosen:
        raise CheckpointError(f"modules: expected some of {list(MODULES)}, got {unknown or 'none'}")
    return tuple(name for name in MODULES if name in chosen)


class _Builder:
    """Makes quantized modules with the factors a checkpoint has (`shapes`), or the default factors when there is no checkpoint."""

    def __init__(self, device: Any, shapes: Shapes | None) -> None:
        self.device, self.shapes = device, shapes

    def linear(self, path: str, size: tuple[int, int], bias: bool, default: tuple[int | None, int | None]) -> QuantLinear:
        """size (K, N); default factors (left, right)."""
        left, right = default
        if self.shapes is not None:
            left, right = (self._factor(f"{path}.{side}", size[0]) for side in ("left", "right"))
            if left is not None and right is not None and left * right != size[0]:
                raise CheckpointError(f"tensor {path}.left: expected left * right == {size[0]} inputs, got {left} * {right}; the checkpoint is damaged")
        return QuantLinear(*size, bias=bias, left=left, right=right, device=self.device)

    def has(self, name: str) -> bool:
        return self.shapes is None or name in self.shapes

    def _factor(self, name: str, in_features: int) -> int | None:
        shape = (self.shapes or {}).get(name)
        if shape is None:
            return None
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1 or in_features % shape[0]:
            raise CheckpointError(f"tensor {name}: expected a square matrix whose size divides {in_features}, got {list(shape)}; the checkpoint is damaged")
        return shape[0]


def quantize_structure(model: Any, modules: Collection[str], shapes: Shapes | None = None) -> Any:
    """Put empty quantized modules in place of the float ones, in place.

    modules: some of "vision", "projector", "llm"; the rest stays float. shapes: tensor name -> shape of the checkpoint that will be
    loaded, which decides the transforms; None gives Kronecker factors everywhere, a [heads, heads] left factor before output projections, and
    key biases kept apart. Vision layers whose output is dropped stay as they are and are not computed. Returns `model`.
    """
    chosen, arch = check_modules(modules), find_family(model)
    embedding: Any = submodule(model, arch.embed_path)
    device = embedding.weight.device
    build = _Builder(device, shapes)
    llava = arch.name == "llava"
    if "llm" in chosen:
        text: Any = submodule(model, arch.text_path)
        for index in range(arch.layers):
            _decoder_layer(build, model, arch, index)
        text.rotary_emb = (Rotary if llava else MultimodalRotary)(text.config, device=device)
        text.norm = RmsNorm.replacing(text.norm)
        _replace(model, arch.lm_head_path, HeadLinear.replacing(model.get_submodule(arch.lm_head_path)))
    if "vision" in chosen:
        for index in range(arch.vision_layers_used):
            (_clip_layer if llava else _window_layer)(build, model, arch, index)
        tower: Any = submodule(model, arch.vision_path)
        if llava:
            for index in range(arch.vision_layers_used, arch.vision_layers_total):
                submodule(model, arch.vision_layer(index)).__class__ = UnusedLayer
            tower.embeddings.patch_embedding = PatchEmbedding.replacing(tower.embeddings.patch_embedding)
        else:
            tower.__class__ = PictureByPicture  # same fields; only the order of work changes
    if "projector" in chosen:
        (_projector if llava else _merger)(build, model, arch)
    return model


def _decoder_layer(build: _Builder, model: Any, arch: ArchSpec, index: int) -> None:
    path = arch.decoder_layer(index)
    layer: Any = submodule(model, path)
    attention, mlp = layer.self_attn, layer.mlp
    for name in ("input_layernorm", "post_attention_layernorm"):
        setattr(layer, name, RmsNorm.replacing(getattr(layer, name)))
    attended, rows = arch.heads * arch.head_dim, (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    at = f"{path}.self_attn"
    apart = attention.k_proj.bias is not None and build.has(f"{at}.k_bias")
    layer.self_attn = (QuantBiasedAttention if apart else QuantAttention)(
        build.linear(f"{at}.qkv_proj", (arch.hidden_size, rows), attention.q_proj.bias is not None, decompose(arch.hidden_size)),
        build.linear(f"{at}.o_proj", (attended, arch.hidden_size), attention.o_proj.bias is not None, (arch.heads, None)),
        heads=arch.heads, kv_heads=arch.kv_heads, head_dim=arch.head_dim, layer_idx=index,
        transforms=(build.has(f"{at}.q_transform"), build.has(f"{at}.k_transform")),
    )  # fmt: skip
    layer.mlp = QuantMLP(
        build.linear(f"{path}.mlp.gate_up_proj", (arch.hidden_size, 2 * arch.intermediate_size), mlp.gate_proj.bias is not None, decompose(arch.hidden_size)),
        build.linear(f"{path}.mlp.down_proj", (arch.intermediate_size, arch.hidden_size), mlp.down_proj.bias is not None, decompose(arch.intermediate_size)),
        act=model.config.text_config.hidden_act,
    )


def _clip_layer(build: _Builder, model: Any, arch: ArchSpec, index: int) -> None:
    path, wide, inner = arch.vision_layer(index), arch.vision_hidden_size, arch.vision_intermediate_size
    layer: Any = submodule(model, path)
    layer.self_attn = QuantClipAttention(
        build.linear(f"{path}.self_attn.qkv_proj", (wide, 3 * wide), True, decompose(wide)),
        build.linear(f"{path}.self_attn.out_proj", (wide, wide), True, (arch.vision_heads, None)), heads=arch.vision_heads,
    )  # fmt: skip
    layer.mlp = QuantClipMLP(
        build.linear(f"{path}.mlp.fc1", (wide, inner), True, decompose(wide)),
        build.linear(f"{path}.mlp.fc2", (inner, wide), True, decompose(inner)),
        act=model.config.vision_config.hidden_act,
    )


def _window_layer(build: _Builder, model: Any, arch: ArchSpec, index: int) -> None:
    path, wide, inner = arch.vision_layer(index), arch.vision_hidden_size, arch.vision_intermediate_size
    layer: Any = submodule(model, path)
    layer.attn = QuantWindowAttention(
        build.linear(f"{path}.attn.qkv", (wide, 3 * wide), True, decompose(wide)),
        build.linear(f"{path}.attn.proj", (wide, wide), True, (arch.vision_heads, None)), heads=arch.vision_heads,
    )  # fmt: skip
    layer.mlp = QuantMLP(
        build.linear(f"{path}.mlp.gate_up_proj", (wide, 2 * inner), True, decompose(wide)),
        build.linear(f"{path}.mlp.down_proj", (inner, wide), True, decompose(inner)),
        act=model.config.vision_config.hidden_act,
    )


def _projector(build: _Builder, model: Any, arch: ArchSpec) -> None:
    path, parts = arch.projector_path, ("linear_1", "linear_2")
    linear_1, linear_2 = _linears(build, path, parts, submodule(model, path))
    _replace(model, path, QuantProjector(linear_1, linear_2, model.config.projector_hidden_act))


def _merger(build: _Builder, model: Any, arch: ArchSpec) -> None:
    path = f"{arch.projector_path}.mlp"
    first, second = _linears(build, path, ("0", "2"), submodule(model, path))
    _replace(model, path, QuantMerger(first, second))


def _linears(build: _Builder, path: str, names: tuple[str, ...], parent: nn.Module) -> list[QuantLinear]:
    parts: list[Any] = [parent.get_submodule(name) for name in names]
    return [
        build.linear(f"{path}.{name}", (part.in_features, part.out_features), part.bias is not None, decompose(part.in_features))
        for name, part in zip(names, parts, strict=True)
    ]


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear | WeightLinear]:
    """Module path -> every quantized linear (under W4A4 a whole projection group), in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (QuantLinear, WeightLinear))}


def quantized_modules(model: nn.Module) -> tuple[str, ...]:
    """Which of "vision", "projector", "llm" are quantized."""
    arch, paths = find_family(model), list(quantized_linears(model))
    prefixes = {"vision": arch.encoder_path, "projector": arch.projector_path, "llm": arch.decoder_path}
    return tuple(name for name in MODULES if any(path.startswith(prefixes[name] + ".") for path in paths))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors a checkpoint of this model holds."""
    tensors: dict[int, Tensor] = {id(t): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())
