"""What the tree says of a run of reinforcement learning, read from its metrics alone: rollout steps, updates, the cap, accuracies."""

from __future__ import annotations

from typing import Any

from megatron_ext.metrics import read_metrics
from megatron_ext.runs import Run


def step_words(run: Run) -> str:
    """'step 12 of 200 (24 updates), cap 2,048'."""
    records = read_metrics(run.metrics_path, "rl")
    last: dict[str, Any] = records[-1] if records else {"step": 0, "updates": 0}
    cap = f", cap {last['cap_tokens']:,}" if "cap_tokens" in last else ""
    return f"step {last['step']:,} of {run.stage.steps:,} ({last['updates']:,} updates){cap}"


def accuracy_words(run: Run) -> str:
    """'math500 0.104 -> 0.652, gsm8k 0.31': of each held-out set the first accuracy and the last; '' before the first validation."""
    found: dict[str, list[float]] = {}
    for record in read_metrics(run.metrics_path, "rl_validation"):
        found.setdefault(record["set"], []).append(record["accuracy"])
    return ", ".join(f"{name} {' -> '.join(f'{value:.3f}' for value in _ends(values))}" for name, values in found.items())


def _ends(values: list[float]) -> list[float]:
    return values if len(values) == 1 else [values[0], values[-1]]
