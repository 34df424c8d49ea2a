"""Speed of the grading pool beside a plain process pool over math-verify: same answers, same number of processes.

The answers equal their golds and are written differently: fractions, decimals, mixed numbers, radicals, products,
with words around the box. Three systems take turns:

- `plain`: concurrent.futures.ProcessPoolExecutor over math-verify's parse, parse, verify as its README shows, with its own
  time-outs (alarms of 5 seconds each). Its processes get the same memory limit as ours, or hostile answers would fill the machine.
- `pool`: our pool over the same three calls without alarms: what the pool alone costs or saves.
- `ours`: our pool over our grader, as reward and evaluation use it.

All pools are started and warm before the clock starts, and live through all rounds. Every round has new answers; with hostile
answers among them, every one that is not hostile must be graded right by `ours`. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction

from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.tasks.grading import Verdict, grade
from megatron_ext.tasks.problems import Problem
from megatron_ext.tasks.workers import GradingPool, count_outcomes
from tools.plain_grading import MEMORY_BYTES, as_its_readme, limit_memory, without_alarms

WORKERS = 2
DEADLINE_SECONDS = RLPlan().grading_seconds  # of processor time for one answer, as a run has it
RECYCLE_AFTER = 1000
CHUNK = 16  # answers in one message of the plain pool; the default, 1, is slower
WARM_UP = 200
SEED = 0
CLEAN_AT_LEAST, HOSTILE_AT_LEAST = 1.0, 5.0  # the bars, `ours` over `plain`
HOSTILE = (
    "9^{9^{9^{9}}}", "(9^{9})^{9^{9}}", "2^{x+9^{9}}", "(10^{8})!", "\\binom{10^{9}}{5 \\cdot 10^{8}}",  # too large to write out
    "\\sum_{n=1}^{10^{9}} \\frac{1}{n^{2}}", "\\int \\frac{\\sin(x^{5} + \\cos x)}{x^{7} + e^{x}} dx",  # work without an end
    "(x+1)^{9999}", "(1+\\sqrt{2})^{9999}", "(x+y+z+w)^{200}",  # multiplied out, pages
    "\\frac{1}{x+" * 30 + "x" + "}" * 30, "\\sqrt{" * 300 + "2" + "}" * 300, "\\frac{" * 200 + "1" + "}{2}" * 200,  # nested
    "(" * 2000 + "1" + ")" * 2000, "1+" * 50000 + "1", "A" * 1_000_000,  # long
)  # fmt: skip
Answer = tuple[str, str]  # (gold, response)


def fraction(value: Fraction) -> str:
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def a_fraction(draw: random.Random) -> Answer:
    """Not in lowest terms, or with a slash."""
    value, factor = Fraction(draw.randint(1, 99), draw.randint(101, 199)), draw.randint(2, 9)
    top, bottom = value.numerator * factor, value.denominator * factor
    return fraction(value), draw.choice([f"\\dfrac{{{top}}}{{{bottom}}}", f"{top}/{bottom}"])


def a_decimal(draw: random.Random) -> Answer:
    value = Fraction(draw.randint(1, 9999), 2 ** draw.randint(1, 4) * 5 ** draw.randint(0, 3))
    places = max(len(str(value.denominator)) + 3, 8)
    return fraction(value), f"{float(value):.{places}f}".rstrip("0")


def a_mixed_number(draw: random.Random) -> Answer:
    whole, part = draw.randint(1, 99), Fraction(draw.randint(1, 12), 13)
    return fraction(whole + part), f"{whole}\\frac{{{part.numerator}}}{{{part.denominator}}}"


def a_radical(draw: random.Random) -> Answer:
    outside, inside = draw.randint(2, 30), draw.choice([2, 3, 5, 6, 7, 10, 11, 13])
    return f"{outside}\\sqrt{{{inside}}}", draw.choice(
        [f"\\sqrt{{{outside**2 * inside}}}", f"\\frac{{{outside * inside}}}{{\\sqrt{{{inside}}}}}"]
    )


def a_product(draw: random.Random) -> Answer:
    first, second = draw.randint(1, 30), draw.randint(1, 30)
    return f"x^2 + {first + second}x + {first * second}", f"(x + {first})(x + {second})"


def a_number(draw: random.Random) -> Answer:
    value = draw.randint(1000, 10**7)
    return str(value), draw.choice([f"{value:,}", f"{value}.0", f"{value // 2} + {value - value // 2}"])


KINDS: tuple[Callable[[random.Random], Answer], ...] = (a_fraction, a_decimal, a_mixed_number, a_radical, a_product, a_number)


def make_answers(seed: int, count: int, num_hostile: int) -> tuple[list[Answer], set[int]]:
    """Golds with responses, and the positions of the hostile ones among them, evenly spread; each seed goes on in their list."""
    draw = random.Random(seed)
    answers = []
    hostile = {(2 * turn + 1) * count // (2 * num_hostile) for turn in range(num_hostile)}
    for position in range(count):
        gold, answer = draw.choice(KINDS)(draw)
        if position in hostile:
            answer = HOSTILE[(seed * num_hostile + len([one for one in hostile if one < position])) % len(HOSTILE)]
        answers.append((gold, f"We work it out step by step, and so the answer is \\boxed{{{answer}}}."))
    return answers, hostile


class Plain:
    """ProcessPoolExecutor over math-verify."""

    def __init__(self, deadline_seconds: float) -> None:  # noqa: ARG002 - its time-outs are its own
        self.pool = ProcessPoolExecutor(WORKERS, initializer=limit_memory)

    def __call__(self, answers: list[Answer]) -> list[str]:
        golds, responses = zip(*answers, strict=True)
        return [str(right) for right in self.pool.map(as_its_readme, golds, responses, chunksize=CHUNK)]

    def close(self) -> None:
        self.pool.shutdown()


class Pool:
    """Our pool over math-verify."""

    def __init__(self, deadline_seconds: float) -> None:
        self.pool: GradingPool[bool] = GradingPool(
            without_alarms, workers=WORKERS, deadline_seconds=deadline_seconds, memory_bytes=MEMORY_BYTES, recycle_after=RECYCLE_AFTER,
            warm_up=make_answers(SEED - 1, WARM_UP, 0)[0],
        )  # fmt: skip

    def __call__(self, answers: list[Answer]) -> list[str]:
        return [str(one.verdict) if one.verdict is not None else one.ending.value for one in self.pool.grade_all(answers)]

    def close(self) -> None:
        self.pool.close()


class Ours:
    """Our pool over our grader."""

    def __init__(self, deadline_seconds: float) -> None:
        self.pool: GradingPool[Verdict] = GradingPool(
            grade, workers=WORKERS, deadline_seconds=deadline_seconds, memory_bytes=MEMORY_BYTES, recycle_after=RECYCLE_AFTER,
            warm_up=self.requests(make_answers(SEED - 1, WARM_UP, 0)[0]),
        )  # fmt: skip

    @staticmethod
    def requests(answers: list[Answer]) -> list[tuple[Problem, str]]:
        return [(Problem(id="", question="", answers=(gold,), source="bench"), response) for gold, response in answers]

    def __call__(self, answers: list[Answer]) -> list[str]:
        outcomes = self.pool.grade_all(self.requests(answers))
        return [next(iter(count_outcomes([one]))) for one in outcomes]

    def close(self) -> None:
        self.pool.close()


SYSTEMS: dict[str, Callable[[float], Plain | Pool | Ours]] = {"plain": Plain, "pool": Pool, "ours": Ours}


def bench(count: int, num_hostile: int, rounds: int, bar: float, deadline_seconds: float) -> dict[str, object]:
    """Let the systems take turns on the same answers."""
    systems = {name: make(deadline_seconds) for name, make in SYSTEMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    said: dict[str, Counter[str]] = {name: Counter() for name in systems}
    wrongly: list[tuple[Answer, str]] = []
    for system in systems.values():
        system(make_answers(SEED - 1, WARM_UP, 0)[0])
    for turn in range(rounds):
        answers, hostile = make_answers(SEED + turn, count, num_hostile)
        for name in list(systems)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            results = systems[name](answers)
            seconds[name].append(round(time.perf_counter() - began, 3))
            said[name].update(results)
            if name == "ours":
                wrongly += [(answers[i], one) for i, one in enumerate(results) if i not in hostile and one != "correct"]
    for system in systems.values():
        system.close()
    ratios = {
        name: round(statistics.median(plain / own for plain, own in zip(seconds["plain"], seconds[name], strict=True)), 2)
        for name in ("pool", "ours")
    }
    return {
        "answers": count, "hostile": num_hostile, "seconds": seconds,
        "answers_per_second": {name: round(count / statistics.median(taken)) for name, taken in seconds.items()},
        "results": {name: dict(counts) for name, counts in said.items()}, "honest_answers_not_graded_right": wrongly[:10],
        "speed_over_plain": ratios, "bar": bar, "passed": ratios["ours"] >= bar and not wrongly,
    }  # fmt: skip


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000, help="answers in a round (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds without hostile answers (default: 5)")
    parser.add_argument("--deadline", type=float, default=DEADLINE_SECONDS, help="processor seconds of ours (default: as in a run)")
    parser.add_argument("--hostile-rounds", type=int, default=3, help="rounds with 1 %% hostile answers (default: 3)")
    arguments = parser.parse_args()
    logging.disable()  # math-verify warns of every time-out
    num_hostile = max(1, arguments.answers // 100)
    result = {
        "settings": {
            "workers": WORKERS, "cores": os.cpu_count(), "load": os.getloadavg(), "python": sys.version.split()[0],
            "deadline_cpu_seconds": arguments.deadline, "memory_bytes": MEMORY_BYTES, "recycle_after": RECYCLE_AFTER, "plain_chunk": CHUNK,
        },
        "clean": bench(arguments.answers, 0, arguments.rounds, CLEAN_AT_LEAST, arguments.deadline),
        "hostile": bench(arguments.answers, num_hostile, arguments.hostile_rounds, HOSTILE_AT_LEAST, arguments.deadline),
        "load_after": os.getloadavg(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
