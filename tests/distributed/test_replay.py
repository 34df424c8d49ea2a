"""A recorded rollout step computed again: equal bit for bit; and what another clip, cap or reward would have made of it."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import ConfigError, DataError, RunError
from megatron_ext.launch.verbs import run_of_kind
from megatron_ext.rl import replay as replays
from megatron_ext.rl.actor import Actor
from megatron_ext.rl.record import read_record, write_record
from megatron_ext.rl.record_paths import record_path, recorded_steps
from megatron_ext.rl.replay_request import changed_stage, check_request
from megatron_ext.runs import open_run
from tests import ranks, rl_runs
from tests.rl_runs import CPU, rl_run, stage, trace

PLANS = {"one rank": CPU, "tensor 2": replace(CPU, ranks_per_node=2, tensor=2)}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return rl_runs.parent(tmp_path_factory.mktemp("replay"))


@pytest.fixture(scope="module")
def done(start):
    run = rl_run(start, stage(start.path.parent), "done")
    trace(run)
    return run


def again(run, step, *changes):
    return ranks.run(_replay, run.stage.plan, str(run.path), step, changes)[0]


def _replay(groups: Any, path: str, step: int, changes: tuple[str, ...], is_off: bool = False) -> Any:
    run = open_run(Path(path))
    update, last = Actor.update, step * run.stage.rollouts.updates_per_step - 1

    def off(self: Any, part: Any, rate: float, updates_before: int) -> Any:
        return update(self, part, rate * (1.001 if updates_before == last else 1.0), updates_before)

    if is_off:  # in a process of its own
        Actor.update = off  # type: ignore[method-assign]
    return replays.replay(groups, run.path, step, changes, changed_stage(run.stage, changes))


@pytest.mark.parametrize("step", [1, 6])
def test_a_step_comes_out_as_it_was(done, step):
    found = again(done, step)
    assert found["equal"], found["differences"]
    assert found["replayed_from"]["step"] == {1: 0, 6: 3}[step]
    if step == 1:
        assert found["as_it_was"]["grad_norm"] > 0
        assert found["weights"] is None, "nothing was saved after it"
    else:
        assert found["weights"]["checkpoint"] == "iter_0000006"
        assert found["weights"]["compared"] > 10
        assert "weights to iter_0000006" in replays.replay_text(found)


def test_weights_that_come_out_otherwise_are_noticed(done):
    """No recorded number sees the last optimizer step: here its rate is a little higher."""
    found = ranks.run(_replay, done.stage.plan, str(done.path), 6, (), True)[0]
    assert not found["equal"]
    assert len(found["weights"]["unequal"]) > 10
    assert [one.partition(":")[0] for one in found["differences"]] == ["weights"]


def test_under_tensor_parallelism(start):
    run = rl_run(start, stage(start.path.parent, steps=2, plan=PLANS["tensor 2"]), "split")
    trace(run)
    found = again(run, 2)
    assert found["equal"], found["differences"]
    assert found["weights"]["compared"] % 2 == 0, "of both ranks"


def test_an_altered_record_is_noticed(start):
    run = rl_run(start, stage(start.path.parent, steps=2), "altered")
    trace(run)
    path = record_path(run.path, 2)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    row = json.loads(lines[1])
    lines[1] = json.dumps({**row, "reward": -row["reward"]})
    path.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n"))
    found = again(run, 2)
    assert not found["equal"]
    assert any(one.startswith("rollouts_sha256") for one in found["differences"])
    assert any(one.startswith("grad_norm") for one in found["differences"])


def test_what_another_cap_and_reward_would_have_made_of_it(done):
    batch = read_record(done.path, 5)
    cap = 8
    longer = sum(one.num_tokens > cap for one in batch.rollouts)
    was_cut = sum(one.is_truncated for one in batch.rollouts)
    assert longer > was_cut, "no response is longer than the other cap: the test shows nothing"
    found = again(done, 5, f"cap_tokens={cap}")
    assert found["equal"]
    assert found["as_it_would_be"]["truncated_share"] == longer / len(batch.rollouts)
    assert found["as_it_would_be"]["response_tokens_mean"] < found["as_it_was"]["response_tokens_mean"]
    formatted = again(done, 5, "reward=format", "objective.divide_by_deviation=false")
    assert formatted["as_it_would_be"]["accuracy"] == formatted["as_it_was"]["accuracy"]
    assert formatted["as_it_would_be"]["reward_mean"] > formatted["as_it_was"]["reward_mean"], "wrong in good form is -0.5"


def test_what_another_clip_would_have_made_of_it(done):
    found = again(done, 5, "objective.clip_high=0.0", "objective.clip_low=0.0")
    assert found["as_it_would_be"]["clip_fraction"] > found["as_it_was"]["clip_fraction"]
    text = replays.replay_text(found)
    assert "equal to the record, bit for bit" in text
    assert "objective.clip_high=0.0" in text


def test_what_a_replay_cannot_change_is_refused(done):
    for change in ("rollouts.responses_per_prompt=2", "seed=3", "cap_tokens=none"):
        with pytest.raises(ConfigError, match="--set"):
            changed_stage(done.stage, [change])
    with pytest.raises(AssertionError, match="cap_tokens=21: step 5 was sampled under a cap of 20 tokens"):
        again(done, 5, "cap_tokens=21")


def test_what_is_refused_is_refused_before_torch_is_loaded(done):
    """Loading it takes seconds. A process of its own: this one has torch."""
    refused = {
        ("--step", "0"): "--step 0: the first rollout step is 1",
        ("--step", "9"): "step_0000009.jsonl.gz: the rollouts of step 9 are not kept; kept are 6 steps from 1 to 6",
        ("--step", "5", "--set", "steps=5"): "--set steps=5: a replay can change objective, reward, learning_rate, cap_tokens;",
        ("--step", "5", "--set", "cap_tokens=21"): "--set cap_tokens=21: step 5 was sampled under a cap of 20 tokens",
        ("--step", "5", "--set", "objective.clip_hi=1"): "clip_high",
    }
    words = [["replay", str(done.path), *one] for one in refused]
    program = (
        "import sys\nfrom megatron_ext.__main__ import main\n"
        f"codes = [main(one) for one in {words!r}]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == f"{[2] * len(refused)} False", ended.stderr
    for reason, line in zip(refused.values(), ended.stderr.strip().splitlines(), strict=True):
        assert reason in line


def test_the_request_reads_what_the_record_holds(done):
    check_request(done, 5, ["cap_tokens=20"])
    assert [record_path(done.path, step).name for step in recorded_steps(done.path)] == [
        f"step_{step:07d}.jsonl.gz" for step in range(1, 7)
    ]
    assert read_record(done.path, 5).cap_tokens == 20


def a_step(how, at, *columns):
    """What a replay found, as far as its text goes."""
    names = (*replays.MEASURED, *replays.REWARDED)
    found = [dict.fromkeys(names, 0.0) | {"clip_fraction": None, **column} for column in columns]
    what_if = {"changes": ["objective.clip_high=0.3"], "as_it_would_be": found[1]} if len(found) > 1 else {}
    begun = {"replayed_from": {"start": how, "step": at}, "stage": "rl", "step": 3, "rollouts": 32}
    return replays.replay_text({**begun, "as_it_was": found[0], **what_if, "equal": True, "weights": None})


def test_the_text_says_from_where_and_why_columns_are_equal():
    why = "no group's responses earned different rewards, so this step has no gradient"
    one, two = a_step("resume", 2, {}), a_step("weights", 0, {}, {})
    assert "rollout step 3, 32 rollouts, from its checkpoint of step 2\n" in one
    assert "from the weights that the stage starts with\n" in two
    assert f"{why}\n" in one
    assert f"{why}; a change can show in rewards and lengths alone\n" in two
    assert re.search("clip_fraction +-$", one, re.MULTILINE)
    assert "None" not in one + two
    told = {"informative_share": 0.5, "grad_norm": 1.0}
    for columns in (({}, told), (told, {}), (told,), ({"grad_norm": 1.0},)):  # the last: groups of one
        assert why not in a_step("resume", 2, *columns)


def test_steps_that_are_not_kept_are_named(done, start):
    with pytest.raises(DataError, match="step 9 are not kept; kept are 6 steps from 1 to 6"):
        replays.find_recorded(done.path, 9)
    with pytest.raises(RunError, match="of kind 'convert', and replay takes 'rl'"):
        run_of_kind("replay", "rl", start.path)


def test_a_record_holds_what_was_written_and_a_torn_one_is_refused(done, tmp_path):
    batch = read_record(done.path, 3)
    assert write_record(tmp_path, batch) == batch.sha256
    assert record_path(tmp_path, 3).read_bytes() == record_path(done.path, 3).read_bytes()
    path = record_path(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cut short or altered"):
        read_record(tmp_path, 3)
