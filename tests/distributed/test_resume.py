"""2k steps straight equal k steps, kill -9, resume, k steps: bit for bit, and the test can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ext.config.plan import TrainPlan
from tests.small_corpus import train_run, write_corpus
from tests.training_runs import DEAD, stage, trace

CPU = TrainPlan(device="cpu")
PLANS = {
    "distributed optimizer": CPU,
    "plain optimizer": replace(CPU, distributed_optimizer=False),
    "two data-parallel ranks": replace(CPU, ranks_per_node=2),
    "tensor 2": replace(CPU, ranks_per_node=2, tensor=2, sequence_parallel=True),
    "pipeline 2": replace(CPU, ranks_per_node=2, pipeline=2, micro_batch=2),
}
EXACT = ("steps", "digests", "progress")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("resume"), {"web": 60, "qa": 30})


def interrupted(run, after):
    """Train, be killed after the checkpoint of step `after`, train on; the resumed part's trace."""
    with pytest.raises(AssertionError, match=DEAD):
        trace(run, kill_after=after)
    return trace(run)


@pytest.mark.parametrize("name", PLANS)
def test_resume_in_the_middle_is_bit_exact(corpus, name):
    straight = trace(train_run(corpus, replace(stage(plan=PLANS[name]), name=f"straight {name}")))
    resumed = interrupted(train_run(corpus, replace(stage(plan=PLANS[name]), name=f"resumed {name}")), after=4)
    assert len(resumed["steps"]) == 4
    assert resumed["steps"] == straight["steps"][4:]
    assert resumed["digests"] == straight["digests"]
    assert resumed["progress"] == straight["progress"]


@pytest.mark.parametrize("after", [1, 7])
def test_resume_after_the_first_and_before_the_last_step(corpus, after):
    straight = trace(train_run(corpus, replace(stage(save_every_steps=1), name=f"straight {after}")))
    resumed = interrupted(train_run(corpus, replace(stage(save_every_steps=1), name=f"resumed {after}")), after=after)
    assert resumed["steps"] == straight["steps"][after:]
    assert resumed["digests"] == straight["digests"]


@pytest.mark.parametrize("fault", ["aliased optimizer step", "shifted learning rate", "swapped sample"])
def test_a_deliberate_fault_is_noticed(corpus, fault):
    straight = trace(train_run(corpus, replace(stage(), name=f"straight {fault}")))
    run = train_run(corpus, replace(stage(), name=f"resumed {fault}"))
    with pytest.raises(AssertionError, match=DEAD):
        trace(run, kill_after=4)
    resumed = trace(run, fault=fault)
    assert resumed["digests"] != straight["digests"]
    assert [s[:3] for s in resumed["steps"]] != [s[:3] for s in straight["steps"][4:]]
