"""cuBLASLt's int8 product with a workspace, through its C interface. torch._int_mm hands it neither a workspace nor an
algorithm, and no setting of torch's workspaces (CUBLASLT_WORKSPACE_SIZE, CUBLAS_WORKSPACE_CONFIG) reaches that call.

Numbers of attributes and types: cublasLt.h, cublas_api.h and library_types.h of CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20  # cuBLAS's documentation recommends 32 MiB on Hopper
_COMPUTE_32I, _R_8I, _R_32I = 72, 3, 10
_TRANSA, _MAX_WORKSPACE = 3, 1
_TRANSPOSED = 1


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def library() -> Any:
    """The cuBLASLt that torch was built for; torch has loaded it already. OSError where it cannot be found."""
    return ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '13').partition('.')[0]}")


class Int8Product:
    """x int8 [M, K] times w int8 [N, K] transposed -> int32 [M, N], by the algorithm that cuBLASLt's heuristic ranks
    first. K a multiple of 16."""

    def __init__(self, m: int, n: int, k: int, device: str = "cuda", lt: Any = None) -> None:
        self.lt = library() if lt is None else lt
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.handle, self.product = (
            self._made("cublasLtCreate"),
            self._made("cublasLtMatmulDescCreate", ctypes.c_int(_COMPUTE_32I), ctypes.c_int(_R_32I)),
        )
        self._set("cublasLtMatmulDescSetAttribute", self.product, _TRANSA, ctypes.c_int32(_TRANSPOSED))
        # column by column, which is how cuBLAS counts: y^T [N, M] = (w^T)^T x^T
        self.w, self.x, self.y = self._layout(_R_8I, k, n), self._layout(_R_8I, k, m), self._layout(_R_32I, n, m)
        preference = self._made("cublasLtMatmulPreferenceCreate")
        self._set("cublasLtMatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES))
        self.best, count = _Heuristic(), ctypes.c_int(0)
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            self.handle,
            self.product,
            self.w,
            self.x,
            self.y,
            self.y,
            preference,
            ctypes.c_int(1),
            ctypes.byref(self.best),
            ctypes.byref(count),
        )
        if count.value < 1:
            raise RuntimeError(f"cuBLASLt has no int8 algorithm for M={m} N={n} K={k}")

    def __call__(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        """Into y, on the current stream."""
        one, zero, at = (
            ctypes.c_int32(1),
            ctypes.c_int32(0),
            (ctypes.c_void_p(t.data_ptr()) for t in (w, x, y, self.workspace)),
        )
        w_at, x_at, y_at, workspace_at = at
        stream = torch.cuda.current_stream(y.device).cuda_stream if y.is_cuda else 0
        self._call(
            "cublasLtMatmul",
            self.handle,
            self.product,
            ctypes.byref(one),
            w_at,
            self.w,
            x_at,
            self.x,
            ctypes.byref(zero),
            y_at,
            self.y,
            y_at,
            self.y,
            ctypes.byref(self.best),
            workspace_at,
            ctypes.c_size_t(WORKSPACE_BYTES),
            ctypes.c_void_p(stream),
        )
        return y

    def _made(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(function, ctypes.byref(made), *arguments)
        return made

    def _layout(self, kind: int, rows: int, columns: int) -> ctypes.c_void_p:
        return self._made(
            "cublasLtMatrixLayoutCreate",
            ctypes.c_int(kind),
            ctypes.c_uint64(rows),
            ctypes.c_uint64(columns),
            ctypes.c_int64(rows),
        )

    def _set(self, function: str, of: ctypes.c_void_p, attribute: int, value: Any) -> None:
        self._call(function, of, ctypes.c_int(attribute), ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self.lt, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} ended with cublasStatus_t {status}")
