"""A quantized checkpoint as other engines read it: compressed-tensors, under the names of the hub.

| scheme | format | a linear's tensors |
|---|---|---|
| int8, or E4M3, weights and activations | int-quantized, float-quantized | `weight` (the codes), `weight_scale` |
| int4 weights in groups | pack-quantized | `weight_packed`, `weight_scale`, `weight_zero_point`, `weight_shape` |

The weights are our codes and scales: what the format's reader makes of them are our dequantized weights, bit for bit.
The format's groups must divide every width, so groups of ours are given as several with one scale. A 4-bit cache stays
behind: its transforms of queries and keys cancel without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from math import gcd
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quota.core.errors import UsageError
from quota.core.files import atomic_folder, atomic_write_text
from quota.core.formats import FP8, INT4_GROUPS, INT8, Format, Scheme
from quota.core.shards import Shards
from quota.models import find_family
from quota.models.base import Family
from quota.models.config import OWN_KEYS
from quota.models.quantize import linear_paths, model_scheme, quantized_linears, quantized_modules
from quota.nn.key_bias import QuantBiasedAttention
from quota.quant.pack import unpack_uint4

TARGETS = ("vllm",)
_SMALLEST_GROUP = 32  # of the kernels that read grouped weights
_WORD_BITS = 32
_COPIED = (
    "generation_config.json",
    "chat_template.jinja",
)  # besides what the processor writes
Tensors = dict[str, Tensor]


def export(checkpoint: str | Path, out: str | Path, to: str = TARGETS[0]) -> dict[str, Any]:
    """Write the folder `out` from a quantized checkpoint; returns its `quantization_config`.

    The model is read whole, its digests are checked; `out` appears when it is complete. UsageError for a folder that
    holds something, and for what the format has no place for; CheckpointError for a checkpoint that is not ours, or
    damaged.
    """
    from quota.runtime.load import load

    if to not in TARGETS:
        raise UsageError(f"--to: expected one of {', '.join(TARGETS)}, got {to!r}")
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"{out}: exists; expected a new or empty folder, choose another")
    model = load(checkpoint)
    scheme, family = model_scheme(model), find_family(model)
    form = _exportable(model, scheme)
    if family.hub_rules is None:
        raise UsageError(
            f"checkpoint: {family.title} with this tower has no names that {to} reads; export another model"
        )
    skeleton = _skeleton(model)
    parts = linear_paths(family, quantized_modules(model))
    group = _group(form, [linear.in_features for linear in quantized_linears(model).values()])
    quantized = {part for found in parts.values() for part in found}
    stays = [
        name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear) and name not in quantized
    ]
    config = _quantization(scheme, form, group, [_hub(family, f"{name}.")[:-1] for name in stays])
    with atomic_folder(out, lambda _: False) as work:
        shards = Shards(work)
        for name, tensor in _tensors(model, skeleton, parts, form, group):
            shards.add({_hub(family, name): tensor})
        shards.finish()
        document = {k: v for k, v in model.config.to_dict().items() if k not in OWN_KEYS}
        document |= {"architectures": [type(model).__name__], "quantization_config": config}
        atomic_write_text(work / "config.json", json.dumps(document, indent=2, sort_keys=True) + "\n")
        if model.processor is not None:
            model.processor.save_pretrained(str(work))
        for name in _COPIED:
            if (source := Path(model.name_or_path) / name).is_file():
                atomic_write_text(work / name, source.read_text(encoding="utf-8"))
    return config


def _exportable(model: Any, scheme: Scheme) -> Format:
    """The weights' format; UsageError with the reason where compressed-tensors cannot say what the scheme computes."""
    form = scheme.weights
    if form is None:
        raise UsageError("checkpoint: this one is float; expected one that `quota calibrate` made")
    if form not in (INT8, FP8, INT4_GROUPS):
        why = (
            "its transforms run before every linear, and the format takes those that fold into weights"
            if scheme.transforms
            else "no export of this format is written yet"
        )
        raise UsageError(
            f"checkpoint: {scheme.name} cannot be exported: {why}; calibrate another scheme (docs/format.md)"
        )
    for path, linear in quantized_linears(model).items():
        if getattr(linear, "input_scale", None) is not None:
            raise UsageError(
                f"checkpoint: {path} keeps AWQ's scale of its input, which the format has no place for; calibrate with"
                " --method gptq or rtn"
            )
    return form


def _skeleton(model: Any) -> Any:
    """The float model's modules, without data."""
    with torch.device("meta"):
        return getattr(transformers, find_family(model).model_class)._from_config(model.config)


