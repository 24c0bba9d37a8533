"""Which linears of a block are quantized together, and what of a block stays float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["vision", "projector", "decoder"]
PARTS: dict[str, Part] = {"vision": "vision", "projector": "projector", "llm": "decoder"}
Groups = Mapping[Part, tuple["Group", ...]]
Norms = Mapping[Part, frozenset[str]]


@dataclass(frozen=True)
class Group:
    """Linears that read the same input and are quantized together. Names are relative to the block.

    name: of the quantized linear in modules and checkpoints. parts: the float linears, in row order. absorbs: the norm
    that takes the per-channel diagonal of the input; "up" for the rows of up in the group `gate_up_proj` beside it,
    which produces it; None where nothing can. value: "rows" produces the attention's values in its last rows, "columns"
    reads what attention gave. fused: one linear holds q, k and v.
    """

    name: str
    parts: tuple[str, ...]
    absorbs: str | None = None
    value: Literal["rows", "columns"] | None = None
    fused: bool = False


DECODER_GROUPS = (
    Group(
        "self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "rows"
    ),
    Group("self_attn.o_proj", ("self_attn.o_proj",), None, "columns"),
    Group("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Group("mlp.down_proj", ("mlp.down_proj",), "up"),
)
