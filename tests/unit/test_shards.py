"""Shards: Megatron-Core reads what we write, several shards read as one, and every fault is found and named."""

from __future__ import annotations

import functools
import gc
import os
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.data import shards as module
from megatron_ext.data.shard_checks import verify_shard
from megatron_ext.data.shards import HEADER_BYTES, Shards, ShardWriter, open_shard, open_split, token_dtype
from megatron_ext.errors import DataError
from megatron_ext.provenance import CorpusIndex, SourceRecord, file_sha256, read_sidecar, write_sidecar

EOD, VOCAB_SIZE = 2, 500
FACTS = {"source": "web", "split": "train", "vocab_size": VOCAB_SIZE, "eod_id": EOD, "bos": False, "tokenizer_hash": "a" * 64}
IDX_POINTERS = HEADER_BYTES + 4 * 3  # where the byte offsets of a shard with 3 documents begin


def write(folder, documents, name="train-00000", **facts):
    """A shard of the documents (end-of-document added), with ids d0, d1, ..."""
    with ShardWriter(folder, name, **{**FACTS, **facts}) as writer:
        for i, document in enumerate(documents):
            writer.add(f"d{i}", [*document, EOD])
        writer.finish()
    return folder / f"{name}.json"


def documents_of(seed, count):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB_SIZE, size=rng.integers(0, 30)).tolist() for _ in range(count)]


def rehash(path, **facts):
    """Make the sidecar fit its altered files again, so that only the content can give the fault away."""
    sidecar = read_sidecar(path)
    digests = {suffix: file_sha256(path.with_suffix(suffix)) for suffix in sidecar.sha256}
    write_sidecar(path, replace(sidecar, sha256=digests, **facts))


