"""A decode step never reads a tensor on the host: on a GPU that would wait for everything before it, and no graph could
be captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quota.models.rtn import quantize_rtn
from quota.runtime.patch import patched
from tests.prune.recipes import greedy, recipe_for
from tests.tiny import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen

READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "item", "is_nonzero", "unique2"}


class HostReads(TorchDispatchMode):
    """Collects the operations that need a value, or a size that depends on values, on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in READS or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["original", "compact"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_decoder_layers_read_nothing(family: str, policy: str) -> None:
    model, make = (tiny_llava(), llava_inputs) if family == "llava" else (tiny_qwen(key_bias=50.0), qwen_inputs)
    model = quantize_rtn(model)
    layers = model.get_submodule("model.language_model").layers
    watches: list[HostReads] = []

    def begin(layer: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == 1:
            watches.append(HostReads())
            watches[-1].__enter__()

    def end(layer: Any, args: Any, output: Any) -> None:
        if output.shape[1] == 1:
            watches[-1].__exit__(None, None, None)

    with patched(model, recipe_for(model, (1, 2), (0.75, 0.5), position_policy=policy)):
        for layer in layers:
            layer.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
            layer.register_forward_hook(end)
        greedy(model, make(model), tokens=3)
    with HostReads() as control:
        bool(torch.ones(2).any())
    assert control.found and len(watches) == 2 * len(layers)
    assert not [name for watch in watches for name in watch.found]
