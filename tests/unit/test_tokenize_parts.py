"""Parts of a tokenize stage, which do slices ahead of it: the same shards, and nothing of another part is touched."""

from __future__ import annotations

import pytest

from megatron_ext.attempts import begin_attempt
from megatron_ext.data.tokenize import run_part, run_tokenize
from megatron_ext.errors import ConfigError, RunError
from megatron_ext.runs import open_run, write_run
from tests.unit.test_tokenize import shard_bytes, stage_of, text, tokenize, tokenizer

__all__ = ["text", "tokenizer"]  # fixtures


def test_parts_do_slices_ahead_and_touch_no_others(tmp_path, text, tokenizer, capsys):
    slice_bytes = 2_000
    whole = tokenize(tmp_path / "whole", text, tokenizer, slice_bytes)
    run = write_run(tmp_path / "parts", "test", whole.stage, {})
    folder = run.path / "shards" / "web"
    folder.mkdir(parents=True)
    (folder / ".train-00000.1.bin.tmp").touch()  # of part 0, and of part 1
    (folder / ".train-00001.1.bin.tmp").touch()
    (folder / "heldout-00001.bin").touch()
    run_part(run, 0, 2, slice_bytes)
    assert {path.name for path in folder.glob(".*")} == {".train-00001.1.bin.tmp"}
    assert (folder / "heldout-00001.bin").exists()
    numbers = {int(path.name[6:11]) for path in folder.glob("slice-*.json")}
    total = len(list(whole.path.glob("shards/web/slice-*.json")))
    assert numbers == set(range(0, total, 2))
    assert total > 3
    done = {path: path.stat().st_mtime_ns for path in folder.glob("slice-*.json")}
    run_part(run, 0, 2, slice_bytes)
    assert f"part 0 of 2: {len(numbers)} slices, {len(numbers)} of them done before" in capsys.readouterr().out
    run_tokenize(open_run(run.path), slice_bytes)  # the other part never came
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert shard_bytes(run) == shard_bytes(whole)
    assert not list(folder.glob(".*"))


def test_parts_that_cannot_be_are_refused(tmp_path, text, tokenizer):
    tokenizer.copy_to(text.parent / "tokenizer_files")
    run = write_run(tmp_path / "run", "test", stage_of(text, text.parent / "tokenizer_files"), {})
    for part in (-1, 2):
        with pytest.raises(ConfigError, match=rf"part {part} of 2: parts count from 0 to 1"):
            run_part(run, part, 2)
    begin_attempt(run)
    with pytest.raises(RunError, match=r"attempt 1 .*is at work on stage 'corpus' itself"):
        run_part(run, 0, 2)
