"""How reinforcement learning went: reward, signal, truncation, entropy, engine against trainer and length of every run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from megatron_ext.reports.coinciding import Curve
from megatron_ext.reports.format import rate
from megatron_ext.reports.read import Reading, StageData
from megatron_ext.reports.rl_axes import factor_axis, length_axis, level_axis, share_axis, step_axis, steps_label
from megatron_ext.reports.rl_caps import cap_rules, draw_rollout_caps
from megatron_ext.reports.rl_lines import draw_steps
from megatron_ext.reports.rl_looks import handles, looks
from megatron_ext.reports.style import canvas, legend_columns, legend_inches, say_absent
from megatron_ext.reports.tables import number

LEAST_GAP = 1e-8  # drawn where two probabilities agree to the last bit: an axis of powers of ten has no 0
LEAST_LEVEL = 0.2  # from bottom to top of an axis of rewards, or of nats: what hardly moves should look so
REWARD, UNEQUAL, CUT, ENTROPY, GAP, LENGTH = (
    "reward_mean", "informative_share", "truncated_share", "approx_entropy", "token_mult_prob_error", "response_tokens_mean",
)  # fmt: skip
TITLES = {
    REWARD: "mean reward",
    UNEQUAL: "groups with unequal rewards",
    CUT: "responses cut off by the cap",
    ENTROPY: "entropy (nats per token)",
    GAP: "engine against trainer (factor \N{MINUS SIGN} 1)",
    LENGTH: "tokens of responses",
}


def draw_training(reading: Reading, path: Path) -> bool:
    """One panel a number, over rollout steps. False, and no file, where no run has a rollout step."""
    stages = [s for s in reading.rl if s.rl]
    if not stages:
        return False
    shown = {s.name: looks(reading)[s.name] for s in stages}
    rules = cap_rules(separate=False)
    names = [*(look.label for look in shown.values()), *rules]
    with canvas(path, 10.0, 5.0 + legend_inches(names)) as figure:
        panels: dict[str, Axes] = dict(zip(TITLES, figure.subplots(2, 3, sharex=True).flat, strict=True))
        for key, axes in panels.items():
            curves = {s.name: series(s, key) for s in stages}
            axes.set_title(TITLES[key])
            step_axis(axes)
            if absent := absent_words(curves, key, stages):
                say_absent(axes, absent)
                continue
            draw_steps(axes, curves, shown)
            if key == LENGTH:
                draw_rollout_caps(axes, stages, {name: look.colour for name, look in shown.items()})
            _scale(axes, key)
        figure.supxlabel(steps_label(reading), fontsize=9)
        figure.legend(handles=handles(shown, rules), loc="outside upper left", ncols=legend_columns(names))
    return True


def series(stage: StageData, key: str) -> Curve:
    """The recorded steps that have a number; of the gap between engine and trainer, its distance from 1."""
    pairs = [(r["step"], v) for r in stage.rl if (v := number(r, key)) is not None]
    steps, values = (np.array(column, dtype=np.float64) for column in (zip(*pairs, strict=True) if pairs else ((), ())))
    return steps, np.maximum(values - 1, LEAST_GAP) if key == GAP else values


def without_gradient(stages: list[StageData]) -> list[str]:
    """The runs none of whose recorded updates had a gradient, so that there are no statistics of its tokens."""
    idle = {s.name: all(not number(r, "grad_norm_max") and number(r, ENTROPY) is None for r in s.rl) for s in stages if s.rl}
    return [name for name, is_idle in idle.items() if is_idle]


def absent_words(curves: dict[str, Curve], key: str, stages: list[StageData]) -> str:
    """Why a panel has nothing to show; '' where it has."""
    if not any(len(x) for x, _ in curves.values()):
        idle = len(without_gradient(stages)) == len(stages)
        return "not recorded:\nno update had a gradient" if idle else "not recorded"
    if key == GAP and all((y == LEAST_GAP).all() for _, y in curves.values()):
        return f"no difference above {rate(LEAST_GAP)}"
    return ""


def _scale(axes: Axes, key: str) -> None:
    if key in (UNEQUAL, CUT):
        share_axis(axes)
    elif key == LENGTH:
        length_axis(axes)
    elif key == GAP:
        factor_axis(axes)
    else:
        level_axis(axes, LEAST_LEVEL)
