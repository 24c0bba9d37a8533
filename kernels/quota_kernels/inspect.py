"""Compile every kernel ahead of time, without a GPU: `python -m quota_kernels.inspect` prints registers, spills and
shared memory per architecture.

The launches are recorded, not made, on tensors with the sizes of LLaVA-1.5-7B and Qwen2.5-VL-7B; Triton's own ptxas
makes the machine code.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quota_kernels.float_linear import float_linear
from quota_kernels.kv4_append import kv4_append
from quota_kernels.kv4_attention import kv4_attention
from quota_kernels.kv4_page_read import kv4_page_read
from quota_kernels.kv4_page_write import kv4_page_write
from quota_kernels.kv4_paged_attention import kv4_paged_attention
from quota_kernels.kv16_attention import kv16_attention
from quota_kernels.kv16_paged_attention import kv16_paged_attention
from quota_kernels.launch import ARCHITECTURES, INTERPRETED, Call, recording
from quota_kernels.qkv_append import qkv_append
from quota_kernels.quantize_act import quantize_act
from quota_kernels.rms_norm import rms_norm
from quota_kernels.token_gather import token_gather
from quota_kernels.token_score import token_score
from quota_kernels.token_select import token_select
from quota_kernels.transform import transform
from quota_kernels.w4a4_linear import w4a4_linear
from quota_kernels.w4a16_linear import w4a16_linear
from quota_kernels.w8a8_linear import w8a8_linear

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture. registers per thread; spilled, shared: bytes per thread and per block; ptx: its
    text."""

    kernel: str
    arch: int
    warps: int
    registers: int
    spilled: int
    shared: int
    ptx: str


