"""The ledger against a recount by walking every sample, across a branch too, and the way back to documents."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_ext.data.ledger import documents, inherit, ledger_at, start_positions
from megatron_ext.data.streams import Blend
from megatron_ext.provenance import Consumed
from tests.small_corpus import EOD, LENGTH, index_cache, stream, write_corpus

SIZE = 160


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("ledger"), {"web": 60, "qa": 30, "code": 40})


def blend_of(corpus, starts=None, **weights) -> Blend:
    parts = [stream(corpus, name, start_position=(starts or {}).get(name, 0)) for name in weights]
    return Blend(parts, list(weights.values()), SIZE, index_cache(corpus.path / "indices"))


def recount(blend: Blend, sequences: int) -> dict[str, int]:
    """Input tokens per source, by walking samples as training would and counting the document spans behind each."""
    tokens: Counter[str] = Counter()
    for i in range(sequences):
        sample = blend[i]
        source = blend.streams[sample["dataset_id"]]
        spans = list(documents(source, sample["position"], sample["position"] + 1))
        parts = [source.tokens.get(s.document, s.first_token, s.end_token - s.first_token) for s in spans]
        assert np.concatenate(parts).tolist() == sample["text"][:-1].tolist()
        tokens[source.source] += sum(s.end_token - s.first_token for s in spans)
    return dict(tokens)


def stage_tokens(ledger) -> dict[str, int]:
    return {line.source: line.stage_tokens for line in ledger if line.stage_tokens}


def test_the_ledger_is_a_recount_at_every_step(corpus):
    blend = blend_of(corpus, web=0.7, qa=0.3)
    for sequences in (0, 1, 2, 8, 77, SIZE):
        ledger = ledger_at(blend, sequences)
        assert stage_tokens(ledger) == recount(blend, sequences)
        assert sum(line.tokens for line in ledger) == sequences * LENGTH
        assert [line.source for line in ledger] == ["qa", "web"]


def test_epochs_and_positions_are_exact(corpus):
    blend = blend_of(corpus, web=0.7, qa=0.3)
    qa, web = ledger_at(blend, SIZE)
    assert (qa.position, web.position) == (48, 112)
    assert web == Consumed(
        source="web", position=112, tokens=112 * LENGTH, stage_tokens=112 * LENGTH,
        epochs=112 * LENGTH / blend.streams[0].tokens.num_tokens,
    )  # fmt: skip
    assert web.epochs > 1.0
    assert web.position > blend.streams[0].sequences_per_epoch


def test_a_swapped_sample_is_seen(corpus):
    blend = blend_of(corpus, web=0.7, qa=0.3)
    walked = recount(blend, 80)
    index = np.array(blend.dataset_index)
    swap = 80 + int(np.flatnonzero(index[80:] != index[79])[0])
    index[[79, swap]] = index[[swap, 79]]
    blend.dataset_index = index
    blend.counts(0)
    assert stage_tokens(ledger_at(blend, 80)) != walked
    assert stage_tokens(ledger_at(blend, SIZE)) == stage_tokens(ledger_at(blend_of(corpus, web=0.7, qa=0.3), SIZE))


def test_a_branch_carries_positions_and_tokens_on(corpus):
    parent = blend_of(corpus, web=0.7, qa=0.3)
    inherited = inherit(ledger_at(parent, 100), "branch")
    assert start_positions(inherited) == {"qa": 30, "web": 70}
    assert [line.stage_tokens for line in inherited] == [0, 0]
    child = blend_of(corpus, start_positions(inherited), web=0.5, code=0.5)
    code, qa, web = ledger_at(child, 40, inherited)
    assert (web.position, web.tokens, web.stage_tokens) == (90, 90 * LENGTH, 20 * LENGTH)
    assert (code.position, code.tokens, code.stage_tokens) == (20, 20 * LENGTH, 20 * LENGTH)
    assert (qa.position, qa.tokens, qa.stage_tokens) == (30, 30 * LENGTH, 0)
    assert qa.epochs == ledger_at(parent, 100)[0].epochs
    assert stage_tokens((code, qa, web)) == recount(child, 40)


def test_lineages_meet_no_document_twice_before_a_source_is_used_up(corpus):
    parent = blend_of(corpus, web=0.7, qa=0.3)
    inherited = inherit(ledger_at(parent, 40), "branch")
    child = blend_of(corpus, start_positions(inherited), web=0.3, code=0.7)
    drawn = [one for one in parent.sequence_ids(0, 40) + child.sequence_ids(0, 60) if one.source == "web"]
    assert 28 + 18 == len(drawn) < parent.streams[0].sequences_per_epoch
    assert len({(one.document, one.offset) for one in drawn}) == len(drawn)
    fresh = blend_of(corpus, {}, web=0.3, code=0.7)  # the fault: a child that begins at 0 again
    again = [one for one in parent.sequence_ids(0, 40) + fresh.sequence_ids(0, 60) if one.source == "web"]
    assert len({(one.document, one.offset) for one in again}) < len(again)


def test_a_start_by_weights_keeps_tokens_and_begins_a_new_order(corpus):
    parent = ledger_at(blend_of(corpus, web=0.7, qa=0.3), 100)
    inherited = inherit(parent, "weights")
    assert start_positions(inherited) == {"qa": 0, "web": 0}
    child = blend_of(corpus, start_positions(inherited), web=1.0)
    web = ledger_at(child, 10, inherited)[1]
    assert (web.position, web.tokens, web.stage_tokens) == (10, 80 * LENGTH, 10 * LENGTH)


def test_one_epoch_gives_every_document_token_once(corpus):
    web = stream(corpus, "web")
    covered: Counter[tuple[int, int]] = Counter()
    for span in documents(web, 0, web.sequences_per_epoch):
        assert span.document_id == web.tokens.document_id(span.document)
        assert span.epoch == 0
        covered.update((span.document, token) for token in range(span.first_token, span.end_token))
    assert set(covered.values()) == {1}
    left_out = web.tokens.num_tokens - len(covered)
    assert len(covered) == web.sequences_per_epoch * LENGTH
    assert 1 <= left_out <= LENGTH


def test_spans_end_where_documents_end(corpus):
    qa = stream(corpus, "qa")
    for position in range(qa.sequences_per_epoch):
        spans = list(documents(qa, position, position + 1))
        ends = np.cumsum([s.end_token - s.first_token for s in spans])
        inputs = qa[position]["text"][:-1]
        finished = [s.end_token == qa.tokens.sequence_lengths[s.document] for s in spans]
        assert (np.flatnonzero(inputs == EOD) + 1).tolist() == ends[finished].tolist()


def test_documents_see_an_altered_order(corpus):
    web = stream(corpus, "web")
    before = list(documents(web, 0, 1))
    order = np.array(web.epoch(0).shuffle_index)
    order[[0, 1]] = order[[1, 0]]
    web.epoch(0).shuffle_index = order
    assert list(documents(web, 0, 1)) != before
