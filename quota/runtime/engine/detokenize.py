"""Tokens to text as they come, and stop texts that never leak."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # how byte-level vocabularies write bytes
_BYTE = re.compile(r"<0x([0-9A-F]{2})>\Z")  # how sentencepiece's do
_REPLACEMENT = "\ufffd"  # a tokenizer's answer to bytes that do not make a character yet


class Detokenizer:
    """Decodes one answer piece by piece: what `push` and `flush` return, joined, is `tokenizer.decode` of all tokens.

    Tokens are decoded together with those before them, from the last place where the text was settled, because a
    tokenizer may join or space a token by its neighbours.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._settled = 0  # tokens before it only give context
        self._given = 0  # tokens whose text was returned

    def push(self, token: int) -> str:
        """The text that became certain with this token; "" while a character is incomplete."""
        self._tokens.append(token)
        return self._read(final=False)

    def flush(self) -> str:
        """What is left at the end."""
        return self._read(final=True)

    def peek(self, token: int, final: bool = False) -> str:
        """What `push(token)` would return, with `flush()` after it where it is the last; changes nothing."""
        return self._news([*self._tokens[self._settled :], token], final) or ""

    def utf8(self, token: int) -> bytes | None:
        """UTF-8 of what `token` would add, its share where several tokens make a character; None for one that adds
        nothing, as special ones."""
        own = None
        if self._given < len(self._tokens) or not self.peek(token):
            own = self._own_bytes(token)
        return own or self.peek(token).lstrip(_REPLACEMENT).encode() or None

    def name(self, token: int) -> str:
        """The text `token` would add, or its name in the vocabulary where it would add none."""
        return self.peek(token) or str(self.tokenizer.convert_ids_to_tokens(token) or "")

    def _own_bytes(self, token: int) -> bytes | None:
        """What a vocabulary of bytes says of a token; None where it does not."""
        name = str(self.tokenizer.convert_ids_to_tokens(token) or "")
        if found := _BYTE.match(name):
            data = bytes([int(found[1], 16)])
        elif all(character in _BYTES for character in name):
            data = bytes(_BYTES[character] for character in name)
        else:
            return None
        return data if data.decode(errors="replace") == self._decode([token]) else None

    def _read(self, final: bool) -> str:
        news = self._news(self._tokens[self._settled :], final)
        if news is None:
            return ""
        if news:  # a special token has no text and is no context
            self._settled = self._given
        self._given = len(self._tokens)
        return news

    def _news(self, unsettled: Sequence[int], final: bool) -> str | None:
        """Text of the tokens from the settled ones on that was not returned yet; None while it may still change.

        A wrong byte turns the whole run that it ends into U+FFFD, characters that were returned too: those stay."""
        before, now = self._decode(self._tokens[self._settled : self._given]), self._decode(unsettled)
        changed = not now.startswith(before) and _REPLACEMENT not in now
        if not final and (now.endswith(_REPLACEMENT) or changed):
            return None
        return now[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""


class StopStrings:
    """Passes text on, but never a part of a stop text: what may be the beginning of one is held back until it is
    certain.

    Every character is looked at once, however long the stop texts are and wherever the text is cut (Knuth, Morris and
    Pratt, SIAM J. Comput. 6, 1977). Of stop texts that end at the same character the longest counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""
        self._borders = [_borders(stop) for stop in self.stops]
        self._matched = [0] * len(self.stops)  # characters of each that the text ends with

    def push(self, text: str) -> str:
        """Text that may be shown; after a stop text was seen, `found` is set and only what came before it is
        returned."""
        if not self.stops or self.found:
            return "" if self.found else text
        known, self._held = len(self._held), self._held + text
        for place, character in enumerate(text, known + 1):
            ended = 0
            for number, stop in enumerate(self.stops):
                borders, matched = self._borders[number], self._matched[number]
                while matched and stop[matched] != character:
                    matched = borders[matched - 1]
                matched += stop[matched] == character
                if matched == len(stop):
                    ended = max(ended, matched)
                    matched = 0
                self._matched[number] = matched
            if ended:
                self.found = True
                return self._held[: place - ended]
        certain = len(self._held) - max(self._matched)
        shown, self._held = self._held[:certain], self._held[certain:]
        return shown

    def flush(self) -> str:
        """What was held back, at an end that is no stop text."""
        held, self._held = self._held, ""
        return "" if self.found else held


def _borders(text: str) -> list[int]:
    """For each prefix of the text, how long its longest proper prefix is that is also its end."""
    borders, matched = [0] * len(text), 0
    for place in range(1, len(text)):
        while matched and text[matched] != text[place]:
            matched = borders[matched - 1]
        matched += text[matched] == text[place]
        borders[place] = matched
    return borders
