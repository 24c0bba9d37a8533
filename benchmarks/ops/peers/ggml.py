"""llama.cpp's Q4_0 product: ggml's CPU backend through its C interface.

The libraries are those of llama-cpp-python (`pip install -e '.[bench-llama]'` compiles them for the machine at hand),
or any build of ggml in the folder that QUOTA_GGML names.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.ops.peers import weight
from benchmarks.ops.peers.quantizers import int8_unit
from benchmarks.shapes import Linear

_F32, _Q4_0, _BLOCK, _BLOCK_BYTES = 0, 2, 32, 18  # ggml's type numbers; a block is a float16 scale and 16 bytes
_CONTEXT_BYTES = 1 << 20
_VOIDP, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[str, Any, tuple[Any, ...]]] = {
    "ggml_init": ("base", _VOIDP, ()),  # its argument is a structure, set below
    "ggml_free": ("base", None, (_VOIDP,)),
    "ggml_new_tensor_2d": ("base", _VOIDP, (_VOIDP, ctypes.c_int, _INT64, _INT64)),
    "ggml_mul_mat": ("base", _VOIDP, (_VOIDP, _VOIDP, _VOIDP)),
    "ggml_new_graph": ("base", _VOIDP, (_VOIDP,)),
    "ggml_build_forward_expand": ("base", None, (_VOIDP, _VOIDP)),
    "ggml_quantize_chunk": ("base", _SIZE, (ctypes.c_int, _VOIDP, _VOIDP, _INT64, _INT64, _INT64, _VOIDP)),
    "ggml_backend_alloc_ctx_tensors_from_buft": ("base", _VOIDP, (_VOIDP, _VOIDP)),
    "ggml_backend_buffer_free": ("base", None, (_VOIDP,)),
    "ggml_backend_buft_name": ("base", ctypes.c_char_p, (_VOIDP,)),
    "ggml_backend_tensor_set": ("base", None, (_VOIDP, _VOIDP, _SIZE, _SIZE)),
    "ggml_backend_tensor_get": ("base", None, (_VOIDP, _VOIDP, _SIZE, _SIZE)),
    "ggml_backend_graph_compute": ("base", ctypes.c_int, (_VOIDP, _VOIDP)),
    "ggml_backend_supports_op": ("base", ctypes.c_bool, (_VOIDP, _VOIDP)),
    "ggml_backend_get_device": ("base", _VOIDP, (_VOIDP,)),
    "ggml_backend_dev_backend_reg": ("base", _VOIDP, (_VOIDP,)),
    "ggml_backend_reg_get_proc_address": ("base", _VOIDP, (_VOIDP, ctypes.c_char_p)),
    "ggml_backend_cpu_buffer_type": ("base", _VOIDP, ()),
    "ggml_backend_cpu_init": ("cpu", _VOIDP, ()),
    "ggml_backend_cpu_set_n_threads": ("cpu", None, (_VOIDP, ctypes.c_int)),
}


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _VOIDP), ("no_alloc", ctypes.c_bool)]


def _folder() -> Path | None:
    if os.environ.get("QUOTA_GGML"):
        return Path(os.environ["QUOTA_GGML"])
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.submodule_search_locations[0]) / "lib" if spec and spec.submodule_search_locations else None


class _Ggml:
    """The functions of `_SIGNATURES`, with their types."""

    def __init__(self, folder: Path) -> None:
        found = {kind: next(iter(sorted(folder.rglob(f"libggml-{kind}.so*"))), None) for kind in ("base", "cpu")}
        missing = [kind for kind, path in found.items() if path is None]
        if missing:
            raise OSError(f"no libggml-{missing[0]}.so in {folder}")
        libraries = {kind: ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for kind, path in found.items()}
        for name, (kind, result, arguments) in _SIGNATURES.items():
            function = getattr(libraries[kind], name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.ggml_init.argtypes = (_InitParams,)

    def __getattr__(self, name: str) -> Any:  # for type checkers: everything is set above
        raise AttributeError(name)

    def context(self) -> int:
        return self.ggml_init(_InitParams(_CONTEXT_BYTES, None, True))


@cache
def _library() -> _Ggml:
    folder = _folder()
    if folder is None:
        raise OSError(
            "llama-cpp-python is not installed; pip install -e '.[bench-llama]' in the clone builds it from source"
            " (minutes)"
        )
    return _Ggml(folder)


class GgmlQ4:
    """`ggml_mul_mat` of a Q4_0 weight, in the first of the CPU backend's weight layouts that takes it: llama.cpp
    chooses the same way.

    amx: allow the AMX layout. ggml configures the tile registers once per thread, so that layout needs a process
    without other users of them.
    """

    takes, tolerance = "floats", 2e-2  # 8-bit activations in blocks of 32
    weight_bytes = 0

    def __init__(self, *, amx: bool) -> None:
        self.amx, self.name = amx, "ggml-q4_0-amx" if amx else "ggml-q4_0"
        features = machine.cpu()["features"]
        self.unit = int8_unit([f for f in features if amx or f != "amx_int8"])
        self.inputs: tuple[int, int] | None = None

    def why_not(self) -> str | None:
        if self.amx and "amx_int8" not in machine.cpu()["features"]:
            return "this CPU has no AMX"
        try:
            _library()
        except (OSError, AttributeError) as error:
            return str(error)
        return None

    def prepare(self, shape: Linear, threads: int) -> None:
        g, w = _library(), weight(shape)
        self._release()
        if shape.k % _BLOCK:
            raise ValueError(f"Q4_0 needs K divisible by {_BLOCK}, got {shape.k}")
        self.shape, self.backend = shape, g.ggml_backend_cpu_init()
        g.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.weight_bytes = shape.n * shape.k // _BLOCK * _BLOCK_BYTES
        self.codes = torch.empty(self.weight_bytes, dtype=torch.uint8)
        g.ggml_quantize_chunk(_Q4_0, w.data_ptr(), self.codes.data_ptr(), 0, shape.n, shape.k, None)
        for layout in (*self._layouts(), g.ggml_backend_cpu_buffer_type()):
            context = g.context()
            self.w = g.ggml_new_tensor_2d(context, _Q4_0, shape.k, shape.n)
            buffer = g.ggml_backend_alloc_ctx_tensors_from_buft(context, layout)
            if buffer and self._accepts():
                self.layout = g.ggml_backend_buft_name(layout).decode()
                break
        g.ggml_backend_tensor_set(self.w, self.codes.data_ptr(), 0, self.weight_bytes)

    def _layouts(self) -> list[int]:
        g = _library()
        registry = g.ggml_backend_dev_backend_reg(g.ggml_backend_get_device(self.backend))
        address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        layouts = ctypes.CFUNCTYPE(ctypes.POINTER(_VOIDP), _VOIDP)(address)(None)
        found: list[int] = []
        while layouts[len(found)]:
            found.append(layouts[len(found)])
        return [layout for layout in found if self.amx or g.ggml_backend_buft_name(layout) != b"AMX"]

    def _accepts(self) -> bool:
        g = _library()
        context = g.context()
        x = g.ggml_new_tensor_2d(context, _F32, self.shape.k, 16)
        accepted = bool(g.ggml_backend_supports_op(self.backend, g.ggml_mul_mat(context, self.w, x)))
        g.ggml_free(context)
        return accepted

    def feed(self, x: Tensor) -> None:
        g = _library()
        self._release()
        context = g.context()
        x_tensor = g.ggml_new_tensor_2d(context, _F32, self.shape.k, x.shape[0])
        self.y, self.graph = g.ggml_mul_mat(context, self.w, x_tensor), g.ggml_new_graph(context)
        g.ggml_build_forward_expand(self.graph, self.y)
        self.inputs = context, g.ggml_backend_alloc_ctx_tensors_from_buft(context, g.ggml_backend_cpu_buffer_type())
        g.ggml_backend_tensor_set(x_tensor, x.data_ptr(), 0, x.numel() * 4)
        self.x = x

    def _release(self) -> None:
        if self.inputs is not None:
            _library().ggml_backend_buffer_free(self.inputs[1])
            _library().ggml_free(self.inputs[0])
            self.inputs = None

    def run(self) -> None:
        _library().ggml_backend_graph_compute(self.backend, self.graph)

    def result(self) -> Tensor:
        y = torch.empty(self.x.shape[0], self.shape.n)
        _library().ggml_backend_tensor_get(self.y, y.data_ptr(), 0, y.numel() * 4)
        return y

    def expected(self, rows: slice, columns: slice) -> Tensor:
        blocks = self.codes.view(self.shape.n, -1, _BLOCK_BYTES)[columns]
        scale = blocks[..., :2].contiguous().view(torch.float16).double()
        nibbles = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).double() - 8
        return self.x[rows].double() @ (nibbles * scale).flatten(1).T
