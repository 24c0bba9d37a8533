"""What one client does beside another: turns, shares of queue and memory, and streams that nobody reads."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from quota.runtime.engine import async_engine
from quota.server.lane import Lane, Places
from quota.server.middleware import _address
from tests.serve.pictures import noise, user
from tests.waiting import wait_for

CHAT = "/v1/chat/completions"


def body(**options):
    return {"model": "tiny", "messages": [user("yes ?")], "max_tokens": 4, "temperature": 0, **options}


def from_address(address, server):
    """A client of its own: on Linux every 127.x.y.z is this machine."""
    return httpx.Client(transport=httpx.HTTPTransport(local_address=address), base_url=server.url, timeout=300)


@pytest.mark.parametrize("by", ["address", "key"])
def test_a_crowd_of_requests_costs_another_client_few_steps(serving, by, monkeypatch):
    server = serving(max_running=4, step_tokens=16, step_s=1e9, api_keys=("crowd", "one") if by == "key" else ())
    engine, keys = (
        server.service.engine.engine,
        {"crowd": "127.0.0.1", "one": "127.0.0.1" if by == "key" else "127.0.0.2"},
    )
    clients = {name: from_address(address, server) for name, address in keys.items()}
    headers = {name: {"authorization": f"Bearer {name}"} if by == "key" else {} for name in clients}
    stop, finish = threading.Event(), engine._finish

    def hold(number):
        messages = [user("describe the picture .", noise(seed=number))]
        asked = body(messages=messages, max_tokens=3000, ignore_eos=True, stream=True)
        with clients["crowd"].stream("POST", CHAT, json=asked, headers=headers["crowd"]) as answer:
            for _ in answer.iter_lines():
                if stop.is_set():
                    return

    with ThreadPoolExecutor(20) as threads:
        held = [threads.submit(hold, number) for number in range(20)]
        try:
            wait_for(lambda: server.service.engine.active == 20 and engine.scheduler.running)
            prepared, steps = engine._sequence, []
            monkeypatch.setattr(engine, "_sequence", lambda *args: steps.append(engine.stats.steps) or prepared(*args))
            monkeypatch.setattr(engine, "_finish", lambda *args: steps.append(engine.stats.steps) or finish(*args))
            for _ in range(3):
                assert clients["one"].post(CHAT, json=body(), headers=headers["one"]).status_code == 200
            monkeypatch.undo()
            assert len(steps) == 6 and all(
                end - begin <= 4 + 2 for begin, end in zip(steps[::2], steps[1::2], strict=True)
            )
            assert len(engine.scheduler.waiting) >= 16  # the crowd still waits for itself
        finally:
            stop.set()
        for one in held:
            one.result()
    server.idle()


def test_who_a_client_is():
    def address(host):
        return _address({"type": "http", "client": (host, 1) if host else None})

    assert address("192.0.2.7") == "192.0.2.7" != address("192.0.2.8")
    assert address("2001:db8::1") == address("2001:db8::ffff:1") != address("2001:db8:0:1::1")
    assert address(None) == "" and address("unix") == "unix"


def test_a_stream_that_is_not_read_stops_computing(server):
    """It gives its pages back and goes on when it is read, to the same answer."""
    options = body(messages=[user("describe the picture .", noise(seed=9))], max_tokens=400, ignore_eos=True)
    sent = json.dumps({**options, "temperature": 2.0, "n": 8, "seed": 3, "stream": True}).encode()
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    engine, address, answers = server.service.engine, httpx.URL(server.url), []
    for reads_late in (True, False):
        before = engine.engine.stats.tokens
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect((address.host, address.port))
            raw.sendall(head % CHAT.encode() + b"Content-Length: %d\r\n\r\n" % len(sent) + sent)
            if reads_late:
                wait_for(lambda: any(stream.paused for stream in engine._streams.values()))
                wait_for(lambda: not engine.engine.busy)
                assert engine.active == 8 and engine.engine.pool.available == engine.engine.pool.blocks
                tokens = engine.engine.stats.tokens
                time.sleep(0.3)
                assert engine.engine.stats.tokens == tokens < before + 8 * 400
                unread = next(iter(engine._streams.values())).unread
                assert async_engine.UNREAD < unread <= async_engine.UNREAD + 8
            received = b"".join(iter(lambda: raw.recv(65536), b""))
        pieces = re.findall(
            rb'"index":(\d),"finish_reason":[^,]+,"logprobs":null,"delta":\{"content":"(.*?)"\}', received
        )
        answers.append(
            {n: b"".join(text for index, text in pieces if index == n) for n in {index for index, _ in pieces}}
        )
        assert received.rstrip().endswith(b"0") and b"data: [DONE]" in received
    assert answers[0] == answers[1] and len(answers[0]) == 8
    server.idle()


def test_prepared_images_have_a_budget(serving, monkeypatch):
    """Half of it for one client, and half of the rest for the next; given back with the answers."""
    each = 3 * 56 * 56 * 4
    server = serving(prepared_bytes=5 * each)
    asked = [body(messages=[user("which shape ?", noise(seed=number))]) for number in range(6)]
    first, second = from_address("127.0.0.1", server), from_address("127.0.0.2", server)

    def gauge():
        gc.collect()
        return float(re.search(r"^quota_prepared_image_bytes (\S+)", httpx.get(f"{server.url}/metrics").text, re.M)[1])

    answer = first.post(CHAT, json=body(messages=[user("which shape ?", *(noise(seed=n) for n in range(3)))]))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "image_too_large"
    monkeypatch.setattr(server.service.engine.engine, "step", lambda: time.sleep(0.01) or [])
    with ThreadPoolExecutor(3) as threads:
        held = [threads.submit(first.post, CHAT, json=asked[number]) for number in range(2)]
        wait_for(lambda: gauge() == 2 * each)
        refused = first.post(CHAT, json=asked[2])
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "too_many_bytes"
        assert refused.headers["retry-after"]
        held.append(threads.submit(second.post, CHAT, json=asked[3]))
        wait_for(lambda: gauge() == 3 * each)
        assert second.post(CHAT, json=asked[4]).status_code == 429
        monkeypatch.undo()
        assert [one.result().status_code for one in held] == [200] * 3
    wait_for(lambda: gauge() == 0)
    assert first.post(CHAT, json=asked[2]).status_code == 200
    server.idle()


def test_clients_take_turns_at_a_lane():
    async def scenario():
        lane, order, gate = Lane("test"), [], threading.Event()
        first = asyncio.ensure_future(lane.run("crowd", 9, gate.wait, 20))
        await asyncio.sleep(0.05)
        jobs = [("crowd", 5), ("crowd", 1), ("crowd", 3), ("one", 900), ("other", 7), ("one", 8)]
        waiting = [asyncio.ensure_future(lane.run(client, size, order.append, (client, size))) for client, size in jobs]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *waiting)
        return order

    assert asyncio.run(scenario()) == [
        ("crowd", 1),
        ("one", 8),
        ("other", 7),
        ("crowd", 3),
        ("one", 900),
        ("crowd", 5),
    ]


def test_clients_take_turns_at_places():
    """Who has fewest is next; one that leaves while it waits, or as it gets a place, takes none."""

    async def scenario():
        places, order = Places(2), []

        async def hold(client, number, gate):
            async with places.one(client):
                order.append((client, number))
                await gate.wait()

        gates = [asyncio.Event() for _ in range(8)]
        tasks = [asyncio.ensure_future(hold("crowd", n, gates[n])) for n in range(5)]
        await asyncio.sleep(0)
        tasks += [asyncio.ensure_future(hold(client, n, gates[n])) for n, client in ((5, "one"), (6, "other"))]
        await asyncio.sleep(0)
        assert order == [("crowd", 0), ("crowd", 1)]
        tasks[2].cancel()
        gates[0].set()
        await asyncio.sleep(0.01)
        assert order[2:] == [("one", 5)]
        gates[1].set()
        tasks[6].cancel()
        await asyncio.sleep(0.01)
        assert order[3:] == [("crowd", 3)]
        for gate in gates:
            gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return places._free, order[4:]

    assert asyncio.run(scenario()) == (2, [("crowd", 4)])
