"""The text and the tokenizer that a graph names: do they exist, and do the vocabularies agree. No torch."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.stages import Source, TokenizerStage, TokenizeStage, TrainStage
from megatron_ext.launch.findings import Finding, error, ok, warning
from megatron_ext.launch.graph import Graph

HUGGING_FACE = "tokenizer.json"
OTHER_TOKENIZERS = ("*.model", "vocab.json", "vocab.txt")  # SentencePiece's, and older Hugging Face folders
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
MOST_NAMED = 6


def input_findings(graph: Graph, stages: Sequence[Any]) -> list[Finding]:
    """Findings on each tokenize stage of these: its sources' files, its tokenizer, and the models that train on it."""
    corpora = [stage for stage in stages if isinstance(stage, TokenizeStage)]
    return [finding for stage in corpora for finding in (*_sources(stage), *_tokenizer(graph, stage))]


def _sources(stage: TokenizeStage) -> list[Finding]:
    """Paths that match no file here; relative ones of a text stage's sources are yet to be written."""
    what = f"text of {stage.name}"
    wanted = [(source, path) for source in stage.sources for path in source.paths if stage.text is None or os.path.isabs(path)]
    if not wanted:
        return [ok(what, f"written by stage {stage.text}")]
    missing = [f"{source.name}: {path}" for source, path in wanted if not _files(path)]
    packed = [f"{source.name}: {file}" for source, path in wanted for file in _files(path) if file.endswith(COMPRESSED)]
    found = []
    if missing:
        way_out = f"run from the folder that they are relative to (now {Path.cwd()}), fetch them, or correct the sources' paths"
        found.append(error(what, f"{len(missing)} of {len(wanted)} paths match no file: {_some(missing)}", way_out))
    if packed:
        found.append(error(what, f"compressed files cannot be read: {_some(packed)}", "decompress or convert them to plain JSONL"))
    return found or [ok(what, f"all {len(wanted)} paths of {len(stage.sources)} sources match files")]


def _files(pattern: str) -> list[str]:
    return [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def _tokenizer(graph: Graph, stage: TokenizeStage) -> list[Finding]:
    what = f"tokenizer of {stage.name}"
    if "/" not in stage.tokenizer:
        trained: TokenizerStage = graph.stage(stage.tokenizer)
        return _vocabulary(graph, stage, what, trained.vocab_size)
    path = Path(stage.tokenizer)
    file = path / HUGGING_FACE if path.is_dir() else path
    if not path.exists():
        return [
            error(what, f"no such file or folder: {path} (from {Path.cwd()})", f"fetch it: a folder with {HUGGING_FACE} or a .model file")
        ]
    if not file.is_file():
        if any(any(path.glob(pattern)) for pattern in OTHER_TOKENIZERS):
            return [ok(what, f"{path}; its vocabulary is compared with the model's when the corpus is made")]
        return [error(what, f"{path} holds neither {HUGGING_FACE} nor {', '.join(OTHER_TOKENIZERS)}", "fetch the tokenizer's files again")]
    if file.suffix != ".json":
        return [ok(what, f"{file}; its vocabulary is compared with the model's when the corpus is made")]
    try:
        number = hugging_face_vocabulary(file)
    except (ValueError, KeyError, TypeError) as cause:
        return [error(what, f"{file} is no tokenizer of the tokenizers library ({type(cause).__name__}: {cause})", "download it again")]
    return _vocabulary(graph, stage, what, number)


def hugging_face_vocabulary(file: Path) -> int:
    """Largest id + 1 in a tokenizer.json."""
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))  # Unigram's is a list of pieces
    return int(max([*ids, *(token["id"] for token in values.get("added_tokens", []))])) + 1


def _vocabulary(graph: Graph, stage: TokenizeStage, what: str, number: int) -> list[Finding]:
    found = []
    readers = [reader for reader in graph.stages if isinstance(reader, TrainStage) and reader.corpus == stage.name]
    for model in {reader.model: None for reader in readers}:
        if number > model.vocab_size:
            text = f"{number:,} ids, but model {model.name} has {model.vocab_size:,}"
            found.append(error(what, text, "give the model the tokenizer's vocab_size, or tokenize with the model's own tokenizer"))
        elif model.padded_vocab_size - number >= max(1024, number // 10):
            text = f"{number:,} ids, far fewer than the {model.vocab_size:,} of model {model.name}"
            found.append(warning(what, text, "make sure that it is the tokenizer the model was trained with"))
    return found or [ok(what, f"{number:,} ids, which the models hold")]


def known_shard_bytes(source: Source, vocab_size: int) -> int:
    """Bytes of a source's shards, from the tokens that it is stated to hold: 2 a token up to 65,536 ids, else 4."""
    return source.tokens * (2 if vocab_size <= 1 << 16 else 4)