def _cache(heads: int, slots: int, d: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(batch, heads, slots, d // 2, dtype=torch.uint8),
        torch.empty(batch, heads, slots),
        torch.empty(batch, heads, slots),
    )


def _packed(rows: int, k: int) -> Tensor:
    return torch.empty(rows, k // 2, dtype=torch.uint8)


def _grouped(n: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.empty(n // 64, k // 8, 64, dtype=torch.int32), torch.empty(n // 64, k // 128, 2, 64)


def _pages(heads: int) -> tuple[Any, Any]:
    """Keys and values of a pool of pages of 16 tokens."""
    return _cache(heads, 16, 128, 64), _cache(heads, 16, 128, 64)


def _halves(heads: int, slots: int, batch: int) -> tuple[Tensor, Tensor]:
    """Keys and values of float16."""
    k, v = (torch.empty(batch, heads, slots, 128, dtype=torch.float16) for _ in range(2))
    return k, v


def _tables(batch: int) -> tuple[Tensor, Tensor]:
    return torch.empty(batch, 40, dtype=torch.int32), torch.empty(batch, dtype=torch.int32)


def cases() -> dict[str, Callable[[], Any]]:
    """Calls that together launch every kernel in every shape of code that the two models need."""
    f = torch.empty

    def factor(n: int) -> Tensor:
        return torch.empty(n, n, dtype=torch.int16)

    mask = torch.ones(1, 64, dtype=torch.bool)
    return {
        "transform 128": lambda: transform(f(64, 128), None, factor(128), 0),
        "quantize_act 64x64": lambda: quantize_act(f(2, 4096), factor(64), factor(64), 0, 0.9),
        "quantize_act 86x128 silu_mul": lambda: quantize_act(f(2, 22016), factor(86), factor(128), 0, 0.9, "silu_mul"),
        "quantize_act 128x148 silu_mul": lambda: quantize_act(
            f(1, 37888), factor(128), factor(148), 0, 0.9, "silu_mul"
        ),
        "quantize_act heads": lambda: quantize_act(f(2, 4096), factor(32), None, 0, 0.9),
        "quantize_act quick_gelu": lambda: quantize_act(f(2, 4096), None, None, 0, 0.9, "quick_gelu"),
        "quantize_act gelu": lambda: quantize_act(f(2, 4096), factor(64), factor(64), 0, 0.9, "gelu"),
        "rms_norm": lambda: rms_norm(f(2, 4096), f(4096), 1e-5),
        "w4a4_linear many": lambda: w4a4_linear(_packed(640, 4096), f(640), _packed(256, 4096), f(256)),
        "w4a4_linear few": lambda: w4a4_linear(_packed(1, 11008), f(1), _packed(256, 11008), f(256), f(256)),
        "w4a16_linear many": lambda: w4a16_linear(
            f(640, 4096, dtype=torch.bfloat16), *_grouped(12288, 4096), 12288, f(12288)
        ),
        "w4a16_linear few": lambda: w4a16_linear(f(1, 11008, dtype=torch.float16), *_grouped(4096, 11008), 4096),
        "w4a16_linear few rows": lambda: w4a16_linear(f(16, 4096), *_grouped(22016, 4096), 22016),
        "float_linear": lambda: float_linear(f(1, 4096), f(4096, 128, dtype=torch.float16)),
        "kv4_append": lambda: kv4_append(*_cache(32, 64, 128), f(1, 32, 8, 128), 0, 0.9),
        "qkv_append": lambda: qkv_append(
            f(1, 2, 3 * 4096),
            (f(1, 2, 128), f(1, 2, 128)),
            (factor(128), factor(128)),
            (0, 0),
            _cache(32, 64, 128),
            _cache(32, 64, 128),
            0,
            (0.9, 0.9),
        ),
        "kv4_attention prefill": lambda: kv4_attention(
            f(1, 32, 640, 128), _cache(32, 640, 128), _cache(32, 640, 128), 640, None, 0.1, split=False
        ),
        "kv4_attention decode": lambda: kv4_attention(
            f(8, 32, 1, 128),
            _cache(32, 640, 128, 8),
            _cache(32, 640, 128, 8),
            640,
            torch.empty(8, dtype=torch.int32),
            0.1,
            split=False,
        ),
        "kv4_attention decode, GQA": lambda: kv4_attention(
            f(1, 28, 1, 128),
            _cache(4, 1024, 128),
            _cache(4, 1024, 128),
            1024,
            torch.empty(1, dtype=torch.int32),
            0.1,
            split=True,
        ),
        "kv4_attention shared": lambda: kv4_attention(
            f(1, 28, 16, 256), _cache(4, 640, 128), _cache(4, 640, 128), 640, None, 0.1, f(1, 128, 640), split=False
        ),
        "kv4_paged_attention": lambda: kv4_paged_attention(
            f(16, 32, 1, 128), *_pages(32), *_tables(16), 0.1, split=False
        ),
        "kv4_paged_attention, GQA, shared": lambda: kv4_paged_attention(
            f(1, 28, 1, 256), *_pages(4), *_tables(1), 0.1, f(1, 128, 640), split=True
        ),
        "kv16_attention": lambda: kv16_attention(f(1, 28, 16, 128), *_halves(4, 640, 1), 640, None, 0.1),
        "kv16_paged_attention": lambda: kv16_paged_attention(
            f(16, 32, 1, 128), *_halves(32, 16, 64), *_tables(16), 0.1
        ),
        "w8a8_linear": lambda: w8a8_linear(f(64, 4096), f(256, 4096, dtype=torch.int8), f(256), f(256)),
        "kv4_page_write": lambda: kv4_page_write(
            _cache(32, 16, 128), _cache(32, 4, 128), torch.empty(4, dtype=torch.int64)
        ),
        "kv4_page_read": lambda: kv4_page_read(
            _cache(32, 16, 128), torch.empty(2, 8, dtype=torch.int32), torch.empty(2, dtype=torch.int32), 128
        ),
        "token_score packed": lambda: token_score(
            f(1, 32, 64, 128), _cache(32, 64, 128), f(1, 32, 64), mask, mask, 0.1
        ),
        "token_score float": lambda: token_score(f(1, 28, 64, 256), f(1, 4, 64, 256), f(1, 28, 64), mask, mask, 0.1),
        "token_select": lambda: token_select(
            f(1, 576), torch.empty(1, 576, dtype=torch.bool), torch.empty(1, dtype=torch.int64)
        ),
        "token_gather": lambda: token_gather(f(1, 640, 4096), torch.empty(1, 200, dtype=torch.int64)),
    }


def recorded(arch: int, names: Iterable[str] | None = None) -> list[Call]:
    """The launches of `cases`, each shape of code once."""
    calls: list[Call] = []
    for name, case in cases().items():
        if names is None or name in names:
            with recording(arch) as found:
                case()
            calls += found
    unique: dict[Any, Call] = {}
    for call in calls:
        unique.setdefault(identity(call), call)
    return list(unique.values())


def identity(call: Call) -> tuple[str, str, str]:
    """Equal for launches that the same code serves."""
    return call.kernel.__name__, str(_specialised(call)), str(call.options)


def _specialised(call: Call) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """(signature, constants, attributes) of a call, as Triton specialises it: pointers and numbers divisible by 16, and
    numbers that are 1."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (parameter, value) in enumerate(zip(call.kernel.params, call.arguments, strict=True)):
        name = parameter.name
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def compiled(call: Call, arch: int) -> Compiled:
    """Machine code of one launch for one architecture, and what it takes."""
    signature, constants, attributes = _specialised(call)
    source = ASTSource(call.kernel, signature=signature, constexprs=constants, attrs=attributes)
    made: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=call.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    name = f"{call.kernel.__name__}[{','.join(str(v) for v in constants.values())}]"
    return Compiled(
        name,
        arch,
        made.metadata.num_warps,
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        made.metadata.shared,
        made.asm["ptx"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m quota_kernels.inspect", description=__doc__)
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=ARCHITECTURES,
        default=list(ARCHITECTURES),
        help="compute capabilities, as 90 for 9.0",
    )
    parser.add_argument("--case", nargs="+", choices=list(cases()), help="only these calls")
    asked = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 defines the kernels for the interpreter; unset it to compile them")
    print(f"{'kernel':100} arch warps registers stack bytes shared bytes")
    for arch in asked.arch:
        for call in recorded(arch, asked.case):
            made = compiled(call, arch)
            print(
                f"{made.kernel:100} {made.arch:4} {made.warps:5} {made.registers:9} {made.spilled:11} {made.shared:12}",
                flush=True,
            )


if __name__ == "__main__":
    main()
