"""The canary's requests and its arithmetic; and the error where vLLM is asked for and not there."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.errors import ConfigError, TrainingError
from megatron_ext.generation.canary import NEW_TOKENS, PROMPT_TOKENS, canary_requests, check_canary, decoded
from megatron_ext.generation.engine import Generation
from megatron_ext.generation.vllm_engine import require_vllm
from megatron_ext.tokenizer import load_tokenizer
from tests.unit import small_tokenizers

OWN = [np.array([-0.5, -1.0, -2.0], dtype=np.float32), np.array([-3.0], dtype=np.float32)]


def generation(logprobs, version: int = 3, **changes) -> Generation:
    values = np.asarray(logprobs, dtype=np.float32)
    whole = Generation(-1, np.zeros(len(values), np.int32), values, np.full(len(values), version, np.int32), "length", "")
    return replace(whole, **changes)


@pytest.mark.parametrize("prompt_tokens", [1, 7, PROMPT_TOKENS, 500])
def test_requests_are_greedy_fixed_and_of_one_length(tmp_path, prompt_tokens):
    tokenizer = load_tokenizer(small_tokenizers.hugging_face(tmp_path, 300))
    requests = canary_requests(tokenizer, prompt_tokens, 4)
    assert [len(request.prompt) for request in requests] == [prompt_tokens] * 4
    assert [request.id for request in requests] == [-1, -2, -3, -4]
    assert {(request.sampling.temperature, request.cap_tokens, request.stop_strings) for request in requests} == {(0, 4, ())}
    assert requests == canary_requests(tokenizer, prompt_tokens, 4)
    assert NEW_TOKENS > 2


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [([-0.5, -1.0, -2.0], [-3.0], 0.0), ([-0.5, -1.25, -2.0], [-3.0], 0.25), ([-0.5, -1.0, -2.0], [-2.5], 0.5)],
)
def test_the_gap_is_the_largest_of_all_tokens(first, second, gap):
    assert check_canary([generation(first), generation(second)], OWN, largest_gap=0.5) == gap


@pytest.mark.parametrize("wrong", [-1.75, -0.25, float("nan"), float("-inf")])
def test_a_gap_that_is_too_large_or_no_number_names_version_gap_and_way_out(wrong):
    with pytest.raises(TrainingError, match=r"weights version 3 .* differ by .*, at most 0\.5 .* plan\.engine=megatron"):
        check_canary([generation([-0.5, wrong, -2.0]), generation([-3.0])], OWN, largest_gap=0.5)


def test_a_canary_of_two_versions_says_nothing():
    with pytest.raises(TrainingError, match=r"versions \[2, 3\]"):
        check_canary([generation([-0.5, -1.0, -2.0]), generation([-3.0], version=2)], OWN, largest_gap=0.5)


def test_a_model_that_ends_every_text_at_once_is_not_stopped():
    """A base model may do so before it has learned anything."""
    ended = [generation([-0.5], finish="end"), generation([-3.0], finish="end")]
    assert check_canary(ended, [OWN[0][:1], OWN[1]], largest_gap=0.5) == 0
    assert not decoded(ended)
    assert decoded([generation([-0.5, -1.0]), ended[1]])


def test_without_vllm_the_error_names_the_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed, in any environment
    with pytest.raises(ConfigError, match=r"vLLM, which is not installed in .*plan\.engine=megatron.*make \.venv-vllm"):
        require_vllm()
