"""What a step gets: the same sequences in every layout, masks checked token by token, held-out text used once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.config.stages import Documents
from megatron_ext.data.loader import HeldOut, Loader, heldouts, make_batch
from megatron_ext.data.prepare import open_prepared, prepare
from megatron_ext.errors import ConfigError
from tests.small_corpus import EOD, LENGTH, STAGE, stream, train_run, write_corpus

BATCH = STAGE.budget.sequences_per_batch
# SHA-256 of the samples of steps 0 and 9 of the stage over the corpus below.
GOLDEN_SAMPLES = (
    "7752cb964dfac9d760e85f29d3052a31fe96440d6eb6caff62764e203d359a18",
    "758bd01fb308d7d12b169037e3c7a28d8141d68bea301f9889e7c882e51ce1f8",
)
WITHIN = Documents(attention="within")
RESTART = Documents(attention="within", positions="restart")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("loader"), {"web": 60, "qa": 30})


@pytest.fixture(scope="module")
def run(corpus):
    made = train_run(corpus)
    prepare(made)
    return made


@pytest.fixture(scope="module")
def prepared(run):
    return open_prepared(run)


def rows(steps) -> list[list[list[int]]]:
    """Per step, the token rows in the order of its micro-batches."""
    return [[row for batch in step for row in batch["tokens"].tolist()] for step in steps]


def texts(*rows_of_ids: list[int]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int64) for row in rows_of_ids]


def test_step_t_holds_its_own_sequences_of_the_blend(prepared):
    loader = Loader(prepared, micro_batch=2)
    for t, step in enumerate(loader):
        assert [batch["tokens"].shape for batch in step] == [(2, LENGTH)] * 4
        for i in range(BATCH):
            text = prepared.blend[t * BATCH + i]["text"]
            assert step[i // 2]["tokens"][i % 2].tolist() == text[:-1].tolist()
            assert step[i // 2]["labels"][i % 2].tolist() == text[1:].tolist()
    assert t == STAGE.budget.steps - 1


def test_dtypes_and_what_the_default_words_mean(prepared):
    batch = next(iter(Loader(prepared, micro_batch=8)))[0]
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32, "position_ids": torch.int64,
    }  # fmt: skip
    assert batch["loss_mask"].tolist() == [[1.0] * LENGTH] * 8
    assert batch["position_ids"].tolist() == [list(range(LENGTH))] * 8


@pytest.mark.parametrize(("data_parallel", "micro_batch"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_layouts_do_not_change_a_step(prepared, data_parallel, micro_batch):
    plain = rows(Loader(prepared, micro_batch=8))
    ranks = [rows(Loader(prepared, micro_batch=micro_batch, data_parallel=data_parallel, data_rank=r)) for r in range(data_parallel)]
    assert [[row for rank in ranks for row in rank[t]] for t in range(len(plain))] == plain


def test_a_micro_batch_is_a_fixed_slice(prepared):
    loader = Loader(prepared, micro_batch=2, data_parallel=2, data_rank=1)
    assert loader.micro_batch_indices(3) == [[28, 29], [30, 31]]


def test_a_resumed_loader_goes_on(prepared):
    assert rows(Loader(prepared, micro_batch=4, start_step=7)) == rows(Loader(prepared, micro_batch=4))[7:]
    assert list(Loader(prepared, micro_batch=4, start_step=10)) == []


def test_worker_processes_change_nothing(prepared):
    here = Loader(prepared, micro_batch=4, start_step=5)
    workers = Loader(prepared, micro_batch=4, start_step=5, workers=2)
    for mine, theirs in zip(here, workers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_global_random_state_is_left_alone(prepared):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].tolist()
    next(iter(Loader(prepared, micro_batch=4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


def test_layouts_and_steps_outside_the_stage_are_refused(prepared):
    with pytest.raises(ConfigError, match="8 sequences is no multiple of micro_batch 3 x data-parallel 1"):
        Loader(prepared, micro_batch=3)
    with pytest.raises(ConfigError, match="start_step 11 lies outside the stage's 10 steps"):
        Loader(prepared, micro_batch=1, start_step=11)


def test_the_samples_of_a_step_are_the_golden_ones(prepared):
    hashes = [Loader(prepared, micro_batch=b, data_parallel=d).samples_sha256(t) for b, d, t in ((1, 1, 0), (2, 4, 9))]
    assert tuple(hashes) == GOLDEN_SAMPLES


def test_a_swapped_sample_changes_a_steps_hash(run):
    prepared = open_prepared(run)
    loader = Loader(prepared, micro_batch=1)
    hashes = [loader.samples_sha256(t) for t in range(10)]
    assert len(set(hashes)) == 10
    order = np.array(prepared.blend.streams[0].epoch(0).shuffle_index)
    order[[0, 1]] = order[[1, 0]]  # the first two web sequences, both of step 0
    prepared.blend.streams[0].epoch(0).shuffle_index = order
    assert loader.samples_sha256(0) != hashes[0]
    assert loader.samples_sha256(1) == hashes[1]


def test_eod_loss_false_drops_the_guess_after_an_end_of_document():
    ids = [5, EOD, 6, 7, EOD, EOD, 8]
    kept = make_batch(texts(ids), Documents(), EOD)["loss_mask"]
    dropped = make_batch(texts(ids), Documents(eod_loss=False), EOD)["loss_mask"]
    assert kept.tolist() == [[1, 1, 1, 1, 1, 1]]
    assert dropped.tolist() == [[1, 0, 1, 1, 0, 0]]  # the end itself is still predicted


def test_positions_restart_after_each_document():
    ids = [5, 6, EOD, 7, EOD, EOD, 8, 9, 1]
    assert make_batch(texts(ids), RESTART, EOD)["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert make_batch(texts(ids), WITHIN, EOD)["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def brute_force_hidden(ids: list[int]) -> list[list[bool]]:
    """Token q sees token k if k is not later and no document ends at k or after it, before q."""
    n = len(ids) - 1
    return [[not (k <= q and EOD not in ids[k:q]) for k in range(n)] for q in range(n)]


def test_attention_within_documents_is_block_diagonal_and_causal():
    two = texts([5, 6, EOD, 7, EOD, EOD, 8, 9, 1], [EOD, 3, 4, 5, 6, 7, 8, EOD, 9])
    mask = make_batch(two, WITHIN, EOD)["attention_mask"]
    assert mask.shape == (2, 1, 8, 8)
    assert mask.dtype == torch.bool
    assert mask[:, 0].tolist() == [brute_force_hidden(row.tolist()) for row in two]


def test_random_masks_match_the_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        row = rng.choice([EOD, 3, 4, 5], size=LENGTH + 1, p=[0.3, 0.3, 0.2, 0.2])
        batch = make_batch([row], RESTART, EOD)
        hidden = brute_force_hidden(row.tolist())
        assert batch["attention_mask"][0, 0].tolist() == hidden
        assert batch["position_ids"][0].tolist() == [line.count(False) - 1 for line in hidden]


def test_batches_share_no_memory(prepared):
    first, second = Loader(prepared, micro_batch=4), Loader(prepared, micro_batch=4)
    one, two = next(iter(first)), next(iter(second))
    one[0]["loss_mask"].zero_()
    one[0]["tokens"].zero_()
    assert one[1]["loss_mask"].sum() == two[0]["loss_mask"].sum() == 4 * LENGTH
    assert two[0]["tokens"].sum() > 0


def test_heldout_text_is_the_same_for_every_seed_and_never_trained_on(corpus, prepared):
    other = train_run(corpus, replace(STAGE, name="other", seed=99))
    prepare(other)
    mine, theirs = heldouts(prepared), heldouts(open_prepared(other))
    assert [h.source for h in mine] == ["web", "qa"]
    for a, b in zip(mine, theirs, strict=True):
        assert a.sequences == 5
        assert [x["tokens"].tolist() for x in a.batches(2)] == [x["tokens"].tolist() for x in b.batches(2)]
        ids = {a.stream.tokens.document_id(i) for i in range(len(a.stream.tokens))}
        assert all(name.startswith(f"{a.source}/heldout/") for name in ids)


@pytest.mark.parametrize(("micro_batch", "data_parallel"), [(1, 1), (2, 1), (5, 1), (8, 1), (2, 2), (1, 4), (4, 4)])
def test_heldout_sequences_count_once_in_every_layout(prepared, micro_batch, data_parallel):
    heldout = heldouts(prepared)[0]
    expected = sorted(heldout.stream[i]["text"][:-1].tolist() for i in range(5))
    ranks = [list(heldout.batches(micro_batch, data_parallel, r)) for r in range(data_parallel)]
    assert len({len(batches) for batches in ranks}) == 1
    counted = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch["tokens"].shape == (micro_batch, LENGTH)
        counted += [row.tolist() for row, mask in zip(batch["tokens"], batch["loss_mask"], strict=True) if mask.sum() == LENGTH]
        assert set(batch["loss_mask"].sum(dim=1).tolist()) <= {0.0, float(LENGTH)}
    assert sorted(counted) == expected


def test_fewer_heldout_sequences_than_asked_are_all_used(corpus):
    short = stream(corpus, "qa", split="heldout", order_seed=0)
    heldout = HeldOut(short, 1000, Documents(), EOD)
    assert heldout.sequences == short.sequences_per_epoch < 1000
    assert sum(int(batch["loss_mask"].sum()) for batch in heldout.batches(4)) == short.sequences_per_epoch * LENGTH


def test_no_validation_where_none_is_asked(run):
    stage = replace(STAGE, plan=replace(STAGE.plan, validation_sequences=0))
    assert heldouts(open_prepared(replace(run, stage=stage))) == []
