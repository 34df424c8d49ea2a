"""What things were made from: hashes, and the JSON records beside shards and checkpoints.

The records are torch-free so that plans, trees and reports can read them on a login node.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from megatron_ext.config.base import Json, config, content_hash, from_json, to_json
from megatron_ext.errors import ConfigError, DamagedCheckpointError, DataError
from megatron_ext.runs import atomic_write, read_json, write_json
from megatron_ext.snapshot import code_hash

CORPUS, MANIFEST = "corpus.json", "manifest.json"
OWN_DIGEST = "own_sha256"  # of a manifest's other values
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

    def __post_init__(self) -> None:
        if not is_plain_name(self.prefix):
            raise ConfigError(f"prefix {self.prefix!r} is no file name: it would lead out of the sidecar's folder; the sidecar was altered")


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

    def __post_init__(self) -> None:
        _refuse_outside((*self.train, *self.heldout))


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

    def __post_init__(self) -> None:
        _refuse_outside((self.tokenizer_path,))


def write_sidecar(path: Path, sidecar: ShardSidecar) -> None:
    """Write a shard's sidecar; its existence says that the shard is whole."""
    write_json(path, to_json(sidecar))


def read_sidecar(path: Path) -> ShardSidecar:
    """Read a shard's sidecar; `DataError` where it is missing or broken, or one of its files is a link that leads elsewhere."""
    sidecar: ShardSidecar = _record(ShardSidecar, path, "a shard's sidecar", DataError)
    _refuse_links_outside(path, [sidecar.prefix + suffix for suffix in sidecar.bytes])
    return sidecar


def read_corpus(folder: Path) -> CorpusIndex:
    """Read `corpus.json` of a tokenize run; `DataError` where it is missing or broken, or leads out of the run's folder."""
    index: CorpusIndex = _record(CorpusIndex, folder / CORPUS, "the index of a tokenized corpus", DataError)
    shards = [name for source in index.sources.values() for name in (*source.train, *source.heldout)]
    _refuse_links_outside(folder / CORPUS, [index.tokenizer_path, *shards])
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


FaultReason = Literal["loss not finite", "gradient norm not finite", "loss spike", "gradient norm spike"]


@config
class Skipped:
    """A batch of a lineage that was consumed and not trained on, and why."""

    stage: str
    step: int  # of the stage: the first is 1
    tokens: dict[str, int]  # of the batch, by source
    reason: FaultReason
    action: Literal["skip", "roll_back"]
    value: float | None  # what was found; None: not finite
    mean: float | None = None  # of the steps before, where they had a part in it
    sigma: float | None = None  # their standard deviation


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
    skipped: tuple[Skipped, ...] = ()  # batches of the lineage, oldest first
    guard: dict[str, Any] = field(default_factory=dict)  # what the judgement of the next steps depends on (training.guard)
    reinforcement: dict[str, Any] = field(default_factory=dict)  # how far reinforcement learning has come (rl.progress)
    hugging_face: dict[str, Any] = field(default_factory=dict)  # of a converted model: where it came from (conversion.to_megatron)
    thinned_from: str = ""  # SHA-256 of the manifest.json it had before its optimizer state was removed
    format: int = 1

    @property
    def skipped_tokens(self) -> dict[str, int]:
        """Tokens of the lineage that were left out, by source. The ledger counts what was consumed: less these, it was trained on."""
        sums: dict[str, int] = {}
        for source, tokens in (item for batch in self.skipped for item in batch.tokens.items()):
            sums[source] = sums.get(source, 0) + tokens
        return sums


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a checkpoint's manifest, with a digest of itself."""
    atomic_write(folder / MANIFEST, _signed(to_json(manifest)))


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest; `DamagedCheckpointError` where it is missing, or not to the byte what was written."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()  # reading as text would make one of all ends of line
        values = json.loads(text)
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{folder}: has no {MANIFEST}: it was never published, or lost it; use another checkpoint") from None
    except (ValueError, RecursionError, OSError) as cause:
        raise DamagedCheckpointError(f"{path}: not valid JSON, or not readable: {cause}; use another checkpoint of the run") from None
    digest = values.pop(OWN_DIGEST, None) if isinstance(values, dict) else None
    if digest is None or text != _signed(values):
        raise DamagedCheckpointError(
            f"{path}: is not what its {OWN_DIGEST} says: it was changed after it was written, or another version wrote it; "
            f"use another checkpoint of the run"
        )
    manifest: Manifest = _checked(Manifest, values, path, DamagedCheckpointError)
    return manifest


def _signed(values: Json) -> str:
    """A manifest's text. There is one text for given values: a changed byte shows even where the values stay the same."""
    return json.dumps({**values, OWN_DIGEST: content_hash(values)}, indent=2, ensure_ascii=False) + "\n"


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in the folder itself, not a path to anywhere else."""
    return PurePosixPath(name).name == name and name not in ("", ".", "..") and "\0" not in name


def _refuse_outside(paths: tuple[str, ...]) -> None:
    for path in paths:
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\0" in path:
            raise ConfigError(f"path {path!r} leads out of the corpus' folder; the index was altered")


def _refuse_links_outside(record: Path, names: list[str]) -> None:
    """`DataError` where a file that a record names is, or lies behind, a link that leaves the record's folder."""
    folder = record.parent.resolve()
    for name in names:
        found = (folder / name).resolve()
        if not found.is_relative_to(folder):
            raise DataError(f"{record}: {name!r} is a link that leads out of the folder, to {found}; put the file itself there")


def _record(kind: Any, path: Path, what: str, error: type[Exception]) -> Any:
    return _checked(kind, read_json(path, what, error), path, error)


def _checked(kind: Any, values: Any, path: Path, error: type[Exception]) -> Any:
    try:
        return from_json(kind, values, str(path))
    except ValueError as cause:
        raise error(str(cause)) from None
