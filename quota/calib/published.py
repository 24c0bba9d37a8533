"""Published checkpoints of int4 weights as checkpoints of ours: the same codes, scales and zeros in our layout, so
dequantized weights are equal.

| made by | a linear's tensors |
|---|---|
| compressed-tensors, `pack-quantized` | `weight_packed` int32 [N, K/8], `weight_scale` [N, G], perhaps
`weight_zero_point` int32 [N/8, G] |
| AutoAWQ, `gemm` | `qweight` int32 [K, N/8] in an order of its own, `qzeros` int32 [G, N/8], `scales` [G, N] |
| GPTQ | `qweight` int32 [K/8, N], `qzeros` int32 [G, N/8], one less than the zero, `scales` [G, N], `g_idx` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quota.calib.export import float_names, processor_of
from quota.calib.stream import FloatSource
from quota.core.checkpoint import CheckpointWriter, Manifest, check_destination
from quota.core.errors import CheckpointError
from quota.core.formats import INT4_GROUPS, MODULES, WEIGHT_ONLY
from quota.models.groups import PARTS
from quota.nn.weight_linear import WeightLinear

_CODES = range(0, 32, INT4_GROUPS.bits)  # the first bit of each code of a word
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of eight neighbours lie in a word


@dataclass(frozen=True)
class Weight:
    """codes, zero uint8 [N, K] and [N, G], scale float32 [N, G]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


class PublishedSource(FloatSource):
    """A published folder whose int4 linears are read by `weight`; all else as of a float checkpoint.

    CheckpointError for a quantization that is not read here, and for a folder that lacks tensors."""

    def _check_kind(self) -> None:
        self.told: Mapping[str, Any] = getattr(self.config, "quantization_config", None) or {}
        method = self.told.get("quant_method")
        if not isinstance(method, str) or method not in _READERS:
            raise CheckpointError(
                f"{self.folder.name}: quantization_config.quant_method: expected one of {', '.join(_READERS)}, got"
                f" {method!r}"
            )
        self.mark, self._read, refused = _READERS[method]
        if reason := refused(self.told):
            raise CheckpointError(f"{self.folder.name}: quantization_config: {reason}")

    def coded(self, linear: str) -> bool:
        """Whether a linear's weight is int4 in this folder."""
        return f"{linear}.{self.mark}" in self.stored

    def weight(self, linear: str) -> Weight:
        """An int4 weight in groups of ours. CheckpointError naming the tensor that is missing or does not fit."""
        own = {
            name: self.tensor(f"{linear}.{name}")
            for name in (*_NAMES, "weight_shape")
            if f"{linear}.{name}" in self.stored
        }
        module: Any = self.skeleton.get_submodule(linear)
        try:
            return _regrouped(self._read(own), module.out_features, module.in_features)
        except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            reason = f"lacks {linear}.{error.args[0]}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise CheckpointError(f"{self.folder}: {linear}: {reason}") from None

    def _expected(self) -> dict[str, tuple[int, ...]]:
        coded = {name for name, module in self.skeleton.named_modules() if isinstance(module, nn.Linear)}
        left = {f"{name}.weight" for name in coded if self.coded(name)}
        return {name: shape for name, shape in super()._expected().items() if name not in left}


def import_checkpoint(model: str | Path, out: str | Path) -> Manifest:
    """Write `out`, a checkpoint of weights alone, from a published one; returns its manifest. UsageError for a folder
    that holds something, CheckpointError for what is not such a checkpoint; nothing is written then."""
    check_destination(out)
    source = PublishedSource(model)
    modules = tuple(name for name in MODULES if _whole(source, name))
    if not modules:
        raise CheckpointError(f"{source.folder}: expected int4 linear layers in the language model, found none")
    paths = [path for name in modules for path in source.family.blocks(PARTS[name])]
    calibration = {"method": "imported", "from": str(source.told["quant_method"])}
    with CheckpointWriter(out, Manifest(WEIGHT_ONLY, modules, source.fingerprint, calibration)) as writer:
        writer.add_config(source.config)
        writer.add_processor(processor_of(source.folder))
        generation = source.folder / "generation_config.json"
        if generation.is_file():
            writer.add_file(generation)
        for name in float_names(source, paths):
            writer.add({name: source.tensor(name)})
        for name in modules:
            for path in source.family.blocks(PARTS[name]):
                writer.add(_block(source, name, path))
    return writer.manifest


