"""What docs/metrics.md says of metrics.jsonl: the fields of every kind of record."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def documented() -> dict[str, set[str]]:
    """Kind -> its fields beside those that every record has; `attempt` has none."""
    text = PAGE.read_text(encoding="utf-8").partition("## metrics.jsonl\n")[2].partition("\n## ")[0]
    parts = re.split(r"^\*\*`(\w+)`\*\*", text, flags=re.MULTILINE)
    kinds = dict(zip(parts[1::2], map(_fields, parts[2::2]), strict=True))
    return {"attempt": set(), **kinds, "stop": kinds["skip"]}  # "the same fields"


def undocumented(records: Iterable[dict[str, Any]]) -> list[str]:
    """Where records and page differ, in either direction; empty where they agree."""
    pages, every = documented(), {"attempt", "kind", "step", "at"}
    return [f"{r['kind']}: {odd}" for r in records if (odd := sorted((set(r) - every) ^ pages.get(r["kind"], {"its page"})))]


def _fields(text: str) -> set[str]:
    cells = re.findall(r"^\|([^|]*)\|", text, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
