"""`isa`: the native library on each instruction set in turn. `threads(n)`: torch's pool of that size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from quota.core.env import CPU_ISAS
from quota.ops import native


@pytest.fixture(params=CPU_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    available = native.supported_isas()
    if request.param not in available:
        pytest.skip(f"{request.param}: {'not on this CPU' if available else 'the native library is not built'}")
    yield native.set_isa(request.param)
    native.set_isa(None)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
