"""A recipe's value: named stages, and the edges that their fields spell out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ext.config.base import Json, config, from_json, nearest, override, to_json
from megatron_ext.config.stages import Branch, RLStage, Stage, TrainStage, Weights, inputs
from megatron_ext.errors import ConfigError


@config
class Graph:
    """Stages in an order in which they can run; `name` is the folder of their runs."""

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        seen: dict[str, Any] = {}
        for stage in self.stages:
            if stage.name in seen:
                raise ConfigError(f"graph {self.name}: two stages are named '{stage.name}'")
            for role, parent in inputs(stage).items():
                if parent not in seen:
                    raise ConfigError(
                        f"graph {self.name}: stage '{stage.name}' reads '{parent}' as its {role}, "
                        f"but no earlier stage has that name{nearest(parent, list(seen))}"
                    )
            if isinstance(stage, TrainStage | RLStage) and isinstance(stage.start, Weights | Branch):
                _check_start(self.name, stage, seen[stage.start.stage])
            seen[stage.name] = stage

    def stage(self, name: str) -> Any:
        """The stage called `name`; `ConfigError` names the nearest one."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"graph {self.name}: no stage '{name}'{nearest(name, [s.name for s in self.stages])}")

    def edges(self) -> list[tuple[str, str, str]]:
        """(parent, child, role) of every edge."""
        return [(parent, s.name, role) for s in self.stages for role, parent in inputs(s).items()]


def _check_start(graph: str, stage: TrainStage | RLStage, parent: Any) -> None:
    start = stage.start
    where = f"graph {graph}: stage '{stage.name}'"
    if parent.kind == "convert" and isinstance(start, Branch):
        raise ConfigError(f"{where} branches from '{parent.name}', a converted model without optimizer state; start it with Weights(...)")
    if parent.kind not in ("train", "convert", "rl"):
        raise ConfigError(f"{where} starts from '{parent.name}', a {parent.kind} stage, which has no checkpoints")
    if parent.kind == "rl" and stage.kind != "rl":
        raise ConfigError(
            f"{where} starts from '{parent.name}', whose weights come from reinforcement learning: a {stage.kind} stage starts from "
            f"a train or convert stage, an rl stage from any of the three"
        )
    if parent.model != stage.model:
        raise ConfigError(
            f"{where} holds model {stage.model.name}, but its start '{parent.name}' holds {parent.model.name}, and they differ"
        )
    if isinstance(start, Weights | Branch) and start.tokens is not None:
        if parent.kind == "convert":
            raise ConfigError(f"{where}: tokens={start.tokens:,} of '{parent.name}', a converted model; leave tokens out")
        if parent.kind == "rl":
            raise ConfigError(
                f"{where}: tokens={start.tokens:,} of '{parent.name}', which counts rollout steps and is started from at its last alone; "
                f"leave tokens out, or end '{parent.name}' where you want to start"
            )
        if start.tokens < 1:
            raise ConfigError(f"{where}: tokens=0 of '{parent.name}', where nothing is saved; start where '{parent.name}' itself starts")
        parent.budget.step_at(start.tokens)


def with_joints(graph: Graph) -> Graph:
    """The graph with every point that a stage starts from pinned in the plan of the stage that it starts from.

    An edge names a checkpoint: without a pin it could be removed before its reader runs. The last one needs none.
    """
    joints: dict[str, set[int]] = {}
    for stage in graph.stages:
        start = getattr(stage, "start", None)
        if isinstance(start, Weights | Branch) and start.tokens is not None:
            joints.setdefault(start.stage, set()).add(start.tokens)
    if not joints:
        return graph
    return replace(graph, stages=tuple(_pinned(stage, joints.get(stage.name, set())) for stage in graph.stages))


def _pinned(stage: Any, tokens: set[int]) -> Any:
    if tokens <= set(stage.plan.pin_tokens if isinstance(stage, TrainStage) else ()):
        return stage
    return replace(stage, plan=replace(stage.plan, pin_tokens=tuple(sorted(tokens | set(stage.plan.pin_tokens)))))


def with_overrides(graph: Graph, assignments: list[str]) -> Graph:
    """The graph after `stage.key=value` assignments, checked again as a whole, its joints pinned."""
    if not assignments:
        return with_joints(graph)
    given: Json = {stage.name: to_json(stage) for stage in graph.stages}
    for assignment in assignments:
        _check_names_a_stage(given, assignment)
    changed = override(given, assignments, dict)
    where = "after the overrides " + " ".join(assignments)
    for stage in graph.stages:  # each for itself: a message of the whole would name its position
        from_json(type(stage), changed[stage.name], f"{where}: {stage.name}")
    whole: Graph = from_json(Graph, {"name": graph.name, "stages": list(changed.values())}, where)
    return with_joints(whole)


def _check_names_a_stage(data: Json, assignment: str) -> None:
    """`ConfigError` where an assignment does not begin with a stage's name."""
    path = assignment.partition("=")[0].split(".")
    if path[0] in data:
        return
    owners = [name for name, stage in data.items() if _has(stage, path)]
    if owners:
        raise ConfigError(f"override '{assignment}': begin with a stage's name, as in {owners[0]}.{assignment}")
    raise ConfigError(f"override '{assignment}': no stage is named '{path[0]}'{nearest(path[0], list(data))}")


def _has(data: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    return True
