"""What is amiss in a run of reinforcement learning, each from a failure that its field has seen. Pure."""

from __future__ import annotations

from megatron_ext.reports.format import listed, many, percent
from megatron_ext.reports.read import StageData
from megatron_ext.reports.rl_rows import RLPoint
from megatron_ext.reports.rl_tables import ALL_SETS, VERDICTS, curve_rows_of, learnt_nothing, mean_of
from megatron_ext.reports.tables import end_records

LEAST_INFORMATIVE, SILENT_STEPS = 0.05, 10  # fewer groups with a difference than this, for so many steps: nothing is learned
COLLAPSED_TO = 0.5  # of the best accuracy before; the paper's collapses went from 48 % to 0-7 % within 16 to 20 rollout steps
LENGTH_RISE, NEAR_CAP = 1.2, 0.8  # correct responses longer by a fifth without a gain, and as long as this share of the cap
ODD_SHARE = 0.1  # of responses that loop or begin with their answer
SMALL_SET = 100  # problems; below it one problem is more than a point
MISMATCH = 1.05  # token_mult_prob_error above which the engine samples another policy than the trainer updates
UNREADABLE = 0.01  # of answers that were not graded: timed out, crashed or an error of the grader


def rl_findings(stage: StageData) -> list[str]:
    """Sentences on one run; none on other stages, or before it began."""
    if not stage.is_rl or stage.state not in ("done", "begun"):
        return []
    lines = [*_signal(stage), *_text(stage), *_grading(stage), *_engine(stage)]
    curves = [row for row in curve_rows_of(stage) if row.set != ALL_SETS]
    if not curves:
        lines.append("no validation has been recorded, so its curve is missing.")
    sets_of: dict[str, list[str]] = {}
    for curve in curves:
        for line in _score(curve.points):
            sets_of.setdefault(line, []).append(curve.set)
    lines += [f"{listed(sets)}: {line}" for line, sets in sets_of.items()]
    templates = sorted({str(r["template"]) for r in stage.rl_validation} - {stage.config.template})
    if templates:
        lines.append(f"validated with template {', '.join(templates)}, but trained with {stage.config.template}: scores depend on it.")
    return lines


def _signal(stage: StageData) -> list[str]:
    """Long stretches in which all rewards of nearly every group were equal; a group of one is never compared."""
    if stage.config.rollouts.responses_per_prompt == 1:
        return []
    longest: list[int] = []
    current: list[int] = []
    for record in stage.rl:
        current = [*current, int(record["step"])] if record["informative_share"] < LEAST_INFORMATIVE else []
        longest = max(longest, current, key=len)
    if not longest or (len(longest) < SILENT_STEPS and len(longest) < len(stage.rl)):
        return []
    when = (
        f"at all {many(len(longest), 'recorded step')}" if len(longest) == len(stage.rl) else f"in steps {longest[0]:,} to {longest[-1]:,}"
    )
    if learnt_nothing(stage):
        return [f"every group had equal rewards {when}, so nothing was learnt."]
    return [f"less than {percent(LEAST_INFORMATIVE, 0)} of the groups had unequal rewards {when}; groups with equal rewards teach nothing."]


def _text(stage: StageData) -> list[str]:
    last = stage.rl[-end_records(len(stage.rl)) :]
    found = {
        "loop (the same text five times in a row or more)": mean_of(last, "loop_share"),
        "begin with their answer": mean_of(last, "box_first_share"),
    }
    return [
        f"{percent(share, 0)} of the responses of the last {many(len(last), 'recorded step')} {what}; "
        f"by their last box they may count as right."
        for what, share in found.items()
        if share is not None and share >= ODD_SHARE
    ]


def _grading(stage: StageData) -> list[str]:
    counts = {name: sum(r[name] for r in stage.rl) for name in VERDICTS}
    total = sum(counts.values())
    ungraded = {name: counts[name] for name in ("timed_out", "crashed", "error") if counts[name]}
    if not total or sum(ungraded.values()) < UNREADABLE * total:
        return []
    words = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in ungraded.items())
    return [f"{percent(sum(ungraded.values()) / total)} of the answers were not graded ({words} of {total:,}) and counted as wrong."]


def _engine(stage: StageData) -> list[str]:
    gaps = [(r["token_mult_prob_error"], r["step"]) for r in stage.rl if r.get("token_mult_prob_error") is not None]
    value, step = max(gaps, default=(1.0, 0))
    if value <= MISMATCH:
        return []
    return [f"engine and trainer gave sampled tokens probabilities that differ by a factor of {value:.3g} on average at step {step:,}."]


def _score(points: tuple[RLPoint, ...]) -> list[str]:
    lines = [*_collapse(points), *_explosion(points)]
    first, last = points[0], points[-1]
    if first.cap_tokens != last.cap_tokens:
        lines.append(
            f"measured under a cap of {first.cap_tokens or 0:,} tokens at step {first.step:,} and of {last.cap_tokens or 0:,} at step "
            f"{last.step:,}; part of the change may be the cap's (validation.cap_tokens holds it fixed)."
        )
    if last.num_problems < SMALL_SET:
        lines.append(f"only {last.num_problems} problems, so that one is {100 / last.num_problems:.1f} points.")
    if last.num_left_out:
        lines.append(f"{many(last.num_left_out, 'problem')} left out, because the prompt is too long.")
    return lines


def _collapse(points: tuple[RLPoint, ...]) -> list[str]:
    """The first fall below half of what had been reached, beyond both intervals."""
    best = points[0]
    for point in points[1:]:
        if point.accuracy <= COLLAPSED_TO * best.accuracy and point.high < best.low:
            fall = f"from {percent(best.accuracy)} at step {best.step:,} to {percent(point.accuracy)} at step {point.step:,}"
            if points[-1].high < best.low:
                return [f"accuracy collapsed {fall}; an earlier checkpoint is better than the last."]
            return [f"accuracy fell {fall}, and came back."] if point.num_problems >= SMALL_SET else []
        best = max(best, point, key=lambda p: p.accuracy)
    return []


def _explosion(points: tuple[RLPoint, ...]) -> list[str]:
    """Over the second half of the validations: correct responses grow towards the cap, accuracy does not."""
    first, last = points[(len(points) - 1) // 2], points[-1]
    if first.correct_tokens_mean is None or last.correct_tokens_mean is None or not last.cap_tokens:
        return []
    rises = last.correct_tokens_mean >= LENGTH_RISE * first.correct_tokens_mean
    is_flat = last.accuracy <= first.high
    if not (rises and is_flat and last.correct_tokens_mean >= NEAR_CAP * last.cap_tokens):
        return []
    return [
        f"correct responses grew from {first.correct_tokens_mean:,.0f} tokens at step {first.step:,} to {last.correct_tokens_mean:,.0f} "
        f"at step {last.step:,}, near the cap of {last.cap_tokens:,}, without a gain in accuracy."
    ]
