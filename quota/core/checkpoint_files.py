"""Reading a checkpoint folder: nothing but the files its manifest vouches for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quota.core.checkpoint import MANIFEST, REMEDY, Manifest
from quota.core.errors import CheckpointError
from quota.core.files import sha256_file
from quota.core.shards import INDEX

# Files a processor or `generate` is made of: when they are in the folder, the manifest has to list them.
_READ_IF_THERE = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """CheckpointError naming the first file that is missing, truncated or altered."""
    folder = Path(folder)
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: listed in {MANIFEST} but missing; {REMEDY}")
        size = path.stat().st_size
        if size != manifest.bytes[name]:
            raise CheckpointError(
                f"{path}: expected {manifest.bytes[name]} bytes, got {size} (truncated or altered); {REMEDY}"
            )
        found = sha256_file(path)
        if found != digest:
            raise CheckpointError(f"{path}: expected sha256 {digest}, got {found}: the contents were altered; {REMEDY}")


@contextmanager
def listed_files(folder: str | Path, manifest: Manifest) -> Iterator[Path]:
    """A temporary folder with copies of all files the manifest lists but the weights: what is not listed cannot be read
    there.

    CheckpointError when config.json is not listed, or a file of a processor or of `generate` lies in the folder
    unlisted; those raised inside the block name the checkpoint's own folder.
    """
    folder = Path(folder)
    if "config.json" not in manifest.files:
        raise CheckpointError(f"{folder / MANIFEST}: files: expected config.json among them; {REMEDY}")
    for name in _READ_IF_THERE:
        if name not in manifest.files and (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: not listed in {MANIFEST}, so it is not used; remove it, or {REMEDY}"
            )
    with tempfile.TemporaryDirectory(prefix="quota-") as copies:
        for name in manifest.files:
            if not name.endswith((".safetensors", INDEX)):
                try:
                    shutil.copyfile(folder / name, Path(copies) / name)
                except OSError as error:
                    raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror}); {REMEDY}") from None
        try:
            yield Path(copies)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(copies, str(folder))) from error.__cause__


def weight_files(folder: str | Path, manifest: Manifest) -> list[Path]:
    """The safetensors files the manifest vouches for, in order."""
    names = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    if not names:
        raise CheckpointError(
            f"{Path(folder) / MANIFEST}: files: expected at least one .safetensors file, got none; {REMEDY}"
        )
    return [Path(folder) / name for name in names]


def tensor_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the headers alone. CheckpointError for a damaged file or a name in two files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with open_tensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name in shapes:
                    raise CheckpointError(f"tensor {name}: found in two files, again in {path}; {REMEDY}")
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def open_tensors(path: Path) -> Any:
    """A safetensors file for lazy reading; CheckpointError when its header or length is wrong."""
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); {REMEDY}") from None


def iterate_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every file, one tensor in memory at a time."""
    for path in files:
        with open_tensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)
