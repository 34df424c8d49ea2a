"""`megatron-ext generate`: what a checkpoint says to a prompt, on one rank, without a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.checkpoint.folder import named_checkpoint
from megatron_ext.config.base import from_json
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import Device, TrainPlan
from megatron_ext.config.rl import Sampling
from megatron_ext.conversion.assets import read_assets
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.provenance import MANIFEST, read_manifest
from megatron_ext.tasks.prompts import check_stop_strings
from megatron_ext.tasks.templates import template as named_template
from megatron_ext.tokenizer import Tokenizer, tokenizer_of_files

if TYPE_CHECKING:
    from megatron_ext.generation.engine import Generation

MOST_SLOTS = 64  # responses sampled at a time
FINISHES = {"end": "ended its text", "stop": "reached a stop string", "length": "was cut off"}
MARGIN = "  | "  # before each line of a response, so that blank ones can be seen


@dataclass(frozen=True)
class _Asked:
    """All that is wanted of a model."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_strings: tuple[str, ...]
    samples: int
    seed: int


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
    device: Device,
    bos: bool = False,
) -> None:
    """Print `samples` responses of a published checkpoint, or a run's newest, with the tokenizer that it carries.

    `template` None puts the prompt as it is. `bos`: whether it opens with the tokenizer's BOS, as the documents of the training
    did. FP32 on a CPU, BF16 on a GPU. `ConfigError` for settings that cannot be, and for what does not fit the model's positions;
    `CheckpointError` and `DataError` where checkpoint or tokenizer cannot be used. All that needs no torch is checked before it is
    loaded, which takes seconds.
    """
    for option, number in (("--samples", samples), ("--max-tokens", max_tokens)):
        if number < 1:
            raise ConfigError(f"{option}: is {number}, must be at least 1")
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"--seed: is {seed}, must fit 64 bits")
    sampling = _sampling(temperature, top_p, top_k)
    path = named_checkpoint(checkpoint)
    tokenizer, model = _tokenizer_and_model(path)
    stop_strings: tuple[str, ...] = ()
    if template is not None:
        wanted = named_template(template)
        prompt, stop_strings = wanted.prompt(prompt), wanted.stop_strings
        check_stop_strings(tokenizer, stop_strings, f"--template {template}")
    ids = tuple(_ids(tokenizer, prompt, bos))
    _check_positions(model, len(ids), max_tokens)
    found = _responses(path, tokenizer, model, _Asked(ids, max_tokens, sampling, stop_strings, samples, seed), device)
    _show(path, prompt, len(ids), found)


def _sampling(temperature: float, top_p: float, top_k: int | None) -> Sampling:
    """`ConfigError` names the option."""
    for option, value in (("temperature", {"temperature": temperature}), ("top-p", {"top_p": top_p}), ("top-k", {"top_k": top_k})):
        try:
            Sampling(**value)
        except ConfigError as refusal:
            raise ConfigError(f"--{option}: {str(refusal).removeprefix('sampling: ')}") from None
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p)


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
    ids = [*([tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []), *tokenizer.encode(prompt)]
    if not ids:
        raise ConfigError("--prompt: is empty, and there is nothing to go on from; give some text, or --bos")
    return ids


def _check_positions(model: ModelConfig, prompt_tokens: int, max_tokens: int) -> None:
    room = model.max_positions - prompt_tokens
    if room < 1:
        raise ConfigError(f"--prompt: has {prompt_tokens:,} tokens, and the model {model.max_positions:,} positions; give a shorter one")
    if max_tokens > room:
        raise ConfigError(
            f"--max-tokens: {prompt_tokens:,} tokens of prompt + {max_tokens:,} = {prompt_tokens + max_tokens:,}, but the model has "
            f"{model.max_positions:,} positions; ask for at most {room:,}"
        )


def _responses(path: Path, tokenizer: Tokenizer, model: ModelConfig, asked: _Asked, device: Device) -> list[Generation]:
    """Load the weights, and sample. What needs torch is imported here."""
    import torch

    from megatron_ext import device as devices
    from megatron_ext.checkpoint.weights import load_chunks
    from megatron_ext.distributed import process_groups
    from megatron_ext.generation.engine import Request, generate_all
    from megatron_ext.generation.megatron_engine import MegatronEngine

    requests = [
        Request(number, asked.prompt, asked.max_tokens, asked.sampling, asked.seed, asked.stop_strings) for number in range(asked.samples)
    ]
    devices.activate(device, torch.get_num_threads())
    with process_groups(TrainPlan(device=device)) as groups:
        chunks = load_chunks(path, model, "fp32" if device == "cpu" else "bf16", groups)
        return generate_all(MegatronEngine(chunks, model, groups, tokenizer, min(asked.samples, MOST_SLOTS)), requests)


def _show(checkpoint: Path, prompt: str, prompt_tokens: int, found: Sequence[Generation]) -> None:
    print(f"checkpoint {checkpoint}\nprompt     {prompt!r} ({prompt_tokens} tokens)")
    for number, one in enumerate(found, start=1):
        print(f"\nresponse {number} of {len(found)}: {len(one.tokens)} tokens, {FINISHES[one.finish]}\n{_marked(one.text)}")


def _marked(text: str) -> str:
    """A response's lines behind a margin, control characters as Python writes them; so all of one that has nothing visible: '\\n\\n'."""
    if not text.strip():
        return MARGIN + repr(text)
    return "\n".join(MARGIN + "".join(map(_visible, line)) for line in text.split("\n"))


def _visible(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]
