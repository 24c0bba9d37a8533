"""Safetensors files of a model, written as tensors come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quota.core.errors import CheckpointError, UsageError
from quota.core.files import atomic_write_text, check_space, naming

INDEX = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 2 * 1024**3


class Shards:
    """`add` tensors under their final names, then `finish`; a file is written whenever `most_bytes` would be
    exceeded."""

    def __init__(self, folder: Path, most_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._written: list[list[str]] = []
        self._names: set[str] = set()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """CheckpointError for a repeated name."""
        for name, tensor in tensors.items():
            if name in self._names:
                raise CheckpointError(f"tensor {name}: written twice")
            self._names.add(name)
            tensor = (
                tensor.detach().to("cpu").contiguous().clone()
            )  # clone: tied tensors must not share storage in a shard
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self.most_bytes:
                self._flush()
            self._pending[name] = tensor
            self._pending_bytes += size

    def finish(self) -> None:
        """The files get their names and, where there are several, an index."""
        if self._pending or not self._written:
            self._flush()
        count = len(self._written)
        where: dict[str, str] = {}
        for number, names in enumerate(self._written, start=1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard(number).rename(self.folder / final)
            where |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(where.items()))}
            atomic_write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        self._written.append(list(self._pending))
        shard = self._shard(len(self._written))
        check_space(shard, self._pending_bytes)
        with naming(shard):
            shard.touch()
            mode = shard.stat().st_mode & 0o777  # the umask's; the library makes its files private
            try:
                save_file(self._pending, str(shard), metadata={"format": "pt"})
            except SafetensorError as error:
                raise UsageError(f"{shard}: cannot be written ({error}); make room or choose another folder") from error
            shard.chmod(mode)
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"