def _whole(source: PublishedSource, module: str) -> bool:
    """Whether all of a module's linears are int4; CheckpointError where some are."""
    linears = [f"{path}.{part}" for path, group in source.family.group_paths([module]) for part in group.parts]
    coded = [name for name in linears if source.coded(name)]
    if coded and len(coded) < len(linears):
        other = next(name for name in linears if name not in coded)
        raise CheckpointError(
            f"{source.folder}: {other} is float and {coded[0]} is not; expected all linear layers of {module} in int4,"
            " or none"
        )
    return bool(coded)


def _block(source: PublishedSource, module: str, path: str) -> dict[str, Tensor]:
    """The tensors of one block as our modules hold them."""
    out: dict[str, Tensor] = {}
    linears = {f"{path}.{part}" for group in source.family.groups[PARTS[module]] for part in group.parts}
    for group in source.family.groups[PARTS[module]]:
        names = [f"{path}.{part}" for part in group.parts]
        weights = [source.weight(name) for name in names]
        parts = [WeightLinear.of_codes(weight.codes, weight.scale, weight.zero) for weight in weights]
        if source.skeleton.get_submodule(names[0]).bias is not None:
            parts = [
                {**part, "bias": source.tensor(f"{name}.bias").float()} for part, name in zip(parts, names, strict=True)
            ]
        out |= {f"{path}.{group.name}.{key}": torch.cat([part[key] for part in parts]) for key in parts[0]}
    for name in source.skeleton.get_submodule(path).state_dict():
        if f"{path}.{name}".rpartition(".")[0] not in linears:
            out[f"{path}.{name}"] = source.tensor(f"{path}.{name}")
    if module == "llm":
        out |= {f"{path}.{source.family.attention['decoder']}.{name}": torch.ones(()) for name in ("k_clip", "v_clip")}
    return out


def nibbles(words: Tensor) -> Tensor:
    """int32 [R, C] -> uint8 [R, 8 C], the lowest code first. ValueError for another type or shape."""
    if words.dtype != torch.int32 or words.ndim != 2:
        raise ValueError(f"expected packed codes in int32 of two dimensions, got {words.dtype} {list(words.shape)}")
    return torch.stack([(words >> first) & (INT4_GROUPS.high) for first in _CODES], -1).flatten(-2).to(torch.uint8)


def _packed(own: dict[str, Tensor]) -> Weight:
    n, k = (int(size) for size in own["weight_shape"].tolist())
    codes, scale = _cut(nibbles(own["weight_packed"]), k), own["weight_scale"]
    if "weight_g_idx" in own:
        raise ValueError("weight_g_idx: groups of chosen inputs are not read, groups of neighbours are")
    if "weight_zero_point" in own:
        return Weight(codes, scale, _cut(nibbles(own["weight_zero_point"].T), n).T)
    return Weight(codes, scale, torch.full(scale.shape, INT4_GROUPS.middle, dtype=torch.uint8))


def _cut(codes: Tensor, count: int) -> Tensor:
    """[R, count], without the codes that fill the last word. ValueError where more or fewer words are there."""
    if codes.shape[1] - count not in range(len(_CODES)):
        raise ValueError(f"expected {count} codes in whole words, got {codes.shape[1]}")
    return codes[:, :count]


