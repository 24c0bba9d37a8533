"""Text that comes in pieces, stop texts, sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from quota.core.errors import UsageError
from quota.runtime.engine.detokenize import Detokenizer, StopStrings
from quota.runtime.engine.logprobs import LogprobBuffer
from quota.runtime.engine.prefix import PageNames, content_of
from quota.runtime.engine.request import SamplingParams, TokenLogprob
from quota.runtime.engine.sampling import Logits, logprobs, sample_token, uniform
from quota.scenes.model import build_tokenizer
from tests.engine.tokenizers import byte_tokenizer

TOKENIZERS = [build_tokenizer(), byte_tokenizer()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["words", "bytes"])
@given(data=st.data())
@settings(max_examples=150)
def test_pieces_join_to_the_whole(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    detokenizer = Detokenizer(tokenizer)
    seen = [(detokenizer.peek(token), detokenizer.push(token)) for token in ids]
    assert all(peeked == pushed for peeked, pushed in seen)
    assert "".join([*(pushed for _, pushed in seen), detokenizer.flush()]) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


def test_characters_come_whole():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a é 🙂 b", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    assert [(detokenizer.utf8(token), detokenizer.push(token)) for token in ids] == [
        (b"a", "a"),
        (b" ", " "),
        (b"\xc3", ""),
        (b"\xa9", "é"),
        (b" ", " "),
        (b"\xf0", ""),
        (b"\x9f", ""),
        (b"\x99", ""),
        (b"\x82", "🙂"),
        (b" ", " "),
        (b"b", "b"),
    ]


def test_a_wrong_byte_after_a_character_holds_nothing_up():
    """sentencepiece's decoder turns the character before it into U+FFFD too; the text goes on with the next token."""
    names = ["<unk>", "<0xC4>", "<0xAE>", "<0xB5>", "\u2581i"]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))
    assert [(detokenizer.utf8(token), detokenizer.push(token)) for token in (1, 2, 3, 4, 4)] == [
        (b"\xc4", ""),
        (b"\xae", "\u012e"),
        (b"\xb5", ""),
        (b" i", "\ufffd\ufffd i"),
        (b" i", " i"),
    ]


def test_a_special_token_has_a_name_and_no_text():
    for tokenizer in TOKENIZERS:
        detokenizer = Detokenizer(tokenizer)
        assert (detokenizer.peek(tokenizer.eos_token_id), detokenizer.utf8(tokenizer.eos_token_id)) == ("", None)
        assert detokenizer.name(tokenizer.eos_token_id) == tokenizer.eos_token


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_entries_come_with_their_text(pieces, stops):
    """Never before it, and at the end they are the answer."""
    watch, entries, shown, given = StopStrings(stops), LogprobBuffer(), "", ""
    for place, piece in enumerate(pieces):
        text = watch.push(piece) + (watch.flush() if place == len(pieces) - 1 else "")
        shown += text
        for entry in entries.push(TokenLogprob(place, piece, piece.encode(), -1.0), text, watch.found):
            given += entry.text
            assert entry.utf8 == entry.text.encode() and pieces[entry.token].startswith(entry.text)
        assert shown.startswith(given)
        if watch.found:
            break
    assert given == shown


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_texts_never_leak(pieces, stops):
    watch, whole = StopStrings(stops), "".join(pieces)
    shown = ""
    for piece in pieces:
        shown += watch.push(piece)
        assert whole.startswith(shown)
    shown += watch.flush()
    found = [whole.find(stop) for stop in stops if stop in whole]
    assert watch.found == bool(found)
    assert not any(stop in shown for stop in stops)
    assert shown == whole if not found else whole.startswith(shown)


def test_text_before_a_stop_is_complete():
    watch = StopStrings(["</end>"])
    assert [watch.push(t) for t in ("x <", "/en", "q </", "end> y")] == ["x ", "", "</enq ", ""]
    assert watch.found and watch.flush() == ""


class Counted(str):
    """Counts how often somebody looks at its characters."""

    looks = 0

    def __getitem__(self, key):
        Counted.looks += 1
        return super().__getitem__(key)


