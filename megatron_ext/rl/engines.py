"""The engine of a plan, and how the trainer's weights come to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_ext.config.stages import RLStage
from megatron_ext.distributed import Groups
from megatron_ext.errors import ConfigError
from megatron_ext.generation.engine import Engine
from megatron_ext.generation.megatron_engine import MegatronEngine
from megatron_ext.tokenizer import Tokenizer
from megatron_ext.training.state import TrainState

HandOver = Callable[[int], None]  # weights' version


def make_engine(
    stage: RLStage, state: TrainState, groups: Groups, tokenizer: Tokenizer, files: Mapping[str, bytes]
) -> tuple[Engine, HandOver]:
    """The engine that the plan names, and what hands it the weights as they are; every rank of a model copy calls both."""
    if stage.plan.engine == "megatron":
        engine = MegatronEngine(state.chunks, stage.model, groups, tokenizer, stage.plan.engine_slots)

        def hand_over(version: int) -> None:
            engine.update_weights(version, None)

        return engine, hand_over
    raise ConfigError(f"plan: engine={stage.plan.engine} is not available; use engine=megatron")
