"""The command line: looking is quick and free of torch, mistakes are messages, recipes come from anywhere."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.__main__ import main
from megatron_ext.launch import ranks
from megatron_ext.launch.verbs import RUN_VERBS
from megatron_ext.runs import mark_done, open_run, write_run
from recipes import demo

ROOT = Path(__file__).resolve().parents[2]
SMOKE = demo.smoke()
LIMIT_SECONDS = 0.8  # of processor time: about what a user waits, and steady on a busy machine
MY = '''"""A variant of the smoke graph: one stage only."""

from dataclasses import replace

from megatron_ext.launch.graph import Graph
from recipes import demo


def run() -> Graph:
    """Text alone."""
    return replace(demo.smoke(), name="mine", stages=demo.smoke().stages[:1])


def sized(steps: int) -> Graph:
    return run()


def seven() -> int:
    return 7
'''
SITE = '''"""Our cluster."""

from dataclasses import replace

from megatron_ext.config.cluster import Cluster
from recipes import clusters


def ours() -> Cluster:
    return replace(clusters.h100(), name="ours", gpus_per_node=4)
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty present folder with my.py and site.py; what they load is forgotten afterwards."""
    (tmp_path / "my.py").write_text(MY)
    (tmp_path / "site.py").write_text(SITE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(sys.modules["recipes"], "__path__", sys.modules["recipes"].__path__)
    return tmp_path


def failing(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that a user can put right."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.out == ""
    return captured.err


def without_torch(words: list[str], cwd: Path) -> tuple[str, float]:
    """Output and processor seconds of a command whose process cannot import torch, numpy and what builds on them."""
    block = "; ".join(f"sys.modules['{name}'] = None" for name in ("torch", "megatron", "transformers", "numpy"))
    program = f"import sys; {block}; sys.argv[1:] = {words!r}; from megatron_ext.__main__ import main; sys.exit(main())"
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=False)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return done.stdout, ended.ru_utime - began.ru_utime + ended.ru_stime - began.ru_stime


LOOKING = {
    "help": ["--help"],
    "plan": ["plan", "octothinker:llama_3b", "--cluster", "h100"],
    "plan --json": ["plan", "demo:demo", "--json"],
    "dry run": ["launch", "octothinker:llama_3b", "--cluster", "h100", "--dry-run"],
    "tree": ["tree", "runs"],
}


@pytest.mark.parametrize("name", LOOKING)
def test_looking_is_quick_and_needs_no_torch(name: str, tmp_path: Path) -> None:
    for stage in SMOKE.stages[:3]:
        parents = {role: tmp_path / "runs" / "smoke" / parent for parent, child, role in SMOKE.edges() if child == stage.name}
        write_run(tmp_path / "runs" / "smoke" / stage.name, "smoke", stage, parents)
    before = sorted(tmp_path.rglob("*"))
    out, seconds = without_torch(LOOKING[name], tmp_path)
    assert seconds < LIMIT_SECONDS
    assert out.strip()
    assert sorted(tmp_path.rglob("*")) == before  # looking writes nothing


def test_the_block_on_torch_blocks(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"import of (numpy|torch|megatron) halted"):
        without_torch(["train", str(base_run(tmp_path))], tmp_path)


def test_a_dry_run_prints_the_resolved_recipe_and_the_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    assert main(["launch", "demo:smoke", "--dry-run", "stable.budget.steps=24"]) == 0
    out = capsys.readouterr().out
    recipe, end = json.JSONDecoder().raw_decode(out)
    stable = next(stage for stage in recipe["stages"] if stage["name"] == "stable")
    assert (stable["budget"]["steps"], stable["optimizer"]["beta2"]) == (24, 0.95)
    assert "24 steps x 512" in out[end:]
    assert [path for path in sorted(here.rglob("*")) if "__pycache__" not in str(path)] == before


def test_plan_as_json_has_a_row_for_each_training_stage_and_conversion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "octothinker:llama_1b", "--json"]) == 0
    assert [row["stage"] for row in json.loads(capsys.readouterr().out)["conversions"]] == ["llama"]
    assert main(["plan", "demo:smoke", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert [(row["stage"], row["tokens"]) for row in rows][:2] == [("base", 6 * 512), ("stable", 12 * 512)]


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    command = f"{sys.executable} -m megatron_ext plan octothinker:llama_1b | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("octothinker_1b")


def test_a_recipe_and_a_cluster_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "./my.py:run", "--cluster", "./site.py:ours"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mine, on ours: 4 GPUs")


def test_a_recipes_folder_here_stands_before_the_checkouts_and_beside_it(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.py").write_text(MY.replace("import demo", "import demo, neighbour"))
    (tmp_path / "recipes" / "neighbour.py").write_text("")
    (tmp_path / "recipes" / "models.py").write_text("broken on purpose\n")

    def plan(name: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "megatron_ext", "plan", name]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "SyntaxError" in plan("mine:run").stderr  # the checkout's demo imports models, and finds the one here
    (tmp_path / "recipes" / "models.py").unlink()
    assert plan("mine:run").stdout.startswith("mine, ")
    assert plan("octothinker:llama_1b").stdout.startswith("octothinker_1b, ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("octothinkr:llama_3b", "no file octothinkr.py in .*did you mean 'octothinker'"),
        ("octothinker:llama_4b", "no function 'llama_4b'; did you mean 'llama_"),
        ("demo", "name a function of it, as in .*it has: demo, smoke, control"),
        ("./my.py:ran", "my.py has no function 'ran'; did you mean 'run'"),
        ("./my.py:sized", r"sized\(\) needs arguments \(steps\).*it has: run, seven"),
        ("./my.py:seven", r"seven\(\) of .*my.py returns int, not a Graph"),
        ("./mi.py:run", r"no file .*mi.py; did you mean 'my.py'"),
    ],
)
def test_a_wrong_recipe_names_the_nearest(here: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    text = failing(["plan", name], capsys)
    assert re.search(message, text), text


def test_a_wrong_cluster_names_the_nearest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'h100'?" in failing(["plan", "demo:smoke", "--cluster", "h10"], capsys)
    assert "returns Graph, not a Cluster" in failing(["plan", "demo:smoke", "--cluster", "./my.py:run"], capsys)


def test_a_defect_in_a_recipe_shows_its_traceback(here: Path) -> None:
    (here / "my.py").write_text("def run():\n    return undefined_name\n")
    with pytest.raises(NameError, match="undefined_name"):
        main(["plan", "./my.py:run"])


def test_launch_needs_to_know_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--cluster NAME submits to its Slurm, --local runs here, --dry-run shows" in failing(["launch", "demo:smoke"], capsys)


@pytest.mark.parametrize("words", [["plan", "demo:smoke", "--clutser", "x"], ["tree", "runs", "a.b=1"], ["dance"], []])
def test_unknown_words_are_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: megatron-ext" in capsys.readouterr().err


def test_a_verb_takes_its_kind_of_run_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "text", "smoke", SMOKE.stage("text"), {})
    assert "of kind 'text', and train takes 'train'; use: megatron-ext text" in failing(["train", str(tmp_path / "text")], capsys)
    assert "of kind 'text', and prepare takes 'train'" in failing(["prepare", str(tmp_path / "text")], capsys)
    assert "not a run folder" in failing(["report", str(tmp_path)], capsys)


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "text", "smoke", SMOKE.stage("text"), {})
    mark_done(run, {})
    before = sorted(tmp_path.rglob("*"))
    assert main(["text", str(run.path)]) == 0
    assert "was finished at" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_every_kind_of_stage_that_has_a_verb_names_its_own() -> None:
    assert {name for name, verb in RUN_VERBS.items() if name == verb.kind} == {verb.kind for verb in RUN_VERBS.values()}


def base_run(folder: Path, **plan: object) -> Path:
    """A train run folder whose plan is as given."""
    stage = SMOKE.stage("base")
    write_run(folder / "text", "smoke", SMOKE.stage("text"), {})
    return write_run(folder / "base", "smoke", replace(stage, plan=replace(stage.plan, **plan)), {"corpus": folder / "text"}).path


def test_several_ranks_become_torchrun_with_pinned_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = base_run(tmp_path, ranks_per_node=4, micro_batch=2, threads_per_rank=3)
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: called.append([program, *words]))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ranks.THREAD_VARIABLES:
        monkeypatch.setenv(name, "64")
    ranks.become_ranks(open_run(path))
    assert [os.environ[name] for name in ranks.THREAD_VARIABLES] == ["3", "3", "3"]
    words = called[0][1:]
    assert words[1:3] == ["-m", "megatron_ext.training.torchrun"]
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert words[-4:] == ["-m", "megatron_ext", "train", str(path)]
    monkeypatch.setenv("WORLD_SIZE", "4")
    ranks.become_ranks(open_run(path))  # a rank already
    ranks.become_ranks(open_run(base_run(tmp_path / "one")))
    monkeypatch.delenv("WORLD_SIZE")
    ranks.become_ranks(open_run(path), num_ranks=1)  # prepare needs one process
    assert len(called) == 1


def test_several_nodes_are_not_started_from_one(tmp_path: Path) -> None:
    path = base_run(tmp_path, device="gpu", nodes=2, ranks_per_node=4, micro_batch=1)
    with pytest.raises(ranks.LaunchError, match=r"2 nodes x 4 ranks.*base.plan.nodes=1"):
        ranks.torchrun_command(open_run(path))
