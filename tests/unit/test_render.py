"""Scripts are what they were (golden files); what stands in a path survives; nothing unnamed passes; what cannot run is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_ext.__main__ import main
from megatron_ext.config.base import from_json, to_json
from megatron_ext.config.cluster import Container
from megatron_ext.errors import ConfigError, LaunchError
from megatron_ext.launch import render
from megatron_ext.launch.containers import all_mounts
from megatron_ext.launch.render import Job, directive_word, job_of, script_text, time_words
from recipes import clusters, demo, octothinker
from tests.linters import linter
from tests.rendered_jobs import DIRECTORY, GOLDEN, RUNS, SNAPSHOT, job, jobs, ours, texts

JOBS = jobs()
# All that may stand in a path: no NUL, no slash within a part; Slurm's own refusals have tests of their own.
PART = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1, max_size=20).filter(
    lambda part: part not in (".", "..")
)
CANARY = "canary-3f9c"


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host's Python that writes down its words and its environment instead; under a name that a shell would take apart."""
    folder = tmp_path_factory.mktemp('it\'s a $HOME "x" `y` #z;& ')
    path = folder / "python"
    path.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\nprintf 'ENVIRONMENT\\0'\nenv -0\n")
    path.chmod(0o755)
    return path


def run_script(one: Job, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The words that a job's script hands to the host's Python, and the environment that it does so in."""
    done = subprocess.run(["bash", "-c", script_text(one)], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    words, _, variables = done.stdout.decode().partition("ENVIRONMENT\0")
    return words.split("\0")[:-1], dict(pair.split("=", 1) for pair in variables.split("\0")[:-1])


@pytest.mark.parametrize("name", texts())
def test_a_script_and_a_job_are_what_they_were(name: str) -> None:
    assert texts()[name] == (GOLDEN / name).read_text(encoding="utf-8"), "if this was meant: python -m tests.rendered_jobs, and look at it"


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(texts())


@pytest.mark.parametrize("name", [name for name in texts() if name.endswith(".sbatch")])
def test_a_script_is_clean(name: str) -> None:
    path = GOLDEN / name
    for command in (["bash", "-n", path], [linter("shellcheck"), "--shell=bash", "--enable=all", "--severity=info", path]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("fault", ["echo $HOME/*.log", "cd $job", "if true; then"])
def test_a_script_that_is_not_clean_is_caught(fault: str) -> None:
    text = script_text(replace(JOBS["pyxis"], setup=(fault,)))
    done = subprocess.run([linter("shellcheck"), "--shell=bash", "-"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode != 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=PART, value=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@example(part='it\'s $(id) "x" `y` #z;&|<>*?[a]{b,c}~!', value="one\ntwo $HOME")
@example(part="-rf", value="")
def test_whatever_stands_in_a_path_or_a_variable_survives(part: str, value: str, recorder: Path) -> None:
    runs, snapshot = Path("/shared") / part, Path("/shared") / part / ".code" / part
    site = replace(ours(host_python=str(recorder)).slurm, exports=("KEPT",))
    stage = octothinker.llama_1b().stage("stable")
    one = job_of(runs / "g" / part, part, stage, replace(clusters.h100(), slurm=site), snapshot, [], Path("/"))
    words, variables = run_script(one, {"PATH": os.environ["PATH"], "KEPT": value})
    assert words[:2] == ["-I", "-c"]
    assert words[3:] == [str(snapshot), str(runs / "g" / part / "job" / "job.json")]
    assert variables["KEPT"] == value
    assert from_json(Job, to_json(one)) == one
    assert one.command[-1] == one.run == str(runs / "g" / part)


def test_a_path_that_is_not_quoted_is_caught(recorder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render.shlex, "quote", str)
    one = replace(JOBS["strange_names"], host_python=str(recorder))
    with pytest.raises(AssertionError):
        run_script(one, {"PATH": os.environ["PATH"]})


def sbatch_word(text: str) -> str:
    """What sbatch reads of a value, by its own rules: quotes group, a backslash takes the next character as it is, '#' ends a line."""
    found, quote, position = "", "", 0
    while position < len(text):
        letter = text[position]
        if letter == "\\":
            position += 1
            found += text[position]
        elif quote:
            quote, found = ("", found) if letter == quote else (quote, found + letter)
        elif letter in "\"'":
            quote = letter
        elif letter == "#" or letter.isspace():
            break
        else:
            found += letter
        position += 1
    return found


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_an_option_reads_back_as_it_was(value: str) -> None:
    assert sbatch_word(directive_word(value)) == value


def test_an_option_without_quotes_would_not() -> None:
    assert sbatch_word("a b#c") != "a b#c"


@pytest.mark.parametrize(
    ("place", "words"), [("run", "run folder"), ("snapshot", "snapshot"), ("directory", "work folder"), ("graph", "graph")]
)
@pytest.mark.parametrize("letter", ["\n", "\r", "\x00", "\x1b", "\ud800"])
def test_a_line_break_in_a_name_is_refused(place: str, words: str, letter: str) -> None:
    bad = f"/shared/a{letter}b"
    given_values: dict[str, Any] = {"run": Path("/r/g/s"), "snapshot": SNAPSHOT, "directory": DIRECTORY, "graph": "g"}
    given_values[place] = bad if place == "graph" else Path(bad)
    stage = demo.smoke().stage("stable")
    with pytest.raises(ConfigError, match=f"{words} .*control character cannot stand in a batch script; rename it"):
        job_of(given_values["run"], given_values["graph"], stage, ours(), given_values["snapshot"], [], given_values["directory"])


def test_a_backslash_in_the_run_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Slurm reads '\\' in the path of a log"):
        job(octothinker.llama_1b, "stable", ours(), Path("/shared/back\\slash"))


def test_only_what_is_named_passes(recorder: Path) -> None:
    submitted = {name: f"{name}-{CANARY}" for name in ("HF_TOKEN", "HF_HOME", "UNNAMED", "WANDB_API_KEY", "PYTHONSTARTUP")}
    environment = {**submitted, "PATH": os.environ["PATH"], "HOME": "/home/me", "SLURM_JOB_ID": "7"}
    one = replace(JOBS["no_container"], host_python=str(recorder), setup=())
    _, variables = run_script(one, environment)
    assert {name for name, value in variables.items() if CANARY in value} == {"HF_TOKEN", "HF_HOME"}
    assert (variables["SLURM_JOB_ID"], variables["HOME"]) == ("7", "/home/me")
    _, variables = run_script(replace(one, secrets_file="/home/me/secrets"), environment)
    assert "HF_TOKEN" not in variables  # the supervisor reads it from the file
    _, variables = run_script(replace(one, setup=("export FROM_SETUP=1",)), environment)
    assert variables["FROM_SETUP"] == "1"


def test_a_line_of_setup_that_fails_ends_the_job_before_anything_is_started(recorder: Path) -> None:
    one = replace(JOBS["no_container"], host_python=str(recorder), setup=("false",))
    done = subprocess.run(["bash", "-c", script_text(one)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_no_value_of_a_secret_or_of_anybodys_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(f"WANDB_API_KEY=file-{CANARY}\n")
    secrets.chmod(0o600)
    for name in ("HF_TOKEN", "HF_HOME", "WANDB_API_KEY", "UNNAMED", "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, f"{name}-{CANARY}")
    in_file = ours(secrets=("HF_TOKEN", "WANDB_API_KEY"), secrets_file=str(secrets), exports=("HF_HOME",))
    by_name = ours(secrets=("HF_TOKEN", "WANDB_API_KEY"), exports=("HF_HOME",))
    for cluster in (in_file, by_name):
        for container in (Container(), Container(runtime="pyxis", image="/i"), Container(runtime="apptainer", image="/i")):
            site = replace(cluster, slurm=replace(cluster.slurm, container=container))
            for stage in ("stable", "rl_long", "corpus"):
                one = job(octothinker.llama_3b, stage, site)
                assert CANARY not in script_text(one) + json.dumps(to_json(one))
    assert main(["launch", "octothinker:llama_1b", "--cluster", "h100", "--dry-run"]) == 0
    assert CANARY not in capsys.readouterr().out
    leaky = replace(one, environment={**one.environment, "LEAK": os.environ["UNNAMED"]})
    assert CANARY in json.dumps(to_json(leaky))  # what the search above would find


def refused(words: str, **changes: Any) -> Callable[[], None]:
    """A check that the 8B's stable stage is refused on a cluster with these changes."""

    def check() -> None:
        with pytest.raises(ConfigError, match=words):
            job(octothinker.llama_8b, "stable", ours(**changes))

    return check


REFUSALS = {
    "nodes": refused(r"plan.nodes 16 exceeds the 8 nodes that a job of ours can get \(slurm.max_nodes\)", max_nodes=8),
    "slow disk": refused(
        r"112.4 GB at slurm.write_bytes_per_second 1e\+08 takes 1125 s, but .*signal_seconds 300 s", write_bytes_per_second=1e8
    ),
    "time": refused(r"time_limit_seconds 340 leaves no time to work: .* raise the limit above 357", time_limit_seconds=340),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_stage_that_cannot_run_there_is_refused(name: str) -> None:
    REFUSALS[name]()


def test_what_fits_exactly_is_taken() -> None:
    assert job(octothinker.llama_8b, "stable", ours(time_limit_seconds=358, max_nodes=16)).save_seconds == pytest.approx(
        112.4e9 / 2e9, rel=1e-3
    )


def test_more_ranks_than_gpus_or_cores_are_refused() -> None:
    small = replace(ours(), gpus_per_node=4)
    with pytest.raises(ConfigError, match=r"stage stable: plan.ranks_per_node 8 exceeds the 4 GPUs of a node of ours"):
        job(octothinker.llama_3b, "stable", small)
    on_cpu = ("stable.plan.ranks_per_node=2", "stable.plan.micro_batch=4")
    assert job(demo.smoke, "stable", replace(small, cores_per_node=2), overrides=on_cpu).gpus_per_node == 0
    with pytest.raises(ConfigError, match=r"plan.ranks_per_node 2 exceeds the 1 cores of a node of ours; lower it"):
        job(demo.smoke, "stable", replace(small, cores_per_node=1), overrides=on_cpu)


def test_a_cluster_without_slurm_and_a_missing_template_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster ours: it says nothing of Slurm.*--local"):
        job(octothinker.llama_3b, "stable", replace(ours(), slurm=None))
    monkeypatch.setattr(render, "TEMPLATE", tmp_path / "stage.sbatch")
    with pytest.raises(LaunchError, match=r"no such file; launch from the project's checkout"):
        script_text(JOBS["joint"])


def test_the_parts_of_a_node() -> None:
    shape = {name: (one.nodes, one.tasks_per_node, one.cpus_per_task, one.gpus_per_node) for name, one in JOBS.items()}
    assert shape["no_container"] == (8, 8, 14, 8)
    assert shape["cpu_only"] == (1, 1, 32, 0)
    assert (JOBS["cpu_only"].partition, JOBS["cpu_only"].memory, JOBS["cpu_only"].exclusive) == ("cpu", "65536M", False)
    one_gpu = ("rl_long.plan.nodes=1", "rl_long.plan.ranks_per_node=1")
    assert job(octothinker.llama_1b, "rl_long", ours(), overrides=one_gpu).cpus_per_task == 112
    assert job(octothinker.llama_1b, "rl_long", ours(exclusive=False), overrides=one_gpu).cpus_per_task == 14
    assert JOBS["strange_names"].memory == f"{math.ceil(0.9 * 2e12 / 2**20)}M"  # all eight GPUs of nodes that are shared
    on_cpu = job(demo.smoke, "stable", ours(cpu_partition=""), overrides=("stable.plan.threads_per_rank=2", "stable.plan.loader_workers=1"))
    assert (on_cpu.partition, on_cpu.cpus_per_task, on_cpu.gpus_option) == ("batch", 3, "")
    assert (on_cpu.environment["OMP_NUM_THREADS"], JOBS["scale"].environment["OMP_NUM_THREADS"]) == ("2", "1")


def test_folders_are_mounted_once_and_where_a_mount_is_read_only_again() -> None:
    needed = [Path("/home/me/project"), Path("/home/me/project/runs"), Path("/tmp")]
    assert all_mounts((), needed) == ["/home/me/project:/home/me/project", "/tmp:/tmp"]
    assert all_mounts(("/home:/home", "/tmp:/tmp"), needed) == ["/home:/home", "/tmp:/tmp"]
    assert all_mounts(("/home:/home:ro", "/tmp:/scratch"), needed)[2:] == ["/home/me/project:/home/me/project", "/tmp:/tmp"]
    with pytest.raises(ConfigError, match=r"a,b: ',' and ':' in a path cannot be mounted"):
        all_mounts((), [Path("/home/a,b")])


@pytest.mark.parametrize(("seconds", "words"), [(60, "0-00:01:00"), (86_400, "1-00:00:00"), (90_061, "1-01:01:01"), (3_599, "0-00:59:59")])
def test_times_as_sbatch_takes_them(seconds: int, words: str) -> None:
    assert time_words(seconds) == words


def test_a_joint_in_the_middle_is_named_and_the_last_is_not() -> None:
    assert {joint.checkpoint for joint in JOBS["joint"].joints} == {f"{RUNS}/octothinker_3b/stable/checkpoints/iter_0030994"}
    assert [Path(joint.child).name for joint in JOBS["joint"].joints][:2] == ["pilot_megamath_qa_10", "pilot_megamath_qa_20"]
    assert JOBS["no_container"].joints == ()
