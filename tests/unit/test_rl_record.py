"""Records of rollouts: what is written comes back, what must stay stays, and a lost run folder or a full disk is not written to."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.attempts import Attempt
from megatron_ext.config.rl import Objective, Rollouts, check_staleness
from megatron_ext.errors import ConfigError, RunError
from megatron_ext.generation.engine import Generation
from megatron_ext.rl.full_grade import behaviour
from megatron_ext.rl.lengths import LengthState
from megatron_ext.rl.order import OrderState
from megatron_ext.rl.record import clear_unfinished, prune_records, read_record, write_record
from megatron_ext.rl.record_paths import record_path, recorded_steps
from megatron_ext.rl.rollouts import Batch, Rollout
from megatron_ext.tasks.grading import Verdict


def batch(step, tokens=4):
    ids = np.random.default_rng(step).integers(0, 1000, tokens, dtype=np.int32)
    made = Generation(0, ids, np.zeros(tokens, np.float32), np.zeros(tokens, np.int32), "end", "so \\boxed{7}. " + "ab" * 20)
    rollout = Rollout("p", (1, 2), 10, made, "graded", Verdict("correct", "7", "box"), "", 1.0, behaviour(made.text))
    return Batch(step, 10, 0, 1, (rollout,), OrderState(), LengthState())


def written(folder, steps):
    for step in steps:
        write_record(folder, batch(step))
    return {step: record_path(folder, step).stat().st_size for step in steps}


def test_what_was_found_out_about_a_response_comes_back(tmp_path):
    digest = write_record(tmp_path, batch(1))
    found = read_record(tmp_path, 1)
    assert found.sha256 == digest
    assert found.rollouts[0].behaviour == batch(1).rollouts[0].behaviour
    assert found.rollouts[0].behaviour.loops
    assert found.rollouts[0].behaviour.text_after_box


def test_old_records_go_first_and_those_after_the_oldest_checkpoint_stay(tmp_path):
    sizes = written(tmp_path, range(1, 9))
    assert prune_records(tmp_path, None, []) == []
    assert prune_records(tmp_path, sum(sizes.values()) - 1, []) == [2], "the first is right behind the stage's start"
    assert prune_records(tmp_path, 0, [4]) == [3, 4, 6]
    assert recorded_steps(tmp_path) == [1, 5, 7, 8]


@pytest.fixture
def lost(tmp_path):
    """An attempt that another has taken the run folder from."""
    for number in (1, 2):
        (tmp_path / "attempts" / str(number)).mkdir(parents=True)
        (tmp_path / "attempts" / str(number) / "plan.json").write_text('{"host": "h", "pid": 1, "started_at": "now"}')
    return Attempt(1, tmp_path / "attempts" / "1")


def test_a_lost_run_folder_is_neither_written_to_nor_pruned(tmp_path, lost):
    written(tmp_path, (1, 2, 3, 4))
    before = record_path(tmp_path, 2).read_bytes()
    with pytest.raises(RunError, match="lost the run folder"):
        write_record(tmp_path, replace(batch(2, tokens=9), seed=5), lost.check_owner)
    with pytest.raises(RunError, match="lost the run folder"):
        prune_records(tmp_path, 0, [], lost.check_owner)
    assert record_path(tmp_path, 2).read_bytes() == before
    assert sorted(os.listdir(tmp_path / "rollouts")) == [record_path(tmp_path, step).name for step in (1, 2, 3, 4)]


def test_a_disk_that_refuses_is_named_and_nothing_half_written_stays(tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"step_0000003\.jsonl\.gz: the rollouts of step 3 cannot be recorded: .*make room"):
            write_record(tmp_path, batch(3, tokens=10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_what_a_killed_attempt_left_is_removed(tmp_path):
    written(tmp_path, (1,))
    (tmp_path / "rollouts" / ".step_0000002.jsonl.gz.77.tmp").write_bytes(b"half")
    clear_unfinished(tmp_path)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == [record_path(tmp_path, 1).name]


def test_older_weights_need_an_importance_cap():
    check_staleness(Rollouts(), Objective())
    check_staleness(Rollouts(max_staleness=1), Objective(importance_cap=2.0))
    with pytest.raises(ConfigError, match=r"max_staleness=1 needs objective\.importance_cap"):
        check_staleness(Rollouts(max_staleness=1), Objective())
