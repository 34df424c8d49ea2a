"""`launch --local` on real run folders and real processes: skipping, refusing, failing, stopping."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import psutil
import pytest

from megatron_ext.__main__ import main
from megatron_ext.attempts import TAKE_OVER, begin_attempt
from megatron_ext.config.base import to_json
from megatron_ext.config.stages import Stage
from megatron_ext.errors import ConfigError, DataError, LaunchError, RunError
from megatron_ext.launch import local
from megatron_ext.launch.commands import parse, permissions
from megatron_ext.launch.failures import failure_text
from megatron_ext.launch.graph import with_overrides
from megatron_ext.launch.local import launch_local, run_stage, summary_text
from megatron_ext.launch.ranks import THREAD_VARIABLES, Permissions, torchrun_command
from megatron_ext.launch.tree import state, tree_text
from megatron_ext.launch.verbs import RUN_VERBS, attempt_codes, check_code, open_for
from megatron_ext.provenance import CorpusIndex
from megatron_ext.runs import Run, mark_done, open_run, write_json, write_run
from megatron_ext.snapshot import PACKAGE, code_hash, files_hash, source_files, take_snapshot
from recipes import demo
from tests.small_graphs import training_alone
from tests.unit.test_tree import parent_at, trained, write_all

SMOKE = training_alone(demo.smoke())
TEXT = with_overrides(
    replace(SMOKE, name="small", stages=SMOKE.stages[:1]), ["text.math_prose_bytes=20000", "text.general_prose_bytes=20000"]
)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_graph_runs_and_the_second_time_is_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch_local(TEXT, tmp_path, None)
    first = capfd.readouterr().out
    assert first.startswith("[1/1] text: text\n")
    assert (tmp_path / "small" / "text" / "text" / "math_web.jsonl").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path) if path.name != "recipe.json"}
    launch_local(TEXT, tmp_path, None)
    second = capfd.readouterr().out
    assert second.startswith("[1/1] text: text, done before, skipped\n")
    assert [line.split()[:3] for line in second.splitlines()[-1:]] == [["text", "text", "DONE"]]
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path) if path.name != "recipe.json"} == before


def test_a_mark_that_is_missing_means_the_stage_runs_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch_local(TEXT, tmp_path, None)
    (tmp_path / "small" / "text" / "DONE").unlink()  # as if it had been killed between the work and the mark
    launch_local(TEXT, tmp_path, None)
    assert open_run(tmp_path / "small" / "text").is_done()
    assert "skipped" not in capfd.readouterr().out


def test_another_recipe_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    runs = write_all(tmp_path / "smoke")
    mark_done(runs["stable"], {})
    (tmp_path / "smoke" / "text" / "recipe.json").unlink()
    before = {path: path.read_bytes() for path in files(tmp_path)}
    changed = with_overrides(SMOKE, ["stable.budget.steps=13"])
    with pytest.raises(RunError, match=r"stable: this run is DONE with another recipe.*\n  budget.steps: 12 -> 13"):
        launch_local(changed, tmp_path, None)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_every_kind_of_stage_has_a_verb_of_its_name() -> None:
    kinds = {kind.__dataclass_fields__["kind"].default for kind in get_args(get_args(Stage)[0])}
    assert {name for name, verb in RUN_VERBS.items() if name == verb.kind} == kinds


def test_a_plan_that_cannot_be_carried_out_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    graph = with_overrides(SMOKE, ["corpus.sources.math_web.tokens=100"])
    with pytest.raises((ConfigError, DataError), match="source 'math_web' would be repeated"):
        launch_local(graph, tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def begun_by(code: str, run: Run) -> None:
    """An attempt of other code that was cut short."""
    attempt = begin_attempt(run)
    write_json(attempt.path / "plan.json", {**attempt.record, "code_hash": code})
    attempt.finish("failed")


def test_a_stage_that_other_code_began_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    old = "0123" * 16
    run = write_run(tmp_path / "small" / "text", "small", TEXT.stages[0], {})
    begun_by(old, run)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(RunError) as caught:
        launch_local(TEXT, tmp_path, None)
    message = str(caught.value)
    assert f"{run.path}: attempt 1 of stage 'text' ran code 012301230123, and this is code {code_hash()[:12]}" in message
    assert f"(there is no snapshot of it at {tmp_path / '.code' / old[:16]})" in message
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    begun_by(code_hash(), run)  # the newest attempt counts
    launch_local(TEXT, tmp_path, None)
    begun_by(old, run)  # a finished stage does not go on
    launch_local(TEXT, tmp_path, None)


def test_other_code_goes_on_with_the_flag_and_is_recorded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the verb, by hand, and through `launch`, whose child would refuse it without the flag too."""
    run = write_run(tmp_path / "small" / "text", "small", TEXT.stages[0], {})
    begun_by("0123" * 16, run)
    assert main(["text", str(run.path)]) == 2
    assert "Add --other-code to go on with this code" in capfd.readouterr().err
    with pytest.raises(LaunchError, match="ended with exit code 2 before it began an attempt"):
        run_stage(run, take_snapshot(tmp_path))
    launch_local(TEXT, tmp_path, None, Permissions(other_code=True))
    assert attempt_codes(run) == {1: "0123" * 16, 2: code_hash()}
    assert f"attempt 1 ran code 012301230123, attempt 2 ran code {code_hash()[:12]}" in tree_text(tmp_path)


