"""Seeded sums and differences, bare or as a story: in one line of steps, as a chain that checks itself, or as dialogue turns.

Every number lies below 100. The training and the evaluation problems share no fact:

- A fact is an unordered pair of operands of a sum. a+b=c, c-a=b and c-b=a are one fact, whoever has the apples.
- A fact is elementary if one of its operands has a single digit or ends in 0. These are the alphabet of the
  working (37+8, 30+12); an evaluation never asks them.
- One in `HELD_OUT_ONE_IN` of the other facts is held out, by its hash. Evaluation asks only these.
- No text for training holds an expression that is a held-out fact: not in the question (or its story),
  not in a step, not in a check, not in a wrong try, not as a pair inside a longer expression.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

HELD_OUT_ONE_IN = 8
LARGEST = 99  # of 2,400 facts 300 are held out; with 49 of 170 some 20, and sums are then learnt by heart instead of worked out
SIGNS = {"add": "+", "subtract": "-"}
KINDS = {"add": 0.35, "subtract": 0.35, "word_add": 0.15, "word_subtract": 0.15}  # kind -> share of the problems
EXPRESSION = re.compile(r"\d+(?:[ \t]*[+\-][ \t]*\d+)+")  # foreign text may space its signs
WRONG_TRIES = 0.25  # of the long renderings
Step = tuple[str, int, int]  # sign, left, right


@dataclass(frozen=True)
class Problem:
    """A question with its answer; `operands` stand in the order of the expression, `kind` is one of `KINDS`."""

    question: str
    answer: str
    operands: tuple[int, int]
    kind: str

    @property
    def operation(self) -> str:
        """The kind without its wording: a story about a sum is a sum."""
        return self.kind.removeprefix("word_")

    @property
    def expression(self) -> str:
        """The operands joined by their sign, such as 12+25."""
        left, right = self.operands
        return f"{left}{SIGNS[self.operation]}{right}"


# --- facts and what is held out ---------------------------------------------------------------------


def fact(sign: str, operands: tuple[int, int]) -> str | None:
    """The fact's name, such as '17+28' for 17+28 and for 45-28; None where it is elementary or too large to be asked."""
    left, right = operands
    pair = sorted((left, right) if sign == "+" else (left - right, right))
    return None if any(n < 10 or n % 10 == 0 or n > LARGEST for n in pair) else f"{pair[0]}+{pair[1]}"


@functools.lru_cache(maxsize=1 << 16)
def fact_held_out(name: str) -> bool:
    """Whether the hash of a fact's name keeps it for evaluation."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def facts_in(text: str) -> set[str]:
    """Names of the facts that the expressions of a text state, neighbouring pairs of longer ones included."""
    return {name for expression in EXPRESSION.findall(text) for name in _facts_of(expression)}


def states_held_out(text: str) -> bool:
    """Whether a text, ours or foreign, holds an expression that is a held-out fact."""
    return any(map(fact_held_out, facts_in(text)))


@functools.lru_cache(maxsize=1 << 16)
def _facts_of(expression: str) -> frozenset[str]:
    numbers = list(map(int, re.findall(r"\d+", expression)))
    found = {fact(sign, pair) for sign, pair in zip(re.findall(r"[+\-]", expression), pairwise(numbers), strict=True)}
    return frozenset(name for name in found if name)


def held_out(problem: Problem) -> bool:
    """Whether a problem belongs to the evaluation."""
    name = fact(SIGNS[problem.operation], problem.operands)
    return name is not None and fact_held_out(name)


def trainable(problem: Problem) -> bool:
    """Whether none of a problem's renderings states a held-out fact."""
    if held_out(problem):
        return False
    texts = (problem.expression, short(problem), long(problem), instruction(problem))
    return not any(map(states_held_out, texts))


