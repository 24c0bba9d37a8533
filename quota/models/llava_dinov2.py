"""LLaVA with a DINOv2 tower: blocks with LayerScale, a class token that the projector does not see, no norm before the
first block.

LayerScale stays a module of its own beside the quantized linears, as the norms do: it scales the rows of the projection
before it, which change nothing in int4 with a scale per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

from quota.core.errors import CheckpointError
from quota.models.groups import Group, Groups, Norms, Part
from quota.models.llava import Llava, QuantClipAttention
from quota.nn.embedding import PatchEmbedding
from quota.nn.linear import SchemeLinear
from quota.nn.mlp import QuantFeedForward

# Names in files -> names of modules: transformers writes the projections as DINOv2's first checkpoints had them.
_STORED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}


class LlavaDinov2(Llava):
    """See the module."""

    title, published = "LLaVA with DINOv2", "none"
    description = "llava: DINOv2 vision tower + two-layer projector + LLaMA or Qwen2 decoder"
    tower, hub_rules = "dinov2", None
    attention: ClassVar[Mapping[Part, str]] = {**Llava.attention, "vision": "attention"}
    groups: ClassVar[Groups] = {
        **Llava.groups,
        "vision": (
            Group("attention.qkv_proj", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "norm1", "rows"),
            Group("attention.out_proj", ("attention.o_proj",), None, "columns"),
            Group("mlp.fc1", ("mlp.fc1",), "norm2"),
            Group("mlp.fc2", ("mlp.fc2",)),
        ),
    }
    norms: ClassVar[Norms] = {**Llava.norms, "vision": frozenset({"norm1", "norm2", "layer_scale1", "layer_scale2"})}
    encoder_path = "model.vision_tower.encoder.layer"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.vision.use_swiglu_ffn:
            raise CheckpointError(
                "vision_config.use_swiglu_ffn: expected false, got true; towers with gated MLPs are not supported"
            )
        self.dims["tower"] = self.tower

    def canonical_key(self, key: str) -> str:
        name = super().canonical_key(key)
        for stored, module in _STORED.items():
            name = name.replace(stored, module)
        return name

    @property
    def vision_mlp_size(self) -> int:
        return int(self.vision.hidden_size * self.vision.mlp_ratio)

    def tower_modules(self, linears: Mapping[str, SchemeLinear], block: Any) -> dict[str, nn.Module]:
        qkv, out = linears["attention.qkv_proj"], linears["attention.out_proj"]
        return {
            "attention": QuantClipAttention(qkv, out, heads=self.vision_heads),
            "mlp": QuantFeedForward(linears["mlp.fc1"], linears["mlp.fc2"], act=self.vision.hidden_act),
        }

    def finish_tower(self, tower: Any) -> None:
        for layer in tower.encoder.layer[self.vision_layers_used :]:
            layer.__class__ = UnusedDinov2Layer
        patches = tower.embeddings.patch_embeddings
        patches.projection = PatchEmbedding.replacing(patches.projection)

    def enter_tower(self, module: Callable[[str], Any], embedded: Tensor) -> Tensor:
        return embedded


class UnusedDinov2Layer(Dinov2Layer):
    """A layer above the one LLaVA takes its features from: same fields and state, not computed."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states, as they came."""
        return hidden_states
