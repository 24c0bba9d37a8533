"""W4A16: every linear of the chosen parts with int4 weights, everything else as the float model has it: activations,
attention, cache, output head.

The model stays the upstream one with its linears replaced, so recipes, generation and caches work as they do for the
float model, and as there the last bits of attention may depend on the batch; those of the linears do not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from quota.core.errors import CheckpointError
from quota.models import Family, find_family
from quota.models.quantize import Shapes, check_modules, quantize_structure
from quota.nn.weight_linear import WeightLinear


def linear_paths(family: Family, modules: Collection[str]) -> list[str]:
    """Module paths of the linears that W4A16 quantizes, in model order of each part."""
    return [f"{path}.{part}" for path, group in family.group_paths(modules) for part in group.parts]


def weight_only_structure(model: Any, modules: Collection[str], shapes: Shapes | None = None) -> Any:
    """Put empty `WeightLinear`s in place of the float linears, in place; returns `model`. Arguments as of
    `quantize_structure`; shapes decides which inputs have a scale."""
    for path in linear_paths(find_family(model), check_modules(modules)):
        parent, _, name = path.rpartition(".")
        old: nn.Linear = model.get_submodule(path)
        new = WeightLinear(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            input_scale=f"{path}.input_scale" in (shapes or {}),
            device=old.weight.device,
        )
        setattr(model.get_submodule(parent), name, new)
    return model


STRUCTURES: dict[str, Callable[[Any, Collection[str], Shapes | None], Any]] = {
    "w4a4kv4": quantize_structure,
    "w4a16": weight_only_structure,
}


def build_structure(model: Any, regime: str, modules: Collection[str], shapes: Shapes) -> Any:
    """Put the empty modules of a checkpoint of `regime` in place; CheckpointError for an unknown one."""
    if regime not in STRUCTURES:
        raise CheckpointError(
            f"regime: this quota reads {', '.join(STRUCTURES)}, got {regime!r}; use the version of quota that wrote the"
            " folder"
        )
    return STRUCTURES[regime](model, modules, shapes)
