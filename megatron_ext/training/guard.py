"""Which steps are not trained on: the judgement of a loss and a gradient norm, and what of it is remembered.

Pure: numbers in, numbers out. All ranks hand in the same numbers (training.step), so all come to the
same judgement; and all that a judgement depends on stands in the checkpoint, so a resumed stage comes to
the judgements of one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_ext.config.base import Json, from_json, to_json
from megatron_ext.config.faults import Faults
from megatron_ext.errors import TrainingError
from megatron_ext.provenance import FaultReason, Skipped

Action = Literal["stop", "skip", "roll_back"]


@dataclass(frozen=True)
class Finding:
    """Why a step is not trained on, and what is done about it."""

    reason: FaultReason
    action: Action
    value: float | None  # None: not finite
    mean: float | None = None  # of the window; None where the window had no part in it
    sigma: float | None = None  # its standard deviation


@dataclass(frozen=True)
class GuardState:
    """What is remembered from step to step.

    `losses` and `grad_norms` are the window: the last `window_steps` steps that were trained on, oldest
    first; empty where spikes are ignored. `marked` are steps to leave out when they come again after a
    roll-back. `skipped` are the batches that the lineage has left out, oldest first.
    """

    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    marked: tuple[Skipped, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def to_json(self) -> Json:
        """What a manifest keeps beside its list of skipped batches; floats go through JSON unchanged."""
        return {"losses": list(self.losses), "grad_norms": list(self.grad_norms), "marked": [to_json(one) for one in self.marked]}

    @staticmethod
    def from_json(values: Json, skipped: tuple[Skipped, ...] = ()) -> GuardState:
        """The state that `to_json` gave; {} is that of a stage's first step."""
        marked: Any = from_json(tuple[Skipped, ...], values.get("marked", []), "guard.marked")
        return GuardState(tuple(values.get("losses", ())), tuple(values.get("grad_norms", ())), marked, skipped)

    def trained(self, faults: Faults, loss: float, grad_norm: float) -> GuardState:
        """After a step that was trained on."""
        if faults.spike == "ignore":
            return self
        kept = slice(-faults.window_steps, None)
        return replace(self, losses=(*self.losses, loss)[kept], grad_norms=(*self.grad_norms, grad_norm)[kept])

    def left_out(self, batch: Skipped) -> GuardState:
        """After a step whose batch was left out; it does not enter the window."""
        return replace(self, skipped=(*self.skipped, batch), marked=tuple(one for one in self.marked if one.step != batch.step))

    def mark(self, step: int) -> Skipped | None:
        """What a roll-back said about a step, or None."""
        return next((one for one in self.marked if one.step == step), None)


def judge(faults: Faults, state: GuardState, loss: float, grad_norm: float) -> Finding | None:
    """Whether a step may be trained on (None), or what is wrong with it."""
    if not math.isfinite(loss):
        return Finding("loss not finite", faults.non_finite, None)
    if not math.isfinite(grad_norm):
        return Finding("gradient norm not finite", faults.non_finite, None)
    if faults.spike == "ignore" or len(state.losses) < faults.least_steps:
        return None
    mean, sigma = mean_and_deviation(state.losses)
    if loss > mean + faults.sigmas * sigma:
        return Finding("loss spike", faults.spike, loss, mean, sigma)
    mean, sigma = mean_and_deviation(state.grad_norms)
    if grad_norm > mean + faults.sigmas * sigma:
        return Finding("gradient norm spike", faults.spike, grad_norm, mean, sigma)
    return None


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, n - 1 in its denominator; exact sums, so equal on any machine."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def check_row(faults: Faults, state: GuardState, stage: str, step: int) -> None:
    """`TrainingError` where leaving out `step` would make one more in a row than the recipe allows."""
    row = [one.step for one in state.skipped if one.stage == stage and step - faults.most_in_a_row <= one.step < step]
    if len(row) == faults.most_in_a_row:
        raise TrainingError(
            f"the batches of steps {row[0]} to {row[-1]} were left out (faults.most_in_a_row={faults.most_in_a_row}), and that of step "
            f"{step} is no better: this is more than bad data. Look at the steps' documents, launch with a lower rate into another --runs, "
            f"or branch from a checkpoint before step {row[0]}"
        )


def rolled_back(faults: Faults, now: GuardState, then: GuardState, step: int, found: Skipped) -> GuardState:
    """The state after a roll-back to the checkpoint of `step`, which kept `then`: `found` is marked, and what was marked before.

    `TrainingError` where the checkpoint has been gone back to as often as the recipe allows.
    """
    again = [one for one in now.skipped if one.stage == found.stage and one.step > step and one.action == "roll_back"]
    marked = {one.step: one for one in (*then.marked, *now.marked, *again, found)}
    if len(marked) > faults.most_roll_backs:
        named = ", ".join(str(one) for one in sorted(marked))
        raise TrainingError(
            f"the stage went back to the checkpoint of step {step} {len(marked) - 1} times (faults.most_roll_backs="
            f"{faults.most_roll_backs}) and steps {named} could not be trained on: leaving batches out does not help. "
            f"Look at the steps' documents, launch with a lower learning rate into another --runs, or branch from an earlier checkpoint"
        )
    return replace(then, marked=tuple(marked[one] for one in sorted(marked)))


def known(value: float) -> float | None:
    """A number for a record: None where it is not finite, which JSON cannot say."""
    return value if math.isfinite(value) else None


def words(finding: Finding, faults: Faults, steps: int) -> str:
    """A spike in words; `steps` are those in the window."""
    name = finding.reason.removesuffix(" spike")
    return (
        f"{name} {finding.value:.6g} is a spike: more than {finding.mean:.6g} + {faults.sigmas:g} x {finding.sigma:.3g}, "
        f"mean and deviation of the last {steps} steps"
    )
