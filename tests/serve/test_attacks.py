"""The attacks of `benchmarks/serve/attack.py` at a tenth of their size: all are answered as expected, while a
well-behaved client is served."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from benchmarks.serve.attack import KEYS, MAX_DELAY_S, attacked, problems_of
from benchmarks.serve.attacks import ATTACKS, Attack, Target
from benchmarks.serve.tables import attack_table
from quota.server import bodies
from quota.server.bodies import MAX_MARKS, parse
from quota.server.config import Settings
from quota.server.errors import ApiError
from quota.server.lane import Lane
from quota.server.schemas import ChatRequest, CompletionRequest

SCALE = 0.1
BODY_BYTES, IN_FLIGHT = 3 << 20, 24 << 20
PATIENCE_S = 20.0  # a loaded machine is slow for everybody; the measured second is that of the command


@pytest.fixture(scope="module")
def target(serving):
    running = serving(max_body_bytes=BODY_BYTES, in_flight_bytes=IN_FLIGHT, api_keys=KEYS)
    most = [0]
    done = threading.Event()

    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], running.service.bodies.total)

    thread = threading.Thread(target=watch)
    thread.start()
    yield Target(running.url, "tiny", SCALE, BODY_BYTES, KEYS[0]), running, most
    done.set()
    thread.join()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.send.__name__)
def test_an_attack_holds_up_nobody(target, attack):
    at, running, most = target
    row = attacked(attack, at)
    assert not row["unexpected"] and not row["witness_refused"], row
    assert row["attacked_s"] < PATIENCE_S, row
    running.idle()
    assert most[0] <= IN_FLIGHT + (64 << 10) * 64 and running.service.bodies.total == 0
    assert httpx.get(f"{running.url}/health").status_code == 200


def test_what_an_attack_does_is_noticed():
    slow = Attack("slow", "none", lambda target: ["500"], frozenset({"200"}))
    row = {
        "attack": slow.name,
        "bound": slow.bound,
        "outcomes": {"500": 1},
        "unexpected": ["500"],
        "witness_refused": {},
        "alone_s": 0.1,
        "attacked_s": 3.0,
        "questions": 3,
        "growth_bytes": 1 << 40,
    }
    found = problems_of([row])
    assert len(found) == 3 and f"{3.0:.2f} s" in found[1] and MAX_DELAY_S <= 1.0
    table = attack_table({"attacks": [row], "problems": found})
    assert "| slow" in table and "others wait 3.00 s" in table


# the bounds, one by one


@pytest.mark.parametrize("mark", MAX_MARKS, ids=lambda mark: mark.decode())
def test_marks_are_counted_before_a_body_is_parsed(mark, monkeypatch):
    monkeypatch.setattr(bodies, "from_json", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(ApiError, match="more than") as caught:
        parse(ChatRequest, b'{"x":"' + mark * (MAX_MARKS[mark] + 1) + b'"}')
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":[' + b"1," * 300_000 + b"1]}",
        b'{"model":"m","messages":[' + b'{"a":1},' * 60_000 + b"{}]}",
        b'{"model":"m","messages":[{"role":"user","content":[' + b"1," * 300_000 + b"1]}]}",
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"stop":[' + b"1," * 300_000 + b"1]}",
    ],
)
def test_errors_are_few(body):
    """Each would take a kilobyte."""
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, body)
    assert len(caught.value.message) < 300 and (
        "more)" not in caught.value.message or int(caught.value.message.rpartition("(")[2].split()[0]) < 10
    )


@pytest.mark.parametrize(
    "prompt",
    [b'["a",' + b"1," * 100_000 + b"1]", b"[1," + b'"a",' * 100_000 + b"1]", b"[[1]," + b"1," * 100_000 + b"1]"],
)
def test_errors_of_prompts_are_few(prompt):
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, b'{"model":"m","prompt":' + prompt + b"}")
    assert caught.value.param == "prompt.1" and "more)" not in caught.value.message


def test_objects_have_few_keys_at_every_depth():
    many = b"{" + b",".join(b'"k%d":1' % number for number in range(200)) + b"}"
    for body in (many, b'{"a":[[{"b":' + many + b"}]]}"):
        with pytest.raises(ApiError, match="200 keys"):
            parse(ChatRequest, body)


def test_an_error_does_not_repeat_what_was_sent(server):
    name = "n" * 1_000_000
    for change in (
        {"model": name},
        {"recipe": name},
        {name: 1},
        {"messages": [{"role": "user", name: 1}]},
        {"logit_bias": {name: 1}},
    ):
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": "tiny", "messages": [{"role": "user", "content": "x"}], **change},
        )
        assert answer.status_code == 400 and len(answer.content) < 2000


def test_the_largest_body_makes_room(serving):
    """It is refused while it still arrives; small ones pass meanwhile."""
    running = serving(max_body_bytes=2 << 20, in_flight_bytes=3 << 20)
    at = Target(running.url, "tiny", 1.0, 2 << 20)
    with at.connect() as large, at.connect() as middle, at.connect() as newest:
        for raw, size in ((large, (2 << 20) - 1), (middle, 1 << 20)):
            raw.sendall(at.head(2 << 20) + b" " * size)
        until = time.monotonic() + 20
        while running.service.bodies.total < (5 << 19) and time.monotonic() < until:
            time.sleep(0.01)
        assert at.post(at.body()) == "200"
        newest.sendall(at.head(2 << 20) + b" " * (1 << 20))
        large.settimeout(20)
        assert b" 429 " in large.recv(4096).split(b"\r\n")[0]
        for raw in (middle, newest):
            raw.settimeout(0.2)
            with pytest.raises(TimeoutError):
                raw.recv(1)
    until = time.monotonic() + 20
    while running.service.bodies.total and time.monotonic() < until:
        time.sleep(0.01)
    assert running.service.bodies.total == 0


def test_a_body_budget_below_one_body_is_refused():
    with pytest.raises(ValueError, match="in_flight_bytes"):
        Settings(checkpoint="x", max_body_bytes=2000, in_flight_bytes=1000)


def test_small_jobs_go_first():
    async def scenario() -> list[int]:
        lane, order, gate = Lane("test"), [], threading.Event()
        first = asyncio.ensure_future(lane.run("", 9, gate.wait, 20))
        await asyncio.sleep(0.05)
        jobs = [asyncio.ensure_future(lane.run("", size, order.append, size)) for size in (5, 1, 7, 3, 1)]
        await asyncio.sleep(0)
        jobs[2].cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *jobs, return_exceptions=True)
        with pytest.raises(ZeroDivisionError):
            await lane.run("", 0, lambda: 1 // 0)
        return order

    assert asyncio.run(scenario()) == [1, 1, 3, 5]


def test_long_texts_are_refused_before_they_are_tokenized(server, monkeypatch):
    monkeypatch.setattr(server.service.prompts, "_lock", None)  # whoever would tokenize fails
    text = "x" * (32 * server.service.limit + 1)
    for path, body in (
        ("completions", {"prompt": text}),
        ("chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        answer = httpx.post(f"{server.url}/v1/{path}", json={"model": "tiny", **body})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_the_engine_accepts_a_bounded_number_of_answers_at_once(server):
    for body, param in (({"prompt": ["x"] * 33, "n": 2}, "n"), ({"prompt": ["x"] * 65}, "prompt")):
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "max_tokens": 1, **body})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    asked = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 4000,
        "n": 8,
        "logprobs": True,
        "top_logprobs": 20,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "tiny", **asked})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "logprobs"
