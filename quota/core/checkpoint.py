"""The quantized checkpoint folder: sharded safetensors, config.json, processor files and a manifest, `quota.json`, that
vouches for them.

Nothing is ever unpickled. Tensor names are the model's own (`state_dict`). The folder appears in one piece when writing
ends well. What reads it: `quota.core.checkpoint_files`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from quota.core.documents import read_object, shown
from quota.core.errors import CheckpointError, UsageError
from quota.core.files import atomic_folder, atomic_write_text, check_removable, sha256_file
from quota.core.formats import MODULES, Scheme, scheme_named
from quota.core.shards import DEFAULT_SHARD_BYTES, Shards
from quota.core.version import VERSION

MANIFEST = "quota.json"
SCHEMA_VERSION = 1
_SCHEME = "regime"  # the key of the scheme's name in files
README = "README.md"
# transformers only warns about a quantization it does not know and invents the weights. A weight file that does not
# exist makes it stop, with this name in its message; `quota.runtime.hf` takes the entry out when quota is imported.
_NO_SUCH_WEIGHTS = "import-quota-first-see-README.safetensors"
REMEDY = "the folder is damaged: copy or calibrate it again"


@dataclass(frozen=True)
class Manifest:
    """`quota.json`, where the scheme is the field `regime`, by name. `files` maps every other file of the folder to its
    hex SHA-256, `bytes` to its size."""

    scheme: Scheme
    modules: tuple[str, ...]
    source_fingerprint: str
    calibration: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    tool_version: str = VERSION
    schema_version: int = SCHEMA_VERSION

    def dumps(self) -> str:
        data = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "scheme"}
        return json.dumps({**data, _SCHEME: self.scheme.name}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """CheckpointError for a missing or malformed manifest, naming the field."""
        path = Path(folder) / MANIFEST
        try:
            data = read_object(path)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: expected the manifest of a quantized checkpoint, found no file; {REMEDY}"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not readable as JSON ({error}); {REMEDY}") from None
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path}: schema_version: this quota reads {SCHEMA_VERSION}, got {shown(version)}; calibrate again with"
                " this version"
            )
        _check_fields(path, data)
        try:
            scheme = scheme_named(data.pop(_SCHEME))
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {_SCHEME}: {error}; use the version of quota that wrote the folder"
            ) from None
        return cls(**{**data, "scheme": scheme, "modules": tuple(data["modules"])})


def _is_file_name(name: str) -> bool:
    """A plain name that any file system takes."""
    return re.fullmatch(r"[^./\\\x00][^/\\\x00]*", name) is not None and len(name.encode(errors="replace")) <= 255


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    _SCHEME: ("a name", lambda v: isinstance(v, str)),
    "modules": (
        f"a list of some of {list(MODULES)}",
        lambda v: isinstance(v, list) and bool(v) and all(isinstance(m, str) and m in MODULES for m in v),
    ),
    "source_fingerprint": ("a name", lambda v: isinstance(v, str)),
    "calibration": ("an object", lambda v: isinstance(v, dict)),
    "files": ("an object", lambda v: isinstance(v, dict)),
    "bytes": ("an object", lambda v: isinstance(v, dict)),
    "tool_version": ("a name", lambda v: isinstance(v, str)),
    "schema_version": ("a number", lambda v: type(v) is int),
}


def _check_fields(path: Path, data: Mapping[str, Any]) -> None:
    for name, (expected, holds) in _FIELDS.items():
        if not holds(data.get(name)):
            raise CheckpointError(f"{path}: {name}: expected {expected}, got {shown(data.get(name))}; {REMEDY}")
    unknown = sorted(set(data) - set(_FIELDS))
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0][:80]}: unknown field; use the version of quota that wrote the folder"
        )
    for name, digest in data["files"].items():
        if not (_is_file_name(name) and isinstance(digest, str) and _is_size(data["bytes"].get(name))):
            raise CheckpointError(
                f"{path}: files[{shown(name)}]: expected a plain file name with its SHA-256 and size; {REMEDY}"
            )


def is_quantized_folder(folder: str | Path) -> bool:
    """Whether a local folder claims to be a checkpoint of ours."""
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        return True
    try:
        mark = read_object(folder / "config.json").get("quantization_config")
    except (OSError, ValueError):
        return False
    return isinstance(mark, dict) and mark.get("quant_method") == "quota"


def check_destination(folder: str | Path, overwrite: bool = False) -> None:
    """UsageError unless a checkpoint may be written at `folder`: a new path, an empty folder or, under `overwrite`, a
    checkpoint of ours and nothing else."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        example = min(path.name for path in folder.iterdir())
        raise UsageError(f"{folder}: holds {example} and no {MANIFEST}; expected a new or empty folder, choose another")
    if overwrite or not (folder / MANIFEST).is_file():
        check_removable(folder, _owned(folder))
    else:
        raise UsageError(
            f"{folder}: holds a quantized checkpoint; choose another folder, or replace it with --overwrite"
            " (overwrite=True)"
        )


