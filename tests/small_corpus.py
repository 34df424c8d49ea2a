"""Small real corpora and run folders for tests: random documents in real shards, no text and no tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config.base import to_json
from megatron_ext.config.budget import Budget
from megatron_ext.config.mixture import Mixture, Row
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Scratch, Source, TokenizeStage, TrainStage
from megatron_ext.data.index_cache import IndexCache
from megatron_ext.data.shards import ShardWriter, open_split
from megatron_ext.data.streams import SourceStream
from megatron_ext.provenance import CORPUS, CorpusIndex, SourceRecord, read_corpus
from megatron_ext.runs import Run, write_json, write_run

EOD, VOCAB_SIZE, TOKENIZER_HASH = 2, 128, "f" * 64
LENGTH = 16  # tokens of a sequence
TOY = ModelConfig(
    name="toy", num_layers=1, hidden_size=8, ffn_hidden_size=16, num_attention_heads=1, num_query_groups=1,
    vocab_size=VOCAB_SIZE, max_positions=64,
)  # fmt: skip
STAGE = TrainStage(
    name="base",
    start=Scratch(),
    corpus="corpus",
    model=TOY,
    mixture=Mixture(rows=(Row(source="web", weight=0.75), Row(source="qa", weight=0.25))),
    budget=Budget(steps=10, sequences_per_batch=8, sequence_length=LENGTH),
    schedule=Schedule(shape="constant", peak=1e-3),
    precision="fp32",
    plan=TrainPlan(device="cpu", distributed_optimizer=False, validation_sequences=5),
)


def random_documents(count: int, seed: int, mean: int = 12) -> list[np.ndarray]:
    """`count` documents of 2 to 2 x mean tokens, each ended by EOD."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(3, VOCAB_SIZE, size=rng.integers(1, 2 * mean)), EOD) for _ in range(count)]


def write_corpus(
    folder: Path,
    sources: dict[str, int],
    *,
    heldout: int = 20,
    seed: int = 0,
    num_shards: int = 2,
    max_epochs: float = 100.0,
    name: str = "corpus",
    **facts: Any,
) -> Run:
    """A tokenize run at `folder`/`name` whose sources hold the given numbers of documents, in `num_shards` shards each.

    `facts` override the corpus' own (vocab_size, bos).
    """
    stage = TokenizeStage(
        name=name,
        sources=tuple(
            Source(name=s, paths=("x.jsonl",), max_epochs=max_epochs, provenance=f"{seed} {count}") for s, count in sources.items()
        ),
        tokenizer="./tokenizer",
    )
    run = write_run(folder / name, "test", stage, {})
    values = {"vocab_size": VOCAB_SIZE, "eod_id": EOD, "bos": False, "tokenizer_hash": TOKENIZER_HASH, **facts}
    records = {}
    for number, (source, count) in enumerate(sources.items()):
        parts: dict[str, list[Any]] = {"train": [], "heldout": []}
        for split, total in (("train", count), ("heldout", heldout)):
            documents = random_documents(total, seed=1000 * seed + 10 * number + (split == "heldout"))
            for shard in range(num_shards):
                where = run.path / "shards" / source
                with ShardWriter(where, f"{split}-{shard:05d}", source=source, split=split, **values) as writer:  # type: ignore[arg-type]
                    for i in range(shard, total, num_shards):
                        writer.add(f"{source}/{split}/{i}", documents[i])
                    written = writer.finish()
                if written:
                    parts[split].append(written)
        records[source] = SourceRecord(
            train=tuple(f"shards/{source}/{one.prefix}.json" for one in parts["train"]),
            heldout=tuple(f"shards/{source}/{one.prefix}.json" for one in parts["heldout"]),
            tokens=sum(one.tokens for one in parts["train"]),
            heldout_tokens=sum(one.tokens for one in parts["heldout"]),
            documents=sum(one.documents for one in parts["train"]),
            heldout_documents=sum(one.documents for one in parts["heldout"]),
            max_epochs=max_epochs,
        )
    write_json(run.path / CORPUS, to_json(CorpusIndex(tokenizer_path="tokenizer", sources=records, **values)))
    return run


def train_run(corpus: Run, stage: TrainStage = STAGE, parent: Run | None = None) -> Run:
    """A train run beside its corpus; no checkpoint is needed, and none is written."""
    inputs = {"corpus": corpus.path} | ({"start": parent.path} if parent else {})
    return write_run(corpus.path.parent / stage.name, "test", replace(stage, corpus=corpus.name), inputs)


def index_cache(root: Path, may_build: bool = True) -> IndexCache:
    """A cache of indices under `root`."""
    return IndexCache(root, may_build=may_build, way_out="run prepare")


def stream(corpus: Run, source: str, *, may_build: bool = True, split: Any = "train", **changes: Any) -> SourceStream:
    """A stream over one source of a corpus, order seed 7."""
    index = read_corpus(corpus.path)
    values = {
        "source": source,
        "tokens": open_split(corpus.path, index, source, split),
        "cache": index_cache(corpus.path / "indices", may_build),
        "order_seed": 7,
        "sequence_length": LENGTH,
        "tokenizer_hash": TOKENIZER_HASH,
    }
    return SourceStream(**{**values, **changes})