# --- problems -----------------------------------------------------------------------------------------

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ida", "Jon", "Kim", "Lea")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stones", "tickets")
ASKS = ("What is {}?", "Compute {}.", "Find {}.", "Work out {}.", "How much is {}?", "Calculate {}.")
STORIES = {
    "word_add": (
        "{name} has {0} {things} and gets {1} more. How many {things} does {name} have now?",
        "{name} finds {0} {things} and {other} finds {1}. How many {things} do they find together?",
        "There are {0} {things} on one table and {1} on another. How many {things} are there in all?",
    ),
    "word_subtract": (
        "{name} has {0} {things} and gives {1} to {other}. How many {things} are left?",
        "Of {0} {things}, {1} are sold. How many {things} remain?",
        "{name} has {0} {things} and {other} has {1}. How many more {things} does {name} have?",
    ),
}


def _number(rng: random.Random, largest: int) -> int:
    """A number from 11 to `largest` that does not end in 0, so that no drawn fact is elementary."""
    while (n := rng.randint(11, largest)) % 10 == 0:
        pass
    return n


def _operands(rng: random.Random, operation: str) -> tuple[int, int]:
    a = _number(rng, LARGEST - 11)
    b = _number(rng, LARGEST - a)
    return (a, b) if operation == "add" else (a + b, b)