def _owned(folder: Path) -> Callable[[Path], bool]:
    """Tells the files of a checkpoint, as its manifest lists them, from others."""
    names = {MANIFEST, *Manifest.load(folder).files} if (folder / MANIFEST).is_file() else set()
    return lambda path: str(path) in names


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Streams a checkpoint: `add` blocks as they are made; a shard is written whenever `max_shard_bytes` would be
    exceeded.

    `folder` appears when the `with` block ends well; after an error nothing is left. What is already there:
    `check_destination`. `calibration` may be filled
    until the end.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        if max_shard_bytes < 1:
            raise CheckpointError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}")
        self.folder, self.manifest, self.max_shard_bytes, self.overwrite = (
            Path(folder),
            manifest,
            max_shard_bytes,
            overwrite,
        )

    def __enter__(self) -> CheckpointWriter:
        check_destination(self.folder, self.overwrite)
        self._scope = atomic_folder(self.folder, _owned(self.folder))
        self.work = self._scope.__enter__()
        self._shards = Shards(self.work, self.max_shard_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self._finish()
            except BaseException as failed:
                self._scope.__exit__(type(failed), failed, failed.__traceback__)
                raise
        self._scope.__exit__(kind, error, trace)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append tensors under their final names; CheckpointError for a repeated name."""
        self._shards.add(tensors)

    def add_config(self, config: Any) -> None:
        """Write config.json from a transformers configuration (or its dict), marked as quantized by this project."""
        data = dict(config) if isinstance(config, Mapping) else config.to_dict()
        data["transformers_weights"] = _NO_SUCH_WEIGHTS
        data["quantization_config"] = {
            "quant_method": "quota",
            _SCHEME: self.manifest.scheme.name,
            "modules": list(self.manifest.modules),
        }
        atomic_write_text(self.work / "config.json", json.dumps(data, indent=2, sort_keys=True) + "\n")

    def add_processor(self, processor: Any) -> None:
        """Write the processor's files (anything with `save_pretrained`)."""
        processor.save_pretrained(str(self.work))

    def add_file(self, path: str | Path) -> None:
        """Copy a file into the folder under its own name."""
        shutil.copyfile(path, self.work / Path(path).name)

    def _finish(self) -> None:
        self._shards.finish()
        atomic_write_text(self.work / README, _readme(self.manifest))
        paths = sorted(path for path in self.work.iterdir() if path.is_file())
        files, sizes = {p.name: sha256_file(p) for p in paths}, {p.name: p.stat().st_size for p in paths}
        self.manifest = replace(self.manifest, files=files, bytes=sizes)
        atomic_write_text(self.work / MANIFEST, self.manifest.dumps())


def _readme(manifest: Manifest) -> str:
    """How to open the folder: the text of its README. Equal manifests give equal text."""
    return f"""# A quantized checkpoint of QUOTA

Regime {manifest.scheme.name}, quantized parts: {", ".join(manifest.modules)}; written by quota {manifest.tool_version}.

Open this folder with quota, which checks every file against `{MANIFEST}` first:

```python
import quota

model = quota.load("path/to/this/folder")  # a transformers model; model.processor is its processor
```

or by command: `quota run path/to/this/folder --image photo.jpg -p "What is this?"`, `quota serve path/to/this/folder`.

transformers reads the folder with `from_pretrained` only after `import quota.runtime`. Without it, transformers stops
because it finds no file `{_NO_SUCH_WEIGHTS}`: config.json names that file on purpose, since the weights here mean
nothing to a program that does not know their format.

To keep or to share the checkpoint, copy the folder whole. `save_pretrained` does not write one.
"""


def save_checkpoint(
    model: Any,
    folder: str | Path,
    manifest: Manifest,
    processor: Any = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Manifest:
    """Write a model quantized in memory; returns the completed manifest. Tied tensors are written once, under their
    first name."""
    with CheckpointWriter(folder, manifest, max_shard_bytes=max_shard_bytes) as writer:
        writer.add_config(model.config)
        if processor is not None:
            writer.add_processor(processor)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(str(writer.work))
        seen: set[int] = set()
        for name, tensor in model.state_dict().items():
            if tensor.is_meta:
                raise CheckpointError(
                    f"tensor {name}: expected data, got a meta tensor; load the model before saving it"
                )
            if tensor.data_ptr() in seen and tensor.numel():
                continue
            seen.add(tensor.data_ptr())
            writer.add({name: tensor})
    return writer.manifest


def check_tensor(name: str, tensor: Tensor, expected: Tensor) -> None:
    """CheckpointError unless `tensor` has the shape and kind of the model's own; floats may differ in width where the
    model casts."""
    if tuple(tensor.shape) != tuple(expected.shape):
        raise CheckpointError(
            f"tensor {name}: expected shape {list(expected.shape)}, got {list(tensor.shape)}; {REMEDY}"
        )
    same_kind = (tensor.dtype.is_floating_point and expected.dtype.is_floating_point) or tensor.dtype == expected.dtype
    if not same_kind or (tensor.dtype.itemsize < 2 and tensor.dtype not in (torch.uint8, torch.int8, torch.bool)):
        raise CheckpointError(f"tensor {name}: expected {expected.dtype}, got {tensor.dtype}; {REMEDY}")
