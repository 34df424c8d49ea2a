"""`megatron-ext convert check CKPT DIR`: is this folder that checkpoint? Tensors by their digests, then logits of a prompt.

The logits are Megatron's from the checkpoint and transformers' from the folder, one model in memory at a time.

Shapes: B sequences (one), S sequence, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.checkpoint.folder import named_checkpoint
from megatron_ext.checkpoint.stream_reading import CheckpointReader
from megatron_ext.config.base import from_json
from megatron_ext.config.hugging_face import contradictions, model_from_config
from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion.assets import carried, has_tokenizer
from megatron_ext.conversion.compare_logits import LogitsApart, checkpoint_logits_BSV, compare_logits, folder_logits_BSV
from megatron_ext.conversion.compare_tensors import Compared, compare_tensors
from megatron_ext.conversion.source import CONFIG, Source, open_source
from megatron_ext.conversion.to_hugging_face import refuse_other_model
from megatron_ext.errors import CheckpointError, DataError
from megatron_ext.provenance import MANIFEST, read_manifest
from megatron_ext.tokenizer import Tokenizer, load_tokenizer, tokenizer_of_files

MOST_SHOWN = 5  # tensors by name
MOST_IDS = 12


@dataclass(frozen=True)
class Prompt:
    """A text, encoded by the folder's tokenizer."""

    text: str
    ids: list[int]
    tokenizer: Tokenizer
    difference: str  # how the checkpoint's tokenizer encodes it otherwise; '' where it does not


def check_command(checkpoint: Path, folder: Path, prompt: str, tensors_only: bool = False) -> None:
    """Print how a published checkpoint, or a run's newest, and a Hugging Face folder compare.

    `CheckpointError` where they differ: in what the configs say, a tensor, a name, a token of the prompt, or a
    logit by more than rounding; and where the checkpoint is not of its own manifest's model. `DataError` and
    `ConfigError` where the folder or the prompt cannot be used.
    """
    checkpoint = named_checkpoint(checkpoint)
    manifest = read_manifest(checkpoint)
    model: ModelConfig = from_json(ModelConfig, manifest.model, f"{checkpoint / MANIFEST}: model")
    reader, source = CheckpointReader(checkpoint), open_source(folder)
    refuse_other_model(reader, model)
    wrong = _configs(model, source)
    encoded = None if tensors_only else _encode(checkpoint, manifest.tokenizer_hash, folder, model, prompt)
    found = compare_tensors(reader, model, source)
    wrong += _tensors(found)
    if encoded and encoded.difference:
        print(f"tokens    {encoded.difference}")
        wrong.append("its tokenizer is another")
    if encoded is None or (reason := _no_logits(found, encoded)):
        print(f"logits    not compared: {reason if encoded else '--tensors-only'}")
    else:
        wrong += _logits(checkpoint, folder, model, found, encoded)
    if wrong:
        raise CheckpointError(f"{folder}: differs from {checkpoint}: {'; '.join(wrong)}")
    print("verdict   the same model")


# --- each prints its lines, and returns in words what differs ------------------------------------------


def _configs(model: ModelConfig, source: Source) -> list[str]:
    found = model_from_config(source.config, str(source.folder / CONFIG), model.name)
    said = contradictions(model, found, "the checkpoint")
    print(f"config    {'; '.join(said) or 'the same model'}")
    return said


def _tensors(found: Compared) -> list[str]:
    count = found.equal + found.converted + found.rounded + len(found.different)
    dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found.dtypes))
    converted = f", {found.converted:,} equal in another dtype ({dtypes})" if found.converted else ""
    rounded = f", {found.rounded:,} equal once rounded to {dtypes}" if found.rounded else ""
    print(f"tensors   {count:,} compared: {found.equal:,} bit-equal{converted}{rounded}, {len(found.different):,} different")
    worst = sorted(found.different, key=lambda one: -one.largest)
    for one in worst[:MOST_SHOWN]:
        print(f"          {one.name}: {one.largest:.3g} apart: {one.text}")
    for what, names in (("missing in the folder", found.missing), ("in the folder alone", found.unknown)):
        if names:
            print(f"          {len(names):,} {what}: {', '.join(names[:MOST_SHOWN])}{', ...' if len(names) > MOST_SHOWN else ''}")
    print(f"digest    sha256 {found.sha256} of the folder's tensors, by name")
    rows = (("different", [one.name for one in worst]), ("missing", found.missing), ("in the folder alone", found.unknown))
    return [f"{len(names):,} tensor(s) {what}, first {names[0]}" for what, names in rows if names]


