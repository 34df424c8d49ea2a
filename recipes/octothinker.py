"""The paper, one function a size: Llama -> 200B stable tokens -> three decays of 20B -> RL from each -> report.

    corpus, llama -> stable -> decay_long, decay_short, decay_hybrid -> rl_long, rl_short, rl_hybrid -> report
             rl_base (from llama) and rl_stable are the controls

Tables and sections are the OctoThinker paper's (arXiv 2506.20512). Reinforcement learning has its numbers in recipes/rl.py.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config.budget import Budget
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.rl import Rollouts
from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Branch, ConvertStage, ReportStage, RLStage, TokenizePlan, TokenizeStage, TrainStage, Weights
from megatron_ext.launch.graph import Graph
from recipes import mixtures, models, rl

# What the hub held when this was written: a branch may move, a commit does not.
REVISIONS = {
    "meta-llama/Llama-3.2-1B": "4e20de362430cd3b72f300e6b0f18e50e7166e08",
    "meta-llama/Llama-3.2-3B": "13afe5124825b4f3751f836b40dafda64c1ed062",
    "meta-llama/Llama-3.1-8B": "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
    "Qwen/Qwen2.5-3B": "3aab1f1954e9cc14eb9509a215f9e5ca08227a9b",
}
TOKENIZER = "assets/Llama-3.2-3B"  # a folder with tokenizer.json; Llama 3.1 and 3.2 share it

# Table 4 and section 3.1. 512 x 8,192 = 4,194,304 tokens a step: 209.7B and 20.97B tokens, named 200B and 20B.
BATCH = Budget(steps=1, sequences_per_batch=512, sequence_length=8192)
STABLE = replace(BATCH, steps=50_000)
DECAY = replace(BATCH, steps=5_000)

# Ours. 8-GPU nodes; each size fits 80 GB a GPU with BF16 and no recomputation (`megatron-ext plan` shows the parts).
# The authors' runs: 1B on 256 data-parallel ranks, 8B on data 16 x tensor 8.
PLAN_1B = TrainPlan(
    nodes=4,
    ranks_per_node=8,
    loader_workers=2,
    save_every_steps=500,
    asynchronous_saves=True,
    pin_every_tokens=10_000_000_000,  # 20 points of the stable stage to branch from, 130B (the pilots' start) among them
)
PLAN_3B = replace(PLAN_1B, nodes=8)
PLAN_8B = replace(PLAN_1B, nodes=16, tensor=2, sequence_parallel=True)


def llama_1b() -> Graph:
    """OctoThinker-1B; learning rate 5e-5 (Table 4)."""
    return _graph("octothinker_1b", models.llama_3_2_1b(), "meta-llama/Llama-3.2-1B", 5e-5, PLAN_1B, rl.PLAN_1B)


def llama_3b() -> Graph:
    """OctoThinker-3B; learning rate 2e-5 (Table 4)."""
    return _graph("octothinker_3b", models.llama_3_2_3b(), "meta-llama/Llama-3.2-3B", 2e-5, PLAN_3B, rl.PLAN_3B)


def llama_8b() -> Graph:
    """OctoThinker-8B; learning rate 1e-5 (Table 4). Its reinforcement learning is ours: the paper trained 1B and 3B."""
    return _graph("octothinker_8b", models.llama_3_1_8b(), "meta-llama/Llama-3.1-8B", 1e-5, PLAN_8B, rl.PLAN_8B)


def llama_3b_fp8() -> Graph:
    """OctoThinker-3B with its mid-training in FP8: another science than BF16, so runs of its own."""
    return in_fp8(llama_3b())


def llama_3b_released_rl() -> Graph:
    """RL as the released scripts have it, from Long and Hybrid: 256 prompts a step and 16 an update, where the paper says 128 and 64."""
    graph = llama_3b()
    scripts = Rollouts(prompts_per_step=256, prompts_per_update=16)
    arms = [replace(graph.stage(name), name=f"{name}_released", rollouts=scripts) for name in ("rl_long", "rl_hybrid")]
    above = graph.stages[: graph.stages.index(graph.stage("rl_base"))]
    report = ReportStage(name="report_released_rl", stages=("stable", *(arm.name for arm in arms)), title="RL of the released scripts")
    return replace(graph, stages=(*above, *arms, report))


def rl_llama_3b() -> Graph:
    """The paper's motivation: RL straight from Llama-3.2-3B. It is the 3B graph's control, and shares its run."""
    graph = llama_3b()
    report = ReportStage(name="report_rl_base", stages=("rl_base",), title="RL straight from Llama-3.2-3B")
    return replace(graph, stages=(graph.stage("llama"), graph.stage("rl_base"), report))


def rl_qwen_3b() -> Graph:
    """The paper's motivation: the same RL straight from Qwen2.5-3B."""
    model = models.qwen2_5_3b()
    qwen = ConvertStage(name="qwen", model_id="Qwen/Qwen2.5-3B", model=model, revision=REVISIONS["Qwen/Qwen2.5-3B"])
    learnt: RLStage = replace(llama_3b().stage("rl_base"), start=Weights(stage="qwen"), model=model)
    report = ReportStage(name="report_rl_base", stages=("rl_base",), title="RL straight from Qwen2.5-3B")
    return Graph(name="qwen_3b", stages=(qwen, learnt, report))


