"""Tiny tokenizers for tests: a byte-level BPE as Hugging Face keeps it, and a SentencePiece model."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = "the quick brown fox jumps over the lazy dog and counts 1234567890 times, then it rests; naïve café, ünïcödé ok. "
TEXTS = [WORDS * 3, "def add(left, right):\n    return left + right\n" * 5, "x + y = 12, so y = 12 - x\n" * 8]
BEGINNING, END = "<|begin_of_text|>", "<|end_of_text|>"


def hugging_face(folder: Path, vocab_size: int = 400, special: tuple[str, ...] = (BEGINNING, END), names: dict | None = None) -> Path:
    """A folder with tokenizer.json, and tokenizer_config.json where `names` are given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if names is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def sentence_piece(folder: Path, eos_id: int = 2) -> Path:
    """A folder with tokenizer.model."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir(parents=True, exist_ok=True)
    lines = (line for text in TEXTS for line in text.splitlines())
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "tokenizer"), vocab_size=350, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, eos_id=eos_id,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder
