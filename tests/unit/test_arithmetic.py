"""The problem generator: right steps, right answers, and nothing of the evaluation in the training."""

import random
import re
from collections import Counter

import pytest

from megatron_ext.data import arithmetic
from megatron_ext.data.arithmetic import (
    Problem,
    TextTask,
    evaluation_problem,
    held_out,
    instruction,
    long,
    problem,
    short,
    training_problem,
)

COUNT = 1500
RUN = re.compile(r"\d+(?:[+\-*]\d+)+")
EQUATIONS = re.compile(r"\d+(?:[+\-*]\d+)*(?:=\d+(?:[+\-*]\d+)*)+")


def drawn(draw, count=COUNT, seed=7):
    rng = random.Random(seed)
    return [draw(rng) for _ in range(count)]


def renderings(problems):
    return [render(p) for p in problems for render in (short, long, instruction)]


@pytest.fixture(scope="module")
def training():
    return drawn(training_problem)


@pytest.fixture(scope="module")
def evaluation():
    return drawn(evaluation_problem, 500, seed=11)


def wrong_equations(text):
    """Chains of equal signs whose sides differ; Python's own arithmetic is the judge."""
    return [chain for chain in EQUATIONS.findall(text) if len({eval(side) for side in chain.split("=")}) != 1]


def test_every_written_equation_holds(training, evaluation):
    texts = renderings(training + evaluation)
    assert sum(len(EQUATIONS.findall(text)) for text in texts) > 10_000
    assert [chain for text in texts for chain in wrong_equations(text)] == []


def test_a_wrong_step_would_be_found(training):
    broken = [re.sub(r"=(\d+)\. The answer", lambda m: f"={int(m[1]) + 1}. The answer", short(p)) for p in training]
    assert all(wrong_equations(text) for text in broken)


def test_answers_follow_from_the_operands(training):
    formulas = {
        "add": lambda a, b: a + b,
        "subtract": lambda a, b: a - b,
    }
    for p in training:
        assert p.answer == str(formulas[p.kind.removeprefix("word_")](*p.operands))
        numbers = [int(n) for n in re.findall(r"\d+", p.question)]
        assert Counter(numbers) == Counter(p.operands)
        if not p.kind.startswith("word_"):
            assert eval(RUN.search(p.question)[0]) == int(p.answer)


def test_every_kind_is_drawn_in_its_share():
    kinds = Counter(p.kind for p in drawn(problem, 4000))
    assert kinds.keys() == arithmetic.KINDS.keys()
    assert sum(arithmetic.KINDS.values()) == pytest.approx(1.0)
    for kind, share in arithmetic.KINDS.items():
        assert kinds[kind] / 4000 == pytest.approx(share, abs=0.025)


def test_no_number_reaches_a_hundred(training):
    assert max(int(n) for text in renderings(training) for n in re.findall(r"\d+", text)) == 99


def test_renderings_of_one_problem():
    p = Problem("What is 17+28?", "45", (17, 28), "add")
    assert short(p) in ("What is 17+28?\n17+28=37+8=45. The answer is \\boxed{45}.", "What is 17+28?\n17+28=37+8=45. The answer is 45.")
    assert instruction(p) == ("User: What is 17+28? Put the answer in \\boxed{}.\nAssistant: 17+28=37+8=45. The answer is \\boxed{45}.")
    lines = long(p).splitlines()
    assert lines[:2] == ["What is 17+28?", "I need 17+28."]
    assert "28 is 20 and 8. 17+20=37. 37+8=45." in lines
    assert lines[-2] in ("Check: 10+20=30, 7+8=15, 30+15=40+5=45, ok.", "Check: 45-28=25-8=17, ok.")
    assert lines[-1] == short(p).partition(". ")[2]


def test_a_wrong_try_is_caught_by_its_check():
    tries = [f"What is {a}+38?" for a in range(11, 60)]
    found = [long(Problem(text, str(int(text[8:10]) + 38), (int(text[8:10]), 38), "add")) for text in tries]
    assert "Is it 45? Check: 45-38=15-8=7, not 17. I lost the ten that the ones make." in "\n".join(found)


@pytest.mark.parametrize(
    ("step", "chain", "wrong"),
    [
        (("+", 17, 28), "17+28=37+8=45", 35),
        (("+", 21, 24), "21+24=41+4=45", 44),
        (("+", 17, 30), "17+30=47", 46),
        (("-", 35, 18), "35-18=25-8=17", 27),
        (("-", 95, 28), "95-28=75-8=67", 66),  # 95+10 would pass 99, so the slip is one of counting
    ],
)
def test_steps_and_slips(step, chain, wrong):
    assert arithmetic.chain(step) == chain
    assert arithmetic.slip(step)[0] == wrong


def test_each_rendering_ends_in_its_boxed_answer(training):
    for p in training:
        for text in (short(p), long(p)):
            assert text.startswith(p.question + "\n")
            assert text.endswith(f"The answer is \\boxed{{{p.answer}}}.")
        turns = instruction(p).split("\n")
        assert [turn.split(" ")[0] for turn in turns] == ["User:", "Assistant:"]
        assert "\\boxed{}" in turns[0]
        assert turns[1].endswith(f"\\boxed{{{p.answer}}}.")


def test_long_chains_are_several_times_longer_and_check_themselves(training):
    lengths = [sum(len(render(p)) - len(p.question) for p in training) for render in (long, short)]
    assert lengths[0] > 2.5 * lengths[1]
    assert all(re.search(r"Check: .* ok\.", long(p)) for p in training)
    wrong_tries = sum("Is it " in long(p) for p in training) / len(training)
    assert wrong_tries == pytest.approx(arithmetic.WRONG_TRIES, abs=0.05)


def test_the_same_seed_gives_the_same_problems():
    assert drawn(training_problem, 50) == drawn(training_problem, 50)
    assert drawn(training_problem, 50) != drawn(training_problem, 50, seed=8)


# --- the training and the evaluation are disjoint: judged here without the module's own facts --------


def forbidden_expressions(problems):
    """Every way to write an evaluated problem: its orders, and the sum or difference that undoes it."""
    found = set()
    for p in problems:
        n = p.operands
        a, b = n if p.kind.endswith("add") else (n[0] - n[1], n[1])
        found |= {f"{a}+{b}", f"{b}+{a}", f"{a + b}-{a}", f"{a + b}-{b}"}
    return found


def stated_expressions(text):
    """Every pair and triple of neighbours in every expression of a text."""
    found = set()
    for run in RUN.findall(text):
        parts = re.split(r"([+\-*])", run)
        for size in (3, 5):
            found |= {"".join(parts[i : i + size]) for i in range(0, len(parts) - size + 1, 2)}
    return found


def leaks(training_problems, evaluation_problems):
    forbidden = forbidden_expressions(evaluation_problems)
    stated = {e for p in training_problems for e in stated_expressions(p.expression)}  # what a story asks without writing it
    for text in renderings(training_problems):
        stated |= stated_expressions(text)
    return stated & forbidden


def test_training_holds_no_evaluation_problem(training, evaluation):
    assert len(forbidden_expressions(evaluation)) > 300
    assert leaks(training, evaluation) == set()
    assert {p.question for p in training} & {p.question for p in evaluation} == set()


def test_a_generator_that_ignores_the_rule_is_found(evaluation):
    assert len(leaks(drawn(problem, 300), evaluation)) > 20


def test_a_generator_that_looks_only_at_the_question_is_found(evaluation):
    careless = drawn(lambda rng: training_problem(rng, lambda p: not held_out(p)), 3000)
    found = leaks(careless, evaluation)
    assert found  # checks and wrong tries
    assert not any(p.expression in found for p in careless)


def test_held_out_looks_at_the_fact_not_its_wording():
    pairs = [(a, b) for a in range(11, 39) for b in range(11, 39) if a % 10 and b % 10]
    for a, b in pairs:
        same = {
            held_out(Problem("", "", operands, kind))
            for kind, operands in (
                ("add", (a, b)), ("add", (b, a)), ("subtract", (a + b, a)), ("subtract", (a + b, b)),
                ("word_add", (a, b)), ("word_subtract", (a + b, b)),
            )
        }  # fmt: skip
        assert len(same) == 1
    names = [f"{a}+{b}" for a in range(100) for b in range(100)]
    assert sum(map(arithmetic.fact_held_out, names)) / len(names) == pytest.approx(1 / arithmetic.HELD_OUT_ONE_IN, abs=0.015)


def test_elementary_steps_are_neither_held_out_nor_asked(training, evaluation):
    assert [arithmetic.fact(*item) for item in (("+", (57, 8)), ("+", (60, 24)), ("-", (35, 8)), ("-", (65, 30)))] == [None] * 4
    assert all(arithmetic.fact(arithmetic.SIGNS[p.operation], p.operands) for p in training + evaluation)


def test_a_foreign_text_with_an_evaluation_problem_is_noticed(evaluation):
    a, b = next(p.operands for p in evaluation if p.kind == "add")
    assert arithmetic.states_held_out(f"for example, {a} + {b} is a sum")
    assert arithmetic.states_held_out(f"{a + b} -{b}")
    assert not arithmetic.states_held_out(f"{a} and {b}, or {a}\n+ {b}; 7+8, 2024-11-20")


# --- small word tasks ---------------------------------------------------------------------------------


def solve(request):
    """The answer to a small task, read from its request."""
    listed = re.sub(r".*: |[?.]$", "", request).split(", ")
    word = re.search(r"the word (\w+)", request)
    numbers = [int(n) for n in re.findall(r"\d+", request)]
    if request.startswith("Sort these words"):
        return ", ".join(sorted(listed))
    if request.startswith("How many words"):
        return str(len(listed))
    if request.startswith("Repeat"):
        return " ".join([word[1]] * numbers[0])
    if request.startswith("Spell"):
        return "-".join(word[1])
    if request.startswith("What is the last word"):
        return listed[-1]
    if request.startswith("Write the word"):
        return word[1].upper()
    if request.startswith("Which day"):
        days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "Monday"]
        return days[days.index(re.search(r"after (\w+)", request)[1]) + 1]
    if request.startswith("Which of"):
        return str(max(numbers))
    return ", ".join(map(str, sorted(numbers)))


def test_small_tasks_are_answered_rightly():
    tasks = drawn(arithmetic.text_task, 400)
    assert len({task.request.split(" ")[0] + task.request.split(" ")[2] for task in tasks}) >= 8
    for task in tasks:
        assert solve(task.request) == task.answer, task
        assert not arithmetic.states_held_out(instruction(task))
    wrong = TextTask("Which day comes after Sunday?", "After Sunday comes", "Tuesday")
    assert solve(wrong.request) != wrong.answer


def test_a_task_is_rendered_in_two_turns():
    asked, said = instruction(TextTask("Spell the word river with dashes.", "The letters are", "r-i-v-e-r")).split("\n")
    assert asked.startswith("User: Spell the word river with dashes. ")
    assert asked.endswith(arithmetic.REQUESTS) and "\\boxed{}" in asked  # noqa: PT018
    assert said == "Assistant: The letters are \\boxed{r-i-v-e-r}."
