"""transformers' from_pretrained opens a quantized folder once quota.runtime is imported."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from quota.core.checkpoint import Manifest, save_checkpoint
from quota.core.errors import CheckpointError
from quota.core.formats import DEFAULT
from quota.models import model_fingerprint
from quota.models.rtn import quantize_rtn
from quota.runtime import load
from quota.runtime.hf import QuotaConfig, QuotaQuantizer, register
from tests.prune.recipes import greedy
from tests.tiny import llava_inputs, tiny_llava


@pytest.mark.parametrize("modules", [("vision", "projector", "llm"), ("llm",)])
def test_from_pretrained_equals_load(tmp_path, modules):
    model = quantize_rtn(tiny_llava(), modules)
    save_checkpoint(
        model, tmp_path / "out", Manifest(DEFAULT, modules, model_fingerprint(model)), max_shard_bytes=100_000
    )
    register()
    loaded, own = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32),
        load(tmp_path / "out"),
    )
    inputs = llava_inputs(model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, own(**inputs).logits)
    assert torch.equal(greedy(loaded, inputs).sequences, greedy(own, inputs).sequences)
    low = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert low.model.language_model.layers[0].mlp.down_proj.w_scale.dtype == torch.float32


def test_only_safetensors_are_read():
    with pytest.raises(CheckpointError, match="safetensors"):
        QuotaQuantizer(QuotaConfig(), pre_quantized=True)._process_model_before_weight_loading(
            tiny_llava(), checkpoint_files=["x.bin"]
        )
