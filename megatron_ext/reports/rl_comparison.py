"""Runs of RL against each other: every run beside those from what its start was made from. Pure."""

from __future__ import annotations

from megatron_ext.config.base import Json
from megatron_ext.config.stages import science
from megatron_ext.estimators import Estimate, difference
from megatron_ext.reports.read import Reading, StageData
from megatron_ext.reports.rl_rows import RLComparisonRow, RLPoint
from megatron_ext.reports.rl_tables import ALL_SETS, curve_rows, estimate, start_is
from megatron_ext.reports.tables import parent_name


def comparison_rows(reading: Reading) -> list[RLComparisonRow]:
    """On every set, each run against the run from each ancestor of its start, the nearest ancestor first.

    Of several runs from one ancestor, the one whose settings are most alike; at the last step that both have measured.
    """
    curves = {(row.stage, row.set): {p.step: p for p in row.points} for row in curve_rows(reading)}
    sets = list(dict.fromkeys(name for _, name in curves))
    rows = []
    for run in reading.rl:
        for ancestor in _ancestors(reading, run):
            others = [s for s in reading.rl if s.name != run.name and parent_name(s) == ancestor]
            if not others:
                continue
            other = min(others, key=lambda s: len(differing(run, s)))
            for name in sets:
                mine, theirs = curves.get((run.name, name), {}), curves.get((other.name, name), {})
                steps = [step for step in mine if step in theirs and step > 0]
                if steps:
                    rows.append(_row(reading, run, other, name, (mine, theirs), max(steps)))
    return rows


def headline_set(rows: list[RLComparisonRow]) -> str:
    """The set that the page's first words are about: the mean of all, or else the first."""
    names = [row.set for row in rows]
    return ALL_SETS if ALL_SETS in names else names[0] if names else ""


def differing(one: StageData, other: StageData) -> list[str]:
    """The settings in which two runs differ, beside their names and starts."""
    first, second = (_settings(s) for s in (one, other))
    return [key for key in first if first[key] != second[key]]


def _settings(stage: StageData) -> Json:
    return {key: value for key, value in science(stage.config).items() if key not in ("name", "start")}


def _ancestors(reading: Reading, run: StageData) -> list[str]:
    """What the start of a run was itself made from, the nearest first."""
    found: list[str] = []
    stage = reading.find(str(parent_name(run)))
    while stage and (stage.is_training or stage.is_rl) and (name := parent_name(stage)) is not None:
        found.append(name)
        stage = reading.find(name)
    return found


def _row(
    reading: Reading,
    run: StageData,
    other: StageData,
    name: str,
    points: tuple[dict[int, RLPoint], dict[int, RLPoint]],
    step: int,
) -> RLComparisonRow:
    mine, theirs = points
    gap = difference(estimate(mine[step]), estimate(theirs[step]))
    return RLComparisonRow(
        stage=run.name,
        start=str(parent_name(run)),
        against=other.name,
        against_start=str(parent_name(other)),
        against_is=start_is(reading, other),
        set=name,
        step=step,
        updates=mine[step].updates,
        before=mine[0].accuracy if 0 in mine else None,
        accuracy=mine[step].accuracy,
        against_before=theirs[0].accuracy if 0 in theirs else None,
        against_accuracy=theirs[step].accuracy,
        difference=gap.value,
        low=gap.low,
        high=gap.high,
        finding=_finding(gap),
        raised=0 in mine and _finding(difference(estimate(mine[step]), estimate(mine[0]))) == "above",
        cap_tokens=mine[step].cap_tokens,
        against_cap_tokens=theirs[step].cap_tokens,
        differs_in=tuple(differing(run, other)),
    )


def _finding(gap: Estimate) -> str:
    return "above" if gap.low > 0 else "below" if gap.high < 0 else "not told apart"
