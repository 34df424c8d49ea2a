"""The order of sequences: prefix-stable streams, Megatron's own arrays underneath, caches never stale."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.helpers import build_blending_indices
from megatron.core.datasets.utils import Split

from megatron_ext.data import streams
from megatron_ext.data.shards import open_split
from megatron_ext.data.streams import Blend, TokenizerIdentity, epoch_seed
from megatron_ext.errors import DataError
from megatron_ext.provenance import read_corpus
from tests.small_corpus import EOD, LENGTH, index_cache, stream, write_corpus
from tools import bench_blend

# Of the first 40 sequences of the corpus below: the order is a promise to every run that was ever started.
GOLDEN_ORDER = "14714b1ce38057fe8f33300a7b5c0c6d4ab65e25dc2faa34cc696bf75d7c3c0d"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("streams"), {"web": 60, "qa": 30})


def blend_of(corpus, weights=(0.75, 0.25), size=80, starts=(0, 0)):
    parts = [stream(corpus, name, start_position=start) for name, start in zip(("web", "qa"), starts, strict=True)]
    return Blend(parts, list(weights), size, index_cache(corpus.path / "indices"))


def sha256(values) -> str:
    return hashlib.sha256(repr([tuple(vars(v).values()) for v in values]).encode()).hexdigest()


def test_the_order_is_the_golden_one(corpus):
    assert sha256(blend_of(corpus).sequence_ids(0, 40)) == GOLDEN_ORDER
    other = Blend([stream(corpus, name, order_seed=8) for name in ("web", "qa")], [0.75, 0.25], 80, index_cache(corpus.path / "indices"))
    assert sha256(other.sequence_ids(0, 40)) != GOLDEN_ORDER


def test_the_order_does_not_depend_on_how_much_is_drawn(corpus):
    few, many = blend_of(corpus, size=40), blend_of(corpus, size=400)
    assert few.sequence_ids(0, 40) == many.sequence_ids(0, 40)


def test_every_epoch_holds_every_sequence_once_in_an_order_of_its_own(corpus):
    web = stream(corpus, "web")
    count = web.sequences_per_epoch
    assert count == (web.tokens.num_tokens - 1) // LENGTH > 20
    epochs = [[web.sequence_id(i) for i in range(n * count, (n + 1) * count)] for n in range(2)]
    places = [[(one.document, one.offset) for one in epoch] for epoch in epochs]
    assert [one.epoch for one in epochs[1]] == [1] * count
    assert len(set(places[0])) == len(set(places[1])) == count
    assert places[0] != places[1]


def test_an_epoch_is_megatrons_gptdataset(corpus):
    web = stream(corpus, "web")
    tokens = open_split(corpus.path, read_corpus(corpus.path), "web", "train")
    tokenizer = TokenizerIdentity("f" * 64)
    tokenizer.eod = EOD  # for its masks, which are not ours
    config = GPTDatasetConfig(
        random_seed=epoch_seed(7, "web", 1), sequence_length=LENGTH, tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    theirs = GPTDataset(tokens, "", np.arange(len(tokens), dtype=np.int32), None, Split.train, config)
    for i in range(web.sequences_per_epoch):
        ours = web[web.sequences_per_epoch + i]["text"]
        assert ours.dtype == np.int64
        assert ours[:-1].tolist() == theirs[i]["tokens"].tolist()
        assert ours[1:].tolist() == theirs[i]["labels"].tolist()


def test_a_blend_is_megatrons_blendeddataset(corpus):
    blend = blend_of(corpus)
    theirs = BlendedDataset(blend.streams, [0.75, 0.25], 80, blend.config)
    for i in range(80):
        ours, other = blend[i], theirs[i]
        assert ours["position"] == other["position"]
        assert ours["text"].tolist() == other["text"].tolist()


def test_a_stream_that_starts_later_goes_on_in_the_same_order(corpus):
    whole = stream(corpus, "web")
    start = whole.sequences_per_epoch - 3  # across the end of the first epoch
    rest = stream(corpus, "web", start_position=start)
    for i in range(6):
        assert rest.sequence_id(i) == whole.sequence_id(start + i)
        assert rest[i]["text"].tolist() == whole[start + i]["text"].tolist()


@pytest.mark.parametrize("weights", [(0.999, 0.001), (0.001, 0.999), (0.5, 0.5), (0.7311, 0.2689)])
def test_every_prefix_of_a_blend_follows_the_weights(corpus, weights):
    blend = blend_of(corpus, weights, size=1200)
    for done in (1, 7, 400, 1001, 1200):
        shares = np.array(weights) * done
        assert np.all(np.abs(blend.counts(done) - shares) <= 1.0), done
    assert blend.draws.sum() == 1200
    blend.cover()
    assert blend[1199]["text"].shape == (LENGTH + 1,)


def test_a_blend_of_one_source_is_its_stream(corpus):
    web = stream(corpus, "web")
    blend = Blend([web], [1.0], 12, index_cache(corpus.path / "indices"))
    assert [one.position for one in blend.sequence_ids(0, 12)] == list(range(12))


def test_counts_are_those_of_the_index_in_any_order_of_asking(corpus):
    blend = blend_of(corpus, size=200)
    for done in (50, 200, 0, 3, 199):
        drawn = Counter(np.asarray(blend.dataset_index[:done]).tolist())
        assert blend.counts(done).tolist() == [drawn[0], drawn[1]]
    with pytest.raises(DataError, match="201 lies outside"):
        blend.counts(201)


def test_counts_see_a_swapped_source(corpus):
    blend = blend_of(corpus, size=200)
    right = blend.counts(100)
    altered = np.array(blend.dataset_index)
    altered[40] = 1 - altered[40]
    blend.dataset_index = altered
    blend.counts(0)  # count from the start again
    assert blend.counts(100).tolist() != right.tolist()


def test_positions_in_the_index_run_without_gaps(corpus):
    ids = blend_of(corpus, size=300, starts=(11, 2)).sequence_ids(0, 300)
    for source, start in (("web", 11), ("qa", 2)):
        positions = [one.position for one in ids if one.source == source]
        assert positions == list(range(start, start + len(positions)))


def test_changed_text_never_meets_an_old_index(tmp_path):
    first = stream(write_corpus(tmp_path, {"web": 60}), "web")
    before = [first[i]["text"].tolist() for i in range(5)]
    folders = {path.name for path in first._cache.root.iterdir()}
    changed_run = write_corpus(tmp_path / "b", {"web": 60}, seed=1)
    changed = stream(changed_run, "web", cache=first._cache)
    assert changed.tokens.digest != first.tokens.digest
    after = [changed[i]["text"].tolist() for i in range(5)]
    assert after != before
    assert len({path.name for path in first._cache.root.iterdir()} - folders) == 1
    with pytest.raises(DataError, match="no such index"):
        stream(changed_run, "web", cache=index_cache(first._cache.root, may_build=False), sequence_length=8)[0]


def test_an_index_is_found_wherever_the_corpus_lies(tmp_path):
    here, there = (write_corpus(tmp_path / name, {"web": 60}) for name in ("here", "there"))
    built = stream(here, "web")
    built.cover(1)
    copy = stream(there, "web", cache=index_cache(here.path / "indices", may_build=False))
    assert copy[0]["text"].tolist() == built[0]["text"].tolist()


class NoSizes:
    """The tokens of a stream, without the document sizes that a build reads."""

    def __init__(self, tokens) -> None:
        self.num_tokens, self.digest, self.get = tokens.num_tokens, tokens.digest, tokens.get

    @property
    def sequence_lengths(self) -> np.ndarray:
        raise AssertionError("a warm start read every document's size")


def test_a_warm_start_reads_no_document_sizes(corpus):
    built = stream(corpus, "web")
    warm = stream(corpus, "web", may_build=False, tokens=NoSizes(built.tokens))
    built.cover(2 * built.sequences_per_epoch)
    warm.cover(2 * built.sequences_per_epoch)
    assert warm[3]["text"].tolist() == built[3]["text"].tolist()
    with pytest.raises(AssertionError, match="every document's size"):
        stream(corpus, "web", order_seed=99, tokens=NoSizes(built.tokens)).cover(1)


def test_cover_opens_the_epochs_that_are_drawn_and_no_more(corpus, monkeypatch):
    opened = []
    real = streams.Epoch
    monkeypatch.setattr(streams, "Epoch", lambda tokens, config, cache: opened.append(config.random_seed) or real(tokens, config, cache))
    web = stream(corpus, "web")
    count = web.sequences_per_epoch
    web.cover(0)
    web.cover(count)
    assert opened == [epoch_seed(7, "web", 0)]
    web.cover(count + 1)
    assert opened == [epoch_seed(7, "web", 0), epoch_seed(7, "web", 1)]
    later = stream(corpus, "web", start_position=2 * count - 1)
    later.cover(2)
    assert opened[2:] == [epoch_seed(7, "web", 1), epoch_seed(7, "web", 2)]


def test_seeds_of_epochs_are_fixed_and_differ():
    assert epoch_seed(7, "web", 0) == int(hashlib.sha256(b"7/web/0").hexdigest()[:8], 16)
    assert len({epoch_seed(s, name, e) for s in (1, 2) for name in ("web", "qa") for e in range(50)}) == 200


def test_a_source_smaller_than_a_sequence_is_refused(corpus):
    with pytest.raises(DataError, match=r"source 'qa': its [\d,]+ tokens are fewer than one sequence of 100,000 \+ 1"):
        stream(corpus, "qa", sequence_length=100_000)


def test_sidecars_that_count_other_tokens_are_refused(corpus):
    web = stream(corpus, "web")
    web.tokens.num_tokens += LENGTH
    lying = stream(corpus, "web", tokens=web.tokens)
    with pytest.raises(DataError, match="shards and sidecars differ"):
        lying.cover(1)


def test_megatrons_blending_rule_draws_no_source_ahead_of_its_share():
    weights, size = [0.725, 0.10, 0.10, 0.05, 0.0125, 0.0125], 50_000
    dataset, sample = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    build_blending_indices(dataset, sample, weights, len(weights), size, False)
    for i, weight in enumerate(weights):
        running = np.cumsum(dataset == i)
        assert np.all(running <= weight * np.arange(1, size + 1) + 1)


def test_the_benchmark_opens_what_it_built(tmp_path):
    tokens = 40e6
    assert bench_blend.write_sizes(tmp_path, tokens)["documents"] == 26_014
    cold = bench_blend.measure(tokens=tokens, folder=tmp_path, phase="cold")
    warm = bench_blend.measure(tokens=tokens, folder=tmp_path, phase="warm")
    assert cold["sequences"] == warm["sequences"] == 5120
