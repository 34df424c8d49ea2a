"""Stop strings in responses that grow token by token: found across tokens and within one, without decoding all of a response at each.

Decoding the end of a response may differ from the end of the decoded response: a character can be split over tokens, and a
leading space is dropped. So an end is decoded only to suspect a stop string; the whole text, decoded once, decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.tasks.prompts import check_stop_strings
from megatron_ext.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what a part of a character decodes to
CONTEXT_TOKENS = 4  # before the place where a stop string can begin: a character has at most 4 bytes, and a token at least one


@dataclass(frozen=True)
class _Token:
    """What matters of a token's text: whether a stop string can end in it, and whether it has any."""

    may_end: bool
    empty: bool


class StopStrings:
    """Finds some stop strings; one object for all responses that they end."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        """`ConfigError` where the tokenizer cannot produce one of them."""
        check_stop_strings(tokenizer, strings)
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        self._last_characters = {string[-1] for string in strings}
        self._split = any(not last.isascii() for last in self._last_characters)  # a part of a character may complete one of them
        self._window_tokens = max((len(string.encode()) for string in strings), default=0) + CONTEXT_TOKENS
        self._edge = tokenizer.encode("a")  # on both sides of a token to be looked at: spaces at the edges of a text are dropped
        self._known: dict[int, _Token] = {}

    def cut(self, tokens: Sequence[int]) -> str | None:
        """The text before the first stop string, if the last of `tokens` completes one; else None.

        To be asked after every token.
        """
        if not tokens or not self._token(tokens[-1]).may_end:
            return None
        if self._first(response_text(self._tokenizer, self._end(tokens))) is None:
            return None
        text = response_text(self._tokenizer, tokens)
        place = self._first(text)
        return None if place is None else text[:place]

    def _end(self, tokens: Sequence[int]) -> Sequence[int]:
        """The last tokens, enough of those that have text for the longest stop string."""
        start, wanted = len(tokens), self._window_tokens
        while start and wanted:
            start -= 1
            wanted -= not self._token(tokens[start]).empty
        return tokens[start:]

    def _first(self, text: str) -> int | None:
        return min((place for string in self._strings if (place := text.find(string)) >= 0), default=None)

    def _token(self, token: int) -> _Token:
        found = self._known.get(token)
        if found is None:
            text, beside = (response_text(self._tokenizer, [*self._edge, *inner, *self._edge]) for inner in ([token], []))
            may_end = (self._split and UNFINISHED in text) or any(text.count(last) > beside.count(last) for last in self._last_characters)
            found = self._known[token] = _Token(may_end, text == beside)
        return found


def response_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of sampled tokens; rows that a model has beyond its tokenizer's ids have none."""
    return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size])
