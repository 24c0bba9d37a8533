"""Four corrections of Triton 3.6's interpreter: `tl.fma` gets the one rounding the hardware has (upstream: a product
and a sum, each rounded); float32 becomes bfloat16 by rounding to nearest even, as on the hardware (upstream cuts the
lower half off); one-element arrays may count loops under NumPy 2.4, which no longer turns them into numbers by itself;
and the language is replaced once per launch rather than at every call from one kernel function to another, which was
most of the time."""

from __future__ import annotations

from typing import Any

import numpy as np


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """round(a * b + c) of float32 with one rounding: the float64 sum is rounded to odd first (Boldo and Melquiond,
    2008)."""
    with np.errstate(all="ignore"):
        product, addend = a.astype(np.float64) * b, c.astype(np.float64)
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = np.atleast_1d(total).view(np.int64)
        step = np.where((error > 0) == (total > 0), 1, -1)
        inexact = (error != 0) & np.isfinite(error) & ((bits & 1) == 0)
        return np.where(inexact, bits + step, bits).view(np.float64).astype(np.float32).reshape(np.shape(total))


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, uint16; a NaN stays one."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def install() -> None:
    """Correct the interpreter; once per process."""
    from triton.runtime import interpreter

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    convert = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        narrows = source == interpreter.tl.float32 and target == interpreter.tl.bfloat16
        return to_bfloat16(data) if narrows else convert(data, source, target, rounding_mode)

    upstream = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        upstream(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    replaced = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if (
            module.startswith("triton.") and module not in replaced
        ):  # the standard library sees another module than a kernel does
            replaced.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.InterpreterBuilder.create_fma = create_fma
    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_lang_tensor
