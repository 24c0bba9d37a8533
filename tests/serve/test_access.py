"""Who may ask, and in which form: keys, hosts, content types, headers, half-closed connections, the port, the log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import threading
import time

import httpx
import pytest

from benchmarks.serve.process import served
from quota.core.errors import UsageError
from quota.server import header_timeout, logs
from quota.server.app import create_app
from quota.server.config import Settings, settings
from quota.server.logs import CountingHandler
from quota.server.run import bound, serve
from tests.serve.test_faults import folder, wait_for  # noqa: F401

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "yes ?"}], "max_tokens": 4, "temperature": 0}


def connect(server):
    address = httpx.URL(server.url)
    return socket.create_connection((address.host, address.port), timeout=30)


def read_all(raw) -> bytes:
    return b"".join(iter(lambda: raw.recv(65536), b""))


def request(body: bytes, version: str = "1.1", extra: str = "") -> bytes:
    head = (
        f"POST /v1/chat/completions HTTP/{version}\r\nHost: localhost\r\nContent-Type:"
        f" application/json\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    )
    return head.encode() + body


# keys


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00k", b"two words\n", "schl\u00fcssel\n".encode()])
def test_a_key_file_that_lets_nobody_in_is_refused_at_start(tmp_path, content, monkeypatch):
    """Even on loopback, and before the model is loaded."""
    monkeypatch.setattr("quota.server.run.with_model", lambda made: pytest.fail("the model was loaded"))
    path = tmp_path / "keys"
    path.write_bytes(content)
    for file in (path, tmp_path / "none"):
        with pytest.raises(UsageError, match="api_key_file") as caught:
            serve(Settings(checkpoint="x", port=0, api_key_file=str(file)))
        assert "two words" not in str(caught.value)


def test_the_application_itself_refuses_keys_it_cannot_read(server, tmp_path):
    """Not at the first request."""
    broken = server.service.settings.model_copy(update={"api_key_file": str(tmp_path / "none")})
    service = type("Holder", (), {"settings": broken, "metrics": server.service.metrics})()
    with pytest.raises(UsageError, match="api_key_file"):
        create_app(service)


@pytest.mark.parametrize("value", ["", " ", ","])
def test_a_variable_without_keys_is_no_open_server(value):
    with pytest.raises(UsageError, match="QUOTA_SERVE_API_KEYS: set, but holds no key"):
        settings({"checkpoint": "x"}, None, {"QUOTA_SERVE_API_KEYS": value})


def test_keys_are_trimmed_and_empty_ones_refused(tmp_path):
    assert settings({"checkpoint": "x"}, None, {"QUOTA_SERVE_API_KEYS": " k1 , k2"}).accepted_keys() == ("k1", "k2")
    marked = tmp_path / "keys"
    marked.write_bytes(b"\xef\xbb\xbfk1\r\nk2\r\n")
    assert Settings(checkpoint="x", api_key_file=str(marked)).accepted_keys() == ("k1", "k2")
    file = tmp_path / "serve.toml"
    for text in ('api_keys = [""]', 'api_keys = ["secret-one", " "]', 'image_hosts = [""]'):
        file.write_text(f'checkpoint = "x"\n{text}\n')
        with pytest.raises(UsageError, match="empty entry") as caught:
            settings({}, file, {})
        assert "secret" not in str(caught.value)
    file.write_text('api_keys = ["secret-one"]\n')
    with pytest.raises(UsageError, match="checkpoint") as caught:
        settings({}, file, {})
    assert "secret" not in str(caught.value)
    file.write_bytes(b'\xef\xbb\xbfcheckpoint = "x"\n')
    assert settings({}, file, {}).checkpoint == "x"


# hosts and content types


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("[::2]", 403),
        ("", 403),
        ("127.0.0.1:9", 200),
        ("LOCALHOST", 200),
        ("[::1]:9", 200),
    ],
)
def test_on_loopback_only_its_own_names_pass(server, host, status):
    answer = httpx.get(f"{server.url}/health", headers={"host": host})
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "unknown_host"


def test_more_names_can_be_allowed():
    local = Settings(checkpoint="x", allowed_hosts=("quota.example", ".lan"))
    assert set(local.known_hosts) == {"127.0.0.1", "::1", "localhost", "quota.example", ".lan"}
    assert Settings(checkpoint="x", host="0.0.0.0").known_hosts is None
    assert Settings(checkpoint="x", host="0.0.0.0", allowed_hosts=("a",)).known_hosts == ("0.0.0.0", "a")


def test_names_below_an_allowed_one_pass(serving):
    wide = serving(allowed_hosts=("quota.example", ".lan"))
    for host, status in (("quota.example:80", 200), ("a.lan", 200), ("lan", 403), ("xquota.example", 403)):
        assert httpx.get(f"{wide.url}/health", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonp"],
)
def test_what_a_foreign_page_may_send_is_refused(server, kind):
    """Requests that browsers send across origins without asking first."""
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=json.dumps(BODY).encode(), headers={"content-type": kind}
    )
    assert answer.status_code == 415 and answer.json()["error"]["message"].startswith("content-type")


def test_json_with_a_charset_is_taken(server):
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", content=json.dumps(BODY).encode(), headers={"content-type": kind}
        )
        assert answer.status_code == 200


def test_nothing_redirects(server):
    for path in ("/health/", "/v1/chat/completions/", "//evil.example/"):
        assert httpx.get(server.url + path).status_code in (404, 405)


# heads, half-closed connections, refusals


@pytest.mark.parametrize("head", [b"X: " + b"x" * 100_000 + b"\r\n", b"a:\r\n" * 1000], ids=["long", "many"])
def test_headers_are_bounded_however_they_arrive(server, head):
    for pieces in (1, 7):
        with connect(server) as raw:
            data = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n"
            step = -(-len(data) // pieces)
            for at in range(0, len(data), step):
                raw.sendall(data[at : at + step])
                time.sleep(0.01)
            answer = read_all(raw)
        assert (
            b" 431 " in answer.split(b"\r\n")[0]
            and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"
        )


def test_a_second_head_on_the_same_connection_is_bounded_too(server):
    with connect(server) as raw:
        raw.sendall(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\nX: "
            + b"x" * 100_000
            + b"\r\n\r\n"
        )
        answer = read_all(raw)
    assert b" 200 " in answer.split(b"\r\n")[0] and b"431 Request Header" in answer


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_closed_its_side_is_answered(server, version):
    body = json.dumps({**BODY, "max_tokens": 200, "ignore_eos": True}).encode()
    with connect(server) as raw:
        raw.sendall(request(body, version))
        raw.shutdown(socket.SHUT_WR)
        answer = read_all(raw)
    assert b" 200 OK" in answer
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 200
    server.idle()


def test_two_requests_before_the_end_are_both_answered(server):
    with connect(server) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        raw.shutdown(socket.SHUT_WR)
        assert read_all(raw).count(b" 200 OK") == 2


def test_a_half_body_is_not_waited_for(server):
    with connect(server) as raw:
        raw.sendall(request(b"{}").replace(b"Length: 2", b"Length: 20"))
        raw.shutdown(socket.SHUT_WR)
        assert b" 200 " not in read_all(raw)


@pytest.mark.parametrize(
    ("extra", "status"), [("Content-Length: 99999999999", b" 413 "), ("Content-Length: 50000000\r\nHost: evil", b" 4")]
)
def test_a_refused_body_is_not_taken(server, extra, status):
    """The answer can be read, then the connection ends; what else is sent is not read."""
    with connect(server) as raw:
        raw.sendall(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
            f" application/json\r\n{extra}\r\n\r\n".encode()
        )
        assert status in read_all(raw).split(b"\r\n")[0]
        with pytest.raises(OSError):
            for _ in range(200):
                raw.sendall(bytes(1 << 20))


def test_an_answer_that_nobody_takes_ends_its_connection(server, monkeypatch):
    monkeypatch.setattr(header_timeout.HeaderTimeoutProtocol, "unread_s", 0.3)
    body = json.dumps(
        {**BODY, "max_tokens": 800, "n": 5, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
    ).encode()
    counted = server.service.metrics.http.labels("/v1/chat/completions", 200)._value.get
    before = counted()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(60)
        raw.connect((httpx.URL(server.url).host, httpx.URL(server.url).port))
        raw.sendall(request(body))
        wait_for(lambda: server.service.engine.active > 0)
        server.idle()
        wait_for(lambda: counted() > before, 60)
        time.sleep(1.5)
        found = bytearray()
        with contextlib.suppress(ConnectionError):
            while piece := raw.recv(1 << 20):
                found += piece
    length = int(re.search(rb"content-length: (\d+)", found)[1])
    assert length > len(found)


# port and log


def test_a_port_in_use_is_found_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("quota.server.run.with_model", lambda made: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port: 127.0.0.1:{port} cannot be listened on"):
            serve(Settings(checkpoint="x", port=port))
    with pytest.raises(UsageError, match="cannot be listened on"):
        bound("no.such.host.invalid", 80)


def test_a_log_file_that_cannot_be_opened_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "none" / "log", tmp_path / "fifo"):
        with pytest.raises(UsageError, match="log_file"):
            CountingHandler(str(path))


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, "", 0, text, (), None)


def test_a_log_that_nobody_reads_blocks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "_LEAVE_S", 0.2)
    read, write = os.pipe()
    handler = CountingHandler(f"/dev/fd/{write}")
    try:
        sender = threading.Thread(
            target=lambda: [handler.handle(record("x" * 100)) for _ in range(10_000)], daemon=True
        )
        sender.start()
        sender.join(60)
        assert not sender.is_alive() and handler.lost > 0
        found = bytearray()

        def reads() -> None:
            while data := os.read(read, 1 << 20):
                found.extend(data)

        threading.Thread(target=reads, daemon=True).start()
        wait_for(lambda: handler._lines.unfinished_tasks == 0)
        handler.handle(record("last"))
        wait_for(lambda: b'"last"' in found)
        lost = [json.loads(line)["lost"] for line in found.splitlines() if b"lines were lost" in line]
        assert sum(lost) == handler.lost
    finally:
        handler.close()
        os.close(write)


def test_a_log_is_opened_again(tmp_path):
    handler = CountingHandler(str(tmp_path / "log"))
    handler.handle(record("one"))
    handler.flush()
    (tmp_path / "log").rename(tmp_path / "old")
    handler.reopen()
    handler.handle(record("two"))
    handler.close()
    assert '"one"' in (tmp_path / "old").read_text() and '"two"' in (tmp_path / "log").read_text() and handler.lost == 0


def test_long_lines_are_cut(tmp_path):
    handler = CountingHandler(str(tmp_path / "log"))
    handler.handle(record("x" * 10_000_000))
    handler.handle(record("\ud800"))
    handler.close()
    assert (tmp_path / "log").stat().st_size < 40_000 and handler.lost == 0


@pytest.mark.slow
def test_hangup_and_an_unread_log_end_nothing(folder, tmp_path):  # noqa: F811
    """Standard error is a pipe that nobody reads; SIGHUP goes on, SIGTERM ends with status 0."""
    read, write = os.pipe()
    try:
        with (
            served(folder, "--threads", "1", "--kv-bytes", "4M", log=None, stderr=write) as server,
            httpx.Client(base_url=server.url, timeout=30) as http,
        ):
            for _ in range(1500):
                assert http.get("/health").status_code == 200
            server.process.send_signal(signal.SIGHUP)
            assert http.post("/v1/chat/completions", json=BODY).status_code == 200
            server.process.terminate()
            assert server.process.wait(60) == 0
    finally:
        os.close(read)
        os.close(write)
