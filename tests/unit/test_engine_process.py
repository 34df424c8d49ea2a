"""An engine in a process of its own: the same answers, and every way to fail is one error that names the cause, never a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ext.config.rl import Sampling
from megatron_ext.errors import ConfigError, LaunchError, TrainingError
from megatron_ext.generation.engine import Request, generate_all
from megatron_ext.generation.engine_process import EngineProcess
from megatron_ext.model.bucket import Bucket
from tests import engine_of_numbers
from tests.engine_of_numbers import LAST_WORDS, EngineOfNumbers

ROOT = Path(__file__).resolve().parents[2]
BIG = 3_000_000  # bytes: more than a socket holds, so that one side must wait for the other


def request(number: int, prompt: int = 1, cap_tokens: int = 3) -> Request:
    return Request(number, (prompt,), cap_tokens, Sampling(), seed=0)


def weights(*names: str) -> Iterator[Bucket]:
    for value, name in enumerate(names, start=1):
        yield Bucket(
            ((name, torch.full((BIG,), value, dtype=torch.uint8)), (f"{name}.bf16", torch.full((2, 3), 0.5, dtype=torch.bfloat16)))
        )


def start(tmp_path, *arguments, silence_seconds: float = 200) -> EngineProcess:
    return EngineProcess(EngineOfNumbers, arguments, tmp_path / "engine.log", silence_seconds=silence_seconds)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[EngineProcess]:
    found = start(tmp_path_factory.mktemp("engine"))
    yield found
    found.close()
    assert found._process.returncode == 0, "it was killed before it left by itself"
    with pytest.raises(TrainingError, match="it was closed"):
        found.poll()


def test_it_answers_as_the_engine_in_it(engine):
    engine.update_weights(5, weights("one", "two"))
    found = generate_all(engine, [request(number, cap_tokens=4 - number) for number in range(3)])
    assert [one.id for one in found] == [0, 1, 2]
    assert found[0].tokens.tolist() == [BIG * 3 + 6] * 4
    assert found[2].weight_versions.tolist() == [5] * 2
    assert engine.stats().weight_version == 5
    assert engine.poll() == []


def test_what_the_engine_refuses_is_raised_here_and_it_goes_on(engine):
    with pytest.raises(ConfigError, match="a request is refused"):
        engine.submit([request(0), request(1, engine_of_numbers.REFUSED)])
    with pytest.raises(TrainingError, match="a tensor is refused"):
        engine.update_weights(6, weights("one", "refused", "two", "three"))  # what is still on its way is taken off it
    engine.update_weights(7, weights("one"))
    assert [one.tokens.tolist() for one in generate_all(engine, [request(1)])] == [[BIG + 3] * 3]


def test_weights_that_break_off_end_it(tmp_path):
    found = start(tmp_path)

    def broken() -> Iterator[Bucket]:
        yield from weights("one")
        raise ArithmeticError("the trainer's own fault")

    with pytest.raises(ArithmeticError):
        found.update_weights(8, broken())
    with pytest.raises(TrainingError, match="its weights did not come whole"):
        found.poll()


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (engine_of_numbers.DIES, rf"ended with exit code 1 \(poll\)(.|\n)*{LAST_WORDS}(.|\n)*goes on from its last checkpoint"),
        (engine_of_numbers.KILLED, r"ended with signal SIGKILL .*out of memory(.|\n)*an engine of numbers starts"),
    ],
)
def test_an_engine_that_ends_in_the_middle_is_an_error_with_its_cause(tmp_path, token, words):
    found = start(tmp_path)
    found.submit([request(0, token)])
    with pytest.raises(TrainingError, match=words):
        found.poll()
    with pytest.raises(TrainingError, match="is gone"):
        found.submit([request(2)])
    found.close()


def test_an_engine_that_hangs_is_ended(tmp_path):
    found = start(tmp_path)
    found.submit([request(0, engine_of_numbers.HANGS)])
    found._silence_seconds = 3  # not before: a slow machine may take longer to listen
    with pytest.raises(TrainingError, match=r"gave no sign of life for 3 seconds, and was ended \(poll\)(.|\n)*no way out"):
        found.poll()
    with pytest.raises(ProcessLookupError):
        os.kill(found.pid, 0)


def test_an_engine_that_stops_taking_weights_is_ended(tmp_path):
    found = start(tmp_path, silence_seconds=3)
    with pytest.raises(TrainingError, match=r"stood still in the middle of a message for 3 seconds, .*taking weights version 1"):
        found.update_weights(1, weights("one", "hangs", "two"))


def test_killed_while_it_takes_weights(tmp_path):
    found = start(tmp_path)

    def killing() -> Iterator[Bucket]:
        yield from weights("one")
        os.kill(found.pid, signal.SIGKILL)
        yield from weights("two", "three")

    with pytest.raises(TrainingError, match=r"SIGKILL(.|\n)*taking weights version 1"):
        found.update_weights(1, killing())


ORPHAN = """
import sys
from pathlib import Path
from tests.unit.test_engine_process import start
print(start(Path(sys.argv[1])).pid, flush=True)
sys.stdin.read()
"""


def test_without_its_caller_it_ends(tmp_path):
    command = [sys.executable, "-c", ORPHAN, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as caller:
        pid = int(caller.stdout.readline())
        assert is_running(pid)
        caller.kill()
    end = time.monotonic() + 100
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_engine_that_cannot_start(tmp_path):
    with pytest.raises(ConfigError, match="heads of 16"):
        start(tmp_path, "heads of 16 channels")
    with pytest.raises(LaunchError, match=r"exit code 1 \(starting\)(.|\n)*no such library"):
        start(tmp_path, "", "no such library")
