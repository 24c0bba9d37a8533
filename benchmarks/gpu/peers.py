"""Linears of other libraries that take some setting up: humming's W4A8 and cuBLASLt's int8. Each is checked before it
is timed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cublaslt import Int8Product

Run = Callable[[], object]
_HUMMING_TOLERANCE = 0.3  # relative RMS of int4 weights rounded per channel, of a normal matrix: about 0.15


def why_not_humming() -> str | None:
    """None where humming-kernels can be imported, else the reason."""
    return None if find_spec("humming") else "humming-kernels is not installed"


def humming_runs(x: Tensor, w: Tensor, count: int) -> dict[str, list[Run]]:
    """x bfloat16 [M, K], w bfloat16 [N, K] -> its W4A8 calls on `count` copies of the weight: on quantized rows, and
    with quantizing them.

    Compiled by nvcc or nvrtc at the first call. RuntimeError when the product is not near the float one.
    """
    layers, forward = import_module("humming.layer"), import_module("humming.forward")
    layer = layers.HummingLayer(
        shape_n=w.shape[0],
        shape_k=w.shape[1],
        weight_config={"dtype": "int4"},
        input_config={"dtype": "int8"},
        torch_dtype=torch.bfloat16,
    ).to(w.device)
    layer.load_from_unquantized(w)
    layer.transform()
    x_q, x_scale = forward.may_quant_input(layer.humming_config, x)
    want = x.float() @ w.float().T
    error = float((layer(x_q, input_scale=x_scale).float() - want).norm() / want.norm())
    if not error < _HUMMING_TOLERANCE:
        raise RuntimeError(
            f"humming: relative RMS {error:.2f} from the float product, expected below {_HUMMING_TOLERANCE}"
        )
    copies = [layer, *(deepcopy(layer) for _ in range(count - 1))]
    return {
        "humming-w4a8": [partial(each, x_q, input_scale=x_scale) for each in copies],
        "humming-w4a8+quantize": [partial(each, x) for each in copies],
    }


def cublaslt_runs(x: Tensor, weights: list[Tensor], lt: Any = None) -> list[Run]:
    """x int8 [M, K], weights int8 [N, K] -> int32 products with cuBLASLt's workspace. RuntimeError when they are not
    exact."""
    m, k = x.shape
    n = weights[0].shape[0]
    product, y = Int8Product(m, n, k, x.device.type, lt), torch.empty(m, n, dtype=torch.int32, device=x.device)
    if not torch.equal(product(x, weights[0], y), (x.double() @ weights[0].double().T).int()):
        raise RuntimeError("cuBLASLt: the int8 product is not exact")
    return [partial(product, x, w, y) for w in weights]
