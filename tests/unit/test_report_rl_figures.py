"""The figures of reinforcement learning: which caps they draw, how curves that coincide are told apart, what empty panels say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from megatron_ext.config.stages import RLStage
from megatron_ext.reports import rl_axes, rl_captions, rl_health_figure
from megatron_ext.reports.coinciding import Stretch, alike, marked, stretches
from megatron_ext.reports.lead import descent, lead
from megatron_ext.reports.read import Reading, gather
from megatron_ext.reports.rl_caps import caps_differ, draw_rollout_caps, draw_validation_caps
from megatron_ext.reports.rl_figures import coinciding
from megatron_ext.reports.rl_lines import draw_intervals, draw_validations
from megatron_ext.reports.rl_looks import looks
from megatron_ext.reports.rl_tables import curve_rows, run_rows
from megatron_ext.reports.rl_verdict import verdict
from megatron_ext.reports.style import MUTED, say_absent
from megatron_ext.runs import Run
from tests.rl_report_runs import Course, curve, graph, rl
from tests.unit.test_reports import build

ARROW = "\N{RIGHTWARDS ARROW}"
RISING = ((0, 64), (4, 128))
MOST_LETTERS = 8 * 80  # of the page's opening: eight lines, as a browser sets them at full width
IDLE = {"informative_share": 0.0, "grad_norm": 0.0, "grad_norm_max": 0.0, "approx_entropy": None, "token_mult_prob_error": None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Run]:
    """What all of this RL starts from."""
    return build(tmp_path_factory.mktemp("trained"))


def reading_of(root: Path, trained: dict[str, Run], courses: dict[RLStage, Course | None]) -> Reading:
    return gather(graph(root, trained, courses)["report"])


def heights(reading: Reading, draw_caps: Callable[..., None]) -> set[float]:
    axes = Figure().subplots()
    draw_caps(axes, list(reading.rl), {name: look.colour for name, look in looks(reading).items()})
    return {float(y) for line in axes.lines for y in np.asarray(line.get_ydata())}


@pytest.mark.parametrize(("fixed", "validated", "differ"), [(160, {160.0}, True), (None, {64.0, 128.0}, False)])
def test_the_cap_that_the_drawn_validations_ran_under_is_drawn(fixed, validated, differ, tmp_path, trained) -> None:
    courses: dict[RLStage, Course | None] = {
        rl(f"rl_{name}", name, caps=RISING, validation_cap=fixed): Course(curve(4, 6, 8)) for name in ("base", "long")
    }
    reading = reading_of(tmp_path, trained, courses)
    assert heights(reading, draw_validation_caps) == validated
    assert heights(reading, draw_rollout_caps) == {64.0, 128.0}
    assert [caps_differ(stage) for stage in reading.rl] == [differ] * 2
    rollouts = f"64 {ARROW} 128 (after 4) tokens in every run; dotted verticals mark its changes."
    fixed_words = "Dash-dotted: the length cap that these validations ran under, 160 tokens in every run."
    own = f"{fixed_words} Dashed: the cap of the rollouts, {rollouts}"
    words = rl_captions.caps_caption(reading, run_rows(reading)).replace(rl_captions.NO_BREAK, " ")
    assert words == (own if differ else f"Dashed: the length cap, {rollouts}")


def test_a_cap_alone_of_its_kind_is_in_the_colour_of_its_run_and_a_shared_one_is_grey(tmp_path, trained) -> None:
    caps = {"base": 160, "stable": 160, "long": 320}
    courses: dict[RLStage, Course | None] = {rl(f"rl_{n}", n, validation_cap=cap): Course(curve(4)) for n, cap in caps.items()}
    reading = reading_of(tmp_path, trained, courses)
    axes = Figure().subplots()
    draw_validation_caps(axes, list(reading.rl), {stage.name: stage.name for stage in reading.rl} | {"rl_long": "#123456"})
    assert [(line.get_color(), set(np.asarray(line.get_ydata()))) for line in axes.lines] == [(MUTED, {160.0}), ("#123456", {320.0})]


def points(*values: float) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(values), dtype=np.float64), np.array(values, dtype=np.float64)


def test_curves_that_coincide_take_turns_and_those_that_do_not_run_alone() -> None:
    nan = float("nan")
    curves = {"a": points(0, 1, 1, 1), "b": points(0, 1, 1, 2), "c": points(5, 1, 1, 2), "d": points(nan, nan, nan, nan)}
    found = stretches(curves)
    assert found["a"] == [Stretch(0, 1, ("a", "b")), Stretch(1, 2, ("a", "b", "c")), Stretch(2, 3, ("a",))]
    assert found["c"] == [Stretch(0, 1, ("c",)), Stretch(1, 2, ("a", "b", "c")), Stretch(2, 3, ("b", "c"))]
    assert stretches({"alone": points(1)}) == {"alone": []}
    assert marked({"a": points(0, 0, 0), "b": points(0, 0, 0), "c": points(1, 0, 1)}, 1) == {"a": [0, 2], "b": [1], "c": [0, 2]}
    assert alike(curves) == []
    assert alike({**curves, "e": curves["a"], "f": curves["d"]}) == [("a", "e")]  # what was never measured coincides with nothing


def seen(draw_panel: Callable[[Axes], object]) -> set[tuple[int, ...]]:
    """Every colour in a panel once it is drawn."""
    figure = Figure((4, 2), dpi=100)
    canvas = FigureCanvasAgg(figure)
    draw_panel(figure.subplots())
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].reshape(-1, 3)
    return {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}


def test_five_equal_curves_are_all_seen_and_their_intervals_are_one_band(tmp_path, trained) -> None:
    names = ("base", "stable", "long", "short")
    courses: dict[RLStage, Course | None] = {rl(f"rl_{name}", name): Course(curve(0, 0, 0)) for name in names}
    reading = reading_of(tmp_path, trained, courses)
    of_run, rows = looks(reading), curve_rows(reading)
    curves = {row.stage: points(*(p.accuracy for p in row.points)) for row in rows}
    wanted = {tuple(round(255 * part) for part in to_rgba(look.colour)[:3]) for look in of_run.values()}
    assert len(wanted) == len(names)

    assert wanted <= seen(lambda axes: draw_validations(axes, curves, of_run))
    # The deliberate fault: drawn over one another, only the last is seen.
    assert not wanted <= seen(lambda axes: [axes.plot(*curves[name], color=look.colour) for name, look in of_run.items()])
    axes = Figure().subplots()
    draw_intervals(axes, {row.stage: row.points for row in rows}, of_run)
    assert len(axes.collections) == 1
    assert coinciding(reading, rows) == "base, stable, long and short (accuracy on sums and length on sums)"


def panels(reading: Reading) -> dict[str, str]:
    """The words in the panels of the second figure."""
    stages = list(reading.rl)
    return {
        key: rl_health_figure.absent_words({s.name: rl_health_figure.series(s, key) for s in stages}, key, stages)
        for key in rl_health_figure.TITLES
    }


def test_panels_without_data_say_why(tmp_path, trained) -> None:
    stage = rl("rl_long", "long")

    def said(name: str, **record: Any) -> dict[str, str]:
        found = panels(reading_of(tmp_path / name, trained, {stage: Course(curve(0, 0), step=lambda _: record)}))
        return {key: words for key, words in found.items() if words}

    why = "not recorded:\nno update had a gradient"
    assert said("calm") == {}
    assert said("unlearnt", grad_norm_max=0.0) == {}  # tokens were trained on, with advantages of zero
    assert said("idle", **IDLE) == {"approx_entropy": why, "token_mult_prob_error": why}
    assert said("other", approx_entropy=None) == {"approx_entropy": "not recorded"}
    assert said("equal", token_mult_prob_error=1.0) == {"token_mult_prob_error": "no difference above 1e-8"}
    axes = Figure().subplots()
    say_absent(axes, why)
    assert ([text.get_text() for text in axes.texts], list(axes.get_yticks())) == ([why], [])


def test_a_run_without_a_gradient_beside_one_with_is_named(tmp_path, trained) -> None:
    courses: dict[RLStage, Course | None] = {
        rl("rl_base", "base"): Course(curve(0, 0, 0), step=lambda _: IDLE),
        rl("rl_long", "long"): Course(curve(4, 6, 90)),
    }
    words = rl_captions.gradient_caption(reading_of(tmp_path, trained, courses))
    assert words == " No update from base had a gradient, so there is no entropy and no such comparison."


def test_where_nothing_was_learnt_one_sentence_says_so(tmp_path, trained) -> None:
    idle = Course(curve(0, 0, 0), step=lambda _: IDLE)
    courses: dict[RLStage, Course | None] = {rl("rl_base", "base"): idle, rl("rl_long", "long"): idle}
    assert verdict(reading_of(tmp_path / "none", trained, courses)) == [
        "No run of reinforcement learning learnt anything: in every group all rewards were equal, so this page cannot say whether "
        "mid-training mattered."
    ]
    courses[rl("rl_stable", "stable")] = Course(curve(0, 0, 0))  # one that has unequal rewards
    assert "does not show what the paper shows" in verdict(reading_of(tmp_path / "one", trained, courses))[0]


def test_the_page_opens_with_eight_lines_at_most(tmp_path, trained) -> None:
    few = reading_of(tmp_path / "few", trained, {rl(f"rl_{n}", n): Course(curve(4, 20, 90)) for n in ("base", "stable", "long", "short")})
    seeds = {rl(f"rl_{n}_{seed}", n, seed=seed): Course(curve(4, 20, 90)) for seed in range(4) for n in ("base", "stable", "long")}
    many = reading_of(tmp_path / "many", trained, dict(seeds))
    for reading in (few, many):
        assert len(" ".join([lead(reading), *verdict(reading)])) < MOST_LETTERS
    assert f"2.0 to 2.0 {ARROW} 45.0 to 45.0 % in 12 runs" in verdict(many)[0]
    assert "long and short (branching from stable, 1.024k tokens each)." in descent(few)


def test_axes_have_ticks_that_people_would_write() -> None:
    assert [rl_axes.length(v) for v in (64, 300, 1024, 1536, 2048, 1500, 12_500)] == ["64", "300", "1k", "1.5k", "2k", "1500", "12.5k"]
    axes = Figure().subplots()
    axes.plot([1, 2], [-1.0, -1.0])
    rl_axes.level_axis(axes, rl_health_figure.LEAST_LEVEL)
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(0.2)
    axes = Figure().subplots()
    axes.plot([1, 2], [24.0, 25.0])
    rl_axes.length_axis(axes)
    low, high = axes.get_ylim()
    assert high / low == pytest.approx(2.0)
    assert 24.0 in [tick for tick in axes.get_yticks() if low <= tick <= high]
