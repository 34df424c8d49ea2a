"""Which checkpoint a stage goes on from: the newest of its own that is whole.

Before a start all ranks hash the files together, a share each. A damaged checkpoint of the run itself
may be passed over (plan.on_damaged_checkpoint=fall_back): the steps since the older one are done again
with the same data, so nothing but time is lost. It is set aside, and the attempt records from which
checkpoint it fell back to which, and why. A damaged parent is never passed over: its child would be another one.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_ext.attempts import FALLBACK, Attempt
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.verify import verify_shared
from megatron_ext.distributed import Groups, broadcast_object
from megatron_ext.errors import DamagedCheckpointError
from megatron_ext.provenance import read_manifest
from megatron_ext.runs import Run, atomic_write, read_json, write_json


def newest_whole(run: Run, groups: Groups, attempt: Attempt) -> Path | None:
    """The checkpoint that a run resumes from, or None where it has published none; every rank calls this.

    Raises `DamagedCheckpointError` where none is whole, or where the newest is not and the plan says to stop.
    """
    found: list[str] = []
    damaged: list[Path] = []
    for iteration in broadcast_object(_candidates(run.checkpoints_path, found) if groups.rank == 0 else None):
        path = folders.iteration_path(run.checkpoints_path, iteration)
        problems = _problems(path, groups)
        if not problems:
            reasons = broadcast_object(found)
            if reasons:
                _fall_back(run, groups, attempt, path, damaged, reasons)
            return path
        found += problems
        damaged.append(path)
    reasons = broadcast_object(found)
    if reasons:
        raise DamagedCheckpointError(
            f"{run.checkpoints_path}: no checkpoint of stage '{run.name}' is whole:\n  " + "\n  ".join(reasons) + "\n"
            f"Bring one back from a copy, or delete {run.path} to start the stage over"
        )
    return None


def check_whole(path: Path, groups: Groups) -> None:
    """`DamagedCheckpointError` with all that is wrong with a checkpoint; every rank calls this."""
    problems = _problems(path, groups)
    if problems:
        way_out = "Bring it back from a copy, or remove its run folder and launch the graph again, which makes it anew"
        raise DamagedCheckpointError("\n  ".join([f"{path}: is damaged:", *problems]) + f"\n{way_out}")


def _candidates(folder: Path, found: list[str]) -> list[int]:
    """Iterations to try: what the tracker names, then older ones; without a good tracker all, newest first."""
    there = folders.published(folder)[::-1]
    try:
        tracked = folders.latest(folder)
    except DamagedCheckpointError as problem:
        found.append(str(problem))
        tracked = None
    usable = [i for i in there if (tracked is None or i <= tracked) and not _is_thinned(folders.iteration_path(folder, i))]
    if there and not usable:  # a start from nothing would write over them
        found.append(f"{folder}: its checkpoints hold weights without optimizer state; a new stage can start from them with Weights(...)")
    return usable


def _is_thinned(path: Path) -> bool:
    """Whether it holds weights alone, which no run can go on from."""
    try:
        return read_manifest(path).optimizer_layout == "none"
    except DamagedCheckpointError:
        return False  # it is tried, and said to be damaged


def _problems(path: Path, groups: Groups) -> list[str]:
    """What is wrong with a checkpoint's files, each rank having read its share."""
    try:
        own = verify_shared(path, read_manifest(path), groups.rank, groups.plan.num_ranks)
    except DamagedCheckpointError as problem:
        own = [str(problem)]
    shares: list[list[str]] = [[] for _ in range(groups.plan.num_ranks)]
    dist.all_gather_object(shares, own)
    return list(dict.fromkeys(problem for share in shares for problem in share))


def _fall_back(run: Run, groups: Groups, attempt: Attempt, path: Path, damaged: list[Path], reasons: list[str]) -> None:
    why = "\n  ".join(reasons)
    if run.stage.plan.on_damaged_checkpoint == "stop":
        raise DamagedCheckpointError(
            f"{run.checkpoints_path}: the newest checkpoint of stage '{run.name}' is damaged:\n  {why}\n{path.name} is whole: set "
            f"{run.name}.plan.on_damaged_checkpoint=fall_back to go on from it, or bring the newer one back from a copy"
        )
    if groups.rank == 0:
        attempt.check_owner()
        aside = [folders.set_aside_damaged(one).name for one in damaged]
        atomic_write(run.checkpoints_path / folders.TRACKER, f"{read_manifest(path).iteration}\n")
        record = {"from": damaged[0].name if damaged else None, "to": path.name, "set_aside": aside, "reason": why}
        write_json(attempt.path / FALLBACK, record)
        print(f"WARNING: {fall_back_words(attempt)}", flush=True)
    dist.barrier()


def fall_back_words(attempt: Attempt) -> str:
    """What an attempt fell back to and why; '' where it did not."""
    path = attempt.path / FALLBACK
    if not path.is_file():
        return ""
    record = read_json(path, "how an attempt fell back")
    aside = f" (kept as {', '.join(record['set_aside'])})" if record["set_aside"] else ""
    return f"fell back to {record['to']}: {record['reason']}{aside}"
