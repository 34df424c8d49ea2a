"""The page's section on reinforcement learning: the paper's figure for these runs, its numbers, and how training went."""

from __future__ import annotations

from typing import Any

from megatron_ext.reports import format as show
from megatron_ext.reports import markup
from megatron_ext.reports import rl_tables as tables
from megatron_ext.reports.board import Board, Section, as_json
from megatron_ext.reports.figures import SMOOTHING_LEAST, SMOOTHING_SHARE
from megatron_ext.reports.markup import Cell
from megatron_ext.reports.rl_captions import ARROW, caps_caption, coinciding_caption, gradient_caption, intervals_caption, recorded_caps
from megatron_ext.reports.rl_comparison import comparison_rows, headline_set
from megatron_ext.reports.rl_figures import draw_curves
from megatron_ext.reports.rl_health_figure import draw_training
from megatron_ext.reports.rl_rows import RLComparisonRow, RLPoint, RLRunRow, RLScoreRow


def reinforcement(board: Board) -> Section | None:
    """Accuracy and length over rollout steps, before and after, against each other; None where no stage is RL."""
    reading = board.reading
    if not reading.rl:
        return None
    runs, curves, scores = tables.run_rows(reading), tables.curve_rows(reading), tables.score_rows(reading)
    comparisons, grading, times = comparison_rows(reading), tables.grading_rows(reading), tables.time_rows(reading)
    html = board.figure(
        "rl_curves",
        lambda path: draw_curves(reading, curves, path),
        "Accuracy and length of correct responses over rollout steps, one curve for each start.",
        "Held-out accuracy with greedy answers (above) and mean tokens of the correct ones (below) over the rollout steps of "
        f"reinforcement learning, one curve for each checkpoint that it started from; step 0 is that checkpoint. "
        f"{intervals_caption(curves)} {caps_caption(reading, runs)} {coinciding_caption(reading, curves)}"
        "What to look at: how far apart the curves end, and whether length grows with accuracy or alone towards the cap. "
        "Lengths are drawn on a scale of powers of two; k is 1,024.",
        "No validation has been recorded yet.",
    )
    html += _score_tables(board, scores)
    html += _comparison_table(board, comparisons)
    html += board.figure(
        "rl_training",
        lambda path: draw_training(reading, path),
        "Reward, informative groups, truncation, entropy, engine-trainer gap and length over rollout steps.",
        "What the rollouts and updates say. Faint: single rollout steps; bold: centred moving mean over "
        f"{show.percent(SMOOTHING_SHARE, 0)} of a run's recorded steps, at least {SMOOTHING_LEAST} where there are enough. "
        "What to look at: groups whose rewards are all equal teach nothing, so their share must not fall to zero; entropy that falls to "
        "zero, or lengths that rise to the cap without reward, announce a collapse; the engine's probabilities of the sampled tokens "
        f"should agree with the trainer's.{gradient_caption(reading)}",
        "No rollout step has been recorded yet.",
    )
    html += _run_tables(board, runs)
    html += _grading_table(board, grading)
    html += _time_table(board, times)
    numbers: dict[str, list[Any]] = {
        "rl_runs": runs, "rl_curves": curves, "rl_scores": scores, "rl_comparison": comparisons, "rl_grading": grading, "rl_time": times,
    }  # fmt: skip
    return Section("rl", "Reinforcement learning", html, {key: as_json(rows) for key, rows in numbers.items()})


def _score_tables(board: Board, rows: list[RLScoreRow]) -> str:
    if not rows:
        return ""
    accuracy = markup.table(
        "Held-out accuracy before and after, with 95 % intervals",
        ["run", "set (problems)", "#before", "#after", "#at step", "#change (points)", "#best", "#at step"],
        [
            [
                board.name(r.stage), _set(r), _score(r.before), _score(r.after), show.count(r.after.step) if r.after else show.NONE,
                _points(r.change, r.change_low, r.change_high), show.percent(r.best), show.count(r.best_step),
            ]
            for r in rows
        ],
    )  # fmt: skip
    return accuracy + markup.table(
        "Length of the held-out responses before and after",
        ["run", "set (problems)", "#tokens of correct ones", "#cap (tokens)", "#cut off by it", "#correct per 1,000 tokens, after"],
        [
            [
                board.name(r.stage), _set(r), _both(r, "correct_tokens_mean"), _both(r, "cap_tokens"), _both(r, "truncated_share"),
                show.NONE if r.correct_per_1000_tokens is None else f"{r.correct_per_1000_tokens:.2f}",
            ]
            for r in rows
        ],
    )  # fmt: skip


