"""Drawing tokens: exact shares by enumeration, the same draws whatever else is in the batch, and transformers' own warpers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_ext.config.base import from_json, to_json
from megatron_ext.config.rl import Sampling
from megatron_ext.errors import ConfigError, TrainingError
from megatron_ext.generation.sampling import draw, processed_logprobs, sample, uniform

PLAIN, GREEDY = Sampling(), Sampling(temperature=0.0)


def logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def probabilities(found: torch.Tensor) -> list[float]:
    return found[0].exp().tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (PLAIN, [0.1, 0.4, 0.2, 0.3]),
        (GREEDY, [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(top_k=1), [0, 1, 0, 0]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.3), [0, 1, 0, 0]),
        (Sampling(top_p=0.5), [0, 4 / 7, 0, 3 / 7]),  # the token that crosses p stays
        (Sampling(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),  # of 4/9, 3/9 and 2/9 the second crosses a half
        (Sampling(top_k=2, top_p=0.5), [0, 1, 0, 0]),  # 4/7 of what top-k left crosses it alone: top-k comes first
        (Sampling(temperature=0.5, top_p=0.5), [0, 1, 0, 0]),  # 16/30 crosses it alone: temperature comes first
    ],
)
def test_the_processed_distribution_by_hand(sampling, expected):
    assert probabilities(processed_logprobs(logs(0.1, 0.4, 0.2, 0.3), [sampling])) == pytest.approx(expected, abs=1e-6)


def test_top_p_ends_with_the_token_that_reaches_it_exactly():
    quarters = torch.zeros(1, 4)  # FP64 probabilities of exactly 1/4
    kept = [int(processed_logprobs(quarters, [Sampling(top_p=p)]).isfinite().sum()) for p in (0.24, 0.25, 0.26, 0.5, 0.51, 0.75, 1.0)]
    assert kept == [1, 1, 2, 2, 3, 3, 4]


def test_ties():
    tied = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0]])
    assert processed_logprobs(tied, [Sampling(top_k=2)]).isfinite().tolist() == [[False, True, True, True, False]]  # all equals of the last
    assert processed_logprobs(tied, [Sampling(top_p=0.4)]).isfinite().tolist() == [[False, True, True, False, False]]  # the first of equals
    assert sample(tied, [GREEDY], [0.99]).tokens_B.tolist() == [1]


WARPED = [
    Sampling(temperature=0.6), Sampling(top_k=7), Sampling(top_p=0.8), Sampling(temperature=1.7, top_p=0.95),
    Sampling(temperature=0.6, top_k=20, top_p=0.95), Sampling(temperature=1.3, top_k=1000, top_p=0.01),
]  # fmt: skip


@pytest.mark.parametrize("sampling", WARPED, ids=str)
def test_as_transformers_warps(sampling):
    scores = logits(50, 300)
    warped = scores.double()
    for warper in (
        TemperatureLogitsWarper(sampling.temperature),
        *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        *([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []),
    ):
        warped = warper(torch.zeros(50, 1, dtype=torch.long), warped)
    ours, theirs = processed_logprobs(scores, [sampling] * 50), warped.log_softmax(dim=-1)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.allclose(ours.double(), theirs, rtol=5e-7, atol=2e-6)  # FP32's rounding at -40


def shares_differ(drawing, sampling: Sampling, points: int = 20_000) -> float:
    """The most that any token's count, over evenly spaced uniforms, differs from its share of them."""
    row = logits(1, 40, seed=3)
    expected = processed_logprobs(row, [sampling])[0].double().exp() * points
    tokens = drawing(row, sampling, [(i + 0.5) / points for i in range(points)])
    return float((torch.bincount(tokens, minlength=40) - expected).abs().max())


def ours(row, sampling, uniforms):
    return sample(row.expand(len(uniforms), -1), [sampling] * len(uniforms), uniforms).tokens_B


def without_processing(row, sampling, uniforms):
    return draw(row.log_softmax(-1).expand(len(uniforms), -1), uniforms)


def off_by_one(row, sampling, uniforms):
    return (ours(row, sampling, uniforms) + 1) % 40


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(temperature=2.0), Sampling(top_k=5), Sampling(temperature=1.5, top_p=0.7)], ids=str)
def test_every_token_gets_its_share_of_the_uniforms_exactly(sampling):
    assert shares_differ(ours, sampling) <= 1.0 + 1e-3  # two ends of an interval; FP32's rounding of the probabilities
    if sampling != PLAIN:
        assert shares_differ(without_processing, sampling) > 100
    assert shares_differ(off_by_one, sampling) > 100


def test_the_ends_of_the_uniforms_never_give_an_impossible_token():
    row = torch.tensor([[-torch.inf, 0.3, -torch.inf, 1.0, 0.1, -torch.inf]])
    last = 1 - 2.0**-52  # the largest that `uniform` can give
    assert sample(row.expand(2, -1), [PLAIN] * 2, [0.0, last]).tokens_B.tolist() == [1, 4]
    for seed in range(200):
        row = logits(1, 50, seed)
        row[0, 30:] = -torch.inf
        drawn = sample(row, [PLAIN], [last])
        assert drawn.tokens_B.item() == 29
        assert drawn.logprobs_B.isfinite()


