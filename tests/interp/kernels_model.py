"""A whole quantized and pruned model through the Triton kernels: the bits of the native library, prefill and decode.

The interpreter takes its time per row, so prompts are as short as a selection allows; one batch is padded.
"""

from __future__ import annotations

import pytest
import torch

from quota.core.registry import ops
from quota.models.rtn import quantize_rtn
from quota.ops import native
from quota.runtime.patch import patched
from tests.prune.recipes import greedy, recipe_for
from tests.tiny import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_answers_and_scores_equal_the_native_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.why_not() is None, native.why_not()
    if family == "llava":
        model = quantize_rtn(tiny_llava(layers=2, vision_layers=2, image_size=28))
        inputs = llava_inputs(model, ((0, 1), (1, 1)))
    else:
        model = quantize_rtn(tiny_qwen(layers=2, key_bias=50.0), ("llm",))  # the tower's linears are those of LLaVA's
        inputs = qwen_inputs(model, ((0, ((4, 4),), 1),))
    recipe = recipe_for(model, (1,), (0.5,), reference="per_image")
    runs = []
    for implementation in ("native", "triton"):
        monkeypatch.setenv("QUOTA_IMPL", ",".join(f"{name}={implementation}" for name in ops()))
        for op in ops().values():
            op.rebind()
        with patched(model, recipe) as handle:
            runs.append((greedy(model, inputs, tokens=2), handle.kept))
    monkeypatch.undo()
    for op in ops().values():
        op.rebind()
    (native_run, native_kept), (triton_run, triton_kept) = runs
    assert torch.equal(triton_run.sequences, native_run.sequences)
    assert all(torch.equal(a, b) for a, b in zip(triton_run.scores, native_run.scores, strict=True))
    assert triton_kept.keys() == native_kept.keys() and all(
        torch.equal(triton_kept[layer], native_kept[layer]) for layer in native_kept
    )
