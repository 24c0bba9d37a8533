"""The score, the policy and the method of docs/adding.md, run: one row and one function are all that each needs."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from quota.allocate.baselines import RecipeContext, build_baseline
from quota.allocate.explain import explain_text
from quota.core import methods, selectors
from quota.core.errors import RecipeError
from quota.core.recipe import Recipe, schema_text
from quota.prune import policies, scores
from quota.runtime.patch import patched
from tests.calib import calibration
from tests.engine.asking import asked, engine, picture, prompt
from tests.prune.recipes import recipe_for
from tests.tiny import IMAGE_TOKEN, llava_inputs, tiny_llava

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"
SELECTION = {"score": "peak", "policy": "ranks"}


def blocks() -> dict[str, str]:
    """First word that names something -> the block of Python in the page's section on selectors."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## A selector\n")[2].partition("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return {re.search(r'def (\w+)|"(\w+)": (?:Score|Policy|Method)', text).group(0): text for text in found}  # type: ignore[union-attr]


def defined(text: str, where: Any, name: str) -> Any:
    namespace = dict(where.__dict__)
    exec(compile("from __future__ import annotations\n" + text, str(PAGE), "exec"), namespace)
    return namespace[name]


@pytest.fixture
def selector(monkeypatch):
    """The page's rows and functions, put where the page says."""
    page = blocks()
    for table, where, row in (
        (selectors.SCORES, selectors, '"peak": Score'),
        (selectors.POLICIES, selectors, '"ranks": Policy'),
        (methods.METHODS, methods, '"peaks": Method'),
    ):
        for name, value in eval("{" + page[row] + "}", dict(where.__dict__)).items():
            monkeypatch.setitem(table, name, value)
    for module, name in ((scores, "peak"), (policies, "ranks")):
        monkeypatch.setattr(module, name, defined(page[f"def {name}"], module, name), raising=False)


def test_without_its_row_a_name_is_refused() -> None:
    for field, known in (("score", "'quota', 'text'"), ("policy", "'topk', 'mmr'")):
        with pytest.raises(RecipeError, match=rf"selections\[0\].{field}: expected one of {known}.*, got 'peak'"):
            recipe_for(tiny_llava(), (2,), (0.25,), method="custom", selections=[{field: "peak"}])


def test_every_row_has_its_function() -> None:
    for table, module in ((selectors.SCORES, scores), (selectors.POLICIES, policies)):
        assert all(getattr(module, name).__module__ == module.__name__ for name in table)


@torch.no_grad()
def test_a_recipe_file_chooses_by_them(selector, tmp_path) -> None:
    """Against the attention matrices of the eager implementation: 4 of 16 tokens at ranks 0, 4, 8 and 12."""
    model, inputs = tiny_llava(), llava_inputs(tiny_llava(), rows=((3, 5),))
    recipe_for(model, (2,), (0.25,), method="custom", selections=[SELECTION]).save(tmp_path / "recipe.json")
    recipe = Recipe.load(tmp_path / "recipe.json")
    with patched(model, recipe) as handle:
        model(**inputs)
        kept = handle.kept[2][0]
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attention = eager(**inputs, output_attentions=True).attentions[1][0]
    visual = inputs["input_ids"][0] == IMAGE_TOKEN
    asking = torch.arange(len(visual)) > int(visual.nonzero().max())
    order = attention[:, asking][:, :, visual].amax(0).mean(0).argsort(descending=True)
    assert kept[visual].nonzero()[:, 0].tolist() == sorted(order[::4].tolist())
    assert bool(kept[~visual].all())


@torch.no_grad()
def test_the_engine_keeps_what_the_hooks_keep(selector) -> None:
    from quota.models.rtn import quantize_rtn

    model = quantize_rtn(tiny_llava())
    recipe = recipe_for(model, (1, 3), (0.5, 0.25), method="custom", selections=[SELECTION])
    text = prompt(model, 6, picture(1), 5)
    with patched(model, recipe) as handle:
        model(input_ids=torch.tensor([text.ids]), pixel_values=text.images[0].pixels[None])
        kept = {layer: mask[0].nonzero()[:, 0].tolist() for layer, mask in handle.kept.items()}
    made = engine(model)
    sequence = made.submit(asked("a", text, recipe=recipe))
    while made.busy:
        made.step()
    assert {layer: rows.tolist() for layer, rows in sequence.kept.items()} == kept
    assert [len(rows) for rows in kept.values()] == [1 + 6 + 5 + 8, 1 + 6 + 5 + 4]


def test_calibration_loses_what_the_hooks_drop(selector, tmp_path) -> None:
    folder = calibration.float_folder(tmp_path / "model")
    changes = calibration.selected(SELECTION, candidates=(1, 2), keep=(0.75, 0.5))
    calibration.assert_stream_keeps(folder, calibration.picture_samples(3), tmp_path, changes)


def test_candidate_0_has_no_attention_to_read(selector) -> None:
    with pytest.raises(RecipeError, match=r"candidate 0 runs before any attention: .*got 'peak'"):
        recipe_for(tiny_llava(), (0,), (0.25,), method="custom", selections=[SELECTION])


def test_words_and_schema_follow_the_rows(selector) -> None:
    model = recipe_for(tiny_llava()).model
    recipe = build_baseline(RecipeContext(model, "float"), "peaks")
    assert recipe.candidates == (2,) and recipe.keep == (0.25,) and recipe.method == "peaks"
    said = "Tokens are chosen at evenly spaced ranks of the score; score: largest head of the attention from the text"
    assert said in explain_text(recipe)
    fields = json.loads(schema_text())["$defs"]["Selection"]["properties"]
    assert "peak" in fields["score"]["enum"] and "peak: largest head" in fields["score"]["description"]
    assert "ranks" in fields["policy"]["enum"] and "ranks: at evenly" in fields["policy"]["description"]
    assert "peaks" in json.loads(schema_text())["properties"]["method"]["enum"]
    assert "`peaks` Peaks: once, before layer 2; at evenly spaced ranks" in methods.methods_help()
