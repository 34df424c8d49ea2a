"""Seeded arithmetic and word problems, as short steps, long self-checking chains, or dialogue turns.

Every number lies below 50. The training and the evaluation problems share no fact:

- A fact is an operation with its unordered operands. a+b=c, c-a=b and c-b=a are one fact, whoever
  has the apples; so are a*d and d*a; three operands make a fact of their own.
- A fact is elementary if one of its operands (of a product: the larger one) has a single digit or
  ends in 0. These are the alphabet of the working (37+8, 30+12, 4*3); an evaluation never asks them.
- One in `HELD_OUT_ONE_IN` of the other facts is held out, by its hash. Evaluation asks only these.
- No text for training holds an expression that is a held-out fact: not in the question (or its story),
  not in a step of a longer sum, not in a check, not in a wrong try, not as a pair inside three terms.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_ONE_IN = 8
LARGEST = 49  # after 1.3M tokens of short_cot a 1.3M-parameter Llama answers 41 % of held-out problems; with 99, 13 %
SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "add_three": "++", "add_subtract": "+-"}
KINDS = {  # kind -> share of the problems
    "add": 0.2, "subtract": 0.2, "multiply": 0.1, "add_three": 0.1, "add_subtract": 0.1,
    "word_add": 0.1, "word_subtract": 0.1, "word_multiply": 0.05, "word_add_subtract": 0.05,
}  # fmt: skip
EXPRESSION = re.compile(r"\d+(?:[ \t]*[+\-*][ \t]*\d+)+")  # foreign text may space its signs
Step = tuple[str, int, int]  # sign, left, right


@dataclass(frozen=True)
class Problem:
    """A question with its answer; `operands` stand in the order of the expression, `kind` is one of `KINDS`."""

    question: str
    answer: str
    operands: tuple[int, ...]
    kind: str

    @property
    def operation(self) -> str:
        """The kind without its wording: a story about a sum is a sum."""
        return self.kind.removeprefix("word_")

    @property
    def expression(self) -> str:
        """The operands joined by their signs, such as 12+25-18."""
        signs = SIGNS[self.operation]
        return str(self.operands[0]) + "".join(f"{sign}{n}" for sign, n in zip(signs, self.operands[1:], strict=True))


# --- facts and what is held out ---------------------------------------------------------------------


def fact(signs: str, operands: tuple[int, ...]) -> str | None:
    """The fact's name, such as 'add 17 28' for 17+28 and for 45-28; None where it is elementary or too large to be asked."""
    if signs == "-":
        signs, operands = "+", (operands[0] - operands[1], operands[1])
    if any(n < 10 or n % 10 == 0 or n > LARGEST for n in (operands if signs != "*" else (max(operands),))):
        return None
    name = {"+": "add", "*": "multiply", "++": "add_three"}.get(signs, "add_subtract")
    return " ".join([name, *map(str, sorted(operands))])


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
    numbers = tuple(map(int, re.findall(r"\d+", expression)))
    signs = "".join(re.findall(r"[+\-*]", expression))
    found = {fact(sign, numbers[i : i + 2]) for i, sign in enumerate(signs)}
    if len(signs) == 2:
        found.add(fact("".join(sorted(signs)), numbers))
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
BOXES = ("bags", "boxes", "baskets", "jars")
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
    "word_multiply": (
        "Each of {1} {boxes} holds {0} {things}. How many {things} do they hold together?",
        "{name} buys {1} {boxes} with {0} {things} in each. How many {things} does {name} buy?",
    ),
    "word_add_subtract": (
        "{name} has {0} {things}, gets {1} more and loses {2}. How many {things} does {name} have now?",
        "A shop has {0} {things}, {1} more arrive and {2} are sold. How many {things} are left?",
    ),
}


def _number(rng: random.Random, largest: int) -> int:
    """A number from 11 to `largest` that does not end in 0, so that no drawn fact is elementary."""
    while (n := rng.randint(11, largest)) % 10 == 0:
        pass
    return n


