"""What a piece of work took of a CUDA device: peak memory from torch's allocator, average power from NVML's energy counter (nvidia-ml-py)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class GpuCost:
    """peak_bytes: most memory that tensors held; power_w: the board's average, None where `power_why_not` says why."""

    peak_bytes: int = 0
    power_w: float | None = None
    power_why_not: str | None = None


def energy_mj(index: int) -> int | str:
    """The board's energy counter in millijoules since its driver was loaded, or why there is none."""
    try:
        import pynvml
    except ImportError:
        return "nvidia-ml-py is not installed: pip install 'quota[gpu]'"
    try:
        pynvml.nvmlInit()
        board: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")  # CUDA_VISIBLE_DEVICES renumbers
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
    after, seconds = energy_mj(index), time.perf_counter() - began
    cost.peak_bytes = torch.cuda.max_memory_allocated(device)
    if isinstance(before, str) or isinstance(after, str):
        cost.power_why_not = before if isinstance(before, str) else str(after)
    elif after == before:
        cost.power_why_not = f"too short to measure: the energy counter did not move in {1e3 * seconds:.0f} ms"
    else:
        cost.power_w = (after - before) / 1e3 / seconds
