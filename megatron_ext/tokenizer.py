"""Text to token ids and back: SentencePiece models and Hugging Face tokenizers behind one small interface.

Plain text goes in: no special token is added, and a special token's name inside text stays text, so an
end-of-document id never stands inside a document. The identity hash says when two tokenizers give the same ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.base import content_hash
from megatron_ext.errors import DataError
from megatron_ext.provenance import file_sha256
from megatron_ext.runs import atomic_write, write_json

SENTENCEPIECE = "tokenizer.model"
HUGGING_FACE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json")  # they name eos_token and bos_token
OLDER_FILES = ("vocab.json", "vocab.txt")  # Hugging Face folders from before tokenizer.json
# All that belongs to a tokenizer: a copy of it, and every checkpoint, keeps those that are there.
TOKENIZER_FILES = (
    HUGGING_FACE, *SPECIAL_FILES, "added_tokens.json", SENTENCEPIECE, *OLDER_FILES, "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CONVERTED = "converted_from_sentencepiece"  # in tokenizer_config.json: digests of a tokenizer.model and of the tokenizer.json made of it
# What base models end documents with; chat models name another token (<|eot_id|>, <|im_end|>) as their eos_token.
END_OF_DOCUMENT = ("<|end_of_text|>", "<|endoftext|>")
USUAL_ENDS = ("</s>", "<eos>")  # tried where no file names an eos_token
USUAL_BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>")


class Tokenizer(ABC):
    """What the rest of the program knows of a tokenizer."""

    vocab_size: int  # largest id + 1, added tokens included
    eod_id: int  # ends a document
    bos_id: int | None
    identity_hash: str  # equal hashes, equal ids for every text

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, without any special id."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, without any special id."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ids show by name where the tokenizer has names for them."""

    @abstractmethod
    def copy_to(self, folder: Path) -> None:
        """Put all that belongs to the tokenizer into `folder` (TOKENIZER_FILES); the copy has the same identity hash."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._path = path
        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as cause:
            raise DataError(
                f"{path}: not a SentencePiece model ({cause}). Llama 3's original/tokenizer.model is another format: "
                f"name the folder with its {HUGGING_FACE} instead"
            ) from None
        self.vocab_size = int(self._processor.vocab_size())
        self.eod_id = int(self._processor.eos_id())
        if self.eod_id < 0:
            raise DataError(f"{path}: this model has no end-of-sentence piece, which ends documents; train it with eos_id >= 0")
        bos = int(self._processor.bos_id())
        self.bos_id = bos if bos >= 0 else None
        self.identity_hash = content_hash({"model": file_sha256(path), "eod_id": self.eod_id, "bos_id": self.bos_id})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids]))

    def copy_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _copy(self._path, folder / SENTENCEPIECE)
        _copy_beside(self._path, folder, but={SENTENCEPIECE, HUGGING_FACE})  # the latter would be loaded instead


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library; the files beside it name its special tokens."""

    def __init__(self, path: Path, text: str, names: dict[str, str]) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(text)
        except Exception as cause:  # noqa: BLE001 - the library raises nothing narrower for a file it cannot read
            raise DataError(f"{path}: not a tokenizer of the tokenizers library ({cause}); download it again") from None
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        ends = [*END_OF_DOCUMENT, *([names["eos_token"]] if "eos_token" in names else USUAL_ENDS)]
        beginnings = [names["bos_token"]] if "bos_token" in names else [] if names else USUAL_BEGINNINGS
        eod = next((token for token in ends if token in vocabulary), None)
        bos = next((token for token in beginnings if token in vocabulary), None)
        if eod is None:
            raise DataError(
                f"{path}: no end-of-document token: its vocabulary has none of {', '.join(ends)}; "
                f'name one of its tokens in {SPECIAL_FILES[0]} beside it, as {{"eos_token": "..."}}'
            )
        backend.add_special_tokens([token for token in (eod, bos) if token])  # special ones only are kept from matching in text
        backend.encode_special_tokens = True  # a special token's name in a text is encoded like any other text
        self._path, self._text, self._names, self._backend = path, text, names, backend
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id, self.bos_id = vocabulary[eod], vocabulary[bos] if bos else None
        model = {key: value for key, value in json.loads(text).items() if key not in ("truncation", "padding")}  # both are off here
        self.identity_hash = content_hash({"model": model, "eod_id": self.eod_id, "bos_id": self.bos_id})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def copy_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / HUGGING_FACE, self._text)
        _copy_beside(self._path, folder, but={HUGGING_FACE})
        if _special_names(folder) != self._names:  # transformers knew them, not the files
            values = _read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
            write_json(folder / TOKENIZER_CONFIG, {**values, **self._names})


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer from a folder or a file; `DataError` names the files that were looked for."""
    path = Path(path)
    if path.is_file():
        return SentencePieceTokenizer(path) if path.suffix == ".model" else _hugging_face(path)
    models = sorted(path.glob("*.model"))
    if (path / HUGGING_FACE).is_file() and not _is_conversion(path):
        return _hugging_face(path / HUGGING_FACE)
    if (path / SENTENCEPIECE).is_file() or len(models) == 1:
        return SentencePieceTokenizer(path / SENTENCEPIECE if (path / SENTENCEPIECE).is_file() else models[0])
    if any((path / name).is_file() for name in OLDER_FILES):
        return _through_transformers(path)
    looked_for = ", ".join((HUGGING_FACE, SENTENCEPIECE, *OLDER_FILES))
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name a folder with a tokenizer's files (one of {looked_for}) or a .model file")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    several = f"; {len(models)} .model files: name one of them" if models else ""
    raise DataError(f"{path}: no tokenizer in this folder: looked for {looked_for} or one other .model file, found {found}{several}")


def tokenizer_of_files(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer among files that are in memory, name -> bytes; `DataError` as `load_tokenizer`, without a folder's name."""
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        try:
            return load_tokenizer(Path(name))
        except DataError as error:
            raise DataError(str(error).replace(f"{name}/", "").replace(name, "the files beside the weights")) from None


