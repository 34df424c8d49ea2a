r"""One spelling for LaTeX that prints the same: \dfrac12 and \frac{1}{2}, 10,\!080 and 10,080; and brackets that belong together.

Nothing here changes what is said: sizes, spaces, delimiters and synonyms go, values stay.
"""

# ruff: noqa: RUF001 - signs that look alike are the subject
from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "π": "\\pi ", "∞": "\\infty ",
    "°": "^\\circ ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∪": "\\cup ", "±": "\\pm ", "∈": "\\in ",
    "θ": "\\theta ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "²": "^2", "³": "^3", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}", "⟨": "\\langle ", "⟩": "\\rangle ", "€": "\\text{euro}", "£": "\\text{pound}",
})  # fmt: skip
SYNONYMS = {
    "geqslant": "ge", "geq": "ge", "leqslant": "le", "leq": "le", "neq": "ne", "lt": "<", "gt": ">", "times": "cdot", "ast": "cdot",
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "varnothing": "emptyset", "lor": "text{ or }", "vee": "text{ or }",
    "land": "text{ and }", "wedge": "text{ and }", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "degree": "text{degree}",
    "backslash": "setminus", "simeq": "approx", "colon": ":", "vert": "|", "lvert": "|", "rvert": "|",
}  # fmt: skip
COMMAND = re.compile(r"\\(" + "|".join(sorted(SYNONYMS, key=len, reverse=True)) + r")(?![a-zA-Z])[ ]?")
PLAIN = {"<", ">", "[", "]", ":", "|"}  # characters, not commands
SIZES = re.compile(
    r"\\(?:left|right)(?![a-zA-Z])\s*\.?|\\(?:[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits)(?![a-zA-Z])"
)
SPACES = re.compile(r"\\[,;:!>]|\\ |~|\\(?:q?quad|thinspace|enspace|enskip)(?![a-zA-Z])|\\[hv]space\*?\s*\{[^{}]*\}")
UPRIGHT = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textsf|textnormal|mbox|hbox|bm|boldsymbol|operatorname\*?)\s*(?=\{)"
)
ASCII = (
    (re.compile(r"(?<!\\)\\[()\[\]]"), " "),  # \( \) \[ \]
    (re.compile(r"(?<!\\)\$"), ""),
    (re.compile(r"\{,\}|,\s*\\!\s*"), ","),
    (re.compile(r"\{:\}"), ":"),
    (re.compile(r"(?<=\d)\\[,!]\s*(?=\d{3}(?!\d))"), ""),  # a thin space between thousands
    (SIZES, ""),
    (SPACES, " "),
    (UPRIGHT, r"\\text"),
    (re.compile(r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})"), r"\\text{degree}"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\log\s*_\s*(?:e(?![a-zA-Z])|\{\s*e\s*\})"), r"\\ln "),
    (re.compile(r"(\\text\s*\{[^{}]*[^{}\s,]),?\s+(and|or)\s+([^{}\s][^{}]*\})"), r"\1}\\text{ \2 }\\text{\3"),
    (re.compile(r">=|=>"), r"\\ge "),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\*"), r"\\cdot "),
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"\\mathbb\s*(?:\{\s*R\s*\}|R(?![a-zA-Z]))"), r"\\mathbb{R}"),
)
OPEN, CLOSE = ("(", "[", "{", "\\{", "\\langle", "\\begin"), (")", "]", "}", "\\}", "\\rangle", "\\end")
PIECE = re.compile(r"\\(?:begin|end|langle|rangle)(?![a-zA-Z])|\\[a-zA-Z]+|\\.|.", re.DOTALL)
ROW_END = "\ue000"  # stands for two backslashes meanwhile: the second of them begins no command
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")


