"""Short forms of the commands in benchmarks/serve: mixed load with its accounts, and fuzzing."""

from __future__ import annotations

import asyncio
import json
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.serve.fuzz import CHAT, RECIPE, fuzz
from benchmarks.serve.soak import memory_growth, soak
from benchmarks.serve.throughput import body, measure
from quota.core.errors import RecipeError
from quota.core.recipe import Recipe
from quota.server.errors import as_api_error
from quota.server.schemas import ChatRequest


def test_mixed_load(serving):
    server = serving(kv_bytes=1 << 20)
    account = asyncio.run(soak(server.url, 45, 6, compare=0.3, pid=os.getpid()))
    assert not account.problems, account.problems
    assert account.compared > 5 and account.outcomes["left"] and account.outcomes["refusal: 400"]
    server.idle()


def test_growth_is_noticed():
    assert memory_growth([5, 9, 100, 100, 100, 101]) < 1.05 < memory_growth([5, 9, 100, 100, 150, 200]) and memory_growth([]) == 1.0


def test_throughput_rows_pass_their_gate(server):
    row = asyncio.run(measure(server.url, 3, 1, lambda number: body("tiny", number, None)))
    assert row["requests"] == 3 and row["tokens"] > 0 and row["ttft_p50_ms"] <= row["ttft_p99_ms"]


def test_fuzzing_finds_nothing():
    tried, failures = fuzz(3.0, seed=0)
    assert tried > 50 and not failures, failures


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*CHAT, *RECIPE, "role", "content", "type", "x"]), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*CHAT, "response_format", "stream_options", "logit_bias", "x"]), JSON, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_request_or_a_refusal(change):
    try:
        ChatRequest.model_validate_json(json.dumps({**CHAT, **change})).samplings()
    except ValueError as error:
        assert as_api_error(error).status == 400 and as_api_error(error).message


@given(st.dictionaries(st.sampled_from([*RECIPE, "tau", "percentiles", "x"]), JSON, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_recipe_or_a_refusal(change):
    try:
        assert Recipe.parse({**RECIPE, **change}).dumps()
    except RecipeError as error:
        assert str(error)
