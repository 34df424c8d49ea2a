"""A rank that keeps what ranks promise a supervisor, and does on order what ranks should not.

    python obedient_rank.py megatron_ext RUN

stands where a job has `python -m megatron_ext train RUN`; with the name of another module of ours it becomes that module, so that
the check of the nodes is the real one.

RUN/orders.json: steps (of the stage), save_every, and `fault`: {"rank", "step", "kind", "start"}; without a start, at each; without a
rank, all. A start after the first does `steps_later` steps, where that is given. Ranks go from step to step together, through files,
as through a collective: where one stops, all wait.
"""

from __future__ import annotations

import faulthandler
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

RUN = Path(sys.argv[2])
RANK, NUM_RANKS = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
START = os.environ.get("SLURM_RESTART_COUNT") or "0"
MEETING = RUN / "meetings" / f"{os.environ['SLURM_JOB_ID']}.{START}"
asked: list[int] = []


def attempt_folder() -> Path:
    """Rank 0 makes the attempt, the others wait for it."""
    if RANK == 0:
        attempts = RUN / "attempts"
        attempts.mkdir(exist_ok=True)
        folder = attempts / str(1 + max([int(path.name) for path in attempts.iterdir()], default=0))
        folder.mkdir()
        MEETING.mkdir(parents=True, exist_ok=True)
        (MEETING / "attempt").write_text(str(folder))
    while not (MEETING / "attempt").is_file() or not (MEETING / "attempt").read_text():
        time.sleep(0.02)
    return Path((MEETING / "attempt").read_text())


def meet(step: int) -> bool:
    """Wait for every rank at a step; whether one of them was asked to stop before it."""
    (MEETING / f"{step}.{RANK}.aside").write_text("stop" if asked else "")
    (MEETING / f"{step}.{RANK}.aside").rename(MEETING / f"{step}.{RANK}")
    words = []
    for rank in range(NUM_RANKS):
        while not (MEETING / f"{step}.{rank}").is_file():
            time.sleep(0.01)
        words.append((MEETING / f"{step}.{rank}").read_text())
    return "stop" in words


def misbehave(kind: str) -> None:
    """What a rank should not do."""
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "sleep":
        time.sleep(10_000)
    elif kind == "raise":
        raise ValueError("a rank's own words, and " + os.environ.get("CANARY", "no canary"))


def save(step: int) -> None:
    """A checkpoint, its manifest last."""
    folder = RUN / "checkpoints" / f"iter_{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")


def work(attempt: Path, orders: dict[str, Any]) -> int:
    """Steps until the stage is done or somebody asked to stop; the exit code."""
    saved = [int(path.name[5:]) for path in (RUN / "checkpoints").iterdir()] if (RUN / "checkpoints").is_dir() else []
    begin = max(saved, default=0)
    last = begin + orders["steps_later"] if START != "0" and "steps_later" in orders else orders["steps"]
    for step in range(begin + 1, last + 1):
        fault = orders.get("fault") or {}
        if fault.get("step") == step and fault.get("rank", RANK) == RANK and fault.get("start", START) == START:
            misbehave(fault["kind"])
        stop = meet(step)
        time.sleep(0.05)
        if RANK == 0:
            (attempt / "pulse").touch()
            if stop or step % orders["save_every"] == 0 or step == last:
                save(step)
        if stop:
            print("saved", step, "asked by", asked, flush=True)
            return 75
    if RANK == 0:
        (RUN / "DONE").write_text("{}")
    return 0


def main() -> int:
    """Work, and leave a word of a failure."""
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    attempt = attempt_folder()
    try:
        return work(attempt, json.loads((RUN / "orders.json").read_text()))
    except ValueError:
        (attempt / f"rank_{RANK:05d}.error.txt").write_text(traceback.format_exc())
        traceback.print_exc()
        return 1


if sys.argv[1] == "megatron_ext":
    sys.exit(main())
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
runpy.run_module(sys.argv[0], run_name="__main__")
