"""Stages of tests/slurm/fault_recipe.py on a throw-away cluster: launched, struck by a fault, and compared with one that was not."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.json_lines import read_json_lines
from megatron_ext.launch.job_events import EVENTS, newest_attempt, newest_iteration
from megatron_ext.metrics import read_metrics
from megatron_ext.tracker import iteration_path
from tests.slurm import fault_recipe
from tests.slurm.sandbox import REPOSITORY, Job, Sandbox, call, until
from tests.small_checkpoints import data_digests

RECIPE = Path(fault_recipe.__file__)
PATIENCE_SECONDS = 240.0  # for what takes half a minute where nobody else works


@dataclass
class Ground:
    """A cluster, and a folder that all its nodes see, with the corpus made."""

    slurm: Sandbox
    runs: Path
    _launching: threading.Lock = field(default_factory=threading.Lock)  # two launches of one graph at a time are refused

    @staticmethod
    def prepare(slurm: Sandbox, runs: Path) -> Ground:
        """Make the corpus."""
        words = [sys.executable, "-m", "megatron_ext", "launch", f"{RECIPE}:corpus", "--local", "--runs", runs]
        done = call(words, PATIENCE_SECONDS, REPOSITORY)
        assert done.returncode == 0, done.stdout + done.stderr
        return Ground(slurm, runs)

    def stage(self, name: str) -> FaultyStage:
        """A stage by its name, launched or not."""
        return FaultyStage(self, self.runs / fault_recipe.GRAPH / name)

    def launch(self, name: str, cluster: str = "cluster", recipe: Path = RECIPE) -> str:
        """Submit one stage, as a user does; what the command prints."""
        words = ["launch", f"{RECIPE}:stages", "--cluster", f"{recipe}:{cluster}", "--runs", self.runs, "--from", name]
        with self._launching:
            done = self.slurm.run([sys.executable, "-m", "megatron_ext", *words], PATIENCE_SECONDS, REPOSITORY)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@dataclass
class FaultyStage:
    """One stage: its run folder, its job, and when what happened to it."""

    ground: Ground
    path: Path
    struck_at: float = 0.0  # monotonic seconds
    attempt_before: int = 0
    lost_seconds: float | None = None  # from the fault until it trained again; None: it never stopped

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def slurm(self) -> Sandbox:
        return self.ground.slurm

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def job_id(self) -> int:
        return int(json.loads((self.path / "job/submitted.json").read_text())["job_id"])

    @property
    def job(self) -> Job:
        return self.slurm.job(self.job_id)

    @property
    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.path.glob("job/slurm-*.log")))

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The supervisors' ledger."""
        return [event for event in read_json_lines(self.path / EVENTS) if kind in (None, event["event"])]

    @property
    def nodes(self) -> list[str]:
        """Of the newest start, the batch node first."""
        nodes: list[str] = self.events("start")[-1]["nodes"]
        return nodes

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl as it stands, every line; one that is being written is left out."""
        path = self.path / "metrics.jsonl"
        found = []
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Until it holds; what is known of the stage where it does not."""

        def known() -> str:
            return f"{self.name}: {what}; {self.job}\n{self.events()}\n{self.log[-5000:]}\n{self.slurm.log_end()}"

        until(condition, known, PATIENCE_SECONDS)

    # what a fault needs

    def until_half_way(self) -> None:
        """Until two checkpoints are published and training has gone on."""

        def is_there() -> bool:
            kinds = [line["kind"] for line in self.lines()]
            return kinds.count("checkpoint") >= 2 and kinds[-1] == "train"

        self.wait(is_there, "two checkpoints")

    def strike(self) -> None:
        """The fault comes now."""
        self.attempt_before, self.struck_at = newest_attempt(self.path), time.monotonic()

    def until_again(self) -> None:
        """Until a later attempt has finished a step."""

        def trains() -> bool:
            return any(line["kind"] == "train" and line["attempt"] > self.attempt_before for line in self.lines())

        self.wait(trains, "trains again")
        self.lost_seconds = time.monotonic() - self.struck_at

    def until_done(self) -> None:
        """Until its job has ended well."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.wait(lambda: self.job.state in final, "ended")
        assert self.job.state == "COMPLETED", f"{self.job}\n{self.events()}\n{self.log[-5000:]}"
        assert (self.path / "DONE").is_file()

    def rank_process(self, rank: int) -> int:
        """The process of a rank. The nodes' processes are this machine's too."""
        tail = f"-m\0megatron_ext\0train\0{self.path}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                words, values = (process / "cmdline").read_bytes(), (process / "environ").read_bytes().split(b"\0")
                if words.endswith(tail) and not words.startswith(b"srun") and b"SLURM_PROCID=%d" % rank in values:
                    return int(process.name)
        raise AssertionError(f"{self.name}: no process of rank {rank}")

    def signal_rank(self, rank: int, number: int) -> None:
        os.kill(self.rank_process(rank), number)

    # what must be true in the end

    def weights(self) -> dict[str, str]:
        """Digests of the last checkpoint's data, read from the disk: weights and moments of all ranks."""
        step = newest_iteration(self.path)
        assert step == fault_recipe.STEPS, step
        return data_digests(iteration_path(self.checkpoints, step))

    def losses(self) -> list[tuple[int, float]]:
        """Each step's number and loss, as readers of the metrics see them."""
        return [(record["step"], record["loss"]) for record in read_metrics(self.path / "metrics.jsonl", "train")]

    def differences(self, undisturbed: FaultyStage) -> list[str]:
        """How its end differs from that of a stage that nothing happened to."""
        found = []
        if self.weights() != undisturbed.weights():
            found.append("other weights or moments")
        if [step for step, _ in self.losses()] != list(range(1, fault_recipe.STEPS + 1)):
            found.append(f"steps of the metrics: {[step for step, _ in self.losses()]}")
        if self.losses() != undisturbed.losses():
            found.append("other losses")
        return found