def _no_logits(found: Compared, prompt: Prompt) -> str:
    """Why logits are not compared; '' where they are."""
    if not found.complete:
        return "the two do not hold the same tensors"
    if prompt.difference:
        return "the tokenizers differ"
    return "the folder's tensors are rounded to several dtypes" if found.rounded and len(found.dtypes) > 1 else ""


def _logits(checkpoint: Path, folder: Path, model: ModelConfig, tensors: Compared, prompt: Prompt) -> list[str]:
    """Where the folder's weights are the checkpoint's in a lower dtype, the checkpoint's are rounded to it first."""
    tokens_BS = torch.tensor([prompt.ids])
    folder_BSV = folder_logits_BSV(folder, tokens_BS)
    gc.collect()  # the first model's memory, before the second is built
    rounded_to = next(iter(tensors.dtypes)) if tensors.rounded else None
    found = compare_logits(checkpoint_logits_BSV(checkpoint, model, tokens_BS, rounded_to), folder_BSV)
    if not math.isfinite(found.largest_logit):
        print("logits    not compared: they are not finite, as the weights hold NaN or infinite numbers")
        return ["its logits are not finite"]
    print(f"prompt    {prompt.text!r} ({len(prompt.ids)} tokens)")
    print(
        f"logits    {found.largest:.2e} apart at most, at position {found.position} for token {found.token_id}; "
        f"up to {found.bound:.1e} is rounding (the largest logit is {found.largest_logit:.3g})"
    )
    _next_tokens(found, prompt.tokenizer)
    return [] if found.same else [f"logits {found.largest:.2e} apart, above {found.bound:.1e}"]


def _next_tokens(found: LogitsApart, tokenizer: Tokenizer) -> None:
    ours, theirs = ("  ".join(f"{tokenizer.decode([one])!r} ({one})" for one in ids) for ids in (found.next_ids, found.next_ids_of_folder))
    agree = found.next_ids == found.next_ids_of_folder
    print(f"next      {ours}" + ("" if agree else f"\n          {theirs} by the folder's model"))


# --- the prompt ---------------------------------------------------------------------------------------


def _encode(checkpoint: Path, tokenizer_hash: str, folder: Path, model: ModelConfig, text: str) -> Prompt:
    """The prompt's ids, before anything is compared; `DataError` where they cannot be used."""
    try:
        text.encode()
        tokenizer = load_tokenizer(folder)
    except UnicodeEncodeError as error:
        raise DataError(f"--prompt: is not UTF-8 text ({error.reason} at character {error.start}); give other text") from None
    except DataError as error:
        raise DataError(f"{error}; or add --tensors-only, which needs no tokenizer") from None
    ids = _ids(tokenizer, text)
    if not ids:
        raise DataError("--prompt: is no token at all; give some text")
    if len(ids) > model.max_positions:
        raise DataError(f"--prompt: has {len(ids):,} tokens, the model {model.max_positions:,} positions; shorten it")
    if max(ids) >= model.vocab_size:
        raise DataError(
            f"{folder}: its tokenizer gives id {max(ids):,}, the model has {model.vocab_size:,} rows; put this model's tokenizer there, "
            f"or add --tensors-only"
        )
    return Prompt(text, ids, tokenizer, _difference(checkpoint, tokenizer_hash, tokenizer, text, ids))


def _difference(checkpoint: Path, tokenizer_hash: str, tokenizer: Tokenizer, text: str, ids: list[int]) -> str:
    """How the checkpoint's tokenizer, or all that a checkpoint without one knows of it, is not the folder's; '' where it is."""
    if tokenizer_hash in ("", tokenizer.identity_hash):
        return ""
    assets = carried(checkpoint)
    said = f"the folder's tokenizer is {tokenizer.identity_hash[:12]}, the checkpoint's {tokenizer_hash[:12]}"
    own_ids = _ids(tokenizer_of_files(assets), text) if has_tokenizer(assets) else ids
    return said if own_ids == ids else f"{said}: {_shown(ids)} by the folder's, {_shown(own_ids)} by the checkpoint's"


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Plain text behind the token that begins documents, where there is one: what a base model has learned from."""
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text)]


def _shown(ids: list[int]) -> str:
    return f"{' '.join(str(one) for one in ids[:MOST_IDS])}{' ...' if len(ids) > MOST_IDS else ''} ({len(ids)} tokens)"
