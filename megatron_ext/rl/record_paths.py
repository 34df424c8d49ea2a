"""Where the rollouts of a run are recorded, and of which steps they are kept; needs no torch."""

from __future__ import annotations

from pathlib import Path

ROLLOUTS = "rollouts"


def record_path(run_path: Path, step: int) -> Path:
    """Where the rollouts of a step stand."""
    return run_path / ROLLOUTS / f"step_{step:07d}.jsonl.gz"


def recorded_steps(run_path: Path) -> list[int]:
    """Steps whose rollouts are kept, ascending."""
    found = (run_path / ROLLOUTS).glob("step_*.jsonl.gz")
    return sorted(int(path.name.removeprefix("step_").removesuffix(".jsonl.gz")) for path in found)


def not_kept_words(run_path: Path, step: int) -> str:
    """For a message: that a step's rollouts are not kept, and which are."""
    steps = recorded_steps(run_path)
    kept = f"kept are {len(steps)} steps from {steps[0]} to {steps[-1]}" if steps else "none are"
    return f"{record_path(run_path, step)}: the rollouts of step {step} are not kept; {kept}"
