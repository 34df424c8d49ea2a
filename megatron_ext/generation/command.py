"""`megatron-ext generate`: what a checkpoint says to a prompt, on one rank, without a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_ext import device as devices
from megatron_ext.checkpoint.folder import named_checkpoint
from megatron_ext.checkpoint.weights import load_chunks
from megatron_ext.config.base import from_json
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.rl import Sampling
from megatron_ext.conversion.assets import read_assets
from megatron_ext.distributed import process_groups
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.generation.engine import Generation, Request, generate_all
from megatron_ext.generation.megatron_engine import MegatronEngine
from megatron_ext.provenance import MANIFEST, read_manifest
from megatron_ext.tasks.templates import template as named_template
from megatron_ext.tokenizer import Tokenizer, tokenizer_of_files

MOST_SLOTS = 64  # responses sampled at a time
FINISHES = {"end": "ended its text", "stop": "reached a stop string", "length": "was cut off"}


def generate_command(
    checkpoint: Path,
    prompt: str,
    template: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    samples: int,
    seed: int,
    device: devices.Kind,
    bos: bool = False,
) -> None:
    """Print `samples` responses of a published checkpoint, or a run's newest, with the tokenizer that it carries.

    `template` None puts the prompt as it is. `bos`: whether it opens with the tokenizer's BOS, as the documents of the training
    did. FP32 on a CPU, BF16 on a GPU. `ConfigError` for settings that cannot be, and for what does not fit the model's positions;
    `CheckpointError` and `DataError` where checkpoint or tokenizer cannot be used.
    """
    if samples < 1:
        raise ConfigError(f"--samples: is {samples}, must be at least 1")
    path = named_checkpoint(checkpoint)
    tokenizer, model = _tokenizer_and_model(path)
    stop_strings: tuple[str, ...] = ()
    if template is not None:
        wanted = named_template(template)
        prompt, stop_strings = wanted.prompt(prompt), wanted.stop_strings
    ids = tuple(_ids(tokenizer, prompt, bos))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    requests = [Request(number, ids, max_tokens, sampling, seed, stop_strings) for number in range(samples)]
    devices.activate(device, torch.get_num_threads())
    with process_groups(TrainPlan(device=device)) as groups:
        chunks = load_chunks(path, model, "fp32" if device == "cpu" else "bf16", groups)
        found = generate_all(MegatronEngine(chunks, model, groups, tokenizer, min(samples, MOST_SLOTS)), requests)
    _show(path, prompt, len(ids), found)


def _tokenizer_and_model(checkpoint: Path) -> tuple[Tokenizer, ModelConfig]:
    model: ModelConfig = from_json(ModelConfig, read_manifest(checkpoint).model, f"{checkpoint / MANIFEST}: model")
    tokenizer = tokenizer_of_files(read_assets(checkpoint))
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{checkpoint}: its tokenizer has ids up to {tokenizer.vocab_size - 1:,}, its model {model.vocab_size:,} rows: they do not "
            f"belong together; use another checkpoint of the run"
        )
    return tokenizer, model


def _ids(tokenizer: Tokenizer, prompt: str, bos: bool) -> list[int]:
    if bos and tokenizer.bos_id is None:
        raise ConfigError("--bos: the tokenizer has no beginning-of-sequence token; leave the flag out")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--prompt: is not UTF-8 text ({error.reason} at character {error.start}); give other text") from None
    return [*([tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []), *tokenizer.encode(prompt)]


def _show(checkpoint: Path, prompt: str, prompt_tokens: int, found: Sequence[Generation]) -> None:
    print(f"checkpoint {checkpoint}\nprompt     {prompt!r} ({prompt_tokens} tokens)")
    for number, one in enumerate(found, start=1):
        print(f"\nresponse {number} of {len(found)}: {len(one.tokens)} tokens, {FINISHES[one.finish]}\n{one.text}")
