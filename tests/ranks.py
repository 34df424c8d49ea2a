"""Run a function on several gloo ranks, each a process, and show the first failing rank's traceback.

The processes are forked from a server that has imported torch and Megatron-Core once.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.config.plan import TrainPlan

TIMEOUT_SECONDS = 240
FIRST_PORT, NUM_PORTS = 10_000, 1_000
PRELOADED = ["megatron_ext.training.stage", "megatron_ext.cpu_megatron", "tests.small_corpus"]

_ports = itertools.count(os.getpid())


def run(function: Callable[..., Any], plan: TrainPlan, *arguments: Any) -> list[Any]:
    """Call `function(groups, *arguments)` on every rank of `plan`; the results in rank order.

    `function` must be importable (module level). A rank that dies takes the others down with it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
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


def free_port() -> int:
    """A port that nothing listens at and nobody else takes before the ranks do.

    Linux hands out those from 32768 by itself, so one of them may be gone again; test processes side by side have a thousand each.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(NUM_PORTS):
        port = FIRST_PORT + worker * NUM_PORTS + next(_ports) % NUM_PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port
    raise RuntimeError(f"none of {NUM_PORTS} ports is free")


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
