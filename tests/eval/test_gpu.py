from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from quota.eval import gpu


class NVMLError(Exception):
    pass


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Readings of the energy counter, next one first; torch.cuda as if a device were there."""
    readings: list[int] = []
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda board: readings.pop(0),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    answers = {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 12,
        "get_device_properties": SimpleNamespace(uuid="x"),
    }
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    return readings


def test_average_power_is_energy_over_time(board: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    board += [5_000, 8_000]
    now = iter((1.0, 3.0))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(now))
    with gpu.measured(torch.device("cuda")) as cost:
        pass
    assert cost == gpu.GpuCost(peak_bytes=12, power_w=1.5, energy_j=3.0, seconds=2.0)


def test_several_pieces_share_their_energy_over_their_time() -> None:
    still, moved = gpu.GpuCost(5, None, "too short", 0.0, 1.0), gpu.GpuCost(9, 6.0, None, 6.0, 1.0)
    assert gpu.together([still, moved]) == gpu.GpuCost(9, 3.0, None, 6.0, 2.0)
    assert "did not move in 1000 ms" in str(gpu.together([still]).power_why_not)
    assert gpu.together([moved, gpu.GpuCost(1, None, "no counter", None, 1.0)]) == gpu.GpuCost(
        9, None, "no counter", None, 2.0
    )


def test_no_figure_without_a_reason(board: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    board += [5_000, 5_000]
    with gpu.measured(torch.device("cuda", 1)) as cost:
        pass
    assert cost is not None and cost.power_w is None and "did not move" in str(cost.power_why_not)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert ".[gpu]" in str(gpu.energy_mj(0))
    with gpu.measured(torch.device("cpu")) as nothing:
        assert nothing is None
