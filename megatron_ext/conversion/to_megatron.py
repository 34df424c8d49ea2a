"""From a Hugging Face folder to a Megatron checkpoint, tensor by tensor: no model is built, every number is moved as it is.

    .NAME.converting/   being written; finished files are kept by the next start
    NAME/               appears by one rename, whole, and loads under any parallel layout

One thread writes the checkpoint while another surveys the source.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ext.checkpoint.hashing import Digests
from megatron_ext.checkpoint.stream_writing import FILE_BYTES, Part, forget_job, write_checkpoint
from megatron_ext.config.base import Json, content_hash, to_json
from megatron_ext.config.hugging_face import contradictions, model_from_config
from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion.assets import export_files, read_assets
from megatron_ext.conversion.hub import find_source
from megatron_ext.conversion.publishing import publish, work_folder
from megatron_ext.conversion.source import CONFIG, Source, Survey, open_source, survey
from megatron_ext.errors import CheckpointError, ConfigError, DataError
from megatron_ext.model.weights import Row, table
from megatron_ext.progress import progress
from megatron_ext.provenance import MANIFEST, Manifest, write_manifest
from megatron_ext.snapshot import code_hash
from megatron_ext.tokenizer import Tokenizer, load_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MEAN_ROWS = 1024  # summed at a time, so that their FP64 copy stays small
STAGE = "convert"  # of the manifest of a checkpoint that no recipe made


@dataclass(frozen=True)
class Imported:
    """A converted model: all of its checkpoint but the manifest."""

    model: ModelConfig
    files: Digests
    tokenizer_hash: str
    record: Json  # for the manifest's `hugging_face`


def hf_to_megatron(
    source: str, target: Path, revision: str | None = None, allow_pickle: bool = False, resize_vocabulary: bool = False
) -> Path:
    """Convert a folder or a model of the hub into the checkpoint folder `target`; returns it.

    After a kill or a full disk the same call goes on with the files that were finished. `CheckpointError` where
    `target` holds anything or the disk refuses; else as `find_source` and `import_model`.
    """
    target = target.resolve()
    _refuse_taken(target)
    found = find_source(source, revision, allow_pickle)
    work = work_folder(target, "converting")
    name = Path(found.name).name if found.revision else found.folder.resolve().name
    imported = import_model(found.folder, work, name=name, allow_pickle=allow_pickle, resize_vocabulary=resize_vocabulary)
    manifest = _manifest(imported, {"source": found.name, "revision": found.revision, **imported.record})
    try:
        write_manifest(work, manifest)
        sizes = {name: size_bytes for name, (size_bytes, _) in manifest.files.items()}
        publish(work, target, {**sizes, MANIFEST: (work / MANIFEST).stat().st_size})
    except OSError as error:
        raise CheckpointError(f"{target}: could not be written: {error}; make room there, and run the same command again") from error
    print(f"converted {found.name} to {target}", flush=True)
    return target


def _refuse_taken(target: Path) -> None:
    named = re.fullmatch(r"iter_([0-9]+)", target.name)
    if named and int(named[1]):
        raise CheckpointError(f"{target}: a converted model is iteration 0, and is not to be taken for another; name another folder")
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: is there already; name a folder that is not, or is empty")


def _manifest(imported: Imported, record: Json) -> Manifest:
    model = to_json(imported.model)
    return Manifest(
        stage=STAGE, graph="", attempt=1, iteration=0, tokens=0, lineage_tokens=0, learning_rate=0.0,
        science_hash=content_hash({"source": record["files"], "model": model}), mixture_hash="", tokenizer_hash=imported.tokenizer_hash,
        code_hash=code_hash(), parent=None, ledger=(), optimizer_layout="none", plan={}, model=model, files=imported.files, pinned=True,
        hugging_face=record,
    )  # fmt: skip


def import_model(
    source: Path,
    work: Path,
    *,
    name: str,
    expected: ModelConfig | None = None,
    allow_pickle: bool = False,
    resize_vocabulary: bool = False,
    say: Callable[[str], None] = print,
    file_bytes: int = FILE_BYTES,
) -> Imported:
    """Write a Hugging Face folder's model into `work` as a whole checkpoint, but for manifest.json.

    `work` is this conversion's alone: what an earlier call for the same source finished is kept, all else in it
    deleted. Before anything is written: `ConfigError` with all that config.json says and we cannot represent, or
    `expected`, a recipe's model, says otherwise; `DataError` with all that is wrong with the files, or contradicts
    config.json, or with the tokenizer. `CheckpointError` where the disk refuses.
    """
    opened = open_source(source, allow_pickle)
    found = model_from_config(opened.config, str(source / CONFIG), name)
    _refuse_contradictions(opened, found)
    assets = read_assets(source)  # a checkpoint without its tokenizer would be of no use: refused
    tokenizer = load_tokenizer(source)
    model = _with_rows_for(tokenizer, found, resize_vocabulary, source)
    if expected is not None and (differing := contradictions(expected, model)):
        raise ConfigError(f"{source / CONFIG}: is another model than the recipe's {expected.name}:\n  " + "\n  ".join(differing))
    export_files(assets, model, "float32")  # what could not go out again does not come in
    written, surveyed = _write(opened, _parts(opened, found, model), work, assets, model, file_bytes)
    record = {"files": surveyed.files, **_numbers(opened), "nonfinite": surveyed.nonfinite}
    if model.vocab_size != found.vocab_size:
        record["resized_from"] = found.vocab_size
    _say(record, model, say)
    return Imported(expected or model, written, tokenizer.identity_hash, record)


# --- before anything is written -----------------------------------------------------------------------


def _refuse_contradictions(source: Source, model: ModelConfig) -> None:
    """`DataError` listing every tensor that config.json does not account for, does account for and is not there, or shapes otherwise."""
    shapes = {name: shape for row in table(model) for name, shape in zip(row.names, row.shapes, strict=True)}
    wrong = [f"{name}: missing" for name in shapes if name not in source.names]
    for name in source.names:
        if name in shapes and source.shape(name) != shapes[name]:
            wrong.append(f"{name}: has shape {list(source.shape(name))}, where {list(shapes[name])} was expected")
        elif name == HEAD and model.tied_embeddings and EMBEDDING in source.names:
            if not _same_bits(source.read(HEAD), source.read(EMBEDDING)):
                wrong.append(f"{HEAD}: differs from {EMBEDDING}, though tie_word_embeddings says that they are one")
        elif name not in shapes:
            wrong.append(f"{name}: no tensor of a {model.family} model like this")
    if wrong:
        raise DataError(
            f"{source.folder}: its weights contradict {CONFIG}:\n  " + "\n  ".join(wrong) + "\n"
            "One of them is of another model, or was changed; download both again"
        )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    as_int = {2: torch.int16, 4: torch.int32}[one.dtype.itemsize]  # NaN is not equal to itself
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(as_int), other.view(as_int))


def _with_rows_for(tokenizer: Tokenizer, model: ModelConfig, resize: bool, folder: Path) -> ModelConfig:
    """The model, its vocabulary grown to the tokenizer's if it must be and may be."""
    if tokenizer.vocab_size <= model.vocab_size:
        return model
    if not resize:
        raise DataError(
            f"{folder}: its tokenizer has ids up to {tokenizer.vocab_size - 1:,}, the embedding {model.vocab_size:,} rows; it is another "
            f"model's tokenizer, or tokens were added to it: --resize-vocabulary (resize_vocabulary=true in a recipe's stage) gives those "
            f"the mean of the other rows"
        )
    return replace(model, vocab_size=tokenizer.vocab_size)


