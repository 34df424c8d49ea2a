"""The files that hold a Hugging Face model's weights: what their headers say of them, without reading a weight. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.config.base import Json
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.model_source import CONFIG
from megatron_ext.config.safetensors_header import COMPUTED, read_header
from megatron_ext.errors import DataError

TAKEN = ("BF16", "F16", "F32")
SUFFIX = ".safetensors"
HEAD = "lm_head.weight"  # some files hold a tied one all the same


def weight_problems(folder: Path, files: Mapping[str, tuple[str, ...]], model: ModelConfig) -> list[str]:
    """What is wrong with these files, which must be there, as headers tell it; `files` names the tensors that an index places in each.

    Pickles have no header, and are not looked at.
    """
    problems = []
    holder: dict[str, str] = {}
    found_numbers = 0
    for name in (name for name in files if name.endswith(SUFFIX)):
        try:
            header = {tensor: entry for tensor, entry in read_header(folder / name).items() if not COMPUTED.search(tensor)}
        except (DataError, OSError) as problem:
            problems.append(str(problem))
            continue
        problems += [f"{tensor} stands in {holder[tensor]} and in {name} of {folder}" for tensor in sorted(set(header) & set(holder))]
        problems += _contents(folder / name, header, tuple(tensor for tensor in files[name] if not COMPUTED.search(tensor)))
        holder |= dict.fromkeys(header, name)
        found_numbers += sum(
            math.prod(entry["shape"]) for tensor, entry in header.items() if not (tensor == HEAD and model.tied_embeddings)
        )
    if holder and not problems and found_numbers != (expected := _numbers(model)):
        problems.append(f"{folder}: its weights are {found_numbers:,} numbers, those of {CONFIG}'s model {expected:,}")
    return problems


def _numbers(model: ModelConfig) -> int:
    """Parameters without the padding of the vocabulary, which only our checkpoints have."""
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size
    return model.num_parameters - padding * (1 if model.tied_embeddings else 2)


def _contents(file: Path, header: Json, placed: tuple[str, ...]) -> list[str]:
    refused = sorted({str(entry["dtype"]) for entry in header.values()} - set(TAKEN))
    absent, unnamed = sorted(set(placed) - set(header)), sorted(set(header) - set(placed)) if placed else []
    return [
        *([f"{file}: holds {', '.join(refused)}, and only {', '.join(TAKEN)} are taken"] if refused else []),
        *([f"{file}: lacks {_some(absent)}, which its index places there"] if absent else []),
        *([f"{file}: holds {_some(unnamed)}, which its index does not place there"] if unnamed else []),
    ]


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")
