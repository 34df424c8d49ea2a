"""What is recorded of rollouts: numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.config.rl import CapFrom, Objective, ProgressLengths, TruncationLengths
from megatron_ext.errors import ConfigError
from megatron_ext.generation.engine import Generation
from megatron_ext.rl.full_grade import behaviour
from megatron_ext.rl.lengths import LengthState
from megatron_ext.rl.measures import outcome_counts, responses_record, rollout_record
from megatron_ext.rl.order import OrderState
from megatron_ext.rl.progress import RLProgress, progress_from_json, progress_to_json
from megatron_ext.rl.rollouts import Batch, Rollout, judged
from megatron_ext.tasks.grading import Verdict

RIGHT = Verdict("correct", "7", "box")
WRONG = Verdict("wrong", "8", "box", "another number")
NO_BOX = Verdict("unparseable", None, "box", "no box")


def rollout(tokens, verdict, reward, finish="end", text="so \\boxed{7}", ending="graded"):
    made = Generation(0, np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.float32), np.zeros(tokens, np.int32), finish, text)
    return Rollout("p", (1, 2, 3), 10, made, ending, verdict, "", reward, behaviour(text))


ROLLOUTS = (
    rollout(4, RIGHT, 1.0),
    rollout(6, WRONG, -1.0),
    rollout(10, NO_BOX, -1.0, "length", "ab" * 20),
    rollout(8, None, -1.0, "stop", ending="timed_out"),
)
BATCH = Batch(3, 10, 4, 1, ROLLOUTS, OrderState(draws=2), LengthState(), sha256="x")


def test_means_and_shares():
    found = responses_record(ROLLOUTS)
    assert found == {
        "accuracy": 0.25, "response_tokens_mean": 7.0, "response_tokens_max": 10, "correct_tokens_mean": 4.0, "truncated_share": 0.25,
    }  # fmt: skip
    assert responses_record(ROLLOUTS[1:])["correct_tokens_mean"] is None


def test_time_outs_are_counted_apart_from_wrong_answers():
    assert outcome_counts(ROLLOUTS) == {"correct": 1, "wrong": 1, "unparseable": 1, "error": 0, "timed_out": 1, "crashed": 0}


def test_a_step():
    found = rollout_record(BATCH, group=2)
    assert (found["num_prompts"], found["num_responses"], found["prompt_tokens_mean"]) == (2, 4, 3.0)
    assert (found["reward_mean"], found["reward_min"], found["reward_max"]) == (-0.5, -1.0, 1.0)
    assert found["loop_share"] == 0.25
    assert found["box_first_share"] == 0.75
    assert found["text_after_box_share"] == 0.0


def test_informative_groups_and_truncated_responses():
    found = judged(Objective(), "correct", ROLLOUTS, 2)
    assert found.informative_share == 0.5
    assert found.advantages_PG.tolist()[1] == [0.0, 0.0]
    assert found.advantages_PG[0].tolist() == pytest.approx([0.7071, -0.7071], abs=1e-4)
    masked = judged(Objective(truncated="masked"), "correct", ROLLOUTS, 2)
    assert masked.counted_PG.tolist() == [[True, True], [False, True]]


def test_progress_survives_a_checkpoint_and_a_foreign_one_is_refused():
    schedule = ProgressLengths(caps=(CapFrom(after=0, cap_tokens=8),))
    order = OrderState(draws=8, epoch=1, offset=4, removed=("a",), right={"b": (1, 4)})
    progress = RLProgress(step=3, updates=6, tokens=90, lineage_tokens=190, order=order, lengths=LengthState(rollout_steps=3))
    assert progress_from_json(schedule, progress_to_json(progress), "x") == progress
    with pytest.raises(ConfigError, match=r"x: .*updatez"):
        progress_from_json(schedule, {**progress_to_json(progress), "updatez": 1}, "x")
    raised = replace(progress, lengths=LengthState(rollout_steps=3, raises=5))
    with pytest.raises(ConfigError, match="5 raises"):
        progress_from_json(TruncationLengths(caps_tokens=(8, 16), share=0.5, steps=2), progress_to_json(raised), "x")
