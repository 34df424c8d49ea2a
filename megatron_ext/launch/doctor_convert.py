"""What Convert stages read: is the model here or in the hub's cache, is it the recipe's, has it the corpus' tokenizer.

No torch and no network: of a hub's model only what the local cache holds is looked at.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.config.base import Json
from megatron_ext.config.hugging_face import contradictions, model_from_config, parse_config
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.model_source import (
    CONFIG,
    TOKENIZERS,
    HubModel,
    absent_files,
    cached_snapshot,
    read_source,
    weight_files,
)
from megatron_ext.config.stages import ConvertStage, TrainStage, inputs
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.launch.doctor_inputs import hugging_face_vocabulary
from megatron_ext.launch.doctor_weights import weight_problems
from megatron_ext.launch.findings import Finding, error, ok, warning
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.plan import converted_bytes
from megatron_ext.launch.plan_words import size

TOKENIZER = TOKENIZERS[0]
AGAIN = "fetch it again"


def convert_findings(graph: Graph, stages: Sequence[Any]) -> list[Finding]:
    """Findings on each Convert stage of these."""
    return [finding for stage in stages if isinstance(stage, ConvertStage) for finding in _source(graph, stage)]


def _source(graph: Graph, stage: ConvertStage) -> list[Finding]:
    try:
        source = read_source(stage.model_id, stage.revision)
    except ConfigError as refusal:
        return [error("source", str(refusal), stage=stage.name)]
    if isinstance(source, Path):
        return _folder(graph, stage, source)
    cached = cached_snapshot(source)
    if cached and _is_part(cached, stage.allow_pickle):
        cached = None  # other programs fetch a config or a tokenizer alone; the stage fetches the rest
    return [*_hub(stage, source, cached), *(_folder(graph, stage, cached) if cached else [])]


def _is_part(folder: Path, allow_pickle: bool) -> bool:
    try:
        return bool(absent_files(folder, allow_pickle))
    except DataError:
        return False  # `_folder` says what is wrong


def _hub(stage: ConvertStage, model: HubModel, cached: Path | None) -> list[Finding]:
    """Whether the cache holds a hub's model, and whether its name will mean the same tomorrow."""
    from huggingface_hub import constants

    found = []
    if not model.is_pinned:
        way_out = f"{stage.name}.revision={cached.name}" if cached else f"{stage.name}.revision=COMMIT, from {_page(model)}/commits/main"
        name = model.revision or constants.DEFAULT_REVISION
        text = f"{model.name}: '{name}' is no commit and may come to mean another"
        found.append(warning("revision", text + (f"; in the cache it is {cached.name}" if cached else ""), way_out, stage.name))
    if cached:
        return found
    home = constants.HF_HUB_CACHE
    if constants.is_offline_mode():
        text = f"{model.name}: HF_HUB_OFFLINE is set, and {home} does not hold all of it"
        return [*found, error("source", text, "name a folder that holds the model, or fetch it without HF_HUB_OFFLINE", stage.name)]
    fetched = size(converted_bytes(stage.model))
    text = f"{model.name}: not all of it is in {home}; the stage fetches it, about {fetched}, and needs a network for that"
    revision = f" --revision {model.revision}" if model.revision else ""
    way_out = (
        f"have one there, or fetch it before: hf download {model.name}{revision} --exclude 'original/*' (doctor itself asks no network)"
    )
    return [*found, warning("source", text, way_out, stage.name), *_room(stage, Path(home))]


def _page(model: HubModel) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{model.name}"


def _room(stage: ConvertStage, home: Path) -> list[Finding]:
    """Space for what is fetched, in the cache's file system."""
    there = next(folder for folder in (home, *home.absolute().parents) if folder.is_dir())
    free, need = shutil.disk_usage(there).free, converted_bytes(stage.model)
    if free >= need:
        return []
    return [
        error("source", f"{size(need)} to fetch into {home}, {size(free)} free", "make room, or set HF_HUB_CACHE to another", stage.name)
    ]


