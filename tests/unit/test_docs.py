"""Pages tell the truth: links lead somewhere, shown commands run, the tree is the tree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.launch.load import load_recipe
from megatron_ext.launch.verbs import FUNCTIONS, RUN_VERBS
from megatron_ext.runs import write_run
from recipes import demo

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {".venv", ".venv-vllm", ".git", "runs", "node_modules", "build", "dist"}
PAGES = sorted(
    p
    for p in ROOT.rglob("*.md")
    if not NOT_OURS & set(p.relative_to(ROOT).parts) and not p.relative_to(ROOT).parts[0].startswith(".pytest")
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Commands that take longer than a test here may: where each one runs, and the words that run it there.
ELSEWHERE = {
    "make test": (".ci/run", "make test"),
    "make test-fast": ("Makefile", 'pytest -m "not slow"'),
    "make lint": ("Makefile", "test: lint"),
    "make test-vllm": (".ci/run", "make test-vllm"),
    "make demo": (".ci/run", "make demo"),
    "megatron-ext launch demo:demo --local": ("Makefile", "launch demo:demo --local"),
    "megatron-ext launch ./my.py:run --local": ("tests/end_to_end/test_readme.py", "my.py:run"),
    "megatron-ext verify runs/demo": ("tests/end_to_end/test_readme.py", '"verify"'),
    "megatron-ext why runs/demo/stable --step 100": ("tests/end_to_end/test_readme.py", '"why"'),
    "megatron-ext convert megatron-to-hf runs/demo/stable stable-hf": ("tests/end_to_end/test_readme.py", '"megatron-to-hf"'),
    'megatron-ext convert check runs/demo/stable stable-hf --prompt "12 + 30 ="': ("tests/end_to_end/test_readme.py", '"check"'),
    "megatron-ext convert hf-to-megatron stable-hf stable-again": ("tests/end_to_end/test_readme.py", '"hf-to-megatron"'),
    'megatron-ext generate runs/demo/decay_short --template plain --prompt "What is 12+25?"': (
        "tests/end_to_end/test_readme.py",
        '"generate"',
    ),
    "megatron-ext rl runs/demo/rl_short": ("tests/end_to_end/test_readme.py", '"rl"'),
    "megatron-ext replay runs/demo/rl_short --step 1 --set objective.clip_high=0.28": ("tests/end_to_end/test_readme.py", '"replay"'),
    "megatron-ext train runs/demo/decay_long": ("tests/end_to_end/test_readme.py", '"train"'),
}


def broken_links(pages: list[Path]) -> list[str]:
    """Relative links that lead to no file, as page: link."""
    found = []
    for page in pages:
        for link in LINK.findall(re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)):
            target = link.partition("#")[0]
            if target and "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
                found.append(f"{page.name}: {link}")
    return found


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language, '' for plain ones."""
    every = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [text for word, text in every if word == language]


def shown_commands() -> list[str]:
    """Every command line of README's and CONTRIBUTING's sh blocks."""
    lines = [line for page in ("README.md", "CONTRIBUTING.md") for block in blocks(ROOT / page, "sh") for line in block.splitlines()]
    return list(dict.fromkeys(line.partition("  #")[0].strip() for line in lines if line.strip()))


def is_cheap(command: str) -> bool:
    words = shlex.split(command)
    return words[0] == "megatron-ext" and (words[1] in ("plan", "doctor", "tree", "diff", "--help") or "--dry-run" in words)


def test_every_relative_link_exists() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in PAGES}
    assert broken_links(PAGES) == []


def test_a_broken_link_is_caught(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("")
    (tmp_path / "page.md").write_text(
        "[a](there.md#part) [b](https://example.org) [c](#here) [d](gone.md) `[e](x)`\n```\n[f](code.md)\n```\n"
    )
    assert broken_links([tmp_path / "page.md"]) == ["page.md: gone.md", "page.md: x"]


def test_every_shown_command_is_run_here_or_elsewhere() -> None:
    commands = shown_commands()
    assert len(commands) > 8
    assert [command for command in commands if not is_cheap(command) and command not in ELSEWHERE] == []
    assert [command for command in ELSEWHERE if command not in commands] == []


@pytest.mark.parametrize("command", ELSEWHERE)
def test_a_longer_command_is_run_where_the_table_says(command: str) -> None:
    file, words = ELSEWHERE[command]
    assert words in (ROOT / file).read_text(encoding="utf-8")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with README's my.py and the run folders of a demo that has not run."""
    (example,) = blocks(ROOT / "README.md", "python")
    (tmp_path / "my.py").write_text(example)
    graph = demo.demo()
    for stage in graph.stages:
        parents = {role: tmp_path / "runs" / "demo" / parent for parent, child, role in graph.edges() if child == stage.name}
        write_run(tmp_path / "runs" / "demo" / stage.name, graph.name, stage, parents)
    return tmp_path


@pytest.mark.parametrize("command", [command for command in shown_commands() if is_cheap(command)])
def test_a_cheap_command_runs_as_shown(here: Path, command: str) -> None:
    words = shlex.split(command)[1:]
    done = subprocess.run([sys.executable, "-m", "megatron_ext", *words], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_example_recipe_is_what_the_page_says(here: Path) -> None:
    graph = load_recipe(str(here / "my.py") + ":run")
    linear, long = graph.stage("decay_linear"), demo.smoke().stage("decay_long")
    assert (graph.name, linear.schedule.shape, linear.budget.steps) == ("mine", "linear", 2 * long.budget.steps)
    assert replace(linear, name=long.name, schedule=long.schedule, budget=long.budget) == long


def test_the_table_of_commands_names_every_verb() -> None:
    table = "\n".join(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `megatron-ext"))
    for verb in ("plan", "doctor", "launch", "why", *FUNCTIONS, *RUN_VERBS):
        assert re.search(rf"megatron-ext [a-z\\|]*\b{verb}\b", table), verb


def tree_paths() -> list[str]:
    """Paths that README's annotated tree names; a line may name several of one folder."""
    (block,) = [text for text in blocks(ROOT / "README.md", "") if text.startswith("recipes/")]
    folders: list[str] = []
    found = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.match(r"\s*((?:[\w./-]+ )*[\w./-]+)(?:  |$)", line).group(1).split():  # type: ignore[union-attr]
            found.append("/".join([*folders[:depth], name.rstrip("/")]))
            if name.endswith("/"):
                folders[depth:] = [name.rstrip("/")]
    return found


def test_the_annotated_tree_exists_and_is_whole() -> None:
    named = tree_paths()
    assert len(named) > 25
    assert [path for path in named if not (ROOT / path).exists()] == []
    packages = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "megatron_ext").rglob("*.py")}
    modules = {
        p.relative_to(ROOT).as_posix()
        for p in [*(ROOT / "megatron_ext").glob("*.py"), *(ROOT / "recipes").glob("*.py")]
        if p.name != "__init__.py"
    }
    assert packages - {"megatron_ext"} - set(named) == set()
    assert modules - set(named) == set()
