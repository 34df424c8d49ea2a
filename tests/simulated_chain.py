"""A long stage's life under Slurm on a clock of its own: requeues, faults, saves cut short; written by the real writers.

Nothing is trained. What a step, a save and a start take is fixed, so the simulation knows where every second went.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_ext.launch.job_events import Ledger, Start
from megatron_ext.metrics import MetricsWriter
from megatron_ext.runs import Run, write_json

STEP, VALIDATION, STALL, WRITE = 6.0, 30.0, 12.0, 90.0  # seconds of a step, of held-out losses, of a save's stall, of writing it all
HANG, SLURM_NOTICES, REQUEUE_DELAY = 1800.0, 300.0, 121.0
BETWEEN_FAULTS = 4500.0  # mean seconds in the loop from one fault to the next
NODES = 4
FIRST_DAY = 1_800_000_000.0
# What may end a start, and how often. `never` ends one before its loop.
KINDS = {"lost": 3, "rank": 4, "hang": 1, "preempted": 2}
NEVER = 0.12  # share of starts that never reach a step


class Fault(Exception):
    """The time of a fault has come."""


class Writer(MetricsWriter):
    """The run's own writer, by the simulation's clock."""

    def __init__(self, life: Life, attempt: int, from_step: int) -> None:
        self._life = life
        super().__init__(life.run.metrics_path, attempt, from_step)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        super().write(kind, step, {"at": self._life.now, **values})


@dataclass
class Life:
    """One stage from its submission to its end, and the truth about its seconds."""

    run: Run
    rng: random.Random
    requeues: int
    now: float = FIRST_DAY
    truth: Counter[str] = field(default_factory=Counter)
    standing: dict[int, float] = field(default_factory=dict)  # seconds in the loop of each finished step; 0 is before the first
    published: int = 0
    under_way: tuple[int, float, float] | None = None  # an asynchronous save: step, begun at, stall
    fault_at: float = math.inf  # of this start
    stop_at: float = math.inf  # Slurm asks it to stop: no fault, nothing is lost
    failures: int = 0
    looped: float = 0.0  # seconds in the loop, saves included
    events: list[str] = field(default_factory=list)

    def spend(self, part: str, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.truth[part] += seconds

    def live(self) -> None:
        """Every start, from the first to the one that is not disturbed."""
        submitted, eligible = self.now, self.now + 3600.0  # a parent is still at work
        self.now = eligible
        for restart in range(self.requeues + 1):
            waits_from = eligible if restart == 0 else self.now
            started = math.ceil(eligible + self.rng.expovariate(1 / 600))
            self.spend("queued", started - waits_from)
            asked = {"submitted_at": submitted, "eligible_at": eligible, "started_at": started, "ends_at": started + 86_400.0}
            self.start(restart, asked)
            submitted = math.floor(self.now)
            eligible = submitted + REQUEUE_DELAY

    def start(self, restart: int, asked: dict[str, float]) -> None:
        """One start of the job, to its end."""
        nodes = [f"n{i}" for i in range(NODES)]
        ledger, last = Ledger(self.run.path, Start(7, restart), nodes), restart == self.requeues
        kind = "" if last else self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        self.events.append(kind or "done")
        self.spend("starting", 2.0)
        ledger.append("start", at=self.now, iteration=self.published or None, **asked)
        if not last and self.rng.random() < NEVER:
            self.events[-1] = "never"
            self.spend("starting", 45.0)
            self.end(ledger, "rank", "requeue")
            return
        self.spend("starting", 1.0)
        ledger.append("ranks", at=self.now)
        self.attempt(restart, kind, ledger)

    def attempt(self, restart: int, kind: str, ledger: Ledger) -> None:
        """One attempt of the stage, up to a fault of this kind."""
        number = 1 + sum(event != "never" for event in self.events[:-1])
        folder = self.run.path / "attempts" / str(number)
        folder.mkdir(parents=True)
        self.spend("starting", 10.0)
        begun = {"started_at": clock(self.now), "job_id": "7", "restart_count": restart, "plan": {"nodes": NODES}}
        write_json(folder / "plan.json", begun)
        self.spend("starting", self.rng.uniform(60.0, 200.0))
        disturbed_at = self.now + self.rng.expovariate(1 / BETWEEN_FAULTS) if kind else math.inf
        self.fault_at, self.stop_at = (math.inf, disturbed_at) if kind == "preempted" else (disturbed_at, math.inf)
        self.forget()
        loop_from = self.now
        writer = Writer(self, number, self.published)
        reason = self.train(writer)
        writer.close()
        touch(folder / "pulse", self.pulsed)
        self.looped += self.pulsed - loop_from
        self.after(kind, reason, folder, ledger)

    def forget(self) -> None:
        """What follows the newest checkpoint is done again; without one, the held-out losses before the first step too."""
        for step in [s for s in self.standing if s > self.published or not self.published]:
            self.truth["recomputed"] += self.standing.pop(step)

    def train(self, writer: Writer) -> str:
        """The loop; how the attempt ended, or '' where a fault cut it short."""
        stage, step = self.run.stage, self.published
        self.pulsed, self.under_way = self.now, None
        try:
            if step == 0:
                self.validate(writer, step)
            while step < stage.num_steps:
                asked = self.now + STEP >= self.stop_at
                self.work(step + 1, STEP)
                step += 1
                if step in (1, stage.num_steps) or step % stage.plan.log_every_steps == 0:
                    writer.write("train", step, {"tokens": step * stage.budget.tokens_per_batch, "step_seconds": STEP})
                if step % stage.plan.validate_every_steps == 0:
                    self.validate(writer, step)
                if asked or step % stage.plan.save_every_steps == 0:
                    if self.under_way:  # the loop waits for the save before, and no record says so
                        self.work(step, max(0.0, self.under_way[1] + STALL + WRITE - self.now))
                        self.settle(writer, wait=False)
                    self.save(step)
                self.settle(writer, wait=asked or step == stage.num_steps or not stage.plan.asynchronous_saves)
                if asked:
                    return "interrupted"
        except Fault:
            if self.under_way:  # of a save that came to no end there is no record: what training waited was thrown away
                self.truth["saving"] -= self.under_way[2]
                self.truth["recomputed"] += self.under_way[2]
                self.events[-1] += " in a save"
            return ""
        return "done"

    def work(self, step: int, seconds: float) -> None:
        """Time in the loop that belongs to a step; a fault within it is idle time."""
        if self.now + seconds > self.fault_at:
            self.spend("idle", self.fault_at - self.now)
            raise Fault
        self.now += seconds
        self.standing[step] = self.standing.get(step, 0.0) + seconds
        self.pulsed = self.now

    def validate(self, writer: Writer, step: int) -> None:
        self.work(step, VALIDATION)
        writer.write("validation", step, {"source": "web", "loss": 1.0, "tokens": step * self.run.stage.budget.tokens_per_batch})

    def save(self, step: int) -> None:
        """Begin a save: training waits for the copy, or for all of it; a fault in the wait is idle time."""
        begun, stall = self.now, STALL if self.run.stage.plan.asynchronous_saves else STALL + WRITE
        if self.now + stall > self.fault_at:
            self.spend("idle", self.fault_at - self.now)
            self.events[-1] += " in a save"
            raise Fault
        self.spend("saving", stall)
        self.pulsed = self.now
        self.under_way = (step, begun, stall)

    def settle(self, writer: Writer, wait: bool) -> None:
        """Hear of the save under way, once all of it is written, or `wait` for that (only as nothing else is left to do)."""
        if self.under_way is None:
            return
        step, begun, stall = self.under_way
        over = begun + STALL + WRITE
        if self.now < over and wait:
            self.spend("saving", over - self.now)
        if self.now >= over:
            self.under_way, self.published, self.pulsed = None, step, self.now
            writer.write("checkpoint", step, {"seconds": self.now - begun, "stall_seconds": stall, "bytes": 1})

    def after(self, kind: str, reason: str, folder: Path, ledger: Ledger) -> None:
        """From the end of the loop to that of the job."""
        if reason:
            self.spend("idle", 5.0)
            write_json(folder / "exit.json", {"reason": reason, "at": clock(self.now)})
            self.end(ledger, "", "done" if reason == "done" else "requeue")
            return
        self.failures += 1
        if kind == "lost":  # no word; Slurm holds the nodes until it notices
            self.spend("idle", math.ceil(self.now + SLURM_NOTICES) - self.now)
            return
        self.spend("idle", HANG + 5.0 if kind == "hang" else 10.0)
        self.end(ledger, kind, "requeue")

    def end(self, ledger: Ledger, cause: str, decision: str) -> None:
        """The supervisor's last words."""
        if cause:
            ledger.append("fault", at=self.now, cause=cause, words="")
        ledger.append("end", at=self.now, exit_code=0, decision=decision, reason="", iteration=self.published or None)

    def parts(self) -> dict[str, float]:
        """The truth about every second so far."""
        return {**self.truth, "productive": sum(self.standing.values())}


def clock(seconds: float) -> str:
    """A time as attempts write it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S%z")


def touch(path: Path, seconds: float) -> None:
    """A file that was last touched at this time."""
    path.touch()
    os.utime(path, (seconds, seconds))
