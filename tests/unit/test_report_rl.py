"""The report on reinforcement learning: its numbers against known records, its words against what these show, its notes."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.attempts import begin_attempt
from megatron_ext.config.rl import Rollouts, TruncationLengths
from megatron_ext.config.stages import RLStage
from megatron_ext.estimators import difference, macro_mean, wilson
from megatron_ext.metrics import MetricsWriter
from megatron_ext.reports import rl_looks, rl_rows, rl_tables, tables
from megatron_ext.reports.lineage_figure import node_lines
from megatron_ext.reports.read import gather
from megatron_ext.reports.rl_comparison import comparison_rows
from megatron_ext.reports.rl_notes import rl_findings
from megatron_ext.reports.rl_verdict import verdict
from megatron_ext.runs import Run
from tests.documented_metrics import undocumented
from tests.rl_report_runs import SAMPLED, Course, Score, curve, graph, rl, rollout, validation
from tests.unit.test_reports import build, draw, row


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Run]:
    """What all of this RL starts from."""
    return build(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def three(tmp_path_factory, trained) -> tuple[dict[str, Run], str, dict[str, Any]]:
    """RL from base, stable and a branch; the cap of the last rises after four steps."""
    courses = {
        rl("rl_base", "base"): Course(curve(4, 6, 8)),
        rl("rl_stable", "stable"): Course(curve(10, 30, 44)),
        rl("rl_long", "long", caps=((0, 64), (4, 128))): Course(
            {(0, "sums"): Score(20), (4, "sums"): Score(90, tokens=30.0), (8, "sums"): Score(80, tokens=40.0)}
        ),
    }
    runs = graph(tmp_path_factory.mktemp("rl"), trained, courses)
    return runs, *draw(runs)


def test_points_before_and_after_equal_the_records(three) -> None:
    _, page, summary = three
    long = row(summary["rl_curves"], stage="rl_long", set="sums")
    got = [(p["step"], p["updates"], p["accuracy"], p["num_correct"], p["num_problems"]) for p in long["points"]]
    assert got == [(0, 0, 0.1, 20, 200), (4, 8, 0.45, 90, 200), (8, 16, 0.4, 80, 200)]
    assert [(p["correct_tokens_mean"], p["cap_tokens"]) for p in long["points"]] == [(20.0, 64), (30.0, 128), (40.0, 128)]
    score = row(summary["rl_scores"], stage="rl_long", set="sums")
    assert (score["before"], score["after"]) == (long["points"][0], long["points"][-1])
    assert (score["change"], score["best"], score["best_step"]) == (pytest.approx(0.3), 0.45, 4)
    assert score["correct_per_1000_tokens"] == pytest.approx(1000 * 0.4 / 25.0)
    # Wilson's interval of 80 in 200 from its formula: (0.4 + z2/400 +- z sqrt(0.24/200 + z2/160000)) / (1 + z2/200), z2 = 3.84146
    assert (score["after"]["low"], score["after"]["high"]) == pytest.approx((0.334606, 0.469163), abs=1e-6)
    assert "40.0 % [33.5\N{EN DASH}46.9]" in page
    assert "20 \N{RIGHTWARDS ARROW} 40" in page


def test_runs_and_verdicts_equal_the_records(three) -> None:
    _, page, summary = three
    long = row(summary["rl_runs"], stage="rl_long")
    assert (long["start"], long["start_is"], long["template"], long["reward"]) == ("long", "branch", "complex", "correct")
    assert long["caps"] == [{"after_step": 0, "cap_tokens": 64}, {"after_step": 4, "cap_tokens": 128}]
    assert (long["steps"], long["updates"], long["updates_per_step"], long["response_tokens"]) == (8, 16, 2, 8 * 25 * SAMPLED)
    assert (long["last_steps"], long["reward_mean"]) == (2, pytest.approx((-0.15 - 0.1) / 2))
    grading = row(summary["rl_grading"], stage="rl_long")
    assert (grading["num_responses"], grading["correct"]) == (8 * SAMPLED, sum(10 + step for step in range(1, 9)))
    assert (grading["timed_out"], grading["crashed"], grading["unparseable"]) == (16, 8, 8)
    assert row(summary["rl_time"], stage="rl_long")["step_seconds"] == 3.5
    stages = row(summary["stages"], stage="rl_long")
    assert (stages["steps"], stages["steps_planned"], stages["tokens"], stages["tokens_planned"]) == (8, 8, 8 * 25 * SAMPLED, None)
    assert [row(summary["rl_runs"], stage=s)["start_is"] for s in ("rl_base", "rl_stable")] == ["untouched", "mid-trained"]
    assert "64 tokens from base and stable; 64 \N{RIGHTWARDS ARROW} 128 (after 4) tokens from long" in page.replace(
        "\N{NO-BREAK SPACE}", " "
    )


def test_a_run_is_compared_with_those_from_what_its_start_was_made_from(three) -> None:
    _, page, summary = three
    rows = [(r["stage"], r["against"], r["against_is"], r["step"], r["finding"]) for r in summary["rl_comparison"]]
    assert rows == [
        ("rl_stable", "rl_base", "untouched", 8, "above"),
        ("rl_long", "rl_stable", "mid-trained", 8, "above"),
        ("rl_long", "rl_base", "untouched", 8, "above"),
    ]
    long = row(summary["rl_comparison"], stage="rl_long", against="rl_base")
    assert (long["before"], long["accuracy"], long["against_before"], long["against_accuracy"]) == (0.1, 0.4, 0.02, 0.04)
    assert (long["difference"], long["differs_in"]) == (pytest.approx(0.36), ["lengths"])
    assert (long["cap_tokens"], long["against_cap_tokens"]) == (128, 64)
    words = " ".join(summary["rl_verdict"])
    assert all(text in html.unescape(page).split("<nav>")[0] for text in summary["rl_verdict"])
    assert summary["rl_verdict"][0].startswith(
        "Mid-training mattered in this run, as the paper finds: every mid-trained start ends above its"
    )
    arrow = "\N{RIGHTWARDS ARROW}"
    assert f"Accuracy on sums (200 problems) before {arrow} after 8 rollout steps (16 updates): base 2.0 {arrow} 4.0 %, stable 5.0" in words
    assert "RL raised 2 of 3 runs beyond the 95 % interval; long ends above stable, which the branches leave." in words
    assert "Some compared runs differ in lengths, too." in words
    assert "+18.0 [+11.6 to +24.5]" in page
    assert "rl_long was measured under another length cap" in words


@pytest.mark.parametrize(
    ("base", "stable", "long", "said"),
    [
        (40, 44, 42, "This run does not show what the paper shows, that mid-training decides how far"),
        (40, 8, 8, "none was raised above the untouched base (stable and long end below it)."),
        (8, 10, 90, "only in part: long ends above the untouched base, but stable cannot be told apart from it."),
        (4, 60, 60, "no branch ends above stable."),
    ],
)
def test_what_the_run_does_not_show_is_said_in_plain_words(base, stable, long, said, tmp_path, trained) -> None:
    courses: dict[RLStage, Course | None] = {
        rl("rl_base", "base"): Course(curve(4, 6, base)),
        rl("rl_stable", "stable"): Course(curve(4, 6, stable)),
        rl("rl_long", "long"): Course(curve(4, 6, long)),
    }
    words = " ".join(verdict(gather(graph(tmp_path, trained, courses)["report"])))
    assert said in words
    assert ("as the paper finds" in words) == (min(stable, long) == 60)


def test_a_start_that_stands_above_without_rl_is_not_counted_for_it(tmp_path, trained) -> None:
    courses: dict[RLStage, Course | None] = {
        rl("rl_base", "base"): Course(curve(4, 6, 8)),
        rl("rl_long", "long"): Course(curve(90, 80, 90)),
    }
    [words] = verdict(gather(graph(tmp_path, trained, courses)["report"]))
    assert "This run does not show what the paper shows" in words
    assert "long ends above it, but not because RL raised accuracy" in words
    assert "RL raised no run beyond the 95 % interval" in words


def test_without_its_control_the_question_is_left_open(tmp_path, trained) -> None:
    courses: dict[RLStage, Course | None] = {rl("rl_long", "long"): Course(curve(4, 6, 90))}
    words = verdict(gather(graph(tmp_path / "one", trained, courses)["report"]))[0]
    assert "No run here starts from an untouched base model" in words
    courses = {rl("rl_base", "base"): None, rl("rl_long", "long"): Course(curve(4), steps=2)}
    runs = graph(tmp_path / "two", trained, courses)
    words = " ".join(verdict(gather(runs["report"])))
    assert "No run of reinforcement learning has been measured before and after yet." in words
    assert "the question is still open" in words
    _, summary = draw(runs)  # one point, a run that was not begun
    assert "figures/rl_curves.png" in summary["figures"]
    assert any("rl_long: not finished (step 2 of 8)" in note for note in summary["notes"])


def test_graphs_without_rl_have_no_section_and_no_numbers_of_it(tmp_path) -> None:
    page, summary = draw(build(tmp_path, finished=2))
    assert 'id="rl"' not in page
    assert not any(key.startswith("rl") for key in summary)


def notes_of(tmp_path: Path, trained: dict[str, Run], course: Course, **more: Any) -> str:
    runs = graph(tmp_path, trained, {rl("rl_long", "long", **more): course})
    stage = gather(runs["report"]).find("rl_long")
    assert stage is not None
    return "\n".join(rl_findings(stage))


def test_a_calm_run_has_no_notes(tmp_path, trained) -> None:
    calm = {"timed_out": 0, "crashed": 0, "wrong": 5}
    assert notes_of(tmp_path, trained, Course(curve(20, 60, 90), step=lambda _: calm)) == ""


FAULTS: list[tuple[str, Course, dict[str, Any]]] = [
    (
        "sums: accuracy collapsed from 48.0 % at step 4 to 3.5 % at step 8; an earlier checkpoint is better than the last",
        Course(curve(20, 96, 7)),
        {},
    ),
    (
        "sums: accuracy fell from 48.0 % at step 4 to 3.5 % at step 8, and came back",
        Course(curve(20, 96, 7, 90), steps=12),
        {"steps": 12},
    ),
    (
        "less than 5 % of the groups had unequal rewards in steps 3 to 12;",
        Course(curve(0, 0), steps=16, step=lambda n: {"informative_share": 0.0 if 2 < n < 13 else 0.5}),
        {"steps": 16},
    ),
    (
        "every group had equal rewards at all 8 recorded steps, so nothing was learnt.",
        Course(curve(0, 0), step=lambda _: {"informative_share": 0.0, "grad_norm_max": 0.0}),
        {},
    ),
    (
        "less than 5 % of the groups had unequal rewards at all 8 recorded steps;",
        Course(curve(0, 0), step=lambda _: {"informative_share": 0.0}),
        {},
    ),
    (
        "sums: correct responses grew from 30 tokens at step 4 to 60 at step 8, near the cap of 64, without a gain in accuracy",
        Course({(0, "sums"): Score(90), (4, "sums"): Score(90, tokens=30.0), (8, "sums"): Score(92, tokens=60.0)}),
        {},
    ),
    ("34 % of the responses of the last 2 recorded steps loop", Course(curve(1), step=lambda _: {"loop_share": 0.34}), {}),
    ("20 % of the responses of the last 2 recorded steps begin with their", Course(curve(1), step=lambda _: {"box_first_share": 0.2}), {}),
    ("sums: measured under a cap of 64 tokens at step 0 and of 128 at step 8", Course(curve(20, 60, 90)), {"caps": ((0, 64), (4, 128))}),
    ("sums: only 40 problems, so that one is 2.5 points.", Course(curve(4, 6, problems=40)), {}),
    ("(16 timed out, 8 crashed of ", Course(curve(20, 60, 90)), {}),
    ("no validation has been recorded", Course({}), {}),
    ("sums: 2 problems left out", Course({(0, "sums"): Score(20, 198, left_out=2)}), {}),
    ("validated with template simple, but trained with complex", Course(curve(20), template="simple"), {}),
    ("a factor of 1.2 on average at step 3", Course(curve(20), step=lambda n: {"token_mult_prob_error": 1.2 if n == 3 else 1.0}), {}),
]


@pytest.mark.parametrize(("said", "course", "settings"), FAULTS, ids=[text[:40] for text, _, _ in FAULTS])
def test_what_is_amiss_is_noted(said: str, course: Course, settings: dict[str, Any], tmp_path, trained) -> None:
    assert said in notes_of(tmp_path, trained, course, **settings)


def test_a_group_of_one_is_not_said_to_teach_nothing(tmp_path, trained) -> None:
    alone = Rollouts(prompts_per_step=32, responses_per_prompt=1, prompts_per_update=16, max_prompt_tokens=16)
    course = Course(curve(20, 60, 90), step=lambda _: {"informative_share": 0.0})
    assert "groups" not in notes_of(tmp_path / "one", trained, course, rollouts=alone)
    assert "groups" in notes_of(tmp_path / "eight", trained, course)
    reading = gather(graph(tmp_path / "verdict", trained, {rl("rl_long", "long", rollouts=alone): course})["report"])
    assert "learnt anything" not in verdict(reading)[0]


def test_a_collapse_within_the_interval_is_none(tmp_path, trained) -> None:
    assert "collapsed" not in notes_of(tmp_path, trained, Course(curve(1, 4, 1, problems=20)))


def test_several_sets_have_an_unweighted_mean_where_all_were_measured(tmp_path, trained) -> None:
    scores = {**curve(10, 40, 60), **curve(5, 20, name="amc", problems=40)}
    runs = graph(tmp_path, trained, {rl("rl_long", "long", sets=("sums", "amc")): Course(scores)})
    [first, second] = next(r.points for r in rl_tables.curve_rows(gather(runs["report"])) if r.set == rl_tables.ALL_SETS)
    assert [(p.step, p.accuracy, p.num_problems) for p in (first, second)] == [
        (0, pytest.approx((0.05 + 0.125) / 2), 240),
        (4, pytest.approx((0.2 + 0.5) / 2), 240),
    ]
    sums, amc = wilson(40, 200), wilson(20, 40)
    assert second.low == macro_mean({"sums": sums, "amc": amc}).low
    assert max(amc.value - amc.low, sums.value - sums.low) / 2 < 0.35 - second.low < (amc.value - amc.low + 0.1) / 2
    assert (first.cap_tokens, first.correct_tokens_mean) == (64, 20.0)


def test_a_later_attempt_counts_and_an_earlier_one_does_not(tmp_path, trained) -> None:
    runs = graph(tmp_path, trained, {rl("rl_long", "long"): Course(curve(20, 199), steps=6)})
    run = runs["rl_long"]
    writer = MetricsWriter(run.metrics_path, begin_attempt(run).number, 2)
    for step in (3, 4):
        writer.write("rl", step, rollout(run.stage, step, 0))
    writer.write("rl_validation", 4, validation(run.stage, 4, "sums", Score(50), "complex"))
    writer.close()
    reading = gather(runs["report"])
    assert [r.steps for r in rl_tables.run_rows(reading)] == [4]
    assert [(r.after.step, r.after.num_correct) for r in rl_tables.score_rows(reading) if r.after] == [(4, 50)]
    attempts = [(a.attempt, a.from_step, a.standing_steps) for a in tables.attempt_rows(reading) if a.stage == "rl_long"]
    assert attempts == [(1, 0, 2), (2, 2, 2)]


def test_a_run_that_starts_like_another_is_told_apart_and_compared_with_its_own_kind(tmp_path, trained) -> None:
    courses: dict[RLStage, Course | None] = {
        rl(f"rl_{name}_{seed}", name, seed=seed): Course(curve(4, right))
        for seed in (1, 2)
        for name, right in (("base", 8), ("stable", 60))
    }
    runs = graph(tmp_path, trained, courses)
    reading = gather(runs["report"])
    looks = rl_looks.looks(reading)
    assert len({(look.colour, look.line) for look in looks.values()}) == len(courses)
    assert [look.label for look in looks.values()] == [s.name for s in courses]
    pairs = [(r.stage, r.against, r.differs_in) for r in comparison_rows(reading)]
    assert pairs == [("rl_stable_1", "rl_base_1", ()), ("rl_stable_2", "rl_base_2", ())]


def test_a_curve_has_the_colour_of_its_start_in_the_other_figures(three) -> None:
    runs, page, _ = three
    looks = rl_looks.looks(gather(runs["report"]))
    assert [look.label for look in looks.values()] == ["RL from base", "RL from stable", "RL from long"]
    for name, look in looks.items():
        assert f'background:{look.colour}"></span>{name}<' in page
        assert f'background:{look.colour}"></span>{name.removeprefix("rl_")}<' in page
    assert len({look.marker for look in looks.values()}) == 3


def test_the_graph_shows_rl_with_its_joint_its_steps_and_its_caps(three) -> None:
    runs, _, summary = three
    lines = node_lines(gather(runs["report"]))["rl_long"]
    caps = "cap 64 \N{RIGHTWARDS ARROW} 128, LR 1e-6"
    assert lines == ("rl_long", "RL \N{MIDDLE DOT} 8 rollout steps", caps, "weights only at 4.608k")
    assert [(r["mark"], r["stage"]) for r in summary["tree"]] == [
        ("", "base"), ("├─ ", "stable"), ("│  ├─ ", "long"), ("│  │  └─ ", "rl_long"), ("│  ├─ ", "short"), ("│  └─ ", "rl_stable"),
        ("└─ ", "rl_base"),
    ]  # fmt: skip
    assert rl_tables.caps_words(TruncationLengths(caps_tokens=(8, 16), share=0.1, steps=2)) == "8 \N{RIGHTWARDS ARROW} 16"
    assert summary["lead"].endswith("then reinforcement learning from 3 checkpoints (8 rollout steps each).")


def test_a_difference_joins_the_intervals_of_both() -> None:
    # Newcombe 1998 (independent proportions), method 10: 56/70 less 48/80 is 0.2, 0.0524 to 0.3339
    found = difference(wilson(56, 70), wilson(48, 80))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_every_name_of_rl_is_documented(three) -> None:
    runs, _, summary = three
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(\w+)`", text))
    kinds = [kind for kind in vars(rl_rows).values() if dataclasses.is_dataclass(kind)]
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert len(kinds) > 6
    assert (fields | summary.keys()) - documented == set()
    reading = gather(runs["report"])
    assert undocumented([*reading.rl[0].rl, *reading.rl[0].rl_validation]) == []
    assert undocumented([{"kind": "rl", "step": 1, "attempt": 1}])  # the check sees a missing name
