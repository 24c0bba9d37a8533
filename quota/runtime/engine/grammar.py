"""Answers that are JSON of a schema: which tokens may come next, found by llguidance."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np

from quota.core.errors import UsageError

MAX_SCHEMA_CHARACTERS = 1 << 16
_MOST_COMPILED = 64


class Matcher:
    """One answer on its way through a schema."""

    def __init__(self, state: Any, vocabulary: int) -> None:
        self._state, self._vocabulary = state, vocabulary

    def allowed(self) -> np.ndarray:
        """bool [N]: tokens that may come next; the end tokens alone once the value is complete."""
        mask = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(mask, count=self._vocabulary, bitorder="little").astype(bool)

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        self._state.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._state.is_error():
            raise UsageError(f"json_schema: {self._state.get_error()}")


class Grammars:
    """The schemas of one tokenizer, compiled; the newest are kept. Threads may share it.

    vocabulary: N, logits of a row. ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Iterable[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._lock = threading.Lock()
        self._wrapped: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, schema: str) -> Matcher:
        """schema: JSON text. UsageError for one that is no schema or uses what is not supported, for a tokenizer whose
        tokens are not made of bytes, and where llguidance is not installed."""
        with self._lock:
            state = self._compiled.get(schema)
            if state is None:
                state = self._compiled[schema] = self._compile(schema)
                if len(self._compiled) > _MOST_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(schema)
            return Matcher(state.deep_copy(), self._vocabulary)

    def prepare(self) -> None:
        """Read the vocabulary now, where it can be: a second for 50 000 tokens, which no request then waits for."""
        with self._lock, suppress(UsageError, ImportError):
            self._tokens()

    def _compile(self, schema: str) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise UsageError("json_schema: needs llguidance: pip install -e '.[serve]' in the clone") from error
        if len(schema) > MAX_SCHEMA_CHARACTERS:
            raise UsageError(f"json_schema: {len(schema)} characters, the limit is {MAX_SCHEMA_CHARACTERS}")
        tokenizer = self._tokens()
        grammar = LLMatcher.grammar_from_json_schema(schema)
        found = LLMatcher.validate_grammar(grammar, tokenizer)
        if found:
            raise UsageError(f"json_schema: {' '.join(str(found).split())}")
        return LLMatcher(tokenizer, grammar)

    def _tokens(self) -> Any:
        if self._wrapped is None:
            from llguidance.hf import from_tokenizer

            if self._tokenizer is None:
                raise UsageError("json_schema: this engine has no tokenizer")
            try:
                self._wrapped = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends or None)
            except ValueError as error:
                raise UsageError(
                    f"json_schema: the tokens of this model's tokenizer are not made of bytes ({error}), so no text"
                    " can be forced"
                ) from error
        return self._wrapped
