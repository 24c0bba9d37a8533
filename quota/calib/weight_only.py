"""One block under a weight-only method: what its linears read is observed once, then every weight is rounded with its
inputs in mind.

| group | scaled by AWQ at the expense of |
|---|---|
| reads a norm | the norm's weight and bias |
| mlp.down_proj behind gate * up | the rows of up |
| the output projection of attention | the rows of v, where every head has its own |
| anything else (behind a nonlinearity, grouped heads, the first layer of a projector) | nothing: `input_scale` stays
with the layer |
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from quota.calib.blocks import Block
from quota.calib.feed import feed
from quota.calib.learn import BlockData, Scorer, decibels, split
from quota.calib.settings import Settings
from quota.calib.state import BlockReport
from quota.calib.stream import Stream
from quota.core.errors import SampleError
from quota.core.formats import WEIGHT_ONLY, Format, Scheme
from quota.models.groups import Group
from quota.models.quantize import linear_class
from quota.nn.linear import RoundedLinear
from quota.quant.awq import awq, search_scale
from quota.quant.gptq import Hessian, gptq
from quota.quant.transform import hadamard

Tensors = dict[str, Tensor]  # of one linear, as `RoundedLinear` names them
_UNCLIPPED = ("q_proj", "k_proj", "qkv")


class InputStats:
    """What a projection group reads, over all training items: its Hessian (GPTQ), or mean magnitudes [K] and some rows
    (AWQ)."""

    def __init__(self, in_features: int, method: str, rows_per_item: int, device: str) -> None:
        self.rows_per_item = rows_per_item
        self.hessian = Hessian(in_features, device) if method == "gptq" else None
        self.total, self.count = torch.zeros(in_features, dtype=torch.float64, device=device), 0
        self.parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """x [..., K]: the input of one item."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self.hessian is not None:
            self.hessian.add(rows)
            return
        self.total += rows.abs().sum(0, dtype=torch.float64)
        self.count += len(rows)
        self.parts.append(rows[:: max(1, len(rows) // self.rows_per_item)][: self.rows_per_item].clone())

    @property
    def magnitude(self) -> Tensor:
        return (self.total / max(1, self.count)).float()

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.parts)


@torch.no_grad()
def quantize_weights(
    block: Block, lesson: BlockData, settings: Settings, progress: Callable[[int], None] | None = None
) -> tuple[dict[str, Tensor], BlockReport]:
    """Round the linears of a float `block` to those of settings.makes by settings.method (gptq, awq or rtn) and leave
    it computing with the rounded weights; a quantized cache behind it is not part of what it computes.

    Returns the checkpoint's tensors of the block under their full names, and the report (mse_start is that of rounding
    to nearest: nothing is searched before). progress: called with the number of finished groups. SampleError when the
    inputs are not finite.
    """
    method, scheme = settings.method, settings.makes
    assert scheme.weights is not None
    form, kind = scheme.weights, rounding(scheme)
    train, held_out = split(len(lesson.inputs), settings.held_out)
    seen = {} if method == "rtn" else _observe(block, lesson.quantized or lesson.inputs, train, settings)
    score = Scorer(block, lesson, held_out, settings)
    linears: dict[str, Any] = {part: block.layer.get_submodule(part) for plan in block.plans for part in plan.parts}
    weights = {name: linear.weight.data for name, linear in linears.items()}
    codes = {name: kind.rounded(weight, form) for name, weight in weights.items()}
    _compute_with(linears, codes, {}, scheme)
    mse_rtn = score()
    for name, linear in linears.items():
        linear.weight.data = weights[name]
    input_scales: dict[str, Tensor] = {}
    if method == "awq":
        for plan in block.plans:
            seen[plan.name].parts = [_scale(block, plan, seen[plan.name], input_scales, form)]
    for done, plan in enumerate(block.plans, start=1):
        if method == "gptq":
            codes |= _gptq(block, plan, seen[plan.name], scheme)
        elif method == "awq":
            for part in plan.parts:
                clip = part.rpartition(".")[2] not in _UNCLIPPED
                codes[part] = kind.of_codes(*awq(linears[part].weight, seen[plan.name].rows, form=form, clip=clip))
        if progress is not None:
            progress(done)
    _compute_with(linears, codes, input_scales, scheme)
    mse = score()
    signal, update = score.signal()
    report = BlockReport(
        name=block.path,
        mse_rtn=mse_rtn,
        mse_start=mse_rtn,
        mse=mse,
        sqnr_db=decibels(signal, mse),
        update_sqnr_db=decibels(update, mse),
        best_step=0,
        steps=0,
    )
    return _export(block, linears, codes, input_scales, scheme), report


@torch.no_grad()
def round_weights(block: Block, scheme: Scheme = WEIGHT_ONLY) -> dict[str, Tensor]:
    """The tensors of "rtn" alone: rounding to nearest looks at no inputs."""
    assert scheme.weights is not None
    linears: dict[str, Any] = {part: block.layer.get_submodule(part) for plan in block.plans for part in plan.parts}
    kind = rounding(scheme)
    codes = {name: kind.rounded(linear.weight.data, scheme.weights) for name, linear in linears.items()}
    return _export(block, linears, codes, {}, scheme)


def _observe(block: Block, source: Stream, items: list[int], settings: Settings) -> dict[str, InputStats]:
    """One pass, item by item (so nothing is padding)."""
    seen: dict[str, InputStats] = {}
    rows = -(-settings.search_rows // len(items))
    with ExitStack() as stack:
        for plan in block.plans:
            first: Any = block.layer.get_submodule(plan.parts[0])
            seen[plan.name] = InputStats(first.in_features, settings.method, rows, settings.device)
            stack.callback(first.register_forward_pre_hook(lambda _, args, at=seen[plan.name]: at.add(args[0])).remove)
        for (batch,) in feed([source], [[item] for item in items], settings.device):
            block(batch)
    return seen


def rounding(scheme: Scheme) -> type[RoundedLinear]:
    """The class of a scheme's linears."""
    kind = linear_class(scheme)
    assert issubclass(kind, RoundedLinear)
    return kind


def _gptq(block: Block, plan: Group, seen: InputStats, scheme: Scheme) -> dict[str, Tensors]:
    """All linears of a group at once: rows are independent, and the Hessian is factored once."""
    assert seen.hessian is not None and scheme.weights is not None
    form = scheme.weights.unsigned
    weights: list[Tensor] = [block.layer.get_submodule(part).weight for part in plan.parts]  # type: ignore[misc]
    try:
        q, scale, zero = gptq(torch.cat(weights), seen.hessian.value, form)
    except ValueError as error:
        raise SampleError(f"{block.path}.{plan.name}: {error}; look for broken samples or weights") from error
    sizes = [len(weight) for weight in weights]
    parts = zip(q.split(sizes), scale.split(sizes), zero.split(sizes), strict=True)
    return dict(zip(plan.parts, (rounding(scheme).of_codes(*part) for part in parts), strict=True))


def _scale(block: Block, plan: Group, seen: InputStats, input_scales: dict[str, Tensor], form: Format) -> Tensor:
    """Search and apply the scale of a group's inputs; returns the rows it will then read."""
    linears: list[Any] = [block.layer.get_submodule(part) for part in plan.parts]
    s, _ = search_scale([linear.weight for linear in linears], seen.rows, seen.magnitude, form)
    for linear in linears:
        linear.weight.data = linear.weight * s
    absorbing = _absorber(block, plan, len(s))
    if absorbing is None:
        input_scales.update({part: 1 / s for part in plan.parts})
    else:
        norm = block.kind == "decoder" and plan.absorbs in block.family.norms["decoder"]
        offset = block.family.norm_offset if norm else 0.0
        for tensor in absorbing:
            tensor.copy_((tensor + offset) / (s if tensor.ndim == 1 else s[:, None]) - offset)
    return seen.rows / s


def _absorber(block: Block, plan: Group, size: int) -> list[Tensor] | None:
    """The tensors whose rows produce the group's input channels, as views to divide in place; None where there are
    none."""
    layer = block.layer
    if plan.absorbs in block.family.norms[block.kind]:
        return [tensor.data for tensor in layer.get_submodule(plan.absorbs).parameters()]
    if plan.absorbs == "up":
        beside = plan.name.rpartition(".")[0]
        return [tensor.data for tensor in layer.get_submodule(f"{beside}.up_proj").parameters()]
    if plan.value == "columns":
        producer = next(other for other in block.plans if other.value == "rows")
        value: Any = layer.get_submodule(producer.parts[-1])
        rows = value.out_features // 3 if producer.fused else value.out_features
        if rows == size:  # with grouped heads one value row feeds several channels
            return [tensor.data[-rows:] for tensor in value.parameters()]
    return None


def _compute_with(
    linears: dict[str, Any], codes: dict[str, Tensors], input_scales: dict[str, Tensor], scheme: Scheme
) -> None:
    assert scheme.weights is not None
    for name, linear in linears.items():
        weight = rounding(scheme).value(codes[name], scheme.weights, linear.in_features)
        linear.weight.data = weight * input_scales[name] if name in input_scales else weight


def _export(
    block: Block, linears: dict[str, Any], codes: dict[str, Tensors], input_scales: dict[str, Tensor], scheme: Scheme
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, rounded in codes.items():
        own = {**rounded, "bias": linears[name].bias, "input_scale": input_scales.get(name)}
        out |= {f"{block.path}.{name}.{key}": tensor for key, tensor in own.items() if tensor is not None}
    kept = {
        name: tensor.float()
        for name, tensor in block.layer.state_dict().items()
        if name.rpartition(".")[0] not in linears
    }
    out |= {f"{block.path}.{name}": tensor for name, tensor in kept.items()}
    _fuse(block, out, scheme)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in out.items()}


def _fuse(block: Block, out: dict[str, Tensor], scheme: Scheme) -> None:
    """Name the tensors as the quantized modules hold them, in place: the rows of a group's linears one below the other,
    and what attention has besides."""
    for plan in block.plans:
        for key in ("w_q", "w_scale", "w_zero", "w_row", "bias", "input_scale"):
            parts = [out.pop(name) for part in plan.parts if (name := f"{block.path}.{part}.{key}") in out]
            if parts:  # one scale of the input is that of all
                out[f"{block.path}.{plan.name}.{key}"] = parts[0] if key == "input_scale" else torch.cat(parts)
    if block.kind != "decoder":
        return
    attention, at = block.attention, f"{block.path}.{block.family.attention[block.kind]}"
    out |= {f"{at}.{name}": torch.ones(()) for name in ("k_clip", "v_clip")}
    if scheme.transforms:
        out |= {f"{at}.{name}": hadamard(attention.head_dim).float() for name in ("q_transform", "k_transform")}
    if (
        attention.k_proj.bias is not None and scheme.kv is not None and scheme.kv.number == "int"
    ):  # it is added to the scores, not to the keys
        bias, first = out[f"{at}.qkv_proj.bias"], block.family.heads * attention.head_dim
        rows = bias[first : first + attention.k_proj.out_features].clone()
        out[f"{at}.k_bias"] = rows.view(-1, attention.head_dim)
        bias[first : first + len(rows)] = 0
