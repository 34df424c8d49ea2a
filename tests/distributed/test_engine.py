"""The Megatron engine says what full forward passes and transformers say: alone, among others, under every layout, as weights change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config.rl import Sampling
from megatron_ext.errors import ConfigError, TrainingError
from megatron_ext.generation.engine import EngineStats, Generation, Request, generate_all
from megatron_ext.tokenizer import load_tokenizer
from tests import engine_answers, ranks
from tests.engine_answers import CAP, GREEDY, LOGPROB_BOUND, ROUNDING, SEED, Answers, Compared, apart, compare, engine, requests, say
from tests.family_models import Case, base, convert, llama3, loaded, one_thread, sharp_model
from tests.layouts import CPU, LAYOUTS
from tests.small_models import VOCAB_SIZE

MOST_TIES = 2  # of a family's draws, or of the answers that may differ for one
SLOTS = 5  # fewer than requests
LIVELY = 3.0  # times all projections, as in test_greedy: else a text is soon one repeated token
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 131_072, "rope_parameters": llama3(32.0), "tie_word_embeddings": True},
    "qwen2": {"rope_parameters": base(1e6), "rms_norm_eps": 1e-6},
    "qwen3": {"head_dim": 16, "rms_norm_eps": 1e-6},
}
SPREAD = {"tensor 2": 3, "pipeline 2": 1, "pipeline 2, interleaved": 2, "tensor 2 x pipeline 2": 3}  # families


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Any, Case]]:
    """Each family in transformers and converted."""
    found = {}
    for family, config in FAMILIES.items():
        model = sharp_model(family, LIVELY, LIVELY, **config)
        found[family] = model, Case(convert(model, tmp_path_factory.mktemp(family)), [])
    return found


@pytest.fixture(scope="module")
def cases(models) -> list[Case]:
    return [case for _, case in models.values()]


# ---- one rank, all in one process


@dataclass(frozen=True)
class OfFamily:
    """One family on one rank."""

    answers: Answers
    against_full_passes: Compared
    greedy: list[tuple[list[int], list[int], float]]  # where it leaves transformers' text: both, and how far the two logits are apart


@dataclass(frozen=True)
class OneRank:
    """What one rank found."""

    families: list[OfFamily]
    company: list[Answers]  # the first family's with 1, 4 and 64 slots, backwards, and each alone
    stats: list[EngineStats]  # of the first three
    stopped: list[tuple[Generation, Generation, str]]  # greedy, the same with a stop string, and that
    refusals: list[str]
    random_states_kept: bool


@pytest.fixture(scope="module")
def one_rank(models, cases) -> OneRank:
    prompts = list(dict.fromkeys(request.prompt for request in requests()))[:5]
    end = load_tokenizer(Path(cases[0].checkpoint)).eod_id
    theirs = [transformers_greedy(model, prompts, end) for model, _ in models.values()]
    assert len({token for texts in theirs for text in texts for token in text}) > 50, "the texts go round in circles"
    found: OneRank = ranks.run(_one_rank, CPU, cases, prompts, theirs)[0]
    return found


def transformers_greedy(model: Any, prompts: Sequence[Sequence[int]], end: int) -> list[list[int]]:
    """What `generate` writes, each prompt by itself; up to and with the token that ends documents."""
    found = []
    with one_thread():
        for prompt in prompts:
            ids, options = torch.tensor([prompt]), {"do_sample": False, "eos_token_id": end, "pad_token_id": 0}
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=CAP, **options)
            found.append(written[0, len(prompt) :].tolist())
    return found


def _random_states() -> Any:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def _one_rank(groups: Any, cases: list[Case], prompts: list[tuple[int, ...]], theirs: list[list[list[int]]]) -> OneRank:
    families = []
    for case, texts in zip(cases, theirs, strict=True):
        chunks, model = loaded(groups, case)
        said = say(chunks, model, groups, case, SLOTS, requests())
        of_prompts = [Request(number, prompt, CAP, GREEDY, SEED) for number, prompt in enumerate(prompts)]
        greedy = say(chunks, model, groups, case, 3, of_prompts)
        leaves = _leaves(chunks, model, groups, prompts, greedy.tokens, texts)
        families.append(OfFamily(said, compare(chunks, model, groups, requests(), said), leaves))
    chunks, model = loaded(groups, cases[0])
    before = _random_states()
    company, stats = _company(groups, cases[0], chunks, model)
    kept = before == _random_states()
    stopped, refusals = _stopping(groups, cases[0], chunks, model), _refusals(groups, cases[0])
    return OneRank(families, company, stats, stopped, refusals, kept)


def _leaves(chunks: Any, model: Any, groups: Any, prompts: Any, own: Any, theirs: Any) -> list[tuple[list[int], list[int], float]]:
    from megatron_ext.model.logits import logits_BSV

    found = []
    for prompt, one, other in zip(prompts, own, theirs, strict=True):
        if one != other:
            place = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            last = logits_BSV(chunks, torch.tensor([[*prompt, *one[:place]]]), groups, model.vocab_size)[0, -1]
            found.append((one, other, float((last[one[place]] - last[other[place]]).abs())))
    return found


def _company(groups: Any, case: Case, chunks: Any, model: Any) -> tuple[list[Answers], list[EngineStats]]:
    asked, found, stats = requests(), [], []
    for slots in (1, 4, 64):
        speaking = engine(chunks, model, groups, case, slots)
        found.append(engine_answers.answers(generate_all(speaking, asked)))
        stats.append(speaking.stats())
    backwards = generate_all(engine(chunks, model, groups, case, 4), asked[::-1])[::-1]
    alone = [generate_all(engine(chunks, model, groups, case, 4), [request])[0] for request in asked]
    return [*found, engine_answers.answers(backwards), engine_answers.answers(alone)], stats


def _stopping(groups: Any, case: Case, chunks: Any, model: Any) -> list[tuple[Generation, Generation, str]]:
    free = [replace(request, cap_tokens=CAP, sampling=Sampling()) for request in requests()]
    said = generate_all(engine(chunks, model, groups, case, 3), free)
    stops = [next((pair for pair in _pairs(one.text) if pair.isascii()), "~~") for one in said]
    asked = [replace(request, stop_strings=(stop,)) for request, stop in zip(free, stops, strict=True)]
    return list(zip(said, generate_all(engine(chunks, model, groups, case, 3), asked), stops, strict=True))


def _pairs(text: str) -> list[str]:
    """Neighbouring characters, from the middle of a text on."""
    return [text[place : place + 2] for place in range(len(text) // 2, len(text) - 1)]


def _refusals(groups: Any, case: Case) -> list[str]:
    chunks, model = loaded(groups, replace(case, change=(("max_positions", 64),)))
    speaking, good = engine(chunks, model, groups, case, 2), Request(4, (5, 6), 4, GREEDY, SEED)
    found = []
    for bad in (replace(good, prompt=()), replace(good, cap_tokens=0), replace(good, cap_tokens=63), replace(good, prompt=(VOCAB_SIZE,)),
                replace(good, stop_strings=("",))):  # fmt: skip
        try:
            speaking.submit([good, bad])
        except ConfigError as error:
            found.append(str(error))
    assert not speaking.poll(), "of a refused list nothing is taken"
    speaking.submit([replace(good, cap_tokens=62)])
    assert [one.id for one in speaking.poll()] == [4]
    assert not speaking.poll()
    return found


def test_what_is_sampled_is_what_full_passes_give(one_rank):
    for found in (family.against_full_passes for family in one_rank.families):
        print(found)
        assert found.num_draws > 150
        assert not found.wrong
        assert found.ties <= MOST_TIES
        assert found.worst_logprob < LOGPROB_BOUND


def test_greedy_text_is_that_of_transformers(one_rank):
    for family in one_rank.families:
        print(f"left transformers' text within rounding: {len(family.greedy)} prompts")
        assert all(gap < ROUNDING for _, _, gap in family.greedy), family.greedy
        assert len(family.greedy) <= MOST_TIES


def test_company_and_slots_change_no_answer(one_rank):
    first, *others = one_rank.company
    for other in others:
        differing, worst = apart(first, other)
        assert differing <= MOST_TIES
        assert worst < LOGPROB_BOUND


def test_the_counts(one_rank):
    asked, (one, four, all_at_once) = requests(), one_rank.stats
    assert [stats.longest_batch for stats in one_rank.stats] == [1, 4, len(asked)]
    assert one.response_tokens == one.decode_steps == sum(len(tokens) for tokens in one_rank.company[0].tokens)
    assert one.prompt_tokens == sum(len(request.prompt) for request in asked)
    prompts = {request.prompt for request in asked}
    assert all_at_once.prompt_tokens == sum(len(prompt) - 1 for prompt in prompts) + len(asked), "a shared prompt is computed once"
    assert all_at_once.decode_steps == max(len(tokens) for tokens in one_rank.company[2].tokens)
    assert all_at_once.decode_steps < four.decode_steps < one.decode_steps
    assert four.busy_seconds > 0


def test_global_random_states_are_left_alone(one_rank):
    assert one_rank.random_states_kept


def test_stop_strings(one_rank):
    ended = 0
    for free, stopped, stop in one_rank.stopped:
        if stop not in free.text:
            assert stopped.tokens.tolist() == free.tokens.tolist()
            continue
        ended += 1
        assert stopped.finish == "stop"
        assert stopped.text == free.text[: free.text.index(stop)]
        assert stopped.tokens.tolist() == free.tokens[: len(stopped.tokens)].tolist(), "tokens are kept whole"
    assert ended >= 6


def test_what_cannot_be_answered_is_refused(one_rank):
    empty, no_cap, long, unknown, stop = one_rank.refusals
    assert "request 4: its prompt is empty" in empty
    assert "its cap is 0 tokens" in no_cap
    assert "2 tokens of prompt + a cap of 63 = 65, but model" in long
    assert f"outside the {VOCAB_SIZE} of model" in unknown
    assert "one is empty" in stop


# ---- faults, and weights that change


def _changing(groups: Any, case: Case) -> tuple[list[Answers], Compared, list[list[int]]]:
    """Greedy answers before a change in place and after it, while one with the same prompt still runs; and versions of their tokens."""
    chunks, model = loaded(groups, case)
    speaking = engine(chunks, model, groups, case, 2)
    prompt = requests()[-1].prompt * 3
    asked = [Request(number, prompt, CAP if number == 0 else 5, GREEDY, SEED) for number in range(5)]
    speaking.submit(asked)
    ended = {one.id: one for one in speaking.poll()}
    engine_answers.change_weights(chunks)
    speaking.update_weights(7, None)
    while more := speaking.poll():
        ended |= {one.id: one for one in more}
    said = [ended[request.id] for request in asked]
    later = engine_answers.answers(said[2:])
    versions = [one.weight_versions.tolist() for one in said]
    return [engine_answers.answers([one]) for one in said], compare(chunks, model, groups, asked[2:], later), versions


def _faults(groups: Any, case: Case) -> tuple[dict[str, Compared], Any, Compared]:
    """Every fault's comparison; a change of weights as it should be; and one with the fault of that."""
    chunks, model = loaded(groups, case)
    found = {}
    for fault in engine_answers.FAULTS:
        with pytest.MonkeyPatch.context() as patch:
            fault(patch)
            said = say(chunks, model, groups, case, SLOTS, requests())
        found[fault.__name__] = compare(chunks, model, groups, requests(), said)
    changing = _changing(groups, case)
    with pytest.MonkeyPatch.context() as patch:
        engine_answers.keep_old_prompts(patch)
        return found, changing, _changing(groups, case)[1]


