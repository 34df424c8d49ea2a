"""Every recipe builds and round-trips; the paper's numbers, written here a second time as literals, are in them."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest

from megatron_ext.config.base import from_json, to_json
from megatron_ext.config.stages import Branch, RLStage, Scratch, TokenizeStage, TrainStage, Weights
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.load import ready_functions

RECIPE_FILES = ("octothinker", "ablations", "demo")
EXPECTED = {
    "octothinker": ["llama_1b", "llama_3b", "llama_8b", "llama_3b_fp8", "llama_3b_released_rl", "rl_llama_3b", "rl_qwen_3b"],
    "ablations": ["web_quality", "qa_format", "instruction", "token_budget", "template", "lengths", "decay_qa", "decay_shape"],
    "demo": ["demo", "smoke", "control"],
}
NAMES = [f"{file}:{function}" for file, functions in EXPECTED.items() for function in functions]
STABLE_TABLE_2 = {
    "megamath_web_pro_max": 0.725,
    "dclm_baseline": 0.1,
    "megamath_text_code_block": 0.1,
    "megamath_qa": 0.05,
    "megamath_code": 0.0125,
    "megamath_translated_code": 0.0125,
}
SHARED_TABLE_5 = {"megamath_web_pro": 0.55, "dclm_baseline": 0.05, "instruction": 0.1}
DECAYS_TABLE_5 = {
    "decay_long": {**SHARED_TABLE_5, "openr1_math_220k": 0.15, "am_deepseek_distilled_40m": 0.15},
    "decay_short": {**SHARED_TABLE_5, "megamath_qa": 0.025, "openmathinstruct_2": 0.175, "numinamath_1_5": 0.1},
    "decay_hybrid": {**SHARED_TABLE_5, "openr1_math_220k": 0.1, "openmathinstruct_2": 0.1, "numinamath_1_5": 0.1},
}


def build(name: str) -> Graph:
    file, function = name.split(":")
    graph: Graph = getattr(importlib.import_module(f"recipes.{file}"), function)()
    return graph


def weights_of(stage: TrainStage) -> dict[str, float]:
    return {row.source: row.weight for row in stage.mixture.rows}


def trained(graph: Graph) -> list[TrainStage]:
    return [stage for stage in graph.stages if isinstance(stage, TrainStage)]


@pytest.mark.parametrize("file", RECIPE_FILES)
def test_a_recipe_file_offers_these_recipes(file):
    assert ready_functions(importlib.import_module(f"recipes.{file}")) == EXPECTED[file]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_round_trips_through_json(name):
    graph = build(name)
    text = json.dumps(to_json(graph))
    assert from_json(Graph, json.loads(text)) == graph
    assert json.dumps(to_json(from_json(Graph, json.loads(text)))) == text


@pytest.mark.parametrize("name", NAMES)
def test_every_source_of_a_mixture_is_in_the_corpus(name):
    graph = build(name)
    for stage in trained(graph):
        corpus: TokenizeStage = graph.stage(stage.corpus)
        assert set(stage.mixture.sources) <= {source.name for source in corpus.sources}
        assert corpus.bos == stage.documents.bos


@pytest.mark.parametrize(
    ("name", "rate", "layers", "hidden"),
    [("llama_1b", 5e-5, 16, 2048), ("llama_3b", 2e-5, 28, 3072), ("llama_8b", 1e-5, 32, 4096)],
)
def test_the_papers_numbers(name, rate, layers, hidden):
    graph = build(f"octothinker:{name}")
    stable = graph.stage("stable")
    assert graph.name == name.replace("llama", "octothinker")
    training = ["corpus", "llama", "stable", "decay_long", "decay_short", "decay_hybrid"]
    assert [s.name for s in graph.stages] == [*training, "rl_base", "rl_stable", "rl_long", "rl_short", "rl_hybrid", "report"]
    assert (stable.model.num_layers, stable.model.hidden_size) == (layers, hidden)
    assert stable.start == Weights(stage="llama")
    assert weights_of(stable) == STABLE_TABLE_2
    assert (stable.budget.steps, stable.budget.sequences_per_batch, stable.budget.sequence_length) == (50_000, 512, 8192)
    assert stable.budget.tokens == 209_715_200_000
    assert (stable.schedule.shape, stable.schedule.peak, stable.schedule.warmup_tokens) == ("constant", rate, 0)
    for decay_name, table in DECAYS_TABLE_5.items():
        decay = graph.stage(decay_name)
        assert decay.start == Branch(stage="stable", tokens=None)
        assert weights_of(decay) == table
        assert (decay.budget.steps, decay.budget.tokens) == (5_000, 20_971_520_000)
        assert (decay.schedule.shape, decay.schedule.peak, decay.schedule.warmup_tokens) == ("cosine", rate, 0)
        assert decay.schedule.floor == pytest.approx(rate / 10, rel=1e-12)
    for stage in trained(graph):
        assert (stage.optimizer.weight_decay, stage.optimizer.beta1, stage.optimizer.beta2) == (0.1, 0.9, 0.95)
        assert (stage.optimizer.epsilon, stage.optimizer.clip_norm, stage.precision) == (1e-8, 1.0, "bf16")


def differing_fields(one: TrainStage | RLStage, other: TrainStage | RLStage) -> set[str]:
    return {f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)}


@pytest.mark.parametrize("name", ["octothinker:llama_1b", "octothinker:llama_3b", "octothinker:llama_8b", "demo:demo", "demo:smoke"])
def test_the_branches_differ_in_name_and_mixture_alone(name):
    graph = build(name)
    long, short, hybrid = (graph.stage(f"decay_{branch}") for branch in ("long", "short", "hybrid"))
    for one, other in ((long, short), (long, hybrid), (short, hybrid)):
        assert differing_fields(one, other) == {"name", "mixture"}
    assert differing_fields(long, dataclasses.replace(short, seed=7)) == {"name", "mixture", "seed"}  # the check does see more


def shape_without(graph: Graph, outside: set[str]) -> tuple[list[tuple[str, str]], set[tuple[str, str, str]]]:
    kinds: list[tuple[str, str]] = [(s.name, s.kind) for s in graph.stages if s.name not in outside]
    edges = {(parent, child, role) for parent, child, role in graph.edges() if not {parent, child} & outside}
    return kinds, edges


@pytest.mark.parametrize("small", ["demo:demo", "demo:smoke"])
def test_the_demo_is_the_papers_graph(small):
    paper, demo = build("octothinker:llama_3b"), build(small)
    outside_demo = {"text", "tokenizer", "base"}
    assert shape_without(paper, {"llama"}) == shape_without(demo, outside_demo)
    assert paper.stage("stable").start == Weights(stage="llama")
    assert demo.stage("stable").start == Weights(stage="base")
    assert demo.stage("base").start == Scratch()
    assert weights_of(demo.stage("base")) == {"general_web": 1.0}
    other = dataclasses.replace(demo, stages=tuple(s for s in demo.stages if s.name not in ("rl_long", "report")))
    assert shape_without(other, outside_demo) != shape_without(paper, {"llama"})


def test_the_demos_mixtures_and_machine():
    graph = build("demo:demo")
    assert weights_of(graph.stage("stable")) == {"math_web": 0.7, "general_web": 0.1, "short_cot": 0.2}
    shared = {"math_web": 0.2, "general_web": 0.05, "instruction": 0.1}
    assert weights_of(graph.stage("decay_long")) == {**shared, "long_cot": 0.65}
    assert weights_of(graph.stage("decay_short")) == {**shared, "short_cot": 0.65}
    assert weights_of(graph.stage("decay_hybrid")) == {**shared, "long_cot": 0.3, "short_cot": 0.35}
    for stage in trained(graph):
        assert (stage.plan.device, stage.precision, stage.plan.nodes) == ("cpu", "fp32", 1)
        assert stage.model.vocab_size == graph.stage("tokenizer").vocab_size
    assert {s.name for s in graph.stage("corpus").sources} == {"math_web", "general_web", "short_cot", "long_cot", "instruction"}


@pytest.mark.parametrize("name", ["demo:demo", "demo:smoke"])
def test_the_demos_learning_differs_in_name_start_and_lengths_alone(name):
    graph = build(name)
    starts = {"base": "base", "stable": "stable", **{branch: f"decay_{branch}" for branch in ("long", "short", "hybrid")}}
    stages: list[RLStage] = [graph.stage(f"rl_{start}") for start in starts]
    assert [stage.start for stage in stages] == [Weights(stage=start) for start in starts.values()]
    for stage in stages:
        assert differing_fields(stages[2], stage) <= {"name", "start", "lengths"}
        assert (stage.text, stage.plan.device, stage.precision, stage.model) == ("text", "cpu", "fp32", graph.stage("stable").model)
    long, short = graph.stage("rl_long").lengths, graph.stage("rl_short").lengths
    assert len(long.caps) > len(short.caps) == 1
    assert all(row.after < stages[0].steps for row in long.caps)  # the rises come within the run
    assert {stage.validation.cap_tokens for stage in stages} == {long.largest_cap_tokens}


def test_the_control_keeps_the_peak_and_shares_the_demos_runs():
    demo, control = build("demo:demo"), build("demo:control")
    assert control.name == demo.name
    assert control.stages[: len(demo.stages) - 1] == demo.stages[:-1]
    for branch in ("long", "short", "hybrid"):
        decay, constant = control.stage(f"decay_{branch}"), control.stage(f"constant_{branch}")
        assert differing_fields(decay, constant) == {"name", "schedule"}
        assert (constant.schedule.shape, constant.schedule.peak) == ("constant", decay.schedule.peak)


def test_fp8_differs_in_precision_alone():
    bf16, fp8 = build("octothinker:llama_3b"), build("octothinker:llama_3b_fp8")
    assert fp8.name == "octothinker_3b_fp8"
    for stage in trained(fp8):
        assert differing_fields(bf16.stage(stage.name), stage) == {"precision"}


ARMS = {
    "finemath": {"finemath_4plus": 1.0},
    "web_pro": {"megamath_web_pro": 1.0},
    "web_pro_max": {"megamath_web_pro_max": 1.0},
    "short_cot": {"megamath_web_pro": 0.9, "megamath_qa": 0.1},
    "long_cot": {"megamath_web_pro": 0.9, "openr1_math_220k": 0.1},
    "short_cot_instruction": {"instruction": 0.01, "megamath_web_pro": 0.89, "megamath_qa": 0.1},
    "long_cot_instruction": {"instruction": 0.01, "megamath_web_pro": 0.89, "openr1_math_220k": 0.1},
}
EXPERIMENTS = {
    "web_quality": ["finemath", "web_pro", "web_pro_max"],
    "qa_format": ["web_pro", "short_cot", "long_cot"],
    "instruction": ["short_cot", "short_cot_instruction", "long_cot", "long_cot_instruction"],
}


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_ablation_arms(name):
    graph = build(f"ablations:{name}")
    assert graph.name == "ablations_3b"
    assert [s.name for s in trained(graph)] == EXPERIMENTS[name]
    for stage in trained(graph):
        assert weights_of(stage) == ARMS[stage.name]
        assert stage.model.name == "llama_3_2_3b"
        assert stage.start == Weights(stage="llama")
        assert (stage.budget.steps, stage.budget.tokens) == (4_768, 19_998_441_472)
        assert (stage.schedule.shape, stage.schedule.peak, stage.schedule.warmup_tokens) == ("cosine", 3e-5, 0)
        assert stage.schedule.floor == pytest.approx(3e-6, rel=1e-12)
        assert differing_fields(trained(graph)[0], stage) <= {"name", "mixture"}


def test_ablations_share_what_two_of_them_name():
    graphs = [build(f"ablations:{name}") for name in EXPERIMENTS]
    by_name: dict[str, set[str]] = {}
    for graph in graphs:
        for stage in graph.stages:
            by_name.setdefault(stage.name, set()).add(json.dumps(to_json(stage)))
    assert {name for name, texts in by_name.items() if len(texts) > 1} == set()
    pilots, paper = build("ablations:decay_qa"), build("octothinker:llama_3b")
    assert pilots.name == paper.name
    assert pilots.stages[:3] == paper.stages[:3]


def test_the_token_budget_run():
    (stage,) = trained(build("ablations:token_budget"))
    assert weights_of(stage) == {"megamath_web_pro_max": 1.0}
    assert (stage.budget.steps, stage.budget.tokens) == (23_842, 100_000_595_968)
    assert stage.plan.pin_every_tokens == 10_000_000_000


def test_decay_pilots_start_at_130b_and_hold_10b():
    pilots = {s.name: s for s in trained(build("ablations:decay_qa")) if s.name != "stable"}
    assert len(pilots) == 15
    for stage in pilots.values():
        assert stage.start == Branch(stage="stable", tokens=129_998_258_176)  # 30,994 steps
        assert (stage.budget.steps, stage.budget.tokens) == (2_384, 9_999_220_736)
        assert (stage.schedule.shape, stage.schedule.peak) == ("cosine", 2e-5)
    for short, source in {"megamath_qa": "megamath_qa", "openr1": "openr1_math_220k", "omi2": "openmathinstruct_2"}.items():
        for share, web in ((0.1, 0.75), (0.2, 0.65), (0.3, 0.55), (0.4, 0.45)):
            expected = {"megamath_web_pro": web, "dclm_baseline": 0.05, "instruction": 0.1, source: share}
            assert weights_of(pilots[f"pilot_{short}_{share * 100:.0f}"]) == expected
    for ratio, r1, omi in (("1_2", 0.1, 0.2), ("1_1", 0.15, 0.15), ("2_1", 0.2, 0.1)):
        held = weights_of(pilots[f"pilot_openr1_omi2_{ratio}"])
        assert (held["openr1_math_220k"], held["openmathinstruct_2"], held["megamath_web_pro"]) == (r1, omi, 0.55)


def test_both_decay_shapes():
    graph = build("ablations:decay_shape")
    for branch in ("long", "short", "hybrid"):
        cosine, constant = graph.stage(f"decay_{branch}"), graph.stage(f"constant_{branch}")
        assert (cosine.schedule.shape, cosine.schedule.peak) == ("cosine", 2e-5)
        assert constant.schedule.shape == "constant"
        assert constant.schedule.peak == pytest.approx(2e-6, rel=1e-12)
        assert differing_fields(cosine, constant) == {"name", "schedule"}
