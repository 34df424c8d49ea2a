"""What a replay is asked for - a step, and changes to it - checked without torch, which takes seconds to load."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence

from megatron_ext.config.base import override
from megatron_ext.config.stages import RLStage
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.rl.record_paths import not_kept_words, record_path
from megatron_ext.runs import Run

CHANGEABLE = ("objective", "reward", "learning_rate", "cap_tokens")  # what --set may name


def check_request(run: Run, step: int, changes: Sequence[str]) -> None:
    """`ConfigError` for a step or a change that cannot be, `DataError` where the step's rollouts are not kept or cannot be read."""
    if step < 1:
        raise ConfigError(f"--step {step}: the first rollout step is 1")
    _, cap = changed_stage(run.stage, changes)
    check_cap(cap, step, _recorded_cap_tokens(run, step))


def changed_stage(stage: RLStage, changes: Sequence[str]) -> tuple[RLStage, int | None]:
    """The stage after `key=value` changes, and another cap where one is named; `ConfigError` for what a replay cannot change."""
    cap, others = None, []
    for change in changes:
        key, _, value = change.partition("=")
        if key.split(".")[0] not in CHANGEABLE:
            raise ConfigError(f"--set {change}: a replay can change {', '.join(CHANGEABLE)}; what was sampled stays as it was")
        if key == "cap_tokens":
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"--set {change}: cap_tokens must be a whole number of at least 1")
            cap = int(value)
        else:
            others.append(change)
    return (override(stage, others) if others else stage), cap


def check_cap(cap_tokens: int | None, step: int, recorded_cap_tokens: int) -> None:
    """`ConfigError` for another cap that is larger than what the step was sampled under."""
    if cap_tokens is not None and cap_tokens > recorded_cap_tokens:
        raise ConfigError(
            f"--set cap_tokens={cap_tokens}: step {step} was sampled under a cap of {recorded_cap_tokens:,} tokens, and what a response "
            f"would have gone on with is not known; name a cap of at most {recorded_cap_tokens}"
        )


def _recorded_cap_tokens(run: Run, step: int) -> int:
    """From the first line of the record alone; who replays reads all of it."""
    path = record_path(run.path, step)
    try:
        with gzip.open(path, "rb") as file:
            return int(json.loads(file.readline())["cap_tokens"])
    except FileNotFoundError:
        raise DataError(not_kept_words(run.path, step)) from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as cause:
        raise DataError(f"{path}: no record of rollouts that can be read ({cause}); it was cut short or altered") from None
