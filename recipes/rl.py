"""The paper's reinforcement learning (its section 4): problems, lengths, steps; and plans for nodes of 8 GPUs.

128 prompts x 16 responses, 64 prompts an update, 1e-6, temperature 1 and the reward of +1 and -1 are the defaults of the stage.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config.rl import CapFrom, ProgressLengths
from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.tasks import ProblemSet, Validation

# `python -m tools.fetch_assets` puts the files there.
# 8,523 problems of MATH, levels 3 to 5: more than its own training split has, so that its test split is among them; MATH500 is not.
MATH8K = ProblemSet(name="math8k", path="assets/math8k.jsonl", form="math", licence="see its page", provenance="SimpleRL-Zoo")
MATH500 = ProblemSet(name="math500", path="assets/math500.jsonl", form="math", licence="MIT", provenance="PRM800K's split of MATH")
GSM8K = ProblemSet(name="gsm8k", path="assets/gsm8k_test.jsonl", form="gsm8k", licence="MIT", provenance="the test split")
OLYMPIAD_BENCH = ProblemSet(
    name="olympiad_bench",
    path="assets/olympiad_bench.jsonl",
    form="olympiad_bench",
    leave_out=("1965", "2045"),  # answers that no grader can read; the paper's curves count 673 problems, 2 of 675 left out
    licence="Apache-2.0",
    provenance="the English open-ended mathematics without pictures",
)
AMC23 = ProblemSet(name="amc23", path="assets/amc23.jsonl", form="amc23", licence="none declared", provenance="40 problems of 2023")
# Greedy, zero-shot, at the cap in force: the paper's own curves jump where the cap does.
HELD_OUT = Validation(sets=(MATH500, GSM8K, OLYMPIAD_BENCH, AMC23))

STEPS = 200  # rollout steps, two updates each: the 400 of the paper's plots
# The Long branch, in rollout steps; the paper counts updates, and says 200 and 320.
GROWING = ProgressLengths(
    caps=(CapFrom(after=0, cap_tokens=2048), CapFrom(after=100, cap_tokens=4096), CapFrom(after=160, cap_tokens=8192))
)
FIXED = ProgressLengths(caps=(CapFrom(after=0, cap_tokens=4096),))
FIXED_8K = ProgressLengths(caps=(CapFrom(after=0, cap_tokens=8192),))

# Ours. Recomputation as in the released scripts; `engine_slots` as many as fit 80 GB at 9,216 tokens each (`megatron-ext plan`).
# engine="vllm_process" is there where vLLM is installed; at its share of 0.5 of a GPU all three sizes fit too.
PLAN_1B = RLPlan(
    ranks_per_node=8,
    recompute="full",
    save_every_steps=40,  # of the released scripts
    validate_every_steps=4,
    keep_checkpoints=5,  # all: a long-CoT base may collapse within 20 steps, and the best is then an older one
    engine_slots=128,
    grading_workers=32,
)
PLAN_3B = replace(PLAN_1B, nodes=2, engine_slots=48)
PLAN_8B = replace(PLAN_1B, nodes=4, tensor=2, sequence_parallel=True, engine_slots=64)
