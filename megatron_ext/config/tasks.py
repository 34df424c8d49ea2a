"""What success is, as values: sets of problems, the template that puts them, the reward of an answer."""

from __future__ import annotations

from typing import Literal

from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError

FormName = Literal["gsm8k", "math", "olympiad_bench", "amc23", "arithmetic"]
TemplateName = Literal["plain", "cue", "dialogue", "simple", "complex"]
RewardName = Literal["correct", "format", "repeat_penalty", "repeat_and_box_penalty"]


@config
class ProblemSet:
    """A JSONL file of problems with their answers."""

    name: str  # in metrics and reports
    path: str  # a relative one is read from the text stage's folder, where the stage names one
    form: FormName
    leave_out: tuple[str, ...] = ()  # ids of problems that are not used
    licence: str = ""
    provenance: str = ""

    def __post_init__(self) -> None:
        for key in ("name", "path"):
            if not getattr(self, key):
                raise ConfigError(f"problems: {key} is empty; name the set, and its JSONL file")


@config
class Validation:
    """Greedy answers to held-out problems, before the first step and every `plan.validate_every_steps`."""

    sets: tuple[ProblemSet, ...] = ()
    cap_tokens: int | None = None  # of a response; None: the cap in force, as in the paper's runs
    max_prompt_tokens: int = 1024  # longer prompts are left out, and counted

    def __post_init__(self) -> None:
        names = [one.name for one in self.sets]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"validation: {names.count(name)} sets are named '{name}'; give each its own name")
        for key in ("cap_tokens", "max_prompt_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"validation: {key} is {value}, must be at least 1")
