"""The demo's text: what becomes of a docstring, and what a text run leaves behind."""

import json
import random
import re
import subprocess
import sys

import pytest

from megatron_ext import runs
from megatron_ext.config.stages import TextStage
from megatron_ext.data import arithmetic, demo_text
from megatron_ext.data.demo_text import Prose, clean, distinct, docstrings, run_text
from megatron_ext.errors import DataError
from megatron_ext.provenance import file_sha256
from megatron_ext.tasks.problems import read_problems

SOURCES = ("math_web", "general_web", "short_cot", "long_cot", "instruction")
PROBLEMS = ("rl_problems.jsonl", "evaluation/problems.jsonl")
STAGE = TextStage(
    name="text", math_prose_bytes=40_000, general_prose_bytes=30_000, short_problems=120, long_problems=60,
    instruction_problems=80, rl_problems=70, evaluation_problems=50, seed=3,
)  # fmt: skip


def made(path, **changes):
    values = {**{f: getattr(STAGE, f) for f in STAGE.__slots__}, **changes}
    run = runs.write_run(path, "g", TextStage(**values), {})
    run_text(run)
    return run


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("demo") / "text")


def test_a_run_leaves_every_file_and_its_mark(run):
    assert sorted(p.stem for p in (run.path / "text").iterdir()) == sorted(SOURCES)
    counts = {source: len(rows(run.path / "text" / f"{source}.jsonl")) for source in SOURCES}
    assert counts["short_cot"] == 120
    assert counts["long_cot"] == 60
    assert counts["instruction"] == 80
    assert counts["math_web"] >= 10
    assert counts["general_web"] >= 8
    done = runs.read_done(run)
    assert {name: facts["lines"] for name, facts in done["files"].items()} == {
        **{f"text/{source}.jsonl": count for source, count in counts.items()},
        "rl_problems.jsonl": 70,
        "evaluation/problems.jsonl": 50,
    }
    assert json.loads((run.path / "attempts/1/exit.json").read_text())["reason"] == "done"


def test_every_line_has_an_id_of_its_own_and_a_text(run):
    for source in SOURCES:
        found = rows(run.path / "text" / f"{source}.jsonl")
        assert all(row.keys() == {"id", "text"} for row in found)
        assert len({row["id"] for row in found}) == len(found)
        assert len({row["text"] for row in found}) == len(found)


def test_prose_stays_within_its_bound_and_comes_from_several_packages(run):
    for source, limit in (("math_web", STAGE.math_prose_bytes), ("general_web", STAGE.general_prose_bytes)):
        found = rows(run.path / "text" / f"{source}.jsonl")
        size = sum(len(row["text"].encode()) for row in found)
        assert limit / 2 < size <= limit
        assert all(len(row["text"]) >= demo_text.LEAST_CHARACTERS for row in found)
        assert not any(">>>" in row["text"] or "\u2581" in row["text"] for row in found)
        packages = {row["id"].split("/")[0] for row in found}
        assert packages == {"python"} if source == "general_web" else len(packages) >= 2
        assert not any(row["id"].split("#")[0] == "python/statistics.py" for row in found if source == "general_web")


def test_the_same_stage_gives_the_same_bytes_and_another_seed_does_not(run, tmp_path):
    files = [f"text/{source}.jsonl" for source in SOURCES] + list(PROBLEMS)
    again = made(tmp_path / "again")
    assert [file_sha256(run.path / f) for f in files] == [file_sha256(again.path / f) for f in files]
    other = made(tmp_path / "other", seed=4)
    assert [file_sha256(run.path / f) == file_sha256(other.path / f) for f in files] == [True, True, *[False] * 5]


def test_provenance_names_versions_and_the_digest_of_each_file(run):
    found = json.loads((run.path / "provenance.json").read_text())
    assert found["read_from"].keys() == {"networkx", "numpy", "python", "scipy", "sympy"}
    assert found["read_from"]["sympy"][0].isdigit()
    assert len(found["files"]) == 7
    for name, facts in found["files"].items():
        assert facts["sha256"] == file_sha256(run.path / name)
        assert facts["bytes"] == (run.path / name).stat().st_size


def stated(path):
    """The expressions of a file of problems, asked in signs or in a story."""
    return [arithmetic.Problem("", "", tuple(row["operands"]), row["kind"]).expression for row in rows(path)]


def test_both_files_of_problems_are_read_by_their_form(run):
    for name, count in zip(PROBLEMS, (70, 50), strict=True):
        problems = read_problems(run.path / name, "arithmetic")
        found = rows(run.path / name)
        assert all(row.keys() == {"id", "question", "answer", "kind", "operands"} for row in found)
        assert len({p.id for p in problems}) == len({p.question for p in problems}) == count
        assert [str(eval(expression)) for expression in stated(run.path / name)] == [row["answer"] for row in found]


def test_evaluation_problems_stand_in_no_text_and_are_asked_by_no_rl_problem(run):
    problems = rows(run.path / "evaluation" / "problems.jsonl")
    texts = [row["text"] for source in SOURCES for row in rows(run.path / "text" / f"{source}.jsonl")]
    texts += [f"{row['question']} {row['answer']}" for row in rows(run.path / "rl_problems.jsonl")]
    assert not any(row["question"] in text for row in problems for text in texts)
    expressions = stated(run.path / "evaluation" / "problems.jsonl")
    joined = "\n".join([*texts, *stated(run.path / "rl_problems.jsonl")])
    ways = [way for expression in expressions for way in same_fact(expression)]
    assert [e for e in ways if re.search(rf"(?<!\d){re.escape(e)}(?!\d)", joined)] == []
    assert re.search(rf"(?<!\d){re.escape(ways[1])}(?!\d)", joined + f"\nand {ways[1]}=?")


