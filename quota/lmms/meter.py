"""Power and peak memory of a GPU while something runs on it. On a CPU both are unknown."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch

_EVERY_S = 0.05


class Meter:
    """`with Meter(device) as meter:` fills `power_w`, the mean of NVML's readings in watts, and `peak_bytes` that torch held on the device.

    Both stay None on a CPU, power also where NVML cannot be read; `why_not` then has the reason.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.power_w: float | None = None
        self.peak_bytes: int | None = None
        self.why_not: str | None = None if device.type == "cuda" else f"no GPU in use ({device})"
        self._readings: list[float] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._read()
            if self.why_not is None:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize(self.device)
        self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        if self._thread is not None:
            self._read()
            self._over.set()
            self._thread.join()
        if self._readings:
            self.power_w = sum(self._readings) / len(self._readings)

    def _watch(self) -> None:
        while not self._over.wait(_EVERY_S):
            self._read()

    def _read(self) -> None:
        try:
            self._readings.append(torch.cuda.power_draw(self.device) / 1e3)
        except Exception as error:  # NVML and its package raise many kinds
            self.why_not = f"NVML: {error}"

    def figures(self) -> dict[str, Any]:
        return {"peak_memory_bytes": self.peak_bytes, "power_w": None if self.power_w is None else round(self.power_w, 1)}
