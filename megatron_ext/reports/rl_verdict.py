"""Whether mid-training mattered in this run, in plain words from the numbers: the page opens with it. Pure."""

from __future__ import annotations

from megatron_ext.reports.format import change, listed, many, percent
from megatron_ext.reports.read import Reading
from megatron_ext.reports.rl_comparison import comparison_rows, headline_set
from megatron_ext.reports.rl_rows import RLComparisonRow, RLScoreRow
from megatron_ext.reports.rl_tables import ALL_SETS, score_rows, start_is

CLAIM = "mid-training decides how far reinforcement learning takes a base model"  # the paper's finding


def verdict(reading: Reading) -> list[str]:
    """Paragraphs, the answer first; none where the report has no RL. What the numbers do not show is said as plainly as what they do."""
    if not reading.rl:
        return []
    rows = comparison_rows(reading)
    name = headline_set(rows)
    mine = [row for row in rows if row.set == name]
    controls = [row for row in mine if row.against_is == "untouched"]
    parents = [row for row in mine if row.against_is == "mid-trained"]
    answer = _against_control(controls, _problems(reading, controls[0])) if controls else _no_control(reading)
    more = [_gains(reading, name), *([_against_stable(parents)] if parents else []), *([_limits(mine)] if mine else [])]
    return [answer, " ".join(more)]


def _gains(reading: Reading, name: str) -> str:
    """Which runs RL itself made better."""
    scores = [row for row in score_rows(reading) if row.set == name or not name]
    risen = [row for row in scores if row.change_low is not None and row.change_low > 0]
    measured = [row for row in scores if row.change is not None]
    if not measured:
        return "No run of reinforcement learning has been measured before and after yet."
    if len(risen) == len(measured):
        which = "every run" if len(measured) > 1 else "the run"
        return f"Reinforcement learning raised accuracy in {which} ({_before_after(measured)})."
    if not risen:
        return f"Reinforcement learning raised accuracy in no run beyond the 95 % intervals ({_before_after(measured)})."
    return f"Reinforcement learning raised accuracy in {len(risen)} of {many(len(measured), 'run')} ({_before_after(measured)})."


def _before_after(rows: list[RLScoreRow]) -> str:
    arrow = "\N{RIGHTWARDS ARROW}"
    return "; ".join(f"{r.stage} {percent(r.before.accuracy)} {arrow} {percent(r.after.accuracy)}" for r in rows if r.before and r.after)


def _no_control(reading: Reading) -> str:
    kinds = {start_is(reading, run) for run in reading.rl}
    if "untouched" not in kinds:
        return "No run here starts from an untouched base model, so this page cannot say whether mid-training mattered."
    if kinds == {"untouched"}:
        return "No run here starts from a mid-trained checkpoint, so this page cannot say whether mid-training mattered."
    return "No mid-trained start has been measured beside its untouched base after any step yet, so the question is still open."


def _against_control(rows: list[RLComparisonRow], problems: str) -> str:
    below, level = _starts(rows, "below"), _starts(rows, "not told apart")
    above = [row.start for row in rows if row.finding == "above" and row.raised]
    idle = [row.start for row in rows if row.finding == "above" and not row.raised]
    base = listed(list(dict.fromkeys(row.against_start for row in rows)))
    how = "stands against that of the untouched"
    where = f"{_when(rows)} the accuracy on {problems} {how} {base} as follows, with 95 % intervals: {_gaps(rows)}."
    doubts = [f"{listed(level)} cannot be told apart from it"] if level else []
    doubts += [f"{listed(below)} {_ends(below)} below it"] if below else []
    doubts += [f"{listed(idle)} {_ends(idle)} above it, but not because RL raised accuracy"] if idle else []
    if not doubts:
        which = "every mid-trained start ends" if len(rows) > 1 else "the mid-trained start ends"
        return f"Mid-training mattered in this run, as the paper finds: {which} above its untouched base. {where}"
    if above:
        said = f"{listed(above)} {_ends(above)} above the untouched base, but {' and '.join(doubts)}"
        return f"This run shows the paper's finding, that {CLAIM}, only in part: {said}. {where}"
    said = f"none was raised above the untouched base ({' and '.join(doubts)})"
    return f"This run does not show what the paper shows, that {CLAIM}: {said}. {where}"


def _against_stable(rows: list[RLComparisonRow]) -> str:
    parent = listed(list(dict.fromkeys(row.against_start for row in rows)))
    above, below = _starts(rows, "above"), _starts(rows, "below")
    parts = [f"{listed(above)} {_ends(above)} above it"] if above else ["none ends above it beyond the interval"]
    parts += [f"{listed(below)} {_ends(below)} below it"] if below else []
    return f"Against {parent}, the checkpoint that the branches leave, with 95 % intervals: {_gaps(rows)}; {' and '.join(parts)}."


def _limits(rows: list[RLComparisonRow]) -> str:
    text = "The intervals are those of the problems, taken as if each run had its own; they know nothing of other seeds."
    others = sorted({key for row in rows for key in row.differs_in})
    if others:
        text += f" Beside the start, some compared runs differ in {listed(others)}."
    capped = list(dict.fromkeys(row.stage for row in rows if row.cap_tokens != row.against_cap_tokens))
    if capped:
        text += f" {listed(capped)} {'was' if len(capped) == 1 else 'were'} measured under another length cap than a run compared with."
    return text


def _problems(reading: Reading, row: RLComparisonRow) -> str:
    num = next((s.num_problems for s in score_rows(reading) if (s.stage, s.set) == (row.stage, row.set)), 0)
    return f"the {ALL_SETS} ({num:,} problems)" if row.set == ALL_SETS else f"{row.set} ({num:,} problems)"


def _when(rows: list[RLComparisonRow]) -> str:
    steps = {row.step for row in rows}
    if len(steps) > 1:
        return "At the last rollout step that both have measured,"
    updates = f" ({rows[0].updates:,} updates)" if rows[0].updates else ""
    return f"After {many(rows[0].step, 'rollout step')}{updates}"


def _gaps(rows: list[RLComparisonRow]) -> str:
    several = len({row.against for row in rows}) > 1
    return "; ".join(
        f"{row.start} {change(100 * row.difference, 1)} points{' over ' + row.against_start if several else ''} "
        f"[{change(100 * row.low, 1)} to {change(100 * row.high, 1)}]"
        for row in rows
    )


def _starts(rows: list[RLComparisonRow], finding: str) -> list[str]:
    return [row.start for row in rows if row.finding == finding]


def _ends(names: list[str]) -> str:
    return "ends" if len(names) == 1 else "end"
