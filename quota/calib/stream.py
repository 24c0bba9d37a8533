"""The calibration stream: the float checkpoint read block by block, and hidden states kept in files between blocks."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quota.calib.blocks import Batch, Block
from quota.calib.state import StreamLayout
from quota.core.errors import CheckpointError
from quota.core.files import naming, read_at, reserve, sha256_file, write_at
from quota.core.folders import resolve_folder
from quota.models import Family, find_family, fingerprint
from quota.models.config import read_config
from quota.models.groups import Part
from quota.models.images import ImageInput, PatchGrid
from quota.prune.attention import text_queries

# Roles of a token in the decoder's stream: QUERY is a text token whose attention ranks the visual ones.
TEXT, VISUAL, QUERY = 0, 1, 2
# Bytes per element of safetensors' types.
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


class FloatSource:
    """A float checkpoint folder (or hub name), opened lazily: one block at a time is in memory.

    Raises CheckpointError naming the file or tensor when the folder is not a float checkpoint of a supported
    architecture.
    """

    def __init__(self, model: str | Path, *, planned: bool = False) -> None:
        """planned: only sizes are asked for, and a folder without weights has those of its configuration."""
        self.folder = resolve_folder(model)
        self.config: Any = read_config(self.folder)
        self._check_kind()
        self.family: Family = find_family(self.config)
        self.stored: dict[str, tuple[tuple[int, ...], int]] = {}  # canonical name -> (shape, bytes)
        self._open: dict[str, Any] = {}
        self.skeleton = self._skeleton()
        if planned and not any(self.folder.glob("*.safetensors*")):
            own = self.skeleton.state_dict()
            self._index, self.stored = {}, {name: (tuple(t.shape), 2 * t.numel()) for name, t in own.items()}
            return
        self._index = self._build_index()
        self._check_complete()

    def _check_kind(self) -> None:
        if getattr(self.config, "quantization_config", None):
            raise CheckpointError(
                f"{self.folder.name}: expected a float checkpoint, got a quantized one; calibrate the original model,"
                " or `quota import` one of int4 weights"
            )

    def _build_index(self) -> dict[str, tuple[str, str]]:
        index_file = self.folder / "model.safetensors.index.json"
        if index_file.is_file():
            try:
                files = sorted(set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values()))
                wrong = [name for name in files if name != Path(name).name]
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(
                    f"{index_file}: expected the index of a sharded checkpoint, got an error: {error!r}; download it"
                    " again"
                ) from error
            if wrong:
                raise CheckpointError(
                    f"{index_file}: weight_map: expected plain file names, got {wrong[0]!r}; download it again"
                )
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{self.folder.name}: expected *.safetensors files, found none; convert the checkpoint with"
                " save_pretrained first"
            )
        index: dict[str, tuple[str, str]] = {}
        for name in files:
            try:
                with safe_open(self.folder / name, "pt") as handle:
                    for key in handle.keys():  # noqa: SIM118 - not a dict
                        canonical, found = self.family.canonical_key(key), handle.get_slice(key)
                        shape = tuple(found.get_shape())
                        index[canonical], self.stored[canonical] = (
                            (name, key),
                            (shape, math.prod(shape) * _WIDTHS.get(found.get_dtype(), 8)),
                        )
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{name}: expected a complete safetensors file, got an error: {error}; download it again"
                ) from error
        return index

    def _skeleton(self) -> nn.Module:
        import transformers

        with torch.device("meta"):
            return getattr(transformers, self.family.model_class)(self.config)

    def _check_complete(self) -> None:
        """CheckpointError naming the tensors that the model has and the files lack, or hold in another shape: before
        hours of work, not at their block."""
        expected = self._expected()
        missing = sorted(set(expected) - set(self._index))
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(
                f"{self.folder}: lacks {', '.join(missing[:3])}{more}; the checkpoint is incomplete, download it again"
            )
        for name, shape in expected.items():
            if self.stored[name][0] != shape:
                raise CheckpointError(
                    f"{self.folder}: tensor {name}: expected shape {list(shape)} by config.json, got"
                    f" {list(self.stored[name][0])}"
                )

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors that the files have to hold."""
        text = self.config.text_config
        tied = getattr(self.config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)
        own = self.skeleton.state_dict()
        return {name: tuple(tensor.shape) for name, tensor in own.items() if not (tied and name == "lm_head.weight")}

    @property
    def fingerprint(self) -> str:
        """`quota.models.model_fingerprint` of this checkpoint."""
        return fingerprint(self.config, self.tensor(f"{self.family.embed_path}.weight"))

    def files(self) -> list[Path]:
        """The files of the folder that a calibration reads, sorted."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and path.is_file()
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the contents of `files`: reads the whole checkpoint once."""
        found = [(path.name, sha256_file(path)) for path in self.files()]
        return "sha256:" + hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def names(self) -> list[str]:
        """Canonical names of all stored tensors, sorted."""
        return sorted(self._index)

    def tensor(self, name: str) -> Tensor:
        """The stored tensor under its canonical name, in the stored dtype. CheckpointError when absent."""
        if name not in self._index:
            raise CheckpointError(
                f"tensor {name}: expected in {self.folder.name}, not found; the checkpoint is incomplete"
            )
        file, key = self._index[name]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, "pt")
        tensor: Tensor = self._open[file].get_tensor(key)
        return tensor

    def module(self, path: str, device: str = "cpu") -> nn.Module:
        """A float32 copy of the submodule at `path` with its stored weights."""
        import copy

        module = copy.deepcopy(self.skeleton.get_submodule(path))
        # converted where it goes: half the bytes of a 16-bit checkpoint on the way to a device
        state = {name: self.tensor(f"{path}.{name}").to(device).float() for name in module.state_dict()}
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: expected the shapes of {self.folder.name}/config.json, got {error}"
            ) from error
        for name, buffer in list(module.named_buffers()):
            if buffer.is_meta:  # not persistent: position ids of the vision embeddings are the only ones
                parent, _, leaf = name.rpartition(".")
                fresh = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape).clone()
                setattr(module.get_submodule(parent), leaf, fresh)
        return module.eval().requires_grad_(False)

    def block(self, kind: Part, path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Block:
        """A calibration `Block` at `path`, still float, on a device; its products are of `dtype`."""
        rotary = self.family.float_rotary().to(device) if kind == "decoder" else None
        block = Block(self.module(path, device), kind, path, self.family, rotary)
        block.dtype = dtype
        return block


class Stream:
    """Hidden states of all calibration items in one file: ragged rows packed as [total, width].

    The file has its space from the start and is read and written by calls, not mapped: a full or failing disk is an
    error, not the end of the process.

    A row is what the next block reads, `width` numbers, and `rest` more that go along: what was tapped from the tower,
    later the planes that are still to be added to the hidden states (`Family.taps`).

    path: data file. lengths: rows of each item. positions int32 [total] (or [total, 3] under M-RoPE), roles int8
    [total], columns int32 [total] (places in the unpruned prompt), drops bool [total]
    (rows the next gather leaves out): decoder stream, zeros elsewhere. grids: per item the image's grid (tower streams
    of dynamic resolution, else empty).
    """

    def __init__(self, path: Path, width: int, lengths: Sequence[int], dtype: str, create: bool, rest: int = 0) -> None:
        self.path, self.width, self.rest, self.dtype, self.lengths = path, width, rest, dtype, [int(n) for n in lengths]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        total = int(self.offsets[-1])
        self._row = (width + rest) * np.dtype(dtype).itemsize
        with naming(path):
            self._file = path.open("w+b" if create else "r+b", buffering=0)
        if create:
            reserve(self._file, path, total * self._row)
        self.positions = np.zeros(total, np.int32)
        self.roles = np.zeros(total, np.int8)
        self.columns = np.zeros(total, np.int32)
        self.drops = np.zeros(total, bool)
        self.grids: list[PatchGrid] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, item: int) -> slice:
        """Row range of one item."""
        return slice(int(self.offsets[item]), int(self.offsets[item + 1]))

    def write(self, item: int, hidden: Tensor, rest: Tensor | None = None) -> None:
        """Store one item's hidden states [length, width] and what goes along [length, rest]."""
        rows = hidden.detach().cpu() if rest is None else torch.cat([hidden.detach().cpu(), rest], -1)
        data = np.ascontiguousarray(rows.numpy(), dtype=self.dtype)
        expected = (self.lengths[item], self.width + self.rest)
        if data.shape != expected:
            raise ValueError(f"item {item}: expected {expected}, got {data.shape}")
        write_at(self._file, self.path, data.reshape(-1).view(np.uint8).data, int(self.offsets[item]) * self._row)

    def read(self, item: int) -> Tensor:
        """One item's hidden states [length, width] float32."""
        return self.read_rows(item)[0]

    def read_rows(self, item: int) -> tuple[Tensor, Tensor]:
        """One item's hidden states [length, width] and what goes along [length, rest], float32."""
        data = np.empty((self.lengths[item], self.width + self.rest), self.dtype)
        read_at(self._file, self.path, data.reshape(-1).view(np.uint8).data, int(self.offsets[item]) * self._row)
        rows = torch.from_numpy(data.astype(np.float32, copy=False))
        return rows[:, : self.width], rows[:, self.width :]

    def flush(self) -> None:
        """Flush; the stream is on disk when this returns."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def batch(self, items: Sequence[int]) -> Batch:
        """The items as one right-padded batch, on the host."""
        longest = max(self.lengths[i] for i in items)
        hidden = torch.zeros(len(items), longest, self.width)
        valid = torch.zeros(len(items), longest, dtype=torch.bool)
        positions = torch.zeros(len(items), longest, *self.positions.shape[1:], dtype=torch.int64)
        visual = torch.zeros_like(valid)
        for row, item in enumerate(items):
            n = self.lengths[item]
            visual[row, :n] = torch.from_numpy(self.roles[self.rows(item)] == VISUAL)
            hidden[row, :n], valid[row, :n] = self.read(item), True
            positions[row, :n] = torch.from_numpy(self.positions[self.rows(item)].astype(np.int64))
        grids = [self.grids[i] for i in items] if self.grids else None
        return Batch(hidden, valid, positions, visual, grids)

    def batches(self, size: int) -> Iterator[list[int]]:
        """Item numbers in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield list(range(start, min(start + size, len(self))))

    def like(
        self, path: Path, width: int | None = None, lengths: Sequence[int] | None = None, rest: int | None = None
    ) -> Stream:
        """A new stream file with this one's layout (positions and roles are copied when the lengths are the same)."""
        more, rows = self.rest if rest is None else rest, self.lengths if lengths is None else lengths
        out = Stream(path, width or self.width, rows, self.dtype, create=True, rest=more)
        if lengths is None:
            out.positions, out.roles, out.columns = self.positions.copy(), self.roles.copy(), self.columns.copy()
            out.drops, out.grids = self.drops.copy(), list(self.grids)
        return out

    def layout(self) -> StreamLayout:
        """Everything but the rows, enough for `reopen`."""
        positions: Any = self.positions.tolist()
        return StreamLayout(
            file=self.path.name,
            width=self.width,
            rest=self.rest,
            dtype=self.dtype,  # type: ignore[arg-type]
            lengths=self.lengths,
            positions=positions,
            roles=self.roles.tolist(),
            columns=self.columns.tolist(),
            drops=self.drops.astype(int).tolist(),
            grids=self.grids,
        )

    @classmethod
    def reopen(cls, folder: Path, layout: StreamLayout) -> Stream:
        """Open the file described by `layout`."""
        out = cls(folder / layout.file, layout.width, layout.lengths, layout.dtype, create=False, rest=layout.rest)
        out.positions = np.asarray(layout.positions, np.int32)
        out.roles = np.asarray(layout.roles, np.int8)
        out.columns = np.asarray(layout.columns, np.int32)
        out.drops = np.asarray(layout.drops, bool)
        out.grids = layout.grids
        return out


