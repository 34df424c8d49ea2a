"""A replayed step in words: what was in it, whether it is the recorded one, and if not, which steps were computed under what else."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from megatron_ext.attempts import RECORD
from megatron_ext.config.base import Json, to_json
from megatron_ext.metrics import Record, attempt_steps, read_metrics
from megatron_ext.runs import ATTEMPTS, Run, read_json
from megatron_ext.snapshot import code_hash

MOST_SEQUENCES = 20
OUTCOME = {
    "train": "trained on",
    "skip": "left out",
    "roll_back": "gone back from, then left out",
    "stop": "where the stage stopped",
}
NEVER_COMPUTES = {  # of a plan: when and where something is read or written; all else can change a sum's last bits
    "loader_workers", "log_every_steps", "save_every_steps", "pin_every_tokens", "pin_tokens", "export_tokens", "export_last",
    "validate_every_steps", "validation_sequences", "asynchronous_saves", "on_failed_save", "on_damaged_checkpoint", "keep_checkpoints",
}  # fmt: skip


def why_text(found: Json) -> str:
    """The step, whether it is what was recorded, losses by source, gradient by layer, documents by loss."""
    record, start = found["recorded"], found["replayed_from"]
    outcome = f", {OUTCOME[record['kind']]}" if record else ""
    redone = found["step"] - 1 - start["step"]
    steps = f" and {redone} {'step' if redone == 1 else 'steps'} done again" if redone else ""
    lines = [
        f"stage '{found['stage']}', step {found['step']}{outcome}: {found['tokens']:,} tokens, {len(found['sequences'])} sequences",
        f"replayed from step {start['step']} ({start['start']}){steps}; learning rate {found['learning_rate']:.6g}",
        f"loss {number(found['loss'])}, gradient norm {number(found['grad_norm'])}",
        *_verdict(found),
        "",
        *table(["source", "sequences", "valid tokens", "loss"], [[*row.values()] for row in found["sources"]]),
        "",
        *table(["layer", "gradient norm"], [[name, norm] for name, norm in found["layers"].items()]),
        "",
        *_sequences(found["sequences"]),
    ]
    return "\n".join(lines)


def _verdict(found: Json) -> list[str]:
    record = found["recorded"]
    if record is None:
        every = found["log_every_steps"]
        return [f"no record to compare with: {'the stage ended here' if every == 1 else f'one step in {every} is recorded'}"]
    reason = [f"found: {record['reason']}"] if record.get("reason") else []
    if found["equal"]:
        return [*reason, f"equal to the record of attempt {record['attempt']}, to the bit"]
    others = found["causes"] or [_same_words(found)]
    return [*reason, f"not what attempt {record['attempt']} recorded:", *(f"  {line}" for line in (*found["differences"], *others))]


def _same_words(found: Json) -> str:
    """What is left where the steps that were done again had the plan and the code of this replay."""
    first, step = found["replayed_from"]["step"] + 1, found["step"]
    steps = f"step {step}" if first == step else f"steps {first} to {step}"
    same = f"code and plan are those under which {steps} {'was' if first == step else 'were'} recorded"
    if found["recorded"]["samples_sha256"] != found["samples_sha256"]:
        return f"{same}: it was the data; the corpus, or an index over it, is not what it was"
    return f"{same}: it was not the data, nor the weights they began with; the machine, or a library, computed something else"


def causes(run: Run, record: Record, start_step: int, step: int) -> list[str]:
    """Which steps after `start_step`, up to the recorded `step`, were computed under another plan or code than this process's.

    One line for attempts in a row that were alike. Only what can change what is computed counts of a plan.
    """
    led = [one for one in read_metrics(run.metrics_path) if one["attempt"] <= record["attempt"]]  # to the record; later ones did not
    rows = [(_other_words(run, attempt), attempt, first, last) for attempt, first, last in attempt_steps(led, start_step, step)]
    lines = []
    for words, alike in groupby(rows, lambda row: row[0]):
        same = list(alike)
        (_, one, first, _), (_, other, _, last) = same[0], same[-1]
        steps = f"step {first} was" if first == last else f"steps {first} to {last} were"
        attempts = f"attempt {one}" if one == other else f"attempts {one} to {other}"
        if words:
            lines.append(f"{steps} computed by {attempts} {words}")
    return lines


def _other_words(run: Run, attempt: int) -> str:
    """'under micro_batch 4 (here 1), code 0123456789ab (here ba9876543210)'; '' where an attempt computed as this process does."""
    path = run.path / ATTEMPTS / str(attempt) / RECORD
    if not path.is_file():
        return f"under a plan and code that are not known, for there is no {path}"
    then, here = read_json(path, "how an attempt began"), to_json(run.stage.plan)
    pairs = {key: (then["plan"].get(key), here.get(key)) for key in dict.fromkeys([*here, *then["plan"]]) if key not in NEVER_COMPUTES}
    other = [f"{key} {_word(old)} (here {_word(new)})" for key, (old, new) in pairs.items() if old != new]
    if then.get("code_hash") not in (None, code_hash()):
        other.append(f"code {then['code_hash'][:12]} (here {code_hash()[:12]})")
    return f"under {', '.join(other)}" if other else ""


def _word(value: Any) -> str:
    """A plan's value as it is given on the command line."""
    return json.dumps(value).strip('"')


def _sequences(sequences: list[Json]) -> list[str]:
    """The sequences with the largest loss first; what is not finite before all."""
    order = sorted(range(len(sequences)), key=lambda i: -(sequences[i]["loss"] if sequences[i]["loss"] is not None else float("inf")))
    rows = []
    for i in order[:MOST_SEQUENCES]:
        one = sequences[i]
        spans = ", ".join(f"{d['id']} [{d['first_token']}:{d['end_token']}]" for d in one["documents"])
        loss = one["loss"] if one["valid_tokens"] else "no valid tokens"
        rows.append([i, one["source"], one["position"], loss, spans])
    left = len(sequences) - len(rows)
    more = [f"and {left:,} more; --json has them all"] if left else []
    return [*table(["sequence", "source", "position", "loss", "documents [tokens]"], rows), *more]


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Rows under their heads, in columns."""
    cells = [head, *([number(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def number(value: Any) -> str:
    """A number as a reader wants it; None is what JSON cannot say."""
    if value is None:
        return "not finite"
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
