"""The official client against our server."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from quota.runtime.patch import patched
from quota.server.config import Settings
from quota.server.schemas import ChatRequest, CompletionRequest
from tests.prune.recipes import recipe_for
from tests.serve.pictures import noise, user


def ask(server, *messages, **options):
    return server.client.chat.completions.create(
        model="tiny", messages=list(messages), **{"temperature": 0, "max_tokens": 8, **options}
    )


def generated(model, text, pictures, tokens=8):
    inputs = model.processor(text=[text], images=pictures or None, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return model.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_models(server):
    listed = server.client.models.list().data
    assert [model.id for model in listed] == ["tiny"] and server.client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        server.client.models.retrieve("gpt-4")


def test_answers_are_those_of_generate(server, model):
    picture = noise(seed=1)
    want = generated(model, "USER: <image>\nwhat color is the star ? ASSISTANT:", [picture])
    with patched(model, recipe_for(model)):
        pruned = generated(model, "USER: <image>\nwhat color is the star ? ASSISTANT:", [picture])
    question = user("what color is the star ?", picture)
    answer = ask(server, question)
    assert answer.choices[0].message.content == pruned
    assert ask(server, question, extra_body={"recipe": "none"}).choices[0].message.content == want
    assert ask(server, user("where is it ?")).choices[0].message.content == generated(
        model, "USER: where is it ? ASSISTANT:", []
    )
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert (
        usage.quota["visual_tokens"] == 16
        and usage.quota["visual_tokens_kept"] == 4
        and usage.quota["selection"] == "prompt"
    )
    assert ask(server, question, extra_body={"keep": 0.5}).usage.quota["visual_tokens_kept"] == 8
    server.idle()


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


def test_second_turn_keeps_the_first_selection(server):
    first = user("what color is the star ?", noise(seed=5))
    answer = ask(server, first)
    chat = [first, {"role": "assistant", "content": answer.choices[0].message.content}, user("and where is it ?")]
    usage = ask(server, *chat).usage
    assert usage.quota["selection"] == "first_turn" and usage.quota["selection_tokens"] == answer.usage.prompt_tokens
    assert usage.quota["visual_tokens_kept"] == 4


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


JSON = {"content-type": "application/json"}
WRONG = [
    ({"messages": []}, "messages"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"n": 9}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"presence_penalty": 1.0}, "presence_penalty"),
    ({"keeep": 0.5}, "keeep"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"top_logprobs": 3}, None),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"recipe": "unknown"}, "recipe"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "look: <image>"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "star " * 5000}]}, "messages"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        "messages.0",
    ),
]


@pytest.mark.parametrize(("change", "param"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests(server, change, param, stream):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "yes ?"}], "stream": stream, **change}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (
        answer.status_code == 400
        and error["type"] == "invalid_request_error"
        and error["param"] == param
        and error["message"]
    )
    assert set(error) == {"message", "type", "param", "code"}


def test_other_refusals(server, serving):
    post = f"{server.url}/v1/chat/completions"
    for body in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": 1e999999}'):
        answer = httpx.post(post, content=body, headers=JSON)
        assert answer.status_code == 400 and answer.json()["error"]["message"], body[:10]
    good = {"model": "tiny", "messages": [{"role": "user", "content": "yes ?"}]}
    assert httpx.post(post, json={**good, "model": "gpt-4"}).json()["error"]["code"] == "model_not_found"
    assert httpx.get(f"{server.url}/v2/none").json()["error"]["code"] == "unknown_url"
    assert httpx.get(post).status_code == 405 and httpx.get(post).json()["error"]["message"]
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert httpx.get(server.url + path).status_code == 404
    assert (
        "access-control-allow-origin"
        not in httpx.get(f"{server.url}/health", headers={"origin": "http://evil.example"}).headers
    )

    locked = serving(api_keys=("secret",), max_body_bytes=2000, cors_origins=("http://good.example",), max_images=1)
    assert (
        httpx.get(f"{locked.url}/v1/models").status_code == 401 and httpx.get(f"{locked.url}/health").status_code == 200
    )
    with pytest.raises(openai.AuthenticationError):
        locked.client.models.list()
    key = locked.client.with_options(api_key="secret")
    assert key.models.list().data
    headers = {**JSON, "authorization": "Bearer secret"}
    assert httpx.post(f"{locked.url}/v1/chat/completions", content=b"x" * 3000, headers=headers).status_code == 413

    def pieces():
        yield from (b"x" * 500 for _ in range(10))

    assert httpx.post(f"{locked.url}/v1/chat/completions", content=pieces(), headers=headers).status_code == 413
    small = noise(4, 4)
    with pytest.raises(openai.BadRequestError, match="limit is 1"):
        key.chat.completions.create(model="tiny", messages=[user("x", small, small)])
    allowed = httpx.get(f"{locked.url}/health", headers={"origin": "http://good.example"})
    assert allowed.headers["access-control-allow-origin"] == "http://good.example"


# what clients send beside what they mean


def post(server, body, path="chat/completions"):
    return httpx.post(
        f"{server.url}/v1/{path}", json={"model": "tiny", "max_tokens": 8, "temperature": 0, **body}, timeout=60
    )


def test_what_the_server_sent_is_taken_back(server):
    first = user("what color is the star ?", noise(seed=5))
    answer = ask(server, first)
    message = answer.choices[0].message
    want = ask(server, first, {"role": "assistant", "content": message.content}, user("and where is it ?")).choices
    raw = post(server, {"messages": [first]}).json()["choices"][0]["message"]
    openais = {
        "content": message.content,
        "refusal": None,
        "role": "assistant",
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    for form in (message, message.model_dump(), message.to_dict(), raw, openais):
        assert ask(server, first, form, user("and where is it ?")).choices == want
    for silent in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert ask(server, first, silent, user("and where is it ?")).choices


def test_null_is_not_given(server):
    messages = [{"role": "user", "content": "where is it ?", "name": None}]
    want = post(server, {"messages": messages}).json()["choices"]
    for name in set(ChatRequest.model_fields) - {"model", "messages", "max_tokens", "temperature"}:
        answer = post(server, {"messages": messages, name: None})
        assert answer.status_code == 200 and answer.json()["choices"] == want, name
    for name in ("temperature", "max_tokens", "max_completion_tokens"):
        assert post(server, {"messages": messages, name: None}).status_code == 200
    for name in set(CompletionRequest.model_fields) - {"model", "prompt"}:
        assert post(server, {"prompt": "yes ?", name: None}, "completions").status_code == 200, name
    for body, param in (
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ):
        answer = post(server, body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param


NO_EFFECT = {
    "store": False,
    "metadata": {"a": "b"},
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "none",
    "parallel_tool_calls": True,
    "min_p": 0,
    "service_tier": "auto",
    "top_k": -1,
    "repetition_penalty": 1.0,
    "length_penalty": 1,
    "min_tokens": 0,
    "stop_token_ids": [],
    "skip_special_tokens": True,
    "modalities": ["text"],
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "user": "x",
    "logit_bias": {},
    "presence_penalty": 0.0,
    "stop": [],
    "stream_options": {"include_usage": False, "include_obfuscation": False},
}
AN_EFFECT = {
    "store": True,
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "functions": [{}],
    "function_call": {"name": "f"},
    "min_p": 0.1,
    "service_tier": "flex",
    "repetition_penalty": 1.1,
    "length_penalty": 2,
    "min_tokens": 3,
    "stop_token_ids": [1],
    "skip_special_tokens": False,
    "modalities": ["text", "audio"],
    "logit_bias": {"1": 5},
    "presence_penalty": 0.5,
    "reasoning_effort": "low",
    "min_p ": 0.1,
    "audio": {},
}


def test_what_has_no_effect_is_accepted(server):
    messages = [{"role": "user", "content": "where is it ?"}]
    want = post(server, {"messages": messages}).json()["choices"]
    answer = post(server, {"messages": messages, **NO_EFFECT})
    assert answer.status_code == 200 and answer.json()["choices"] == want
    plain = {name: value for name, value in NO_EFFECT.items() if name in CompletionRequest.model_fields}
    assert (
        post(server, {"prompt": "yes ?", **plain, "echo": False, "best_of": 1, "suffix": ""}, "completions").status_code
        == 200
    )


@pytest.mark.parametrize("name", AN_EFFECT)
def test_what_would_change_the_answer_is_refused_by_name(server, name):
    answer = post(server, {"messages": [{"role": "user", "content": "where is it ?"}], name: AN_EFFECT[name]})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == name and error["message"].startswith(f"{name}: ")


GOOD_PART = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "data:,", "detail": "original"}}, "image_url.detail"),
        ({"type": "image_url", "image_url": "data:,"}, "image_url"),
        ({"type": "image_url", "image_url": {}}, "image_url.url"),
        ({"type": "text", "text": "x", "cache_control": {}}, "cache_control"),
        ({"type": "text", "text": 3}, "text"),
        ({"type": "input_audio", "input_audio": {}}, None),
        ("x", None),
    ],
)
def test_a_wrong_part_is_named(server, part, param):
    answer = post(
        server, {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": [GOOD_PART, part]}]}
    )
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "messages.1.content.1" + (f".{param}" if param else "")
    assert "valid string" not in error["message"] or param == "text"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ["a", 3]}, "prompt.1"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [[1], [2, "a"]]}, "prompt.1.1"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [True]}, "prompt.0"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "x", "stop": 3}, "stop"),
        ({"prompt": "x", "stop": ["a", 3]}, "stop.1"),
        ({"prompt": "x", "stop": "x" * 1025}, "stop"),
        ({"prompt": "x", "stop": ["ok", ""]}, "stop"),
    ],
)
def test_wrong_prompts_and_stops_are_named(server, body, param):
    answer = post(server, body, "completions")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
