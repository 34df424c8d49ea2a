"""The model that learns, as the loop sees it: it generates, scores and updates, under any layout; every rank calls the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_ext.config.stages import RLStage
from megatron_ext.distributed import Groups, agreed
from megatron_ext.generation.engine import Engine, Generation, Request, collect
from megatron_ext.generation.megatron_engine import MegatronEngine
from megatron_ext.rl.batch import Sample
from megatron_ext.rl.update import UpdateResult, policy_update, score
from megatron_ext.training.state import TrainState


@dataclass
class Actor:
    """Model, optimizer and engine of this rank; `reference` is the frozen start, where a KL penalty wants it."""

    stage: RLStage
    groups: Groups
    state: TrainState
    engine: Engine | None  # None: nothing is sampled
    reference: list[GPTModel] | None = None

    @property
    def samples_in_place(self) -> bool:
        """Whether the engine samples with the trainer's own tensors, while its answers are waited for: before an update changes them."""
        return isinstance(self.engine, MegatronEngine)

    def ask(self, requests: Sequence[Request]) -> None:
        """Submit requests to the engines of the model copies; those with one prompt to one of them."""
        agreed(self.groups, "asking for responses", lambda: self._engine.submit(self._own(requests)))

    def answers(self, requests: Sequence[Request]) -> list[Generation]:
        """Wait for the answers to what was asked: in the order of the requests, on rank 0; nothing on the others."""
        answered = agreed(self.groups, "sampling", lambda: collect(self._engine, self._own(requests)))
        if self.groups.tensor_rank or self.groups.pipeline_rank:
            return []  # the first rank of each model copy speaks for it
        gathered: list[list[Generation]] | None = [[]] * self.groups.plan.data_parallel if self.groups.rank == 0 else None
        dist.gather_object(answered, gathered, group=self.groups.collection.dp)
        if gathered is None:
            return []
        by_id = {one.id: one for answers in gathered for one in answers}
        return [by_id[request.id] for request in requests]

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None, "nothing to sample with"
        return self.engine

    def _own(self, requests: Sequence[Request]) -> list[Request]:
        """This model copy's part."""
        copies, own = self.groups.plan.data_parallel, []
        group, before = -1, None
        for request in requests:
            group, before = (group if request.prompt == before else group + 1), request.prompt
            if group % copies == self.groups.data_rank:
                own.append(request)
        return own

    def score(self, samples: Sequence[Sample], reference: bool = False) -> list[npt.NDArray[np.float32]]:
        """Log-probabilities of the responses under the weights as they are, or the reference's."""
        plan = self.stage.plan
        chunks = self.reference if reference else self.state.chunks
        assert chunks is not None, "there is no reference"
        return score(
            chunks,
            samples,
            self.groups,
            temperature=self.stage.rollouts.sampling.temperature,
            vocab_size=self.stage.model.vocab_size,
            tokens_per_micro_batch=plan.tokens_per_micro_batch,
            logits_chunk_tokens=plan.logits_chunk_tokens,
        )

    def update(self, samples: Sequence[Sample], learning_rate: float, updates_before: int) -> UpdateResult:
        """One optimizer step."""
        plan = self.stage.plan
        return policy_update(
            self.state,
            self.stage.objective,
            samples,
            temperature=self.stage.rollouts.sampling.temperature,
            vocab_size=self.stage.model.vocab_size,
            tokens_per_micro_batch=plan.tokens_per_micro_batch,
            logits_chunk_tokens=plan.logits_chunk_tokens,
            learning_rate=learning_rate,
            seed=self.stage.seed,
            updates_before=updates_before,
            informative_only=plan.skip_uninformative,
        )
