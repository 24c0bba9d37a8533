"""Replacing the float modules of a model by quantized ones: shapes only, on any device including meta."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from quota.core.errors import CheckpointError
from quota.core.formats import DEFAULT, FLOAT, MODULES, Scheme
from quota.models import find_family
from quota.models.base import Family, replace, submodule
from quota.models.groups import PARTS, Group, Part
from quota.nn.attention import QuantAttention
from quota.nn.head import HeadLinear
from quota.nn.key_bias import QuantBiasedAttention
from quota.nn.linear import LinearSpec, SchemeLinear, Shapes
from quota.nn.mlp import QuantMLP
from quota.nn.norm import RmsNorm


def check_modules(modules: Iterable[str]) -> tuple[str, ...]:
    """The selection in canonical order; CheckpointError for an unknown or empty one."""
    chosen = set(modules)
    unknown = sorted(chosen - set(MODULES))
    if unknown or not chosen:
        raise CheckpointError(f"modules: expected some of {list(MODULES)}, got {unknown or 'none'}")
    return tuple(name for name in MODULES if name in chosen)


@dataclass(frozen=True)
class _Builder:
    """Makes empty quantized modules of a scheme with the optional tensors a checkpoint has (`shapes`), or the scheme's
    defaults when there is no checkpoint."""

    scheme: Scheme
    shapes: Shapes | None

    def linear(self, path: str, floats: Sequence[nn.Linear], heads: int | None = None) -> SchemeLinear:
        """The linear that replaces float ones with one input. heads: as in `LinearSpec`."""
        first = floats[0]
        rows, device = sum(linear.out_features for linear in floats), first.weight.device
        spec = LinearSpec(path, first.in_features, rows, first.bias is not None, heads, device)
        return linear_class(self.scheme).build(spec, self.scheme, self.shapes)

    def has(self, name: str, default: bool = True) -> bool:
        return default if self.shapes is None else name in self.shapes


def linear_class(scheme: Scheme) -> type[SchemeLinear]:
    """The module class of a scheme's linears."""
    module, _, name = scheme.linear.partition(":")
    found: type[SchemeLinear] = getattr(import_module(f"quota.nn.{module}"), name)
    return found


def quantize_structure(
    model: Any, modules: Collection[str], shapes: Shapes | None = None, scheme: Scheme = DEFAULT
) -> Any:
    """Put empty quantized modules of a scheme in place of the float ones, in place.

    modules: some of "vision", "projector", "llm"; the rest stays float. shapes: tensor name -> shape of the checkpoint
    that will be loaded, which decides what is optional; None gives the scheme's defaults: where it has transforms,
    Kronecker factors everywhere and a [heads, heads] left factor before output projections, and key biases kept apart
    from a 4-bit cache. Vision layers whose output is dropped stay as they are and are not computed. Returns `model`.
    """
    chosen, family = check_modules(modules), find_family(model)
    build = _Builder(scheme, shapes)
    embedding: Any = submodule(model, family.embed_path)
    if "llm" in chosen:
        text: Any = submodule(model, family.text_path)
        for index, path in enumerate(family.blocks("decoder")):
            _decoder_layer(build, model, family, path, index)
        text.rotary_emb = family.rotary(embedding.weight.device)
        text.norm = RmsNorm.replacing(text.norm, family.norm_offset)
        replace(model, family.lm_head_path, HeadLinear.replacing(model.get_submodule(family.lm_head_path)))
    if "vision" in chosen:
        for path in family.blocks("vision"):
            linears, block = _linears(build, model, family, "vision", path), submodule(model, path)
            _replace_all(model, path, family.tower_modules(linears, block))
        family.finish_tower(submodule(model, family.vision_path))
    if "projector" in chosen:
        for path in family.blocks("projector"):
            _replace_all(model, path, family.projector_modules(_linears(build, model, family, "projector", path)))
            family.finish_projector(submodule(model, path))
    return model


def linear_paths(family: Family, modules: Collection[str]) -> dict[str, list[str]]:
    """Module path of every quantized linear -> the float linears whose rows it holds, in model order of
    each part."""
    out = {}
    for path, group in family.group_paths(modules):
        parts = [f"{path}.{part}" for part in group.parts]
        out[f"{path}.{group.name}"] = parts
    return out


def _linears(build: _Builder, model: Any, family: Family, part: Part, path: str) -> dict[str, SchemeLinear]:
    """Group name -> empty quantized linear of one block."""
    made = {}
    for group in family.groups[part]:
        heads = family.value_heads(part) if group.value == "columns" else None
        made[group.name] = build.linear(f"{path}.{group.name}", float_linears(model, path, group), heads)
    return made


def float_linears(model: Any, path: str, group: Group) -> list[nn.Linear]:
    """The float linears of a group of the block at `path`, in row order."""
    return [submodule(model, f"{path}.{part}") for part in group.parts]  # type: ignore[misc]


def _decoder_layer(build: _Builder, model: Any, family: Family, path: str, index: int) -> None:
    layer: Any = submodule(model, path)
    apart = build.scheme.kv is not None and build.scheme.kv.number == "int"  # floats have room for a bias
    biased = apart and layer.self_attn.k_proj.bias is not None and build.has(f"{path}.self_attn.k_bias")
    linears = _linears(build, model, family, "decoder", path)
    for name in family.float_norms("decoder"):
        replace(layer, name, RmsNorm.replacing(submodule(layer, name), family.norm_offset))
    norms = tuple(getattr(layer.self_attn, name) for name in ("q_norm", "k_norm") if hasattr(layer.self_attn, name))
    transforms = [
        build.has(f"{path}.self_attn.{name}", build.scheme.transforms) for name in ("q_transform", "k_transform")
    ]
    layer.self_attn = (QuantBiasedAttention if biased else QuantAttention)(
        linears["self_attn.qkv_proj"],
        linears["self_attn.o_proj"],
        heads=family.heads,
        kv_heads=family.kv_heads,
        head_dim=family.head_dim,
        layer_idx=index,
        transforms=(transforms[0], transforms[1]),
        norms=norms,
    )
    layer.self_attn.prefix = family.prefix
    layer.mlp = QuantMLP(linears["mlp.gate_up_proj"], linears["mlp.down_proj"], act=family.text.hidden_act)


def _replace_all(model: Any, path: str, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        replace(model, f"{path}.{name}" if name else path, module)


def quantized_linears(model: nn.Module) -> dict[str, SchemeLinear]:
    """Module path -> every quantized linear, a whole projection group, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SchemeLinear)}


def model_scheme(model: nn.Module) -> Scheme:
    """The scheme of a model's quantized parts; FLOAT where there are none."""
    return next((linear.scheme for linear in quantized_linears(model).values()), FLOAT)


def text_scheme(model: nn.Module) -> Scheme:
    """The scheme of a model's language model; FLOAT where it is not quantized."""
    return model_scheme(submodule(model, find_family(model).text_path))


def quantized_modules(model: nn.Module) -> tuple[str, ...]:
    """Which of "vision", "projector", "llm" are quantized."""
    family, paths = find_family(model), list(quantized_linears(model))
    blocks = {name: tuple(f"{path}." for path in family.blocks(PARTS[name])) for name in MODULES}
    return tuple(name for name in MODULES if any(path.startswith(blocks[name]) for path in paths))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors a checkpoint of this model holds."""
    tensors: dict[int, Tensor] = {id(t): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())
