"""Stop strings end a response at the very token that completes them, whatever the tokenizer; cheaply, and never by mistake."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.generation.stopping import StopStrings, response_text
from megatron_ext.tasks.prompts import check_stop_strings
from megatron_ext.tokenizer import Tokenizer, load_tokenizer
from tests.unit import small_tokenizers

STOPS = {
    "one character": ("e",),
    "a word": ("the",),
    "a space at its end": ("x ", "9"),
    "a space before it": (" y",),
    "characters of several bytes": ("é o", "ünï"),
    "several": ("Question:", "fox", "n 1"),
}


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make = {"byte-level": small_tokenizers.hugging_face, "sentencepiece": small_tokenizers.sentence_piece}[request.param]
    return load_tokenizer(make(folder))


def responses(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Random ids, half characters among them, and texts cut into tokens in ways that no encoder would choose."""
    draw = random.Random(0)
    found = [[draw.randrange(tokenizer.vocab_size) for _ in range(60)] for _ in range(count)]
    for text in ("then the fox: x + y = 12, 9 é ok ünïcödé", "naïve café ok. Question: in 12 lines"):
        whole = tokenizer.encode(text)
        characters = [one for character in text for one in tokenizer.encode(character)]
        found += [whole, characters]
    return found


def by_whole_texts(tokenizer: Tokenizer, stops: Sequence[str], tokens: Sequence[int]) -> tuple[int, str] | None:
    """After how many tokens the text holds a stop string, and what stands before it: by decoding all of it at every token."""
    for length in range(1, len(tokens) + 1):
        text = response_text(tokenizer, tokens[:length])
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return length, text[: min(places)]
    return None


def by_cuts(found: StopStrings, tokens: Sequence[int]) -> tuple[int, str] | None:
    for length in range(1, len(tokens) + 1):
        text = found.cut(tokens[:length])
        if text is not None:
            return length, text
    return None


@pytest.mark.parametrize("name", STOPS)
def test_a_response_ends_where_its_whole_text_says(tokenizer, name):
    stops = STOPS[name]
    texts = responses(tokenizer, 200)
    expected = [by_whole_texts(tokenizer, stops, tokens) for tokens in texts]
    assert any(expected)
    assert [by_cuts(StopStrings(tokenizer, stops), tokens) for tokens in texts] == expected


def test_a_window_that_is_too_short_would_show(tokenizer):
    stops = STOPS["several"]
    texts = responses(tokenizer, 10)
    short = StopStrings(tokenizer, stops)
    short._window_tokens = 1
    assert [by_cuts(short, tokens) for tokens in texts] != [by_whole_texts(tokenizer, stops, tokens) for tokens in texts]


def test_within_a_token_and_across_tokens(tmp_path):
    tokenizer = load_tokenizer(small_tokenizers.hugging_face(tmp_path))
    (the,) = tokenizer.encode(" the")
    assert StopStrings(tokenizer, ["h"]).cut([the]) == " t"
    letters = [tokenizer.encode(letter)[0] for letter in "over"]
    found = StopStrings(tokenizer, ["ver"])
    assert [found.cut(letters[:length]) for length in range(5)] == [None, None, None, None, "o"]
    assert StopStrings(tokenizer, ()).cut(letters) is None


def test_ids_without_text_are_passed_over(tokenizer):
    unknown = tokenizer.vocab_size + 7
    first, second = tokenizer.encode("the"), tokenizer.encode("1")
    tokens = [*first, unknown, *second, unknown]
    assert response_text(tokenizer, tokens) == response_text(tokenizer, [*first, *second])
    expected = by_whole_texts(tokenizer, ["e1", "1"], tokens)
    assert by_cuts(StopStrings(tokenizer, ["e1", "1"]), tokens) == expected


class Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.vocab_size, self.decoded = tokenizer, tokenizer.vocab_size, 0

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return self.tokenizer.decode(ids)


def test_a_long_response_is_not_decoded_again_and_again(tokenizer):
    counting = Counting(tokenizer)
    tokens = tokenizer.encode("the quick brown fox jumps over 12 lazy dogs, " * 100)
    found = StopStrings(counting, ["User:", "Assistant:"])
    assert by_cuts(found, tokens) is None
    assert counting.decoded < 3 * len(tokens)


def test_what_cannot_be_produced_is_refused(tmp_path):
    pieces = load_tokenizer(small_tokenizers.sentence_piece(tmp_path / "pieces"))
    with pytest.raises(ConfigError, match=r"cannot produce '\\n'"):  # its normalization turns it into a space
        check_stop_strings(pieces, ["fox", "\n"])
    with pytest.raises(ConfigError, match="cannot produce 'ﬁ'"):
        StopStrings(pieces, ["ﬁ"])
    with pytest.raises(ConfigError, match="one is empty"):
        check_stop_strings(pieces, [""])
    check_stop_strings(pieces, [" fox", "fox ", "é", "→"])  # the last one through its bytes
    check_stop_strings(load_tokenizer(small_tokenizers.hugging_face(tmp_path / "bytes")), ["\n", "ﬁ", "→"])
