"""Run a function on several gloo ranks, each a process, and show the first failing rank's traceback.

The processes are forked from a server that has imported torch and Megatron-Core once.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.config.plan import TrainPlan

TIMEOUT_SECONDS = 240
PRELOADED = ["megatron_ext.training.stage", "megatron_ext.cpu_megatron", "tests.small_corpus"]


def run(function: Callable[..., Any], plan: TrainPlan, *arguments: Any) -> list[Any]:
    """Call `function(groups, *arguments)` on every rank of `plan`; the results in rank order.

    `function` must be importable (module level). A rank that dies takes the others down with it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        ranks = [context.Process(target=_rank, args=(rank, plan, port, folder, function, arguments)) for rank in range(plan.num_ranks)]
        for process in ranks:
            process.start()
        _wait(ranks)
        failures = sorted(Path(folder).glob("*.error"), key=lambda p: p.stat().st_mtime_ns)
        if failures:
            raise AssertionError(f"rank {failures[0].stem} failed first:\n{failures[0].read_text()}")
        codes = [process.exitcode for process in ranks]
        if any(codes):
            raise AssertionError(f"ranks ended with exit codes {codes}")
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(plan.num_ranks)]


def _wait(ranks: list[Any]) -> None:
    """Until all end; when one fails or the time is up, end the rest."""
    import time

    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(p.is_alive() for p in ranks):
        failed = any(p.exitcode not in (None, 0) for p in ranks)
        if failed or time.monotonic() > deadline:
            for process in ranks:
                process.join(2.0 if failed else 0.0)
                process.kill()
        for process in ranks:
            process.join(0.02)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, plan: TrainPlan, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(plan.num_ranks),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(plan.threads_per_rank),
    )
    try:
        from megatron_ext import device

        device.activate(plan.device, plan.threads_per_rank)
        from megatron_ext.distributed import process_groups

        with process_groups(plan) as groups:
            result = function(groups, *arguments)
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:  # noqa: BLE001 - whatever it was, the parent shows it
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
