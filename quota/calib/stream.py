"""The calibration stream: the float checkpoint read block by block, and hidden states kept in files between blocks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quota.arch import ArchSpec, canonical_key, find_arch, fingerprint
from quota.calib.blocks import Batch, Block
from quota.core.errors import CheckpointError
from quota.nn.scores import text_queries

# Roles of a token in the decoder's stream: QUERY is a text token whose attention ranks the visual ones.
TEXT, VISUAL, QUERY = 0, 1, 2


class FloatSource:
    """A float LLaVA checkpoint folder (or hub name), opened lazily: one block at a time is in memory.

    Raises CheckpointError naming the file or tensor when the folder is not a float LLaVA checkpoint.
    """

    def __init__(self, model: str | Path) -> None:
        from transformers import AutoConfig

        self.folder = resolve_folder(model)
        try:
            self.config: Any = AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.folder.name}/config.json: expected a Hugging Face configuration, got an error: {error}") from error
        if getattr(self.config, "quantization_config", None):
            raise CheckpointError(f"{self.folder.name}: expected a float checkpoint, got a quantized one; calibrate the original model")
        self.arch: ArchSpec = find_arch(self.config)
        self._index = self._build_index()
        self._open: dict[str, Any] = {}
        self.skeleton = self._skeleton()

    def _build_index(self) -> dict[str, tuple[str, str]]:
        index_file = self.folder / "model.safetensors.index.json"
        if index_file.is_file():
            files = sorted(set(json.loads(index_file.read_text())["weight_map"].values()))
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.folder.name}: expected *.safetensors files, found none; convert the checkpoint with save_pretrained first")
        index: dict[str, tuple[str, str]] = {}
        for name in files:
            try:
                with safe_open(self.folder / name, "pt") as handle:
                    index.update({canonical_key(key): (name, key) for key in handle.keys()})  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{name}: expected a complete safetensors file, got an error: {error}; download it again") from error
        return index

    def _skeleton(self) -> nn.Module:
        from transformers import LlavaForConditionalGeneration

        with torch.device("meta"):
            return LlavaForConditionalGeneration(self.config)

    @property
    def fingerprint(self) -> str:
        """`quota.arch.model_fingerprint` of this checkpoint."""
        return fingerprint(self.config, self.tensor(f"{self.arch.embed_path}.weight"))

    def names(self) -> list[str]:
        """Canonical names of all stored tensors, sorted."""
        return sorted(self._index)

    def tensor(self, name: str) -> Tensor:
        """The stored tensor under its canonical name, in the stored dtype. CheckpointError when absent."""
        if name not in self._index:
            raise CheckpointError(f"tensor {name}: expected in {self.folder.name}, not found; the checkpoint is incomplete")
        file, key = self._index[name]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, "pt")
        tensor: Tensor = self._open[file].get_tensor(key)
        return tensor

    def module(self, path: str, device: str = "cpu") -> nn.Module:
        """A float32 copy of the submodule at `path` with its stored weights."""
        import copy

        module = copy.deepcopy(self.skeleton.get_submodule(path))
        state = {name: self.tensor(f"{path}.{name}").to(device, torch.float32) for name in module.state_dict()}
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: expected the shapes of {self.folder.name}/config.json, got {error}") from error
        for name, buffer in list(module.named_buffers()):
            if buffer.is_meta:  # not persistent: position ids of the vision embeddings are the only ones
                parent, _, leaf = name.rpartition(".")
                fresh = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape).clone()
                setattr(module.get_submodule(parent), leaf, fresh)
        return module.eval().requires_grad_(False)

    def block(self, kind: str, path: str, device: str = "cpu") -> Block:
        """A calibration `Block` at `path`, still float."""
        text = self.config.text_config
        rotary = None
        if kind == "decoder":
            from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

            rotary = LlamaRotaryEmbedding(text).to(device)
        config = self.config.vision_config if kind == "vision" else text
        return Block(self.module(path, device), kind, path, config, rotary)


def resolve_folder(model: str | Path) -> Path:
    """A local checkpoint folder, downloading a hub name if it is not one. CheckpointError when neither."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise CheckpointError(f"model {str(model)!r}: expected a checkpoint folder or a hub name 'owner/name', found neither")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise CheckpointError(f"model {str(model)!r}: expected a checkpoint folder or a reachable hub name, got: {error}") from error


