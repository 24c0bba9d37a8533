"""What a model family says about itself, and the defaults of a LLaMA-like decoder.

A family is one file: a subclass of `Family` and a row in `quota.models.FAMILIES`. Structure, rounding, calibration,
export, hooks, engine, prompts and costs ask it. Module paths and sizes are read from configurations by attribute name;
a file imports its model library's modules itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quota.core.errors import CheckpointError, UsageError
from quota.models.groups import PARTS, Group, Groups, Norms, Part
from quota.models.images import ImageIndex, ImageInfo, ImageInput, PatchGrid, image_digest

KeyRules = Sequence[tuple[re.Pattern[str], str]]

_FINGERPRINT_ROWS = 256
_TEXT_DIMS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


class Family(ABC):
    """One model of a family, known by its configuration. Weights are never held: methods that need them are given the
    model or its modules.

    name: transformers' model_type. title: for readers. published: the checkpoint whose published figures stand beside
    ours. model_class: the conditional-generation class; paths are relative to it. groups: every linear of each part is
    in exactly one. norms: modules of a block that stay float and travel with it. attention: where a block's attention
    is. key_rules, hub_rules: names of published checkpoints -> names inside the model, and back; None: no other engine
    reads this kind. axes: numbers that make a rotary position. layers, heads, ...: the decoder's sizes.
    vision_layers_used: tower layers that feed the projector; the others are not quantized and not computed.
    visual_tokens: of one image; None where it follows the image's size. newline_path: the tensor that stands at the
    end of an image's lines, where there is one. prefix: the tokens of a prompt see all of it, only what follows is
    causal. norm_offset: what norms of the decoder add to their weight. first_position: rotary position of a prompt's
    first token. embed_scale: what the word embedding multiplies its rows by. merge x merge patches make a token. dims:
    vision sizes in the fingerprint. taps: tower blocks whose outputs have projectors of their own; what these give,
    the planes, is added to the visual tokens after the first decoder layers, one plane a layer.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    published: ClassVar[str]
    model_class: ClassVar[str]
    description: ClassVar[str]
    groups: ClassVar[Groups]
    norms: ClassVar[Norms]
    attention: ClassVar[Mapping[Part, str]] = {"decoder": "self_attn", "vision": "self_attn"}
    key_rules: ClassVar[KeyRules]
    hub_rules: ClassVar[KeyRules | None] = None
    axes: ClassVar[int] = 1
    fixed_rope: ClassVar[tuple[str, ...]] = (
        "default",
        "linear",
        "llama3",
        "yarn",
        "proportional",
    )  # angles depend on the position alone
    max_new_tokens: ClassVar[int] = 1024  # of lmms-eval's built-in wrapper, where a task sets none

    newline_path: ClassVar[str | None] = None
    processor_class: ClassVar[Any] = None  # upstream's without what it needs for videos; None: upstream's as it is

    vision_path: ClassVar[str]
    vision_embed_path: ClassVar[str]
    encoder_path: ClassVar[str]
    projector_path: ClassVar[str]
    model_path: ClassVar[str] = "model"
    text_path: ClassVar[str] = "model.language_model"
    decoder_path: ClassVar[str] = "model.language_model.layers"
    embed_path: ClassVar[str] = "model.language_model.embed_tokens"
    norm_path: ClassVar[str] = "model.language_model.norm"
    lm_head_path: ClassVar[str] = "lm_head"

    prefix: ClassVar[bool] = False
    norm_offset: ClassVar[float] = 0.0
    first_position: ClassVar[int] = 0
    embed_scale: float = 1.0

    image_token_id: int
    visual_tokens: int | None
    merge: int = 1
    taps: tuple[int, ...] = ()
    vision_hidden_size: int
    vision_heads: int
    vision_layers_used: int
    vision_layers_total: int
    dims: dict[str, Any]

    @classmethod
    def kind_of(cls, config: Any) -> type[Family]:
        """The class for a configuration of this family, where parts of it come in several kinds."""
        return cls

    def __init__(self, config: Any) -> None:
        """CheckpointError for a configuration this family was not made for."""
        self.config, self.text, self.vision = config, config.text_config, config.vision_config
        text = self.text
        self.layers, self.hidden_size, self.intermediate_size = (
            text.num_hidden_layers,
            text.hidden_size,
            text.intermediate_size,
        )
        self.head_norms = head_norms(text)
        self.heads, self.kv_heads, self.head_dim = text.num_attention_heads, text.num_key_value_heads, head_dim(text)
        if getattr(text, "use_sliding_window", False):
            raise CheckpointError(
                "use_sliding_window: expected false, got true; sliding-window attention is not supported"
            )
        window = getattr(text, "sliding_window", None)  # of families without the switch it alone says so
        if window is not None and not hasattr(text, "use_sliding_window"):
            raise CheckpointError(
                f"sliding_window: expected null, got {window}; sliding-window attention is not supported"
            )

    # where things are

    def decoder_layer(self, index: int) -> str:
        """Path of decoder layer `index` (0-based)."""
        return f"{self.decoder_path}.{index}"

    def vision_layer(self, index: int) -> str:
        """Path of vision encoder layer `index` (0-based)."""
        return f"{self.encoder_path}.{index}"

    @property
    def projector_paths(self) -> list[str]:
        """The projector's, then those of the taps in order."""
        return [self.projector_path]

    def blocks(self, part: Part) -> list[str]:
        """Paths of the blocks of a part that are quantized, in the order they run."""
        if part == "projector":
            return self.projector_paths
        count, path = (
            (self.layers, self.decoder_layer) if part == "decoder" else (self.vision_layers_used, self.vision_layer)
        )
        return [path(index) for index in range(count)]

    def group_paths(self, modules: Collection[str]) -> Iterator[tuple[str, Group]]:
        """(path of the block, group) of every projection group of the chosen modules, in model order."""
        for part in (PARTS[name] for name in ("llm", "vision", "projector") if name in modules):
            for path in self.blocks(part):
                yield from ((path, group) for group in self.groups[part])

    def canonical_key(self, key: str) -> str:
        """Checkpoint tensor name -> name inside the model (`model.language_model...`, the tower's path,
        `lm_head...`)."""
        for pattern, replacement in self.key_rules:
            renamed, hits = pattern.subn(replacement, key)
            if hits:
                return renamed
        return key

    def config_of(self, part: Part) -> Any:
        """The configuration a block of `part` is built from."""
        return self.text if part == "decoder" else self.vision

    # quantized modules

    def float_norms(self, part: Part) -> frozenset[str]:
        """Modules of a block that stay float: `norms`, and those of a decoder's query and key heads."""
        return self.norms[part] | (self.head_norms if part == "decoder" else frozenset())

    def value_heads(self, part: Part) -> int:
        """Heads whose outputs the output projection of a block reads."""
        return self.heads if part == "decoder" else self.vision_heads

    @abstractmethod
    def tower_modules(self, linears: Mapping[str, Any], block: Any) -> dict[str, nn.Module]:
        """Group name -> quantized linear of one tower block, and the block as it is; returns what takes the place of
        the block's modules, by name."""

    @abstractmethod
    def projector_modules(self, linears: Mapping[str, Any]) -> dict[str, nn.Module]:
        """As `tower_modules`, for the projector; "" is the projector itself."""

    @abstractmethod
    def finish_tower(self, tower: Any) -> None:
        """What else a quantized tower needs so that an image's features do not depend on the batch: patch embedding,
        unused layers, order of work."""

    def finish_projector(self, projector: Any) -> None:
        """As `finish_tower`, of each projector; here nothing."""
        return

    @abstractmethod
    def rotary(self, device: Any) -> nn.Module:
        """The quantized decoder's rotary embedding: cosines and sines that do not depend on what else is in a call."""

    @abstractmethod
    def float_rotary(self) -> nn.Module:
        """The float decoder's rotary embedding."""

    def fill_derived(self, model: Any) -> None:
        """Compute the buffers that no checkpoint holds, where the meta device left nothing."""
        text: Any = submodule(model, self.text_path)
        upstream = self.float_rotary()
        text.rotary_emb = upstream if isinstance(text.rotary_emb, type(upstream)) else self.rotary("cpu")

    # images and positions

    @classmethod
    def open_processor(cls, folder: str | Path, **options: Any) -> Any:
        """The processor of a checkpoint; raises what transformers raises."""
        from transformers import AutoProcessor

        return (cls.processor_class or AutoProcessor).from_pretrained(str(folder), **options)

    def images(self, inputs: Mapping[str, Any]) -> tuple[ImageInput, ...]:
        """The images in what the processor returned, in order of appearance."""
        if "pixel_values" not in inputs:
            return ()
        return tuple(self.split_pixels(inputs["pixel_values"], inputs.get("image_grid_thw")))

    def split_pixels(self, pixels: Tensor, grids: Tensor | None) -> list[ImageInput]:
        """pixel_values [N, ...], an image each; or, with grids int64 [N, 3] (frames, rows and columns of patches),
        [patches of all images, patch]."""
        if grids is None:
            return [ImageInput(one) for one in pixels]
        return [
            ImageInput(part, (t, h, w))
            for part, (t, h, w) in zip(pixels.split(grids.prod(-1).tolist()), grids.tolist(), strict=True)
        ]

    def shown(self, image: ImageInput) -> list[ImageInfo]:
        """What selections by content or position read of an image, for each of its rasters."""
        if image.grid is None:
            return [ImageInfo(image_digest(image.pixels))]
        frames, rows, columns = image.grid
        return [ImageInfo(image_digest(image.pixels), (frames * rows // self.merge, columns // self.merge))]

    def pictures(self, image: Any, given: ImageInput) -> list[Any]:
        """The part of a Pillow image that each of its rasters shows, for drawing. given: what the processor made of
        it."""
        return [image for _ in self.shown(given)]

    @abstractmethod
    def image_tokens(self, image: ImageInput) -> int:
        """Tokens of one image, its visual ones and what ends its lines; UsageError for what is none of this model's."""

    @abstractmethod
    def encode(self, model: Any, images: Sequence[ImageInput]) -> list[Tensor]:
        """[image tokens, (1 + planes) * hidden] of each image in the model's dtype, what takes the place of its tokens
        and its planes side by side; an image's features do not depend on the others."""

    def arranged(self, features: Tensor, grid: PatchGrid | None, newline: Tensor | None) -> Tensor:
        """What the projector gave of one image [visual tokens, hidden], or of its tiles one below the other -> [image
        tokens, hidden], as it stands in the prompt. newline: [hidden], of `newline_path`."""
        return features

    def take_planes(self, arguments: dict[str, Any]) -> Tensor | None:
        """Take what a forward of the text model was given to add after its first layers out of its arguments: planes
        side by side, [B, T, planes * hidden], 0 where a token is not visual; None where there is nothing."""
        return None

    @abstractmethod
    def image_index(self, ids: Tensor, grids: Sequence[PatchGrid | None] = ()) -> ImageIndex:
        """Where the images stand in ids [B, S]. grids: of the images in order over all rows; of one copy where rows are
        repeated (beams)."""

    def visual(self, inputs: Mapping[str, Any]) -> Tensor:
        """bool [B, S]: the visual tokens of what the processor returned."""
        return self.image_index(inputs["input_ids"], [image.grid for image in self.images(inputs)]).visual

    def positions(self, model: Any, ids: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """ids int64 [S] of a prompt and the patch grids of its images -> int64 [axes, S]. model: any instance, with or
        without weights."""
        return torch.arange(self.first_position, self.first_position + len(ids))[None]

    def rotary_axes(self, rotary: Any) -> list[tuple[int, int, int]]:
        """(first, end, axis) of the rotary channels that turn with each axis of a position. rotary: what `rotary`
        returned."""
        return [(0, self.head_dim, 0)]

    # the tower block by block, for calibration

    @abstractmethod
    def tower_rows(self, grid: PatchGrid | None) -> int:
        """Rows of one image inside the tower."""

    @abstractmethod
    def tower_input(self, module: Callable[[str], Any], image: ImageInput) -> Tensor:
        """One image -> [rows, vision hidden], the first block's input. module: path -> float module with its
        weights."""

    @abstractmethod
    def tower_block(
        self, layer: nn.Module, index: int, hidden: Tensor, valid: Tensor, grids: Sequence[PatchGrid] | None
    ) -> Tensor:
        """Block `index` over right-padded images: hidden [B, S, C], valid bool [B, S] -> [B, S, C]."""

    def leave_tower(self, module: Callable[[str], Any], hidden: Tensor) -> Tensor:
        """What the tower makes of [rows, vision hidden] of one image out of its last block that is used; here nothing.
        module: as of `tower_input`."""
        return hidden

    @abstractmethod
    def projector_rows(self, hidden: Tensor, grid: PatchGrid | None) -> Tensor:
        """[rows, vision hidden] out of the tower -> [visual tokens, width] as the projector reads them, in raster
        order (of tiles one after the other)."""

    def projector_block(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The float projector over [B, S, width] of `projector_rows` -> [B, S, hidden]."""
        return layer(hidden)

    # evaluation and costs

    def evaluation_pixels(self, processor: Any, limits: tuple[int | None, int | None]) -> Callable[[Any], Any] | None:
        """Set the processor to the (fewest, most) pixels of lmms-eval's built-in wrapper, or to `limits`; returns how
        that wrapper resizes an image first."""
        if limits != (None, None):
            raise UsageError(f"min_pixels, max_pixels: expected none for {self.name}, which has no such limits")
        return None

    @abstractmethod
    def vision_macs(self, visual_tokens: int) -> int:
        """Multiply-accumulates of tower and projector for one image that becomes `visual_tokens` tokens."""

    @abstractmethod
    def pixel_shape(self, visual_tokens: int) -> tuple[tuple[int, ...], PatchGrid | None]:
        """Shape of the processor's pixels for a square image of so many tokens, and its patch grid; for synthetic
        requests."""

    def fingerprint(self, embed: Tensor) -> str:
        """Identity of a model: `sha256:<hex>` over its sizes and the sign bits of the first 256 rows of the word
        embedding.

        embed: [vocabulary, hidden], any float dtype. Signs survive every dtype change and embeddings are never
        quantized, so a float model and its quantized checkpoint have the same fingerprint while another model of the
        same sizes has not.
        """
        sizes = [self.head_dim if name == "head_dim" else getattr(self.text, name) for name in _TEXT_DIMS]
        dims = {"architecture": self.name, "image_token_id": self.image_token_id, "text": sizes, **self.dims}
        digest = hashlib.sha256(json.dumps(dims, sort_keys=True, separators=(",", ":")).encode())
        digest.update(torch.signbit(embed[:_FINGERPRINT_ROWS].detach().cpu()).contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"


def head_norms(text: Any) -> frozenset[str]:
    """The norms of query and key heads in a decoder layer: those of Qwen3. CheckpointError where a bias is added before
    them."""
    if not text.model_type.startswith("qwen3"):
        return frozenset()
    if text.attention_bias:
        raise CheckpointError(
            "text_config.attention_bias: expected false, got true; a bias before the norm of a key is not supported"
        )
    return frozenset({"self_attn.q_norm", "self_attn.k_norm"})


def head_dim(text: Any) -> int:
    """Head dimension of a language model's configuration."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`; CheckpointError naming the path when it is absent."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise CheckpointError(
            f"module {path}: expected in the model, not found in {type(model).__name__}; use a"
            " ...ForConditionalGeneration model"
        ) from None


def submodule_weight(model: nn.Module, path: str) -> Tensor:
    """The weight of the module at `path`."""
    found: Any = submodule(model, path)
    return found.weight


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` at `path` in place of the module there."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