def same_fact(expression):
    """Every way to state what an expression states: its sum in both orders, and both differences."""
    left, sign, right = re.split(r"([+-])", expression)
    a, b = (int(left), int(right)) if sign == "+" else (int(left) - int(right), int(right))
    return [f"{a}+{b}", f"{b}+{a}", f"{a + b}-{a}", f"{a + b}-{b}"]


def test_no_text_and_no_rl_problem_states_a_held_out_fact(run):
    texts = [row["text"] for source in SOURCES for row in rows(run.path / "text" / f"{source}.jsonl")]
    assert not any(map(arithmetic.states_held_out, [*texts, *stated(run.path / "rl_problems.jsonl")]))
    assert all(map(arithmetic.states_held_out, stated(run.path / "evaluation" / "problems.jsonl")))


def test_packages_are_read_without_importing_them():
    code = (
        "import sys; from megatron_ext.data import demo_text as d; maths, _ = d.prose_files(); "
        "docs = d.up_to(d.Prose(maths).documents(), 20_000, 'k'); "
        "print(len(docs), sorted({'sympy', 'scipy', 'networkx', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, imported = done.stdout.split(" ", 1)
    assert int(count) > 3
    assert imported.strip() == "[]"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_text, "MATH_PACKAGES", ("sympy", "package_that_is_not_there"))
    with pytest.raises(DataError, match=r"'package_that_is_not_there' is not installed.*install package_that_is_not_there"):
        made(tmp_path / "text")
    assert not (tmp_path / "text/DONE").exists()
    assert json.loads((tmp_path / "text/attempts/1/exit.json").read_text())["reason"] == "failed"


def test_a_bound_below_one_document_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"math_prose_bytes=100 does not hold one document.* raise math_prose_bytes"):
        made(tmp_path / "text", math_prose_bytes=100)


def test_more_problems_than_there_are_is_refused():
    rng = random.Random(0)
    assert sorted(distinct(lambda: str(rng.randint(1, 6)), 6, "dice")) == list("123456")
    with pytest.raises(DataError, match="dice=7: only 6 different ones"):
        distinct(lambda: str(rng.randint(1, 6)), 7, "dice")


def test_docstrings_come_in_the_order_of_the_source():
    source = (
        b'"""Module."""\nclass A:\n    """A."""\n    def m(self):\n        """A.m."""\ndef f():\n    """f."""\n    x = "no docstring"\n'
    )
    assert docstrings(source) == ["Module.", "A.", "A.m.", "f."]


def test_clean_drops_sessions_and_what_cannot_be_printed():
    text = "Sum.\n\n>>> f(1,\n...   2)\n3\n\nTail \u2581x\x00y\tz\u00a0w.\n    >>> g()\n\n\n\nEnd."
    assert clean(text) == "Sum.\n\nTail xy z w.\n\nEnd."


def files(tmp_path, **sources):
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    return [(f"p/{name}.py", tmp_path / f"{name}.py") for name in sources]


def test_documents_are_packed_and_named_after_their_file(tmp_path):
    parts = [chr(ord("a") + i) * 1500 for i in range(5)]
    source = "\n".join(f'def f{i}():\n    """{part}"""' for i, part in enumerate([*parts, parts[0]]))
    prose = Prose(files(tmp_path, long=source, short='"""Too short to be a document."""', broken="def f(:\n"))
    found = {d.id: d.text for d in prose.documents()}
    assert found == {"p/long.py": "\n\n".join(parts[:2]), "p/long.py#2": "\n\n".join(parts[2:4]), "p/long.py#3": parts[4]}
    assert (prose.read, prose.unreadable) == (2, 1)


def test_prose_with_an_evaluation_problem_is_left_out(tmp_path, monkeypatch):
    asked = arithmetic.evaluation_problem(random.Random(1)).expression
    source = f'"""{"Good words. " * 30}"""\ndef f():\n    """{"Other words. " * 30} {asked}"""\n'
    prose = Prose(files(tmp_path, m=source))
    assert [asked in d.text for d in prose.documents()] == [False]
    assert prose.contaminated == 1
    monkeypatch.setattr(arithmetic, "states_held_out", lambda _: False)
    assert [asked in d.text for d in Prose(files(tmp_path, m=source)).documents()] == [True]


def test_a_bound_above_all_prose_takes_it_all_and_says_so(tmp_path, monkeypatch, capsys):
    source = f'"""{"Good words. " * 30}"""\n'
    monkeypatch.setattr(demo_text, "prose_files", lambda: (files(tmp_path, m=source), files(tmp_path, g=source)))
    run = made(tmp_path / "text", general_prose_bytes=0)
    assert "this is all there is; math_prose_bytes asked for 40,000" in capsys.readouterr().out
    assert [row["id"] for row in rows(run.path / "text/math_web.jsonl")] == ["p/m.py"]
    assert rows(run.path / "text/general_web.jsonl") == []