def poke(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def gpt_dataset(low_level, path, cache, sequence_length, num_samples):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Identity:
        vocab_size, eod = VOCAB_SIZE, EOD
        unique_identifiers: dict = {}

    config = GPTDatasetConfig(
        random_seed=5, sequence_length=sequence_length, blend=([path], None), split="1,0,0", tokenizer=Identity(), path_to_cache=str(cache),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    indices = np.arange(low_level.sequence_lengths.shape[0], dtype=np.int32)
    return GPTDataset(low_level, path, indices, num_samples, Split.train, config)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=12), min_size=1, max_size=20),
    vocab_size=st.sampled_from([VOCAB_SIZE, 1 << 16, (1 << 16) + 1]),
    chunk=st.sampled_from([1, 3, 1 << 20]),
)
def test_megatron_reads_the_same_documents(documents, vocab_size, chunk, tmp_path_factory, monkeypatch):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    monkeypatch.setattr(module, "CHUNK_ITEMS", chunk)
    path = write(tmp_path_factory.mktemp("shard"), documents, vocab_size=vocab_size)
    ours, theirs = Shards([path]), IndexedDataset(str(path.with_suffix("")))
    assert len(ours) == len(theirs) == len(documents)
    assert theirs.index.dtype == np.dtype(token_dtype(vocab_size)) == ours.get(0).dtype
    assert np.array_equal(ours.sequence_lengths, theirs.sequence_lengths)
    assert np.array_equal(ours.document_indices, theirs.document_indices)
    for i, document in enumerate(documents):
        assert ours[i].tolist() == theirs[i].tolist() == [*document, EOD]
        assert ours.get(i, len(document) // 2).tolist() == theirs.get(i, len(document) // 2).tolist()
        assert ours.get(i, 0, len(document)).tolist() == document
    assert verify_shard(path).tokens == ours.num_tokens == sum(map(len, documents)) + len(documents)


def test_gpt_dataset_over_three_shards_equals_one_indexed_dataset(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = documents_of(1, 90)
    parts = [write(tmp_path / "parts", documents[a:b], f"train-{i:05}") for i, (a, b) in enumerate([(0, 20), (20, 21), (21, 90)])]
    whole = write(tmp_path / "whole", documents)
    theirs = gpt_dataset(IndexedDataset(str(whole.with_suffix(""))), "data", tmp_path / "cache_1", 16, 300)
    ours = gpt_dataset(Shards(parts), "data", tmp_path / "cache_2", 16, 300)
    other = gpt_dataset(Shards(parts[::-1]), "data", tmp_path / "cache_3", 16, 300)
    assert len(ours) == len(theirs) >= 300
    assert all(np.array_equal(ours[i]["tokens"], theirs[i]["tokens"]) for i in range(len(ours)))
    assert not all(np.array_equal(other[i]["tokens"], theirs[i]["tokens"]) for i in range(len(ours)))


def test_document_ids_are_found_across_shards(tmp_path):
    names = ["", "é" * 50, "plain", "with\nnewline"]
    for number, part in enumerate([names[:1], names[1:]]):
        with ShardWriter(tmp_path, f"train-{number:05}", **FACTS) as writer:
            writer.extend(part, np.full(len(part), 2), np.array([7, EOD] * len(part)))
            writer.finish()
    shards = Shards([tmp_path / "train-00000.json", tmp_path / "train-00001.json"])
    assert [shards.document_id(i) for i in range(4)] == names


def test_reading_outside_a_document_is_an_error(tmp_path):
    shards = Shards([write(tmp_path, [[5, 6], [7]])])
    for arguments in [(2,), (-1,), (0, 4), (0, 0, 4), (1, 1, 2), (0, -1)]:
        with pytest.raises(IndexError):
            shards.get(*arguments)
    assert shards.get(0, 3).tolist() == []
    with pytest.raises(ValueError, match="read-only"):
        shards.get(0)[0] = 1


def test_pickles_as_its_paths(tmp_path):
    shards = Shards([write(tmp_path, documents_of(2, 500))])
    data = pickle.dumps(shards)
    assert len(data) < 1000
    assert pickle.loads(data)[7].tolist() == shards[7].tolist()


def test_digest_names_the_content(tmp_path):
    a = write(tmp_path / "a", [[5, 6], [7]])
    b = write(tmp_path / "b", [[5, 6], [7]])
    c = write(tmp_path / "c", [[5, 6], [8]])
    assert Shards([a]).digest == Shards([b]).digest != Shards([c]).digest
    assert Shards([a, c]).digest != Shards([c, a]).digest


def test_few_shards_stay_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_mapped", functools.lru_cache(maxsize=3)(module._Mapped))
    paths = [write(tmp_path, [[5 + i]], f"train-{i:05}") for i in range(12)]
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    shards = Shards(paths)
    assert [shards[i][0] for i in range(12)] == list(range(5, 17))
    assert [shards[i][0] for i in range(12)] == list(range(5, 17))
    assert len(os.listdir("/proc/self/fd")) - before <= 6


def test_memory_does_not_grow_with_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ITEMS", 10_000)
    peaks = []
    for batches in (5, 100):
        tracemalloc.start()
        with ShardWriter(tmp_path, f"train-{batches:05}", **FACTS) as writer:
            for _ in range(batches):
                writer.extend(["d"] * 2000, np.full(2000, 2), np.array([7, EOD] * 2000))
            assert writer.finish().documents == 2000 * batches
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000  # 190,000 more documents; one pointer each would be 1.5 MB


def test_nothing_is_published_before_the_end(tmp_path):
    def fail_midway():
        with ShardWriter(tmp_path, "train-00000", **FACTS) as writer:
            writer.add("d", [5, EOD])
            assert {path.suffix for path in tmp_path.iterdir()} == {".tmp"}
            raise KeyError

    with pytest.raises(KeyError):
        fail_midway()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_shard_leaves_nothing(tmp_path):
    with ShardWriter(tmp_path, "train-00000", **FACTS) as writer:
        assert writer.finish() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([5, VOCAB_SIZE, EOD], r"token ids from 2 to 500, but the vocabulary has 500 ids"),
        ([5, -1, EOD], r"token ids from -1 to 5"),
        ([5, 6], r"document 'd' does not end with the end-of-document id 2"),
    ],
)
def test_the_writer_refuses(tmp_path, tokens, message):
    with ShardWriter(tmp_path, "train-00000", **FACTS) as writer, pytest.raises(DataError, match=message):
        writer.add("d", tokens)


def test_a_cut_or_missing_file_is_found_at_opening(tmp_path):
    path = write(tmp_path, [[5, 6], [7]])
    whole = path.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"train-00000\.bin: cut short: expected 10 bytes, found 8\. Copy the shard again, or delete"):
        Shards([path])
    path.with_suffix(".bin").write_bytes(whole + b"\0")
    with pytest.raises(DataError, match=r"longer than written: expected 10 bytes, found 11"):
        open_shard(path)
    path.with_suffix(".bin").write_bytes(whole)
    path.with_suffix(".ids").unlink()
    with pytest.raises(DataError, match=r"train-00000\.ids: missing"):
        open_shard(path)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000\.json: no such file"):
        open_shard(path)


def test_a_sidecar_that_contradicts_itself_is_refused(tmp_path):
    path = write(tmp_path, [[5, 6], [7]])
    write_sidecar(path, replace(read_sidecar(path), documents=3))
    with pytest.raises(DataError, match=r"says 3 documents of 5 tokens, which make a \.idx file of 102 bytes, but also 82"):
        open_shard(path)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".ids"])
