"""Our implementations as contenders: which instruction set, and the arithmetic it is held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.timing import Contender
from quota.ops import native

NAME = "quota"
_BYTES = {"amx": "tdpbusd", "avx512": "vpdpbusd"}
_FLOATS = {"amx": "fma512", "avx512": "fma512"}


def byte_unit(isa: str) -> str:
    """Integer arithmetic that an instruction set of ours is held against."""
    return next((unit for prefix, unit in _BYTES.items() if isa.startswith(prefix)), "vpmaddubsw")


def float_unit(isa: str) -> str:
    """Float arithmetic that an instruction set of ours is held against."""
    return next((unit for prefix, unit in _FLOATS.items() if isa.startswith(prefix)), "fma256")


def torch_float_unit() -> str:
    """Float arithmetic that torch is held against."""
    return "fma512" if "avx512f" in machine.cpu()["features"] else "fma256"


def torch_bfloat16_unit() -> str:
    """Arithmetic that torch's bfloat16 is held against: the fastest of the machine."""
    features = machine.cpu()["features"]
    return "tdpbf16ps" if "amx_bf16" in features else "vdpbf16ps" if "avx512_bf16" in features else torch_float_unit()


def float_contenders(isas: tuple[str, ...], moved: float, run: Callable[[], object]) -> list[Contender]:
    """`run` on each instruction set, for ops whose arithmetic is float32."""
    return [
        Contender(NAME, float_unit(isa), moved, run=run, isa=isa, before=partial(native.set_isa, isa)) for isa in isas
    ]


def require(condition: bool, what: str) -> None:
    """The correctness gate of our own code: nothing wrong is timed."""
    if not condition:
        raise AssertionError(f"{what}: differs from its reference, so it is not timed")


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference / RMS of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Normal float32 numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