def _folder(graph: Graph, stage: ConvertStage, folder: Path) -> list[Finding]:
    file = folder / CONFIG
    try:
        model = model_from_config(parse_config(file.read_bytes(), str(file)), str(file), stage.model.name)
    except FileNotFoundError:
        return [error("source", f"{folder} lacks {CONFIG}", AGAIN, stage.name)]
    except (ConfigError, OSError) as refusal:
        return [error("source", str(refusal), "name another model", stage.name)]
    found = [*_model(stage, model, folder), *_weights(stage, model, folder), *_tokenizer(graph, stage, folder)]
    return found or [ok("source", f"{folder}: config, weights and tokenizer are there and fit the recipe", stage.name)]


def _model(stage: ConvertStage, model: ModelConfig, folder: Path) -> list[Finding]:
    """Whether config.json describes the recipe's model, its vocabulary grown to the tokenizer's where that is asked for."""
    found, ids = [], 0
    if (folder / TOKENIZER).is_file():
        try:
            ids = hugging_face_vocabulary(folder / TOKENIZER)
        except (ValueError, KeyError, TypeError) as cause:
            text = f"{folder / TOKENIZER} is no tokenizer of the tokenizers library ({type(cause).__name__}: {cause})"
            found.append(error("source", text, AGAIN, stage.name))
    if ids > model.vocab_size and not stage.resize_vocabulary:
        text = f"{folder / TOKENIZER} has {ids:,} ids, the embedding {model.vocab_size:,} rows"
        way_out = f"the model's own tokenizer, or {stage.name}.resize_vocabulary=true, which gives new ids the mean of the other rows"
        found.append(error("source", text, way_out, stage.name))
    grown = replace(model, vocab_size=max(model.vocab_size, ids if stage.resize_vocabulary else 0))
    if differences := contradictions(stage.model, grown):
        text = f"{folder / CONFIG} contradicts model {stage.model.name}:\n" + "\n".join(f"  {line}" for line in differences)
        found.append(error("source", text, "correct the recipe's model, or name the model that it describes", stage.name))
    return found


def _weights(stage: ConvertStage, model: ModelConfig, folder: Path) -> list[Finding]:
    try:
        if not stage.allow_pickle and not weight_files(folder, allow_pickle=False) and weight_files(folder, allow_pickle=True):
            text = f"{folder} has its weights as pickles only, which can run code when they are opened"
            return [error("source", text, f"a model with safetensors, or {stage.name}.allow_pickle=true", stage.name)]
        if absent := absent_files(folder, stage.allow_pickle):
            return [error("source", f"{folder} lacks {', '.join(absent)}", AGAIN, stage.name)]
        problems = weight_problems(folder, weight_files(folder, stage.allow_pickle), model)
    except DataError as refusal:
        return [error("source", str(refusal), stage=stage.name)]
    return [error("source", problem, AGAIN, stage.name) for problem in problems]


def _tokenizer(graph: Graph, stage: ConvertStage, folder: Path) -> list[Finding]:
    """Whether the stages that train from this model read text in its ids."""
    readers = [one for one in graph.stages if isinstance(one, TrainStage) and inputs(one).get("start") == stage.name]
    found = []
    for corpus in {reader.corpus: None for reader in readers}:
        named = graph.stage(corpus).tokenizer
        theirs = Path(named) / TOKENIZER if Path(named).is_dir() else Path(named)
        if "/" in named and theirs.name == TOKENIZER and theirs.is_file() and (folder / TOKENIZER).is_file():
            found += _same(stage, corpus, folder / TOKENIZER, theirs)
    return found


def _same(stage: ConvertStage, corpus: str, ours: Path, theirs: Path) -> list[Finding]:
    if ours.read_bytes() == theirs.read_bytes():
        return []
    try:
        same = _identity(ours) == _identity(theirs)
    except ValueError as cause:
        return [error("source", f"{ours} or {theirs} is not JSON ({cause})", AGAIN, stage.name)]
    if same:
        return []
    text = f"{ours} is another tokenizer than {theirs}, which makes {corpus}: the first training stage would refuse the two"
    return [error("source", text, f"{corpus}.tokenizer={ours.parent}", stage.name)]


def _identity(file: Path) -> Json:
    """What sets two tokenizers apart; the other keys are off in training."""
    return {key: value for key, value in json.loads(file.read_bytes()).items() if key not in ("truncation", "padding")}