def _group(form: Format, widths: list[int]) -> int | None:
    if form.group is None:
        return None
    group = gcd(form.group, *widths)
    if group < _SMALLEST_GROUP:
        raise UsageError(
            f"checkpoint: groups that divide all of its widths have {group} inputs; the format's readers take"
            f" {_SMALLEST_GROUP} or more: calibrate another scheme, or fewer modules"
        )
    return group


def _hub(family: Family, name: str) -> str:
    """Name inside the model -> name of published checkpoints."""
    for pattern, replacement in family.hub_rules or ():
        renamed, hits = pattern.subn(replacement, name)
        if hits:
            return renamed
    return name


def _quantization(scheme: Scheme, form: Format, group: int | None, stays: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. stays: linears that are float."""

    def numbers(of: Format, **more: Any) -> dict[str, Any]:
        kind = "int" if of.number == "int" else "float"
        return {"num_bits": of.bits, "type": kind, "symmetric": of.zero is None, **more}

    weights = (
        numbers(form, strategy="channel", dynamic=False)
        if group is None
        else numbers(form, strategy="group", group_size=group, dynamic=False)
    )
    inputs = None if scheme.activations is None else numbers(scheme.activations, strategy="token", dynamic=True)
    name = {INT8: "int-quantized", FP8: "float-quantized"}.get(form, "pack-quantized")
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": name,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "ignore": stays,
    }


def _tensors(
    model: Any, skeleton: Any, parts: dict[str, list[str]], form: Format, group: int | None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the float model by its name there, quantized linears in the format's tensors."""
    state, tied = model.state_dict(), {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    linears = quantized_linears(model)
    coded = {f"{part}.{name}" for found in parts.values() for part in found for name in ("weight", "bias")}
    for name in skeleton.state_dict():
        if name not in coded and name not in tied:
            yield name, state[name]
    for path, names in parts.items():
        rows = [skeleton.get_submodule(name).out_features for name in names]
        stored, bias = linears[path].stored(), _bias(model, path)  # type: ignore[operator]
        split = {key: tensor.split(rows) for key, tensor in stored.items()}
        for index, name in enumerate(names):
            own = _CODED[form]({key: pieces[index] for key, pieces in split.items()}, linears[path].in_features, group)
            yield from ((f"{name}.{key}", tensor) for key, tensor in own.items())
            if bias is not None:
                yield f"{name}.bias", bias.split(rows)[index]


def _bias(model: Any, path: str) -> Tensor | None:
    """The bias of a group, with that of the keys where attention keeps it apart."""
    bias: Tensor | None = model.get_submodule(path).bias
    attention = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(attention, QuantBiasedAttention) or attention.qkv_proj is not model.get_submodule(path):
        return bias
    assert bias is not None
    first = attention.heads * attention.head_dim
    bias = bias.clone()
    bias[first : first + attention.k_bias.numel()] = attention.k_bias.flatten()
    return bias


def _bytes(stored: Tensors, k: int, group: int | None) -> Tensors:
    return {"weight": stored["w_q"], "weight_scale": stored["w_scale"][:, None]}


def _small_floats(stored: Tensors, k: int, group: int | None) -> Tensors:
    return {"weight": stored["w_q"].view(torch.float8_e4m3fn), "weight_scale": stored["w_scale"][:, None]}


def _grouped(stored: Tensors, k: int, group: int | None) -> Tensors:
    assert group is not None and INT4_GROUPS.group is not None
    copies = INT4_GROUPS.group // group
    scale, zero = (stored[name].repeat_interleave(copies, 1)[:, : k // group] for name in ("w_scale", "w_zero"))
    return {
        "weight_packed": words(unpack_uint4(stored["w_q"], k)),
        "weight_scale": scale,
        "weight_zero_point": words(zero.T).T,
        "weight_shape": torch.tensor([len(zero), k]),
    }


_CODED: dict[Format, Callable[[Tensors, int, int | None], Tensors]] = {
    INT8: _bytes,
    FP8: _small_floats,
    INT4_GROUPS: _grouped,
}


def words(codes: Tensor) -> Tensor:
    """uint8 [R, C] of four bits -> int32 [R, ceil(C/8)], the first code lowest."""
    each = _WORD_BITS // INT4_GROUPS.bits
    wide = nn.functional.pad(codes, (0, -codes.shape[1] % each)).long().unflatten(1, (-1, each))
    shifts = torch.arange(each) * INT4_GROUPS.bits
    return (wide << shifts).sum(-1).to(torch.int32)  # keeps the lower 32 bits