def normal(text: str) -> str:
    """The text in the one spelling, spaces single, without a full stop at its end or braces around it."""
    text = unicodedata.normalize("NFKC", text.translate(UNICODE)).replace("⁄", "/").replace("\\\\", ROW_END)
    for pattern, replacement in ASCII:
        text = pattern.sub(replacement, text)
    text = COMMAND.sub(_synonym, text)
    text = REPEATING.sub(_repeating, text)
    text = _braced_roots(_braced_arguments(text))
    text = re.sub(r"\s+", " ", text.replace(ROW_END, "\\\\ ")).strip()
    text = re.sub(r"[\s.,;:]+$", "", text)
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _synonym(match: re.Match[str]) -> str:
    word = SYNONYMS[match.group(1)]
    return word if word in PLAIN else f"\\{word} " if word.isalpha() else f"\\{word}"


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as a fraction."""
    whole, fixed, period = match.group(1) or "0", match.group(2), match.group(3)
    digits = len(fixed), len(period)
    value = Fraction(int(whole + fixed + period) - int(whole + fixed), 10 ** sum(digits) - 10 ** digits[0])
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def pieces(text: str) -> list[tuple[int, str]]:
    """(position, piece): characters and commands, an escaped brace as one piece."""
    return [(match.start(), match.group()) for match in PIECE.finditer(text)]


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed, by a bracket of any kind; -1 where it is not."""
    depth = 0
    for position, piece in pieces(text[start:]):
        depth += (piece in OPEN) - (piece in CLOSE)
        if depth <= 0:
            return start + position
    return -1


def split_top(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of a text between separators that stand in no bracket, stripped; one part where brackets do not match."""
    depth, start, skip, parts = 0, 0, 0, []
    for position, piece in pieces(text):
        if position < skip:
            continue
        if depth == 0 and (match := separator.match(text, position)) and match.end() > position:
            parts.append(text[start:position].strip())
            start = skip = match.end()
            continue
        depth += (piece in OPEN) - (piece in CLOSE)
        if depth < 0:
            return [text.strip()]
    return [*parts, text[start:].strip()] if depth == 0 else [text.strip()]


def balanced(text: str) -> bool:
    """Whether all brackets are closed, by brackets of any kind: (3, 4] is balanced."""
    depth = 0
    for _, piece in pieces(text):
        depth += (piece in OPEN) - (piece in CLOSE)
        if depth < 0:
            return False
    return depth == 0


ARGUMENT = re.compile(r"\s*(\d|[a-zA-Z]|\\[a-zA-Z]+)")
TAKES = re.compile(r"\\(frac|sqrt)(?![a-zA-Z])")


def _braced_arguments(text: str) -> str:
    r"""\frac12, \frac1{2} and \sqrt2 with all their braces."""
    out, position = [], 0
    for match in TAKES.finditer(text):
        if match.start() < position:
            continue
        out.append(text[position : match.end()])
        position = match.end()
        if match.group(1) == "sqrt" and text[position:].lstrip().startswith("["):
            position = _copied(text, position, out)
        for _ in range(2 if match.group(1) == "frac" else 1):
            bare = ARGUMENT.match(text, position)
            if bare and not TAKES.match(text, bare.start(1)):
                out.append(f"{{{bare.group(1)}}}")
                position = bare.end()
            elif text[position:].lstrip().startswith("{"):
                position = _copied(text, position, out)
    return "".join(out) + text[position:]


def _copied(text: str, position: int, out: list[str]) -> int:
    """Copy the bracketed argument after `position`, its own arguments braced; where it ends."""
    start = position + len(text[position:]) - len(text[position:].lstrip())
    end = closing(text, start)
    if end < 0:
        return position
    out.append(text[start] + _braced_arguments(text[start + 1 : end]).strip() + text[end])
    return end + 1


def _braced_roots(text: str) -> str:
    r"""sqrt(5) and √5 as \sqrt{5}."""
    while match := re.search(r"(?<![\\a-zA-Z])sqrt\s*(?=\()|√\s*(?=\()", text):
        end = closing(text, match.end())
        if end < 0:
            return text
        text = f"{text[: match.start()]}\\sqrt{{{text[match.end() + 1 : end]}}}{text[end + 1 :]}"
    return re.sub(r"√\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}", text)
