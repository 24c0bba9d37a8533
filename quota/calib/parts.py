"""Finished blocks of other checkpoints: a checkpoint put together from them, since which parts are quantized is a
choice made after calibration, and a calibration that begins with those it would make again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quota.calib.export import float_names, processor_of
from quota.calib.job import Job, settings_of
from quota.calib.state import BlockReport
from quota.calib.stream import FloatSource
from quota.calib.work import WorkFolder, difference
from quota.core.checkpoint import CheckpointWriter, Manifest
from quota.core.checkpoint_files import iterate_tensors, verify_files, weight_files
from quota.core.errors import CheckpointError
from quota.models.groups import PARTS


def block_paths(source: FloatSource, module: str) -> list[str]:
    """Module paths of the blocks that "vision", "projector" or "llm" quantizes, in order."""
    return source.family.blocks(PARTS[module])


def assemble(source: FloatSource, folders: Mapping[str, Path], out: Path) -> None:
    """Write checkpoint `out`, atomically: blocks of module m from the quantized folder folders[m], everything else from
    the float model. `out` is a path of the cache: an older checkpoint there is replaced.

    CheckpointError when a folder is of another float model, does not hold its module or is damaged.
    """
    manifests = {module: Manifest.load(folder) for module, folder in folders.items()}
    for folder in dict.fromkeys(folders.values()):
        verify_files(folder, Manifest.load(folder))
    for module, manifest in manifests.items():
        if manifest.source_fingerprint != source.fingerprint or module not in manifest.modules:
            raise CheckpointError(
                f"{folders[module]}: expected quantized {module} blocks of {source.fingerprint}, got {manifest.modules}"
                f" of {manifest.source_fingerprint}; calibrate the parts from one float model"
            )
    last = list(manifests.values())[-1]
    paths = {module: block_paths(source, module) for module in folders}
    reports = [r for module, m in manifests.items() for r in m.calibration["report"] if r["name"] in paths[module]]
    manifest = Manifest(last.scheme, tuple(folders), source.fingerprint, {**last.calibration, "report": reports})
    with CheckpointWriter(out, manifest, overwrite=True) as writer:
        writer.add_config(source.config)
        writer.add_processor(processor_of(source.folder))
        generation = source.folder / "generation_config.json"
        if generation.is_file():
            writer.add_file(generation)
        for name in float_names(source, [path for chosen in paths.values() for path in chosen]):
            writer.add({name: source.tensor(name)})
        for module, folder in folders.items():
            stored = dict(iterate_tensors(weight_files(folder, manifests[module])))
            for path in paths[module]:
                writer.add({name: tensor for name, tensor in sorted(stored.items()) if name.startswith(f"{path}.")})


def take_unpruned(job: Job, work: WorkFolder, folder: Path) -> None:
    """Put into `work` the blocks that `job`'s recipe leaves as they are in `folder`: those before its first candidate.

    Blocks learn from float hidden states, which no drop has touched there. CheckpointError where `folder` was not made
    by the same calibration without a recipe; one of other modules may hold fewer blocks.
    """
    manifest = Manifest.load(folder)
    wanted = job.settings_of_result() | {"recipe": None, "modules": list(manifest.modules)}
    other = difference(settings_of(manifest), wanted)
    if other is not None or manifest.calibration.get("source_files") != job.source.digest:
        raise CheckpointError(
            f"{folder}: expected the same calibration without a recipe, got another ({other or 'of other model files'})"
        )
    verify_files(folder, manifest)
    first = min(job.candidates, default=job.source.family.layers)
    pruned = {job.source.family.decoder_layer(index) for index in range(first, job.source.family.layers)}
    stored = dict(iterate_tensors(weight_files(folder, manifest)))
    for report in manifest.calibration["report"]:
        path = report["name"]
        if path not in pruned and path not in work.blocks:
            tensors = {name: tensor for name, tensor in stored.items() if name.startswith(f"{path}.")}
            work.save_block(path, tensors, BlockReport(**report))
