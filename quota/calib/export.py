"""Assembling the quantized checkpoint folder from finished blocks, the untouched float tensors, the configuration and
the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quota.calib.stream import FloatSource
from quota.calib.work import WorkFolder
from quota.core.checkpoint import CheckpointWriter, Manifest
from quota.core.errors import CheckpointError


def processor_of(folder: Path) -> Any:
    """The checkpoint's processor (PIL images, so that results do not depend on whether torchvision is installed)."""
    from quota.models.processing import open_processor

    try:
        return open_processor(folder)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers and transformers raise many kinds
        raise CheckpointError(
            f"{folder.name}: expected processor and tokenizer files beside the weights, got: {error}"
        ) from error


def write_checkpoint(
    source: FloatSource, quantized: list[str], work: WorkFolder, out: Path, manifest: Manifest, *, overwrite: bool
) -> None:
    """Write the folder `out` atomically, one block in memory at a time.

    quantized: paths of the calibrated blocks, stored in `work`; every other tensor of the float model is copied in its
    stored dtype. Equal inputs give equal bytes.
    """
    with CheckpointWriter(out, manifest, overwrite=overwrite) as writer:
        writer.add_config(source.config)
        writer.add_processor(processor_of(source.folder))
        generation = source.folder / "generation_config.json"
        if generation.is_file():
            writer.add_file(generation)
        for name in float_names(source, quantized):
            writer.add({name: source.tensor(name)})
        for path in quantized:
            writer.add(work.load_block(path))


def float_names(source: FloatSource, quantized: list[str]) -> list[str]:
    """Tensors that stay as they are: those of the model outside the quantized blocks, sorted. Stored extras the model
    does not know are left out."""
    known, prefixes = set(source.skeleton.state_dict()), tuple(f"{path}." for path in quantized)
    return [name for name in source.names() if name in known and not name.startswith(prefixes)]
