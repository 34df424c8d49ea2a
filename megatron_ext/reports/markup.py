"""HTML from text: escaping, tables, figures. Everything that comes from a run folder is escaped here."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

STYLE = """
:root { --ink: #1f2328; --muted: #59636e; --line: #d8dee4; --wash: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { max-width: 50rem; margin: .5rem 0; }
nav { font-size: .9rem; margin: 1rem 0; } nav a { display: inline-block; margin-right: 1rem; }
a { color: #0a58a8; text-decoration: none; } a:hover { text-decoration: underline; }
.lead { font-size: 1.08rem; }
.muted { color: var(--muted); font-size: .88rem; }
.notes { background: #fff8e6; border-left: 4px solid #d4a72c; padding: .6rem 1rem; margin: 1.2rem 0; font-size: .93rem; }
.notes ul { margin: .3rem 0; padding-left: 1.2rem; }
figure { margin: 1rem 0 1.4rem; }
figure img { display: block; max-width: 100%; height: auto; }
@media (max-width: 44rem) { figure a { display: block; overflow-x: auto; } figure img { max-width: max(100%, 52rem); } }
figcaption { font-size: .9rem; color: var(--ink); max-width: 52rem; margin-top: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: .4rem 0 1rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; } thead th { border-bottom: 1.5px solid var(--ink); }
.n { text-align: right; white-space: nowrap; }
tr.more td { border-bottom: none; padding-bottom: 0; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em; }
.stage { white-space: nowrap; }
.chip { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em; vertical-align: -.03em; }
"""


@dataclass(frozen=True)
class Html:
    """Text that is HTML already; anything else is escaped."""

    text: str


Cell = str | Html


def escaped(cell: Cell) -> str:
    """A cell as HTML."""
    return cell.text if isinstance(cell, Html) else escape(cell)


def paragraph(text: Cell, css_class: str = "") -> str:
    """A paragraph."""
    mark = f' class="{css_class}"' if css_class else ""
    return f"<p{mark}>{escaped(text)}</p>\n"


def table(caption: str, columns: list[str], rows: list[list[Cell]]) -> str:
    """A table; a column whose name starts with '#' holds numbers. Rows with the same first cell form a group."""
    marks = [' class="n"' if c.startswith("#") else "" for c in columns]
    head = "".join(f"<th{m}>{escape(c.removeprefix('#'))}</th>" for c, m in zip(columns, marks, strict=True))
    cells = [[escaped(cell) for cell in row] for row in rows]
    lines = []
    for i, row in enumerate(cells):
        repeats = i > 0 and cells[i - 1][0] == row[0]
        goes_on = i + 1 < len(cells) and cells[i + 1][0] == row[0]
        shown = ["" if repeats else row[0], *row[1:]]
        body = "".join(f"<td{m}>{cell}</td>" for cell, m in zip(shown, marks, strict=True))
        lines.append(f'<tr class="more">{body}</tr>' if goes_on else f"<tr>{body}</tr>")
    whole = "\n".join(lines)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{whole}\n</tbody></table></div>\n"
    )


def figure(source: str, alternative: str, number: int, caption: str, width_pixels: int) -> str:
    """A numbered figure; `source` is relative to the page, a click opens it in full size."""
    place = escape(source, quote=True)
    return (
        f'<figure><a href="{place}"><img src="{place}" alt="{escape(alternative, quote=True)}" width="{width_pixels}"></a>\n'
        f"<figcaption><b>Figure {number}.</b> {escape(caption)}</figcaption></figure>\n"
    )


def chip(colour: str | None, name: str) -> Html:
    """A stage's name behind its colour."""
    mark = f'<span class="chip" style="background:{escape(colour, quote=True)}"></span>' if colour else ""
    return Html(f'<span class="stage">{mark}{escape(name)}</span>')


def branch(mark: str, name: Html) -> Html:
    """A name in a tree, behind the lines that lead to it."""
    return Html(f'<code class="stage">{escape(mark).replace(" ", "&nbsp;")}</code>{name.text}')


def code(text: str) -> Html:
    """Fixed-width text."""
    return Html(f"<code>{escape(text)}</code>")


def page(title: str, lead: list[str], sections: list[tuple[str, str, str]], notes: list[str]) -> str:
    """The whole document; `lead` are the paragraphs that open it, sections are (anchor, heading, HTML)."""
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in sections)
    bodies = "".join(f'<section id="{anchor}">\n<h2>{escape(heading)}</h2>\n{body}</section>\n' for anchor, heading, body in sections)
    items = "".join(f"<li>{escape(note)}</li>\n" for note in notes)
    box = f'<div class="notes"><b>Before you read on</b><ul>\n{items}</ul></div>\n' if notes else ""
    opening = "".join(paragraph(text, "lead") for text in lead)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{opening}<nav>{links}</nav>\n{box}{bodies}</body>\n</html>\n"
    )