@torch.no_grad()
def embed_images(
    source: FloatSource, images: Iterable[ImageInput], grids: Sequence[PatchGrid | None], path: Path, dtype: str
) -> Stream:
    """What the tower's first block reads of each image. grids: the patch grid of every image, None for a family of one
    image size: lengths are known before pixels arrive."""
    family, module = source.family, lru_cache(source.module)
    stream = Stream(path, family.vision_hidden_size, [family.tower_rows(grid) for grid in grids], dtype, create=True)
    stream.grids = [grid for grid in grids if grid is not None]
    for item, image in enumerate(images):
        stream.write(item, family.tower_input(module, image))
    return stream


def embed_text(
    source: FloatSource, ids: Sequence[Tensor], images: Stream, path: Path, grids: Sequence[Sequence[PatchGrid | None]]
) -> Stream:
    """The decoder's input stream: word embeddings with the projected images in their places, and their planes (0 for
    text).

    ids: one int64 tensor [length] per sample; images in order of appearance over all samples; grids: of the images of
    each sample (`ImageInput.grid`). CheckpointError when counts disagree.
    """
    family = source.family
    newline = None if family.newline_path is None else source.tensor(family.newline_path).float()
    table = source.tensor(f"{family.embed_path}.weight")
    rest = family.hidden_size * len(family.taps)
    out = images.like(path, family.hidden_size, [len(sample) for sample in ids], rest)
    if family.axes > 1:
        out.positions = np.zeros((len(out.positions), family.axes), np.int32)
    first = 0
    for item, sample in enumerate(ids):
        hidden, planes = table[sample].float() * family.embed_scale, torch.zeros(len(sample), out.rest)
        index = family.image_index(sample[None], grids[item])
        shown = index.image[0] >= 0
        own = range(first, first + len(grids[item]))
        parts = [images.read_rows(i) for i in own]
        features = [family.arranged(part, grid, newline) for (part, _), grid in zip(parts, grids[item], strict=True)]
        counts, stored = index.image[0][shown].bincount().tolist(), [len(part) for part in features]
        if counts != stored:
            raise CheckpointError(
                f"sample {item}: expected images of {stored} image tokens, got {counts}; the processor does not"
                " fit the model"
            )
        if own:
            hidden[shown] = torch.cat(features)
        if own and out.rest:
            planes[shown] = torch.cat([rest for _, rest in parts])
        out.write(item, hidden, planes)
        rows = out.rows(item)
        positions = family.positions(source.skeleton, sample, [grid for grid in grids[item] if grid is not None]).T
        out.positions[rows] = (positions if family.axes > 1 else positions[:, 0]).numpy()
        out.roles[rows], out.columns[rows] = _roles(index.visual[0], shown), np.arange(len(sample))
        first += len(own)
    return out


def _roles(visual: Tensor, shown: Tensor) -> np.ndarray:
    query = text_queries(shown[None], torch.ones_like(shown)[None])[0] & ~shown
    return torch.where(visual, VISUAL, torch.where(query, QUERY, TEXT)).to(torch.int8).numpy()
