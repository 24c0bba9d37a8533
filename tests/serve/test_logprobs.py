"""The texts of `logprobs` are the answer's, for tokenizers that join words by spaces, write bytes, or fall back to
them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from quota.scenes.vocabulary import WORDS
from quota.server.config import Settings
from quota.server.service import Service
from tests.serve.conftest import Host, Running
from tests.serve.pictures import noise, user

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
LETTERS = "abcdefghijklmnop"
HALVES = [*range(0xC3, 0xC7), *range(0xA0, 0xC0)]  # leading and following bytes of letters such as é
OPTIONS = {"temperature": 1.5, "max_tokens": 60, "seed": 3, "extra_body": {"ignore_eos": True}}


def byte_level() -> PreTrainedTokenizerFast:
    names = [*SPECIAL, *(bytes_to_unicode()[byte] for byte in HALVES), *(f"Ġ{letter}" for letter in LETTERS), *LETTERS]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _fast(tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    names = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in HALVES),
        *(f"▁{letter}" for letter in LETTERS),
        "▁",
        *LETTERS[:-1],
    ]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    assert len(made) <= len(WORDS)
    return made


@pytest.fixture(scope="module", params=["words", "bytes", "sentencepiece"])
def speaking(request: Any, model: Any) -> Iterator[Running]:
    """The tiny model with one of the tokenizers."""
    made = copy.copy(model)
    if request.param != "words":
        tokenizer = byte_level() if request.param == "bytes" else sentencepiece()
        made.processor = LlavaProcessor(
            image_processor=model.processor.image_processor,
            tokenizer=tokenizer,
            patch_size=model.processor.patch_size,
            vision_feature_select_strategy="default",
            chat_template=model.processor.chat_template,
            num_additional_image_tokens=1,
        )
    host = Host(Service(made, Settings(checkpoint="tiny", kv_bytes=4 << 20, page_tokens=4)))
    yield host.running
    host.stop()


def chat(server: Running, **options: Any) -> Any:
    return server.client.chat.completions.create(
        model="tiny", messages=[user("describe the picture .", noise(seed=6))], **{**OPTIONS, **options}
    )


def complete(server: Running, **options: Any) -> Any:
    return server.client.completions.create(model="tiny", prompt=[1, 9, 12], **{**OPTIONS, **options})


def outline(text: str) -> str:
    """Without what decoders read differently: sentencepiece's shows a run of bytes as nothing but U+FFFD where one of
    them is wrong."""
    return re.sub(r"[^\x00-\x7f]+", "?", text)


def test_texts_of_tokens_join_to_the_answer(speaking: Running) -> None:
    for choice in chat(speaking, n=4, logprobs=True, top_logprobs=3).choices:
        entries, content = choice.logprobs.content, choice.message.content
        assert len(entries) == 60 and "".join(entry.token for entry in entries) == content
        assert outline(b"".join(bytes(entry.bytes or []) for entry in entries).decode(errors="replace")) == outline(
            content
        )
        assert len(content) > 60 and " " in content
        assert all(
            entry.bytes == list(entry.token.encode())
            for entry in entries
            if "\ufffd" not in entry.token and entry.token.isascii() and entry.token
        )
        for entry in entries:
            values = [other.logprob for other in entry.top_logprobs]
            assert len(values) == 3 and values == sorted(values, reverse=True) and entry.logprob <= values[0] <= 0
            assert all(
                other.token or other.logprob == entry.logprob for other in entry.top_logprobs
            )  # only a chosen token may have no text
    assert chat(speaking).choices[0].logprobs is None


def test_streamed_entries_are_the_same_and_never_ahead_of_their_text(speaking: Running) -> None:
    options = {"n": 3, "logprobs": True, "top_logprobs": 1}
    whole = chat(speaking, **options).choices
    texts, entries = [""] * 3, [[], [], []]
    for chunk in chat(speaking, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            entries[choice.index] += choice.logprobs.content if choice.logprobs else []
            assert texts[choice.index].startswith("".join(entry.token for entry in entries[choice.index]))
    assert texts == [choice.message.content for choice in whole]
    assert entries == [choice.logprobs.content for choice in whole]


def test_offsets_are_where_the_texts_are(speaking: Running) -> None:
    whole = complete(speaking, logprobs=2, n=2).choices
    streamed: list[list[tuple[str, int]]] = [[], []]
    for chunk in complete(speaking, logprobs=2, n=2, stream=True):
        for choice in chunk.choices:
            report = choice.logprobs
            streamed[choice.index] += zip(report.tokens, report.text_offset, strict=True) if report else []
    for choice, pieces in zip(whole, streamed, strict=True):
        report = choice.logprobs
        assert "".join(report.tokens) == choice.text and len(report.tokens) == len(report.token_logprobs) == 60
        assert report.text_offset == list(accumulate((len(token) for token in report.tokens[:-1]), initial=0))
        assert pieces == list(zip(report.tokens, report.text_offset, strict=True))
        for token, value, top in zip(report.tokens, report.token_logprobs, report.top_logprobs, strict=True):
            assert top[token] == value and 2 <= len(top) <= 3  # the token itself is always there


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_cuts_the_entries_too(speaking: Running, stream: bool) -> None:
    full = complete(speaking).choices[0].text
    stop = full[20:26]  # begins and ends inside tokens
    cut = full[: full.index(stop)]
    if stream:
        chunks = [chunk.choices[0] for chunk in complete(speaking, stop=stop, logprobs=0, stream=True)]
        text = "".join(chunk.text for chunk in chunks)
        tokens = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens]
        offsets = [offset for chunk in chunks if chunk.logprobs for offset in chunk.logprobs.text_offset]
    else:
        answer = complete(speaking, stop=stop, logprobs=0).choices[0]
        text, tokens, offsets = answer.text, answer.logprobs.tokens, answer.logprobs.text_offset
    assert text == "".join(tokens) == cut and all(
        text[offset:].startswith(token) for token, offset in zip(tokens, offsets, strict=True)
    )


def test_characters_of_several_tokens(speaking: Running, request: pytest.FixtureRequest) -> None:
    """One token has the character, each has its own byte."""
    if "words" in request.node.callspec.params.values():
        entries = chat(speaking, logprobs=True).choices[0].logprobs.content
        assert sum(entry.token.startswith(" ") for entry in entries) > 40 and entries[0].token[:1] != " "
        return
    entries = [entry for choice in chat(speaking, n=8, logprobs=True).choices for entry in choice.logprobs.content]
    entries = [entry for entry in entries if entry.bytes]  # a special token may stand between the two
    pairs = [(a, b) for a, b in pairwise(entries) if b.token and not b.token.isascii() and "\ufffd" not in b.token]
    assert pairs
    for first, second in pairs:
        assert (
            first.token == ""
            and len(first.bytes) == len(second.bytes) == 1
            and bytes(first.bytes + second.bytes).decode() == second.token
        )


def test_greedy_answers_are_the_first_alternatives(speaking: Running) -> None:
    for entry in chat(speaking, temperature=0, logprobs=True, top_logprobs=2).choices[0].logprobs.content:
        best = entry.top_logprobs[0]
        assert (best.token, best.bytes, best.logprob) == (entry.token, entry.bytes, entry.logprob)


def test_alternatives_without_a_text_have_their_names(speaking: Running) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(speaking, logprobs=True, top_logprobs=21)
    entries = chat(speaking, n=8, logprobs=True, top_logprobs=20).choices
    named = [
        other
        for choice in entries
        for entry in choice.logprobs.content
        for other in entry.top_logprobs
        if other.token in SPECIAL
    ]
    assert named and all(other.bytes is None for other in named)
