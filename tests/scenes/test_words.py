"""Text goes through the embedded tokenizer and comes back."""

from __future__ import annotations

import pytest

from quota.scenes.model import build_tokenizer


@pytest.mark.parametrize(
    "text", ["top left", "red heart top left , blue star bottom right", "what color is the star ?"]
)
def test_words_come_back_with_their_spaces(text: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
