"""Configs and overrides: unknown keys name the nearest, ill-typed values name themselves, JSON goes both ways."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.base import canonical, config, content_hash, from_json, nearest, override, to_json
from megatron_ext.config.budget import Budget
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Documents, Scratch, Source, TrainStage, Weights, science
from megatron_ext.errors import ConfigError
from megatron_ext.launch.graph import Graph, with_overrides
from recipes import demo, octothinker


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key 'sequence_lenght' of Budget; did you mean 'sequence_length'\?"):
        Budget(steps=1, sequences_per_batch=1, sequence_lenght=8)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="this key is required and has no default"):
        Budget(steps=1, sequences_per_batch=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", ["2", 2.5, None, True])
def test_an_ill_typed_value_names_key_value_and_type(value):
    with pytest.raises(ConfigError) as caught:
        TrainPlan(tensor=value)
    assert "tensor" in str(caught.value)
    given = "null" if value is None else f"{value!r} ({type(value).__name__})"
    assert f"but got {given}" in str(caught.value)


def test_a_word_outside_its_choices_is_refused():
    with pytest.raises(ConfigError, match=r"shape: .*'constant', 'cosine', 'linear' or 'minus_sqrt'.*but got 'cosin'"):
        Schedule(shape="cosin", peak=1.0)  # type: ignore[arg-type]


def test_configs_are_frozen_and_take_names_only():
    budget = Budget(steps=1, sequences_per_batch=2, sequence_length=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.steps = 2  # type: ignore[misc]
    with pytest.raises(ConfigError, match="Budget takes its fields by name"):
        Budget(1, 2, 3)  # type: ignore[misc]


def test_a_derivation_is_checked_again():
    budget = Budget(steps=1, sequences_per_batch=2, sequence_length=3)
    assert dataclasses.replace(budget, steps=5).tokens == 30
    with pytest.raises(ConfigError, match="steps is 0"):
        dataclasses.replace(budget, steps=0)


def test_restarted_positions_need_attention_within_documents():
    assert Documents(positions="restart", attention="within").eod_loss
    with pytest.raises(ConfigError, match="positions='restart' with attention='across'"):
        Documents(positions="restart")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"paths": ()}, "source s: paths is empty"),
        ({"paths": ("a",), "heldout_fraction": 1.0}, r"heldout_fraction is 1.0, must lie in \[0, 1\)"),
        ({"paths": ("a",), "max_epochs": 0.0}, "max_epochs is 0.0, must be positive"),
    ],
)
def test_sources_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        Source(**{"name": "s", "max_epochs": 1.0, **values})


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stabel.plan.tensor=2", "no stage is named 'stabel'; did you mean 'stable'"),
        ("stable.plan.tensr=2", "override 'stable.plan.tensr=2': 'stable.plan' has no key 'tensr'; did you mean 'tensor'"),
        ("stable.plan.tensor", "write it as key.key=value"),
        ("=3", "no stage is named ''"),
        ("steps=3", r"override 'steps=3': begin with a stage's name, as in rl_base\.steps=3"),
        ("plan.tensor=2", r"begin with a stage's name, as in stable\.plan\.tensor=2"),
        ("rl_long.rollouts.prompts_per_step=5", "^after the overrides rl_long.rollouts.prompts_per_step=5: rl_long: rollouts: 5 prompts"),
        ("rl_long.rollouts=null", "rl_long: rollouts: Input should be an object, but got null$"),
        ("rl_long.steps=0.5", "=0.5: rl_long: steps: .*but got 0.5"),
        ("stable.plan.tensor=two", "tensor: .*but got 'two'"),
        ("stable.plan.tensor=2.0", r"tensor: .*but got 2\.0"),
        ("stable.plan.tensor=3", "tensor 3 x pipeline 1"),
        ("stable.budget.steps.more=1", "'stable.budget.steps' is a plain value .50000. and has no keys"),
        ("stable.start.stage=corpus", "starts from 'corpus', a tokenize stage, which has no checkpoints"),
        ("decay_long.start.tokens=100", "100 tokens is no step of this stage"),
        ("stable.precision=int8", "precision: .*but got 'int8'"),
    ],
)
def test_an_override_that_cannot_be(assignment, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(octothinker.llama_3b(), [assignment])


def test_overrides_change_what_they_name_and_nothing_else():
    graph = octothinker.llama_3b()
    new = with_overrides(graph, ["stable.plan.tensor=2", "decay_long.schedule.peak=1e-5", "stable.plan.sequence_parallel=true"])
    assert new.stage("stable").plan == dataclasses.replace(graph.stage("stable").plan, tensor=2, sequence_parallel=True)
    assert new.stage("decay_long").schedule.peak == 1e-5
    assert [s.name for s in graph.stages if s != new.stage(s.name)] == ["stable", "decay_long"]
    assert with_overrides(graph, []) is graph


def test_rows_of_a_mixture_are_named_by_their_source():
    changes = ["decay_long.mixture.rows.instruction.weight=0.05", "decay_long.mixture.rows.dclm_baseline.weight=0.10"]
    weights = {row.source: row.weight for row in with_overrides(octothinker.llama_3b(), changes).stage("decay_long").mixture.rows}
    assert (weights["instruction"], weights["dclm_baseline"]) == (0.05, 0.10)
    with pytest.raises(ConfigError, match=r"0.55 \+ 0.05 \+ 0.05 \+ 0.15 \+ 0.15 = 0.95"):
        with_overrides(octothinker.llama_3b(), changes[:1])


def test_a_start_can_be_exchanged_whole():
    graph = with_overrides(octothinker.llama_3b(), ['decay_long.start={"kind":"weights","stage":"stable"}'])
    assert graph.stage("decay_long").start == Weights(stage="stable")


def test_plans_are_no_science():
    graph = octothinker.llama_3b()
    elsewhere = with_overrides(graph, ["stable.plan.nodes=16", "stable.plan.save_every_steps=7"])
    hotter = with_overrides(graph, ["stable.schedule.peak=3e-5"])
    hashes = [content_hash(science(g.stage("stable"))) for g in (graph, elsewhere, hotter)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_override_of_a_single_config():
    plan = override(TrainPlan(), ["micro_batch=4", "device=cpu"])
    assert (plan.micro_batch, plan.device) == (4, "cpu")


def test_json_of_a_run_says_where_it_is_wrong():
    values = to_json(demo.smoke())
    values["stages"][4]["budget"]["step"] = 3
    with pytest.raises(ConfigError, match=r"recipe.json: .*unknown key 'step' of Budget; did you mean 'steps'"):
        from_json(Graph, values, "recipe.json")


@given(
    steps=st.integers(1, 10**9),
    peak=st.floats(1e-12, 1e3, allow_nan=False),
    micro_batch=st.integers(1, 64),
    seed=st.integers(0, 2**62),
    start=st.sampled_from([Scratch(), Weights(stage="base"), Weights(stage="base", tokens=64)]),
)
def test_any_stage_goes_to_json_and_back(steps, peak, micro_batch, seed, start):
    model = demo.smoke().stage("stable").model
    stage = TrainStage(
        name="any",
        start=start,
        corpus="corpus",
        model=model,
        mixture=demo.STABLE,
        budget=Budget(steps=steps, sequences_per_batch=micro_batch, sequence_length=64),
        schedule=Schedule(shape="cosine", peak=peak),
        precision="fp32",
        seed=seed,
        plan=TrainPlan(device="cpu", micro_batch=micro_batch),
    )
    text = json.dumps(to_json(stage))
    back = from_json(TrainStage, json.loads(text))
    assert back == stage
    assert content_hash(science(back)) == content_hash(science(stage))


def test_canonical_json_ignores_the_order_of_keys():
    assert canonical({"b": 1, "a": [1.5, None]}) == canonical({"a": [1.5, None], "b": 1}) == '{"a":[1.5,null],"b":1}'
    assert content_hash({"a": 1}) != content_hash({"a": 1.0})


def test_nearest_names_all_where_none_is_near():
    assert nearest("stabel", ["stable", "decay"]) == "; did you mean 'stable'?"
    assert nearest("zzz", ["stable", "decay"]) == "; known: decay, stable"
    assert nearest("zzz", []) == ""


def test_a_rule_of_our_own_keeps_its_message():
    @config
    class Even:
        number: int

        def __post_init__(self) -> None:
            if self.number % 2:
                raise ConfigError(f"number is {self.number}, must be even")

    assert Even(number=2).number == 2
    with pytest.raises(ConfigError, match=r"^number is 3, must be even$"):
        Even(number=3)
