"""Waiting for something without a claim on how long it takes: the bound only keeps a fault from hanging the suite."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 300.0  # far above what any step takes on a machine that does a dozen other things


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Return once `condition()` holds; AssertionError when it still does not after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds:.0f} s in vain"
        time.sleep(0.01)