def test_one_altered_byte_opens_but_does_not_verify(tmp_path, suffix):
    path = write(tmp_path, documents_of(3, 40))
    verify_shard(path)
    data = bytearray(path.with_suffix(suffix).read_bytes())
    data[len(data) // 2] ^= 1
    path.with_suffix(suffix).write_bytes(data)
    open_shard(path)  # sizes fit, and opening reads nothing
    with pytest.raises(DataError, match=rf"train-00000\{suffix}: hashes to [0-9a-f]{{12}}, its sidecar says"):
        verify_shard(path)


def test_swapped_documents_do_not_verify(tmp_path):
    path = write(tmp_path, [[5, 6], [7, 8], [9]])
    poke(path.with_suffix(".bin"), 0, np.array([7, 8, EOD, 5, 6, EOD], dtype="<u2").tobytes())
    with pytest.raises(DataError, match=r"\.bin: hashes to"):
        verify_shard(path)


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
@pytest.mark.parametrize(
    ("suffix", "offset", "data", "facts", "message"),
    [
        (".bin", 0, None, {"vocab_size": 9}, r"\.bin: ids from .* but the vocabulary has 9 ids"),
        (".bin", 2, EOD.to_bytes(2, "little"), {}, r"document 0 \('d0'\) must hold the end-of-document id 2 at its end.*token 1 breaks"),
        (".bin", 10, b"\5\0", {}, r"document 1 \('d1'\) must hold .*token 5 breaks this"),
        (".bin", 0, None, {"largest_id": 8}, r"says its largest id is 8, found 9"),
        (".idx", IDX_POINTERS + 8, b"\4", {}, r"\.idx: .*lengths and offsets disagree"),
        (".idx", HEADER_BYTES, (2).to_bytes(4, "little") + (4).to_bytes(4, "little"), {}, r"\.idx: .*lengths and offsets disagree"),
        (".idx", IDX_POINTERS + 24 + 8, b"\2", {}, r"\.idx: bounds are not one sequence a document"),
        (".idx", 17, b"\4", {}, r"\.idx: its header names another element type"),
        (".ids", 6 + 8, b"\7", {}, r"\.ids: its table of offsets"),
    ],
)
def test_faults_that_the_digests_would_not_show(tmp_path, monkeypatch, chunk, suffix, offset, data, facts, message):
    monkeypatch.setattr("megatron_ext.data.shard_checks.CHUNK_ITEMS", chunk)
    path = write(tmp_path, [[5, 6], [7, 8], [9]])
    verify_shard(path)
    if data is not None:
        poke(path.with_suffix(suffix), offset, data)
    rehash(path, **facts)
    with pytest.raises(DataError, match=message):
        verify_shard(path)


def test_shards_of_two_tokenizers_do_not_mix(tmp_path):
    a = write(tmp_path, [[5]], "train-00000")
    b = write(tmp_path, [[5]], "train-00001", tokenizer_hash="b" * 64)
    with pytest.raises(DataError, match=r"train-00001\.json: made with tokenizer bbbbbbbbbbbb, but .*train-00000\.json with aaaaaaaaaaaa"):
        Shards([a, b])
    with pytest.raises(DataError, match="no shards given"):
        Shards([])


@pytest.fixture
def corpus(tmp_path):
    write(tmp_path / "shards" / "web", [[5, 6], [7]])
    record = SourceRecord(
        train=("shards/web/train-00000.json",), heldout=(), tokens=5, heldout_tokens=0, documents=2, heldout_documents=0, max_epochs=1.0
    )
    index = CorpusIndex(
        tokenizer_hash="a" * 64, tokenizer_path="tokenizer", vocab_size=VOCAB_SIZE, eod_id=EOD, bos=False, sources={"web": record}
    )
    return tmp_path, index


def test_a_corpus_opens_by_source_and_split(corpus):
    folder, index = corpus
    assert open_split(folder, index, "web", "train")[1].tolist() == [7, EOD]
    with pytest.raises(DataError, match=r"corpus\.json: no source 'wb'; did you mean 'web'\?"):
        open_split(folder, index, "wb", "train")
    with pytest.raises(DataError, match=r"source 'web' has no heldout documents; raise its heldout_fraction"):
        open_split(folder, index, "web", "heldout")


@pytest.mark.parametrize("facts", [{"tokenizer_hash": "b" * 64}, {"source": "code"}, {"split": "heldout"}, {"eod_id": 3}, {"bos": True}])
def test_a_shard_of_another_corpus_is_refused(corpus, facts):
    folder, index = corpus
    path = folder / "shards" / "web" / "train-00000.json"
    write_sidecar(path, replace(read_sidecar(path), **facts))
    key, value = next(iter(facts.items()))
    with pytest.raises(DataError, match=rf"train-00000\.json: {key} is {value!r}, but .*corpus\.json says .*belongs to another corpus"):
        open_split(folder, index, "web", "train")
