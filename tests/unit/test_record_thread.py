"""Writing beside the updates: in order, waited for when asked, what fails told to who asks; and said where nobody does."""

from __future__ import annotations

import threading

import pytest

from megatron_ext.errors import RunError
from megatron_ext.rl.lengths import LengthState
from megatron_ext.rl.order import OrderState
from megatron_ext.rl.record import read_record, write_record
from megatron_ext.rl.recording import Recorder
from megatron_ext.rl.rollouts import Batch


def batch(step):
    return Batch(step, 10, 0, 1, (), OrderState(), LengthState())


def test_batches_are_written_one_after_the_other_elsewhere(tmp_path):
    may_go_on, threads = threading.Event(), []

    def write(one):
        assert may_go_on.wait(60)
        threads.append(threading.current_thread())
        return write_record(tmp_path, one)

    recorder = Recorder(write)
    for step in (1, 2, 3):
        recorder.begin(batch(step))  # returns before anything is written
    may_go_on.set()
    assert recorder.digest(3) == read_record(tmp_path, 3).sha256
    assert read_record(tmp_path, 1).sha256 == recorder.digest(1), "written before the third"
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()
    recorder.close()


def test_who_asks_for_a_record_gets_its_failure(tmp_path, capsys):
    (tmp_path / "rollouts").write_text("a file stands where the records should go")
    recorder = Recorder(lambda one: write_record(tmp_path, one))
    recorder.begin(batch(4))
    with pytest.raises(RunError, match=r"step_0000004\.jsonl\.gz: the rollouts of step 4 cannot be recorded"):
        recorder.digest(4)
    recorder.close()
    assert capsys.readouterr().out == ""


def test_what_nobody_asked_for_is_ended_and_said(tmp_path, capsys):
    recorder = Recorder(lambda one: write_record(tmp_path, one) if one.step == 1 else 1 // 0)
    recorder.begin(batch(1))
    recorder.begin(batch(2))
    recorder.close()
    assert read_record(tmp_path, 1).step == 1
    assert capsys.readouterr().out == "step 2: its rollouts are not recorded: ZeroDivisionError: integer division or modulo by zero\n"
