"""vLLM in this process on the CPU, and Megatron's greedy text to compare it with.

Shapes: B prompts, S sequence, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Read by vLLM and torch when they are imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TORCHDYNAMO_DISABLE="1",  # the sampler is compiled even in eager mode: 15 s, and a C++ compiler
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process: no start of another, and weights go in as they are
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)
NEW_TOKENS = 64
ROUNDING = 1e-4  # two logits that are closer may change places; also what log-probabilities may be apart
MOST_TIES = 1  # prompts of a family whose comparison may end early


@dataclass(frozen=True)
class Drawn:
    """Greedy tokens of one prompt, and each one's log-probability; `margin` is the lead over the second likeliest, `text` vLLM's."""

    prompt_ids: list[int]
    ids: list[int]
    log_probabilities: list[float]
    margins: tuple[float, ...] = ()
    text: str = ""


@contextmanager
def engine(folder: Path) -> Iterator[Any]:
    """vLLM with the weights and the tokenizer of an exported folder."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder), dtype="float32", max_model_len=128, max_num_seqs=8, enforce_eager=True, distributed_executor_backend="uni", seed=0
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()  # now, not when Python forgets it: by then another engine may have its groups
        cleanup_dist_env_and_memory()


def greedy_vllm(llm: Any, prompts: Sequence[str]) -> list[Drawn]:
    """What vLLM writes, past any token that would end it."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True, skip_special_tokens=False)
    found = []
    for request in llm.generate(list(prompts), settings, use_tqdm=False):
        output = request.outputs[0]
        ids = list(output.token_ids)
        values = [place[token].logprob for place, token in zip(output.logprobs, ids, strict=True)]
        found.append(Drawn(list(request.prompt_token_ids), ids, values, text=output.text))
    return found


def greedy_megatron(chunks: list[Any], groups: Any, vocab_size: int, prompts: Sequence[Sequence[int]]) -> list[Drawn]:
    """What the running model writes, each token from a full forward pass; the same on every rank of its copy."""
    from megatron_ext.model.logits import logits_BSV

    ends = torch.tensor([len(prompt) for prompt in prompts])
    rows = torch.arange(len(prompts))
    tokens_BS = torch.zeros(len(prompts), int(ends.max()) + NEW_TOKENS, dtype=torch.long)  # what stands behind a text changes nothing
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = torch.tensor(prompt)
    values, margins = [], []
    for step in range(NEW_TOKENS):
        logits = logits_BSV(chunks, tokens_BS[:, : int(ends.max()) + step], groups, vocab_size)
        best = logits[rows, ends + step - 1].log_softmax(dim=-1).topk(2)
        tokens_BS[rows, ends + step] = best.indices[:, 0]
        values.append(best.values[:, 0])
        margins.append(best.values[:, 0] - best.values[:, 1])
    values_BS, margins_BS = torch.stack(values, dim=1).tolist(), torch.stack(margins, dim=1).tolist()
    ids_BS = [tokens_BS[row, end : end + NEW_TOKENS].tolist() for row, end in enumerate(ends)]
    return [Drawn(list(prompts[row]), ids_BS[row], values_BS[row], tuple(margins_BS[row])) for row in range(len(prompts))]


def differences(vllm: Sequence[Drawn], megatron: Sequence[Drawn]) -> tuple[list[str], int]:
    """Where vLLM did not write what Megatron wrote, in words, and how many prompts ended early at a tie."""
    wrong, ties = [], 0
    for theirs, own in zip(vllm, megatron, strict=True):
        if theirs.prompt_ids != own.prompt_ids:
            wrong.append(f"prompt {theirs.prompt_ids} instead of {own.prompt_ids}")
            continue
        drawn = zip(theirs.ids, own.ids, theirs.log_probabilities, own.log_probabilities, own.margins, strict=True)
        for place, (token, expected, value, own_value, margin) in enumerate(drawn):
            if token != expected and margin < ROUNDING:
                ties += 1
                break
            if token != expected or abs(value - own_value) > ROUNDING:
                wrong.append(f"place {place}: token {token} ({value:.5f}) instead of {expected} ({own_value:.5f})")
                break
    return wrong, ties
