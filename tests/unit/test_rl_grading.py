"""Workers find out all about a response; another cap cuts the long ones, and holds for the others too."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.config.rl import Sampling
from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.errors import DataError
from megatron_ext.generation.engine import Generation, Request
from megatron_ext.rl.full_grade import behaviour
from megatron_ext.rl.grading import graded, grading_pool, regraded
from megatron_ext.tasks.grading import grade
from megatron_ext.tasks.problems import Problem
from megatron_ext.tasks.reward import REWARDS
from megatron_ext.tokenizer import load_tokenizer
from tests.unit import small_tokenizers

PROBLEM = Problem("p", "3+4=", ("7",), "")
TEXTS = ("so \\boxed{7}", "\\boxed{8} and more", "no box " * 20, "\\boxed{\\frac{14}{2}}")


@pytest.fixture(scope="module")
def pool():
    with grading_pool(RLPlan(grading_workers=1)) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(small_tokenizers.hugging_face(tmp_path_factory.mktemp("tokenizer")))


def rollouts(pool, tokenizer, reward, texts=TEXTS):
    requests = [Request(number, (1, 2), 1000, Sampling(), 1) for number in range(len(texts))]
    answers = []
    for request, text in zip(requests, texts, strict=True):
        ids = np.array(tokenizer.encode(text), np.int32)
        answers.append(Generation(request.id, ids, np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32), "end", text))
    return graded(pool, [PROBLEM] * len(texts), requests, answers, reward)


@pytest.mark.parametrize("reward", REWARDS)
def test_workers_find_what_is_found_here(pool, tokenizer, reward):
    for one, text in zip(rollouts(pool, tokenizer, reward), TEXTS, strict=True):
        assert one.verdict == grade(PROBLEM, text)
        assert type(one.verdict) is type(grade(PROBLEM, text)), "what is recorded is the plain verdict"
        assert one.reward == REWARDS[reward](one.verdict, text)
        assert one.behaviour == behaviour(text)


def test_a_worker_needs_no_torch():
    """It would cost every worker seconds and hundreds of megabytes."""
    program = "import sys, megatron_ext.rl.full_grade; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_one_that_no_worker_got_done_is_judged_by_its_text(tokenizer):
    with grading_pool(replace(RLPlan(grading_workers=1), grading_seconds=1e-9)) as late:
        found = rollouts(late, tokenizer, "repeat_penalty", texts=("loop " * 20 + "\\boxed{2^{30}+x}",))
    one = found[0]
    if one.ending == "timed_out":  # a fast worker may have been done before anyone looked
        assert one.verdict is None
    assert (one.reward, one.behaviour.loops) == (-2.0, True)


def test_another_cap_holds_for_every_response(pool, tokenizer):
    made = rollouts(pool, tokenizer, "correct")
    cap = max(one.num_tokens for one in made) - 1
    found = regraded(pool, {"p": PROBLEM}, made, cap, tokenizer, "correct")
    assert {one.cap_tokens for one in found} == {cap}
    assert [one.is_truncated for one in found] == [one.num_tokens > cap for one in made]
    assert sum(one.is_truncated for one in found) >= 1
    assert {one.cap_tokens for one in regraded(pool, {"p": PROBLEM}, made, None, tokenizer, "correct")} == {1000}
    with pytest.raises(DataError, match="no longer holds p"):
        regraded(pool, {}, made, None, tokenizer, "correct")
