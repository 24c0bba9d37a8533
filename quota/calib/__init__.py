"""Calibration: `calibrate(model, samples, out=..., settings=Settings(...))`. Importing the package imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quota.calib.run import calibrate, plan_calibration
    from quota.calib.settings import Settings

__all__ = ["Settings", "calibrate", "plan_calibration"]

_LAZY = {
    "Settings": "quota.calib.settings",
    "calibrate": "quota.calib.run",
    "plan_calibration": "quota.calib.run",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'quota.calib' has no attribute {name!r}")
