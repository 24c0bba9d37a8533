"""What a piece of work took of a CUDA device: peak memory from torch's allocator, average power from NVML's energy
counter (nvidia-ml-py)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class GpuCost:
    """peak_bytes: most memory that tensors held; power_w: the board's average, None where `power_why_not` says why;
    energy_j: over `seconds`, None without a counter."""

    peak_bytes: int = 0
    power_w: float | None = None
    power_why_not: str | None = None
    energy_j: float | None = None
    seconds: float = 0.0

    def _average(self) -> GpuCost:
        if self.energy_j == 0:
            self.power_why_not = f"too short to measure: the energy counter did not move in {1e3 * self.seconds:.0f} ms"
        elif self.energy_j is not None:
            self.power_w = self.energy_j / self.seconds
        return self


def together(costs: Sequence[GpuCost]) -> GpuCost:
    """Sum of several measurements: the largest peak, and all their energy over all their time."""
    missing = next((c.power_why_not for c in costs if c.energy_j is None), None)
    energy = None if missing else sum(c.energy_j or 0.0 for c in costs)
    return GpuCost(max(c.peak_bytes for c in costs), None, missing, energy, sum(c.seconds for c in costs))._average()


def energy_mj(index: int) -> int | str:
    """The board's energy counter in millijoules since its driver was loaded, or why there is none."""
    try:
        import pynvml
    except ImportError:
        return "nvidia-ml-py is not installed: pip install -e '.[gpu]' in the clone"
    try:
        pynvml.nvmlInit()
        board: Any = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        )  # CUDA_VISIBLE_DEVICES renumbers
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(board))
    except pynvml.NVMLError as error:
        return f"no energy counter ({error})"


@contextmanager
def measured(device: torch.device) -> Iterator[GpuCost | None]:
    """What the block takes of a CUDA device, filled in at its end; None on other devices."""
    if device.type != "cuda":
        yield None
        return
    cost, index = GpuCost(), device.index or 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, began = energy_mj(index), time.perf_counter()
    yield cost
    torch.cuda.synchronize(device)
    after, cost.seconds = energy_mj(index), time.perf_counter() - began
    cost.peak_bytes = torch.cuda.max_memory_allocated(device)
    if isinstance(before, str) or isinstance(after, str):
        cost.power_why_not = before if isinstance(before, str) else str(after)
    else:
        cost.energy_j = (after - before) / 1e3
    cost._average()
