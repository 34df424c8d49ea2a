"""Stages as their own commands run them, one process a rank with RANK and WORLD_SIZE set, which are asked to stop at a given point."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.checkpoint import folder as folders
from megatron_ext.config.base import Json
from megatron_ext.runs import Run, read_json
from tests import ranks
from tests.small_checkpoints import data_digests

TOKENS = 128  # of a step of `training_runs.stage`
LIMIT_SECONDS = 120


class Ask(NamedTuple):
    """Signals that a rank sends itself: before a step, or (0) before it loads its weights."""

    rank: int
    step: int
    signals: tuple[int, ...]


def start(run: Run, out: Path, asks: Sequence[Ask] = (), fault: str = "") -> list[Any]:
    """The processes of a stage's verb; what rank r prints goes to `out`/r."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(ranks.PRELOADED)
    num_ranks, port = getattr(run.stage.plan, "num_ranks", 1), ranks.free_port()
    words = [run.stage.kind, str(run.path)]
    out.mkdir(exist_ok=True)
    found = [
        context.Process(
            target=_command, args=(words, rank, num_ranks, port, str(out / str(rank)), [a for a in asks if a.rank == rank], fault)
        )
        for rank in range(num_ranks)
    ]
    for process in found:
        process.start()
    return found


def exit_codes(processes: Sequence[Any]) -> list[int | None]:
    """How they ended; who has not by the limit is killed."""
    deadline = time.monotonic() + LIMIT_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
    return [process.exitcode for process in processes]


def command(run: Run, out: Path, asks: Sequence[Ask] = (), fault: str = "") -> list[int | None]:
    """Do a stage's verb on its ranks; their exit codes."""
    return exit_codes(start(run, out, asks, fault))


def _command(words: list[str], rank: int, num_ranks: int, port: int, out: str, asks: list[Ask], fault: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for number in (signal.SIGUSR1, signal.SIGTERM):  # as in a shell
        signal.signal(number, signal.SIG_DFL)
    from megatron_ext.__main__ import main

    if words[0] == "train":
        _tamper(asks, fault)
    if words[0] == "rl":
        _tamper_with_learning(asks)
    sys.exit(main(words))


def _tamper(asks: list[Ask], fault: str) -> None:
    from megatron_ext.training import trainer

    true_step, true_begin, true_rate = trainer.train_step, trainer.begin, trainer.learning_rate

    def send(step: int) -> None:
        for ask in asks:
            for number in ask.signals if ask.step == step else ():
                os.kill(os.getpid(), number)

    def train_step(state: Any, batches: Any, rate: float, seed: int, tokens_before: int, **options: Any) -> Any:
        send(tokens_before // TOKENS + 1)
        return true_step(state, batches, rate, seed, tokens_before, **options)

    def begin(*arguments: Any) -> Any:
        send(0)
        if fault == "slow start":
            time.sleep(LIMIT_SECONDS)
        return true_begin(*arguments)

    trainer.train_step, trainer.begin = train_step, begin
    if fault == "shifted learning rate":
        trainer.learning_rate = lambda schedule, before, total: true_rate(schedule, max(0, before - TOKENS), total)


def _tamper_with_learning(asks: list[Ask]) -> None:
    from megatron_ext.rl import trainer

    true_update = trainer._Loop.update

    def update(loop: Any, part: Any, progress: Any, number: int) -> Any:
        for ask in asks:
            for signal_number in ask.signals if (ask.step, number) == (progress.step + 1, 0) else ():
                os.kill(os.getpid(), signal_number)
        return true_update(loop, part, progress, number)

    trainer._Loop.update = update  # type: ignore[method-assign]


def ended(run: Run, attempt: int = 1) -> Json:
    """What an attempt says of its end."""
    values: Json = read_json(run.path / "attempts" / str(attempt) / "exit.json", "how an attempt ended")
    return values


def weights(run: Run, step: int) -> dict[str, str]:
    """Digests of the data files of a checkpoint: weights and moments of all ranks, bit for bit."""
    return data_digests(folders.iteration_path(run.checkpoints_path, step))
