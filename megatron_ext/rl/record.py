"""Recorded rollouts: one file a rollout step, from which the update can be computed again, and read by people.

    RUN/rollouts/step_0000012.jsonl.gz

The first line says what the step was sampled under, each further line is one response: prompt, text, cap, finish reason, answer,
verdict and why, reward; its ids, engine log-probabilities and weight versions as base64 of little-endian int32 and float32, exact.
A file is written aside, forced to the disk and renamed before its step ends, and its bytes depend on what it holds alone.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.config.base import from_json, to_json
from megatron_ext.errors import ConfigError, DataError, RunError
from megatron_ext.generation.engine import Generation
from megatron_ext.rl.full_grade import Behaviour
from megatron_ext.rl.lengths import LengthState
from megatron_ext.rl.order import OrderState
from megatron_ext.rl.record_paths import ROLLOUTS, not_kept_words, record_path, recorded_steps
from megatron_ext.rl.rollouts import Batch, Rollout
from megatron_ext.runs import force_to_disk
from megatron_ext.tasks.grading import Verdict

UNFINISHED = ".tmp"
FORMAT = 1
ARRAYS = {"tokens": "<i4", "logprobs": "<f4", "weight_versions": "<i4"}
COMPRESSION = 1  # the arrays hardly compress; level 9 takes ten times as long for a tenth less


def write_record(run_path: Path, batch: Batch, may_write: Callable[[], None] = lambda: None) -> str:
    """Write a step's rollouts; the SHA-256 of the file's uncompressed text.

    `may_write` is asked before the file gets its name, and raises where another attempt owns the run folder. `RunError` where the
    disk refuses the file; nothing of it is left then.
    """
    path = record_path(run_path, batch.step)
    aside = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        path.parent.mkdir(exist_ok=True)
        digest = _write_synced(aside, batch)
        may_write()
        os.replace(aside, path)
        force_to_disk(path.parent)
    except OSError as refusal:
        raise RunError(
            f"{path}: the rollouts of step {batch.step} cannot be recorded: {refusal}; make room on its disk (plan.keep_rollouts_bytes "
            f"bounds what is kept) and start the stage again: it goes on from its last published checkpoint"
        ) from refusal
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return digest


def _write_synced(path: Path, batch: Batch) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=COMPRESSION, mtime=0) as packed:
            for line in _lines(batch):
                digest.update(line)
                packed.write(line)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_record(run_path: Path, step: int) -> Batch:
    """The rollouts of a step; `DataError` where they are not kept, or not what was written."""
    path = record_path(run_path, step)
    digest = hashlib.sha256()
    try:
        with gzip.open(path, "rb") as file:
            lines = []
            for line in file:
                digest.update(line)
                lines.append(json.loads(line))
        return _batch(lines, str(path), digest.hexdigest())
    except FileNotFoundError:
        raise DataError(not_kept_words(run_path, step)) from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, IndexError, binascii.Error) as cause:
        raise DataError(f"{path}: no record of rollouts that can be read ({cause}); it was cut short or altered") from None


def prune_records(
    run_path: Path, keep_bytes: int | None, checkpoints: Collection[int], may_write: Callable[[], None] = lambda: None
) -> list[int]:
    """Remove the oldest files until `keep_bytes` hold the rest (None: keep all); the steps that went.

    Whatever their size, the step right behind each of the `checkpoints` stays, which a resume may read and a replay begins with, and so
    do the newest two: the step under way, and the one sampled ahead. `may_write` as in `write_record`, before each file.
    """
    if keep_bytes is None:
        return []
    sizes = {step: record_path(run_path, step).stat().st_size for step in recorded_steps(run_path)}
    needed = {step + 1 for step in (0, *checkpoints)} | set(list(sizes)[-2:])
    gone = []
    for step in [one for one in sizes if one not in needed]:
        if sum(sizes.values()) <= keep_bytes:
            break
        may_write()
        record_path(run_path, step).unlink()
        del sizes[step]
        gone.append(step)
    return gone


def clear_unfinished(run_path: Path) -> None:
    """Remove what attempts that were killed have left half written."""
    for path in (run_path / ROLLOUTS).glob(f".step_*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def _lines(batch: Batch) -> Iterator[bytes]:
    head = {
        "format": FORMAT,
        "step": batch.step,
        "cap_tokens": batch.cap_tokens,
        "weight_version": batch.weight_version,
        "seed": batch.seed,
        "num_left_out": batch.num_left_out,
        "num_rollouts": len(batch.rollouts),
        "num_unused": len(batch.unused),
        "order": to_json(batch.order),
        "lengths": to_json(batch.lengths),
    }
    yield _line(head)
    for rollout in (*batch.rollouts, *batch.unused):
        yield _line(_rollout_values(rollout))


def _line(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False) + "\n").encode()


def _rollout_values(one: Rollout) -> dict[str, Any]:
    made = one.generation
    return {
        "id": made.id,
        "problem": one.problem,
        "cap_tokens": one.cap_tokens,
        "finish": made.finish,
        "num_tokens": one.num_tokens,
        "reward": one.reward,
        "ending": one.ending,
        "cause": one.cause,
        "verdict": asdict(one.verdict) if one.verdict else None,
        "behaviour": asdict(one.behaviour),
        "text": made.text,
        "prompt": _packed(np.array(one.prompt), "<i4"),
        **{name: _packed(getattr(made, name), kind) for name, kind in ARRAYS.items()},
    }


def _packed(values: npt.NDArray[Any], kind: str) -> str:
    return base64.b64encode(values.astype(kind).tobytes()).decode()


def _unpacked(text: str, kind: str) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=kind)


def _batch(lines: list[dict[str, Any]], where: str, sha256: str) -> Batch:
    head, rows = lines[0], [_rollout(values) for values in lines[1:]]
    if head["format"] != FORMAT or len(rows) != head["num_rollouts"] + head["num_unused"]:
        raise ValueError(f"format {head['format']} with {len(rows)} of {head['num_rollouts'] + head['num_unused']} rollouts")
    try:
        order = from_json(OrderState, head["order"], where)
        lengths = from_json(LengthState, head["lengths"], where)
    except ConfigError as cause:
        raise ValueError(str(cause)) from None
    used = head["num_rollouts"]
    return Batch(
        step=head["step"],
        cap_tokens=head["cap_tokens"],
        weight_version=head["weight_version"],
        seed=head["seed"],
        rollouts=tuple(rows[:used]),
        unused=tuple(rows[used:]),
        order=order,
        lengths=lengths,
        num_left_out=head["num_left_out"],
        sha256=sha256,
    )


def _rollout(values: dict[str, Any]) -> Rollout:
    arrays = {name: _unpacked(values[name], kind) for name, kind in ARRAYS.items()}
    generation = Generation(id=values["id"], finish=values["finish"], text=values["text"], **arrays)
    verdict = Verdict(**values["verdict"]) if values["verdict"] else None
    prompt = tuple(_unpacked(values["prompt"], "<i4").tolist())
    return Rollout(
        problem=values["problem"],
        prompt=prompt,
        cap_tokens=values["cap_tokens"],
        generation=generation,
        ending=values["ending"],
        verdict=verdict,
        cause=values["cause"],
        reward=values["reward"],
        behaviour=Behaviour(**values["behaviour"]),
    )
