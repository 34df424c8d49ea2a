"""The CPU-only step before training: checks a train stage against its corpus and builds every index.

Indices lie under `<corpus run>/indices/`, named by content. `prepare` builds what is missing and may
run twice at once; trainers call `open_prepared`, which only reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.mixture import draws
from megatron_ext.config.stages import Branch, Scratch, TrainStage
from megatron_ext.data.index_cache import IndexCache
from megatron_ext.data.ledger import Ledger, inherit, ledger_at, start_positions
from megatron_ext.data.shards import open_split
from megatron_ext.data.streams import Blend, SourceStream
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.provenance import CorpusIndex, read_corpus
from megatron_ext.runs import Run, open_run

INDICES = "indices"
HELDOUT_ORDER_SEED = 0  # the same held-out order for every stage and seed


@dataclass(frozen=True)
class Prepared:
    """A train stage's data, opened: the blend of its sequences, held-out streams, and what it began with."""

    stage: TrainStage
    corpus: CorpusIndex
    blend: Blend
    heldout: dict[str, SourceStream]  # sources of the mixture that have held-out text
    inherited: Ledger  # of the start; empty from scratch or from a converted model
    order_seed: int

    def ledger(self, step: int) -> Ledger:
        """The lineage's ledger after `step` steps of this stage."""
        return ledger_at(self.blend, step * self.stage.budget.sequences_per_batch, self.inherited)


def prepare(run: Run, parent_ledger: Ledger | None = None) -> Prepared:
    """Check a train run and build every index that is missing; see `open_prepared` for the ledger.

    Needs no GPU, no process group and no trained parent. `DataError` or `ConfigError` where data, mixture
    and stage do not fit each other.
    """
    return _open(run, parent_ledger, may_build=True)


def open_prepared(run: Run, parent_ledger: Ledger | None = None) -> Prepared:
    """Open a prepared train run, writing nothing; `DataError` names the command where an index is missing.

    `parent_ledger` is that of the checkpoint the stage starts from (its manifest's). Without it, it is
    computed from the parent's own indices, which gives the same: a ledger is a function of the step.
    """
    return _open(run, parent_ledger, may_build=False)


def order_seed(run: Run) -> int:
    """The seed of a run's sequence order: that of the stage where the order began.

    A `branch` continues its parent's order, so its own seed does not enter; `scratch` and `weights` begin one.
    """
    while isinstance(run.stage.start, Branch):
        run = open_run(run.inputs["start"])
    return int(run.stage.seed)


def check_tokenizer(corpus: CorpusIndex, expected_hash: str, whose: str) -> None:
    """`DataError` where a corpus was not made with the tokenizer of `whose` (a checkpoint, for example)."""
    if corpus.tokenizer_hash != expected_hash:
        raise DataError(
            f"the corpus was tokenized with tokenizer {corpus.tokenizer_hash[:12]}, but {whose} has {expected_hash[:12]}: "
            f"the same ids mean other text; tokenize the corpus with the tokenizer of {whose}"
        )


def _open(run: Run, parent_ledger: Ledger | None, *, may_build: bool) -> Prepared:
    stage = run.stage
    if not isinstance(stage, TrainStage):
        raise ConfigError(f"{run.path}: '{run.name}' is a {stage.kind} stage; only train stages have data to prepare")
    folder = run.inputs["corpus"]
    corpus = read_corpus(folder)
    check_stage(stage, corpus)
    _check_parent(run, corpus)
    if parent_ledger is None:
        parent_ledger = _ledger_of_start(run, may_build)
    inherited = () if isinstance(stage.start, Scratch) else inherit(parent_ledger, stage.start.kind)
    already = {line.source: line.tokens for line in inherited}
    most = {name: record.max_epochs for name, record in corpus.sources.items()}
    draws(stage.mixture, stage.budget.tokens, {name: r.tokens for name, r in corpus.sources.items()}, most, already)

    cache = IndexCache(folder / INDICES, may_build=may_build, way_out=f"build it, on any machine: megatron-ext prepare {run.path}")
    seed = order_seed(run)
    streams = _streams(folder, corpus, stage, cache, seed, start_positions(inherited))
    _check_same_text(run, streams)
    blend = Blend(streams, [row.weight for row in stage.mixture.rows], stage.budget.samples, cache)
    _check_epochs(blend, most, already)
    blend.cover()
    return Prepared(stage, corpus, blend, _heldout(folder, corpus, stage, cache), inherited, seed)


def check_stage(stage: TrainStage, corpus: CorpusIndex) -> None:
    """What a stage and a corpus must agree on before anything is opened; `DataError` names both values."""
    if corpus.vocab_size > stage.model.vocab_size:
        raise DataError(
            f"stage '{stage.name}': the corpus uses a vocabulary of {corpus.vocab_size:,} ids, model {stage.model.name} has "
            f"{stage.model.vocab_size:,}; give the model the tokenizer's vocab_size, or tokenize with the model's tokenizer"
        )
    if corpus.bos != stage.documents.bos:
        raise DataError(
            f"stage '{stage.name}': documents.bos is {str(stage.documents.bos).lower()}, but the corpus was tokenized with "
            f"bos={str(corpus.bos).lower()}; make them equal, in the stage or by tokenizing again"
        )


