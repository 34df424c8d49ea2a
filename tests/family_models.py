"""Random tiny models of every family: as transformers computes them, converted, and loaded on the ranks of a layout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from tests import ranks
from tests.small_models import VOCAB_SIZE, random_model
from tests.unit import small_tokenizers

# Times the random queries and keys: else attention is nearly even, and a wrong RoPE hardly shows. With 4 rounding alone comes to 1e-5:
# transformers in FP32 is then that far from transformers in FP64, and so is Megatron.
SHARPER = 2.0
Change = tuple[tuple[str, Any], ...]  # fields of a ModelConfig, to be wrong on purpose


def llama3(factor: float) -> dict[str, Any]:
    """Llama 3's RoPE scaling as transformers takes it."""
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, **fixed}


def base(theta: float) -> dict[str, Any]:
    """Unscaled RoPE."""
    return {"rope_type": "default", "rope_theta": theta}


@dataclass(frozen=True)
class Case:
    """Tokens, and a converted model to compute them with, changed or as it is."""

    checkpoint: str
    tokens: list[list[int]]
    change: Change = ()


def sharp_model(family: str, queries: float = SHARPER, others: float = 1.0, **config: Any) -> Any:
    """A random transformers model in which it matters where a token stands.

    Its queries and keys are scaled by `queries`, all other projections by `others`.
    """
    model = random_model(family, **config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                weight.mul_(queries if name.endswith(("q_proj.weight", "k_proj.weight")) else others)
    return model


def save(model: Any, path: Path) -> Path:
    """A model as the hub holds one, with a tokenizer."""
    model.save_pretrained(path)
    names = {"bos_token": small_tokenizers.BEGINNING, "eos_token": small_tokenizers.END, "tokenizer_class": "PreTrainedTokenizerFast"}
    small_tokenizers.hugging_face(path, VOCAB_SIZE, names=names)
    return path


def convert(model: Any, path: Path) -> str:
    """Save and convert a transformers model; the checkpoint's path."""
    from megatron_ext.conversion.to_megatron import hf_to_megatron

    source = save(model, path / "hugging_face")
    return str(hf_to_megatron(str(source), path / "checkpoint", None, False, False))


def random_tokens(sequences: int, length: int, vocab_size: int, seed: int = 1) -> torch.Tensor:
    """Tokens, no sequence like another."""
    return torch.randint(0, vocab_size, (sequences, length), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Products this small are many times slower on several threads, which wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def transformers_logits(model: Any, tokens: torch.Tensor, attention: str = "eager") -> torch.Tensor:
    """What transformers computes; in 'eager' attention every product is written out in Python."""
    model.set_attn_implementation(attention)
    with torch.no_grad(), one_thread():
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


def transformers_text(model: Any, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Prompts with what transformers generates greedily behind them; no end of text stops it."""
    model.generation_config.eos_token_id = None
    with one_thread():
        written: torch.Tensor = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new_tokens)
    assert written.shape == (prompts.shape[0], prompts.shape[1] + new_tokens)
    return written


def megatron_logits(plan: TrainPlan, cases: Sequence[Case]) -> list[torch.Tensor]:
    """What a layout's ranks compute of each case, from the converted checkpoint; every rank must have the same."""
    per_rank = ranks.run(_logits, plan, list(cases))
    for other in per_rank[1:]:
        assert all((one == two).all() for one, two in zip(per_rank[0], other, strict=True)), "ranks hold different logits"
    return [torch.from_numpy(array) for array in per_rank[0]]


def _logits(groups: Any, cases: list[Case]) -> list[Any]:
    from megatron_ext.model.logits import logits_BSV

    found = []
    for case in cases:
        chunks, model = loaded(groups, case)
        found.append(logits_BSV(chunks, torch.tensor(case.tokens), groups, model.vocab_size).numpy())
    return found


def loaded(groups: Any, case: Case) -> tuple[Any, ModelConfig]:
    """The model that a checkpoint says it is, but for the change, with its weights."""
    from megatron_ext.checkpoint.load import load_state
    from megatron_ext.checkpoint.weights import fill, sharded_weights
    from megatron_ext.distributed import seed_step
    from megatron_ext.model.build import build_model

    manifest = json.loads((Path(case.checkpoint) / "manifest.json").read_text())
    model = replace(ModelConfig(**manifest["model"]), **dict(case.change))
    seed_step(groups, 0, 0)
    chunks = build_model(model, "fp32", groups, None)
    fill(chunks, load_state(sharded_weights(chunks), Path(case.checkpoint)))
    return chunks, model
