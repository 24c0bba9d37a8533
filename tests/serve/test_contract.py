"""The official client against our server."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from quota.server.config import Settings
from quota.server.schemas import ChatRequest, CompletionRequest
from tests.serve.asking import ask, generated
from tests.serve.pictures import noise, user


def test_models(server):
    listed = server.client.models.list().data
    assert [model.id for model in listed] == ["tiny"] and server.client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        server.client.models.retrieve("gpt-4")


def test_stream_equals_whole(server):
    messages = [{"role": "system", "content": "describe ."}, user("which shape ?", noise(seed=2), noise(seed=3))]
    options = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = ask(server, *messages, **options)
    texts, reasons, entries, usage = [""] * 3, [None] * 3, [[], [], []], None
    for chunk in ask(server, *messages, stream=True, stream_options={"include_usage": True}, **options):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            entries[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices] and len(set(texts)) > 1
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert [[e.logprob for e in one] for one in entries] == [
        [e.logprob for e in choice.logprobs.content] for choice in whole.choices
    ]
    assert all(len(e.top_logprobs) == 2 for e in entries[0])
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_stop_texts_and_limits(server):
    question = user("describe the picture .", noise(seed=4))
    full = ask(server, question, max_tokens=20, temperature=1.0, seed=3)
    words = full.choices[0].message.content.split(" ")
    assert len(words) > 4
    cut = ask(server, question, max_tokens=20, temperature=1.0, seed=3, stop=[" " + words[3]])
    assert cut.choices[0].message.content == full.choices[0].message.content.split(" " + words[3])[0]
    assert cut.choices[0].finish_reason == "stop"
    short = ask(server, question, max_completion_tokens=2, temperature=1.0, seed=3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def test_every_parameter_of_a_chat(server):
    """What docs/serving.md lists, through the official client; the ones with no effect of their own are at least
    accepted."""
    question = user("describe the picture .", noise(seed=6))
    accepted = {
        "response_format": {"type": "text"},
        "user": "somebody",
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "n": 1,
        "top_p": 1.0,
    }
    greedy = ask(server, question, max_tokens=12)
    assert ask(server, question, max_tokens=12, **accepted).choices == greedy.choices
    for narrow in ({"top_p": 1e-9}, {"extra_body": {"top_k": 1}}):
        assert ask(server, question, max_tokens=12, temperature=1.5, seed=8, **narrow).choices == greedy.choices
    several = ask(server, question, max_tokens=12, temperature=1.5, seed=8, n=3).choices
    assert len({choice.message.content for choice in several}) == 3
    for index, choice in enumerate(several):
        assert (
            ask(server, question, max_tokens=12, temperature=1.5, seed=8 + index).choices[0].message.content
            == choice.message.content
        )
    longer = ask(server, question, max_completion_tokens=40, max_tokens=3, extra_body={"ignore_eos": True})
    assert longer.usage.completion_tokens == 40 and longer.choices[0].finish_reason == "length"
    system, developer = (
        [{"role": role, "content": "answer yes or no ."}, question] for role in ("system", "developer")
    )
    assert ask(server, *system).choices == ask(server, *developer).choices
    parts = user("describe the picture .", noise(seed=6))
    parts["content"][0]["image_url"]["detail"] = "high"
    assert ask(server, parts, max_tokens=12).choices == greedy.choices


def test_penalties_bias_and_caps_have_their_effect(server):
    question = user("describe the picture .", noise(seed=6))
    greedy = ask(server, question, max_tokens=12)
    penalties = {"presence_penalty": -2.0, "frequency_penalty": -2.0}  # for tokens that were said
    for change in (penalties, {"extra_body": {"repetition_penalty": 2.0}}, {"logit_bias": {"20": 100}}):
        assert ask(server, question, max_tokens=12, **change).choices != greedy.choices, change
        assert (
            ask(server, question, max_tokens=12, **change).choices
            == ask(server, question, max_tokens=12, **change).choices
        )
    narrow = ask(server, question, max_tokens=12, temperature=1.5, seed=8, extra_body={"min_p": 1})
    assert narrow.choices == greedy.choices


def test_a_preview_runs_nothing(server):
    """Its counts are those of the answer."""
    question = user("describe the picture .", noise(seed=6))
    steps = server.service.engine.engine.stats.steps
    for budget in ({}, {"recipe": "none"}, {"keep_tokens": 2}):
        body = {"model": "tiny", "messages": [question], **budget}
        found = httpx.post(f"{server.url}/v1/quota/preview", json=body).json()
        assert found["object"] == "quota.preview" and server.service.engine.engine.stats.steps == steps
        usage = ask(server, question, max_tokens=1, extra_body=budget).usage
        steps = server.service.engine.engine.stats.steps
        assert found["prompt_tokens"] == usage.prompt_tokens
        assert found["visual_tokens_by_layer"] == usage.quota["visual_tokens_by_layer"]
        assert found["images"] == [{"visual_tokens": usage.quota["visual_tokens"], "grid": None, "tiles": 1}]
        kept = found["kv_bytes"]["kept"] < found["kv_bytes"]["unpruned"]
        assert kept == (budget.get("recipe") != "none")
    wrong = httpx.post(f"{server.url}/v1/quota/preview", json={"model": "tiny", "messages": []})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "messages"


def test_every_parameter_of_a_completion(server):
    def complete(**options):
        return server.client.completions.create(
            **{"model": "tiny", "prompt": "USER : yes ?", "max_tokens": 8, "temperature": 0, **options}
        )

    greedy = complete()
    extra = {
        "echo": False,
        "best_of": 1,
        "suffix": None,
        "user": "somebody",
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
    }
    assert complete(**extra).choices == greedy.choices
    assert (
        complete(temperature=1.5, seed=2, extra_body={"top_k": 1}).choices
        == complete(temperature=1.5, top_p=1e-9).choices
        == greedy.choices
    )
    several = complete(prompt=["USER : yes ?", "where ?"], temperature=1.5, seed=2, n=2).choices
    assert [choice.index for choice in several] == [0, 1, 2, 3]
    alone = [
        complete(prompt=prompt, temperature=1.5, seed=seed).choices[0].text
        for prompt in ("USER : yes ?", "where ?")
        for seed in (2, 3)
    ]
    assert [choice.text for choice in several] == alone
    *pieces, last = complete(stream=True, stream_options={"include_usage": True}, logprobs=2)
    assert "".join(piece.choices[0].text for piece in pieces) == greedy.choices[0].text
    assert last.choices == [] and last.usage.completion_tokens == greedy.usage.completion_tokens
    assert sum(len(piece.choices[0].logprobs.tokens) for piece in pieces) == greedy.usage.completion_tokens
    words = greedy.choices[0].text.split(" ")
    assert complete(stop=" " + words[2]).choices[0].text == greedy.choices[0].text.split(" " + words[2])[0]


def test_the_page_lists_what_there_is(server):
    """docs/serving.md names every parameter, setting and metric, and no other."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    metrics = {
        family.name
        for family in text_string_to_metric_families(server.service.metrics.text().decode())
        if not family.name.endswith("_created")
    }
    for heading, names in (
        ("Parameters", set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)),
        ("Settings", set(Settings.model_fields)),
        ("Metrics", metrics),
    ):
        section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        listed = {
            name
            for row in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
            for name in re.findall(r"`(\w+)`", row)
        }
        assert listed == names, heading