def _ledger_of_start(run: Run, may_build: bool) -> Ledger:
    """The ledger of the checkpoint that a stage starts from, from its parent's indices."""
    parent = _parent(run)
    if parent is None:
        return ()  # what a converted model has seen is not ours to count
    budget, tokens = parent.stage.budget, run.stage.start.tokens
    return _open(parent, None, may_build=may_build).ledger(budget.steps if tokens is None else budget.step_at(tokens))


def _streams(
    folder: Path, corpus: CorpusIndex, stage: TrainStage, cache: IndexCache, seed: int, positions: dict[str, int]
) -> list[SourceStream]:
    return [
        SourceStream(
            source=source,
            tokens=open_split(folder, corpus, source, "train"),
            cache=cache,
            order_seed=seed,
            sequence_length=stage.budget.sequence_length,
            tokenizer_hash=corpus.tokenizer_hash,
            start_position=positions.get(source, 0),
        )
        for source in stage.mixture.sources
    ]


def _heldout(folder: Path, corpus: CorpusIndex, stage: TrainStage, cache: IndexCache) -> dict[str, SourceStream]:
    """One stream per source with held-out text; its first epoch is all that is read."""
    streams = {}
    for source in stage.mixture.sources:
        tokens, length = corpus.sources[source].heldout_tokens, stage.budget.sequence_length
        if tokens == 0 or stage.plan.validation_sequences == 0:
            continue
        if tokens <= length:
            raise DataError(
                f"source '{source}': its {tokens:,} held-out tokens are fewer than one sequence of {length:,} + 1; raise its "
                f"heldout_fraction and tokenize again, or set it to 0 to leave the source out of validation"
            )
        streams[source] = SourceStream(
            source=source,
            tokens=open_split(folder, corpus, source, "heldout"),
            cache=cache,
            order_seed=HELDOUT_ORDER_SEED,
            sequence_length=length,
            tokenizer_hash=corpus.tokenizer_hash,
        )
        streams[source].cover(1)
    return streams


def _check_epochs(blend: Blend, most: dict[str, float], already: dict[str, int]) -> None:
    """Refuse a source that whole sequences would repeat too often: rounding can add one to a row's share,
    and the tokens at an epoch's end that fill no sequence are not drawn."""
    for stream, sequences in zip(blend.streams, blend.draws.tolist(), strict=True):
        before = already.get(stream.source, 0)
        drawn = before + sequences * stream.sequence_length
        allowed = most[stream.source] * stream.sequences_per_epoch * stream.sequence_length
        if drawn > allowed:
            raise DataError(
                f"mixture: source '{stream.source}' would be drawn {drawn:,} tokens ({before:,} already + {sequences:,} sequences x "
                f"{stream.sequence_length:,}), more than the {int(allowed):,} of its most epochs {most[stream.source]:g} x "
                f"{stream.sequences_per_epoch:,} whole sequences. Lower its weight, shorten the stage, add text, or raise its max_epochs"
            )


def _parent(run: Run) -> Run | None:
    """The train run that a stage starts from; none from scratch or from a converted model."""
    if isinstance(run.stage.start, Scratch):
        return None
    parent = open_run(run.inputs["start"])
    return parent if isinstance(parent.stage, TrainStage) else None


def _check_parent(run: Run, corpus: CorpusIndex) -> None:
    """The parent read the same tokenizer's ids and, before a branch, sequences of the same length."""
    parent = _parent(run)
    if parent is None:
        return
    check_tokenizer(corpus, read_corpus(parent.inputs["corpus"]).tokenizer_hash, f"stage '{parent.name}'")
    length, parent_length = run.stage.budget.sequence_length, parent.stage.budget.sequence_length
    if isinstance(run.stage.start, Branch) and length != parent_length:
        raise DataError(
            f"stage '{run.name}' branches from '{parent.name}' with sequences of {length:,} tokens, its parent's have {parent_length:,}: "
            f"positions in the sources would not match; keep the length, or start with weights"
        )


def _check_same_text(run: Run, streams: list[SourceStream]) -> None:
    """A branch goes on at its parent's positions, which mean something in the same text only."""
    parent = _parent(run)
    if parent is None or parent.inputs["corpus"] == run.inputs["corpus"]:
        return
    folder = parent.inputs["corpus"]
    corpus = read_corpus(folder)
    for stream in (stream for stream in streams if stream.start_position):
        known = stream.source in corpus.sources
        if not known or open_split(folder, corpus, stream.source, "train").digest != stream.tokens.digest:
            raise DataError(
                f"stage '{run.name}' branches from '{parent.name}' and goes on in source '{stream.source}', but the two stages' corpora "
                f"do not hold the same text under that name; rename it in one corpus, or start with weights"
            )
