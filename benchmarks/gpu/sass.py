"""What the compiler made of the CUDA kernels: `python -m benchmarks sass [library or object ...]` checks
machine code and tables registers.

Reads the built CUDA library with `cuobjdump`; no GPU is needed. Exit status 1 when an intended instruction is missing
or a kernel spills.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quota.core.errors import UsageError
from quota.ops.cuda import LIBRARY

_PACKAGES = (("nvidia", "cu13/bin/cuobjdump"), ("triton", "backends/nvidia/bin/cuobjdump"))
_ARCH = re.compile(r"^arch = (sm_\w+)", re.M)
_FUNCTION = re.compile(r"^\s*Function\s*:?\s*(\w+):?\s*$", re.M)
_NAME = re.compile(r"([a-z0-9_]+_kernel)(?:I((?:L[a-z]\d+E)+)E)?")
_INSTRUCTION = re.compile(r"\b(IG?MMA[.\w]*|LDGSTS|UBLKCP[.\w]*|STL|LDL)\b")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. Sizes in bytes; `local` is what it keeps in slow memory: spills and arrays."""

    arch: str
    name: str
    registers: int
    local: int
    instructions: frozenset[str]

    @property
    def intended(self) -> str | None:
        """The matrix instruction it is written for; None where it needs none."""
        base, _, rest = self.name.partition("<")
        if base in ("few_kernel", "tile_kernel"):
            if rest.startswith("1"):
                return "IMMA.16864.S4.S4" if self.arch < "sm_90" else None
            return "IMMA.16832.S8.S8"
        if base == "warpgroup_kernel":
            return f"IGMMA.64x{rest.rstrip('>')}x32.S8.S8" if self.arch == "sm_90a" else None
        return "IMMA.16832.S8.U8" if base in ("attention_kernel", "heads_kernel", "row_kernel", "tall_kernel") else None

    @property
    def unused(self) -> bool:
        """Never launched on this architecture: its body is a trap or empty."""
        base, _, rest = self.name.partition("<")
        return (base == "warpgroup_kernel" and self.arch != "sm_90a") or (
            base in ("few_kernel", "tile_kernel") and rest[:1] == "1" and self.arch >= "sm_90"
        )

    def fault(self) -> str | None:
        if self.unused:
            return None
        if self.local or {"STL", "LDL"} & self.instructions:
            return f"keeps {self.local} bytes in local memory"
        if self.intended and not any(i.startswith(self.intended) for i in self.instructions):
            return f"has no {self.intended}: {', '.join(sorted(self.instructions)) or 'no matrix instruction'}"
        return None


def cuobjdump() -> str:
    """The program: on PATH, beside nvcc, or in a pip package (nvidia-cuda-cuobjdump, triton)."""
    nvcc = shutil.which("nvcc")
    candidates = [shutil.which("cuobjdump"), Path(nvcc).resolve().parent / "cuobjdump" if nvcc else None]
    for package, inside in _PACKAGES:
        spec = importlib.util.find_spec(package)
        candidates += [Path(place) / inside for place in (spec.submodule_search_locations or [])] if spec else []
    for path in candidates:
        if path and Path(path).exists():
            return str(path)
    raise UsageError(
        "cuobjdump was not found on PATH, beside nvcc or in a pip package; pip install nvidia-cuda-cuobjdump"
    )


def _dump(path: Path, option: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled kernel, text) from cuobjdump's output."""
    text = subprocess.run([cuobjdump(), option, str(path)], check=True, capture_output=True, text=True).stdout
    for part in re.split(r"(?=^arch = )", text, flags=re.M):
        arch = _ARCH.search(part)
        pieces = _FUNCTION.split(part) if arch else []
        for mangled, body in zip(pieces[1::2], pieces[2::2], strict=True):
            assert arch
            yield arch[1], mangled, body


def readable(mangled: str) -> str:
    """`..few_kernelILb1ELi2EEEv..` -> `few_kernel<1, 2>`."""
    found = _NAME.search(re.sub(r"^_ZN\w*?_cu_[0-9a-f]{8}\d+", "", mangled)) or _NAME.search(mangled)
    if not found:
        return mangled
    parameters = re.findall(r"L[a-z](\d+)E", found[2] or "")
    return found[1] + (f"<{', '.join(parameters)}>" if parameters else "")


def kernels(paths: Iterable[Path]) -> list[Kernel]:
    """Every kernel of the libraries or objects."""
    found = []
    for path in paths:
        code = {
            (arch, mangled): frozenset(_INSTRUCTION.findall(body)) for arch, mangled, body in _dump(path, "--dump-sass")
        }
        for arch, mangled, body in _dump(path, "--dump-resource-usage"):
            size = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", body)}
            found.append(
                Kernel(arch, readable(mangled), size["REG"], size["STACK"] + size["LOCAL"], code[arch, mangled])
            )
    return sorted(found, key=lambda k: (k.name, k.arch))


def table(found: list[Kernel]) -> str:
    """Markdown: registers by kernel and architecture (and bytes of local memory, where there are any), matrix and copy
    instructions."""
    archs = sorted({k.arch for k in found})
    lines = [
        f"| kernel | {' | '.join(archs)} | matrix and copy instructions |",
        f"| --- |{' --: |' * len(archs)} --- |",
    ]
    for name in sorted({k.name for k in found}):
        by_arch = {k.arch: k for k in found if k.name == name and not k.unused}
        cells = [
            f"{k.registers}{f' + {k.local} B' if k.local else ''}" if (k := by_arch.get(arch)) else "" for arch in archs
        ]
        used = sorted(frozenset().union(*(k.instructions for k in by_arch.values())) - {"STL", "LDL"})
        lines.append(f"| `{name}` | {' | '.join(cells)} | {', '.join(used) or '-'} |")
    return "\n".join(lines)


def main(arguments: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="libraries or objects; without: the installed CUDA library")
    paths = parser.parse_args(arguments).paths or [LIBRARY]
    missing = [path for path in paths if not path.exists()]
    if missing:
        sys.exit(f"{missing[0]}: no such file; build it with QUOTA_BUILD=cuda")
    found = kernels(paths)
    print(table(found))
    faults = [f"{k.name} {k.arch}: {fault}" for k in found if (fault := k.fault())]
    print(f"\n{len(found)} kernels, {len(faults)} faults")
    for fault in faults:
        print(f"fault: {fault}")
    return 1 if faults else 0
