"""Six rollout steps straight equal three, kill -9, resume, three, a change of the cap inside: bit for bit, and the test can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ext.config.rl import Objective
from tests import rl_runs
from tests.rl_runs import CPU, FAULTS, rl_run, stage, trace
from tests.training_runs import DEAD

PLANS = {
    "one rank": CPU,
    "two data-parallel ranks": replace(CPU, ranks_per_node=2),
    "tensor 2": replace(CPU, ranks_per_node=2, tensor=2, sequence_parallel=True),
    "pipeline 2": replace(CPU, ranks_per_node=2, pipeline=2),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return rl_runs.parent(tmp_path_factory.mktemp("rl"))


def interrupted(run, fault=""):
    """Learn, be killed after the checkpoint of step 3, learn on; the resumed part's trace."""
    with pytest.raises(AssertionError, match=DEAD):
        trace(run, kill_after=3)
    return trace(run, fault=fault)


def same(resumed, straight):
    assert len(resumed["steps"]) == 3
    assert resumed["steps"] == straight["steps"][3:]
    assert resumed["scores"] == [one for one in straight["scores"] if one[0] > 3]
    assert resumed["progress"] == straight["progress"]
    assert resumed["digests"] == straight["digests"]


@pytest.mark.parametrize("name", PLANS)
def test_resume_is_bit_exact(start, name):
    made = stage(start.path.parent, plan=PLANS[name])
    straight = trace(rl_run(start, made, f"straight {name}"))
    same(interrupted(rl_run(start, made, f"resumed {name}")), straight)
    caps = [step[rl_runs.EXACT.index("cap_tokens")] for step in straight["steps"]]
    assert caps == [12, 12, 16, 16, 20, 20]
    shares = [step[rl_runs.EXACT.index("informative_share")] for step in straight["steps"]]
    assert max(shares) > 0, "no step moved a weight: the test shows nothing"


def test_resume_is_bit_exact_with_rollouts_sampled_ahead_and_a_reference(start):
    made = stage(start.path.parent, objective=Objective(kl_coefficient=0.1, importance_cap=2.0))
    made = replace(made, rollouts=replace(made.rollouts, max_staleness=1))
    straight = trace(rl_run(start, made, "straight ahead"))
    same(interrupted(rl_run(start, made, "resumed ahead")), straight)
    versions = [step[rl_runs.EXACT.index("weight_version")] for step in straight["steps"]]
    assert versions == [0, 0, 2, 4, 6, 8], "each step but the first was sampled by weights one rollout step (two updates) old"


def test_resume_is_bit_exact_with_resampling_and_easy_prompts_leaving(start):
    made = stage(start.path.parent)
    made = replace(made, rollouts=replace(made.rollouts, prompts_per_step=16, resample_uninformative=2, drop_easy_share=0.5))
    straight = trace(rl_run(start, made, "straight resampled"))
    same(interrupted(rl_run(start, made, "resumed resampled")), straight)
    assert straight["progress"].order.removed, "no problem left: the test shows nothing"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_deliberate_fault_is_noticed(start, fault):
    made = stage(start.path.parent)
    straight = trace(rl_run(start, made, f"straight {fault}"))
    resumed = interrupted(rl_run(start, made, f"resumed {fault}"), fault)
    assert resumed["digests"] != straight["digests"]
    assert resumed["steps"] != straight["steps"][3:]
