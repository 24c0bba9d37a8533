"""A GPU's rules without a GPU: tensors that say they are elsewhere (on torch's device "meta"), hold CPU tensors and
compute on them.

Operations that mix devices fail as they would on a GPU; those that wait for the device are counted. Numbers, and their
bits, are the CPU's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
_MIX = (aten.copy_.default, aten._to_copy.default)
_INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)  # with indices from the host
_WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)


class OnDevice(torch.Tensor):
    """`held` is the CPU tensor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
            requires_grad=False,
        )
        made.held = held
        return made

    def tolist(self) -> Any:  # torch refuses it for subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: outside of the emulated device")


class Emulated(TorchDispatchMode):
    """waited: the operations that would have waited for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __enter__(self) -> Emulated:
        self._tensor = torch.tensor  # makes a tensor on "meta" without asking any mode
        torch.tensor = lambda *args, device=None, **kwargs: self._tensor(*args, **kwargs).to(device or "cpu")
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.tensor = self._tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves, _ = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        hosts = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]
        if ours and hosts and func not in _MIX and not (func in _INDEXED and isinstance(args[0], OnDevice)):
            raise AssertionError(
                f"{func}: tensors on two devices, {[(tuple(x.shape), str(x.device)) for x in tensors]}"
            )
        target = kwargs.get("device")
        to_host = func is aten._to_copy.default and target is not None and torch.device(target).type == "cpu"
        masked = func in _INDEXED and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_flatten(args[1])[0]
        )
        if ours and (
            func in _WAITS or to_host or masked or (func is aten.copy_.default and not isinstance(args[0], OnDevice))
        ):
            self.waited.append(str(func))
        if func is aten._fused_sdp_choice.default:
            return 0  # composed of other operations
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        wrap = bool(ours) and not to_host if target is None or to_host else torch.device(target).type == "meta"
        known = {id(x.held): x for x in ours}
        flat, form = tree_flatten(out)
        return tree_unflatten(
            [known.get(id(x), OnDevice(x)) if wrap and isinstance(x, torch.Tensor) else x for x in flat], form
        )


def _held(x: Any) -> Any:
    if isinstance(x, OnDevice):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) else x


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its parameters and buffers on the emulated device."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = OnDevice(parameter.detach())  # type: ignore[assignment]
        if hasattr(part, "forget"):
            part.forget()
    return module
