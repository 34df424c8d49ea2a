"""A graph to try faults on: one small corpus, and stages over two nodes that differ in their names alone.

megatron-ext launch tests/slurm/fault_recipe.py:corpus --local
megatron-ext launch tests/slurm/fault_recipe.py:stages --cluster tests/slurm/fault_recipe.py:cluster --from term
"""

from __future__ import annotations

import sys
from dataclasses import replace

from megatron_ext.config.budget import Budget
from megatron_ext.config.cluster import Cluster
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.stages import TokenizeStage, TrainStage
from megatron_ext.launch.graph import Graph
from recipes import clusters, demo

GRAPH = "faults"
UNDISTURBED = "undisturbed"
FAULTS = (
    "node_power_loss", "slurmd_killed", "network_cut", "term", "time_limit", "requeue", "preemption", "scancel",
    "rank_killed", "rank_stopped", "full_disk", "corrupted_checkpoint", "save_killed", "controller_restart",
)  # fmt: skip
SLOW = ("slurmd_killed", "time_limit")
ALONE, UNFENCED = "alone", "alone_unfenced"  # on one node, and longer than anybody waits: these go on when their node is cut off
ENDLESS_STEPS = 1_000_000
STEPS, SAVE_EVERY_STEPS = 60, 5
MAX_IDLE_ATTEMPTS = 3
HANG_SECONDS = 20  # far longer than a step, a save, or the loading of anything here


def corpus() -> Graph:
    """Text, tokenizer and shards: what every stage below trains on."""
    graph = demo.smoke()
    text, tokenizer, shards = (graph.stage(name) for name in ("text", "tokenizer", "corpus"))
    return Graph(name=GRAPH, stages=(text, tokenizer, _without_limit(shards)))


def stages() -> Graph:
    """The corpus and, of the same training, one stage for each fault."""
    pair = _pair()
    # Losses of all that is held out, and a save, after each step: neither changes a weight, and the work lasts until Slurm
    # has noticed what takes it half a minute to notice.
    slow = replace(pair.plan, save_every_steps=1, validate_every_steps=1, validation_sequences=1000)
    plans = dict.fromkeys(SLOW, slow)
    trained = [replace(pair, name=name, plan=plans.get(name, pair.plan)) for name in (UNDISTURBED, *FAULTS)]
    return replace(corpus(), stages=(*corpus().stages, *trained, _alone(pair, ALONE), _alone(pair, UNFENCED)))


def _without_limit(shards: TokenizeStage) -> TokenizeStage:
    return replace(shards, sources=tuple(replace(source, max_epochs=1e6) for source in shards.sources))


def _pair() -> TrainStage:
    """One pipeline over two nodes. Micro-batches of one sequence: a step is long enough for a fault to hit the middle of the stage."""
    base: TrainStage = demo.smoke().stage("base")
    return replace(
        base,
        mixture=demo.STABLE,
        budget=Budget(steps=STEPS, sequences_per_batch=16, sequence_length=64),
        plan=TrainPlan(
            device="cpu", nodes=2, pipeline=2, micro_batch=1, save_every_steps=SAVE_EVERY_STEPS, validate_every_steps=STEPS,
            validation_sequences=0,
        ),
    )  # fmt: skip


def _alone(pair: TrainStage, name: str) -> TrainStage:
    plan = replace(pair.plan, nodes=1, pipeline=1, save_every_steps=20)
    return replace(pair, name=name, budget=Budget(steps=ENDLESS_STEPS, sequences_per_batch=1, sequence_length=16), plan=plan)


def cluster() -> Cluster:
    """The throw-away cluster: whole nodes, so that the loss of one is the loss of one stage alone."""
    base = clusters.sandbox()
    assert base.slurm is not None
    slurm = replace(base.slurm, exclusive=True, python=sys.executable, hang_seconds=HANG_SECONDS, max_idle_attempts=MAX_IDLE_ATTEMPTS)
    return replace(base, slurm=slurm)
