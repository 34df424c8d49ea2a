r"""What an answer counts: 15\mbox{ cm}^2, \$18.90, 45 minutes, 5 apples, 62.5\%, 90^\circ, 3 \text{ million}.

A unit has one name; units of one dimension carry their size, so that 5 m is 500 cm. Names that nobody knows are kept as they are.
"""

from __future__ import annotations

import re
from fractions import Fraction

PERCENT, DEGREE = "%", "degree"
SIZES: dict[str, tuple[str, Fraction]] = {  # unit -> (what it measures, how much)
    "mm": ("length", Fraction(1, 1000)), "cm": ("length", Fraction(1, 100)), "m": ("length", Fraction(1)),
    "km": ("length", Fraction(1000)), "in": ("foot", Fraction(1, 12)), "ft": ("foot", Fraction(1)), "yd": ("foot", Fraction(3)),
    "mi": ("foot", Fraction(5280)), "s": ("time", Fraction(1)), "min": ("time", Fraction(60)), "h": ("time", Fraction(3600)),
    "day": ("time", Fraction(86400)), "week": ("time", Fraction(604800)), "g": ("mass", Fraction(1)), "kg": ("mass", Fraction(1000)),
    "mg": ("mass", Fraction(1, 1000)), "cent": ("money", Fraction(1, 100)), "dollar": ("money", Fraction(1)),
    "ml": ("volume", Fraction(1, 1000)), "l": ("volume", Fraction(1)),
}  # fmt: skip
NAMES = {
    "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km",
    "kilometre": "km", "inch": "in", "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "second": "s", "sec": "s",
    "minute": "min", "mins": "min", "hour": "h", "hr": "h", "gram": "g", "kilogram": "kg", "milligram": "mg", "cents": "cent",
    "¢": "cent", "usd": "dollar", "$": "dollar", "milliliter": "ml", "millilitre": "ml", "liter": "l", "litre": "l", "deg": DEGREE,
    "percent": PERCENT, "unit": "", "kmh": "km/h", "kph": "km/h", "mph": "mi/h",
}  # fmt: skip
MULTIPLES = {
    "dozen": Fraction(12), "hundred": Fraction(100), "thousand": Fraction(1000), "million": Fraction(10**6), "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}  # fmt: skip
NOT_UNITS = {
    "and",
    "or",
    "if",
    "for",
    "when",
    "where",
    "mod",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "ln",
    "exp",
    "sqrt",
    "max",
    "min",
}

POWER = r"(?:\s*\^\s*\{?\s*(\d)\s*\}?)?"
TEXT_UNIT = re.compile(r"(?P<rest>.*?)\s*(?P<over>/?)\s*\\text\s*\{(?P<name>[^{}]*)\}" + POWER + r"\s*$", re.DOTALL)
FRACTION_UNIT = re.compile(r"(.*?)\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*$", re.DOTALL)
PLAIN_UNIT = re.compile(r"(?P<rest>.*[\d}])\s*(?P<name>[a-zA-Z]+(?:[ /]+[a-zA-Z]+)*\.?)" + POWER + r"$", re.DOTALL)
OF_AN_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z]).*\\text\{degree\}")  # these degrees are no unit of the whole
BARE_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")


def canonical(name: str, power: str = "") -> str:
    """The one name of a unit: `square inches`, `in. squared` and `inches^2` are `in^2`; '' for none."""
    words = [word for word in re.split(r"[\s.]+", name.lower().replace(" per ", "/").replace("sq.", "square ")) if word]
    for word, exponent in (("square", "2"), ("squared", "2"), ("sq", "2"), ("cubic", "3"), ("cubed", "3")):
        if word in words:
            words.remove(word)
            power = exponent
    found = "/".join(_one(part) for part in " ".join(words).replace(" / ", "/").split("/"))
    return f"{found}^{power}" if found and power not in ("", "1") else found


def _one(word: str) -> str:
    word = word.strip()
    for form in (word, word.removesuffix("s")):
        if form in NAMES:
            return NAMES[form]
        if form in SIZES:
            return form
    return word.removesuffix("s") if len(word) > 3 else word


def split_unit(text: str) -> tuple[str, str, Fraction]:
    """(what is counted, unit, multiple) of normalised LaTeX; unit '' where there is none.

    A text that is only words is not a unit, and stays.
    """
    unit, multiple, text = "", Fraction(1), text.strip()
    if text.startswith(("\\$", "-\\$")):
        text, unit = text.replace("\\$", "", 1).strip(), "dollar"
    for sign in ("euro", "pound"):
        if text.startswith(f"\\text{{{sign}}}"):
            text, unit = text.removeprefix(f"\\text{{{sign}}}").strip(), sign
    if OF_AN_ANGLE.search(text):
        return text, "", multiple
    if text.endswith("%") and text != "%":
        return text[:-1].strip(), PERCENT, multiple
    if match := FRACTION_UNIT.fullmatch(text):
        return match.group(1).strip(), canonical(f"{match.group(2)}/{match.group(3)}"), multiple
    rest, found = _trailing_words(text)
    words = found.split()
    while words and words[0] in MULTIPLES:
        multiple *= MULTIPLES[words.pop(0)]
    return rest, " ".join(words) or unit, multiple


def _trailing_words(text: str) -> tuple[str, str]:
    found: list[str] = []
    while (match := TEXT_UNIT.fullmatch(text)) and match["rest"].strip() and not match["rest"].rstrip().endswith(tuple("+-=^_({,<>")):
        name = canonical(match["name"], match.group(4) or "")
        found.insert(0, f"/{name}" if match["over"] else name)
        text = match["rest"].strip()
    if found:
        return text, " ".join(found).replace(" /", "/").strip()
    if (match := PLAIN_UNIT.fullmatch(text)) and _is_unit(match["name"]) and not BARE_LETTER.search(match["rest"]):
        return match["rest"].strip(), canonical(match["name"], match.group(3) or "")
    return text, ""


def _is_unit(name: str) -> bool:
    """Whether bare words after a number count something: a known unit of two letters or more, or words of three that are no function."""
    words = re.split(r"[ /.]+", name.lower().strip(". "))
    if len(name) == 1 or any(word in NOT_UNITS - {"min", "sec"} for word in words):
        return False
    return all(word in NAMES or word in SIZES or word in MULTIPLES or len(word) >= 3 or word.removesuffix("s") in SIZES for word in words)


def ratio(gold: str, answer: str) -> Fraction | None:
    """How many of the gold's units one of the answer's is; None where they measure different things."""
    gold_name, _, gold_power = gold.partition("^")
    name, _, power = answer.partition("^")
    if gold == answer:
        return Fraction(1)
    if gold_power != power or gold_name not in SIZES or name not in SIZES or SIZES[gold_name][0] != SIZES[name][0]:
        return None
    return (SIZES[name][1] / SIZES[gold_name][1]) ** int(power or "1")
