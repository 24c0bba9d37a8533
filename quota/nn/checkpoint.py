"""The quantized checkpoint folder: sharded safetensors, config.json, processor files and a manifest, `quota.json`, that vouches for them.

Nothing is ever unpickled. Tensor names are the model's own (`state_dict`). The folder appears in one piece when writing ends well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quota.core.errors import CheckpointError
from quota.core.files import atomic_folder, sha256_file
from quota.core.version import VERSION

MANIFEST = "quota.json"
SCHEMA_VERSION = 1
INDEX = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 2 * 1024**3
_REMEDY = "the folder is damaged: copy or calibrate it again"


@dataclass(frozen=True)
class Manifest:
    """`quota.json`. `files` maps every other file of the folder to its hex SHA-256, `bytes` to its size."""

    regime: str
    modules: tuple[str, ...]
    source_fingerprint: str
    calibration: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    tool_version: str = VERSION
    schema_version: int = SCHEMA_VERSION

    def dumps(self) -> str:
        return json.dumps({"schema_version": self.schema_version, **asdict(self), "modules": list(self.modules)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """CheckpointError for a missing or malformed manifest, naming the field."""
        path = Path(folder) / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: expected the manifest of a quantized checkpoint, found no file; {_REMEDY}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not readable as JSON ({error}); {_REMEDY}") from None
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}; {_REMEDY}")
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise CheckpointError(f"{path}: schema_version: this quota reads {SCHEMA_VERSION}, got {version!r}; calibrate again with this version")
        _check_fields(path, data)
        return cls(**{**data, "modules": tuple(data["modules"])})


_FIELDS: dict[str, type] = {
    "regime": str, "modules": list, "source_fingerprint": str, "calibration": dict, "files": dict, "bytes": dict, "tool_version": str, "schema_version": int,
}  # fmt: skip


def _check_fields(path: Path, data: Mapping[str, Any]) -> None:
    for name, kind in _FIELDS.items():
        if not isinstance(data.get(name), kind):
            raise CheckpointError(f"{path}: {name}: expected {kind.__name__}, got {type(data.get(name)).__name__}; {_REMEDY}")
    unknown = sorted(set(data) - set(_FIELDS))
    if unknown:
        raise CheckpointError(f"{path}: {unknown[0]}: unknown field; use the version of quota that wrote the folder")
    for name, digest in data["files"].items():
        plain = name == Path(name).name and not name.startswith(".") and "\\" not in name
        if not plain or not isinstance(digest, str) or not isinstance(data["bytes"].get(name), int):
            raise CheckpointError(f"{path}: files[{name!r}]: expected a plain file name with its SHA-256 and size; {_REMEDY}")


def is_quantized_folder(folder: str | Path) -> bool:
    """Whether a local folder claims to be a checkpoint of ours."""
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config.get("quantization_config", {}).get("quant_method") == "quota"
    except (OSError, ValueError, AttributeError):
        return False


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """CheckpointError naming the first file that is missing, truncated or altered."""
    folder = Path(folder)
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: listed in {MANIFEST} but missing; {_REMEDY}")
        size = path.stat().st_size
        if size != manifest.bytes[name]:
            raise CheckpointError(f"{path}: expected {manifest.bytes[name]} bytes, got {size} (truncated or altered); {_REMEDY}")
        found = sha256_file(path)
        if found != digest:
            raise CheckpointError(f"{path}: expected sha256 {digest}, got {found}: the contents were altered; {_REMEDY}")


def weight_files(folder: str | Path, manifest: Manifest) -> list[Path]:
    """The safetensors files the manifest vouches for, in order."""
    names = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    if not names:
        raise CheckpointError(f"{Path(folder) / MANIFEST}: files: expected at least one .safetensors file, got none; {_REMEDY}")
    return [Path(folder) / name for name in names]


def tensor_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the headers alone. CheckpointError for a damaged file or a name in two files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with open_tensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name in shapes:
                    raise CheckpointError(f"tensor {name}: found in two files, again in {path}; {_REMEDY}")
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def open_tensors(path: Path) -> Any:
    """A safetensors file for lazy reading; CheckpointError when its header or length is wrong."""
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); {_REMEDY}") from None


def iterate_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every file, one tensor in memory at a time."""
    for path in files:
        with open_tensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Streams a checkpoint: `add` blocks as they are made; a shard is written whenever `max_shard_bytes` would be exceeded.

    The folder replaces `folder` when the `with` block ends well; after an error nothing is left. `calibration` may be filled until the end.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        if max_shard_bytes < 1:
            raise CheckpointError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}")
        self.folder, self.manifest, self.max_shard_bytes = Path(folder), manifest, max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def __enter__(self) -> CheckpointWriter:
        self._scope = atomic_folder(self.folder)
        self.work = self._scope.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            try:
                self._finish()
            except BaseException as failed:
                self._scope.__exit__(type(failed), failed, failed.__traceback__)
                raise
        self._scope.__exit__(kind, error, trace)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append tensors under their final names; CheckpointError for a repeated name."""
        for name, tensor in tensors.items():
            if name in self._names:
                raise CheckpointError(f"tensor {name}: written twice")
            self._names.add(name)
            tensor = tensor.detach().to("cpu").contiguous().clone()  # clone: tied tensors must not share storage in a shard
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self.max_shard_bytes:
                self._flush()
            self._pending[name] = tensor
            self._pending_bytes += size

    def add_config(self, config: Any) -> None:
        """Write config.json from a transformers configuration (or its dict), marked as quantized by this project."""
        data = dict(config) if isinstance(config, Mapping) else config.to_dict()
        data["quantization_config"] = {"quant_method": "quota", "regime": self.manifest.regime, "modules": list(self.manifest.modules)}
        (self.work / "config.json").write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def add_processor(self, processor: Any) -> None:
        """Write the processor's files (anything with `save_pretrained`)."""
        processor.save_pretrained(str(self.work))

    def add_file(self, path: str | Path) -> None:
        """Copy a file into the folder under its own name."""
        shutil.copyfile(path, self.work / Path(path).name)

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        save_file(self._pending, str(self._shard(len(self._shards))), metadata={"format": "pt"})
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _shard(self, number: int) -> Path:
        return self.work / f"shard-{number:05d}.safetensors"

    def _finish(self) -> None:
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        where: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard(number).rename(self.work / final)
            where |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(where.items()))}
            (self.work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        paths = sorted(path for path in self.work.iterdir() if path.is_file())
        known = {**asdict(self.manifest), "modules": self.manifest.modules}
        known |= {"files": {p.name: sha256_file(p) for p in paths}, "bytes": {p.name: p.stat().st_size for p in paths}}
        self.manifest = Manifest(**known)
        (self.work / MANIFEST).write_text(self.manifest.dumps(), encoding="utf-8")


def save_checkpoint(model: Any, folder: str | Path, manifest: Manifest, processor: Any = None, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Manifest:
    """Write a model quantized in memory; returns the completed manifest. Tied tensors are written once, under their first name."""
    with CheckpointWriter(folder, manifest, max_shard_bytes=max_shard_bytes) as writer:
        writer.add_config(model.config)
        if processor is not None:
            writer.add_processor(processor)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(str(writer.work))
        seen: set[int] = set()
        for name, tensor in model.state_dict().items():
            if tensor.is_meta:
                raise CheckpointError(f"tensor {name}: expected data, got a meta tensor; load the model before saving it")
            if tensor.data_ptr() in seen and tensor.numel():
                continue
            seen.add(tensor.data_ptr())
            writer.add({name: tensor})
    return writer.manifest


def check_tensor(name: str, tensor: Tensor, expected: Tensor) -> None:
    """CheckpointError unless `tensor` has the shape and kind of the model's own; floats may differ in width where the model casts."""
    if tuple(tensor.shape) != tuple(expected.shape):
        raise CheckpointError(f"tensor {name}: expected shape {list(expected.shape)}, got {list(tensor.shape)}; {_REMEDY}")
    same_kind = (tensor.dtype.is_floating_point and expected.dtype.is_floating_point) or tensor.dtype == expected.dtype
    if not same_kind or (tensor.dtype.itemsize < 2 and tensor.dtype not in (torch.uint8, torch.int8, torch.bool)):
        raise CheckpointError(f"tensor {name}: expected {expected.dtype}, got {tensor.dtype}; {_REMEDY}")
