"""A replayed step as text for a terminal."""

from __future__ import annotations

from typing import Any

from megatron_ext.config.base import Json

MOST_SEQUENCES = 20
OUTCOME = {
    "train": "trained on",
    "skip": "left out",
    "roll_back": "gone back from, then left out",
    "stop": "where the stage stopped",
}


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
    causes = found["causes"] or [
        "code and plan are those of the record: it was not the data or the weights; the machine, or a library, computed something else"
    ]
    return [*reason, f"not what attempt {record['attempt']} recorded:", *(f"  {line}" for line in (*found["differences"], *causes))]


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