def _operands(rng: random.Random, operation: str) -> tuple[int, ...]:
    if operation == "multiply":
        a = _number(rng, LARGEST // 2)
        return a, rng.randint(2, LARGEST // a)
    if operation == "add_three":
        a = _number(rng, LARGEST - 22)
        b = _number(rng, LARGEST - 11 - a)
        return a, b, _number(rng, LARGEST - a - b)
    a = _number(rng, LARGEST - 11)
    b = _number(rng, LARGEST - a)
    if operation == "add_subtract":
        return a, b, _number(rng, a + b - 1)
    return (a, b) if operation == "add" else (a + b, b)


def problem(rng: random.Random) -> Problem:
    """Draw any problem, held out or not."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    operands = _operands(rng, kind.removeprefix("word_"))
    drawn = Problem("", "", operands, kind)
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS), "boxes": rng.choice(BOXES)}
    text = rng.choice(STORIES[kind]) if kind in STORIES else rng.choice(ASKS)
    question = text.format(*operands, **words) if kind in STORIES else text.format(drawn.expression)
    return Problem(question, str(value(plan(drawn)[-1])), operands, kind)


def training_problem(rng: random.Random, accept: Callable[[Problem], bool] = trainable) -> Problem:
    """Draw until a problem may be trained on."""
    while not accept(found := problem(rng)):
        pass
    return found


def evaluation_problem(rng: random.Random) -> Problem:
    """Draw until a problem is held out."""
    return training_problem(rng, held_out)


# --- working ------------------------------------------------------------------------------------------


def value(step: Step) -> int:
    """What one step comes to."""
    sign, a, b = step
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def plan(problem: Problem) -> list[Step]:
    """The steps from left to right; the last one's value is the answer."""
    steps: list[Step] = []
    left = problem.operands[0]
    for sign, right in zip(SIGNS[problem.operation], problem.operands[1:], strict=True):
        steps.append((sign, left, right))
        left = value(steps[-1])
    return steps


def chain(step: Step) -> str:
    """One step through its tens and ones: 17+28=37+8=45, 45-28=25-8=17, 14*3=30+12=42."""
    sign, a, b = step
    tens, ones = divmod(a if sign == "*" else b, 10)
    middle = f"{10 * tens * b}+{ones * b}=" if sign == "*" else f"{value((sign, a, 10 * tens))}{sign}{ones}="
    return f"{a}{sign}{b}=" + (middle if tens and ones else "") + str(value(step))


def careful(step: Step) -> str:
    """One step with its tens and its ones in sentences of their own."""
    sign, a, b = step
    tens, ones = divmod(a if sign == "*" else b, 10)
    if not tens or not ones:
        return f"{a}{sign}{b}={value(step)}."
    split = f"{10 * tens + ones} is {10 * tens} and {ones}."
    if sign == "*":
        return f"{split} {10 * tens}*{b}={10 * tens * b}. {ones}*{b}={ones * b}. {10 * tens * b}+{ones * b}={value(step)}."
    half = value((sign, a, 10 * tens))
    return f"{split} {a}{sign}{10 * tens}={half}. {half}{sign}{ones}={value(step)}."


def slip(step: Step) -> tuple[int, str]:
    """A wrong value of a step, of the kind people get, and what went wrong."""
    sign, a, b = step
    right = value(step)
    if sign == "*":
        return a // 10 * 10 * b, "I left out the ones"
    if sign == "+" and a % 10 + b % 10 >= 10:
        return right - 10, "I lost the ten that the ones make"
    if sign == "-" and a % 10 < b % 10 and a + 10 <= LARGEST:
        return right + 10, "I forgot to borrow a ten"
    return right - 1, "I counted one too few"


def undo(step: Step, result: int) -> Step:
    """The step that leads from a result back to the left operand (for a product: the product itself)."""
    sign, a, b = step
    return ("-", result, b) if sign == "+" else ("+", result, b) if sign == "-" else ("*", a, b)


def other_way(problem: Problem) -> list[Step]:
    """Another way to the same answer."""
    n = problem.operands
    match problem.operation:
        case "add":  # tens with tens, ones with ones
            tens, ones = ("+", n[0] // 10 * 10, n[1] // 10 * 10), ("+", n[0] % 10, n[1] % 10)
            return [tens, ones, ("+", value(tens), value(ones))]
        case "subtract":  # down by the ones first, then by the tens
            return [("-", n[0], n[1] % 10), ("-", n[0] - n[1] % 10, n[1] // 10 * 10)]
        case "multiply":
            return [("*", n[0], n[1] - 1), ("+", n[0] * (n[1] - 1), n[0])] if n[1] > 2 else [("+", n[0], n[0])]
        case "add_three":
            return [("+", n[2], n[1]), ("+", n[2] + n[1], n[0])]
    if n[0] > n[2]:
        return [("-", n[0], n[2]), ("+", n[0] - n[2], n[1])]
    if n[1] > n[2]:
        return [("-", n[1], n[2]), ("+", n[1] - n[2], n[0])]
    return [("+", n[1], n[0]), ("-", n[1] + n[0], n[2])]


# --- renderings ---------------------------------------------------------------------------------------


def boxed(answer: str) -> str:
    r"""The last sentence of every rendering; the answer stands in \boxed{}."""
    return f"The answer is \\boxed{{{answer}}}."


def short(problem: Problem) -> str:
    """The question, a line break, its steps in one line, the boxed answer."""
    return f"{problem.question}\n{_short_steps(problem)}"


def _short_steps(problem: Problem) -> str:
    return f"{', '.join(map(chain, plan(problem)))}. {boxed(problem.answer)}"


def long(problem: Problem) -> str:
    """The question, a line break, a chain that goes slowly, checks itself and mends what it got wrong.

    About one in three starts with a wrong try, which its check catches; which ones is a matter of
    the question's text alone, so that a problem has one long rendering.
    """
    rng = random.Random(problem.question)
    steps = plan(problem)
    parts = [rng.choice(("Let me go step by step.", "I take it slowly.", "Step by step.")) + f" I need {problem.expression}."]
    if rng.random() < 1 / 3:
        parts.append(_wrong_try(steps[0], rng))
    parts += [careful(step) for step in steps]
    parts.append(f"So {problem.expression}={problem.answer}.")
    parts.append(_check_other_way(problem, rng))
    if problem.operation != "multiply":
        parts.append(_check_back(steps))
    return f"{problem.question}\n" + "\n".join(parts) + f"\n{boxed(problem.answer)}"


def _wrong_try(step: Step, rng: random.Random) -> str:
    wrong, why = slip(step)
    sign, a, b = step
    lead = rng.choice(("At first glance", "My first guess for", "Quickly"))
    if sign == "*":
        caught = f"{a // 10 * 10}*{b}={wrong} already, and {a} is more than {a // 10 * 10}"
    else:
        caught = f"{chain(undo(step, wrong))}, but it should be {a}"
    return f"{lead} {a}{sign}{b} I say {wrong}. Check: {caught}, not ok. {why}. Again."


def _check_other_way(problem: Problem, rng: random.Random) -> str:
    lead = rng.choice(("another way", "differently", "once more"))
    return f"Check: {lead}, {', '.join(map(chain, other_way(problem)))}, the same, ok."


def _check_back(steps: list[Step]) -> str:
    back = [undo(step, value(step)) for step in reversed(steps)]
    return f"Check: back from {value(steps[-1])}, {', '.join(map(chain, back))}, where I started, ok."


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
    asked = item.question if isinstance(item, Problem) else item.request
    wish = random.Random(asked).choice(REQUESTS)
    said = _short_steps(item) if isinstance(item, Problem) else f"{item.reply} \\boxed{{{item.answer}}}."
    return f"User: {asked} {wish}\nAssistant: {said}"
