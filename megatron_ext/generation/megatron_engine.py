"""The engine that samples with the trainer's own parameters, where they lie: any TP, PP and virtual PP, on gloo or NCCL.

One engine a model copy. Each of its ranks keeps the same books, and the rank that has the logits tells the others what it drew.
Requests come and go one by one: rows 0 to B - 1 of the batch run, an ended one's row is taken by the last, a waiting one gets the
next. A prompt's tokens but the last are computed in one pass when it is admitted, or copied from a running request with the same
prompt; the last goes through the next step with everybody else's, so that tokens are sampled in one place.

Shapes: B running requests, T tokens of a pass laid flat, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_ext.config.model import ModelConfig
from megatron_ext.distributed import Groups
from megatron_ext.errors import TrainingError
from megatron_ext.generation.engine import EngineStats, Generation, Request
from megatron_ext.generation.lean_model import LeanModel
from megatron_ext.generation.running import Running, check_requests
from megatron_ext.generation.sampling import Drawn, sample, uniform
from megatron_ext.generation.stopping import StopStrings
from megatron_ext.model.bucket import Bucket
from megatron_ext.tokenizer import Tokenizer

PREFILL_TOKENS = 8192  # of a pass, padding included: bounds the memory of its activations
DAMAGED = -1  # a token that stands for logits that are not numbers


class MegatronEngine:
    """See `generation.engine.Engine`. `slots` requests run at a time, at most."""

    def __init__(self, chunks: Sequence[GPTModel], model: ModelConfig, groups: Groups, tokenizer: Tokenizer, slots: int) -> None:
        assert slots >= 1, "an engine without slots answers nothing"
        assert groups.plan.context == 1, "a context-parallel rank sees a part of each sequence"
        self._model, self._groups, self._tokenizer, self._slots = model, groups, tokenizer, slots
        self._lean = LeanModel(chunks, model, groups)
        self._cache = self._lean.empty_cache()
        self._waiting: deque[Request] = deque()
        self._running: list[Running] = []  # by row
        self._stops: dict[tuple[str, ...], StopStrings | None] = {(): None}
        self._stats = EngineStats()
        self._num_updates = 0
        copy = dist.get_process_group_ranks(groups.collection.mp)
        self._copy = groups.collection.mp if len(copy) > 1 else None
        self._sampler = copy[-groups.plan.tensor]  # tensor-parallel rank 0 of the last stage

    def submit(self, requests: Sequence[Request]) -> None:
        """See `Engine.submit`."""
        check_requests(requests, self._model)
        for strings in {request.stop_strings for request in requests} - self._stops.keys():
            self._stops[strings] = StopStrings(self._tokenizer, strings)
        self._waiting.extend(requests)

    @torch.inference_mode()
    def poll(self) -> list[Generation]:
        """See `Engine.poll`."""
        start = time.perf_counter()
        ended: list[Generation] = []
        while not ended and (self._waiting or self._running):
            self._admit()
            ended = self._step()
        if not self._running:
            self._cache.clear()  # until the next batch the memory is the trainer's
        self._count(busy_seconds=time.perf_counter() - start)
        return ended

    def update_weights(self, version: int, tensors: Iterable[Bucket] | None) -> None:
        """See `Engine.update_weights`; there is nothing to take over here, only the version changes."""
        assert tensors is None, "this engine samples with the trainer's own tensors, it takes no others"
        self._stats = replace(self._stats, weight_version=version)
        self._num_updates += 1

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return self._stats

    def close(self) -> None:
        """See `Engine.close`."""
        self._waiting.clear()
        self._running.clear()
        self._cache.clear()

    def _count(self, **more: float) -> None:
        self._stats = replace(self._stats, **{key: getattr(self._stats, key) + number for key, number in more.items()})

    # ---- requests come

    def _admit(self) -> None:
        """Give free rows to waiting requests, with their prompts' keys and values."""
        first = len(self._running)
        for _ in range(min(self._slots - first, len(self._waiting))):
            request = self._waiting.popleft()
            self._running.append(Running(request, self._stops[request.stop_strings], self._num_updates))
        if len(self._running) == first:
            return
        self._reserve(max(len(running.request.prompt) for running in self._running[first:]))
        sources = self._prompts_in_cache(first)
        copies: dict[int, list[int]] = {}
        fills: list[int] = []
        for row in range(first, len(self._running)):
            prompt = self._running[row].request.prompt
            if prompt in sources:
                copies.setdefault(sources[prompt], []).append(row)
            else:
                sources[prompt] = row
                fills.append(row)
        self._prefill(fills)
        for source, targets in copies.items():
            self._cache.copy_row(source, targets, len(self._running[source].request.prompt) - 1)
        self._count(prompt_tokens=len(self._running) - first)  # each one's last token

    def _prompts_in_cache(self, num_rows: int) -> dict[tuple[int, ...], int]:
        """The first rows' prompts that these weights computed."""
        held = list(enumerate(self._running[:num_rows]))
        return {running.request.prompt: row for row, running in held if running.prefix_age == self._num_updates}

    def _prefill(self, rows: Sequence[int]) -> None:
        """Compute keys and values of prompts but for their last tokens; of a similar length together."""
        lengths = {row: len(self._running[row].request.prompt) - 1 for row in rows}
        batch: list[int] = []
        for row in sorted((row for row in rows if lengths[row]), key=lengths.__getitem__):
            if batch and (len(batch) + 1) * lengths[row] > PREFILL_TOKENS:
                self._prefill_pass(batch, lengths[batch[-1]])
                batch = []
            batch.append(row)
        if batch:
            self._prefill_pass(batch, lengths[batch[-1]])
        self._count(prompt_tokens=sum(lengths.values()))

    def _prefill_pass(self, rows: Sequence[int], length: int) -> None:
        prompts = [self._running[row].request.prompt[:-1] for row in rows]
        filled = [prompt + (0,) * (length - len(prompt)) for prompt in prompts]
        tokens_T = torch.tensor(filled, device=self._groups.device).flatten()
        self._lean.forward(tokens_T, self._cache.prefill(rows, length), with_logits=False)

    def _reserve(self, num_positions: int) -> None:
        most = max(len(running.request.prompt) + running.request.cap_tokens for running in self._running)
        self._cache.reserve(len(self._running), num_positions, most)

    # ---- a token each

    def _step(self) -> list[Generation]:
        """Sample the next token of every running request; those that ended."""
        running = self._running
        positions = [one.position for one in running]
        self._reserve(max(positions) + 1)
        tokens_B = torch.tensor([one.last for one in running], device=self._groups.device)
        logits_BV = self._lean.forward(tokens_B, self._cache.decode(positions), with_logits=True)
        tokens, logprobs = self._drawn(logits_BV)
        self._count(decode_steps=1, response_tokens=len(running))
        self._stats = replace(self._stats, longest_batch=max(self._stats.longest_batch, len(running)))
        version, ended = self._stats.weight_version, {}
        for row, one in enumerate(running):
            generation = one.take(tokens[row], logprobs[row], version, self._tokenizer)
            if generation is not None:
                ended[row] = generation
        self._remove(list(ended))
        return list(ended.values())

    def _drawn(self, logits_BV: torch.Tensor | None) -> tuple[list[int], list[float]]:
        """The drawn tokens and their log-probabilities on every rank of the copy; `TrainingError` on all of them alike."""
        found_2B = torch.empty(2, len(self._running), dtype=torch.float64, device=self._groups.device)  # holds both exactly
        problem: TrainingError | None = None
        if self._groups.rank == self._sampler:
            assert logits_BV is not None
            try:
                drawn = self._sample(logits_BV)
                found_2B[0], found_2B[1] = drawn.tokens_B, drawn.logprobs_B
            except TrainingError as raised:  # the other ranks wait for an answer
                problem = raised
                found_2B.fill_(DAMAGED)
        if self._copy is not None:
            dist.broadcast(found_2B, src=self._sampler, group=self._copy)
        tokens, logprobs = found_2B.tolist()
        if DAMAGED in tokens:
            raise problem or TrainingError(f"rank {self._sampler} found logits that are not finite; its message says where")
        return [int(token) for token in tokens], logprobs

    def _sample(self, logits_BV: torch.Tensor) -> Drawn:
        samplings = [one.request.sampling for one in self._running]
        uniforms = [uniform(one.request.seed, one.request.id, len(one.tokens)) for one in self._running]
        return sample(logits_BV, samplings, uniforms)

    def _remove(self, rows: Sequence[int]) -> None:
        """Free the rows of ended requests: the last ones move there, so that no step computes what nobody waits for."""
        for row in sorted(rows, reverse=True):
            last = len(self._running) - 1
            if row != last:
                self._cache.copy_row(last, [row], self._running[last].position)
                self._running[row] = self._running[last]
            self._running.pop()
