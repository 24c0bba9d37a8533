"""What holds for every test: threads, instruction sets, time and poisoned memory.

A test process takes its share of the cores, and so do the programs it starts. Nothing here or below may depend on how
long something takes: hypothesis has no deadline, and waiting ends by what is waited for (`tests/waiting.py`). Memory
that is not initialised is poisoned: torch fills what `empty` returns (NaN, or the largest integer), in Python and in
native code.
"""

from __future__ import annotations

import os

# Before torch is imported: its pools, and those of every child, have the size of this process's share.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _WORKERS)))

from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from quota.core.env import CPU_ISAS  # noqa: E402
from quota.ops import native  # noqa: E402

hypothesis.settings.register_profile("quota", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("quota")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`isa`: the instruction sets of this CPU and no other; `pytest_terminal_summary` names those that are missing."""
    if "isa" in metafunc.fixturenames:
        missing = pytest.param("native", marks=pytest.mark.skip(reason="the native library is not built"))
        metafunc.parametrize("isa", native.supported_isas() or [missing], indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native library on each instruction set in turn."""
    yield native.set_isa(request.param)
    native.set_isa(None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    here = native.supported_isas()
    missing = [isa for isa in CPU_ISAS if isa not in here]
    terminalreporter.write_line(
        f"instruction sets: {', '.join(here) or 'none'} tested; not on this machine: {', '.join(missing) or 'none'}"
    )


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
