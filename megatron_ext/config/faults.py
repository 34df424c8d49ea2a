"""What to do with a step whose loss or gradient norm cannot be right."""

from __future__ import annotations

from typing import Literal

from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError


@config
class Faults:
    """When a step is not trained on. It decides the numbers, so it is science.

    `non_finite` answers a loss or gradient norm that is nan or infinite, `spike` one that is too large:

        x > mean + sigmas * deviation

    with the mean and the standard deviation (n - 1 in its denominator) of the loss, or of the gradient
    norm, over the last `window_steps` steps that were trained on. The rule and its numbers are those of
    OLMo-core's SkipStepOptimizer, with two changes: a step that falls far below the mean is no spike, and
    spikes do not enter the window, so that the second of two is noticed as well. A window belongs to
    its stage: a branch has other data, and begins an empty one.

    stop: end with an error, before the weights move.
    skip: leave the batch out. Its tokens count as consumed; weights and optimizer stay as they were.
    roll_back: load the stage's newest checkpoint, train again up to the step, and leave its batch out.
    """

    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"
    window_steps: int = 128
    sigmas: float = 6.0
    least_steps: int = 64  # in the window, before anything is judged a spike; OLMo-core's half a window
    most_in_a_row: int = 8  # batches left out one after another; the next one stops the stage
    most_roll_backs: int = 3  # to one checkpoint; the next one stops the stage

    def __post_init__(self) -> None:
        for key in ("most_in_a_row", "most_roll_backs"):
            if getattr(self, key) < 1:
                raise ConfigError(f"faults: {key} is {getattr(self, key)}, must be at least 1; to leave no batch out, use 'stop'")
        if self.least_steps < 2:
            raise ConfigError(f"faults: least_steps is {self.least_steps}, must be at least 2: one number has no deviation")
        if self.least_steps > self.window_steps:
            raise ConfigError(
                f"faults: least_steps {self.least_steps} exceed window_steps {self.window_steps}, so nothing would ever be judged; "
                f"make the window longer or least_steps smaller"
            )
        if not self.sigmas > 0:
            raise ConfigError(f"faults: sigmas is {self.sigmas}, must be positive")
