"""The recipe file: round trip, canonical bytes, and errors that name the field."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quota.core.errors import RecipeError
from quota.core.recipe import DEFAULT_SELECTION, Recipe, ScoreWeights, kept_tokens, schema_text, significant

SCHEMA = Path(__file__).parents[2] / "recipes" / "recipe.schema.json"


def data(**changes: object) -> dict:
    plain = {
        "method": "quota",
        "regime": "w4a4kv4",
        "model": {
            "architecture": "LlavaForConditionalGeneration",
            "fingerprint": "sha256:aa",
            "layers": 8,
            "visual_tokens": 576,
        },
        "candidates": [2, 3, 5],
        "keep": [0.8, 0.55, 0.3],
        "final_keep": 0.3,
        "tau": 1.0,
        "reference_tokens": 576,
        "sensitivities": [0.1, 0.2, 0.3],
        "provenance": {
            "model_fingerprint": "sha256:aa",
            "calibration_fingerprint": "sha256:bb",
            "tool_version": "0.1.0",
            "samples": 128,
        },
    }
    return {**plain, **changes}


def test_round_trip_and_canonical_bytes(tmp_path: Path) -> None:
    recipe = Recipe.parse(data())
    recipe.save(tmp_path / "a.json")
    again = Recipe.load(tmp_path / "a.json")
    assert again == recipe
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads(recipe.dumps())["schema_version"] == 2


def test_tokens_per_layer() -> None:
    recipe = Recipe.parse(data())
    assert [recipe.keep_at(i) for i in range(8)] == [1, 1, 0.8, 0.55, 0.55, 0.3, 0.3, 0.3]
    assert [recipe.tokens_at(i) for i in (0, 2, 3, 7)] == [576, 461, 317, 173]
    assert recipe.tokens_at(7, tokens=10) == 3
    with pytest.raises(RecipeError, match="layer: expected 0 to 7, got 8"):
        recipe.keep_at(8)


@pytest.mark.parametrize(
    ("ratio", "tokens", "kept"),
    [(0.3, 576, 173), (0.07, 100, 7), (1.0, 576, 576), (0.001, 5, 1), (0.5, 1, 1), (0.3, 0, 0)],
)
def test_kept_tokens_is_the_exact_ceiling(ratio: float, tokens: int, kept: int) -> None:
    assert kept_tokens(ratio, tokens) == kept


@given(st.floats(1e-6, 1.0), st.integers(0, 5000))
def test_kept_tokens_bounds(ratio: float, tokens: int) -> None:
    kept = kept_tokens(ratio, tokens)
    assert min(tokens, 1) <= kept <= tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": [0.5, 0.8, 0.3]}, "keep: .*entry 1 is 0.8 after 0.5"),
        ({"keep": [0.8, 0.3]}, "keep: expected one ratio per candidate"),
        ({"keep": [0.8, 0.5, 0.31]}, "keep: expected the last ratio to equal final_keep 0.3, got 0.31"),
        ({"keep": [1.2, 0.55, 0.3]}, r"keep\[0\]: .*less than or equal to 1, got 1.2"),
        (
            {"keep": [0.8, 0.55, 0], "final_keep": 0},
            r"keep: expected ratios greater than 0, entry 2 is 0: only method vtw",
        ),
        ({"keep": ["0.8", 0.55, 0.3]}, r"keep\[0\]: .*got '0.8'"),
        ({"final_keep": True}, "final_keep: .*got True"),
        ({"candidates": [2, 2, 5]}, "candidates: .*entry 1 is 2 after 2"),
        (
            {"candidates": [-1, 2, 5]},
            r"candidates\[0\]: expected a decoder layer from 0 on.*quota recipe upgrade.*, got -1",
        ),
        ({"candidates": [2, 3, 8]}, "candidates: expected layers below model.layers 8, got 8"),
        ({"candidates": []}, "candidates: "),
        ({"sensitivities": [0.1]}, "sensitivities: expected none or one per candidate"),
        ({"selections": [{}, {}]}, r"selections: expected none, one for all, or one per candidate \(3\), got 2"),
        ({"selections": [{"score": "best"}]}, r"selections\[0\]\.score: .*got 'best'"),
        ({"selections": [{"mmr_score": 1.5}]}, r"selections\[0\]\.mmr_score: .*got 1\.5"),
        (
            {"candidates": [0, 3, 5]},
            "candidate 0 runs before any attention: expected score relevance, random, none, got 'quota'",
        ),
        ({"candidates": [1.0, 3, 5]}, r"candidates\[0\]: .*integer, got 1.0"),
        ({"seed": -1}, "seed: .*greater than or equal to 0, got -1"),
        ({"method": "best"}, "method: .*'quota', 'uniform', 'fastv'.*got 'best'"),
        ({"tau": 0.0}, "tau: .*greater than 0, got 0.0"),
        ({"reference": "file"}, "reference: expected one of 'recorded', 'per_image', 'per_tile', got 'file'"),
        ({"position_policy": "kept"}, "position_policy: .*got 'kept'"),
        (
            {"schema_version": 1},
            "schema_version: this quota reads recipes of schema_version 2; rewrite the file with `quota recipe"
            " upgrade`, got 1",
        ),
        ({"schema_version": 3}, "schema_version 2; make the recipe again with `quota recipe`, got 3"),
        ({"schema_version": True}, "schema_version 2; make the recipe again with `quota recipe`, got True"),
        ({"kepp": 1}, "kepp: unknown field"),
        ({"weights": {"inter": -1.0}}, "weights.inter: .*greater than or equal to 0, got -1.0"),
        ({"weights": {"inter": 0.0, "mag": 0.0, "intra": 0.0, "quant": 0.0}}, "weights: at least one weight"),
        ({"percentiles": {"low": 95.0, "high": 5.0}}, "percentiles: expected 0 <= low < high"),
        (
            {"provenance": {"model_fingerprint": "sha256:cc"}},
            "provenance.model_fingerprint: expected model.fingerprint sha256:aa",
        ),
        ({"model": {"architecture": "L"}}, "model.fingerprint: required field is missing"),
    ],
)
def test_errors_name_the_field(changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(data(**changes))


def test_selections_per_candidate(tmp_path: Path) -> None:
    plain = Recipe.parse(data())
    assert plain.selections == () and plain.selection_at(3) == DEFAULT_SELECTION
    one = Recipe.parse(data(method="custom", selections=[{"policy": "mmr", "mmr_score": 0.7}]))
    assert {one.selection_at(c).mmr_score for c in one.candidates} == {0.7}
    staged = Recipe.parse(
        data(
            method="custom",
            candidates=[0, 3, 5],
            selections=[{"score": "none", "policy": "maxmin"}, {}, {"score": "last_token"}],
        )
    )
    assert [staged.selection_at(c).score for c in staged.candidates] == ["none", "quota", "last_token"]
    assert [staged.keep_at(i) for i in (0, 2, 3, 7)] == [0.8, 0.8, 0.55, 0.3]
    staged.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == staged


def test_only_vtw_may_keep_nothing() -> None:
    withdrawn = Recipe.parse(
        data(method="vtw", candidates=[5], keep=[0.0], final_keep=0.0, selections=[{"score": "none"}], sensitivities=[])
    )
    assert withdrawn.tokens_at(4) == 576 and withdrawn.tokens_at(5) == 0


def test_a_negative_weight_is_for_the_quantization_term_alone() -> None:
    assert ScoreWeights(quant=-0.2).without_quant().inter == pytest.approx(0.45)
    assert Recipe.parse(data(weights={"quant": -0.2})).weights.quant == -0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"tau": NaN}', "NaN is not a JSON number"),
        ('{"tau": 1, "tau": 2}', "key 'tau' appears twice"),
        ("\udcff", "not UTF-8|not valid JSON"),
    ],
)
def test_load_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)


def test_load_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.json: cannot be read"):
        Recipe.load(tmp_path / "none.json")


def test_check_model() -> None:
    recipe = Recipe.parse(data())
    recipe.check_model("sha256:aa", 8)
    with pytest.raises(RecipeError, match=r"model.fingerprint: the recipe is for .*sha256:aa, this model is sha256:cc"):
        recipe.check_model("sha256:cc")
    with pytest.raises(RecipeError, match=r"model.layers"):
        recipe.check_model("sha256:aa", 32)
    with pytest.raises(RecipeError, match=r"model.architecture: the recipe is for 'LlavaFor.*this model is 'Foo'"):
        recipe.check_model("sha256:aa", 8, "Foo")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["model"].update(layers=10**9), "model.layers"),
        (lambda d: d.update(reference_tokens=10**30), "reference_tokens"),
        (lambda d: d.update(reference_tokens=10**4000), "reference_tokens"),
        (lambda d: d["model"].update(visual_tokens=10**12), "model.visual_tokens"),
        (lambda d: d.update(seed=2**200), "seed"),
        (lambda d: d.update(regime="w2a2"), "regime"),
        (lambda d: d.update(regime="x" * 9000), "regime"),
        (lambda d: d["weights"].update(quant=1e300), "weights.quant"),
        (lambda d: d.update(keep=["x"] * 5000), "keep"),
        (lambda d: d.update({"k" * 9000: 1}), "kkk"),
    ],
)
def test_no_number_or_text_of_a_file_is_unbounded(change, message: str) -> None:
    edited = Recipe.parse(data()).model_dump(mode="json")
    change(edited)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.parse(edited)
    assert len(str(caught.value)) < 2500 and "\n" not in str(caught.value)


def test_only_an_ordinary_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            Recipe.load(path)
    (tmp_path / "large").write_text(" " * (4 * 1024**2 + 1))
    with pytest.raises(RecipeError, match="more than"):
        Recipe.load(tmp_path / "large")


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.parse(data()).tau = 2.0  # type: ignore[misc]


def test_weights_without_quant_keep_their_sum() -> None:
    w = ScoreWeights().without_quant()
    assert w.quant == 0
    assert w.inter + w.mag + w.intra == pytest.approx(1.0)
    assert w.inter / w.mag == pytest.approx(0.45 / 0.25)


@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=12), st.floats(1e-3, 100))
def test_any_valid_table_survives_the_file(keep: list[float], tau: float) -> None:
    table = sorted(keep, reverse=True)
    recipe = Recipe.parse(
        data(
            model={**data()["model"], "layers": 40},
            candidates=list(range(1, len(table) + 1)),
            keep=table,
            final_keep=table[-1],
            sensitivities=[],
            tau=tau,
        )
    )
    assert Recipe.parse(json.loads(recipe.dumps())) == recipe


def _nested(leaves: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=5), leaves, max_size=3)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), _nested))
def test_parser_only_raises_recipe_errors(junk: object) -> None:
    for field in data():
        try:
            Recipe.parse(data(**{field: junk}))
        except RecipeError as error:
            assert str(error).startswith("recipe: ")


def test_significant() -> None:
    assert significant(0.123456789) == 0.123457
    assert significant(0.0) == 0.0


def test_schema_file_is_current() -> None:
    assert SCHEMA.read_text() == schema_text(), "stale: run `python -m quota.core.recipe`"