def problem(rng: random.Random) -> Problem:
    """Draw any problem, held out or not."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    operands = _operands(rng, kind.removeprefix("word_"))
    drawn = Problem("", "", operands, kind)
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    text = rng.choice(STORIES[kind]) if kind in STORIES else rng.choice(ASKS)
    question = text.format(*operands, **words) if kind in STORIES else text.format(drawn.expression)
    return Problem(question, str(value(asked(drawn))), operands, kind)


def training_problem(rng: random.Random, accept: Callable[[Problem], bool] = trainable) -> Problem:
    """Draw until a problem may be trained on."""
    while not accept(found := problem(rng)):
        pass
    return found


def evaluation_problem(rng: random.Random) -> Problem:
    """Draw until a problem is held out."""
    return training_problem(rng, held_out)


# --- working ------------------------------------------------------------------------------------------


def asked(problem: Problem) -> Step:
    """The step that a problem asks for."""
    return (SIGNS[problem.operation], *problem.operands)


def value(step: Step) -> int:
    """What one step comes to."""
    sign, a, b = step
    return a + b if sign == "+" else a - b


def chain(step: Step) -> str:
    """One step through the tens and ones of its right operand: 17+28=37+8=45, 45-28=25-8=17."""
    sign, a, b = step
    tens, ones = divmod(b, 10)
    middle = f"{value((sign, a, 10 * tens))}{sign}{ones}=" if tens and ones else ""
    return f"{a}{sign}{b}={middle}{value(step)}"


def careful(step: Step) -> str:
    """One step with its tens and its ones in sentences of their own."""
    sign, a, b = step
    tens, ones = divmod(b, 10)
    half = value((sign, a, 10 * tens))
    return f"{b} is {10 * tens} and {ones}. {a}{sign}{10 * tens}={half}. {half}{sign}{ones}={value(step)}."


def slip(step: Step) -> tuple[int, str]:
    """A wrong value of a step, of the kind people get, and what went wrong."""
    sign, a, b = step
    right = value(step)
    if sign == "+" and a % 10 + b % 10 >= 10:
        return right - 10, "I lost the ten that the ones make"
    if sign == "-" and a % 10 < b % 10 and a + 10 <= LARGEST:
        return right + 10, "I forgot to borrow a ten"
    return right - 1, "I counted one too few"


def undo(step: Step, result: int) -> Step:
    """The step that leads from a result back to the left operand."""
    sign, _, b = step
    return ("-" if sign == "+" else "+", result, b)


def other_way(step: Step) -> list[Step]:
    """Another way to the same value."""
    sign, a, b = step
    if sign == "+":  # tens with tens, ones with ones
        tens, ones = ("+", a // 10 * 10, b // 10 * 10), ("+", a % 10, b % 10)
        return [tens, ones, ("+", value(tens), value(ones))]
    return [("-", a, b % 10), ("-", a - b % 10, b // 10 * 10)]  # down by the ones first, then by the tens


# --- renderings ---------------------------------------------------------------------------------------


def boxed(answer: str) -> str:
    r"""The last sentence of every rendering; the answer stands in \boxed{}."""
    return f"The answer is \\boxed{{{answer}}}."


def short(problem: Problem) -> str:
    """The question, a line break, its working in one line, the boxed answer."""
    return f"{problem.question}\n{chain(asked(problem))}. {boxed(problem.answer)}"


def long(problem: Problem) -> str:
    """The question, a line break, a chain that goes slowly, checks itself and mends what it got wrong.

    About one in four starts with a wrong try, which its check catches; which ones, and how the result is checked, is
    a matter of the question's text alone, so that a problem has one long rendering.
    """
    rng = random.Random(problem.question)
    step = asked(problem)
    parts = [f"I need {problem.expression}."]
    if rng.random() < WRONG_TRIES:
        parts.append(_wrong_try(step))
    parts.append(careful(step))
    check = rng.choice((other_way(step), [undo(step, value(step))]))
    parts.append(f"Check: {', '.join(map(chain, check))}, ok.")
    return f"{problem.question}\n" + "\n".join(parts) + f"\n{boxed(problem.answer)}"


def _wrong_try(step: Step) -> str:
    wrong, why = slip(step)
    return f"Is it {wrong}? Check: {chain(undo(step, wrong))}, not {step[1]}. {why}."


# --- dialogue -----------------------------------------------------------------------------------------

REQUESTS = (
    r"Put the answer in \boxed{}.", r"Write the answer in \boxed{}.", r"Give the final answer in \boxed{}.",
    r"The answer should stand in \boxed{}.",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WORDS = ("river", "window", "garden", "paper", "summer", "bridge", "music", "letter", "silver", "forest", "number", "circle")


@dataclass(frozen=True)
class TextTask:
    """A small task about words, with the words of the reply before the boxed answer."""

    request: str
    reply: str
    answer: str


def text_task(rng: random.Random) -> TextTask:
    """Draw a small task: order, count, repeat, spell, compare, name the next day."""
    words = rng.sample(WORDS, rng.randint(2, 4))
    word, listed = words[0], ", ".join(words)
    numbers = rng.sample(range(1, LARGEST + 1), 3)
    day = rng.randrange(len(DAYS))
    return rng.choice(
        (
            TextTask(f"Sort these words by the alphabet: {listed}.", "In order they are", ", ".join(sorted(words))),
            TextTask(f"How many words are in this list: {listed}?", f"The list is {listed}. The count is", str(len(words))),
            TextTask(f"Repeat the word {word} {len(words)} times.", "Here it is:", " ".join([word] * len(words))),
            TextTask(f"Spell the word {word} with dashes.", "The letters are", "-".join(word)),
            TextTask(f"What is the last word of this list: {listed}?", "The last word is", words[-1]),
            TextTask(f"Write the word {word} in capital letters.", "In capitals it is", word.upper()),
            TextTask(f"Which day comes after {DAYS[day]}?", f"After {DAYS[day]} comes", DAYS[(day + 1) % 7]),
            TextTask(f"Which of {numbers[0]}, {numbers[1]} and {numbers[2]} is the largest?", "The largest is", str(max(numbers))),
            TextTask(f"Sort these numbers: {', '.join(map(str, numbers))}.", "In order:", ", ".join(map(str, sorted(numbers)))),
        )
    )


def instruction(item: Problem | TextTask) -> str:
    r"""One exchange: a `User:` line that asks for the answer in \boxed{}, then an `Assistant:` line."""
    wanted = item.question if isinstance(item, Problem) else item.request
    wish = random.Random(wanted).choice(REQUESTS)
    said = f"{chain(asked(item))}. {boxed(item.answer)}" if isinstance(item, Problem) else f"{item.reply} \\boxed{{{item.answer}}}."
    return f"User: {wanted} {wish}\nAssistant: {said}"