def test_the_way_back_to_the_old_code_is_a_command_that_works(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "old" / "megatron_ext"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "errors.py").write_text((package / "errors.py").read_text() + "# older\n")
    take_snapshot(tmp_path, package)
    run = write_run(tmp_path / "small" / "text", "small", TEXT.stages[0], {})
    begun_by(files_hash(source_files(package)), run)
    with pytest.raises(RunError) as caught:
        launch_local(TEXT, tmp_path, None)
    command = str(caught.value).splitlines()[-1].strip()
    assert command.startswith("env PYTHONPATH=")
    subprocess.run(command, shell=True, cwd=PACKAGE.parent, check=True)
    assert set(attempt_codes(run).values()) == {files_hash(source_files(package))}
    assert run.is_done()


def test_a_report_is_drawn_again_by_other_code_without_a_flag(tmp_path: Path) -> None:
    report = write_all(tmp_path)["report"]
    begun_by("0123" * 16, report)
    check_code(report)


def test_the_flags_reach_every_rank_and_the_one_who_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_all(tmp_path)["base"]
    both = Permissions(other_code=True, take_over=True)
    for words in (["launch", "demo:smoke", "--local"], ["train", str(base.path)], ["prepare", str(base.path)]):
        assert permissions(parse([*words, *both.words])) == both
        assert permissions(parse(words)) == Permissions()
    assert torchrun_command(base, both)[-2:] == ["--other-code", "--take-over"]
    assert torchrun_command(base)[-1] == str(base.path)
    monkeypatch.setenv(TAKE_OVER, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    open_for("train", base.path)
    assert os.environ[TAKE_OVER] == "0"
    open_for("train", base.path, both)
    assert os.environ[TAKE_OVER] == "1"


def ended(*before: int, run: Run, program: str) -> tuple[int, int | None]:
    """How a stage's process ends that is this program, and which attempt is its own."""
    child = subprocess.Popen([sys.executable, "-c", program, str(run.path)], env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})
    return local._wait(run, child, list(before))


BEGIN = (
    "import sys; from megatron_ext.attempts import begin_attempt; from megatron_ext.runs import open_run; "
    "begin_attempt(open_run(sys.argv[1]))"
)
RANK = (  # begins once it was seen
    "import os, sys, time\nend = time.monotonic() + 60\n"
    "while not os.path.exists(sys.argv[1] + '/seen') and time.monotonic() < end: time.sleep(0.02)\n" + BEGIN
)
AS_RANK = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {RANK!r}, sys.argv[1]], start_new_session=True))"


