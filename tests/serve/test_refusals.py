"""Requests that are refused, each with the field it names, and fields that change nothing."""

from __future__ import annotations

import httpx
import openai
import pytest

from quota.server.schemas import ChatRequest, CompletionRequest
from tests.serve.asking import ask
from tests.serve.pictures import noise, user

JSON = {"content-type": "application/json"}
WRONG = [
    ({"messages": []}, "messages"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"n": 9}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"logit_bias": {"star": 1.0}}, "logit_bias.star.[key]"),
    ({"logit_bias": {"999999": 1.0}}, "logit_bias"),
    ({"keep_tokens": 0}, "keep_tokens"),
    ({"keeep": 0.5}, "keeep"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
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
    "service_tier": "flex",
    "length_penalty": 2,
    "min_tokens": 3,
    "stop_token_ids": [1],
    "skip_special_tokens": False,
    "modalities": ["text", "audio"],
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
