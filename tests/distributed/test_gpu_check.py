"""The GPU check's parts, rehearsed on a CPU: they pass on sound code and notice faults."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_ext.config.plan import TrainPlan
from tests import ranks

ARGUMENTS = {"rehearse": True, "precisions": ["fp32"], "steps": 2, "sequences_per_batch": 4, "sequence_length": 64, "micro_batch": 2}


def do_nothing(*arguments):
    """Take the place of what a fault leaves out."""


def rehearse(groups, part, fault):
    """One part on this rank; `fault` takes something out that the part must miss."""
    from megatron_ext.training import state, step
    from tools import gpu_check, gpu_check_rl

    if fault == "optimizer not loaded":
        state.load_optimizer = do_nothing
    if fault == "nothing is checked":
        step._only_finite = do_nothing
    if fault == "another seed":
        true = gpu_check.random_batches
        gpu_check.random_batches = lambda stage, device: true(gpu_check.replace(stage, seed=stage.seed + 1), device)
    if fault == "boundaries forgotten":
        from megatron_ext.rl import batch

        batch._mask = lambda sequence_RS: batch.torch.ones(1, 1, *[sequence_RS.shape[1]] * 2, dtype=bool).triu(1)
    if fault == "the engine forgets a norm":
        from megatron_ext.generation import lean_model

        lean_model.rms_norm = lambda hidden, *_: hidden
    arguments = SimpleNamespace(**ARGUMENTS)
    toy = gpu_check.toy_stage("fp32", True)
    learner = gpu_check.replace(toy, model=gpu_check.replace(toy.model, num_layers=1))
    stages = {"speed": gpu_check.large_stage(arguments), "parity": toy, **dict.fromkeys(("rl", "rl packed", "rl step"), learner)}
    parts = {
        "speed": gpu_check.speed,
        "checkpoint": gpu_check.checkpoint,
        "nan": gpu_check.nan,
        "parity": gpu_check.trace,
        "rl": gpu_check.rl,
        "rl packed": gpu_check_rl.packed,
        "rl step": lambda stage, groups: gpu_check_rl.grpo_step(stage, groups, state.build_state(stage, groups, stage.seed), 0),
    }
    return parts[part](stages.get(part, gpu_check.small_stage(arguments)), groups)


def run(part, fault=""):
    return ranks.run(rehearse, TrainPlan(device="cpu"), part, fault)[0]


def test_speed_counts_tokens_and_flops():
    found = run("speed")
    assert found["passed"]
    assert len(found["losses"]) == 2 + 3  # the timed steps and the warm-up
    assert found["losses"][-1] < found["losses"][0] == pytest.approx(6.96, abs=0.1)  # from ln(1024) = 6.93
    assert found["tokens_per_second"] == pytest.approx(4 * 64 / found["step_seconds"])
    flops_per_token = found["model_flops_per_second"] / found["tokens_per_second"]
    # 6 x (4 layers x (128 x 256 + 128 x 128 + 3 x 128 x 384) + 1024 x 128) + 6 x 4 x 128 x 64
    assert flops_per_token == pytest.approx(6 * (4 * 196_608 + 131_072) + 196_608)
    assert found["mfu"] == pytest.approx(found["model_flops_per_second"] / found["peak"]["flops_per_second"])


def test_the_next_step_after_a_load_is_exact():
    assert run("checkpoint")["passed"]


def test_a_forgotten_optimizer_is_noticed():
    found = run("checkpoint", "optimizer not loaded")
    assert not found["passed"]
    assert all(found[layout]["same_loss"] and not found[layout]["same_weights"] for layout in ("dp_reshardable", "fully_reshardable"))


def test_what_is_not_a_number_stops_the_step():
    found = run("nan")
    assert found["gradient"]["stopped_by"] == "gradient norm is nan"
    assert found["weights"]["stopped_by"] == "loss is nan"
    assert found["passed"]


def test_a_step_that_does_not_stop_is_noticed():
    assert not run("nan", "nothing is checked")["passed"]


def test_parity_compares_losses_and_gradients():
    from tools.gpu_check import compare

    one, other = run("parity"), run("parity", "another seed")
    assert compare(one, one, "fp32")["passed"]
    assert not compare(other, one, "fp32")["passed"]


def test_learning_from_rewards():
    found = run("rl")
    assert found["passed"], found
    assert found["packed"]["grad_norm_difference"] < 1e-4
    assert max(one["engine_gap_largest"] for one in found["steps"]) < 1e-4


@pytest.mark.parametrize(("part", "fault"), [("rl packed", "boundaries forgotten"), ("rl step", "the engine forgets a norm")])
def test_faults_of_packing_and_of_the_engine_are_noticed(part, fault):
    assert not run(part, fault)["passed"]