def conversion_mark(model: bytes, made: bytes) -> dict[str, Any]:
    """What a tokenizer_config.json says beside a tokenizer.model and the tokenizer.json that was made of it with the same ids.

    As long as both are these, the folder's tokenizer is the SentencePiece model, with its identity: the other is a form of it.
    """
    return {CONVERTED: {name: hashlib.sha256(data).hexdigest() for name, data in ((SENTENCEPIECE, model), (HUGGING_FACE, made))}}


def _is_conversion(folder: Path) -> bool:
    mark = _read_json(folder / TOKENIZER_CONFIG).get(CONVERTED) if (folder / TOKENIZER_CONFIG).is_file() else None
    files = [folder / name for name in (SENTENCEPIECE, HUGGING_FACE)]
    return mark is not None and all(path.is_file() for path in files) and mark == {path.name: file_sha256(path) for path in files}


def _hugging_face(path: Path) -> HuggingFaceTokenizer:
    try:
        return HuggingFaceTokenizer(path, path.read_bytes().decode(), _special_names(path.parent))
    except UnicodeDecodeError as cause:
        raise DataError(f"{path}: not UTF-8 text ({cause}); a tokenizer is a {HUGGING_FACE} or a SentencePiece .model file") from None


def _through_transformers(folder: Path) -> HuggingFaceTokenizer:
    """An older folder (vocab.json and merges.txt, say), converted by transformers."""
    from transformers import AutoTokenizer

    try:
        converted: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as cause:
        raise DataError(f"{folder}: transformers cannot load this tokenizer ({cause}); add its {HUGGING_FACE}") from None
    if not getattr(converted, "is_fast", False):
        raise DataError(f"{folder}: transformers has only a Python version of this tokenizer; add a {HUGGING_FACE}")
    named = {"eos_token": converted.eos_token, "bos_token": converted.bos_token}
    names = {key: str(value) for key, value in named.items() if value}
    vocabulary = next(folder / name for name in OLDER_FILES if (folder / name).is_file())
    return HuggingFaceTokenizer(vocabulary, converted.backend_tokenizer.to_str(), names)


def _special_names(folder: Path) -> dict[str, str]:
    """eos_token and bos_token as the files beside a tokenizer.json name them."""
    names: dict[str, str] = {}
    for file in (folder / name for name in reversed(SPECIAL_FILES)):
        if not file.is_file():
            continue
        values = _read_json(file)
        for key in ("eos_token", "bos_token"):
            value = values.get(key)
            content = value.get("content") if isinstance(value, dict) else value
            if content:
                names[key] = content
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise DataError(f"{path}: not valid JSON ({cause}); download it again") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds no JSON object; download it again")
    return values


def _copy_beside(path: Path, folder: Path, but: set[str]) -> None:
    """Copy what belongs to a tokenizer and lies beside its file."""
    for name in TOKENIZER_FILES:
        if name not in but and (path.parent / name).is_file():
            _copy(path.parent / name, folder / name)


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and source.samefile(target)):
        aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(source, aside)
        os.replace(aside, target)