def test_plain_completions(server, model):
    answer = server.client.completions.create(
        model="tiny", prompt=["USER : yes ?", "where ?"], max_tokens=5, temperature=0, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.choices[0].text == generated(
        model, "USER : yes ?", [], 5
    )
    report = answer.choices[1].logprobs
    assert len(report.tokens) == len(report.token_logprobs) == len(report.text_offset) == len(report.top_logprobs) <= 5
    assert server.client.completions.create(model="tiny", prompt=[1, 9, 12], max_tokens=5).usage.prompt_tokens == 3
    pieces = server.client.completions.create(
        model="tiny", prompt="USER : yes ?", max_tokens=5, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in pieces) == answer.choices[0].text


def test_probes_ids_and_metrics(server):
    ask(server, user("where is it ?", noise(seed=1)), max_tokens=2)  # the ratio is the last request's
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/health").json() == {"status": "ok"} and http.get("/ready").status_code == 200
        assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        assert len(http.get("/health", headers={"x-request-id": "no such id!"}).headers["x-request-id"]) == 32
        text = http.get("/metrics").text
    for name in (
        "time_to_first_token_seconds_count",
        "inter_token_seconds_count",
        'kv_pages{layers="0"}',
        "kept_token_ratio 0.25",
        "generated_tokens_total",
    ):
        assert f"quota_{name}" in text
    assert 'path="/health"' in text
