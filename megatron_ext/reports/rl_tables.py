"""The numbers of reinforcement learning: pure functions from what the run folders say to rows."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, median

from megatron_ext.config.rl import Lengths, ProgressLengths
from megatron_ext.config.stages import Branch, ConvertStage, RLStage, Scratch, TrainStage
from megatron_ext.estimators import Estimate, difference, macro_mean, wilson
from megatron_ext.metrics import Record
from megatron_ext.reports.read import Reading, StageData
from megatron_ext.reports.rl_rows import Cap, RLCurveRow, RLGradingRow, RLPoint, RLRunRow, RLScoreRow, RLTimeRow
from megatron_ext.reports.tables import end_records, number, parent_name, steps_done

ALL_SETS = "mean of all sets"  # the paper's own mean: unweighted, of sets of any size
VERDICTS = ("correct", "wrong", "unparseable", "error", "timed_out", "crashed")


def run_rows(reading: Reading) -> list[RLRunRow]:
    """Every run, begun or not."""
    rows = []
    for s in reading.rl:
        newest = s.rl[-1] if s.rl else {}
        last = s.rl[-end_records(len(s.rl)) :]
        names = ("reward_mean", "informative_share", "truncated_share", "loop_share", "box_first_share", "text_after_box_share",
                 "approx_entropy", "token_mult_prob_error")  # fmt: skip
        rows.append(
            RLRunRow(
                stage=s.name,
                start=str(parent_name(s)),
                start_is=start_is(reading, s),
                template=s.config.template,
                reward=s.config.reward,
                caps=caps_in_force(s),
                steps=steps_done(s),
                steps_planned=s.config.steps,
                updates=newest.get("updates"),
                updates_per_step=s.config.rollouts.updates_per_step,
                response_tokens=newest.get("tokens"),
                num_prompts=newest.get("num_prompts"),
                num_responses=newest.get("num_responses"),
                last_steps=len(last),
                **{name: mean_of(last, name) for name in names},
            )
        )
    return rows


def start_is(reading: Reading, stage: StageData) -> str:
    """What a run starts from: `untouched` (no mid-training), `mid-trained`, a `branch` of that, or `unknown`."""
    start = reading.find(str(parent_name(stage)))
    match start.config if start else None:
        case ConvertStage():
            return "untouched"
        case TrainStage() as config:
            return "untouched" if isinstance(config.start, Scratch) else "branch" if isinstance(config.start, Branch) else "mid-trained"
        case RLStage() if start:
            return start_is(reading, start)
    return "unknown"


def caps_in_force(stage: StageData) -> tuple[Cap, ...]:
    """The length caps that responses were sampled under, by finished rollout steps, as recorded."""
    caps = [(int(r["step"]) - 1, int(r["cap_tokens"])) for r in stage.rl]
    changes = [later for earlier, later in pairwise(caps) if later[1] != earlier[1]]
    return tuple(Cap(*cap) for cap in [*caps[:1], *changes])


def caps_words(lengths: Lengths) -> str:
    """The caps that a schedule plans, in order."""
    caps = [row.cap_tokens for row in lengths.caps] if isinstance(lengths, ProgressLengths) else list(lengths.caps_tokens)
    return " \N{RIGHTWARDS ARROW} ".join(f"{cap:,}" for cap in caps)


def curve_rows(reading: Reading) -> list[RLCurveRow]:
    """Every run on each set that it was measured on and, where there are several, on their mean."""
    return [row for s in reading.rl for row in curve_rows_of(s)]


def curve_rows_of(stage: StageData) -> list[RLCurveRow]:
    """One run on each set, then on their mean."""
    sets = {name: _points([r for r in stage.rl_validation if r["set"] == name]) for name in set_names(stage)}
    rows = [RLCurveRow(stage.name, name, points) for name, points in sets.items() if points]
    if len(sets) > 1 and (means := _mean_points(sets)):
        rows.append(RLCurveRow(stage.name, ALL_SETS, means))
    return rows


def set_names(stage: StageData) -> list[str]:
    """The sets of a run's recipe, then those that only its records name."""
    return list(dict.fromkeys([one.name for one in stage.config.validation.sets] + [str(r["set"]) for r in stage.rl_validation]))


def estimate(point: RLPoint) -> Estimate:
    """A point's accuracy with its interval."""
    return Estimate(point.accuracy, point.low, point.high, point.num_problems)


