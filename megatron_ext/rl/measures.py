"""What is recorded of a rollout step and of a validation: counts, means and shares over responses. Names: docs/metrics.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_ext.rl.rollouts import Batch, Rollout

Record = dict[str, Any]
UNINFORMATIVE_SHARE = 0.05  # of a step's groups: where fewer earned different rewards, it taught next to nothing
OUTCOMES = ("correct", "wrong", "unparseable", "error", "timed_out", "crashed")


def rollout_record(batch: Batch, group: int) -> Record:
    """Of the responses that a step trains on; those of unused groups are counted only."""
    rollouts = batch.rollouts
    rewards = [one.reward for one in rollouts]
    prompt_lengths = [len(one.prompt) for one in rollouts[::group]]
    return {
        "cap_tokens": batch.cap_tokens,
        "weight_version": batch.weight_version,
        "num_prompts": len(rollouts) // group,
        "num_responses": len(rollouts),
        "num_unused": len(batch.unused),
        "num_left_out": batch.num_left_out,
        "removed_problems": len(batch.order.removed),
        "epoch": batch.order.epoch,
        "reward_mean": _mean(rewards),
        "reward_min": min(rewards),
        "reward_max": max(rewards),
        **responses_record(rollouts),
        "prompt_tokens_mean": _mean(prompt_lengths),
        "prompt_tokens_max": max(prompt_lengths),
        **outcome_counts(rollouts),
        "loop_share": _share(one.behaviour.loops for one in rollouts),
        "box_first_share": _share(one.behaviour.box_first for one in rollouts),
        "text_after_box_share": _share(one.behaviour.text_after_box for one in rollouts),
        "rollouts_sha256": batch.sha256,
    }


def told_little(metrics: Record) -> bool:
    """Whether a rollout step's rewards told next to nothing."""
    return bool(metrics["informative_share"] < UNINFORMATIVE_SHARE)


def steps_told_little(records: Iterable[Record], step: int) -> int:
    """For how many rollout steps in a row, up to `step`, rewards told next to nothing, by the records that stand.

    Steps without a record (`log_every_steps`) are taken for what those around them were.
    """
    first = step + 1
    for one in sorted((one for one in records if one["step"] <= step), key=lambda one: int(one["step"]), reverse=True):
        if not told_little(one):
            break
        first = one["step"]
    return step + 1 - first


def responses_record(rollouts: Sequence[Rollout]) -> Record:
    """What training and validation have in common; `correct_tokens_mean` is None where nothing was right."""
    lengths = [one.num_tokens for one in rollouts]
    correct = [one.num_tokens for one in rollouts if one.is_correct]
    return {
        "accuracy": len(correct) / len(rollouts),
        "response_tokens_mean": _mean(lengths),
        "response_tokens_max": max(lengths),
        "correct_tokens_mean": _mean(correct) if correct else None,
        "truncated_share": _share(one.is_truncated for one in rollouts),
    }


def outcome_counts(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """How many were graded as what; what was not graded in time, or cost its worker, is counted apart from wrong answers."""
    counts = Counter(one.verdict.outcome if one.verdict is not None else one.ending for one in rollouts)
    assert set(counts) <= set(OUTCOMES), counts
    return {name: counts[name] for name in OUTCOMES}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(flags: Iterable[bool]) -> float:
    found = list(flags)
    return sum(found) / len(found)
