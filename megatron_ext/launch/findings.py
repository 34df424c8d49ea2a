"""What a check found: fine, worth a thought, or bound to fail; and findings as text."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["ok", "warning", "error"]
ORDER: tuple[Level, ...] = ("ok", "warning", "error")
WIDTH = 140


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what, what was found and why it matters, and the way out where it needs one."""

    level: Level
    what: str
    found: str
    way_out: str = ""
    stage: str = ""  # where it is about one


def ok(what: str, found: str, stage: str = "") -> Finding:
    """Nothing to do."""
    return Finding("ok", what, found, stage=stage)


def warning(what: str, found: str, way_out: str, stage: str = "") -> Finding:
    """It may fail, or cost more than it need."""
    return Finding("warning", what, found, way_out, stage)


def error(what: str, found: str, way_out: str = "", stage: str = "") -> Finding:
    """It cannot run like this; without `way_out` the finding itself names one."""
    return Finding("error", what, found, way_out, stage)


def findings_text(findings: list[Finding]) -> str:
    """The findings' lines, and how many there are of each level."""
    shared = _shared(findings)
    counts = ", ".join(f"{sum(one.level == level for one in shared)} {level}" for level in ORDER)
    return "\n".join([*finding_lines(findings), counts])


def finding_lines(findings: list[Finding]) -> list[str]:
    """One paragraph a finding, and one for what several stages share; errors last, where a terminal shows them."""
    lines = []
    for one, stages in _shared(findings).items():
        of = f" of {', '.join(dict.fromkeys(stages))}" if any(stages) else ""
        text = f"{one.what}{of}: {one.found}" + (f"; way out: {one.way_out}" if one.way_out else "")
        for number, paragraph in enumerate(text.splitlines()):
            first = f"{one.level:<8} " if number == 0 else " " * 9
            lines += textwrap.wrap(paragraph, WIDTH, initial_indent=first, subsequent_indent=" " * 11, break_long_words=False)
    return lines


def _shared(findings: list[Finding]) -> dict[Finding, list[str]]:
    """Each finding once, with the stages that it is about, errors last."""
    shared: dict[Finding, list[str]] = {}
    for one in sorted(findings, key=lambda f: ORDER.index(f.level)):
        shared.setdefault(replace(one, stage=""), []).append(one.stage)
    return shared
