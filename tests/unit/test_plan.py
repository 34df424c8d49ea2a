"""What a plan says, against the paper's numbers; what it refuses; that it needs no torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.base import from_json
from megatron_ext.config.stages import Branch, TrainStage
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.launch.graph import Graph, with_overrides
from megatron_ext.launch.plan import convert_rows, graph_lines, plan_json, plan_rows, plan_text, resolved
from megatron_ext.launch.plan_words import convert_lines, count, size
from recipes import ablations, clusters, demo, octothinker


def rows_of(graph: Graph, cluster: Any = None) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in plan_rows(graph, cluster)}


def changed(graph: Graph, stage: str, **changes: Any) -> Graph:
    return dataclasses.replace(graph, stages=tuple(dataclasses.replace(s, **changes) if s.name == stage else s for s in graph.stages))


def test_tokens_steps_and_lineage_of_the_paper():
    rows = rows_of(octothinker.llama_3b())
    assert list(rows) == ["stable", "decay_long", "decay_short", "decay_hybrid"]
    assert (rows["stable"]["tokens"], rows["stable"]["steps"]) == (209_715_200_000, 50_000)
    assert rows["stable"]["lineage_tokens"] == 209_715_200_000  # Llama's own tokens are not counted
    for name in ("decay_long", "decay_short", "decay_hybrid"):
        assert (rows[name]["tokens"], rows[name]["steps"]) == (20_971_520_000, 5_000)
        assert rows[name]["lineage_tokens"] == 230_686_720_000


@pytest.mark.parametrize(("recipe", "rate"), [(octothinker.llama_1b, 5e-5), (octothinker.llama_3b, 2e-5), (octothinker.llama_8b, 1e-5)])
def test_the_joint_is_level_and_at_the_peak(recipe, rate):
    rows = rows_of(recipe())
    assert (rows["stable"]["first_learning_rate"], rows["stable"]["last_learning_rate"]) == (rate, rate)
    assert rows["stable"]["joint"] is None
    for name in ("decay_long", "decay_short", "decay_hybrid"):
        assert rows[name]["joint"] == {"parent_step": 50_000, "before": rate, "after": rate, "peak": rate}
        assert rows[name]["last_learning_rate"] == pytest.approx(rate / 10, rel=1e-5)


def test_a_joint_that_is_not_level_shows():
    rows = rows_of(ablations.decay_shape())
    assert rows["decay_long"]["joint"]["after"] == 2e-5
    assert rows["constant_long"]["joint"] == {
        "parent_step": 50_000,
        "before": 2e-5,
        "after": pytest.approx(2e-6),
        "peak": pytest.approx(2e-6),
    }
    assert "rate before the joint 2e-05, at the first step 2e-06 (x 0.1; the peak)" in plan_text(ablations.decay_shape())


def test_epochs_of_the_paper():
    rows = rows_of(octothinker.llama_3b())
    stable = {s["source"]: s for s in rows["stable"]["sources"]}
    assert stable["megamath_web_pro_max"]["tokens"] == 152_043_520_000
    assert stable["megamath_web_pro_max"]["epochs"] == pytest.approx(152.04 / (73.8 * 0.998), rel=1e-4)
    assert stable["megamath_qa"]["epochs"] == pytest.approx(10.486 / (7.0 * 0.998), rel=1e-4)
    assert (stable["dclm_baseline"]["epochs"], stable["dclm_baseline"]["available_tokens"]) == (None, None)
    long = {s["source"]: s for s in rows["decay_long"]["sources"]}
    assert long["instruction"]["epochs"] == pytest.approx(2.0972 / (0.8 * 0.998), rel=1e-4)
    assert long["dclm_baseline"]["already_tokens"] == 20_971_520_000


def test_a_branch_goes_on_counting_and_weights_begin_anew():
    graph = octothinker.llama_3b()
    short = {s["source"]: s for s in rows_of(graph)["decay_short"]["sources"]}["megamath_qa"]
    assert (short["already_tokens"], short["tokens"]) == (10_485_760_000, 524_288_000)
    assert short["epochs"] == pytest.approx(11.010048 / (7.0 * 0.998), rel=1e-6)
    pilots = {s["source"]: s for s in rows_of(ablations.decay_qa())["pilot_megamath_qa_40"]["sources"]}["megamath_qa"]
    assert pilots["already_tokens"] == round(0.05 * 129_998_258_176)
    by_weights = rows_of(demo.demo())["stable"]["sources"]
    assert {s["source"]: s["already_tokens"] for s in by_weights}["general_web"] == 0  # base drew all of its tokens from it


def test_excess_over_the_lineage_is_refused():
    graph = octothinker.llama_3b()
    corpus = graph.stage("corpus")
    once = tuple(dataclasses.replace(s, max_epochs=1.55) if s.name == "megamath_qa" else s for s in corpus.sources)
    with pytest.raises(DataError) as caught:
        plan_rows(changed(graph, "corpus", sources=once))
    assert str(caught.value).startswith("stage decay_short: mixture: source 'megamath_qa' would be repeated 1.576 times")
    assert "(10,485,760,000 already drawn + 0.025 x 20,971,520,000 = 524,288,000) / 6,986,000,000 tokens" in str(caught.value)


def test_a_source_outside_the_corpus_is_refused():
    graph = octothinker.llama_3b()
    corpus = graph.stage("corpus")
    without = tuple(s for s in corpus.sources if s.name != "instruction")
    with pytest.raises(DataError, match="stage decay_long: mixture: no source 'instruction' in the corpus"):
        plan_rows(changed(graph, "corpus", sources=without))


def test_gpu_hours_by_hand():
    stable = rows_of(octothinker.llama_3b(), clusters.h100())["stable"]
    flops = 209_715_200_000 * (6 * (3_212_749_824 - 57 * 3072) + 6 * 28 * 3072 * 8192)
    assert stable["compute"]["flops"] == flops
    assert stable["compute"]["gpu_hours"] == pytest.approx(flops / (989e12 * 0.40) / 3600, rel=1e-12)
    assert stable["compute"]["gpu_hours"] == pytest.approx(3461, abs=1)
    assert stable["compute"]["wall_seconds"] == pytest.approx(stable["compute"]["gpu_hours"] * 3600 / 64, rel=1e-12)
    in_fp8 = rows_of(octothinker.llama_3b_fp8(), clusters.h100())["stable"]["compute"]
    assert in_fp8["gpu_hours"] == pytest.approx(stable["compute"]["gpu_hours"] * 989 / 1979, rel=1e-12)


def test_without_a_cluster_there_are_no_gpu_hours():
    rows = rows_of(octothinker.llama_3b())
    assert (rows["stable"]["compute"]["gpu_hours"], rows["stable"]["memory"]["fits"]) == (None, None)
    assert "GPU-hours" not in plan_text(octothinker.llama_3b()).split("\n", 1)[1]
    on_cpu = rows_of(demo.demo(), clusters.h100())["stable"]
    assert (on_cpu["compute"]["gpu_hours"], on_cpu["memory"]["fits"]) == (None, None)


@pytest.mark.parametrize("recipe", [octothinker.llama_1b, octothinker.llama_3b, octothinker.llama_8b, octothinker.llama_3b_fp8])
def test_the_papers_plans_fit_an_h100(recipe):
    assert all(row["memory"]["fits"] for row in plan_rows(recipe(), clusters.h100()))


def test_a_plan_that_does_not_fit_says_so():
    graph = with_overrides(octothinker.llama_8b(), ["stable.plan.tensor=1", "stable.plan.sequence_parallel=false"])
    rows = rows_of(graph, clusters.h100())
    assert (rows["stable"]["memory"]["fits"], rows["decay_long"]["memory"]["fits"]) == (False, True)
    assert plan_text(graph, clusters.h100()).count("to spare: NO") == 1
    assert rows_of(graph, clusters.h200())["stable"]["memory"]["fits"]


def test_the_batch_caps_data_parallel_ranks():
    graph = octothinker.llama_3b()
    assert rows_of(graph)["stable"]["parallel"]["largest_data"] == 512
    widest = with_overrides(graph, ["stable.plan.nodes=64"])
    assert rows_of(widest)["stable"]["parallel"]["data"] == 512
    with pytest.raises(ConfigError, match="a batch of 512 feeds at most 512 data-parallel ranks"):
        with_overrides(graph, ["stable.plan.nodes=128"])


def test_more_ranks_than_gpus_on_a_node_are_refused():
    graph = with_overrides(octothinker.llama_3b(), ["stable.plan.ranks_per_node=16", "stable.plan.nodes=4"])
    assert rows_of(graph)["stable"]["parallel"]["ranks"] == 64
    with pytest.raises(ConfigError, match=r"plan\.ranks_per_node 16 exceeds the 8 GPUs of a node of h100"):
        plan_rows(graph, clusters.h100())


def test_the_points_that_stages_start_from_are_pinned_however_far_apart():
    graph = ablations.decay_qa()
    assert rows_of(graph)["pilot_omi2_30"]["joint"]["parent_step"] == 30_994
    unpinned = rows_of(with_overrides(graph, ["stable.plan.pin_every_tokens=0"]))
    assert unpinned["pilot_omi2_30"]["joint"]["parent_step"] == 30_994
    assert unpinned["stable"]["checkpoints"]["pinned_steps"] == [30_994, 50_000]
    off = Branch(stage="stable", tokens=31_000 * 4_194_304)  # a routine save's step, which goes when newer ones come
    branched = changed(octothinker.llama_3b(), "decay_long", start=off)
    assert 31_000 in rows_of(with_overrides(branched, []))["stable"]["checkpoints"]["pinned_steps"]


def test_a_graph_whose_joints_were_never_pinned_is_refused():
    off = Branch(stage="stable", tokens=31_000 * 4_194_304)
    with pytest.raises(ConfigError, match=r"stage decay_long: starts from 'stable' at step 31,000 .*may be removed"):
        plan_rows(changed(octothinker.llama_3b(), "decay_long", start=off))


def test_the_graph_is_drawn_as_a_tree():
    assert graph_lines(octothinker.llama_3b()) == [
        "corpus            tokenize  12 sources",
        "llama             convert   meta-llama/Llama-3.2-3B",
        "  stable          train     weights of llama; reads corpus",
        "    decay_long    train     branch of stable; reads corpus",
        "      rl_long     rl        weights of decay_long",
        "    decay_short   train     branch of stable; reads corpus",
        "      rl_short    rl        weights of decay_short",
        "    decay_hybrid  train     branch of stable; reads corpus",
        "      rl_hybrid   rl        weights of decay_hybrid",
        "    rl_stable     rl        weights of stable",
        "  rl_base         rl        weights of llama",
        "report            report    reads 9 stages, stable to rl_hybrid",
    ]
    pilots = "\n".join(graph_lines(ablations.decay_qa()))
    assert "branch of stable at 130.00B tokens; reads corpus" in pilots
    assert "reads 31 stages, stable to rl_pilot_openr1_omi2_2_1" in pilots
    assert graph_lines(demo.demo())[3] == "base              train      from random weights; reads corpus"


def test_a_converted_model_has_a_row_of_its_own():
    qwen = dataclasses.replace(octothinker.llama_1b().stage("llama").model, vocab_size=151_665)
    stages = tuple(s for s in changed(octothinker.llama_1b(), "llama").stages if s.name in ("corpus", "llama"))
    graph = changed(Graph(name="g", stages=stages), "llama", model=qwen, revision="0" * 40)
    assert convert_rows(graph) == [
        {
            "stage": "llama",
            "source": "meta-llama/Llama-3.2-1B",
            "revision": "0" * 40,
            "parameters": qwen.num_parameters,
            "vocab_size": 151_665,
            "padded_vocab_size": 151_680,
            "disk_bytes": 2 * qwen.num_parameters,
        }
    ]
    assert convert_lines(convert_rows(graph)[0])[1:] == [
        f"  source   meta-llama/Llama-3.2-1B at {'0' * 40}",
        "  model    1,283,786,752 parameters; 151,665 ids, 15 rows of padding",
        "  disk     2.6 GB in BF16, twice that in FP32",
    ]
    assert convert_rows(demo.smoke()) == []
    assert "16.1 GB in BF16" in plan_text(octothinker.llama_8b())


def test_the_text_names_every_stage_and_sums_up():
    text = plan_text(octothinker.llama_3b(), clusters.h100())
    for expected in (
        "209.72B = 50,000 steps x 4,194,304 (512 sequences x 8,192); lineage 209.72B",
        "branch of stable at 209.72B tokens (step 50,000), with its optimizer; "
        "rate before the joint 2e-05, at the first step 2e-05 (level; the peak)",
        "64 GPUs on 8 nodes, bf16: tensor 1 x pipeline 1 x context 1 x data 64 (the batch feeds at most 512); ",
        "8 micro-batches of 1 sequence a step",
        "3,461 GPU-hours, 54.1 hours on 64 GPUs",
        "24 checkpoints x 45.0 GB = 1.1 TB, at most 68 files each",
        "in all: 272.63B tokens, 3.0 TB of checkpoints, 4,499 GPU-hours of training, "
        "2,000 updates of reinforcement learning (139 GPU-hours at most; sampling is not in them), whose records take 99.7 GB at most",
    ):
        assert expected in text
    assert "unknown" in next(line for line in text.splitlines() if "numinamath_1_5" in line)


def test_json_says_what_the_rows_say():
    values = json.loads(plan_json(octothinker.llama_3b(), clusters.h100()))
    assert (values["graph"], values["cluster"]) == ("octothinker_3b", "h100")
    assert values["stages"] == json.loads(json.dumps(plan_rows(octothinker.llama_3b(), clusters.h100())))
    assert values["conversions"] == convert_rows(octothinker.llama_3b())


def test_the_resolved_graph_holds_every_default_and_reads_back():
    graph = demo.smoke()
    values = resolved(graph)
    assert values["stages"][3]["optimizer"] == {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "clip_norm": 1.0}
    assert from_json(Graph, json.loads(json.dumps(values))) == graph


@pytest.mark.parametrize("recipe", [getattr(ablations, name) for name in ("web_quality", "qa_format", "instruction", "token_budget")])
def test_every_ablation_can_be_planned(recipe):
    graph = recipe()
    assert len(plan_rows(graph, clusters.h100())) == len([s for s in graph.stages if isinstance(s, TrainStage)])


def test_numbers_in_words():
    assert [count(n) for n in (999, 1_000, 2_457_600, 209_715_200_000, 3 * 10**12)] == ["999", "1.00K", "2.46M", "209.72B", "3.00T"]
    assert [size(n) for n in (0, 999, 1_500, 45 * 10**9)] == ["0 B", "999 B", "1.5 KB", "45.0 GB"]


def test_a_plan_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from recipes import clusters, octothinker; "
        "from megatron_ext.launch.plan import plan_text; print(len(plan_text(octothinker.llama_8b(), clusters.h100())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
