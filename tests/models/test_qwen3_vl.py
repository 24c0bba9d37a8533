"""Qwen3-VL beyond what the Qwen-VL families share: norms of heads, interleaved positions, planes, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.vision_utils import get_vision_position_ids

from quota.core.errors import CheckpointError
from quota.models import find_family
from quota.models.config import read_config
from quota.models.qwen_tower import geometry_of
from quota.models.rtn import quantize_rtn
from tests.tiny import qwen_inputs, tiny_qwen3


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3()


@pytest.mark.parametrize(
    ("part", "field", "value", "reason"),
    [
        ("text_config", "attention_bias", True, "attention_bias: expected false"),
        ("vision_config", "deepstack_visual_indexes", [1, 0], "deepstack_visual_indexes: expected"),
        ("vision_config", "deepstack_visual_indexes", [0, 3], "deepstack_visual_indexes: expected"),
        ("text_config", "num_hidden_layers", 2, "expected fewer than 2 ascending blocks"),
    ],
)
def test_what_is_refused(model, part, field, value, reason):
    config = copy.deepcopy(model.config)
    setattr(getattr(config, part), field, value)
    with pytest.raises(CheckpointError, match=reason):
        find_family(config)


def test_mixtures_of_experts_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl_moe"}')
    with pytest.raises(CheckpointError, match=r"model_type: expected one of .*qwen3_vl, got 'qwen3_vl_moe'"):
        read_config(tmp_path)


@torch.no_grad()
def test_heads_are_normalised_as_upstream_does_it(model):
    """And a row has the same bits in any batch."""
    attention = quantize_rtn(tiny_qwen3(), ("llm",)).model.language_model.layers[1].self_attn
    upstream = model.model.language_model.layers[1].self_attn
    x = torch.randn(2, 7, 8, 32, generator=torch.Generator().manual_seed(0))
    got = attention._normalised(x.flatten(2), attention.q_norm, attention.k_norm).view(x.shape)
    torch.testing.assert_close(got[:, :, :4], upstream.q_norm(x[:, :, :4]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[:, :, 4:6], upstream.k_norm(x[:, :, 4:6]), rtol=1e-6, atol=1e-6)
    assert torch.equal(got[:, :, 6:], x[:, :, 6:])
    alone = attention._normalised(x[1:, 3:4].flatten(2), attention.q_norm, attention.k_norm)
    assert torch.equal(alone.view(8, 32), got[1, 3])


def test_rows_and_columns_turn_every_third_pair(model):
    family = find_family(model)
    assert family.channel_axes([6, 5, 5]) == [0, 1, 2] * 5 + [0]
    family.head_dim = 128
    assert family.channel_axes([24, 20, 20]) == [0, 1, 2] * 20 + [0] * 4


def test_patches_lie_where_upstream_has_them(model):
    grid = (1, 6, 10)
    where = geometry_of(model.config.vision_config, grid)
    assert torch.equal(where.places, get_vision_position_ids(torch.tensor([grid]), 2)) and where.windows == (60,)


@torch.no_grad()
def test_planes_are_what_upstream_adds(model):
    family, inputs, seen = find_family(model), qwen_inputs(model), []

    def see(module, args, kwargs):
        mask, embeds = kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"]
        left = dict(kwargs)
        planes = family.take_planes(left)
        assert {*kwargs} - {*left} == {"visual_pos_masks", "deepstack_visual_embeds"}
        assert torch.equal(planes[mask], torch.cat(embeds, -1)) and not planes[~mask].any()
        seen.append(family.take_planes(left))

    handle = model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    model(**inputs)
    handle.remove()
    assert seen == [None] and family.vision_macs(16) > 0


@torch.no_grad()
def test_an_image_alone_and_in_a_batch():
    model = quantize_rtn(tiny_qwen3())
    inputs = qwen_inputs(model, rows=((1, ((4, 4), (8, 6)), 3),))
    together = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    alone = model.model.visual(inputs["pixel_values"][16:], grid_thw=inputs["image_grid_thw"][1:])
    assert torch.equal(alone.pooler_output, together.pooler_output[4:])
    planes = zip(alone.deepstack_features, together.deepstack_features, strict=True)
    assert all(torch.equal(one, both[4:]) for one, both in planes)
