"""The family of docs/adding.md, run: one file and one row are all that a new family needs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

import quota
from quota.calib.stream import FloatSource
from quota.core.errors import CheckpointError
from quota.core.formats import MODULES
from quota.models import FAMILIES, find_family, submodule
from quota.models.llava import Llava
from quota.models.quantize import quantized_linears
from quota.models.rtn import quantize_rtn
from tests.prune.recipes import recipe_for
from tests.tiny import llava_inputs, tiny_llava

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"


class OneLinearConfig(LlavaConfig):
    """What a model library has: LLaVA's configuration under a name of its own."""

    model_type = "one_linear"


class Projector(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear(image_features)


class OneLinearForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = OneLinearConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = Projector(config)


@pytest.fixture
def family(monkeypatch):
    """The page's family, registered as the page says."""
    text = PAGE.read_text(encoding="utf-8")
    source = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "(Llava)" in block)
    key, module, name = re.search(r'`"(\w+)": \("(\w+)", "(\w+)"\)`', text).groups()
    made = ModuleType(f"quota.models.{module}")
    exec(compile(source, str(PAGE), "exec"), made.__dict__)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setitem(FAMILIES, key, (module, name))
    monkeypatch.setitem(transformers.CONFIG_MAPPING._extra_content, key, OneLinearConfig)
    # the module as it is now: transformers replaces itself when a class is first asked for
    monkeypatch.setattr(
        sys.modules["transformers"],
        OneLinearForConditionalGeneration.__name__,
        OneLinearForConditionalGeneration,
        raising=False,
    )
    return getattr(made, name)


def tiny() -> OneLinearForConditionalGeneration:
    """The tiny LLaVA's weights around the other projector."""
    base = tiny_llava()
    config = OneLinearConfig(**{k: v for k, v in base.config.to_dict().items() if k != "model_type"})
    torch.manual_seed(5)
    model = OneLinearForConditionalGeneration._from_config(
        config, attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert {key.rpartition("projector.")[2] for key in missing} == {"linear.weight", "linear.bias"}
    assert all(".linear_" in key for key in unexpected)
    return model


def test_without_its_row_the_family_is_refused():
    with pytest.raises(CheckpointError, match="one_linear"):
        find_family(tiny())


def test_the_family_of_the_page_is_found(family):
    model = tiny()
    found = find_family(model)
    assert type(found) is family and issubclass(family, Llava)
    listed = [part for group in found.groups["projector"] for part in group.parts]
    assert listed == [
        at for at, linear in submodule(model, found.projector_path).named_modules() if isinstance(linear, nn.Linear)
    ]
    assert (
        found.vision_macs(found.visual_tokens)
        == Llava.vision_macs(found, found.visual_tokens) - found.patches * found.hidden_size**2
    )


@torch.no_grad()
def test_its_projector_is_quantized(family):
    model, inputs = tiny(), llava_inputs(tiny_llava())
    found = find_family(model)
    wanted = torch.stack(found.encode(model, found.images(inputs)))
    quantize_rtn(model, ("projector",))
    assert set(quantized_linears(model)) == {f"{found.projector_path}.linear"}
    got = torch.stack(found.encode(model, found.images(inputs)))
    assert not torch.equal(got, wanted) and torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min() > 0.95


@torch.no_grad()
def test_quantized_whole_it_gives_a_row_the_same_bits_in_any_batch(family):
    model, inputs = quantize_rtn(tiny()), llava_inputs(tiny_llava(), rows=((3, 5), (3, 5)))
    assert {f"{path}.{group.name}" for path, group in find_family(model).group_paths(MODULES)} == set(
        quantized_linears(model)
    )
    together = model(**inputs).logits
    assert together.isfinite().all()
    for row in range(2):
        assert torch.equal(
            model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits[0], together[row]
        )


@torch.no_grad()
def test_a_recipe_prunes_it(family):
    model, inputs = quantize_rtn(tiny()), llava_inputs(tiny_llava())
    visual = inputs["input_ids"] == find_family(model).image_token_id
    with quota.patched(model, recipe_for(model)) as handle:
        model(**inputs)
        kept = {candidate: (alive & visual).sum(-1).tolist() for candidate, alive in handle.kept.items()}
    assert kept == {1: [12, 12], 2: [8, 8], 3: [4, 4]}


@torch.no_grad()
def test_calibration_reads_its_projector(family, tmp_path):
    tiny().save_pretrained(tmp_path)
    source = FloatSource(tmp_path)
    block = source.block("projector", source.family.projector_path)
    block.quantize_linears()
    block.freeze()
    assert {key.rpartition(".")[0] for key in block.export()} == {f"{source.family.projector_path}.linear"}