# --- what is written ----------------------------------------------------------------------------------


def _parts(source: Source, found: ModelConfig, model: ModelConfig) -> list[Part]:
    """Every tensor of the model; `found` is the source's, with fewer rows where the vocabulary grows.

    A stacked tensor has one dtype: the one that holds all of its layers exactly, where they differ.
    """
    dtypes: dict[str, torch.dtype] = {}
    for row in table(found):
        own = [source.dtype(name) for name in row.names]
        dtypes[row.key] = functools.reduce(torch.promote_types, own, dtypes.get(row.key, own[0]))
    return [_part(source, old, row, dtypes[row.key], model.num_layers) for old, row in zip(table(found), table(model), strict=True)]


def _part(source: Source, old: Row, row: Row, dtype: torch.dtype, layers: int) -> Part:
    pieces = functools.partial(_pieces, source, old, row)
    if row.layer is None:
        return Part(row.key, row.shape, (0,) * len(row.shape), row.shape, dtype, 0, pieces)
    return Part(row.key, (layers, *row.shape), (row.layer, *(0 for _ in row.shape)), (1, *row.shape), dtype, 1, pieces)


def _pieces(source: Source, old: Row, row: Row) -> Iterator[torch.Tensor]:
    tensors = [source.read(name) for name in row.names]
    pieces = row.to_megatron(tensors) if row.shapes == old.shapes else _grown(tensors[0], row)
    for piece in pieces:
        yield piece if row.layer is None else piece.unsqueeze(0)