def _set(row: RLScoreRow) -> Cell:
    return markup.chip(None, f"{row.set} ({row.num_problems:,})")


def _comparison_table(board: Board, rows: list[RLComparisonRow]) -> str:
    """On the set that the page opens with; summary.json has every set."""
    rows = [row for row in rows if row.set == headline_set(rows)]
    if not rows:
        return ""
    return markup.table(
        "Against the same RL from what the start was made from",
        ["run", "against", "which is", "set", "#at step", "#run", "#other", "#difference (points)", "finding", "other differences"],
        [
            [
                board.name(r.stage), board.name(r.against), markup.chip(None, r.against_is), r.set, show.count(r.step),
                show.percent(r.accuracy), show.percent(r.against_accuracy), _points(r.difference, r.low, r.high), r.finding,
                show.listed(list(r.differs_in)) or "none",
            ]
            for r in rows
        ],
    ) + markup.paragraph(
        "Intervals of differences treat the two runs as if each had answered its own problems, so they are mostly wider than needed; "
        "they say nothing of how another seed would have ended. summary.json has every set.",
        "muted",
    )  # fmt: skip


def _run_tables(board: Board, rows: list[RLRunRow]) -> str:
    settings = markup.table(
        "Runs",
        ["run", "starts from", "which is", "template", "reward", "caps of rollouts (tokens)", "#rollout steps", "#updates",
         "#responses a step", "#response tokens"],
        [
            [
                board.name(r.stage), r.start, markup.chip(None, r.start_is), r.template, r.reward, recorded_caps(r.caps),
                f"{r.steps:,}" if r.steps == r.steps_planned else f"{r.steps:,} of {r.steps_planned:,}", show.count(r.updates),
                show.count(r.num_responses), show.tokens(r.response_tokens),
            ]
            for r in rows
        ],
    )  # fmt: skip
    begun = [r for r in rows if r.last_steps]
    if not begun:
        return settings
    return settings + markup.table(
        "Rollouts at the end of each run",
        ["run", "#mean of", "#reward", "#unequal rewards", "#cut off", "#looping", "#answer first", "#text after answer", "#entropy",
         "#engine error"],
        [
            [
                board.name(r.stage), show.many(r.last_steps, "step"), show.change(r.reward_mean), show.percent(r.informative_share),
                show.percent(r.truncated_share), show.percent(r.loop_share), show.percent(r.box_first_share),
                show.percent(r.text_after_box_share), show.loss(r.approx_entropy),
                show.NONE if r.token_mult_prob_error is None else show.rate(r.token_mult_prob_error - 1, 1),
            ]
            for r in begun
        ],
    )  # fmt: skip


def _grading_table(board: Board, rows: list[tables.RLGradingRow]) -> str:
    if not rows:
        return ""
    names = tables.VERDICTS
    return markup.table(
        "Verdicts over all recorded steps",
        ["run", "#responses", *(f"#{name.replace('_', ' ')}" for name in names)],
        [[board.name(r.stage), show.count(r.num_responses), *(show.count(getattr(r, name)) for name in names)] for r in rows],
    )


def _time_table(board: Board, rows: list[tables.RLTimeRow]) -> str:
    if not rows:
        return ""
    return markup.table(
        "Time of a rollout step (medians)",
        ["run", "#steps", "#sampling", "#grading", "#update", "#whole step", "#responses/s", "#peak memory"],
        [
            [
                board.name(r.stage), show.count(r.steps), show.seconds(r.rollout_seconds), show.seconds(r.grading_seconds),
                show.seconds(r.update_seconds), show.seconds(r.step_seconds),
                show.NONE if r.responses_per_second is None else f"{r.responses_per_second:.3g}", show.memory(r.peak_memory_bytes),
            ]
            for r in rows
        ],
    )  # fmt: skip


def _score(point: RLPoint | None) -> Cell:
    if point is None:
        return show.NONE
    return f"{show.percent(point.accuracy)} [{100 * point.low:.1f}\N{EN DASH}{100 * point.high:.1f}]"


def _points(value: float | None, low: float | None, high: float | None) -> Cell:
    if value is None or low is None or high is None:
        return show.NONE
    return f"{show.change(100 * value, 1)} [{show.change(100 * low, 1)} to {show.change(100 * high, 1)}]"


def _both(row: RLScoreRow, key: str) -> Cell:
    """A value before and after; once where it is a cap that did not change, or was never there."""
    form = show.percent if key == "truncated_share" else show.count
    before, after = (form(None if point is None else getattr(point, key)) for point in (row.before, row.after))
    return after if before == after and (key == "cap_tokens" or after == show.NONE) else f"{before}{ARROW}{after}"