def test_stop_texts_are_matched_in_linear_time():
    """The old watch compared every beginning of the stop text at every token."""
    stop, text = Counted("ab" * 500 + "x"), "ab" * 5000
    watch, Counted.looks = StopStrings([stop]), 0
    shown = "".join(watch.push(character) for character in text)
    assert Counted.looks < 3 * len(text) and len(text) - 1001 <= len(shown) <= len(text)
    assert shown + watch.flush() == text


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(1, 7),
)
def test_where_a_text_is_cut_changes_nothing(text, stops, size):
    whole, pieces = StopStrings(stops), StopStrings(stops)
    want = whole.push(text)
    got = "".join(pieces.push(text[at : at + size]) for at in range(0, len(text), size))
    assert (got + pieces.flush(), pieces.found) == (want + whole.flush(), whole.found)


def test_stop_texts_have_a_length():
    SamplingParams(stop=("x" * 1024,))
    for wrong in (("x" * 1025,), ("",), ("x",) * 17):
        with pytest.raises(UsageError, match="stop: expected at most 16 texts of 1 to 1024 characters"):
            SamplingParams(stop=wrong)


def test_greedy_and_limits():
    x = np.array([0.0, 3.0, 3.0, 1.0], dtype=np.float32)
    (row,) = Logits(torch.from_numpy(x)[None], torch.from_numpy(x)[None].argmax(-1)).rows(1)
    assert row.likeliest == 1 == sample_token(x, SamplingParams(temperature=1.0, top_k=1), 5, 0)
    assert (row.values == x).all()
    drawn = {sample_token(x, SamplingParams(temperature=1.0, top_k=2), 5, place) for place in range(50)}
    assert drawn == {1, 2}
    assert {sample_token(x, SamplingParams(temperature=1.0, top_p=0.01), 5, place) for place in range(20)} == {1}
    assert sample_token(np.array([1e4, -1e4], dtype=np.float32), SamplingParams(temperature=1e-3), 5, 0) == 0


def test_samples_follow_the_distribution():
    x = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    counts = (
        np.bincount(
            [sample_token(x, SamplingParams(temperature=1.0), 11, place) for place in range(20_000)], minlength=4
        )
        / 20_000
    )
    assert np.abs(counts - [0.1, 0.2, 0.3, 0.4]).max() < 0.015
    cut = (
        np.bincount(
            [sample_token(x, SamplingParams(temperature=1.0, top_p=0.65), 11, place) for place in range(20_000)],
            minlength=4,
        )
        / 20_000
    )
    assert np.abs(cut - [0, 0, 3 / 7, 4 / 7]).max() < 0.015
    assert all(0 <= uniform(seed, place) < 1 for seed in range(50) for place in range(50))


def test_logprobs_sum_to_one():
    x = np.random.default_rng(0).normal(size=50).astype(np.float32)
    own, top = logprobs(x, 3, 50)
    assert abs(sum(np.exp(value) for _, value in top) - 1) < 1e-9 and dict(top)[3] == own
    assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"stop": ("",)},
        {"logprobs": 21},
        {"seed": 2**63},
    ],
)
def test_sampling_out_of_range(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_names_of_pages():
    """Equal content, equal names; the first difference changes every name from there on; what was dropped depends on
    recipe and question."""
    visual = np.array([False, False, True, True, True, True, False, False, False])
    ids, picture = [1, 2, 9, 9, 9, 9, 3, 4, 5], [(b"p" * 16, 4)]

    def names(ids=ids, picture=picture, chosen=None):
        made = PageNames("0", 2, content_of(ids, visual, picture), chosen)
        return [made[i] for i in range(len(made))]

    base = names()
    assert len(base) == 4 and names() == base
    other = names(picture=[(b"q" * 16, 4)])
    assert other[0] == base[0] and all(a != b for a, b in zip(other[1:], base[1:], strict=True))
    dropped = names(chosen=(2, 2, 8, b"recipe"))
    assert len(dropped) == 3 and dropped[0] == base[0] and not set(dropped[1:]) & set(base)
    for changed in (
        names(chosen=(2, 2, 8, b"another")),
        names(ids=[1, 2, 9, 9, 9, 9, 3, 7, 5], chosen=(2, 2, 8, b"recipe")),
    ):
        assert changed[0] == base[0] and not set(changed[1:]) & set(dropped)
    grown = PageNames("0", 2, content_of(ids, visual, picture), None)
    grown.append(6)
    assert len(grown) == 5 and grown[3] == base[3]
