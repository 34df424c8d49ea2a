"""Whether mid-training mattered in this run, in few plain words from the numbers: the page opens with it. Pure.

The tables have every gap with its interval; here stands what follows from them.
"""

from __future__ import annotations

from megatron_ext.reports.format import listed, many
from megatron_ext.reports.read import Reading
from megatron_ext.reports.rl_comparison import comparison_rows, headline_set
from megatron_ext.reports.rl_looks import run_names
from megatron_ext.reports.rl_rows import RLComparisonRow, RLScoreRow
from megatron_ext.reports.rl_tables import ALL_SETS, learnt_nothing, score_rows, start_is

CLAIM = "mid-training decides how far RL takes a base model"  # the paper's finding
MOST_NAMES = 6  # of runs named one by one; of more, the lead gives the range and the tables each
ARROW = "\N{RIGHTWARDS ARROW}"


def verdict(reading: Reading) -> list[str]:
    """One paragraph, the answer first; none where the report has no RL. What the numbers do not show is said as plainly as what they do."""
    if not reading.rl:
        return []
    if idle := _nothing_learnt(reading):
        return [idle]
    names = run_names(reading)
    rows = comparison_rows(reading)
    scores = [row for row in score_rows(reading) if row.change is not None]
    name = headline_set(rows) or (ALL_SETS if any(row.set == ALL_SETS for row in scores) else scores[0].set if scores else "")
    scores = [row for row in scores if row.set == name]
    mine = [row for row in rows if row.set == name]
    controls = [row for row in mine if row.against_is == "untouched"]
    parents = [row for row in mine if row.against_is == "mid-trained"]
    said = [_against_control(controls, names) if controls else _no_control(reading), _before_after(scores, names)]
    if scores:
        said.append("; ".join([_gains(scores), *([_against_stable(parents, names)] if parents else [])]) + ".")
    if mine:
        said.append(_limits(mine))
    return [" ".join(said)]


def _nothing_learnt(reading: Reading) -> str:
    """Where no run that has begun learnt anything, there is nothing else to say."""
    begun = [run for run in reading.rl if run.rl]
    if not begun or not all(map(learnt_nothing, begun)):
        return ""
    learnt = "learnt" if all(run.state == "done" for run in reading.rl) else "has learnt"
    return (
        f"No run of reinforcement learning {learnt} anything: in every group all rewards were equal, so this page cannot say whether "
        "mid-training mattered."
    )


def _against_control(rows: list[RLComparisonRow], names: dict[str, str]) -> str:
    below, level = _found(rows, "below", names), _found(rows, "not told apart", names)
    above = _found([row for row in rows if row.raised], "above", names)
    idle = _found([row for row in rows if not row.raised], "above", names)
    doubts = [f"{_some(level)} cannot be told apart from it"] if level else []
    doubts += [f"{_some(below)} {_ends(below)} below it"] if below else []
    doubts += [f"{_some(idle)} {_ends(idle)} above it, but not because RL raised accuracy"] if idle else []
    if not doubts:
        which = "every mid-trained start ends" if len(rows) > 1 else "the mid-trained start ends"
        return f"Mid-training mattered in this run, as the paper finds: {which} above its untouched base."
    if above:
        said = f"{_some(above)} {_ends(above)} above the untouched base, but {' and '.join(doubts)}"
        return f"This run shows the paper's finding, that {CLAIM}, only in part: {said}."
    said = f"none was raised above the untouched base ({' and '.join(doubts)})"
    return f"This run does not show what the paper shows, that {CLAIM}: {said}."


def _no_control(reading: Reading) -> str:
    kinds = {start_is(reading, run) for run in reading.rl}
    if "untouched" not in kinds:
        return "No run here starts from an untouched base model, so this page cannot say whether mid-training mattered."
    if kinds == {"untouched"}:
        return "No run here starts from a mid-trained checkpoint, so this page cannot say whether mid-training mattered."
    return "No mid-trained start has been measured beside its untouched base after any step yet, so the question is still open."


def _before_after(rows: list[RLScoreRow], names: dict[str, str]) -> str:
    """Accuracy of each run, or the range where they are many."""
    if not rows:
        return "No run of reinforcement learning has been measured before and after yet."
    before, after = ([100 * point.accuracy for row in rows if (point := getattr(row, end))] for end in ("before", "after"))
    if len(rows) > MOST_NAMES:
        span = f"{min(before):.1f} to {max(before):.1f} {ARROW} {min(after):.1f} to {max(after):.1f} % in {many(len(rows), 'run')}"
    else:
        pairs = zip(rows, before, after, strict=True)
        span = ", ".join(f"{names[row.stage]} {first:.1f} {ARROW} {last:.1f} %" for row, first, last in pairs)
    sets = f"the {ALL_SETS}" if rows[0].set == ALL_SETS else rows[0].set
    return f"Accuracy on {sets} ({rows[0].num_problems:,} problems) before {ARROW} {_when(rows)}: {span}."


def _when(rows: list[RLScoreRow]) -> str:
    """The paper's plots count updates, so they are named where they are not the rollout steps."""
    if len({(row.after.step, row.after.updates) for row in rows if row.after}) > 1 or rows[0].after is None:
        return "after RL"
    point = rows[0].after
    updates = f" ({many(point.updates, 'update')})" if point.updates and point.updates != point.step else ""
    return f"after {many(point.step, 'rollout step')}{updates}"


def _gains(rows: list[RLScoreRow]) -> str:
    """How many runs RL itself made better."""
    risen = sum(row.change_low is not None and row.change_low > 0 for row in rows)
    which = (
        "no run" if not risen else f"{risen} of {many(len(rows), 'run')}" if risen < len(rows) else "every run" if risen > 1 else "the run"
    )
    return f"RL raised {which} beyond the 95 % interval"


def _against_stable(rows: list[RLComparisonRow], names: dict[str, str]) -> str:
    parent = listed(list(dict.fromkeys(row.against_start for row in rows)))
    above, below = _found(rows, "above", names), _found(rows, "below", names)
    parts = [f"{_some(above)} {_ends(above)} above {parent}, which the branches leave" if above else f"no branch ends above {parent}"]
    parts += [f"{_some(below)} {_ends(below)} below it"] if below else []
    return " and ".join(parts)


def _limits(rows: list[RLComparisonRow]) -> str:
    """What stands against the comparison."""
    others = sorted({key for row in rows for key in row.differs_in})
    differ = f"Some compared runs differ in {listed(others)}, too. " if others else ""
    capped = list(dict.fromkeys(row.stage for row in rows if row.cap_tokens != row.against_cap_tokens))
    were = "was" if len(capped) == 1 else "were"
    cap = f"{_some(capped)} {were} measured under another length cap than a run compared with. " if capped else ""
    return f"{differ}{cap}No interval knows of other seeds."


def _found(rows: list[RLComparisonRow], finding: str, names: dict[str, str]) -> list[str]:
    return [names[row.stage] for row in rows if row.finding == finding]


def _some(names: list[str]) -> str:
    return listed(names if len(names) <= MOST_NAMES else [*names[:2], f"{len(names) - 2} more"])


def _ends(names: list[str]) -> str:
    return "ends" if len(names) == 1 else "end"
