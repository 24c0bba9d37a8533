"""The ops. Each module holds the contract (docstring), the reference that defines it, and the table of
implementations."""

from quota.ops.float_linear import float_linear
from quota.ops.kv4_append import kv4_append
from quota.ops.kv4_attention import kv4_attention
from quota.ops.kv4_page_read import kv4_page_read
from quota.ops.kv4_page_write import kv4_page_write
from quota.ops.kv4_paged_attention import kv4_paged_attention
from quota.ops.kv16_attention import kv16_attention
from quota.ops.kv16_paged_attention import kv16_paged_attention
from quota.ops.qkv_append import qkv_append
from quota.ops.quantize_act import quantize_act
from quota.ops.rms_norm import rms_norm
from quota.ops.token_gather import token_gather
from quota.ops.token_score import token_score
from quota.ops.token_select import token_select
from quota.ops.transform import transform
from quota.ops.w4a4_linear import w4a4_linear
from quota.ops.w4a16_linear import w4a16_linear
from quota.ops.w8a8_linear import w8a8_linear
from quota.ops.weights import ByteWeight, Factor, FloatWeight, GroupedWeight, Kv, PackedWeight, factor_of

__all__ = [
    "ByteWeight",
    "Factor",
    "FloatWeight",
    "GroupedWeight",
    "Kv",
    "PackedWeight",
    "factor_of",
    "float_linear",
    "kv4_append",
    "kv4_attention",
    "kv4_page_read",
    "kv4_page_write",
    "kv4_paged_attention",
    "kv16_attention",
    "kv16_paged_attention",
    "qkv_append",
    "quantize_act",
    "rms_norm",
    "token_gather",
    "token_score",
    "token_select",
    "transform",
    "w4a16_linear",
    "w4a4_linear",
    "w8a8_linear",
]
