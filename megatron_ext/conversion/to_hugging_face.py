"""From a checkpoint to a Hugging Face folder, tensor by tensor, whatever layout the checkpoint was saved under.

    .NAME.exporting/   being written; `finished.json` names its whole shards, which the next start keeps
    NAME/              appears by one rename: weights, config, tokenizer, and `conversion.json` with every digest

Optimizer state is not read. Numbers are moved, never computed, unless another dtype is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_ext.checkpoint.folder import named_checkpoint
from megatron_ext.checkpoint.hashing import Digests, HashingFileSystem
from megatron_ext.checkpoint.stream_reading import CheckpointReader
from megatron_ext.checkpoint.verify import verify
from megatron_ext.config.base import Json, from_json
from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion.assets import carried, export_files, has_tokenizer, read_assets
from megatron_ext.conversion.publishing import publish, work_folder
from megatron_ext.conversion.safetensors_writing import DTYPES, INDEX, Entry, Stream, Written, index_text, shard_names, writing
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.model.weights import Row, table
from megatron_ext.progress import Meter, progress
from megatron_ext.provenance import MANIFEST, Manifest, file_sha256, read_manifest
from megatron_ext.runs import read_json, write_json
from megatron_ext.snapshot import code_hash
from megatron_ext.tokenizer import TOKENIZER_FILES, load_tokenizer

SHARD_BYTES = 4 << 30  # small enough to be fetched and opened side by side
CONVERSION, FINISHED = "conversion.json", "finished.json"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One file of weights: the rows of the table that go into it, and its tensors in their order."""

    name: str
    rows: tuple[Row, ...]
    entries: tuple[Entry, ...]


def megatron_to_hf(
    checkpoint: Path,
    target: Path,
    dtype: str | None = None,
    say: Callable[[str], None] = print,
    *,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    is_verified: bool = False,
) -> Path:
    """Write a checkpoint, or a run's newest, as a folder that `transformers` and vLLM load: weights, configs, tokenizer.

    `dtype` is 'fp32', 'bf16' or None (as stored). `tokenizer` is a folder, for a checkpoint that carries none. After a kill
    or a full disk the same call goes on with the shards that were finished. The checkpoint's digests are checked meanwhile,
    unless it `is_verified`. Returns `target`. `CheckpointError` where it
    holds anything, where the checkpoint is not of the model that its manifest says (all that is wrong, together), or the disk
    refuses; `DamagedCheckpointError` where a part is missing or cut; `DataError` where the tokenizer does not fit.
    """
    target, checkpoint = target.resolve(), named_checkpoint(checkpoint)
    _refuse_taken(target, checkpoint.resolve())
    manifest, reader = read_manifest(checkpoint), CheckpointReader(checkpoint)
    model: ModelConfig = from_json(ModelConfig, manifest.model, f"{checkpoint / MANIFEST}: model")
    refuse_other_model(reader, model)
    shards = plan_shards(reader, table(model), _precision(dtype), shard_bytes)
    beside = export_files(_assets(checkpoint, manifest, tokenizer), model, _config_dtype(shards))
    if len(shards) > 1:
        beside[INDEX] = index_text({shard.name: shard.entries for shard in shards}).encode()
    states = {path.name: path.stat().st_mtime_ns for path in sorted(checkpoint.glob("*.distcp"))}
    source = {"checkpoint": checkpoint.resolve().name, "manifest_sha256": file_sha256(checkpoint / MANIFEST), "modified_ns": states}
    how: Json = {**source, "dtype": _config_dtype(shards), "cast": dtype, "shard_bytes": shard_bytes, "code_hash": code_hash()}
    aside = work_folder(target, "exporting")
    try:
        written = _write_checked(aside, shards, reader, how, is_verified)
        digests = {name: (one.size_bytes, one.sha256) for name, one in written.items()} | _write_beside(aside, beside)
        write_json(aside / CONVERSION, _record(how, manifest, digests, written))
        (aside / FINISHED).unlink()
        sizes = {name: size_bytes for name, (size_bytes, _) in digests.items()}
        publish(aside, target, {**sizes, CONVERSION: (aside / CONVERSION).stat().st_size})
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written: {error.strerror or error}: {error.filename or aside}; make room on its disk, "
            f"if that is full, and run the same command again: it goes on with what is finished in {aside}"
        ) from error
    _say_nonfinite(written, say)
    say(f"exported {checkpoint} to {target}")
    return target


# --- before anything is written -----------------------------------------------------------------------