def _grown(rows: torch.Tensor, row: Row) -> list[torch.Tensor]:
    """A vocabulary's rows, the mean of them for each new id, and zeros up to the padded size."""
    total = sum(part.double().sum(0) for part in rows.split(MEAN_ROWS))
    assert isinstance(total, torch.Tensor)
    mean = (total / len(rows)).to(rows.dtype)
    padding = rows.new_zeros((row.shape[0] - row.shapes[0][0], *row.shape[1:]))
    return [piece for piece in (rows, mean.repeat(row.shapes[0][0] - len(rows), 1), padding) if len(piece)]


def _write(
    source: Source, parts: Sequence[Part], work: Path, assets: Mapping[str, bytes], model: ModelConfig, file_bytes: int
) -> tuple[Digests, Survey]:
    """Write the checkpoint and survey the source, side by side; `DataError` where the source changed meanwhile."""
    before = _states(source)
    identity = {
        "source": before,
        "model": to_json(model),
        "assets": {name: hashlib.sha256(content).hexdigest() for name, content in assets.items()},
    }
    stop = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        try:
            surveying = beside.submit(survey, source, stop)
            with progress(f"Convert {model.name}", total=sum(part.num_bytes for part in parts), unit="bytes") as bar:
                written = write_checkpoint(work, parts, assets, identity, bar.update, file_bytes)
            surveyed = surveying.result()
        finally:
            stop.set()
    if _states(source) != before:
        raise DataError(f"{source.folder}: was changed while it was converted; wait until it is whole, and start this again")
    forget_job(work)
    return written, surveyed


def _states(source: Source) -> list[list[str | int]]:
    """Name, bytes and time of change of each file: whether they are still the same, without reading them."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in source.files]


# --- what is said of it -------------------------------------------------------------------------------


def _numbers(source: Source) -> Json:
    """The dtype that holds all weights exactly, and how many tensors have each."""
    dtypes = [source.dtype(name) for name in source.names]
    counts = {str(dtype).removeprefix("torch."): dtypes.count(dtype) for dtype in dict.fromkeys(dtypes)}
    return {"dtype": str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch."), "dtypes": counts}


def _say(record: Json, model: ModelConfig, say: Callable[[str], None]) -> None:
    if len(record["dtypes"]) > 1:
        counts = ", ".join(f"{count:,} tensors {dtype}" for dtype, count in record["dtypes"].items())
        say(f"mixed numbers: {counts}; where they meet in one tensor of the checkpoint, all of it has the one that holds them exactly")
    if "resized_from" in record:
        say(f"vocabulary grown from {record['resized_from']:,} to {model.vocab_size:,} rows; each new one is the mean of the others")
    if found := record["nonfinite"]:
        names = ", ".join(f"{name} ({count:,})" for name, count in found.items())
        say(f"warning: NaN or infinite numbers in {len(found)} tensors, converted as they are: {names}")
