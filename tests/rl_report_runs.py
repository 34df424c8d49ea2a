"""Run folders of reinforcement learning with known numbers, written by the real writers: what the report's tests read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.attempts import begin_attempt
from megatron_ext.config.rl import CapFrom, ProgressLengths, Rollouts
from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.stages import ReportStage, RLStage, Weights, inputs
from megatron_ext.config.tasks import ProblemSet, Validation
from megatron_ext.metrics import MetricsWriter
from megatron_ext.runs import Run, mark_done, write_run
from tests.unit.test_reports import MODEL, TOKENS

LARGE = replace(MODEL, max_positions=16_384)
VERDICTS = {"correct": 0, "wrong": 0, "unparseable": 1, "error": 0, "timed_out": 2, "crashed": 1}
ENDS = {"base": 6 * TOKENS, "stable": 14 * TOKENS, "long": 18 * TOKENS, "short": 18 * TOKENS}  # lineage tokens
GROUPS = Rollouts(prompts_per_step=4, responses_per_prompt=8, prompts_per_update=2, max_prompt_tokens=16)
SAMPLED = 32  # responses of a rollout step


def problems(name: str) -> ProblemSet:
    return ProblemSet(name=name, path=f"/{name}.jsonl", form="arithmetic")


def rl(name: str, start: str, sets: Sequence[str] = ("sums",), caps: Sequence[tuple[int, int]] = ((0, 64),), **more: Any) -> RLStage:
    """A stage of RL from `start`; two updates a rollout step, as in the paper."""
    lengths = ProgressLengths(caps=tuple(CapFrom(after=after, cap_tokens=cap) for after, cap in caps))
    return RLStage(
        name=name,
        start=Weights(stage=start),
        model=more.pop("model", LARGE),
        problems=problems("train"),
        validation=Validation(sets=tuple(map(problems, sets)), cap_tokens=more.pop("validation_cap", None), max_prompt_tokens=16),
        lengths=lengths,
        rollouts=more.pop("rollouts", GROUPS),
        precision="fp32",
        plan=RLPlan(device="cpu", ranks_per_node=1),
        **{"steps": 8, **more},
    )


@dataclass(frozen=True)
class Score:
    """What one validation found on one set."""

    correct: int
    problems: int = 200
    tokens: float | None = 20.0  # of correct responses
    left_out: int = 0


@dataclass
class Course:
    """How a run goes: scores by (step, set), and what differs from a calm rollout step."""

    scores: dict[tuple[int, str], Score]
    steps: int = 8
    step: Callable[[int], dict[str, Any]] = lambda _: {}
    template: str = "complex"


def cap_at(stage: RLStage, finished: int) -> int:
    assert isinstance(stage.lengths, ProgressLengths)
    return next(row.cap_tokens for row in reversed(stage.lengths.caps) if row.after <= finished)


def rollout(stage: RLStage, step: int, lineage: int) -> dict[str, Any]:
    """The record of a calm rollout step."""
    tokens = 25 * SAMPLED * step
    right = 10 + min(step, 16)
    return {
        "loss": 0.01, "grad_norm": 0.5, "grad_norm_max": 0.6, "learning_rate": stage.learning_rate, "updates": 2 * step, "tokens": tokens,
        "lineage_tokens": lineage + tokens, "cap_tokens": cap_at(stage, step - 1), "reward_mean": -0.5 + 0.05 * step, "reward_min": -1.0,
        "reward_max": 1.0, "accuracy": right / SAMPLED, "informative_share": 0.5, "num_prompts": 4, "num_responses": SAMPLED,
        "num_unused": 0, "graders_lost": 0, "num_left_out": 0, "removed_problems": 0, "epoch": 0, "rollouts_sha256": "0",
        "trained_tokens": 800, "canary_gap": None,
        "response_tokens_mean": 25.0, "response_tokens_max": 60, "correct_tokens_mean": 20.0, "truncated_share": 0.125,
        "prompt_tokens_mean": 9.0, "prompt_tokens_max": 12, **VERDICTS, "correct": right,
        "wrong": SAMPLED - right - sum(VERDICTS.values()), "loop_share": 0.0, "box_first_share": 0.0, "text_after_box_share": 0.0,
        "clip_fraction": 0.01, "approx_kl": 1e-4, "approx_entropy": 0.7, "token_mult_prob_error": 1.0001, "gen_kl_error": 1e-6,
        "sampling_importance_ratio": 1.0, "weight_version": step - 1, "rollout_seconds": 2.0, "grading_seconds": 0.25,
        "update_seconds": 1.0, "step_seconds": 3.5, "responses_per_second": 16.0,
    }  # fmt: skip


def validation(stage: RLStage, step: int, name: str, score: Score, template: str) -> dict[str, Any]:
    return {
        "set": name, "accuracy": score.correct / score.problems, "num_problems": score.problems, "num_correct": score.correct,
        "num_left_out": score.left_out, "response_tokens_mean": 25.0, "correct_tokens_mean": score.tokens, "truncated_share": 0.25,
        "cap_tokens": stage.validation.cap_tokens or cap_at(stage, step), "template": template, "template_version": 1,
        "updates": 2 * step, "seconds": 1.5, "tokens": 25 * SAMPLED * step, "lineage_tokens": 25 * SAMPLED * step,
        "response_tokens_max": 60, **VERDICTS,
    }  # fmt: skip


def go(run: Run, course: Course) -> None:
    """Write what a run of that course leaves behind."""
    attempt = begin_attempt(run)
    writer = MetricsWriter(run.metrics_path, attempt.number, 0)
    lineage = ENDS[run.stage.start.stage]
    for step in range(course.steps + 1):
        if step:
            writer.write("rl", step, {**rollout(run.stage, step, lineage), **course.step(step)})
        for (at, name), score in course.scores.items():
            if at == step:
                writer.write("rl_validation", step, validation(run.stage, step, name, score, course.template))
    writer.close()
    is_done = course.steps == run.stage.steps
    attempt.finish("done" if is_done else "signal")
    if is_done:
        mark_done(run, {"peak_memory_bytes": 2**30})


def graph(root: Path, trained: dict[str, Run], courses: dict[RLStage, Course | None]) -> dict[str, Run]:
    """Run folders of RL on top of a small trained graph; a course of None is a run that was not begun."""
    runs = dict(trained)
    for stage in courses:
        runs[stage.name] = write_run(root / stage.name, "small", stage, {role: runs[name].path for role, name in inputs(stage).items()})
        if (course := courses[stage]) is not None:
            go(runs[stage.name], course)
    report = ReportStage(name="report", stages=(*inputs(runs["report"].stage), *(s.name for s in courses)), title="RL")
    runs["report"] = write_run(root / "report_rl", "small", report, {role: runs[name].path for role, name in inputs(report).items()})
    return runs


def curve(*correct: int, every: int = 4, name: str = "sums", problems: int = 200) -> dict[tuple[int, str], Score]:
    return {(every * i, name): Score(right, problems) for i, right in enumerate(correct)}