@pytest.fixture(scope="module")
def faults(cases) -> Any:
    return ranks.run(_faults, CPU, cases[0])[0]


def test_every_fault_shows(faults):
    for name, found in faults[0].items():
        assert found.fails, name


def test_a_change_in_place_is_seen_and_old_prompts_are_not_used(faults):
    _, (said, found, versions), with_old_prompts = faults
    assert not found.fails, found
    assert apart(said[1], said[2])[0] == 1, "the change shows nowhere"
    assert set(versions[0]) == {0, 7}, "the one that ran meanwhile has tokens of both"
    assert set(versions[1]) == {0}
    assert {version for one in versions[2:] for version in one} == {7}
    assert with_old_prompts.fails


# ---- layouts


def _spread(groups: Any, cases: list[Case]) -> tuple[list[Answers], Answers, str]:
    """Answers of each case; the last one's with a fault of the layout; and what an engine with damaged weights says."""
    found = []
    for case in cases:
        chunks, model = loaded(groups, case)
        found.append(say(chunks, model, groups, case, SLOTS, requests()))
    with pytest.MonkeyPatch.context() as patch:
        (engine_answers.keep_the_own_part if groups.plan.tensor > 1 else engine_answers.take_another_stage)(patch)
        faulty = say(chunks, model, groups, case, SLOTS, requests())
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.fill_(torch.nan)
    try:
        say(chunks, model, groups, case, SLOTS, requests())
    except TrainingError as error:
        return found, faulty, str(error)
    return found, faulty, ""


@pytest.mark.parametrize("layout", SPREAD)
def test_every_layout_says_the_same(layout, cases, one_rank):
    found = ranks.run(_spread, LAYOUTS[layout], cases[: SPREAD[layout]])
    assert all(of_rank[0] == found[0][0] for of_rank in found), "ranks of a copy have different answers"
    assert all("not finite" in of_rank[2] for of_rank in found), "damaged weights must stop every rank"
    for said, family in zip(found[0][0], one_rank.families, strict=False):
        differing, worst = apart(said, family.answers)
        assert differing <= MOST_TIES
        assert worst < LOGPROB_BOUND
    differing, _ = apart(found[0][1], one_rank.families[SPREAD[layout] - 1].answers)
    assert differing > MOST_TIES, "a fault of the layout does not show"
