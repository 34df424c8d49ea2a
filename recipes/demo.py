"""The paper's graph with toy numbers, from raw text on, for a CPU: `demo` in minutes, `smoke` in seconds.

    text -> tokenizer -> corpus -> base -> stable -> decay_long, decay_short, decay_hybrid -> rl_long, rl_short, rl_hybrid -> report
                                   rl_base and rl_stable are the controls

`base` stands in for Llama's pre-training: general prose only. From `stable` on, stages and edges are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_ext.config.budget import Budget
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.optimizer import Optimizer
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.rl import CapFrom, ProgressLengths, Rollouts
from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import (
    Branch,
    ReportStage,
    RLStage,
    Scratch,
    Source,
    TextStage,
    TokenizerStage,
    TokenizeStage,
    TrainStage,
    Weights,
)
from megatron_ext.config.tasks import ProblemSet, Validation
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
    rl_problems: int
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
    rl_steps: int
    rl_prompts: int  # a rollout step, and an update
    rl_responses: int  # to each
    rl_learning_rate: float
    rl_warmup_steps: int
    rl_save_every_steps: int
    rl_validate_every_steps: int
    short_cap_tokens: int
    long_caps: tuple[CapFrom, ...]  # rising during the run, as the paper's


# Sequences of 128 tokens hold every worked problem. A batch has 2,048: of as many tokens, larger ones learn less.
# Two layers of 128 learn as much from a token as four, in half the time. Weights that begin at 0.08, about 1 / sqrt(128), need
# half the tokens that they need from 0.02. Stable to decay as 3 to 2: the paper's 10 to 1 leaves a toy's decay
# too few steps.
DEMO = Size(
    model=replace(models.toy(vocab_size=1024), name="toy_2x128", num_layers=2, init_std=0.08),
    math_prose_bytes=4_000_000,
    general_prose_bytes=1_400_000,
    short_problems=10_000,
    long_problems=5_000,
    instruction_problems=4_000,
    rl_problems=2_000,
    evaluation_problems=256,
    sequences_per_batch=16,
    sequence_length=128,
    base_steps=150,
    base_warmup_steps=20,
    stable_steps=1000,
    decay_steps=700,
    peak=3e-3,
    heldout_fraction=0.05,
    max_epochs=4.0,  # as in the paper's mixtures; see recipes/mixtures.py
    save_every_steps=250,
    validate_every_steps=125,
    decay_validate_every_steps=125,
    validation_sequences=32,
    ranks=2,  # as fast as one rank of two threads or faster, and the optimizer is shared as it is on GPUs
    micro_batch=8,
    export_branches=True,
    rl_steps=40,
    rl_prompts=32,
    rl_responses=8,
    rl_learning_rate=3e-4,  # the paper's 1e-6 would not move a toy in 40 steps; 1e-3, or no warm-up, undoes what was learnt
    rl_warmup_steps=5,  # a fresh optimizer's first steps are as long as any, and have the least to go by
    rl_save_every_steps=20,
    rl_validate_every_steps=4,  # the paper's
    short_cap_tokens=40,  # a short working has 23 tokens
    # A long one has 82 on average, one in twenty more than 116, none more than 130. The rises come where the paper's come.
    long_caps=(CapFrom(after=0, cap_tokens=80), CapFrom(after=20, cap_tokens=112), CapFrom(after=32, cap_tokens=144)),
)
SMOKE = Size(
    model=models.smallest(vocab_size=512),
    math_prose_bytes=200_000,
    general_prose_bytes=100_000,
    short_problems=200,
    long_problems=200,
    instruction_problems=200,
    rl_problems=50,
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
    rl_steps=2,
    rl_prompts=4,
    rl_responses=2,
    rl_learning_rate=3e-4,
    rl_warmup_steps=1,
    rl_save_every_steps=1,
    rl_validate_every_steps=1,
    short_cap_tokens=8,
    long_caps=(CapFrom(after=0, cap_tokens=8), CapFrom(after=1, cap_tokens=16)),
)
SEED = 20_250_625
SOURCES = ("math_web", "general_web", "short_cot", "long_cot", "instruction")

# The paper's tables in small (Tables 2 and 5): the web, general web, instruction, questions and answers. Of these the paper has 5 % in
# stable and 30 % in a decay; a toy with so few of its few tokens learns no sums: decays of 500 steps on short answers come to 24 % of
# the held-out problems at a share of 0.40, to 65 % at 0.55 (greedy, in the form that they were trained in).
BASE = mix(general_web=1.0)
STABLE = mix(math_web=0.70, general_web=0.10, short_cot=0.20)
LONG = mix(math_web=0.20, general_web=0.05, instruction=0.10, long_cot=0.65)
SHORT = mix(math_web=0.20, general_web=0.05, instruction=0.10, short_cot=0.65)
HYBRID = mix(math_web=0.20, general_web=0.05, instruction=0.10, long_cot=0.30, short_cot=0.35)

RL_PROBLEMS = ProblemSet(name="arithmetic", path="rl_problems.jsonl", form="arithmetic")
HELD_OUT = ProblemSet(name="held_out", path="evaluation/problems.jsonl", form="arithmetic")
LONGEST_PROMPT_TOKENS = 64  # the demo's tokenizer makes up to 45 of question and template, the smoke test's more


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
        rl_problems=size.rl_problems,
        evaluation_problems=size.evaluation_problems,
        seed=SEED,
    )
    tokenizer = TokenizerStage(name="tokenizer", text="text", vocab_size=size.model.vocab_size)
    corpus = TokenizeStage(name="corpus", sources=tuple(_source(s, size) for s in SOURCES), tokenizer="tokenizer", text="text")
    trained: tuple[TrainStage | RLStage, ...] = (*_training(size), *_learning(size))
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


def _learning(size: Size) -> tuple[RLStage, ...]:
    """RL from each branch, and from base and stable as controls: they differ in name, start and lengths."""
    growing = ProgressLengths(caps=size.long_caps)
    long = RLStage(
        name="rl_long",
        start=Weights(stage="decay_long"),
        model=size.model,
        text="text",
        problems=RL_PROBLEMS,
        # At one cap for all: under the cap in force a branch would gain by a longer cap what it did not learn.
        validation=Validation(sets=(HELD_OUT,), cap_tokens=growing.largest_cap_tokens, max_prompt_tokens=LONGEST_PROMPT_TOKENS),
        lengths=growing,
        steps=size.rl_steps,
        # One word more than the form of the training text: as in the paper, the first score is a measure of the template rather than
        # of ability, and a part of what reinforcement learning gains is the form.
        template="cue",
        rollouts=Rollouts(
            prompts_per_step=size.rl_prompts,
            responses_per_prompt=size.rl_responses,
            prompts_per_update=size.rl_prompts,
            max_prompt_tokens=LONGEST_PROMPT_TOKENS,
        ),
        learning_rate=size.rl_learning_rate,
        warmup_steps=size.rl_warmup_steps,
        optimizer=Optimizer(weight_decay=0.01, beta2=0.99),  # 40 updates are too few for a mean over 1,000
        precision="fp32",
        plan=RLPlan(
            device="cpu",
            ranks_per_node=size.ranks,
            tokens_per_micro_batch=4096,
            grading_workers=1,
            save_every_steps=size.rl_save_every_steps,
            validate_every_steps=size.rl_validate_every_steps,
        ),
    )
    hybrid = replace(long, name="rl_hybrid", start=Weights(stage="decay_hybrid"))
    fixed = ProgressLengths(caps=(CapFrom(after=0, cap_tokens=size.short_cap_tokens),))
    short = replace(long, name="rl_short", start=Weights(stage="decay_short"), lengths=fixed)
    base = replace(short, name="rl_base", start=Weights(stage="base"))
    stable = replace(short, name="rl_stable", start=Weights(stage="stable"))
    return base, stable, long, short, hybrid
