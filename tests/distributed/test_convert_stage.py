"""The Convert stage and exports beside a training, when they are killed or cannot be written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest

from megatron_ext.__main__ import main
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.stages import ConvertStage
from megatron_ext.errors import CheckpointError
from megatron_ext.provenance import read_manifest
from megatron_ext.runs import Run, read_json, write_run

MODEL = ModelConfig(
    name="tiny", num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=300,
    max_positions=128, head_dim=8, norm_epsilon=1e-6,
)  # fmt: skip

# Converts the run folder of argument 1 in data files of 20 kB; with argument 2, kills itself when so many are finished.
PROGRAM = """
import functools, os, signal, sys
from megatron_ext.__main__ import main
from megatron_ext.checkpoint import stream_writing
from megatron_ext.conversion import stage

stage.import_model = functools.partial(stage.import_model, file_bytes=20_000)
left, data_file = [int(sys.argv[2])], stream_writing._Job.data_file

def counted(job, name, parts):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    data_file(job, name, parts)

stream_writing._Job.data_file = counted
sys.exit(main(["convert", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a folder."""
    from tests.small_models import hugging_face_folder

    return hugging_face_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """A verb pins the threads of its process, by its environment."""
    with patch.dict(os.environ):
        yield


def convert_run(folder: Path, source: Path, **changes: object) -> Run:
    """A Convert stage's run folder that has not begun."""
    stage = ConvertStage(name="llama", model_id=str(source), model=MODEL, **changes)  # type: ignore[arg-type]
    return write_run(folder / "graph" / "llama", "graph", stage, {})


def convert(run: Run, files_before_death: int = -1) -> subprocess.CompletedProcess[str]:
    """Run the verb in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(run.path), str(files_before_death)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def test_a_killed_conversion_goes_on_in_the_next_attempt(tmp_path: Path, source: Path) -> None:
    undisturbed, killed = convert_run(tmp_path / "a", source), convert_run(tmp_path / "b", source)
    assert convert(undisturbed).returncode == 0
    assert convert(killed, files_before_death=2).returncode == -signal.SIGKILL
    assert not killed.is_done()
    assert not (killed.checkpoints_path / "iter_0000000").exists()
    (begun,) = killed.checkpoints_path.glob(".attempt-1/iter_0000000/__0_1.distcp")
    inode = begun.stat().st_ino

    assert convert(killed).returncode == 0
    path = killed.checkpoints_path / "iter_0000000"
    assert (path / "__0_1.distcp").stat().st_ino == inode  # was not written again
    assert sorted(p.name for p in killed.checkpoints_path.iterdir()) == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    manifests = [read_manifest(run.checkpoints_path / "iter_0000000") for run in (undisturbed, killed)]
    assert manifests[0].files == manifests[1].files
    assert [manifest.attempt for manifest in manifests] == [1, 2]
    assert killed.is_done()


def test_a_conversion_that_was_published_and_not_marked_is_only_marked(tmp_path: Path, source: Path) -> None:
    run = convert_run(tmp_path, source)
    assert convert(run).returncode == 0
    (run.path / "DONE").unlink()
    (run.checkpoints_path / "latest_checkpointed_iteration.txt").unlink()  # killed right after the publish
    (run.checkpoints_path / ".attempt-1").mkdir()
    away = source.rename(source.with_name("away"))  # it is not needed again
    written = (run.checkpoints_path / "iter_0000000" / "manifest.json").stat().st_mtime_ns
    again = convert(run)
    away.rename(source)
    assert sorted(p.name for p in run.checkpoints_path.iterdir()) == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    assert (again.returncode, again.stderr.count("Traceback")) == (0, 0)
    assert run.is_done()
    assert (run.checkpoints_path / "iter_0000000" / "manifest.json").stat().st_mtime_ns == written


def test_a_source_that_is_another_model_is_refused_and_recorded(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(
        tmp_path / "graph" / "llama",
        "graph",
        ConvertStage(name="llama", model_id=str(source), model=replace(MODEL, num_layers=5, rope_base=500_000.0)),
        {},
    )
    assert main(["convert", str(run.path)]) == 2
    said = capsys.readouterr().err
    assert "num_layers: 5 in the recipe, 4 in config.json" in said
    assert "rope_base: 500000.0 in the recipe, 10000.0 in config.json" in said
    assert read_json(run.path / "attempts/1/exit.json", "how it ended")["reason"] == "failed"
    assert not list(run.checkpoints_path.glob("iter_*"))


def test_an_export_ends_when_its_training_is_killed(tmp_path: Path) -> None:
    child = (
        "from megatron_ext.conversion import beside; beside._end_with_parent(); print('ready', flush=True); import time; time.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys, time; os.environ['MEGATRON_EXT_EXPORT_PARENT'] = str(os.getpid()); "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, text=True); "
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)"
    )
    training = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert training.stdout is not None
    export = psutil.Process(int(training.stdout.readline()))
    training.kill()
    training.wait()
    assert psutil.wait_procs([export], timeout=60)[0] == [export]


def test_an_export_whose_training_is_gone_does_not_begin(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_ext.conversion.beside", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "MEGATRON_EXT_EXPORT_PARENT": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()


def test_a_name_of_a_checkpoint(tmp_path: Path, source: Path) -> None:
    from megatron_ext.checkpoint.folder import named_checkpoint

    run = convert_run(tmp_path, source)
    with pytest.raises(CheckpointError, match=r"llama: has no manifest\.json, and no checkpoints below it; name a published checkpoint"):
        named_checkpoint(run.path)
    assert main(["convert", str(run.path)]) == 0
    path = run.checkpoints_path / "iter_0000000"
    assert named_checkpoint(path) == named_checkpoint(run.path) == named_checkpoint(run.checkpoints_path) == path


def test_a_hub_id_without_a_network_says_which_files_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    run = convert_run(tmp_path, Path("meta-llama/Llama-3.2-1B"))
    found = convert(run)
    assert found.returncode == 2
    assert "HF_HUB_OFFLINE is set" in found.stderr
    assert "assets/Llama-3.2-1B" in found.stderr
    assert "model.safetensors" in found.stderr
