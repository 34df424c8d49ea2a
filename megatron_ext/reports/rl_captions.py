"""What stands below the figures of reinforcement learning: the parts that depend on the runs. Pure."""

from __future__ import annotations

from megatron_ext.reports import format as show
from megatron_ext.reports.read import Reading
from megatron_ext.reports.rl_caps import CapLine, caps_differ, validation_caps
from megatron_ext.reports.rl_figures import coinciding
from megatron_ext.reports.rl_health_figure import without_gradient
from megatron_ext.reports.rl_lines import MOST_MARKS, SMOOTHED
from megatron_ext.reports.rl_looks import run_names
from megatron_ext.reports.rl_rows import Cap, RLCurveRow, RLRunRow

ARROW = " \N{RIGHTWARDS ARROW} "
NO_BREAK = "\N{NO-BREAK SPACE}"
LONGEST_LIST = 200  # characters of a caption that names curves


def intervals_caption(rows: list[RLCurveRow]) -> str:
    """How intervals are drawn, and long curves, where there are such."""
    lengths = {len(row.points) for row in rows}
    bands = ["shaded between thin lines"] if any(1 < length <= MOST_MARKS for length in lengths) else []
    bars = ["as bars at the end"] if any(length == 1 or length > MOST_MARKS for length in lengths) else []
    faint = f" Faint: single validations; bold: their centred mean of {SMOOTHED}." if max(lengths, default=0) > MOST_MARKS else ""
    return f"95 % intervals: {' or '.join(bands + bars)}.{faint}"


def caps_caption(reading: Reading, rows: list[RLRunRow]) -> str:
    """The caps of the runs in words; where validations have one of their own, it is theirs that the curves stay below."""
    starts = {row.stage: row.start for row in rows}
    sampled = _by_caps([(row.start, recorded_caps(row.caps)) for row in rows if row.caps]) or "none recorded"
    changes = "; dotted verticals mark its changes" if any(len(row.caps) > 1 for row in rows) else ""
    if not any(map(caps_differ, reading.rl)):
        return f"Dashed: the length cap, {sampled}{changes}."
    validated = _by_caps([(starts[s.name], _words(validation_caps(s))) for s in reading.rl if s.rl_validation])
    return (
        f"Dash-dotted: the length cap that these validations ran under, {validated}. Dashed: the cap of the rollouts, {sampled}{changes}."
    )


def _words(line: CapLine) -> str:
    return ARROW.join(dict.fromkeys(f"{cap:,}" for _, cap in line))


def _by_caps(caps: list[tuple[str, str]]) -> str:
    """Runs with the same caps together, by what they start from."""
    of_caps: dict[str, list[str]] = {}
    for start, words in caps:
        of_caps.setdefault(words, []).append(start)
    if len(of_caps) == 1:
        return f"{next(iter(of_caps))} tokens in every run"
    return "; ".join(f"{words} tokens from {show.listed(list(dict.fromkeys(starts)))}" for words, starts in of_caps.items())


def coinciding_caption(reading: Reading, rows: list[RLCurveRow]) -> str:
    """Names the curves where that is short; '' where none coincide."""
    who = coinciding(reading, rows)
    if not who:
        return ""
    names = f": {who}" if len(who) <= LONGEST_LIST else ""
    return f"Where curves coincide, their dashes and marks take turns, and a band of several is grey{names}. "


def gradient_caption(reading: Reading) -> str:
    """Why the curves of some runs are missing from two panels; '' where none are."""
    names = run_names(reading)
    idle = [names[name] for name in without_gradient(list(reading.rl))]
    return f" No update from {show.listed(idle)} had a gradient, so there is no entropy and no such comparison." if idle else ""


def recorded_caps(caps: tuple[Cap, ...]) -> str:
    """Lines break at the arrows only."""
    if not caps:
        return show.NONE
    return ARROW.join(f"{cap.cap_tokens:,}" + (f"{NO_BREAK}(after{NO_BREAK}{cap.after_step:,})" if i else "") for i, cap in enumerate(caps))