def test_only_an_attempt_of_its_own_counts_as_a_stages_failure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "text", "g", TEXT.stages[0], {})
    other = begin_attempt(run)  # of this process, which lives: another launcher's
    assert ended(run=run, program=BEGIN) == (1, None)  # refused, while the other's attempt is new
    assert "attempt 1" not in failure_text(run, 1, None)
    assert "ended with exit code 1 before it began an attempt; what it printed above says why" in failure_text(run, 1, None)
    other.finish("failed")
    assert ended(run=run, program=BEGIN) == (0, 2)
    assert ended(1, 2, run=run, program="pass") == (0, None)


def test_the_attempt_of_a_rank_in_a_session_of_its_own_is_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "text", "g", TEXT.stages[0], {})
    look = local._own_attempt

    def look_and_tell(run: Run, family: set[int], before: list[int]) -> int | None:
        if len(family) > 1:  # a rank begins its attempt long after it was started
            (run.path / "seen").touch()
        return look(run, family, before)

    monkeypatch.setattr(local, "_own_attempt", look_and_tell)
    monkeypatch.setattr(local, "LOOK_SECONDS", 0.05)
    assert ended(run=run, program=AS_RANK) == (0, 1)


def test_a_fenced_attempt_reports_itself_and_not_the_one_that_fenced_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "text", "g", TEXT.stages[0], {})
    program = f"{BEGIN}.finish('failed'); begin_attempt = None; import os; os.makedirs(sys.argv[1] + '/attempts/2'); " + (
        "open(sys.argv[1] + '/attempts/2/plan.json', 'w').write('{\"pid\": 1, \"host\": \"elsewhere\"}')"
    )
    assert ended(run=run, program=program) == (0, 1)


def test_a_child_of_a_parent_that_was_trained_again_is_not_skipped_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = replace(SMOKE, stages=SMOKE.stages[:-1])
    runs = write_all(tmp_path / "smoke", graph)
    checkpoint = trained(runs["stable"], 12, 4.0)
    trained(runs["decay_long"], 8, 3.0, parent_at(runs["stable"], 12, "branch", checkpoint))
    for run in runs.values():
        mark_done(run, {"seconds": 1.0})
    corpus = CorpusIndex(tokenizer_hash="", tokenizer_path="t", vocab_size=512, eod_id=0, bos=False, sources={})
    write_json(runs["corpus"].path / "corpus.json", to_json(corpus))
    launch_local(graph, tmp_path, None)
    assert "although" not in capsys.readouterr().out
    shutil.rmtree(checkpoint)
    trained(runs["stable"], 12, 4.5, learning_rate=9.0)
    launch_local(graph, tmp_path, None)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "although" in line]
    assert "decay_long: train, done before, skipped, although its parent checkpoint " in line
    assert "is not the one that it started from" in line
    assert "and launch again to train it from what its parent holds now" in line


def test_a_start_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    runs = write_all(tmp_path / "smoke")
    trained(runs["stable"], 12, 4.0)
    mark_done(runs["stable"], {})
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(LaunchError, match=r"stage 'decay_long' starts from 'stable' at 2,048 tokens, but .* holds 6,144 tokens\."):
        launch_local(with_overrides(SMOKE, ["decay_long.start.tokens=2048"]), tmp_path, None)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_a_report_is_drawn_again_when_what_it_reads_is_newer(tmp_path: Path) -> None:
    runs = write_all(tmp_path)
    report = runs["report"]
    for name, run in runs.items():
        write_json(run.path / "DONE", {"science_hash": run.science_hash, "finished_at": "2026-01-01T00:00:00+0000", "name": name})
    assert local.is_finished(report)
    stable = runs["stable"]
    write_json(stable.path / "DONE", {"science_hash": stable.science_hash, "finished_at": "2026-01-01T00:00:01+0000"})
    assert not local.is_finished(report)
    assert local.is_finished(stable)  # a training stage never goes stale: what it reads is in its hash
    (stable.path / "DONE").unlink()
    assert not local.is_finished(report)