class Stream:
    """Hidden states of all calibration items in one file: ragged rows packed as [total, width].

    path: data file. lengths: rows of each item. positions, roles, columns: int32 / int8 / int32 [total] (decoder stream; zeros elsewhere); columns are
    places in the unpruned prompt. images: per item the number of pictures and of visual tokens before any drop (decoder stream).
    """

    def __init__(self, path: Path, width: int, lengths: Sequence[int], dtype: str, create: bool) -> None:
        self.path, self.width, self.dtype, self.lengths = path, width, dtype, [int(n) for n in lengths]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        total = int(self.offsets[-1])
        self.data = np.memmap(path, dtype=dtype, mode="w+" if create else "r+", shape=(max(total, 1), width))
        self.positions = np.zeros(total, np.int32)
        self.roles = np.zeros(total, np.int8)
        self.columns = np.zeros(total, np.int32)
        self.images: list[tuple[int, int]] = [(0, 0)] * len(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, item: int) -> slice:
        """Row range of one item."""
        return slice(int(self.offsets[item]), int(self.offsets[item + 1]))

    def write(self, item: int, hidden: Tensor) -> None:
        """Store one item's hidden states [length, width]."""
        self.data[self.rows(item)] = hidden.detach().cpu().numpy()

    def read(self, item: int) -> Tensor:
        """One item's hidden states [length, width] float32."""
        return torch.from_numpy(np.asarray(self.data[self.rows(item)], dtype=np.float32))

    def batch(self, items: Sequence[int], device: str = "cpu") -> Batch:
        """The items as one right-padded batch."""
        longest = max(self.lengths[i] for i in items)
        hidden = torch.zeros(len(items), longest, self.width)
        valid = torch.zeros(len(items), longest, dtype=torch.bool)
        positions = torch.zeros(len(items), longest, dtype=torch.int64)
        visual = torch.zeros_like(valid)
        for row, item in enumerate(items):
            n = self.lengths[item]
            visual[row, :n] = torch.from_numpy(self.roles[self.rows(item)] == VISUAL)
            hidden[row, :n], valid[row, :n] = self.read(item), True
            positions[row, :n] = torch.from_numpy(self.positions[self.rows(item)].astype(np.int64))
        return Batch(hidden.to(device), valid.to(device), positions.to(device), visual.to(device))

    def batches(self, size: int) -> Iterator[list[int]]:
        """Item numbers in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield list(range(start, min(start + size, len(self))))

    def like(self, path: Path, width: int | None = None, lengths: Sequence[int] | None = None) -> Stream:
        """A new stream file with this one's layout (positions and roles are copied when the lengths are the same)."""
        out = Stream(path, width or self.width, self.lengths if lengths is None else lengths, self.dtype, create=True)
        if lengths is None:
            out.positions, out.roles, out.columns = self.positions.copy(), self.roles.copy(), self.columns.copy()
            out.images = list(self.images)
        return out

    def layout(self) -> dict[str, Any]:
        """JSON-able description, enough for `reopen`."""
        return {
            "file": self.path.name, "width": self.width, "dtype": self.dtype, "lengths": self.lengths,
            "positions": self.positions.tolist(), "roles": self.roles.tolist(),
            "columns": self.columns.tolist(), "images": [list(pair) for pair in self.images],
        }  # fmt: skip

    @classmethod
    def reopen(cls, folder: Path, layout: dict[str, Any]) -> Stream:
        """Open the file described by `layout`."""
        out = cls(folder / layout["file"], layout["width"], layout["lengths"], layout["dtype"], create=False)
        out.positions = np.asarray(layout["positions"], np.int32)
        out.roles = np.asarray(layout["roles"], np.int8)
        out.columns = np.asarray(layout["columns"], np.int32)
        out.images = [(int(a), int(b)) for a, b in layout["images"]]
        return out


@torch.no_grad()
def advance(block: Block, source: Stream, target: Stream, batch: int, device: str) -> None:
    """Run `block` in its current mode over all items of `source` and write the outputs."""
    for items in source.batches(batch):
        out = block(source.batch(items, device))
        for row, item in enumerate(items):
            target.write(item, out[row, : source.lengths[item]])


@torch.no_grad()
def embed_images(source: FloatSource, pixels: Iterable[Tensor], count: int, path: Path, dtype: str) -> Stream:
    """Patch embeddings and the first norm of each picture. pixels: `count` tensors [1, 3, H, W]; CheckpointError for another H or W than the model's."""
    arch, size = source.arch, source.config.vision_config.image_size
    embeddings, norm = source.module(arch.vision_embed_path), source.module(arch.vision_norm_path)
    length = arch.visual_tokens + int(arch.drops_cls)
    stream = Stream(path, arch.vision_hidden_size, [length] * count, dtype, create=True)
    for item, picture in enumerate(pixels):
        if tuple(picture.shape[-2:]) != (size, size):
            raise CheckpointError(f"pixel_values: expected {size} x {size} pixels, got {list(picture.shape[-2:])}; the processor does not fit the model")
        stream.write(item, norm(embeddings(picture.float()))[0])
    return stream


def select_features(stream: Stream, arch: ArchSpec, path: Path) -> Stream:
    """What the projector reads: the vision stream without the class token where the architecture drops it."""
    first = int(arch.drops_cls)
    out = stream.like(path, lengths=[n - first for n in stream.lengths])
    for item in range(len(stream)):
        out.write(item, stream.read(item)[first:])
    return out


def embed_text(source: FloatSource, ids: Sequence[Tensor], images: Stream, path: Path) -> Stream:
    """The decoder's input stream: word embeddings with the projected pictures in their places.

    ids: one int64 tensor [length] per sample, pictures in order of appearance over all samples. CheckpointError when counts disagree.
    """
    arch = source.arch
    table = source.tensor(f"{arch.embed_path}.weight")
    out = images.like(path, width=arch.hidden_size, lengths=[len(sample) for sample in ids])
    picture = 0
    for item, sample in enumerate(ids):
        hidden = table[sample].float()
        visual = sample == arch.image_token_id
        count, rest = divmod(int(visual.sum()), arch.visual_tokens)
        if rest or picture + count > len(images):
            expected = f"a multiple of {arch.visual_tokens} image tokens"
            raise CheckpointError(f"sample {item}: expected {expected}, got {int(visual.sum())}; the processor does not fit the model")
        if count:
            hidden[visual] = torch.cat([images.read(picture + i) for i in range(count)])
            picture += count
        out.write(item, hidden)
        rows = out.rows(item)
        out.positions[rows] = out.columns[rows] = np.arange(len(sample))
        out.roles[rows] = _roles(visual)
        out.images[item] = (count, count * arch.visual_tokens)
    return out


def _roles(visual: Tensor) -> np.ndarray:
    query = text_queries(visual[None], torch.ones_like(visual)[None])[0] & ~visual
    return torch.where(visual, VISUAL, torch.where(query, QUERY, TEXT)).to(torch.int8).numpy()
