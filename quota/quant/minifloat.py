"""Numbers of four and eight bits that are floats: E4M3, E2M1 (OCP), and scales of eight bits. Torch's own steps of one
value each, so every device gives the same bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quota.core.formats import Format
from quota.quant.affine import SMALLEST_RANGE
from quota.quant.grouped import groups_of
from quota.quant.pack import pack_uint4, unpack_uint4

LARGEST = {"e4m3": 448.0, "e2m1": 6.0}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the three low bits of a code; the fourth is the sign
_E8M0_BIAS = 0x7F
_EVEN_EXPONENT = 2  # E2M1's largest exponent: a power-of-two scale leaves the largest magnitude below twice 4


@dataclass(frozen=True)
class Coded:
    """Codes of vectors and their scales. values float32 [..., K]: of the codes times the scales of their groups, exact
    in bfloat16; row float32 [...]: what a vector is multiplied by besides; None: 1."""

    codes: Tensor
    scale: Tensor
    row: Tensor | None
    values: Tensor


def rounded(x: Tensor, number: str) -> Tensor:
    """float32 -> the nearest value of a float type, ties to the even code, at most its largest; NaN stays."""
    bound = x.clamp(-LARGEST[number], LARGEST[number])
    if number == "e4m3":
        return bound.to(torch.float8_e4m3fn).float()
    magnitude = bound.abs()
    step = torch.where(magnitude < _E2M1[4], _E2M1[1], torch.where(magnitude < _E2M1[6], _E2M1[2], _E2M1[4]))
    return torch.copysign(torch.round(magnitude / step) * step, bound)


def codes_of(values: Tensor, number: str) -> Tensor:
    """Values of a float type -> their bits, uint8."""
    if number == "e4m3":
        return values.to(torch.float8_e4m3fn).view(torch.uint8)
    grid = torch.tensor(_E2M1, device=values.device)
    return torch.bucketize(values.abs().contiguous(), grid).to(torch.uint8) | (
        torch.signbit(values).to(torch.uint8) << 3
    )


def values_of(codes: Tensor, number: str) -> Tensor:
    """As `codes_of`, back: uint8 -> float32."""
    if number == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    grid = torch.tensor([*_E2M1, *(-x for x in _E2M1)], device=codes.device)
    return grid[codes.long()]


def quantize(x: Tensor, form: Format, row: Tensor | None = None) -> Coded:
    """float32 [..., K] -> codes (stored as `form` says, two to a byte where they have four bits), scale [...] or
    [..., G] and `Coded.values`. row: of NVFP4, float32 [...]: the scale above the groups'; None: each vector's own."""
    reach = x.abs().amax(-1)
    if form.scale == "float32":
        scale = reach.clamp_min(SMALLEST_RANGE) / LARGEST[form.number]
        values = rounded(x / scale[..., None], form.number)
        return Coded(codes_of(values, form.number), scale, scale, values)
    groups = groups_of(x, form)
    inner = groups.abs().amax(-1)
    if form.scale == "e4m3":
        row = global_scale(reach) if row is None else row
        local = rounded(inner / LARGEST[form.number] / row[..., None], "e4m3")
        scale, divisor = codes_of(local, "e4m3"), local * row[..., None]
    else:
        _, exponent = torch.frexp(inner.clamp_min(SMALLEST_RANGE))
        power = (exponent - 1 - _EVEN_EXPONENT).clamp(-_E8M0_BIAS, _E8M0_BIAS)
        scale = (power + _E8M0_BIAS).to(torch.uint8)
        local = divisor = torch.ldexp(torch.ones_like(inner), power)
        local = torch.where(inner.isfinite(), local, inner)
    quotient = torch.where(divisor[..., None] == 0, 0.0, groups / divisor[..., None])
    codes = rounded(quotient, form.number)
    values = (codes * local[..., None]).flatten(-2)[..., : x.shape[-1]]
    packed = pack_uint4(codes_of(codes.flatten(-2)[..., : x.shape[-1]], form.number))
    return Coded(packed, scale, row, values)


def global_scale(reach: Tensor) -> Tensor:
    """Largest magnitudes -> the scale above E4M3 ones, such that the largest of those can be had."""
    return reach.clamp_min(SMALLEST_RANGE) / (LARGEST["e2m1"] * LARGEST["e4m3"])


def stored_values(codes: Tensor, scale: Tensor, form: Format, k: int) -> Tensor:
    """`Coded.values` of stored codes and scales."""
    if form.scale == "float32":
        return values_of(codes, form.number)
    local = (
        values_of(scale, "e4m3")
        if form.scale == "e4m3"
        else torch.ldexp(torch.ones(scale.shape, device=scale.device), scale.int() - _E8M0_BIAS)
    )
    groups = groups_of(values_of(unpack_uint4(codes, k), form.number), form)
    return (groups * local[..., None]).flatten(-2)[..., :k]
