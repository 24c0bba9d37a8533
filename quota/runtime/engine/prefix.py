"""Names for the content of pages: equal names, equal keys and values, bit for bit.

Keys and values of a token are a function of the tokens before it: word ids and the content of images. In a segment
that lost visual tokens they are, from the first token of an image on, also a function of what was chosen, that is of
the recipe and of the tokens it was chosen by. So a name is a hash chain over the page's tokens, and where something was
dropped the recipe and the selecting tokens enter it. Where the tokens of a prompt see each other, all of them do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

Content = np.ndarray  # int64 [tokens, 3]: word id, 0, 0; or place in the image, and two words of the image's digest


def digest(data: bytes) -> bytes:
    """16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def content_of(ids: Sequence[int], shown: np.ndarray, images: Sequence[tuple[bytes, int]]) -> Content:
    """shown bool [tokens]: those that hold features of images; images: digest of 16 bytes and number of tokens of each,
    in order."""
    content = np.zeros((len(ids), 3), dtype=np.int64)
    content[:, 0] = ids
    rows = [_picture_rows(name, tokens) for name, tokens in images]
    if rows:
        content[shown] = np.concatenate(rows)
    return content


def _picture_rows(name: bytes, tokens: int) -> Content:
    rows = np.empty((tokens, 3), dtype=np.int64)
    rows[:, 0] = np.arange(tokens)
    rows[:, 1:] = np.frombuffer(name, dtype=np.int64)
    rows[:, 1] |= 1  # never the two zeros of a word
    return rows


class PageNames:
    """Names of the pages of one request in one segment, in order; grows with the answer.

    chosen: None where the segment holds every token, else (first token of an image, tokens dropped, selecting tokens,
    digest of the recipe).
    """

    def __init__(
        self, segment: str, page_size: int, prompt: Content, chosen: tuple[int, int, int, bytes] | None
    ) -> None:
        self.page_size = page_size
        self._last = digest(segment.encode())
        self._names: list[bytes] = []
        rows = prompt if chosen is None else _after_drop(prompt, *chosen)
        full = len(rows) // page_size * page_size
        for first in range(0, full, page_size):
            self._name(rows[first : first + page_size])
        self._rest: list[list[int]] = rows[full:].tolist()

    def append(self, token: int) -> None:
        """A new word of the answer."""
        self._rest.append([token, 0, 0])
        if len(self._rest) == self.page_size:
            self._name(np.array(self._rest, dtype=np.int64))
            self._rest = []

    def __getitem__(self, page: int) -> bytes:
        return self._names[page]

    def __len__(self) -> int:
        """Pages that are full."""
        return len(self._names)

    def _name(self, rows: Content) -> None:
        self._last = digest(self._last + rows.tobytes())
        self._names.append(self._last)


def _after_drop(prompt: Content, first_shown: int, dropped: int, selecting: int, recipe: bytes) -> Content:
    """Which tokens follow the first of an image is not known yet, but what decides it is."""
    choice = np.frombuffer(digest(recipe + prompt[:selecting].tobytes()), dtype=np.int64)
    chosen = np.empty((selecting - dropped - first_shown, 3), dtype=np.int64)
    chosen[:, 0] = -1 - np.arange(len(chosen))
    chosen[:, 1:] = choice
    return np.concatenate([prompt[:first_shown], chosen, prompt[selecting:]])