def _points(records: list[Record]) -> tuple[RLPoint, ...]:
    points = []
    for record in records:
        if record["num_problems"] > 0:
            score = wilson(record["num_correct"], record["num_problems"])
            points.append(
                RLPoint(
                    step=record["step"],
                    updates=record.get("updates"),
                    accuracy=score.value,
                    low=score.low,
                    high=score.high,
                    num_correct=record["num_correct"],
                    num_problems=record["num_problems"],
                    num_left_out=record.get("num_left_out", 0),
                    response_tokens_mean=number(record, "response_tokens_mean"),
                    correct_tokens_mean=number(record, "correct_tokens_mean"),
                    truncated_share=number(record, "truncated_share"),
                    cap_tokens=record.get("cap_tokens"),
                )
            )
    return tuple(points)


def _mean_points(sets: dict[str, tuple[RLPoint, ...]]) -> tuple[RLPoint, ...]:
    """The unweighted mean over sets at every step that measured all of them."""
    at = {name: {p.step: p for p in points} for name, points in sets.items()}
    first, *others = at.values()
    means = []
    for step in (step for step in first if all(step in other for other in others)):
        here = {name: points[step] for name, points in at.items()}
        score = macro_mean({name: estimate(point) for name, point in here.items()})
        caps = {p.cap_tokens for p in here.values()}
        lengths = {
            key: [getattr(p, key) for p in here.values()] for key in ("response_tokens_mean", "correct_tokens_mean", "truncated_share")
        }
        means.append(
            RLPoint(
                step=step,
                updates=first[step].updates,
                accuracy=score.value,
                low=score.low,
                high=score.high,
                num_correct=sum(p.num_correct for p in here.values()),
                num_problems=sum(p.num_problems for p in here.values()),
                num_left_out=sum(p.num_left_out for p in here.values()),
                cap_tokens=caps.pop() if len(caps) == 1 else None,
                **{key: None if None in values else fmean(values) for key, values in lengths.items()},
            )
        )
    return tuple(means)


def score_rows(reading: Reading) -> list[RLScoreRow]:
    """Every run on every set, before and after."""
    rows = []
    for curve in curve_rows(reading):
        before = curve.points[0] if curve.points[0].step == 0 else None
        after = curve.points[-1] if curve.points[-1].step > 0 else None
        change = difference(estimate(after), estimate(before)) if before and after else None
        best = max(curve.points, key=lambda p: p.accuracy)
        tokens = after.response_tokens_mean if after else None
        rows.append(
            RLScoreRow(
                stage=curve.stage,
                set=curve.set,
                num_problems=curve.points[-1].num_problems,
                before=before,
                after=after,
                change=change.value if change else None,
                change_low=change.low if change else None,
                change_high=change.high if change else None,
                best=best.accuracy,
                best_step=best.step,
                correct_per_1000_tokens=1000 * after.accuracy / tokens if after and tokens else None,
            )
        )
    return rows


def learnt_nothing(stage: StageData) -> bool:
    """Whether all rewards of every group were equal at every recorded step, and no update had a gradient of another kind."""
    return bool(stage.rl) and not any(record["informative_share"] or number(record, "grad_norm_max") for record in stage.rl)


def grading_rows(reading: Reading) -> list[RLGradingRow]:
    """Every run that has sampled."""
    return [
        RLGradingRow(s.name, sum(r["num_responses"] for r in s.rl), *(sum(r[name] for r in s.rl) for name in VERDICTS))
        for s in reading.rl
        if s.rl
    ]


def time_rows(reading: Reading) -> list[RLTimeRow]:
    """Every run that has sampled."""
    names = ("rollout_seconds", "grading_seconds", "update_seconds", "step_seconds", "responses_per_second")
    return [
        RLTimeRow(
            stage=s.name,
            steps=len(s.rl),
            peak_memory_bytes=number(s.done, "peak_memory_bytes"),
            **{name: _median_of(s.rl, name) for name in names},
        )
        for s in reading.rl
        if s.rl
    ]


def mean_of(records: tuple[Record, ...], name: str) -> float | None:
    """Mean of a value over the records that have it."""
    values = [v for r in records if (v := number(r, name)) is not None]
    return fmean(values) if values else None


def _median_of(records: tuple[Record, ...], name: str) -> float | None:
    values = [v for r in records if (v := number(r, name)) is not None]
    return median(values) if values else None