def test_the_log_probability_is_that_of_the_distribution_drawn_from():
    scores = logits(64, 30)
    warm = Sampling(temperature=0.5, top_p=0.9)
    drawn = sample(scores, [warm] * 64, [uniform(1, row, 0) for row in range(64)])
    rows = torch.arange(64)
    assert torch.equal(drawn.logprobs_B, processed_logprobs(scores, [warm] * 64)[rows, drawn.tokens_B])
    plain = scores.log_softmax(-1)[rows, drawn.tokens_B]
    assert (drawn.logprobs_B - plain).abs().max() > 0.5  # the model's own would be another number


SETTINGS = [PLAIN, GREEDY, Sampling(temperature=0.7, top_k=9), Sampling(top_p=0.6)]


def one_by_one(scores, settings, draws):
    found = [sample(scores[i : i + 1], settings[i : i + 1], draws[i : i + 1]) for i in range(len(scores))]
    return torch.cat([each.tokens_B for each in found]), torch.cat([each.logprobs_B for each in found])


@pytest.mark.parametrize("vocabulary", [1, 33, 1031])
def test_neighbours_change_nothing(vocabulary):
    scores, settings = logits(24, vocabulary), SETTINGS * 6
    draws = [uniform(7, request, 5) for request in range(24)]
    together = sample(scores, settings, draws)
    tokens, logprobs = one_by_one(scores, settings, draws)
    assert torch.equal(together.tokens_B, tokens)
    assert torch.equal(together.logprobs_B, logprobs)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist()
    moved = sample(scores[order], [settings[i] for i in order], [draws[i] for i in order])
    assert torch.equal(moved.tokens_B, tokens[order])


def test_a_draw_that_depended_on_the_place_in_the_batch_would_be_noticed():
    scores = logits(24, 33)
    by_place = sample(scores.flip(0), [PLAIN] * 24, [uniform(7, place, 5) for place in range(24)])
    by_request = sample(scores, [PLAIN] * 24, [uniform(7, request, 5) for request in range(24)])
    assert not torch.equal(by_place.tokens_B.flip(0), by_request.tokens_B)


def test_the_global_random_state_is_neither_read_nor_moved():
    scores, draws = logits(8, 100), [uniform(0, request, 0) for request in range(8)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(scores, [PLAIN] * 8, draws)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(sample(scores, [PLAIN] * 8, draws).tokens_B, first.tokens_B)


def test_inputs_stay_as_they_are():
    scores = logits(4, 10)
    before = scores.clone()
    sample(scores, SETTINGS, [0.5] * 4)
    assert torch.equal(scores, before)


def test_the_uniforms_are_fixed_for_all_time():
    found = [uniform(0, 0, 0), uniform(1, 2, 3), uniform(-5, 10**12, 8191)]
    assert found == [0.156742553465558, 0.7069603535111166, 0.10756418950911972]  # others, and no recorded run could be sampled again


def test_the_uniforms_are_even_and_unrelated():
    grid = torch.tensor([[uniform(42, request, position) for position in range(100)] for request in range(100)], dtype=torch.float64)
    assert grid.min() >= 0
    assert grid.max() < 1
    assert len(grid.unique()) == 10_000
    counts = torch.histc(grid, 20, 0, 1)
    assert ((counts - 500).square() / 500).sum() < 43.8  # chi-square of 19 degrees of freedom, 0.1 %; the numbers are fixed
    other_seed = torch.tensor([uniform(43, 0, position) for position in range(100)], dtype=torch.float64)
    pairs = [(grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:]), (grid[0], other_seed), (grid, grid.t())]
    for one, other in pairs:
        distinct = one != other  # the diagonal of the last pair
        both = torch.stack([one[distinct], other[distinct]])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / math.sqrt(both.shape[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_name_the_requests(bad):
    scores = logits(3, 5)
    scores[1, 2] = bad
    with pytest.raises(TrainingError, match=r"logits of requests \[1\] of the batch are not finite.*load a checkpoint"):
        sample(scores, SETTINGS[:3], [0.5] * 3)
    scores[1] = -torch.inf  # nothing possible at all
    with pytest.raises(TrainingError, match=r"requests \[1\]"):
        sample(scores, [PLAIN] * 3, [0.5] * 3)


def test_low_precision_and_no_requests():
    drawn = sample(logits(2, 9).bfloat16(), SETTINGS[:2], [0.1, 0.9])
    assert drawn.logprobs_B.dtype == torch.float32
    assert sample(torch.empty(0, 9), [], []).tokens_B.shape == (0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1.0, must be 0 \(greedy\) or at least 1e-05"),
        ({"temperature": 1e-6}, "temperature is 1e-06"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0, must be at least 1, or null"),
        ({"top_p": 0.0}, r"top_p is 0.0, must lie in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_impossible_settings_name_the_value(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


def test_settings_go_to_json_and_back():
    for sampling in (*SETTINGS, *WARPED):
        assert from_json(Sampling, to_json(sampling)) == sampling
