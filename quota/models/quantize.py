"""Replacing the float modules of a model by quantized ones: shapes only, on any device including meta."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from quota.core.checkpoint import MODULES
from quota.core.errors import CheckpointError
from quota.models import find_family
from quota.models.base import PARTS, Family, Group, Part, replace, submodule
from quota.nn.attention import QuantAttention
from quota.nn.head import HeadLinear
from quota.nn.key_bias import QuantBiasedAttention
from quota.nn.linear import QuantLinear
from quota.nn.mlp import QuantMLP
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
    """Makes quantized modules with the factors a checkpoint has (`shapes`), or the default factors when there is no
    checkpoint."""

    def __init__(self, device: Any, shapes: Shapes | None) -> None:
        self.device, self.shapes = device, shapes

    def linear(
        self, path: str, size: tuple[int, int], bias: bool, default: tuple[int | None, int | None]
    ) -> QuantLinear:
        """size (K, N); default factors (left, right)."""
        left, right = default
        if self.shapes is not None:
            left, right = (self._factor(f"{path}.{side}", size[0]) for side in ("left", "right"))
            if left is not None and right is not None and left * right != size[0]:
                raise CheckpointError(
                    f"tensor {path}.left: expected left * right == {size[0]} inputs, got {left} * {right}; the"
                    " checkpoint is damaged"
                )
        return QuantLinear(*size, bias=bias, left=left, right=right, device=self.device)

    def has(self, name: str) -> bool:
        return self.shapes is None or name in self.shapes

    def _factor(self, name: str, in_features: int) -> int | None:
        shape = (self.shapes or {}).get(name)
        if shape is None:
            return None
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1 or in_features % shape[0]:
            raise CheckpointError(
                f"tensor {name}: expected a square matrix whose size divides {in_features}, got {list(shape)}; the"
                " checkpoint is damaged"
            )
        return shape[0]


def quantize_structure(model: Any, modules: Collection[str], shapes: Shapes | None = None) -> Any:
    """Put empty quantized modules in place of the float ones, in place.

    modules: some of "vision", "projector", "llm"; the rest stays float. shapes: tensor name -> shape of the checkpoint
    that will be loaded, which decides the transforms; None gives Kronecker factors everywhere, a [heads, heads] left
    factor before output projections, and key biases kept apart. Vision layers whose output is dropped stay as they are
    and are not computed. Returns `model`.
    """
    chosen, family = check_modules(modules), find_family(model)
    embedding: Any = submodule(model, family.embed_path)
    build = _Builder(embedding.weight.device, shapes)
    if "llm" in chosen:
        text: Any = submodule(model, family.text_path)
        for index, path in enumerate(family.blocks("decoder")):
            _decoder_layer(build, model, family, path, index)
        text.rotary_emb = family.rotary(embedding.weight.device)
        text.norm = RmsNorm.replacing(text.norm)
        replace(model, family.lm_head_path, HeadLinear.replacing(model.get_submodule(family.lm_head_path)))
    if "vision" in chosen:
        for path in family.blocks("vision"):
            _replace_all(model, path, family.tower_modules(_linears(build, model, family, "vision", path)))
        family.finish_tower(submodule(model, family.vision_path))
    if "projector" in chosen:
        for path in family.blocks("projector"):
            _replace_all(model, path, family.projector_modules(_linears(build, model, family, "projector", path)))
    return model


def _linears(build: _Builder, model: Any, family: Family, part: Part, path: str) -> dict[str, QuantLinear]:
    """Group name -> empty quantized linear of one block."""
    made = {}
    for group in family.groups[part]:
        heads = family.value_heads(part) if group.value == "columns" else None
        made[group.name] = _linear(build, f"{path}.{group.name}", float_linears(model, path, group), heads)
    return made


def float_linears(model: Any, path: str, group: Group) -> list[nn.Linear]:
    """The float linears of a group of the block at `path`, in row order."""
    return [submodule(model, f"{path}.{part}") for part in group.parts]  # type: ignore[misc]


def _linear(build: _Builder, path: str, floats: Sequence[nn.Linear], heads: int | None) -> QuantLinear:
    size = floats[0].in_features, sum(linear.out_features for linear in floats)
    return build.linear(path, size, floats[0].bias is not None, decompose(size[0]) if heads is None else (heads, None))


def _decoder_layer(build: _Builder, model: Any, family: Family, path: str, index: int) -> None:
    layer: Any = submodule(model, path)
    biased = layer.self_attn.k_proj.bias is not None and build.has(f"{path}.self_attn.k_bias")
    linears = _linears(build, model, family, "decoder", path)
    for name in family.norms["decoder"]:
        setattr(layer, name, RmsNorm.replacing(getattr(layer, name)))
    layer.self_attn = (QuantBiasedAttention if biased else QuantAttention)(
        linears["self_attn.qkv_proj"],
        linears["self_attn.o_proj"],
        heads=family.heads,
        kv_heads=family.kv_heads,
        head_dim=family.head_dim,
        layer_idx=index,
        transforms=(build.has(f"{path}.self_attn.q_transform"), build.has(f"{path}.self_attn.k_transform")),
    )
    layer.mlp = QuantMLP(linears["mlp.gate_up_proj"], linears["mlp.down_proj"], act=family.text.hidden_act)


def _replace_all(model: Any, path: str, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        replace(model, f"{path}.{name}" if name else path, module)


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear | WeightLinear]:
    """Module path -> every quantized linear (under W4A4 a whole projection group), in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (QuantLinear, WeightLinear))}


def quantized_modules(model: nn.Module) -> tuple[str, ...]:
    """Which of "vision", "projector", "llm" are quantized."""
    family, paths = find_family(model), list(quantized_linears(model))
    blocks = {name: tuple(f"{path}." for path in family.blocks(PARTS[name])) for name in MODULES}
    return tuple(name for name in MODULES if any(path.startswith(blocks[name]) for path in paths))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors a checkpoint of this model holds."""
    tensors: dict[int, Tensor] = {id(t): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())
