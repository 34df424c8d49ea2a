"""A SentencePiece model as the tokenizer.json that transformers and vLLM load, with the same ids for every text.

transformers would convert the file itself while it loads, if protobuf is installed, and not always to the same ids: it
knows neither of symbols that only the user defined nor whether the first word gets a space. So it is done here, once.

Both libraries merge the pair that gives the best piece, leftmost first. SentencePiece orders by a piece's score, the
tokenizers library by a list of pairs: every way to cut a piece in two is listed, pieces of higher score first. What
cannot be made equal (another algorithm than BPE, normalised text) is refused by name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.base import Json
from megatron_ext.errors import DataError
from megatron_ext.tokenizer import HUGGING_FACE, SENTENCEPIECE, conversion_mark

SPACE = "\u2581"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces in sentencepiece_model.proto
ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place is its id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What a SentencePiece file says of how it encodes."""

    pieces: tuple[Piece, ...]
    algorithm: str
    byte_fallback: bool
    space_first: bool  # a space is put before the text
    special_ids: dict[str, int]  # unk_token, bos_token, eos_token: those that it has
    refused: tuple[str, ...]  # what else it does, in words


def converted(data: bytes, config: Json) -> tuple[bytes, Json]:
    """The tokenizer.json of a .model file's bytes, and what tokenizer_config.json says beside it; `config` is what it said before.

    `DataError` names everything in the model that cannot be converted.
    """
    model = read_model(data)
    own = _config(model)
    values = {**own, **config}
    first, last = (own.get(key, "") if values[f"add_{key}"] else "" for key in ("bos_token", "eos_token"))
    text = json.dumps(tokenizer_json(model, first, last), indent=2, ensure_ascii=False).encode()
    return text, {**values, **conversion_mark(data, text)}


def tokenizer_json(model: Model, first: str = "", last: str = "") -> Json:
    """The tokenizer that gives the same ids as `model`, in the tokenizers library's form.

    `first` and `last` are special pieces that a text gets around it where the caller wants special tokens, as transformers does.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    _check(model)
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    vocabulary = {piece.text: i for i, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
    )
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    written: list[Any] = [normalizers.Replace(" ", SPACE)]
    if model.space_first:
        written.insert(0, normalizers.Prepend(SPACE))
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(written)
    tokenizer.decoder = decoders.Sequence(steps)
    special = [AddedToken(p.text, special=True, normalized=False) for p in model.pieces if p.kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens(special)
    symbols = [p.text for p in model.pieces if p.kind == USER_DEFINED and " " not in p.text]  # no text has a space when they are looked for
    tokenizer.add_tokens([AddedToken(symbol, special=False, normalized=True) for symbol in symbols])
    if first or last:
        template = [piece for piece in (first, "$A", last) if piece]
        named = [(piece, vocabulary[piece]) for piece in (first, last) if piece]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    values: Json = json.loads(tokenizer.to_str())
    return values


def merges(model: Model) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, those of the best piece first.

    A piece is only ever made from one of its pairs, that which its own characters come to, so their order does not matter.
    """
    parts = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    ordered = sorted((piece for piece in model.pieces if piece.kind == NORMAL and len(piece.text) > 1), key=lambda piece: -piece.score)
    cuts = ((piece.text[:i], piece.text[i:]) for piece in ordered for i in range(1, len(piece.text)))
    return [(left, right) for left, right in cuts if left in parts and right in parts]


def _check(model: Model) -> None:
    wrong = list(model.refused)
    if model.algorithm != "bpe":
        wrong.append(f"its algorithm is {model.algorithm}, not bpe")
    if any(piece.kind == UNUSED for piece in model.pieces):
        wrong.append("it has unused pieces")
    if model.space_first and any(piece.kind == USER_DEFINED for piece in model.pieces):
        wrong.append("it puts a space before the text (add_dummy_prefix) and has user_defined_symbols")
    scores = [piece.score for piece in model.pieces if piece.kind == NORMAL and len(piece.text) > 1]
    if len(set(scores)) < len(scores):
        wrong.append("several pieces have one score")
    known = {piece.text for piece in model.pieces if piece.kind in (NORMAL, USER_DEFINED)}
    lacking = sorted({c for piece in model.pieces if piece.kind == NORMAL for c in piece.text} - known)
    if lacking:
        wrong.append(f"characters of its pieces are no pieces themselves: {', '.join(map(ascii, lacking[:8]))}")
    if len({piece.text for piece in model.pieces}) < len(model.pieces):
        wrong.append("two pieces have one text")
    if wrong:
        raise DataError(
            f"{SENTENCEPIECE}: cannot be converted to a {HUGGING_FACE} with the same ids: {'; '.join(wrong)}. "
            f"Tokenize with a tokenizer that has a {HUGGING_FACE}, or with a BPE model trained with normalization_rule_name=identity "
            f"and remove_extra_whitespaces=false"
        )


def _config(model: Model) -> Json:
    """What a tokenizer_config.json says of a bare SentencePiece model: names, and that nothing is added to a text or taken from it."""
    named = {key: model.pieces[i].text for key, i in model.special_ids.items()}
    return {**named, "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}


# --- the file -----------------------------------------------------------------------------------------


def read_model(data: bytes) -> Model:
    """What the bytes of a .model file say; `DataError` where they are none. Numbers are those of sentencepiece_model.proto."""
    try:
        fields = list(_fields(data))
        trainer, normalizer, denormalizer = (_message(fields, number) for number in (2, 3, 5))
        pieces = tuple(_piece(value) for number, value in fields if number == 1)
    except (LookupError, ValueError, TypeError, struct.error) as cause:
        raise DataError(f"{SENTENCEPIECE}: not a SentencePiece model ({cause!r}); download it again") from None
    ids = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2)}
    special = {key: _signed(trainer.get(number, default)) for key, (number, default) in ids.items()}
    refused = {
        "it normalises text (normalization_rule_name)": normalizer.get(2, b""),
        "it removes spaces (remove_extra_whitespaces)": normalizer.get(4, 1),
        "it does not escape spaces (escape_whitespaces)": not normalizer.get(5, 1),
        "it puts spaces behind words (treat_whitespace_as_suffix)": trainer.get(24, 0),
        "it changes decoded text (denormalizer_spec)": denormalizer.get(2, b""),
    }
    return Model(
        pieces=pieces,
        algorithm=ALGORITHMS.get(trainer.get(3, 1), "unknown"),
        byte_fallback=bool(trainer.get(35, 0)),
        space_first=bool(normalizer.get(3, 1)),
        special_ids={key: i for key, i in special.items() if 0 <= i < len(pieces)},
        refused=tuple(words for words, is_so in refused.items() if is_so),
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode(), score, fields.get(3, NORMAL))


def _message(fields: list[tuple[int, Any]], number: int) -> dict[int, Any]:
    """The fields of the message that is field `number`; of a repeated one the last."""
    return {key: value for found, data in fields if found == number for key, value in _fields(data)}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field of a protobuf message: integers, and bytes for all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError("it ends inside of a field")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where the next field begins."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _signed(value: int) -> int:
    """An int32, which is kept as 64 bits: -1 means that there is no such piece."""
    return value - (1 << 64) if value >> 63 else value