def in_fp8(graph: Graph) -> Graph:
    """The same graph with every training stage in FP8; reinforcement learning stays in BF16."""
    stages = tuple(replace(s, precision="fp8") if isinstance(s, TrainStage) else s for s in graph.stages)
    return replace(graph, name=f"{graph.name}_fp8", stages=stages)


def _graph(name: str, model: ModelConfig, model_id: str, peak: float, plan: TrainPlan, rl_plan: RLPlan) -> Graph:
    # About 900 GB of text: 64 MiB take a process half a minute.
    corpus = TokenizeStage(name="corpus", sources=mixtures.SOURCES, tokenizer=TOKENIZER, plan=TokenizePlan(workers=16, parts=16))
    llama = ConvertStage(name="llama", model_id=model_id, model=model, revision=REVISIONS[model_id])
    stable = TrainStage(
        name="stable",
        start=Weights(stage="llama"),
        corpus="corpus",
        model=model,
        mixture=mixtures.STABLE,
        budget=STABLE,
        schedule=Schedule(shape="constant", peak=peak),
        plan=plan,
    )
    # The optimizer's state crosses the joint; the paper does not say. Weights(stage="stable") is the other reading.
    long = replace(
        stable,
        name="decay_long",
        start=Branch(stage="stable"),
        mixture=mixtures.LONG,
        budget=DECAY,
        schedule=Schedule(shape="cosine", peak=peak),  # to 10 % of the stable rate (Table 4)
    )
    short = replace(long, name="decay_short", mixture=mixtures.SHORT)
    hybrid = replace(long, name="decay_hybrid", mixture=mixtures.HYBRID)
    reported: tuple[TrainStage | RLStage, ...] = (stable, long, short, hybrid, *_learning("llama", model, rl_plan))
    report = ReportStage(name="report", stages=tuple(s.name for s in reported), title=f"OctoThinker from {model_id}")
    return Graph(name=name, stages=(corpus, llama, *reported, report))


def _learning(base: str, model: ModelConfig, plan: RLPlan) -> tuple[RLStage, ...]:
    """RL from each branch, and the controls from the untouched base and from stable; they differ in start, template and lengths alone."""
    long = RLStage(
        name="rl_long",
        start=Weights(stage="decay_long"),
        model=model,
        problems=rl.MATH8K,
        validation=rl.HELD_OUT,
        lengths=rl.GROWING,
        steps=rl.STEPS,
        template="complex",
        plan=plan,
    )
    # Hybrid's released script: the Long one's template, and 4,096 tokens from the first step to the last.
    hybrid = replace(long, name="rl_hybrid", start=Weights(stage="decay_hybrid"), lengths=rl.FIXED)
    # The paper's table: the complex template and more than 4,096 tokens are for bases with long chains of thought. These have none.
    short = replace(hybrid, name="rl_short", start=Weights(stage="decay_short"), template="simple")
    untouched = replace(short, name="rl_base", start=Weights(stage=base))
    stable = replace(short, name="rl_stable", start=Weights(stage="stable"))
    return untouched, stable, long, short, hybrid
