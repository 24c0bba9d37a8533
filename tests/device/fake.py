"""A second device without hardware: tensors that say they are on it hold CPU tensors and compute there.

What a GPU refuses is refused: a tensor of the CPU beside one of the device (but for numbers, and copies from one to the
other), numpy on a tensor of the device. What it would hold is counted: `FAKE.live` and `FAKE.peak` bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from quota.core import devices

NAME = "fakegpu"
_aten = torch.ops.aten
# Between devices, or of what the host reads of a device: everything else takes its tensors from one side.
_CROSSING = {_aten.copy_.default, _aten._to_copy.default}


class _Memory:
    """Bytes of the storages that tensors of the device hold."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.live = self.peak = 0

    def hold(self, tensor: Tensor, owner: Any) -> Any:
        """Count its storage until `owner` dies, or until what is returned is called."""
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.holders:
            self.holders[key] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self.holders[key] += 1
        return weakref.finalize(owner, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.live -= size


FAKE = _Memory()


class OnDevice(Tensor):
    """A tensor of the device; `held` is the CPU tensor behind it."""

    held: Tensor
    forgets: Any

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        assert type(held) is Tensor, type(held)
        out: Any = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        out.held, out.forgets = held, FAKE.hold(held, out)
        return out

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, other: Any) -> None:
        assert isinstance(other, OnDevice) and other.shape == self.shape, "a tensor stays on its device"
        self.forgets()
        self.held, self.forgets = other.held, FAKE.hold(other.held, self)
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.detach().tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy; use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {NAME}"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for each in (*args, *kwargs.values()) for x in (each if isinstance(each, tuple | list) else (each,))]
    tensors = [x for x in given if isinstance(x, Tensor)]
    there = any(isinstance(t, OnDevice) for t in tensors)
    if there and func not in _CROSSING:
        lost = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim and t.device.type == "cpu"]
        if lost:
            shapes = [list(t.shape) for t in lost]
            raise RuntimeError(f"{func}: expected all tensors on {NAME}, got {shapes} of the CPU")
    asked = kwargs.get("device")
    kind = None if asked is None else torch.device(asked).type
    assert not kwargs.get("pin_memory"), f"{NAME} reads no pinned memory"
    if kind == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*(_map(_held, x) for x in args), **{name: _map(_held, x) for name, x in kwargs.items()})
    if func._schema.is_mutable:
        return next((t for t in tensors if _held(t) is out), out)
    if func is _aten._to_copy.default and there and kind == "cpu":
        return out.clone() if any(out is _held(t) for t in tensors) else out
    return _map(_wrapped, out) if kind == NAME or (there and kind is None) else out


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _wrapped(x: Any) -> Any:
    return OnDevice(x) if type(x) is Tensor else x


def _map(change: Any, x: Any) -> Any:
    return type(x)(map(change, x)) if type(x) in (tuple, list) else change(x)


class _Factories(TorchDispatchMode):
    """Tensors that are made on the device, or brought there from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        there = asked is not None and torch.device(asked).type == NAME
        if there or any(issubclass(t, OnDevice) for t in types):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Module:
    """What torch asks of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


# For the process, and before its first backward pass: autograd counts the devices then.
_setup_privateuseone_for_python_backend(NAME, _Module())


@contextmanager
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Memory]:
    """While open, `NAME` is a device of torch's and of quota's; yields its memory, the peak counted from here."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=)` is made here and moved where modes see it
    try:
        with monkeypatch.context() as patch, _Factories():
            patch.setattr(devices, "KINDS", (*devices.KINDS, NAME))
            # views of wrapped tensors cannot be made in torch's inference mode
            patch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad())
            FAKE.peak = FAKE.live
            yield FAKE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
