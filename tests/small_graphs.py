"""Graphs that tests cut to what they look at."""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config.stages import ReportStage, RLStage
from megatron_ext.launch.graph import Graph


def training_alone(graph: Graph) -> Graph:
    """The graph without reinforcement learning."""
    learnt = {stage.name for stage in graph.stages if isinstance(stage, RLStage)}
    stages = [stage for stage in graph.stages if stage.name not in learnt]
    return replace(graph, stages=tuple(_without(stage, learnt) if isinstance(stage, ReportStage) else stage for stage in stages))


def _without(report: ReportStage, names: set[str]) -> ReportStage:
    return replace(report, stages=tuple(name for name in report.stages if name not in names))
