"""What a request to stop does to a process, and what is touched while work goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_ext import attempts
from megatron_ext.attempts import attempting, begin_attempt, pulse
from megatron_ext.errors import EXIT_AGAIN
from megatron_ext.launch.graph import Graph
from megatron_ext.runs import Run, write_run
from recipes import demo

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 60
BEGIN = "from megatron_ext import interruption; import os, signal, sys, time; interruption.listen(); "


def text_run(folder: Path) -> Run:
    graph: Graph = demo.smoke()
    return write_run(folder / "text", "smoke", graph.stage("text"), {})


def program(lines: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own, which listens."""
    return subprocess.run(
        [sys.executable, "-c", BEGIN + lines, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
    )


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_work_of_one_process_ends_where_it_is(tmp_path: Path, name: str) -> None:
    """No `except Exception` holds it up, and a second request does not disturb the cleaning up."""
    run = text_run(tmp_path)
    done = program(
        "from pathlib import Path; from megatron_ext.attempts import attempting; from megatron_ext.runs import open_run\n"
        "with attempting(open_run(Path(sys.argv[1]))):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{name}); time.sleep(60)\n"
        "    except Exception: print('held up')\n"
        f"    finally: os.kill(os.getpid(), signal.{name}); print('cleaned up')\n",
        str(run.path),
    )
    assert (done.returncode, done.stdout) == (EXIT_AGAIN, "cleaned up\n"), done.stderr
    ended = json.loads((run.path / "attempts/1/exit.json").read_text())
    assert ended["reason"] == "interrupted"
    assert ended["words"].startswith(f"asked to stop ({name})")


def test_what_fails_because_its_processes_were_asked_too_is_no_failure(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    done = program(
        "from pathlib import Path; from megatron_ext.attempts import attempting; from megatron_ext.runs import open_run\n"
        "with attempting(open_run(Path(sys.argv[1]))):\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "    finally: raise OSError('the pool is gone')\n",
        str(run.path),
    )
    assert done.returncode == EXIT_AGAIN, done.stderr
    assert json.loads((run.path / "attempts/1/exit.json").read_text())["reason"] == "interrupted"


def test_a_request_between_the_record_of_an_attempt_and_the_watch_over_it_is_recorded(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    done = program(
        "from pathlib import Path; from megatron_ext import attempts; from megatron_ext.runs import open_run\n"
        "begin = attempts.begin_attempt\n"
        "def asked(run):\n"
        "    attempt = begin(run); os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
        "    return attempt\n"
        "attempts.begin_attempt = asked\n"
        "with attempts.attempting(open_run(Path(sys.argv[1]))): print('worked')\n",
        str(run.path),
    )
    assert (done.returncode, done.stdout) == (EXIT_AGAIN, ""), done.stderr
    assert json.loads((run.path / "attempts/1/exit.json").read_text())["reason"] == "interrupted"


def test_who_waits_for_an_owner_elsewhere_stops_when_asked(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    record = begin_attempt(run).path / attempts.RECORD
    record.write_text(json.dumps({**json.loads(record.read_text()), "place": "elsewhere"}))
    done = program(
        "import threading; from pathlib import Path; from megatron_ext.attempts import attempting; from megatron_ext.runs import open_run\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "with attempting(open_run(Path(sys.argv[1]))): print('worked')\n",
        str(run.path),
    )
    assert (done.returncode, done.stdout) == (EXIT_AGAIN, ""), done.stderr
    assert not (run.path / "attempts/2").exists()


def test_a_stage_by_its_verb_goes_on_after_a_request(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    words = [sys.executable, "-m", "megatron_ext", "text", str(run.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (run.path / "attempts/1/plan.json").is_file():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LIMIT_SECONDS)
    ended = json.loads((run.path / "attempts/1/exit.json").read_text())
    assert (process.returncode, ended["reason"], run.is_done()) in ((EXIT_AGAIN, "interrupted", False), (0, "done", True)), said
    assert process.returncode == 0 or said.startswith("stopped: asked to stop (SIGTERM)")
    assert subprocess.run(words, check=False, capture_output=True).returncode == 0
    assert run.is_done()


def test_a_process_leaves_while_its_main_thread_is_in_native_code() -> None:
    """It waits for a lock of C that nobody will give back: no handler of Python's gets to run."""
    done = program(
        "interruption.leave_at_once(lambda name: print(name, flush=True))\n"
        "import ctypes; lock = ctypes.create_string_buffer(256); wait = ctypes.CDLL(None).pthread_mutex_lock\n"
        "wait(lock); import threading; threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start(); wait(lock)\n"
    )
    assert (done.returncode, done.stdout) == (EXIT_AGAIN, "SIGTERM\n"), done.stderr


def test_what_is_deferred_is_noted_once_and_later_ignored() -> None:
    done = program(
        "interruption.leave_at_once(); interruption.defer()\n"
        "for number in (signal.SIGUSR1, signal.SIGTERM): os.kill(os.getpid(), number)\n"
        "time.sleep(0.1); print(interruption.request()); interruption.ignore(); os.kill(os.getpid(), signal.SIGTERM); print('lives')\n"
    )
    assert (done.returncode, done.stdout) == (0, "SIGUSR1\nlives\n"), done.stderr


def test_a_forked_process_is_not_asked() -> None:
    done = program(
        "interruption.leave_at_once(); interruption.defer(); up, down = os.pipe(); child = os.fork()\n"
        "if not child: os.write(down, b'.'); time.sleep(60); os._exit(0)\n"
        "os.read(up, 1); os.kill(child, signal.SIGTERM)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), repr(interruption.request()))\n"
    )
    assert done.stdout == f"{-signal.SIGTERM} ''\n", done.stderr


def test_a_program_that_serves_a_stage_outlives_requests() -> None:
    done = program(
        "interruption.leave_to_parent()\n"
        "for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM): os.kill(os.getpid(), number)\n"
        "print('lives')\n"
    )
    assert (done.returncode, done.stdout) == (0, "lives\n"), done.stderr


def test_stacks_go_to_standard_error_as_it_was(tmp_path: Path) -> None:
    done = program(
        "other = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT); os.dup2(other, 2)\nos.kill(os.getpid(), signal.SIGUSR2); print('lives')",
        str(tmp_path / "log"),
    )
    assert (done.returncode, done.stdout) == (0, "lives\n")
    assert "most recent call first" in done.stderr
    assert (tmp_path / "log").read_text() == ""


def test_the_heart_beats_by_itself_and_the_pulse_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(attempts, "_pulsed_at", [-1.0])
    with attempting(text_run(tmp_path)) as attempt:
        heart, beat = attempt.path / attempts.HEARTBEAT, attempt.path / attempts.PULSE
        first = heart.stat().st_mtime_ns
        deadline = time.monotonic() + LIMIT_SECONDS
        while heart.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
        assert not beat.exists()
        other = threading.Thread(target=pulse)
        other.start()
        other.join()
        assert not beat.exists()  # another thread's
        pulse()
        os.utime(beat, (1, 1))
        monkeypatch.setattr(attempts, "PULSE_SECONDS", 1e9)
        pulse()
        assert beat.stat().st_mtime == 1  # it was felt a moment ago
        monkeypatch.setattr(attempts, "PULSE_SECONDS", 0.0)
        pulse()
        assert beat.stat().st_mtime > 1
    os.utime(beat, (1, 1))
    pulse()
    assert beat.stat().st_mtime == 1  # its attempt is over


def test_an_attempt_knows_that_it_was_interrupted(tmp_path: Path) -> None:
    attempt = begin_attempt(text_run(tmp_path))
    assert not attempt.is_interrupted()
    attempt.finish("failed")
    assert not attempt.is_interrupted()
    attempt.finish(attempts.INTERRUPTED, words="asked to stop")
    assert attempt.is_interrupted()
