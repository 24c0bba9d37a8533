"""Opening checkpoints: ours (quantized, verified) and ordinary float ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from quota.core.checkpoint import Manifest, check_tensor, is_quantized_folder
from quota.core.checkpoint_files import iterate_tensors, listed_files, tensor_shapes, verify_files, weight_files
from quota.core.devices import checked_device
from quota.core.documents import read_object
from quota.core.errors import CheckpointError
from quota.core.folders import resolve_folder
from quota.core.malloc import keep_freed_memory
from quota.models import find_family, model_fingerprint
from quota.models.config import OWN_KEYS, read_config
from quota.models.processing import open_processor
from quota.models.quantize import quantize_structure
from quota.nn.linear import Float32State
from quota.runtime.hf import QuotaConfig, QuotaQuantizer
from quota.runtime.patch import patched

if TYPE_CHECKING:
    from quota.core.recipe import Recipe

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def load(
    checkpoint: str | Path,
    recipe: Recipe | str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> Any:
    """A transformers model (`LlavaForConditionalGeneration` or another of `quota.models`) in eval mode, ready
    for `generate`.

    Threads may share it, each with a cache of its own; see `patched` for what holds under a recipe.
    `.processor` is attached (None where the folder has none) and uses PIL images. From now on the process keeps freed
    memory (`keep_freed_memory`).

    checkpoint: a folder written by `quota calibrate`, or a float folder or hub name. recipe: installed if given, see
    `model.quota_handle`. dtype: of everything that is not quantized. device: where the model runs; each kernel repacks
    the weights it wants
    otherwise at first use. verify: check every file's SHA-256 first.
    Raises CheckpointError (missing, truncated, altered or mismatched), RecipeError (malformed or made for another
    model), UsageError (no such device).
    """
    if dtype not in _FLOATS:
        raise CheckpointError(f"dtype: expected one of {[str(d) for d in _FLOATS]}, got {dtype}")
    where = checked_device(device)
    keep_freed_memory()
    folder = resolve_folder(checkpoint)
    model = _load_quantized(folder, dtype, verify) if is_quantized_folder(folder) else _load_float(folder, dtype)
    if where.type != "cpu":
        model.to(where)
    if recipe is not None:
        patched(model, recipe)
    return model


def load_model(
    checkpoint: str | Path, recipe: Any = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """(`load`, its processor). Library chatter is silenced. CheckpointError also where the folder has no processor."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load(str(checkpoint), recipe=recipe, dtype=dtype, device=device)
    if model.processor is None:
        raise CheckpointError(
            f"{checkpoint}: holds no processor files (processor_config.json, tokenizer.json); copy them from the float"
            " model"
        )
    return model, model.processor


@dataclass(frozen=True)
class Placement:
    """Where models run, and the float type of what is not quantized in them."""

    device: str = "cpu"
    dtype: str = "float32"

    def open(self, checkpoint: str | Path, recipe: Any = None) -> tuple[Any, Any]:
        """`load_model` here."""
        return load_model(checkpoint, recipe, self.device, getattr(torch, self.dtype))

    @property
    def key(self) -> str:
        """What results depend on besides weights and questions: empty on the CPU in float32."""
        return "" if self == ON_CPU else f" {self.device.partition(':')[0]} {self.dtype}"


ON_CPU = Placement()


