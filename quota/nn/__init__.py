"""Quantized modules, the 4-bit cache, the pruner and the checkpoint format."""

from quota.nn.attention import QuantAttention, QuantClipAttention, Record
from quota.nn.cache import Kv4Cache, Kv4Layer
from quota.nn.checkpoint import CheckpointWriter, Manifest, save_checkpoint
from quota.nn.linear import QuantLinear
from quota.nn.mlp import QuantClipMLP, QuantMLP, QuantProjector
from quota.nn.pruner import Pruner
from quota.nn.rtn import quantize_rtn
from quota.nn.structure import quantize_structure, quantized_linears, quantized_modules
from quota.nn.weight_linear import WeightLinear
from quota.nn.weight_only import weight_only_structure

__all__ = [
    "CheckpointWriter", "Kv4Cache", "Kv4Layer", "Manifest", "Pruner", "QuantAttention", "QuantClipAttention", "QuantClipMLP", "QuantLinear",
    "QuantMLP", "QuantProjector", "Record", "WeightLinear", "quantize_rtn", "quantize_structure", "quantized_linears", "quantized_modules",
    "save_checkpoint", "weight_only_structure",
]  # fmt: skip
