"""The paper's graph with toy numbers, from raw text on, for a CPU: `demo` in minutes, `smoke` in seconds.

    text -> tokenizer -> corpus -> base -> stable -> decay_long, decay_short, decay_hybrid -> report

`base` stands in for Llama's pre-training: general prose only. From `stable` on, stages and edges are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_ext.config.budget import Budget
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import (
    Branch,
    ReportStage,
    Scratch,
    Source,
    TextStage,
    TokenizerStage,
    TokenizeStage,
    TrainStage,
    Weights,
)
from megatron_ext.launch.graph import Graph
from recipes import models
from recipes.mixtures import mix


@dataclass(frozen=True)
class Size:
    """What differs between `demo` and `smoke`; tune here."""

    model: ModelConfig
    math_prose_bytes: int
    general_prose_bytes: int
    short_problems: int
    long_problems: int
    instruction_problems: int
    evaluation_problems: int
    sequences_per_batch: int
    sequence_length: int
    base_steps: int
    base_warmup_steps: int
    stable_steps: int
    decay_steps: int
    peak: float
    heldout_fraction: float
    max_epochs: float
    save_every_steps: int
    validate_every_steps: int
    decay_validate_every_steps: int
    validation_sequences: int
    ranks: int
    micro_batch: int
    export_branches: bool  # as Hugging Face folders, when they are trained


# 4,096 tokens a step: larger batches learn less from as many tokens. Stable to decay as about 4 to 1: the paper's 10 to 1
# leaves a toy's decay too few steps to see.
DEMO = Size(
    model=models.toy(vocab_size=1024),
    math_prose_bytes=4_000_000,
    general_prose_bytes=1_400_000,
    short_problems=8_000,
    long_problems=2_000,
    instruction_problems=4_000,
    evaluation_problems=200,
    sequences_per_batch=16,
    sequence_length=256,
    base_steps=60,
    base_warmup_steps=10,
    stable_steps=270,
    decay_steps=70,
    peak=3e-3,
    heldout_fraction=0.05,
    max_epochs=4.0,  # as in the paper's mixtures; see recipes/mixtures.py
    save_every_steps=100,
    validate_every_steps=40,
    decay_validate_every_steps=20,
    validation_sequences=32,
    ranks=2,  # as fast as one rank of two threads or faster, and the optimizer is shared as it is on GPUs
    micro_batch=8,
    export_branches=True,
)
SMOKE = Size(
    model=models.smallest(vocab_size=512),
    math_prose_bytes=200_000,
    general_prose_bytes=100_000,
    short_problems=200,
    long_problems=200,
    instruction_problems=200,
    evaluation_problems=20,
    sequences_per_batch=8,
    sequence_length=64,
    base_steps=6,
    base_warmup_steps=2,
    stable_steps=12,
    decay_steps=8,
    peak=3e-3,
    heldout_fraction=0.1,
    max_epochs=4.0,
    save_every_steps=6,
    validate_every_steps=6,
    decay_validate_every_steps=4,
    validation_sequences=4,
    ranks=1,
    micro_batch=8,
    export_branches=False,
)
SEED = 20_250_625
SOURCES = ("math_web", "general_web", "short_cot", "long_cot", "instruction")

# The paper's tables in small: the web, general web, instruction, and 30 % of questions and answers (Tables 2 and 5).
BASE = mix(general_web=1.0)
STABLE = mix(math_web=0.85, general_web=0.10, short_cot=0.05)
LONG = mix(math_web=0.55, general_web=0.05, instruction=0.10, long_cot=0.30)
SHORT = mix(math_web=0.55, general_web=0.05, instruction=0.10, short_cot=0.30)
HYBRID = mix(math_web=0.55, general_web=0.05, instruction=0.10, long_cot=0.10, short_cot=0.20)


def demo() -> Graph:
    """The whole path on a CPU in minutes."""
    return _graph("demo", DEMO)


def smoke() -> Graph:
    """The whole path on a CPU in seconds; its numbers mean nothing."""
    return _graph("smoke", SMOKE)


def control() -> Graph:
    """The demo and, of each branch, a control that keeps the peak rate: what the decay itself does."""
    graph = demo()
    report: ReportStage = graph.stage("report")
    decays = [stage for stage in graph.stages if isinstance(stage, TrainStage) and isinstance(stage.start, Branch)]
    constant: Schedule = graph.stage("stable").schedule
    controls = [replace(stage, name=stage.name.replace("decay", "constant"), schedule=constant) for stage in decays]
    report = replace(report, name="report_control", stages=(*report.stages, *(stage.name for stage in controls)))
    return replace(graph, stages=(*graph.stages[:-1], *controls, report))


def _graph(name: str, size: Size) -> Graph:
    text = TextStage(
        name="text",
        math_prose_bytes=size.math_prose_bytes,
        general_prose_bytes=size.general_prose_bytes,
        short_problems=size.short_problems,
        long_problems=size.long_problems,
        instruction_problems=size.instruction_problems,
        evaluation_problems=size.evaluation_problems,
        seed=SEED,
    )
    tokenizer = TokenizerStage(name="tokenizer", text="text", vocab_size=size.model.vocab_size)
    corpus = TokenizeStage(name="corpus", sources=tuple(_source(s, size) for s in SOURCES), tokenizer="tokenizer", text="text")
    trained = _training(size)
    report = ReportStage(name="report", stages=tuple(stage.name for stage in trained), title=f"OctoThinker in small: {name}")
    return Graph(name=name, stages=(text, tokenizer, corpus, *trained, report))


def _source(name: str, size: Size) -> Source:
    generated = name in ("short_cot", "long_cot", "instruction")
    return Source(
        name=name,
        paths=(f"{name}.jsonl",),
        max_epochs=size.max_epochs,
        heldout_fraction=size.heldout_fraction,
        licence="Apache-2.0 (this project)" if generated else "each package's own",
        provenance="generated problems" if generated else "docstrings and sources of installed Python packages",
    )


def _training(size: Size) -> tuple[TrainStage, ...]:
    budget = Budget(steps=size.base_steps, sequences_per_batch=size.sequences_per_batch, sequence_length=size.sequence_length)
    warmup_tokens = size.base_warmup_steps * budget.tokens_per_batch  # random weights need a warm-up, Llama's do not
    base = TrainStage(
        name="base",
        start=Scratch(),
        corpus="corpus",
        model=size.model,
        mixture=BASE,
        budget=budget,
        schedule=Schedule(shape="constant", peak=size.peak, warmup_tokens=warmup_tokens),
        precision="fp32",
        plan=TrainPlan(
            device="cpu",
            ranks_per_node=size.ranks,
            micro_batch=size.micro_batch,
            save_every_steps=size.save_every_steps,
            validate_every_steps=size.validate_every_steps,
            validation_sequences=size.validation_sequences,
        ),
    )
    stable = replace(
        base,
        name="stable",
        start=Weights(stage="base"),
        mixture=STABLE,
        budget=replace(budget, steps=size.stable_steps),
        schedule=Schedule(shape="constant", peak=size.peak),
    )
    long = replace(
        stable,
        name="decay_long",
        start=Branch(stage="stable"),
        mixture=LONG,
        budget=replace(budget, steps=size.decay_steps),
        schedule=Schedule(shape="cosine", peak=size.peak),
        plan=replace(stable.plan, validate_every_steps=size.decay_validate_every_steps, export_last=size.export_branches),
    )
    short = replace(long, name="decay_short", mixture=SHORT)
    hybrid = replace(long, name="decay_hybrid", mixture=HYBRID)
    return base, stable, long, short, hybrid
