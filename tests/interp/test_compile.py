"""Every kernel compiles for every architecture, without a GPU: Triton brings its own assembler."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install -e '.[gpu]' in the clone (Linux)")

SHARED_BYTES = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
}  # CUDA C++ programming guide, compute capabilities: most per block


@pytest.mark.slow
@pytest.mark.parametrize("alike", [(80, 86, 89), (90,)], ids=["8.x", "9.0"])
def test_every_kernel_compiles(alike: tuple[int, ...]) -> None:
    """Architectures of one major number run each other's code, so a launch that is the same on two is compiled once."""
    from quota_kernels.inspect import compiled, identity, recorded

    made = {}
    for arch in alike:
        for call in recorded(arch):
            code = made[identity(call)] = made.get(identity(call)) or compiled(call, arch)
            assert code.shared <= SHARED_BYTES[arch], code.kernel
    for code in made.values():
        assert code.registers * code.warps * 32 <= 65536, code.kernel
        assert "div.full" not in code.ptx and "div.approx" not in code.ptx and "sqrt.approx" not in code.ptx, (
            code.kernel
        )  # one rounding, as the contract says
        if code.kernel.startswith("w4a4_linear"):
            assert ".s32.s8.s8" in code.ptx and code.spilled == 0, code.kernel


def test_the_linear_kernels_use_int8_matrix_instructions() -> None:
    from quota_kernels.inspect import compiled, recorded

    (call,) = [call for call in recorded(80, ["w4a4_linear few"]) if call.kernel.__name__ == "w4a4_linear_kernel"]
    made = compiled(call, 80)
    assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in made.ptx and made.spilled == 0
