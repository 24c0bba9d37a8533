"""What a request may ask of the choice of its tokens: penalties, bias, a floor, a schema; and caps on visual tokens."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from quota.core.errors import UsageError
from quota.runtime.engine import SamplingParams
from quota.runtime.engine.grammar import MAX_SCHEMA_CHARACTERS, Grammars
from quota.runtime.engine.preview import preview
from quota.runtime.engine.sampling import Logits, Sampler, sample_token
from tests.engine.asking import asked, engine, picture, prompt, run, tokens
from tests.engine.tokenizers import ascii_tokenizer

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["color", "count"],
        "additionalProperties": False,
    }
)


def rows(count: int, vocabulary: int = 50, seed: int = 0) -> list[Any]:
    values = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    return Logits(values, values.argmax(-1)).rows(count)


def chosen(sampling: SamplingParams, ids: list[int], given: list[Any]) -> list[int]:
    sampler = Sampler(sampling, ids, len(given[0].values), Grammars(None, 50, []))
    return [sampler.choose(row, step) for step, row in enumerate(given)]


def test_presence_and_frequency_follow_their_equation() -> None:
    given, counts, want = rows(40) * 2, Counter[int](), []
    for row in given:
        x = row.values.astype(np.float64)
        for token, times in counts.items():
            x[token] -= 0.7 * times + 0.4
        want.append(int(x.argmax()))
        counts[want[-1]] += 1
    found = chosen(SamplingParams(frequency_penalty=0.7, presence_penalty=0.4), [7, 8], given)
    assert found == want and found != [row.likeliest for row in given]


def test_repetition_equals_transformers() -> None:
    given, ids, want = rows(30, seed=1), [3, 4, 5], [3, 4, 5]
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    for row in given:
        x = processor(torch.tensor([want]), torch.from_numpy(row.values.astype(np.float64))[None])
        want.append(int(x.argmax()))
    assert chosen(SamplingParams(repetition_penalty=1.7), ids, given) == want[3:]


def test_bias_forces_and_forbids() -> None:
    given = rows(20, seed=2)
    assert chosen(SamplingParams(logit_bias=((11, 100.0),)), [], given) == [11] * 20
    first = given[0].likeliest
    assert chosen(SamplingParams(logit_bias=((first, -100.0),)), [], given[:1]) != [first]
    with pytest.raises(UsageError, match=r"^logit_bias: expected tokens 0 to 49, got 50$"):
        chosen(SamplingParams(logit_bias=((50, 1.0),)), [], given)


def test_min_p_is_a_share_of_the_likeliest() -> None:
    x = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    for floor, kept in ((0.0, {0, 1, 2, 3}), (0.2, {0, 1, 2}), (0.5, {0, 1}), (1.0, {0})):
        drawn = {sample_token(x, SamplingParams(temperature=1.0, min_p=floor), 5, step) for step in range(400)}
        assert drawn == kept, floor


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 1.5),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 3),
        ("repetition_penalty", 0),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", tuple((i, 1.0) for i in range(301))),
    ],
)
def test_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{field}: expected "):
        SamplingParams(**{field: value})


def test_an_adjusted_answer_does_not_depend_on_its_company(model: Any) -> None:
    """Alone, in a batch, and after preemptions in a pool that is too small."""
    ways: list[dict[str, Any]] = [
        {"frequency_penalty": 1.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 4, "presence_penalty": 2.0, "min_p": 0.02},
        {"logit_bias": ((5, 8.0), (9, -100.0))},
    ]
    asks = [asked(str(i), prompt(model, 4, picture(i), 3, seed=i), 24, **way) for i, way in enumerate(ways)]
    alone = [tokens(run(engine(model), [ask])[ask.id]) for ask in asks]
    crowd = engine(model, pages=60)
    together = run(crowd, asks)
    assert [tokens(together[ask.id]) for ask in asks] == alone and crowd.scheduler.preemptions > 0
    plain = tokens(run(engine(model), [asked("p", prompt(model, 4, picture(0), 3, seed=0), 24)])["p"])
    assert alone[0] != plain and len(set(alone[0])) > len(set(plain))


@pytest.mark.parametrize("way", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "drawn"])
def test_an_answer_follows_its_schema(model: Any, way: dict[str, Any]) -> None:
    tokenizer = ascii_tokenizer()
    made = engine(model, tokenizer=tokenizer)
    made.eos = frozenset([tokenizer.eos_token_id])
    made.grammars = Grammars(tokenizer, made.model.vocabulary, made.eos)
    asks = [
        asked(str(i), prompt(model, 4, picture(i), 3, seed=i), 60, ignore_eos=False, json_schema=SCHEMA, **way)
        for i in range(3)
    ]
    outputs = run(made, [*asks, asked("free", prompt(model, 9), 20)])
    for ask in asks:
        text = "".join(output.text for output in outputs[ask.id])
        value = json.loads(text)
        assert set(value) == {"color", "count"} and value["color"] in ("red", "blue") and 0 <= value["count"] <= 99
        assert outputs[ask.id][-1].reason == "stop"


def test_schemas_that_cannot_be_followed() -> None:
    grammars = Grammars(ascii_tokenizer(), 120, [95])
    for schema, reason in (
        ('{"type": "objct"}', "Invalid type: objct"),
        ('{"not": {"type": "object"}}', "not"),
        ("{", "json_schema: "),
        (json.dumps({"enum": ["x" * MAX_SCHEMA_CHARACTERS]}), "characters, the limit is"),
    ):
        with pytest.raises(UsageError, match=r"^json_schema: ") as found:
            grammars.matcher(schema)
        assert reason in str(found.value) and "\n" not in str(found.value)
    with pytest.raises(UsageError, match=r"this engine has no tokenizer"):
        Grammars(None, 120, []).matcher(SCHEMA)
    with pytest.raises(UsageError, match=r"^json_schema: expected no ignore_eos"):
        SamplingParams(json_schema=SCHEMA, ignore_eos=True)


def test_keep_tokens_is_a_cap(model: Any) -> None:
    made = engine(model)
    case = prompt(model, 4, picture(1), 5)
    visual = model.config.image_seq_length

    def kept(**budget: Any) -> int:
        request = asked("a", case)
        usage = run(made, [type(request)(**{**vars(request), **budget})])["a"][-1].usage
        assert usage is not None and usage.visual_tokens == visual
        return usage.visual_kept

    own = kept()
    assert kept(keep_tokens=visual) == own
    assert [kept(keep_tokens=n) for n in range(1, own + 1)] == list(range(1, own + 1))
    assert kept(keep=1.0, keep_tokens=3) == 3 and kept(keep=1 / visual, keep_tokens=3) == 1
    with pytest.raises(UsageError, match=r"^keep_tokens: needs a recipe, and there is none$"):
        kept(recipe=None, keep_tokens=3)
    with pytest.raises(UsageError, match=r"^keep_tokens: expected at least 1, got 0$"):
        kept(keep_tokens=0)


def test_a_preview_is_what_a_run_reports(model: Any) -> None:
    made = engine(model)
    case = prompt(model, 4, picture(1), 5, picture(2), 2)
    for recipe in ("pruned", None):
        request = asked("a", case, recipe=recipe)
        found = preview(made.model, made.recipes, request)
        usage = run(made, [request])["a"][-1].usage
        assert found.recipe == made.recipes.named.get(recipe)
        assert found.visual_by_layer == usage.visual_by_layer and found.prompt_tokens == usage.prompt_tokens
        assert found.images == (model.config.image_seq_length,) * 2
    assert found.kv_bytes == found.unpruned_kv_bytes
    pruned = preview(made.model, made.recipes, asked("a", case, recipe="pruned"))
    gone = sum(sum(pruned.images) - alive for alive in pruned.visual_by_layer)
    assert pruned.unpruned_kv_bytes - pruned.kv_bytes == gone * found.kv_bytes // (len(case.ids) * made.model.layers)
