"""What is done about a step that is not trained on: stop, leave its batch out, or go back and leave it out then.

Every rank has the same finding (training.step), so all of them do the same here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_ext.attempts import Attempt
from megatron_ext.config.faults import Faults
from megatron_ext.data.prepare import Prepared
from megatron_ext.distributed import Groups
from megatron_ext.errors import TrainingError
from megatron_ext.provenance import Skipped
from megatron_ext.runs import Run
from megatron_ext.training.guard import Finding, GuardState, check_row, judge, known, rolled_back, words
from megatron_ext.training.start import Began, reload
from megatron_ext.training.state import Progress
from megatron_ext.training.step import STOPPED, StepResult, not_finite

Record = dict[str, Any]


@dataclass
class Recovery:
    """The guard of a stage: judges its steps and acts on what is found. `state` is as of the last finished step."""

    run: Run
    groups: Groups
    attempt: Attempt
    prepared: Prepared
    state: GuardState

    @property
    def faults(self) -> Faults:
        """The recipe's policy."""
        found: Faults = self.run.stage.faults
        return found

    def judge(self, loss: float, grad_norm: float) -> Finding | None:
        """Whether a step may be trained on; see `training.guard.judge`."""
        return judge(self.faults, self.state, loss, grad_norm)

    def known(self, step: int) -> StepResult | None:
        """The result of a step that a roll-back has marked: it is left out without being computed again."""
        marked = self.state.mark(step)
        if marked is None:
            return None
        return StepResult(math.nan, math.nan, 0, Finding(marked.reason, "skip", marked.value, marked.mean, marked.sigma))

    def take(self, result: StepResult, step: int) -> None:
        """Take a step that was trained on into the window, or leave its batch out; one to roll back from is left as it is.

        `TrainingError` where the finding stops the stage, and where the batch is one too many in a row.
        """
        if result.finding is None:
            self.state = self.state.trained(self.faults, result.loss, result.grad_norm)
        elif result.finding.action == "stop":
            text = self._what(result)
            raise TrainingError(text if text.endswith(STOPPED) else f"{text}; {STOPPED}")
        elif result.finding.action == "skip":
            check_row(self.faults, self.state, self.run.name, step)
            self.state = self.state.left_out(self.state.mark(step) or self._batch(result, step, "skip"))

    def roll_back(self, result: StepResult, step: int, began: Began) -> Progress:
        """Load the stage's newest checkpoint over `began.state` and mark the step; where training goes on from.

        `TrainingError` where the stage has published none, or went back to it too often.
        """
        found = self._batch(result, step, "roll_back")
        again = reload(self.run, self.groups, self.attempt, began.state)
        if again is None:
            raise TrainingError(
                f"{self._what(result)}. The recipe says to roll back (faults), but the stage has published no checkpoint yet: "
                f"start it again with a smaller plan.save_every_steps, or launch with faults that skip into another --runs"
            )
        self.state = rolled_back(self.faults, self.state, guard_of(again), again.progress.step, found)
        return again.progress

    def record(self, result: StepResult) -> Record:
        """What was found, for metrics.jsonl; null for what is not finite or was not computed again."""
        finding = result.finding
        assert finding is not None
        return {
            "reason": finding.reason,
            "value": finding.value,
            "mean": finding.mean,
            "sigma": finding.sigma,
            "loss": known(result.loss),
            "grad_norm": known(result.grad_norm),
        }

    def skipped_tokens(self) -> int:
        """Tokens that the stage has left out so far."""
        return sum(sum(one.tokens.values()) for one in self.state.skipped if one.stage == self.run.name)

    def _what(self, result: StepResult) -> str:
        assert result.finding is not None
        is_spike = result.finding.value is not None
        return words(result.finding, self.faults, len(self.state.losses)) if is_spike else not_finite(result)

    def _batch(self, result: StepResult, step: int, action: Any) -> Skipped:
        finding = result.finding
        assert finding is not None
        before = {line.source: line.stage_tokens for line in self.prepared.ledger(step - 1)}
        after = {line.source: line.stage_tokens for line in self.prepared.ledger(step)}
        tokens = {source: count - before[source] for source, count in after.items() if count > before[source]}
        return Skipped(
            stage=self.run.name, step=step, tokens=tokens, reason=finding.reason, action=action,
            value=finding.value, mean=finding.mean, sigma=finding.sigma,
        )  # fmt: skip


def guard_of(began: Began) -> GuardState:
    """What a start brings with it: all of it on a resume; from a parent the list of skipped batches, for its window is of other data."""
    if began.manifest is None:
        return GuardState()
    if began.how == "resume":
        return GuardState.from_json(began.manifest.guard, began.manifest.skipped)
    return GuardState(skipped=began.manifest.skipped)
