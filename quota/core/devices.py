"""Devices by name."""

from __future__ import annotations

import torch

from quota.core.errors import UsageError

KINDS = ("cpu", "cuda")


def named_device(device: torch.device | str) -> torch.device:
    """The device of that name, here or not; UsageError when it is none."""
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in KINDS:
        raise UsageError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
    return found


def checked_device(device: torch.device | str) -> torch.device:
    """The device of that name; UsageError when it is none, or is not here."""
    found = named_device(device)
    if reason := why_absent(found):
        raise UsageError(f"device: {device} is not here: {reason}, or leave device at cpu")
    return found


def why_absent(device: torch.device) -> str | None:
    """None where the device is here, else why it is not."""
    if device.type != "cuda" or (device.index or 0) < torch.cuda.device_count():
        return None
    if torch.version.cuda is None:
        return "this torch was built for the CPU; install one for CUDA"
    return f"{torch.cuda.device_count()} CUDA devices found"
