"""The page at /demo: static, self-contained, open without a key; and in a real browser, where there is one."""

from __future__ import annotations

import io
import re
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.serve.pictures import noise, user
from tests.serve.test_contract import ask
from tests.waiting import PATIENCE_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser_test = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or find_spec("playwright") is None, reason="needs Chromium and playwright (make browser)"
    ),
]


def test_files_come_with_a_strict_policy(server: Any) -> None:
    for path, kind in (("/demo", "html"), ("/demo/style.css", "css"), ("/demo/page.js", "javascript")):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 200 and kind in answer.headers["content-type"]
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert not re.search(r"https?://", answer.text), "nothing comes from elsewhere"
    for path in ("/demo/other.js", "/demo/..%2fapp.py", "/demo/samples/x.png", "/demo/samples/-1.png"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url", path


def test_markup_has_nothing_inline_and_all_that_the_script_names(server: Any) -> None:
    page, script = (httpx.get(server.url + path).text for path in ("/demo", "/demo/page.js"))
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", page)
    ids = set(re.findall(r'\sid="([\w-]+)"', page))
    named = set(re.findall(r'byId\("([\w-]+)"\)', script))
    assert named and named <= ids and {"left-answer", "right-answer", "left-facts", "right-facts"} <= ids
    labelled = set(re.findall(r'<label for="([\w-]+)"', page))
    for tag, rest in re.findall(r"<(input|select|textarea)\s([^>]*)>", page):
        name = re.search(r'id="([\w-]+)"', rest)
        assert name and (name[1] in labelled or "aria-label=" in rest), f"{tag} without a label"


def test_samples_are_images_with_questions(server: Any) -> None:
    first, again, next_ = (httpx.get(f"{server.url}/demo/samples/{n}.png") for n in (0, 0, 1))
    assert first.content == again.content and first.content != next_.content
    assert first.headers["x-question"].endswith("?")
    assert Image.open(io.BytesIO(first.content)).size == (336, 336)


def test_the_page_needs_no_key_and_what_it_asks_does(serving: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    running = serving(api_key_file=str(keys))
    assert httpx.get(f"{running.url}/demo").status_code == httpx.get(f"{running.url}/demo/page.js").status_code == 200
    for path in ("/v1/quota/preview", "/v1/chat/completions"):
        assert httpx.post(running.url + path, json={}).status_code == 401
    assert httpx.get(f"{running.url}/demonstration").status_code == 401


def test_kept_tokens_are_reported_on_request(server: Any) -> None:
    question = user("describe the picture .", noise(seed=6))
    assert "kept" not in ask(server, question).usage.quota
    for _ in range(2):  # the second finds the pages of the first, and still says which tokens stay
        quota = ask(server, question, extra_body={"return_kept": True}).usage.quota
        by_layer, total = quota["visual_tokens_by_layer"], quota["visual_tokens"]
        assert quota["kept"], "the recipe drops tokens"
        for layer, tokens in quota["kept"].items():
            assert len(tokens) == by_layer[int(layer)] and tokens == sorted(set(tokens))
            assert tokens[0] >= 0 and tokens[-1] < total
    assert ask(server, question, extra_body={"return_kept": True, "recipe": "none"}).usage.quota["kept"] == {}


@pytest.fixture(scope="module")
def page(server: Any) -> Iterator[Any]:
    """/demo in headless Chromium; what the console said is in `page.said`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        made = browser.new_context().new_page()
        made.set_default_timeout(1000 * PATIENCE_S)
        made.said = []
        made.on("console", lambda message: made.said.append(message.text))
        made.on("pageerror", lambda error: made.said.append(str(error)))
        made.goto(f"{server.url}/demo")
        made.wait_for_selector("#layers span")
        yield made
        browser.close()


def until(good: Callable[[], Any]) -> None:
    """Poll from here: the page's policy forbids the evaluation that playwright's own waiting needs."""
    ends = time.monotonic() + PATIENCE_S
    while not good():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.05)


class TestInABrowser:
    pytestmark = browser_test

    def test_it_asks_both_and_shows_what_was_kept(self, page: Any) -> None:
        page.fill("#question", "describe the picture .")
        page.click("#send")
        until(lambda: page.text_content("#status") == "done")
        assert page.text_content("#left-answer") and page.text_content("#right-answer")
        assert "16 → 5" in page.text_content("#right-facts") and "16 → 16" in page.text_content("#left-facts")
        page.locator("#layer").fill("3")
        assert "5 of its 16 visual tokens are alive in layer 3" in page.get_attribute("#image", "aria-label")
        assert page.said == []

    def test_dragging_previews_without_asking(self, page: Any, server: Any) -> None:
        steps = server.service.engine.engine.stats.steps
        page.evaluate("byId('keep').value = 50; byId('keep').dispatchEvent(new Event('input'))")
        until(lambda: "8 are left in the last layer" in page.get_attribute("#layers", "aria-label"))
        assert server.service.engine.engine.stats.steps == steps

    def test_the_address_holds_the_setting(self, page: Any, server: Any) -> None:
        page.click("#send")
        until(lambda: page.text_content("#status") == "done")
        again = page.context.new_page()
        again.goto(page.url)
        again.wait_for_selector("#layers span")
        assert again.input_value("#question") == "describe the picture ." and again.input_value("#keep") == "50"
        again.close()

    def test_the_same_bits_in_a_batch(self, page: Any) -> None:
        page.click("#bits")
        until(lambda: "asking" not in page.text_content("#status"))
        assert page.text_content("#status").startswith("same bits"), page.text_content("#error")

    def test_an_error_is_shown(self, page: Any) -> None:
        page.fill("#question", "<image>")
        page.click("#send")
        until(lambda: page.text_content("#error"))
        assert "image" in page.text_content("#error") and page.text_content("#status") == ""
