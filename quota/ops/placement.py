"""Where the portable codes of a weight lie once a kernel has its own layout of them: a GPU's memory holds a weight
once."""

from __future__ import annotations

from torch import Tensor


def to_host(codes: Tensor) -> None:
    """Move what `codes` holds, and every name of the same tensor, to the CPU, where it is only read to be saved."""
    if codes.is_cuda:
        codes.data = codes.cpu()


def beside(codes: Tensor, scale: Tensor) -> Tensor:
    """`codes` on the device of `scale`, moved back if `to_host` moved it."""
    if codes.device != scale.device:
        codes.data = codes.to(scale.device)
    return codes
