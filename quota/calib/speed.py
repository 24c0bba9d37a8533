"""How quick a machine is at what calibration consists of: measured, or from a GPU's data sheet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quota.calib.flatquant import ProjectionGroup
from quota.calib.settings import Settings
from quota.core.devices import named_device, why_absent
from quota.quant.transform import decompose


@dataclass(frozen=True)
class Speed:
    """products: multiply-adds per second of a product in the settings' dtype. Seconds: element_s of an elementwise
    operation, round_s of rounding an element in a learning step (forward and backward), search_s of searching the start
    for one, call_s of a group in a step however small, byte_s of a stream's byte on the host, read or written and
    hashed. by: whose speed it is, in words."""

    products: float
    element_s: float
    round_s: float
    search_s: float
    call_s: float
    byte_s: float
    by: str = "on this machine"


def speed_of(settings: Settings) -> Speed:
    """Speed of the device that blocks run on; of an H200's data sheet where that is a CUDA device and none is here."""
    return sheet_speed(settings.dtype) if why_absent(named_device(settings.device)) else measured_speed(settings)


# NVIDIA's data sheet of the H200 (SXM), dense: floating point operations and bytes of memory per second.
_SHEET_FLOPS = {"float32": 67e12, "float16": 989e12, "bfloat16": 989e12}
_SHEET_BYTES = 4.8e12
# Assumed, not measured: shares of the data sheet that products and elementwise kernels reach, seconds of a kernel's
# launch, and seconds of a byte that the host reads, hashes and writes.
_PRODUCTS, _BYTES, _LAUNCH_S, _HOST_BYTE_S = 0.6, 0.75, 5e-6, 1e-9
# Counted in `flatquant.py` for one element of a weight or input, float32: bytes that rounding reads and writes in a
# step, forward and backward; multiply-adds of its transform by two factors (of 64 and 128); bytes of the search of the
# start, four candidates by thirteen clips. Launches of a group in a step.
_ROUND_BYTES, _ROUND_PRODUCTS, _SEARCH_BYTES, _LAUNCHES = 240, 3 * 192, 4 * 13 * 76, 250


def sheet_speed(dtype: str) -> Speed:
    """Speed of an H200 by its data sheet; not measured."""
    byte_s, exact = 1 / (_BYTES * _SHEET_BYTES), _PRODUCTS * _SHEET_FLOPS["float32"] / 2
    return Speed(
        products=_PRODUCTS * _SHEET_FLOPS[dtype] / 2,
        element_s=8 * byte_s,
        round_s=_ROUND_BYTES * byte_s + _ROUND_PRODUCTS / exact,
        search_s=_SEARCH_BYTES * byte_s,
        call_s=_LAUNCHES * _LAUNCH_S,
        byte_s=_HOST_BYTE_S,
        by="by the data sheet of an NVIDIA H200, as no CUDA device is here to be timed",
    )


def measured_speed(settings: Settings) -> Speed:
    """Times the operations calibration consists of where `settings` say, each for some milliseconds: FlatQuant's own
    group, a product and an elementwise operation, larger ones where it is not the CPU; and the host's hashing."""
    device, large = settings.device, 1 if named_device(settings.device).type == "cpu" else 8
    rows, side, width = 256 * large, 1024 * large, 256 * large
    a, b = torch.ones(rows, side, device=device), torch.ones(side, side, device=device)
    low, lower = a.to(settings.products), b.to(settings.products)
    products = rows * side * side / _best(lambda: (low @ lower)[0, 0])
    exact = products if settings.dtype == "float32" else rows * side * side / _best(lambda: (a @ b)[0, 0])
    group, x = _group(width, width, device), torch.ones(width, width, device=device)
    tiny, few = _group(16, 16, device), torch.ones(4, 16, device=device)
    rounded, product_s = x.numel() + width * width, width**3 / exact
    data = bytes(1 << 20)
    return Speed(
        products=products,
        element_s=_best(lambda: nn.functional.silu(a)[0, 0]) / a.numel(),
        round_s=max(_best(lambda: _step(group, x)) - 3 * product_s, 1e-6) / rounded,
        search_s=max(_best(lambda: group.initialise(x, 0.3), 2) - 8 * product_s, 1e-6) / rounded,
        call_s=_best(lambda: _step(tiny, few)),
        byte_s=_best(lambda: _hashed(data)) / len(data),
    )


def _hashed(data: bytes) -> None:
    hashlib.sha256(data)


def _group(inputs: int, outputs: int, device: str) -> ProjectionGroup:
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, device=device)  # draws no random numbers
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-1, 1, inputs * outputs).view(outputs, inputs))
    return ProjectionGroup([linear], *decompose(inputs), diag=True).to(device)


def _step(group: ProjectionGroup, x: Tensor) -> Tensor:
    with torch.enable_grad():
        loss = group(x).square().mean()
        loss.backward()
    return loss.detach()


def _best(work: Callable[[], Tensor | None], times: int = 5) -> float:
    """Seconds of the quickest of so many calls."""
    best = float("inf")
    for _ in range(times + 1):
        began = time.perf_counter()
        found = work()
        if found is not None:
            found.item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return max(best, 1e-9)
