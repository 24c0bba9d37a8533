"""Every kernel compiles for every architecture, without a GPU: Triton brings its own assembler."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install -e '.[gpu]' in the clone (Linux)")

ARCHITECTURES = (80, 86, 89, 90)
SHARED_BYTES = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
}  # CUDA C++ programming guide, compute capabilities: most per block


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles(arch: int) -> None:
    from quota_kernels.inspect import compiled, recorded

    for made in [compiled(call, arch) for call in recorded(arch)]:
        assert made.shared <= SHARED_BYTES[arch], made.kernel
        assert made.registers * made.warps * 32 <= 65536, made.kernel
        assert "div.full" not in made.ptx and "div.approx" not in made.ptx and "sqrt.approx" not in made.ptx, (
            made.kernel
        )  # one rounding, as the contract says
        if made.kernel.startswith("w4a4_linear"):
            assert ".s32.s8.s8" in made.ptx and made.spilled == 0, made.kernel


def test_the_linear_kernels_use_int8_matrix_instructions() -> None:
    from quota_kernels.inspect import compiled, recorded

    (call,) = [call for call in recorded(80, ["w4a4_linear few"]) if call.kernel.__name__ == "w4a4_linear_kernel"]
    made = compiled(call, 80)
    assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in made.ptx and made.spilled == 0
