"""transformers' own door: after `import quota.runtime`, `from_pretrained` and pipelines open quantized folders too.

`quota.load` is the documented way: it verifies every file and names what is wrong. A transformers without this
registration would only warn about an
unknown quantization type and invent weights, so config.json names a weight file that does not exist
(`CheckpointWriter`): it refuses instead, and the quantizer here takes the name out again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from quota.core.checkpoint_files import tensor_shapes
from quota.core.errors import CheckpointError
from quota.core.formats import DEFAULT, scheme_named
from quota.models.quantize import quantize_structure
from quota.nn.linear import Float32State


class QuotaConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of config.json."""

    def __init__(self, regime: str = DEFAULT.name, modules: tuple[str, ...] = (), **kwargs: Any) -> None:
        self.quant_method: Any = "quota"
        self.regime, self.modules = regime, list(modules)


class QuotaQuantizer(HfQuantizer):
    """Puts the quantized modules in place before the weights arrive. Only reads checkpoints that `quota calibrate`
    wrote."""

    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """The first hook that sees the configuration, before files are looked for."""
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(name) for name in checkpoint_files or []]
        if not files or any(path.suffix != ".safetensors" for path in files):
            raise CheckpointError(
                "weights: expected the safetensors files of a quantized folder; open it with quota.load"
            )
        config: Any = self.quantization_config
        try:
            scheme = scheme_named(config.regime)
        except ValueError as error:
            raise CheckpointError(
                f"quantization_config.regime: {error}; use the version of quota that wrote the folder"
            ) from None
        quantize_structure(model, config.modules, tensor_shapes(files), scheme)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, Float32State):
                module.forget()
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` asks this first. It would leave out the manifest, without which the folder cannot be
        opened."""
        raise CheckpointError(
            "save_pretrained: a quantized checkpoint is its folder, with the manifest that vouches for every file; copy"
            " the folder it was loaded from"
        )

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False


def register() -> None:
    """Make the method known to transformers; calling it twice is harmless."""
    if "quota" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("quota")(QuotaConfig)
        register_quantizer("quota")(QuotaQuantizer)


register()
