"""The step before training: what it refuses, what it builds once, and where a lineage goes on."""

from __future__ import annotations

import multiprocessing
import shutil
from dataclasses import replace

import pytest

from megatron_ext.config.budget import Budget
from megatron_ext.config.mixture import Mixture, Row
from megatron_ext.config.stages import Branch, Documents, Scratch, Weights
from megatron_ext.data.prepare import check_tokenizer, open_prepared, order_seed, prepare
from megatron_ext.data.streams import SequenceId
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.provenance import read_corpus
from tests.small_corpus import LENGTH, STAGE, TOKENIZER_HASH, TOY, train_run, write_corpus

SOURCES = {"web": 60, "qa": 30}
STABLE = replace(STAGE, name="stable", start=Weights(stage="base"), seed=77)
DECAY = replace(
    STAGE,
    name="decay",
    start=Branch(stage="stable", tokens=6 * STAGE.budget.tokens_per_batch),
    mixture=Mixture(rows=(Row(source="web", weight=0.5), Row(source="code", weight=0.5))),
    seed=1,
)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path, {**SOURCES, "code": 40})


@pytest.fixture
def lineage(corpus):
    base = train_run(corpus)
    stable = train_run(corpus, STABLE, base)
    return base, stable, train_run(corpus, DECAY, stable)


def files(run):
    return {path: path.stat().st_mtime_ns for path in (run.path / "indices").rglob("*")}


def test_prepare_builds_once_and_trainers_read(corpus):
    run = train_run(corpus)
    with pytest.raises(DataError, match=f"no such index .*megatron-ext prepare {run.path}"):
        open_prepared(run)
    assert not (corpus.path / "indices").exists()
    built = prepare(run)
    before = files(corpus)
    again, opened = prepare(run), open_prepared(run)
    assert files(corpus) == before
    assert built.blend.sequence_ids(0, 80) == again.blend.sequence_ids(0, 80) == opened.blend.sequence_ids(0, 80)
    assert sorted(opened.heldout) == ["qa", "web"]
    assert len(opened.blend) == STAGE.budget.samples
    assert opened.ledger(10)[1].stage_tokens == 60 * LENGTH


def test_another_plan_needs_no_other_indices(corpus):
    prepare(train_run(corpus))
    open_prepared(train_run(corpus, replace(STAGE, plan=replace(STAGE.plan, micro_batch=2, validation_sequences=3))))


def prepare_in_a_process(run, start) -> None:
    start.wait(20)
    assert len(prepare(run).blend) == STAGE.budget.samples


