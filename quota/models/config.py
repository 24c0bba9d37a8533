"""config.json as it may be edited by hand: every field that decides a size or names a function is checked before
transformers builds anything from it.

transformers reads most fields as they come and fails later, somewhere else. The tables hold what is required of a value
where it is given; what is absent has transformers' default. Bounds on sizes are far above any published model: they
keep a damaged number from taking memory or time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota.core.documents import read_object, shown
from quota.core.errors import CheckpointError
from quota.models import FAMILIES, find_family

REMEDY = "restore the file, or copy or calibrate the folder again"
# Names of our folders' own entries: what marks them, and what keeps a transformers that does not know the method from
# opening them (`CheckpointWriter`).
OWN_KEYS = ("quantization_config", "transformers_weights")
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class _Rule:
    expected: str
    holds: Callable[[Any], bool]


def _count(most: int, least: int = 1) -> _Rule:
    return _Rule(f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def _count_or_pair(most: int) -> _Rule:
    one = _count(most)
    expected = f"{one.expected}, or a list of two"
    return _Rule(expected, lambda v: one.holds(v) or (isinstance(v, list) and len(v) == 2 and all(map(one.holds, v))))


def _optional(rule: _Rule) -> _Rule:
    return _Rule(f"{rule.expected}, or null", lambda v: v is None or rule.holds(v))


def _one_of(names: Callable[[], Any], what: str) -> _Rule:
    return _Rule(what, lambda v: isinstance(v, str) and v in names())


def _activations() -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN


def _rope_types() -> Any:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return {"default", "mrope", "axial", *ROPE_INIT_FUNCTIONS}  # the two are names of layouts, with default frequencies


_DTYPES = {"float32", "float16", "bfloat16", "float64", "torch.float32", "torch.float16", "torch.bfloat16"}
_NUMBER = _Rule("a number above 0", lambda v: type(v) in (int, float) and 0 < v < 1e30)
_FLAG = _Rule("true or false", lambda v: type(v) is bool)
_TABLE = _Rule("an object", lambda v: isinstance(v, dict))
_ACTIVATION = _one_of(_activations, "an activation that transformers knows, such as silu")
_DTYPE = _optional(_one_of(lambda: _DTYPES, "float32, float16 or bfloat16"))
_LAYERS, _WIDTH, _TOKEN = _count(1024), _count(2**18), _count(2**24, least=0)
_INDICES = _Rule(
    "a list of block numbers", lambda v: isinstance(v, list) and all(type(i) is int and 0 <= i < 1024 for i in v)
)
_PAIRS = _Rule(
    "a list of pairs of heights and widths",
    lambda v: (
        isinstance(v, list)
        and 0 < len(v) <= 1024
        and all(isinstance(p, list) and len(p) == 2 and all(type(n) is int and 0 < n < 2**20 for n in p) for p in v)
    ),
)

_ROPE = {
    "rope_type": _one_of(_rope_types, "a rotary embedding that transformers knows, such as default"),
    "type": _one_of(_rope_types, "a rotary embedding that transformers knows, such as default"),
    "rope_theta": _NUMBER,
    "mrope_section": _Rule(
        "a list of three counts",
        lambda v: isinstance(v, list) and len(v) == 3 and all(type(i) is int and 0 < i < 2**16 for i in v),
    ),
}
_TEXT = {
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _count(2**12),
    "num_key_value_heads": _optional(_count(2**12)),
    "head_dim": _optional(_count(2**12)),
    "vocab_size": _count(2**24),
    "max_position_embeddings": _count(2**31),
    "rms_norm_eps": _NUMBER,
    "rope_theta": _optional(_NUMBER),
    "hidden_act": _ACTIVATION,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "tie_word_embeddings": _FLAG,
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "sliding_window": _optional(_count(2**31)),
    "rope_parameters": _optional(_TABLE),
    "rope_scaling": _optional(_TABLE),
}
_VISION = {
    "hidden_size": _WIDTH,
    "embed_dim": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "depth": _LAYERS,
    "num_attention_heads": _count(2**12),
    "num_heads": _count(2**12),
    "image_size": _count_or_pair(2**14),
    "patch_size": _count_or_pair(2**10),
    "num_channels": _count(64),
    "in_channels": _count(64),
    "temporal_patch_size": _count(64),
    "spatial_merge_size": _count(64),
    "window_size": _count(2**14),
    "out_hidden_size": _WIDTH,
    "projection_dim": _count(2**18, least=0),
    "layer_norm_eps": _NUMBER,
    "hidden_act": _ACTIVATION,
    "fullatt_block_indexes": _INDICES,
    "deepstack_visual_indexes": _INDICES,
    "num_position_embeddings": _count(2**20),
    "mlp_ratio": _Rule("a number from 1 to 64", lambda v: type(v) in (int, float) and 1 <= v <= 64),
    "use_swiglu_ffn": _FLAG,
    "use_qk_norm": _FLAG,
    "use_mean_pooling": _FLAG,
    "attention_bias": _FLAG,
    "norm_type": _one_of(lambda: {"layer_norm", "rms_norm"}, "layer_norm or rms_norm"),
    "qkv_bias": _FLAG,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
}
_TOP = {
    "text_config": _TABLE,
    "vision_config": _TABLE,
    "projector_hidden_act": _ACTIVATION,
    "downsample_ratio": _Rule("a number above 0, at most 1", lambda v: type(v) in (int, float) and 0.01 < v <= 1),
    "vision_aspect_ratio": _Rule("a text such as anyres_max_9", lambda v: isinstance(v, str)),
    "spatial_merge_size": _count(64),
    "image_token_id": _TOKEN,
    "image_token_index": _TOKEN,
    "video_token_id": _TOKEN,
    "vision_start_token_id": _TOKEN,
    "vision_end_token_id": _TOKEN,
    "vision_feature_select_strategy": _one_of(lambda: {"default", "full"}, "default or full"),
    "image_grid_pinpoints": _optional(_PAIRS),
    "tie_word_embeddings": _FLAG,
    "multimodal_projector_bias": _FLAG,
    "quantization_config": _optional(_TABLE),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
}


def read_config(folder: str | Path) -> Any:
    """The transformers configuration in `folder`, of a supported architecture; nothing but config.json is read and no
    code of the folder runs.

    CheckpointError naming the field for a value nothing can be built from, `auto_map` included.
    """
    path = Path(folder) / "config.json"
    try:
        data = read_object(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: expected a checkpoint folder with config.json, found none; pass a folder written by `quota"
            " calibrate` or a float model"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as a model configuration ({error}); {REMEDY}") from None
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{path}: model_type: expected one of {', '.join(FAMILIES)}, got {shown(kind)}")
    refuse_code(path, data)
    for name, rule, value in _broken(data):
        raise CheckpointError(f"{path}: {name}: expected {rule.expected}, got {shown(value)}; {REMEDY}")
    from transformers import CONFIG_MAPPING

    try:
        config: Any = CONFIG_MAPPING[kind].from_dict(data)
        _check_sums(config)
        find_family(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # transformers' own checks raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path}: not readable as a model configuration ({reason}); {REMEDY}") from None
    return config


def _broken(data: Mapping[str, Any]) -> Iterator[tuple[str, _Rule, Any]]:
    text, vision = data.get("text_config"), data.get("vision_config")
    parts = [("", data, _TOP), ("text_config.", text, _TEXT), ("vision_config.", vision, _VISION)]
    if text is None:
        parts.append(("", data, _TEXT))  # published Qwen2.5-VL checkpoints have the language model's fields at the top
    for prefix, part, rules in parts:
        if not isinstance(part, dict):
            continue
        for name, rule in rules.items():
            if name in part and not rule.holds(part[name]):
                yield prefix + name, rule, part[name]
        for table in ("rope_parameters", "rope_scaling"):
            inner = part.get(table)
            for name, rule in _ROPE.items():
                if isinstance(inner, dict) and name in inner and not rule.holds(inner[name]):
                    yield f"{prefix}{table}.{name}", rule, inner[name]


def _check_sums(config: Any) -> None:
    """Fields that have to fit each other."""
    text, vision = config.text_config, config.vision_config
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    if heads % (kv_heads or heads):
        raise CheckpointError(f"text_config.num_key_value_heads: expected a divisor of {heads} heads, got {kv_heads}")
    if not getattr(text, "head_dim", None) and text.hidden_size % heads:
        raise CheckpointError(f"text_config.hidden_size: expected a multiple of {heads} heads, got {text.hidden_size}")
    across = getattr(vision, "num_attention_heads", None) or vision.num_heads
    width = (
        "embed_dim" if getattr(vision, "embed_dim", None) else "hidden_size"
    )  # Qwen2-VL's hidden_size is the merger's
    if getattr(vision, width) % across:
        raise CheckpointError(
            f"vision_config.{width}: expected a multiple of {across} heads, got {getattr(vision, width)}"
        )
    size, patch = getattr(vision, "image_size", None), vision.patch_size
    if size is not None and min(_sides(size)) < max(_sides(patch)):
        raise CheckpointError(f"vision_config.patch_size: expected at most image_size {size}, got {patch}")
    window = getattr(vision, "window_size", None)
    unit = patch * getattr(vision, "spatial_merge_size", 1) if window is not None else 0
    if window is not None and window < unit:
        raise CheckpointError(
            f"vision_config.window_size: expected at least patch_size x spatial_merge_size = {unit}, got {window}"
        )


def _sides(size: Any) -> Sequence[int]:
    return size if isinstance(size, (list, tuple)) else (size,)


def refuse_code(path: Path, data: Any) -> None:
    """CheckpointError when a configuration names Python code of its own (`auto_map`), at any depth."""
    todo = [data]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if value.get("auto_map"):
                raise CheckpointError(
                    f"{path}: auto_map: names code of the checkpoint, which quota never runs; remove the entry to use"
                    " transformers' class"
                )
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def refuse_folder_code(folder: Path) -> None:
    """`refuse_code` for every file of a folder in which transformers looks for `auto_map`."""
    for name in MODEL_FILES:
        path = folder / name
        if path.exists():
            try:
                refuse_code(path, read_object(path))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: not readable as JSON ({error}); {REMEDY}") from None