def _awq(own: dict[str, Tensor]) -> Weight:
    def ordered(words: Tensor) -> Tensor:
        return nibbles(words).unflatten(1, (-1, len(_AWQ_ORDER)))[..., _AWQ_ORDER].flatten(1)

    return Weight(ordered(own["qweight"]).T, own["scales"].T, ordered(own["qzeros"]).T)


def _gptq(own: dict[str, Tensor]) -> Weight:
    codes, scale, zero = nibbles(own["qweight"].T), own["scales"].T, nibbles(own["qzeros"]).T + 1
    if int(zero.max()) > INT4_GROUPS.high:
        raise ValueError(f"qzeros: expected zeros of at most {INT4_GROUPS.high}, got {int(zero.max())}")
    if "g_idx" in own:
        size = -(-codes.shape[1] // scale.shape[1])
        if not torch.equal(own["g_idx"].long(), torch.arange(codes.shape[1]) // size):
            raise ValueError("g_idx: groups of chosen inputs (desc_act) are not read, groups of neighbours are")
    return Weight(codes, scale, zero)


def _regrouped(weight: Weight, n: int, k: int) -> Weight:
    """The same numbers in groups of ours. ValueError where there are none, or the shapes do not fit [n, k]."""
    ours, groups = INT4_GROUPS.group, weight.scale.shape[1] if weight.scale.ndim == 2 else 0
    fits = weight.codes.shape == (n, k) and weight.scale.shape == weight.zero.shape == (n, groups)
    if not fits or not groups or k % groups:
        raise ValueError(
            f"expected codes [{n}, {k}] with scales and zeros of whole groups, got {list(weight.codes.shape)},"
            f" {list(weight.scale.shape)} and {list(weight.zero.shape)}"
        )
    size = k // groups
    if ours is None or (groups > 1 and size % ours):
        raise ValueError(f"groups of {size} inputs; the kernels read multiples of {ours}, or one group for all inputs")
    of = torch.arange(INT4_GROUPS.groups(k)) * ours // size
    return Weight(weight.codes.contiguous(), weight.scale[:, of].float(), weight.zero[:, of].contiguous())


def _refused_packed(told: Mapping[str, Any]) -> str | None:
    for name in ("transform_config", "sparsity_config"):
        if told.get(name):
            return f"{name}: expected none, got one; only plain int4 weights are read"
    named = told.get("config_groups")
    groups = list(named.values()) if isinstance(named, dict) else []
    weights = groups[0].get("weights") if len(groups) == 1 and isinstance(groups[0], dict) else None
    weights = weights if isinstance(weights, dict) else {}
    expected = {"num_bits": INT4_GROUPS.bits, "type": "int"}
    if told.get("format") != "pack-quantized" or any(weights.get(name) != value for name, value in expected.items()):
        return "expected format pack-quantized with one group of int4 weights"
    return "expected float activations" if groups[0].get("input_activations") else None


def _refused_bits(told: Mapping[str, Any]) -> str | None:
    bits = told.get("bits", told.get("w_bit"))
    if bits != INT4_GROUPS.bits:
        return f"bits: expected {INT4_GROUPS.bits}, got {bits!r}"
    version = str(told.get("version", "gemm")).lower()
    return None if version == "gemm" else f"version: expected gemm, got {version!r}"


def _refused_gptq(told: Mapping[str, Any]) -> str | None:
    if told.get("checkpoint_format", "gptq") != "gptq":
        return f"checkpoint_format: expected gptq, got {told['checkpoint_format']!r}"
    return _refused_bits({"bits": told.get("bits")})


_NAMES = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)
Reader = Callable[[dict[str, Tensor]], Weight]
Refusal = Callable[[Mapping[str, Any]], str | None]
_READERS: dict[str, tuple[str, Reader, Refusal]] = {
    "compressed-tensors": ("weight_packed", _packed, _refused_packed),
    "awq": ("qweight", _awq, _refused_bits),
    "gptq": ("qweight", _gptq, _refused_gptq),
}
