"""What a scale of a group's inputs is merged into: norms that multiply by 1 + weight, gated feed-forward blocks of any
name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quota.calib.blocks import Batch, Block
from quota.calib.stream import FloatSource
from quota.calib.weight_only import InputStats, _scale
from quota.core.formats import INT4_GROUPS
from quota.models import submodule
from quota.models.paligemma import PaliGemma
from quota.models.quantize import quantize_structure
from tests.calib.calibration import relative, scramble
from tests.tiny import TINY

BLOCKS = {"paligemma": "decoder", "mistral3": "vision"}


@pytest.fixture(scope="module", params=BLOCKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def source(name, tmp_path_factory):
    path = tmp_path_factory.mktemp("absorbed") / name
    TINY[name][0]().save_pretrained(path)
    return FloatSource(path)


def made(source: FloatSource, name: str) -> tuple[Block, Batch]:
    """The first block of the family's part, and a batch of one item for it."""
    part: Any = BLOCKS[name]
    width = 64 if part == "decoder" else 32
    hidden = torch.randn(1, 12, width, generator=torch.Generator().manual_seed(0))
    valid, grids = torch.ones(1, 12, dtype=torch.bool), None if part == "decoder" else [(1, 2, 6)]
    return source.block(part, source.family.blocks(part)[0]), Batch(hidden, valid, torch.arange(12)[None], grids=grids)


def exported(source: FloatSource, block: Block, batch: Batch) -> Tensor:
    """What the block's checkpoint tensors compute in a quantized model."""
    tensors = block.export()
    module = {"decoder": "llm", "vision": "vision"}[block.kind]
    model = quantize_structure(TINY[block.family.name][0](), (module,), {k: tuple(v.shape) for k, v in tensors.items()})
    layer: Any = submodule(model, block.path)
    layer.load_state_dict({key.removeprefix(f"{block.path}."): tensor for key, tensor in tensors.items()})
    if block.kind == "vision":
        return block.family.tower_block(layer, 0, batch.hidden, batch.valid, batch.grids)
    rotary = source.family.float_rotary()(batch.hidden, batch.positions)
    out: Tensor = layer(batch.hidden, position_embeddings=rotary, attention_mask=None)
    return out


@torch.no_grad()
def test_an_exported_block_computes_what_was_calibrated(source, name, monkeypatch):
    """Up to inputs that lie at a step of the grid."""
    block, batch = made(source, name)
    block.quantize_linears()
    scramble(block)
    block.set_mode("frozen")
    block.freeze()
    wanted = block(batch) - batch.hidden
    assert relative(exported(source, block, batch) - batch.hidden, wanted) < 0.05
    if name == "paligemma":
        monkeypatch.setattr(PaliGemma, "norm_offset", 0.0)
        assert relative(exported(source, block, batch) - batch.hidden, wanted) > 0.3


@torch.no_grad()
def test_a_scale_of_awq_changes_nothing_before_rounding(source, name):
    block, batch = made(source, name)
    wanted = block(batch)
    absorbed = [plan for plan in block.plans if plan.absorbs]
    assert [plan.name.rpartition(".")[2] for plan in absorbed] == ["qkv_proj", "gate_up_proj", "down_proj"]
    for plan in absorbed:
        first: Any = block.layer.get_submodule(plan.parts[0])
        seen, before = InputStats(first.in_features, "awq", 64, "cpu"), first.weight.clone()
        seen.add(
            torch.randn(64, first.in_features, generator=torch.Generator().manual_seed(1))
            * torch.arange(1, first.in_features + 1)
        )
        scales: dict[str, Tensor] = {}
        _scale(block, plan, seen, scales, INT4_GROUPS)
        assert not scales and not torch.equal(first.weight, before)
        torch.testing.assert_close(block(batch), wanted, rtol=1e-3, atol=1e-3)