def test_two_processes_may_prepare_at_once(corpus):
    run = train_run(corpus)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    workers = [context.Process(target=prepare_in_a_process, args=(run, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not list((corpus.path / "indices").glob(".*"))
    open_prepared(run)


def test_a_lineage_goes_on_where_its_parent_stopped(lineage):
    base, stable, decay = lineage
    child = prepare(decay)  # its parents are not trained, and are prepared with it
    parent = open_prepared(stable)
    assert parent.order_seed == order_seed(stable) == 77
    assert child.order_seed == order_seed(decay) == 77
    assert order_seed(base) == STAGE.seed
    web = {line.source: line for line in parent.ledger(6)}["web"]
    assert web.position == 36
    assert child.blend.streams[0].start_position == 36
    first = next(one for one in child.blend.sequence_ids(0, 8) if one.source == "web")
    expected = next(one for one in parent.blend.sequence_ids(48, 80) if one.source == "web")
    assert isinstance(first, SequenceId)
    assert first == expected
    after = {line.source: line for line in child.ledger(10)}
    assert after["web"].tokens == (60 + 36 + 40) * LENGTH  # base, stable to step 6, decay
    assert after["qa"].stage_tokens == 0
    assert after["qa"].tokens == (20 + 12) * LENGTH
    assert after["code"].position == 40


def test_a_checkpoints_ledger_gives_what_the_parents_indices_give(lineage):
    _, stable, decay = lineage
    computed = prepare(decay)
    given = open_prepared(decay, parent_ledger=open_prepared(stable).ledger(6))
    assert given.inherited == computed.inherited
    assert given.ledger(3) == computed.ledger(3)
    other = open_prepared(decay, parent_ledger=open_prepared(stable).ledger(5))
    assert other.ledger(3) != computed.ledger(3)


def test_weights_begin_a_new_order_but_count_what_was_seen(lineage):
    _, stable, _ = lineage
    opened = prepare(stable)
    assert [stream.start_position for stream in opened.blend.streams] == [0, 0]
    assert {line.source: line.tokens for line in opened.ledger(0)} == {"web": 60 * LENGTH, "qa": 20 * LENGTH}


def test_a_source_that_is_not_there_is_named(corpus):
    stage = replace(STAGE, mixture=Mixture(rows=(Row(source="wed", weight=1.0),)))
    with pytest.raises(DataError, match="no source 'wed' in the corpus; it has: code, qa, web"):
        prepare(train_run(corpus, stage))


def test_a_source_without_documents_is_refused(tmp_path):
    with pytest.raises(DataError, match="source 'qa' is empty"):
        prepare(train_run(write_corpus(tmp_path, {"web": 60, "qa": 0})))


def test_a_source_smaller_than_one_sequence_is_refused(tmp_path):
    corpus = write_corpus(tmp_path, {"web": 60, "qa": 1}, max_epochs=1e6)
    long = replace(STAGE, budget=Budget(steps=2, sequences_per_batch=8, sequence_length=64))
    with pytest.raises(DataError, match=r"source 'qa': its \d+ tokens are fewer than one sequence of 64 \+ 1"):
        prepare(train_run(corpus, long))


def test_a_source_repeated_too_often_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"source 'web' would be repeated 1\.2\d+ times, more than its most epochs 1"):
        prepare(train_run(write_corpus(tmp_path, SOURCES, max_epochs=1.0)))


def test_what_the_lineage_has_seen_counts_towards_the_most_epochs(tmp_path):
    corpus = write_corpus(tmp_path, SOURCES, max_epochs=2.0)
    base = train_run(corpus)
    prepare(base)
    with pytest.raises(DataError, match=r"source 'web' would be repeated 2\.\d+ times.*960 already drawn"):
        prepare(train_run(corpus, STABLE, base))


def test_whole_sequences_are_counted_too(tmp_path):
    corpus = write_corpus(tmp_path, {"web": 60}, max_epochs=10.0)
    tokens = read_corpus(corpus.path).sources["web"].tokens
    per_epoch = (tokens - 1) // LENGTH
    assert (10 * per_epoch + 1) * LENGTH <= 10 * tokens  # by tokens alone, one sequence more would do
    only_web = Mixture(rows=(Row(source="web", weight=1.0),))
    fits = replace(STAGE, mixture=only_web, budget=Budget(steps=10 * per_epoch, sequences_per_batch=1, sequence_length=LENGTH))
    prepare(train_run(corpus, fits))
    one_more = replace(fits, name="one_more", budget=replace(fits.budget, steps=10 * per_epoch + 1))
    with pytest.raises(DataError, match=f"{10 * per_epoch + 1} sequences x 16.* most epochs 10 x {per_epoch} whole sequences"):
        prepare(train_run(corpus, one_more))


def test_a_vocabulary_larger_than_the_models_is_refused(corpus):
    stage = replace(STAGE, model=replace(TOY, vocab_size=100))
    with pytest.raises(DataError, match="vocabulary of 128 ids, model toy has 100"):
        prepare(train_run(corpus, stage))


def test_bos_must_be_what_the_shards_have(corpus, tmp_path):
    with pytest.raises(DataError, match=r"documents\.bos is true, but the corpus was tokenized with bos=false"):
        prepare(train_run(corpus, replace(STAGE, documents=Documents(bos=True))))
    with_bos = write_corpus(tmp_path / "bos", SOURCES, bos=True)
    prepare(train_run(with_bos, replace(STAGE, documents=Documents(bos=True))))


def test_a_parents_tokenizer_must_be_the_corpus(corpus):
    check_tokenizer(read_corpus(corpus.path), TOKENIZER_HASH, "checkpoint X")
    with pytest.raises(DataError, match="tokenizer ffffffffffff, but checkpoint X has 000000000000"):
        check_tokenizer(read_corpus(corpus.path), "0" * 64, "checkpoint X")
    other = write_corpus(corpus.path.parent, SOURCES, name="other", tokenizer_hash="0" * 64)
    with pytest.raises(DataError, match="tokenizer 000000000000, but stage 'base' has ffffffffffff"):
        prepare(train_run(other, STABLE, train_run(corpus)))


def test_only_train_stages_have_data(corpus):
    with pytest.raises(ConfigError, match="is a tokenize stage"):
        prepare(corpus)


def test_a_branch_keeps_the_length_of_its_sequences(corpus, lineage):
    _, stable, _ = lineage
    start = Branch(stage="stable")
    longer = replace(DECAY, name="longer", start=start, budget=Budget(steps=2, sequences_per_batch=8, sequence_length=32))
    with pytest.raises(DataError, match="sequences of 32 tokens, its parent's have 16"):
        prepare(train_run(corpus, longer, stable))


def test_a_branch_keeps_the_text_of_its_sources(corpus, lineage):
    _, stable, _ = lineage
    other = write_corpus(corpus.path.parent, {"web": 60, "code": 40}, seed=5, name="other")
    with pytest.raises(DataError, match="goes on in source 'web', but the two stages' corpora do not hold the same text"):
        prepare(train_run(other, replace(DECAY, name="decay_other"), stable))
    moved = write_corpus(corpus.path.parent, {**SOURCES, "code": 40}, name="moved")  # the same text elsewhere
    child = prepare(train_run(moved, replace(DECAY, name="decay_moved"), stable))
    assert child.blend.streams[0].start_position == 36


def test_heldout_text_too_short_for_a_sequence_is_refused(tmp_path):
    corpus = write_corpus(tmp_path, SOURCES, heldout=1, seed=3, num_shards=1)
    with pytest.raises(DataError, match=r"source '\w+': its \d+ held-out tokens are fewer than one sequence"):
        prepare(train_run(corpus))


def test_a_source_without_heldout_text_is_left_out_of_validation(tmp_path):
    assert prepare(train_run(write_corpus(tmp_path, SOURCES, heldout=0))).heldout == {}


def test_shards_that_changed_are_indexed_anew(corpus):
    run = train_run(corpus)
    before = prepare(run).blend
    old = [before[i]["text"].tolist() for i in range(20)]
    kept = corpus.path.parent / "kept"
    (corpus.path / "indices").rename(kept)
    shutil.rmtree(corpus.path)
    changed = write_corpus(corpus.path.parent, {**SOURCES, "code": 40}, seed=9)
    kept.rename(changed.path / "indices")
    run = train_run(changed, replace(STAGE, name="again"))
    with pytest.raises(DataError, match=r"no such index \(of epoch\)"):
        open_prepared(run)
    after = prepare(run).blend
    assert [after[i]["text"].tolist() for i in range(20)] != old


def test_scratch_needs_no_parent(corpus):
    assert isinstance(STAGE.start, Scratch)
    assert prepare(train_run(corpus)).inherited == ()
