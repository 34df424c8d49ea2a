"""The drawing board of a report: where figures land, how they are numbered, and what a section is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.config.base import Json
from megatron_ext.reports import markup
from megatron_ext.reports.markup import Html
from megatron_ext.reports.read import Reading
from megatron_ext.reports.style import stage_colours

FIGURES = "figures"
PAGE_PIXELS = 0.69  # of the page for one of a PNG: a figure 10 inches wide fills the column, and text is of one size in all


@dataclass(frozen=True)
class Section:
    """A part of the page and the numbers that it shows, by their key in summary.json."""

    anchor: str
    heading: str
    html: str
    numbers: Json


@dataclass
class Board:
    """Where figures are drawn; it numbers them in the order of the page."""

    reading: Reading
    folder: Path  # the report's run folder
    drawn: list[str] = field(default_factory=list)

    def figure(self, name: str, draw: Callable[[Path], bool], alternative: str, caption: str, absent: str) -> str:
        """Draw `figures/<name>.png`; where there is nothing to draw, say `absent` and leave no old file behind."""
        source = f"{FIGURES}/{name}.png"
        path = self.folder / source
        path.unlink(missing_ok=True)
        if not draw(path):
            return markup.paragraph(absent, "muted")
        self.drawn.append(source)
        return markup.figure(source, alternative, len(self.drawn), caption, round(_png_width(path) * PAGE_PIXELS))

    def name(self, stage: str) -> Html:
        """A stage's name behind its colour."""
        return markup.chip(stage_colours(self.reading).get(stage), stage)


def as_json(rows: list[Any]) -> list[Json]:
    """Rows as plain JSON objects."""
    return [dataclasses.asdict(row) for row in rows]


def _png_width(path: Path) -> int:
    """Pixels, from the file's header (PNG specification, section 11.2.2: IHDR begins with the width)."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(20)[16:20], "big")
