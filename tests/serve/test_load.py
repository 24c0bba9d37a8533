"""Short form of benchmarks/serve/soak.py, mixed load with its accounts; and any JSON as a request or a recipe."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.serve.fuzz_inputs import CHAT, RECIPE
from benchmarks.serve.soak import faults_in, memory_growth, recompute, report, soak
from benchmarks.serve.tables import soak_table
from benchmarks.serve.throughput import body, measure
from quota.core.errors import RecipeError
from quota.core.recipe import Recipe
from quota.server.errors import as_api_error
from quota.server.schemas import ChatRequest


def test_mixed_load(serving):
    """The accounts balance, answers are those given alone by a server that keeps nothing, and an answer that is not
    would be noticed."""
    server, alone = serving(kv_bytes=1 << 20), serving(prefix_cache=False, feature_bytes=0, max_running=1)
    account = asyncio.run(
        soak(server.url, range(45), 6, compare=0.3, watch=lambda so_far: so_far.rss_bytes.append(1_000_000))
    )
    asyncio.run(recompute(alone.url, account, "tiny"))
    assert not account.problems, account.problems
    assert account.compared > 5 and account.outcomes["left"] and account.outcomes["refusal: 400"]
    server.idle()
    found = report(account, argparse.Namespace(requests=45, first=0, clients=6, threads=1), 1.0, "finished")
    assert sum(found["images"].values()) > 20 and len(found["images"]) > 5
    assert re.search(
        r"\| problems +\| none +\|", soak_table(found)
    ) and f"{account.compared} of {account.compared} kept, 0 differ" in soak_table(found)
    account.good = {next(iter(account.good)): [("another answer", "stop")]}
    asyncio.run(recompute(alone.url, account, "tiny"))
    assert "alone" in account.problems[0] and account.differ == 1


def test_faults_of_the_log_are_noticed(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        '{"level": "info", "message": "fine"}\n{"level": "error", "message": "a step failed", "exception": "ValueError:'
        ' x"}\n'
    )
    assert faults_in(log) == ["log: a step failed ValueError: x"]


def test_growth_is_noticed():
    assert (
        memory_growth([5, 9, 100, 100, 100, 101]) < 1.05 < memory_growth([5, 9, 100, 100, 150, 200])
        and memory_growth([]) == 1.0
    )


def test_throughput_rows_pass_their_gate(server):
    row = asyncio.run(measure(server.url, time.process_time, 3, 5, lambda number: body("tiny", number, None), first=50))
    assert row["requests"] == 5 and row["tokens_per_s"] > 0 and row["ttft_ms"] == sorted(row["ttft_ms"])
    with pytest.raises(RuntimeError, match="differ from those given alone"):
        asyncio.run(
            measure(server.url, time.process_time, 3, 1, lambda number: {**body("tiny", number, None), "seed": None})
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*CHAT, *RECIPE, "role", "content", "type", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from([*CHAT, "response_format", "stream_options", "logit_bias", "x"]), JSON, max_size=6)
)
@settings(max_examples=300)
def test_any_json_is_a_request_or_a_refusal(change):
    try:
        ChatRequest.model_validate_json(json.dumps({**CHAT, **change})).samplings()
    except ValueError as error:
        assert as_api_error(error).status == 400 and as_api_error(error).message


@given(st.dictionaries(st.sampled_from([*RECIPE, "tau", "percentiles", "x"]), JSON, max_size=6))
@settings(max_examples=300)
def test_any_json_is_a_recipe_or_a_refusal(change):
    try:
        assert Recipe.parse({**RECIPE, **change}).dumps()
    except RecipeError as error:
        assert str(error)
