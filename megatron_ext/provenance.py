"""What things were made from: hashes, and the JSON records beside shards and checkpoints.

The records are torch-free so that plans, trees and reports can read them on a login node.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any, Literal

from megatron_ext.config.base import Json, config, from_json, to_json
from megatron_ext.errors import CheckpointError, DataError
from megatron_ext.runs import read_json, write_json
from megatron_ext.snapshot import code_hash

CORPUS, MANIFEST = "corpus.json", "manifest.json"
RECORDED_PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "transformers", "sentencepiece", "pydantic")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def environment() -> Json:
    """Code, package versions, Python and container of this process."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "code_hash": code_hash(),
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "container": os.environ.get("MEGATRON_EXT_CONTAINER", ""),
        "command": sys.argv[1:],
    }


@config
class ShardSidecar:
    """Stands beside one `.bin/.idx/.ids` triple and makes it checkable without reading it."""

    source: str
    split: Literal["train", "heldout"]
    prefix: str  # file name without suffix, relative to the sidecar
    documents: int
    tokens: int
    largest_id: int
    dtype: Literal["uint16", "int32"]
    eod_id: int
    bos: bool
    vocab_size: int
    tokenizer_hash: str
    bytes: dict[str, int]  # file suffix -> size
    sha256: dict[str, str]  # file suffix -> digest
    format: int = 1


@config
class SourceRecord:
    """One source of a finished corpus."""

    train: tuple[str, ...]  # sidecar paths, relative to corpus.json
    heldout: tuple[str, ...]
    tokens: int  # training tokens
    heldout_tokens: int
    documents: int
    heldout_documents: int
    max_epochs: float
    skipped_lines: int = 0
    licence: str = ""
    provenance: str = ""


@config
class CorpusIndex:
    """Written last by the tokenize stage: what the shards hold and which tokenizer made them."""

    tokenizer_hash: str
    tokenizer_path: str  # relative to corpus.json where the corpus keeps a copy
    vocab_size: int
    eod_id: int
    bos: bool
    sources: dict[str, SourceRecord]
    format: int = 1


def write_sidecar(path: Path, sidecar: ShardSidecar) -> None:
    """Write a shard's sidecar; its existence says that the shard is whole."""
    write_json(path, to_json(sidecar))


def read_sidecar(path: Path) -> ShardSidecar:
    """Read a shard's sidecar; `DataError` where it is missing or broken."""
    sidecar: ShardSidecar = _record(ShardSidecar, path, "a shard's sidecar", DataError)
    return sidecar


def read_corpus(folder: Path) -> CorpusIndex:
    """Read `corpus.json` of a tokenize run."""
    index: CorpusIndex = _record(CorpusIndex, folder / CORPUS, "the index of a tokenized corpus", DataError)
    return index


@config
class Consumed:
    """The ledger's line for one source, at one point of a lineage.

    `position` counts sequences drawn from the source since the lineage began; a stage that starts
    by `branch` goes on from there, so no document is repeated before the source is used up.
    """

    source: str
    position: int
    tokens: int  # of the lineage
    stage_tokens: int  # of this stage
    epochs: float  # passes over the source's training tokens


@config
class Parent:
    """Where a stage's first weights came from."""

    stage: str
    start: Literal["weights", "branch"]
    iteration: int
    tokens: int  # of the parent stage
    lineage_tokens: int
    learning_rate: float  # of the parent's last step
    science_hash: str
    manifest_sha256: str


@config
class Manifest:
    """Written last into a checkpoint: what it is, what it came from, what its files hash to."""

    stage: str
    graph: str
    attempt: int
    iteration: int
    tokens: int  # of this stage
    lineage_tokens: int  # of all stages since scratch or conversion, along `branch` and `weights`
    learning_rate: float  # of the last step
    science_hash: str
    mixture_hash: str
    tokenizer_hash: str
    code_hash: str
    parent: Parent | None
    ledger: tuple[Consumed, ...]
    optimizer_layout: Literal["fully_reshardable", "dp_reshardable", "replicated", "none"]
    plan: dict[str, Any]
    model: dict[str, Any]
    files: dict[str, tuple[int, str]]  # name -> (bytes, sha256)
    pinned: bool = False
    format: int = 1


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a checkpoint's manifest."""
    write_json(folder / MANIFEST, to_json(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest; `CheckpointError` where there is none (then it is not a checkpoint)."""
    manifest: Manifest = _record(Manifest, folder / MANIFEST, "a checkpoint's manifest", CheckpointError)
    return manifest


def _record(kind: Any, path: Path, what: str, error: type[Exception]) -> Any:
    values = read_json(path, what, error)
    try:
        return from_json(kind, values, str(path))
    except ValueError as cause:
        raise error(str(cause)) from None
