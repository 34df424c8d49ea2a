"""The paper, one function a size: Llama -> 200B stable tokens -> three decays of 20B -> report.

    corpus, llama -> stable -> decay_long, decay_short, decay_hybrid -> report

Tables and sections are the OctoThinker paper's (arXiv 2506.20512).
"""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config.budget import Budget
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Branch, ConvertStage, ReportStage, TokenizeStage, TrainStage, Weights
from megatron_ext.launch.graph import Graph
from recipes import mixtures, models

# What the hub held when this was written: a branch may move, a commit does not.
REVISIONS = {
    "meta-llama/Llama-3.2-1B": "4e20de362430cd3b72f300e6b0f18e50e7166e08",
    "meta-llama/Llama-3.2-3B": "13afe5124825b4f3751f836b40dafda64c1ed062",
    "meta-llama/Llama-3.1-8B": "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
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
    return _graph("octothinker_1b", models.llama_3_2_1b(), "meta-llama/Llama-3.2-1B", 5e-5, PLAN_1B)


def llama_3b() -> Graph:
    """OctoThinker-3B; learning rate 2e-5 (Table 4)."""
    return _graph("octothinker_3b", models.llama_3_2_3b(), "meta-llama/Llama-3.2-3B", 2e-5, PLAN_3B)


def llama_8b() -> Graph:
    """OctoThinker-8B; learning rate 1e-5 (Table 4)."""
    return _graph("octothinker_8b", models.llama_3_1_8b(), "meta-llama/Llama-3.1-8B", 1e-5, PLAN_8B)


def llama_3b_fp8() -> Graph:
    """OctoThinker-3B in FP8: another science than BF16, so runs of its own."""
    return in_fp8(llama_3b())


def in_fp8(graph: Graph) -> Graph:
    """The same graph with every training stage in FP8."""
    stages = tuple(replace(s, precision="fp8") if isinstance(s, TrainStage) else s for s in graph.stages)
    return replace(graph, name=f"{graph.name}_fp8", stages=stages)


def _graph(name: str, model: ModelConfig, model_id: str, peak: float, plan: TrainPlan) -> Graph:
    corpus = TokenizeStage(name="corpus", sources=mixtures.SOURCES, tokenizer=TOKENIZER)
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
    trained = (stable, long, short, hybrid)
    report = ReportStage(name="report", stages=tuple(s.name for s in trained), title=f"OctoThinker from {model_id}")
    return Graph(name=name, stages=(corpus, llama, *trained, report))