def _load_quantized(folder: Path, dtype: torch.dtype, verify: bool) -> Any:
    manifest = Manifest.load(folder)
    if verify:
        verify_files(folder, manifest)
    files = weight_files(folder, manifest)
    with listed_files(folder, manifest) as listed:
        config = read_config(listed)
        processor = _load_processor(listed)
        generation = _generation_config(listed)
    for name in OWN_KEYS:  # transformers would look for a quantizer, and for a file, of its own
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        model: Any = _model_class(config)._from_config(config, dtype=dtype)
    quantize_structure(model, manifest.modules, tensor_shapes(files), manifest.scheme)
    _assign(model, files, dtype)
    fill_derived(model)
    model.eval().requires_grad_(False)
    found = model_fingerprint(model)
    if found != manifest.source_fingerprint:
        raise CheckpointError(
            f"source_fingerprint: {folder / 'quota.json'} says {manifest.source_fingerprint}, the tensors say {found};"
            " the folder mixes two models"
        )
    if generation is not None:
        model.generation_config = generation
    model.config._name_or_path = model.name_or_path = str(folder)
    model.quota_manifest, model.processor = manifest, processor
    model.hf_quantizer = QuotaQuantizer(
        QuotaConfig(manifest.scheme.name, manifest.modules), pre_quantized=True
    )  # answers `save_pretrained`
    return model


def _generation_config(folder: Path) -> GenerationConfig | None:
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return GenerationConfig.from_dict(read_object(path))
    except Exception as error:  # transformers' own checks raise many kinds
        raise CheckpointError(
            f"{path}: not readable as a generation configuration ({_first_line(error)}); restore the file"
        ) from None


def _assign(model: Any, files: list[Path], dtype: torch.dtype) -> None:
    expected: dict[str, Tensor] = model.state_dict()
    own = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Float32State)
        for name in module._buffers
    }
    loaded: dict[str, Tensor] = {}
    for name, tensor in iterate_tensors(files):
        if name not in expected:
            raise CheckpointError(
                f"tensor {name}: found in the checkpoint, unknown to this model; the folder is damaged or written by"
                " another version"
            )
        check_tensor(name, tensor, expected[name])
        if name in own and tensor.dtype != expected[name].dtype:
            raise CheckpointError(
                f"tensor {name}: expected {expected[name].dtype}, got {tensor.dtype}; the folder is damaged"
            )
        loaded[name] = tensor if name in own or not tensor.dtype.is_floating_point else tensor.to(dtype)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(set(expected) - set(loaded) - tied)
    if missing:
        raise CheckpointError(
            f"tensor {missing[0]}: missing from the checkpoint ({len(missing)} in all); the folder is damaged: copy or"
            " calibrate it again"
        )
    model.load_state_dict(loaded, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.tie_weights()


def fill_derived(model: Any) -> None:
    """Non-persistent buffers are not in a checkpoint: compute them where the meta device left nothing."""
    find_family(model).fill_derived(model)
    for path, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is None or not buffer.is_meta:
                continue
            if name != "position_ids":
                raise CheckpointError(
                    f"buffer {path}.{name}: not in the checkpoint and not known how to compute; this transformers"
                    " version is not supported"
                )
            module.register_buffer(name, torch.arange(buffer.shape[-1]).expand(buffer.shape).clone(), persistent=False)


def _load_float(folder: Path, dtype: torch.dtype) -> Any:
    config = read_config(folder)
    try:
        model, found = _model_class(config).from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except Exception as error:  # safetensors and transformers raise many kinds
        raise CheckpointError(
            f"{folder}: cannot be loaded ({_first_line(error)}); expected a folder of a supported model with"
            " safetensors"
        ) from error
    invented = sorted(found["missing_keys"])
    if invented:
        shown = ", ".join(invented[:5]) + (f" and {len(invented) - 5} more" if len(invented) > 5 else "")
        raise CheckpointError(f"{folder}: tensors missing from the checkpoint: {shown}; copy or download it again")
    model.processor = _load_processor(folder)
    return model.eval().requires_grad_(False)


def _load_processor(folder: Path) -> Any:
    try:
        processor = open_processor(folder)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers and transformers raise many kinds
        found = [name for name in _PROCESSOR_FILES if (folder / name).is_file()]
        if found:
            raise CheckpointError(
                f"{folder / found[0]}: the processor cannot be built ({_first_line(error)}); restore the folder's files"
            ) from error
        return None
    return processor if getattr(processor, "tokenizer", None) is not None else None


def _model_class(config: Any) -> Any:
    return getattr(transformers, find_family(config).model_class)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
