"""Graphs: names, edges, starts, and overrides that are checked as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ext.config.base import from_json, to_json
from megatron_ext.config.memory import pinned_steps
from megatron_ext.config.stages import Branch, ConvertStage, Scratch, TrainStage, Weights
from megatron_ext.errors import ConfigError
from megatron_ext.launch.graph import Graph, with_joints, with_overrides
from recipes import demo
from tests.small_graphs import training_alone

SMOKE = training_alone(demo.smoke())


def swap(stage_name: str, **values: object) -> Graph:
    """The smoke graph with one stage changed."""
    stages = tuple(replace(stage, **values) if stage.name == stage_name else stage for stage in SMOKE.stages)
    return replace(SMOKE, stages=stages)


def test_edges_are_spelt_out_by_the_stages_fields() -> None:
    edges = SMOKE.edges()
    assert ("text", "tokenizer", "text") in edges
    assert ("tokenizer", "corpus", "tokenizer") in edges
    assert ("base", "stable", "start") in edges
    assert [(parent, role) for parent, child, role in edges if child == "decay_long"] == [("stable", "start"), ("corpus", "corpus")]
    assert [parent for parent, child, _ in edges if child == "report"] == ["base", "stable", "decay_long", "decay_short", "decay_hybrid"]


def test_a_graph_comes_back_from_json_unchanged() -> None:
    assert from_json(Graph, to_json(SMOKE)) == SMOKE


def test_a_stage_is_found_by_name_and_a_wrong_name_tells_the_nearest() -> None:
    assert SMOKE.stage("stable").start == Weights(stage="base")
    with pytest.raises(ConfigError, match="no stage 'stabel'; did you mean 'stable'"):
        SMOKE.stage("stabel")


def test_two_stages_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two stages are named 'decay_short'"):
        swap("decay_long", name="decay_short")


def test_a_stage_that_reads_a_later_or_unknown_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'decay_long' reads 'stabel' as its start.*did you mean 'stable'"):
        swap("decay_long", start=Branch(stage="stabel"))
    with pytest.raises(ConfigError, match="'base' reads 'stable' as its start, but no earlier stage"):
        swap("base", start=Weights(stage="stable"))


def test_a_start_must_be_a_stage_with_checkpoints() -> None:
    with pytest.raises(ConfigError, match="starts from 'corpus', a tokenize stage, which has no checkpoints"):
        swap("decay_long", start=Branch(stage="corpus"))


def test_a_start_must_hold_the_same_model() -> None:
    wider = replace(SMOKE.stage("decay_long").model, ffn_hidden_size=256, name="wider")
    with pytest.raises(ConfigError, match=r"holds model wider, but its start 'stable' holds .*they differ"):
        swap("decay_long", model=wider)


def test_a_start_in_tokens_must_be_a_step_of_its_parent() -> None:
    assert swap("decay_long", start=Branch(stage="stable", tokens=6 * 512)).stage("decay_long").start.tokens == 3072
    with pytest.raises(
        ConfigError, match="1,000 tokens is no step of this stage: steps are 512 tokens, up to 6,144; the nearest below is 512"
    ):
        swap("decay_long", start=Branch(stage="stable", tokens=1000))


def test_a_start_before_the_first_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens=0 of 'stable', where nothing is saved; start where 'stable' itself starts"):
        swap("decay_long", start=Branch(stage="stable", tokens=0))


def test_every_point_that_a_stage_starts_from_is_pinned() -> None:
    """Two children at one point, one at another, one at the last: which is always pinned."""
    long = SMOKE.stage("decay_long")
    children = [replace(long, name=f"child_{i}", start=Branch(stage="stable", tokens=tokens)) for i, tokens in enumerate((2048, 512, 2048))]
    weights = replace(long, name="weights", start=Weights(stage="child_0", tokens=1024))
    graph = with_joints(Graph(name="g", stages=(*SMOKE.stages[:-1], *children, weights)))
    pins = {stage.name: stage.plan.pin_tokens for stage in graph.stages if isinstance(stage, TrainStage) and stage.plan.pin_tokens}
    assert pins == {"stable": (512, 2048), "child_0": (1024,)}
    assert pinned_steps(graph.stage("stable").budget, graph.stage("stable").plan) == (1, 4, 12)
    assert with_joints(graph) == graph
    assert with_joints(SMOKE) is SMOKE


def test_overrides_move_the_pins_with_the_joints_and_keep_those_asked_for() -> None:
    moved = with_overrides(SMOKE, ["decay_long.start.tokens=1024", "stable.plan.pin_tokens=[512]"])
    assert moved.stage("stable").plan.pin_tokens == (512, 1024)
    assert with_overrides(SMOKE, ["decay_long.start.tokens=2048"]).stage("stable").plan.pin_tokens == (2048,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[0]", r"pin_tokens is \[0\], but nothing is saved before step 1"),
        ("[-512]", r"pin_tokens is \[-512\]"),
        ("[1000]", "stage stable: plan.pin_tokens: 1,000 tokens is no step of this stage.*the nearest below is 512"),
        ("[6656]", "stage stable: plan.pin_tokens: 6,656 tokens is no step of this stage.*up to 6,144"),
    ],
)
def test_a_pin_must_be_a_step_of_the_stage(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_overrides(SMOKE, [f"stable.plan.pin_tokens={value}"])


def test_a_converted_model_starts_weights_only_and_has_no_points() -> None:
    model = SMOKE.stage("base").model
    hub = ConvertStage(name="llama", model_id="meta-llama/Llama-3.2-1B", model=model)

    def from_hub(start: object) -> Graph:
        stable: TrainStage = replace(SMOKE.stage("stable"), start=start)
        return Graph(name="x", stages=(*SMOKE.stages[:3], hub, stable))

    assert from_hub(Weights(stage="llama")).edges()[-2] == ("llama", "stable", "start")
    with pytest.raises(ConfigError, match="a converted model without optimizer state; start it with Weights"):
        from_hub(Branch(stage="llama"))
    with pytest.raises(ConfigError, match="tokens=512 of 'llama', a converted model; leave tokens out"):
        from_hub(Weights(stage="llama", tokens=512))


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    changed = with_overrides(SMOKE, ["stable.budget.steps=24", "decay_long.schedule.peak=1e-4", "corpus.sources.math_web.max_epochs=8.0"])
    assert changed.stage("stable").budget.steps == 24
    assert changed.stage("decay_long").schedule.peak == 1e-4
    assert [source.max_epochs for source in changed.stage("corpus").sources] == [8.0, 4.0, 4.0, 4.0, 4.0]
    assert changed.stage("decay_short") == SMOKE.stage("decay_short")
    assert with_overrides(SMOKE, []) is SMOKE


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stabel.budget.steps=1", "did you mean 'stable'"),
        ("stable.budget.step=1", "has no key 'step'; did you mean 'steps'"),
        ("stable.budget.steps=many", "valid integer.*but got 'many'"),
        ("stable.budget.steps=2.5", "but got 2.5"),
        ("stable.budget.steps", "write it as key.key=value"),
        ("stable.budget.steps.x=1", "is a plain value \\(12\\) and has no keys"),
        ("stable.plan.tensor=3", "tensor"),
        ("stable.model.ffn_hidden_size=512", "they differ"),
    ],
)
def test_a_wrong_override_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_overrides(SMOKE, [assignment])


def test_scratch_has_no_edge() -> None:
    assert SMOKE.stage("base").start == Scratch()
    assert [parent for parent, child, _ in SMOKE.edges() if child == "base"] == ["corpus"]