LONG = with_overrides(TEXT, ["text.math_prose_bytes=400000000", "text.short_problems=3000000"])


def _default_signals() -> None:
    """As in a terminal: under nohup, or in the background of a script, children inherit that SIGHUP and SIGINT are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def started(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """`launch --local` of a text stage that takes long, and the process of that stage once it is at work."""
    (tmp_path / "my.py").write_text("from tests.unit.test_launch import LONG\n\n\ndef run():\n    return LONG\n")
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-m", "megatron_ext", "launch", "./my.py:run", "--local"]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            words, cwd=tmp_path, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": str(root)}, process_group=0,
            preexec_fn=_default_signals,
        )  # fmt: skip
    plan = tmp_path / "runs" / "small" / "text" / "attempts" / "1" / "plan.json"
    deadline = time.monotonic() + 60
    while not plan.is_file():
        assert process.poll() is None, (tmp_path / "out").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = psutil.Process(json.loads(plan.read_text())["pid"])
    try:
        yield process, child
    finally:
        for left in (child, process):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def test_stopping_reaches_ranks_in_sessions_of_their_own() -> None:
    """As torchrun's ranks are; this one ignores SIGTERM besides."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    starter = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, process_group=0)
    assert child.stdout is not None
    child.stdout.readline()  # the rank is up, and deaf
    (rank,) = psutil.Process(child.pid).children()
    local.stop(child, grace_seconds=0.3)
    assert not psutil.pid_exists(child.pid)
    rank.wait(5)
    assert not rank.is_running()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stopped_launch_takes_its_stage_with_it(tmp_path: Path, number: int, code: int) -> None:
    with started(tmp_path) as (process, child):
        assert os.getpgid(child.pid) != os.getpgid(process.pid)
        process.send_signal(number)
        assert process.wait(30) == code
        assert not child.is_running()
    text = (tmp_path / "out").read_text()
    assert "stopping stage 'text'" in text
    assert "the same command goes on from here" in text
    assert "Traceback" not in text
    run = open_run(tmp_path / "runs" / "small" / "text")
    assert state(run).startswith("attempt 1: ")
    assert not run.is_done()


def test_a_stage_killed_from_outside_is_a_failure(tmp_path: Path) -> None:
    with started(tmp_path) as (process, child):
        assert "running, pid" in state(open_run(tmp_path / "runs" / "small" / "text"))
        child.kill()
        assert process.wait(30) == 2
    assert "stage 'text' ended by signal SIGKILL" in (tmp_path / "out").read_text()
    assert state(open_run(tmp_path / "runs" / "small" / "text")) == "attempt 1: killed (no word of its end)"


def test_a_stage_sees_pinned_threads_and_no_other_jobs_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMP_NUM_THREADS": "7", "WORLD_SIZE": "8", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    run = write_run(tmp_path / "text", "g", TEXT.stages[0], {})
    snapshot = take_snapshot(tmp_path)
    environment = local._environment(run, snapshot)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["PYTHONPATH"].startswith(f"{snapshot}")
    assert not {"WORLD_SIZE", "RANK"} & set(environment)
    run_stage(run, snapshot)
    assert run.is_done()


def test_the_summary_counts_seconds_tokens_and_points_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = write_all(tmp_path)
    trained(runs["base"], 6, 5.25)
    mark_done(runs["base"], {"seconds": 12.4})
    attempt = begin_attempt(runs["report"])
    write_json(attempt.path / "plan.json", {"started_at": "2026-01-01T00:00:00+0000"})
    mark_done(runs["report"], {})
    write_json(runs["report"].path / "DONE", {"science_hash": runs["report"].science_hash, "finished_at": "2026-01-01T01:00:05+0100"})
    (runs["report"].path / "index.html").write_text("")
    lines = summary_text([runs["base"], runs["report"]]).splitlines()
    assert lines[2].split() == ["base", "train", "DONE", "12", "3,072", "5.2500"]
    assert lines[3].split() == ["report", "report", "DONE", "5"]
    assert lines[4] == "report: report/index.html"