def _refuse_taken(target: Path, checkpoint: Path) -> None:
    if target.is_relative_to(checkpoint):
        raise CheckpointError(f"{target}: lies inside of the checkpoint, which would no longer be whole; name another folder")
    try:
        names = sorted(path.name for path in target.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{target}: cannot become a folder of weights: {error.strerror}; name another one") from None
    if names:
        more = ", ..." if len(names) > 3 else ""
        raise CheckpointError(f"{target}: not empty: holds {', '.join(names[:3])}{more}; name another folder, or remove this one")


def refuse_other_model(reader: CheckpointReader, model: ModelConfig) -> None:
    """`CheckpointError` with all that is wrong where a checkpoint does not hold each tensor of the model, whole, and no other."""
    expected = {row.key: row.shape if row.layer is None else (model.num_layers, *row.shape) for row in table(model)}
    wrong = [f"{key}: missing" for key in expected if key not in reader.keys]
    wrong += [f"{key}: no weight of this model" for key in (*reader.keys, *reader.others) if key not in expected]
    for key in (key for key in expected if key in reader.keys):
        if reader.shape(key) != expected[key]:
            wrong.append(f"{key}: has shape {reader.shape(key)}, the model's is {expected[key]}")
        elif gap := reader.gap(key):
            wrong.append(f"{key}: {gap}")
        if reader.dtype(key) not in DTYPES:
            wrong.append(f"{key}: is {reader.dtype(key)}, not one of {', '.join(map(str, DTYPES))}")
    if wrong:
        where, lines = reader.folder / MANIFEST, "\n  ".join(wrong)
        raise CheckpointError(f"{where}: says {model.name} ({model.family}), but the checkpoint does not hold that model:\n  {lines}")


def plan_shards(reader: CheckpointReader, rows: Sequence[Row], dtype: torch.dtype | None, shard_bytes: int) -> list[Shard]:
    """Which row goes into which file, in the table's order; a file is larger than `shard_bytes` only where one row is."""
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes {shard_bytes}: must be at least 1")
    parts: list[list[tuple[Row, list[Entry]]]] = [[]]
    total_bytes = 0
    for row in rows:
        kept = dtype or reader.dtype(row.key)
        entries = [Entry(name, kept, shape) for name, shape in zip(row.names, row.shapes, strict=True)]
        row_bytes = sum(entry.size_bytes for entry in entries)
        if parts[-1] and total_bytes + row_bytes > shard_bytes:
            parts.append([])
            total_bytes = 0
        parts[-1].append((row, entries))
        total_bytes += row_bytes
    shards = []
    for name, part in zip(shard_names(len(parts)), parts, strict=True):
        part.sort(key=lambda one: -one[1][0].dtype.itemsize)  # wide numbers first, so that each lies at a multiple of its width
        shards.append(Shard(name, tuple(row for row, _ in part), tuple(entry for _, entries in part for entry in entries)))
    return shards


def _precision(dtype: str | None) -> torch.dtype | None:
    if dtype is not None and dtype not in PRECISIONS:
        raise ConfigError(f"dtype '{dtype}': must be one of {', '.join(PRECISIONS)}; leave it out to keep the numbers as they are stored")
    return PRECISIONS[dtype] if dtype else None


def _config_dtype(shards: Sequence[Shard]) -> str:
    """What config.json says: the dtype that holds every tensor exactly."""
    found = [entry.dtype for shard in shards for entry in shard.entries]
    return str(functools.reduce(torch.promote_types, found)).removeprefix("torch.")


def _assets(checkpoint: Path, manifest: Manifest, tokenizer: Path | None) -> dict[str, bytes]:
    """Configs and tokenizer of the checkpoint, or the given tokenizer, which must be the one that its text was made with."""
    own = carried(checkpoint)
    if tokenizer is None and not has_tokenizer(own):
        raise CheckpointError(
            f"{checkpoint}: carries no tokenizer files (an older version wrote it); name the folder of the tokenizer that it was trained "
            f"with: --tokenizer DIR. The folder of its tokenized corpus has one"
        )
    if tokenizer is None:
        return own
    given = {name: content for name, content in read_assets(tokenizer).items() if name in TOKENIZER_FILES}
    found = load_tokenizer(tokenizer).identity_hash
    if manifest.tokenizer_hash and found != manifest.tokenizer_hash:
        raise CheckpointError(
            f"{tokenizer}: gives other ids than the tokenizer that {checkpoint} was trained with "
            f"({found[:12]}, not {manifest.tokenizer_hash[:12]}); name that one's folder"
        )
    return {name: content for name, content in own.items() if name not in TOKENIZER_FILES} | given


# --- the weights --------------------------------------------------------------------------------------


def _write_checked(aside: Path, shards: Sequence[Shard], reader: CheckpointReader, how: Json, is_verified: bool) -> dict[str, Written]:
    """Write the weights while another thread reads every byte of the checkpoint; nothing is kept of a damaged one."""
    with ThreadPoolExecutor(1) as beside:
        checking = None if is_verified else beside.submit(verify, reader.folder)
        written = _write_weights(aside, shards, reader, how)
        try:
            if checking is not None:
                checking.result()
        except CheckpointError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return written


def _write_weights(aside: Path, shards: Sequence[Shard], reader: CheckpointReader, how: Json) -> dict[str, Written]:
    """Write the shards that are not there yet; what each of all holds."""
    finished = _finished(aside, [shard.name for shard in shards], how)
    sizes = {shard.name: sum(entry.size_bytes for entry in shard.entries) for shard in shards}
    done = sum(sizes[name] for name in finished)
    _remember(aside, how, finished)
    with progress(f"Export {reader.folder.name}", total=sum(sizes.values()), unit="bytes", done=done) as bar:
        for shard in shards:
            if shard.name not in finished:
                finished[shard.name] = _write_shard(aside / shard.name, shard, reader, bar)
                _remember(aside, how, finished)
    return {shard.name: finished[shard.name] for shard in shards}


def _remember(aside: Path, how: Json, finished: Mapping[str, Written]) -> None:
    write_json(aside / FINISHED, {"how": how, "shards": {name: asdict(one) for name, one in finished.items()}})


def _finished(aside: Path, names: Sequence[str], how: Json) -> dict[str, Written]:
    """The shards that an earlier start of the same export has finished, read and checked; all else in the folder is deleted."""
    aside.mkdir(parents=True, exist_ok=True)
    kept = {}
    with contextlib.suppress(CheckpointError, KeyError, TypeError):  # a record that cannot be read, or is another export's
        record = read_json(aside / FINISHED, "the finished shards of an export", CheckpointError)
        found = {name: Written(**values) for name, values in record["shards"].items() if name in names and record["how"] == how}
        kept = {name: one for name, one in found.items() if _is_whole(aside / name, one)}
    for path in aside.iterdir():
        if path.name not in {*kept, FINISHED}:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return kept


def _is_whole(path: Path, written: Written) -> bool:
    return path.is_file() and path.stat().st_size == written.size_bytes and file_sha256(path) == written.sha256


def _write_shard(path: Path, shard: Shard, reader: CheckpointReader, bar: Meter) -> Written:
    """Write one file under another name, then rename it: under its own it is whole."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with writing(partial, shard.entries) as stream:
            for row in shard.rows:
                bar.update(_write_row(stream, row, reader))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # the room is needed by whoever frees a full disk
    return stream.written


def _write_row(stream: Stream, row: Row, reader: CheckpointReader) -> int:
    """Move one Megatron tensor; the bytes written. Nothing of it is held afterwards."""
    return sum(stream.add(tensor) for tensor in row.to_hugging_face(reader.read(row.key, row.layer)))


def _say_nonfinite(written: Mapping[str, Written], say: Callable[[str], None]) -> None:
    found = {name: count for one in written.values() for name, count in one.nonfinite.items()}
    if found:
        lines = "\n  ".join(f"{name}: {count:,}" for name, count in found.items())
        say(f"warning: {len(found)} tensors hold numbers that are NaN or infinite:\n  {lines}")


# --- the rest -----------------------------------------------------------------------------------------


def _write_beside(aside: Path, files: Mapping[str, bytes]) -> Digests:
    disk = HashingFileSystem()
    for name, content in files.items():
        with disk.create_stream(aside / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return disk.digests


def _record(how: Json, manifest: Manifest, digests: Digests, written: Mapping[str, Written]) -> Json:
    """What conversion.json says: where the weights came from and what everything hashes to."""
    names = ("graph", "stage", "iteration", "tokens", "lineage_tokens", "science_hash", "tokenizer_hash")
    return {
        "format": FORMAT,
        "source": {"checkpoint": how["checkpoint"], "manifest_sha256": how["manifest_sha256"]}
        | {name: getattr(manifest, name) for name in names},
        "base_model": {key: manifest.hugging_face[key] for key in ("source", "revision") if key in manifest.hugging_face},
        "code_hash": how["code_hash"],
        "dtype": how["dtype"],
        "files": digests,
        "tensors": {name: sha256 for one in written.values() for name, sha256 in one.tensors.items()},
        "nonfinite": {name: count for one in written.values() for name, count in one.nonfinite.items()},
    }
