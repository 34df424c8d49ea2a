"""Verbs and the functions that do their work: those that take a run folder with its kind of stage, and those that take other things."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_ext.attempts import RECORD
from megatron_ext.errors import RunError
from megatron_ext.launch.ranks import NO_PERMISSIONS, Permissions, become_ranks
from megatron_ext.runs import ATTEMPTS, PARTS, Run, attempt_numbers, open_run, read_done, read_json
from megatron_ext.snapshot import check_own_snapshot, code_hash, snapshot_command, snapshot_path


class Verb(NamedTuple):
    """One row of the table."""

    kind: str  # of stage
    function: str  # module:function of an opened run
    text: str  # for --help
    repeats: bool = False  # may be done again when it is done


RUN_VERBS = {
    "text": Verb("text", "megatron_ext.data.demo_text:run_text", "write the demo's text: real prose, generated problems"),
    "tokenizer": Verb("tokenizer", "megatron_ext.data.train_tokenizer:run_tokenizer", "train the demo's tokenizer"),
    "tokenize": Verb("tokenize", "megatron_ext.data.tokenize:run_tokenize", "turn text into Megatron shards"),
    "convert": Verb("convert", "megatron_ext.conversion.stage:run_convert", "do a Convert stage's work (by hand: convert hf-to-megatron)"),
    "train": Verb("train", "megatron_ext.training.stage:run_train", "train: every rank of the plan, on this machine"),
    "prepare": Verb("train", "megatron_ext.data.prepare:prepare", "build the data indices of a train run ahead of it"),
    "rl": Verb("rl", "megatron_ext.rl.stage:run_rl", "reinforcement learning: every rank of the plan, on this machine"),
    "report": Verb("report", "megatron_ext.reports.page:run_report", "draw figures and a page from run folders", repeats=True),
}
FUNCTIONS = {  # verb -> module:function, and the arguments that it takes
    "launch": (
        "megatron_ext.launch.launching:launch_command",
        ("recipe", "overrides", "cluster", "runs", "local", "dry_run", "first", "doctor", "other_code", "take_over"),
    ),
    "plan": ("megatron_ext.launch.plan:plan_command", ("recipe", "overrides", "cluster", "as_json")),
    "doctor": ("megatron_ext.launch.doctor:doctor_command", ("recipe", "overrides", "cluster", "runs", "deep", "rank", "stage")),
    "tree": ("megatron_ext.launch.tree:tree_command", ("runs",)),
    "status": ("megatron_ext.launch.status:status_command", ("runs", "watch")),
    "cancel": ("megatron_ext.launch.cancel:cancel_command", ("runs",)),
    "logs": ("megatron_ext.launch.logs:logs_command", ("run", "first_failure", "follow")),
    "diff": ("megatron_ext.launch.diff:diff_command", ("a", "b", "code", "as_json")),
    "verify": ("megatron_ext.checkpoint.verify:verify_command", ("paths", "jobs")),
    "gc": ("megatron_ext.checkpoint.gc:gc_command", ("runs", "dry_run", "thin")),
    "convert hf-to-megatron": (
        "megatron_ext.conversion.to_megatron:hf_to_megatron",
        ("source", "target", "revision", "allow_pickle", "resize_vocabulary"),
    ),
    "convert megatron-to-hf": ("megatron_ext.conversion.to_hugging_face:megatron_to_hf", ("checkpoint", "target", "dtype", "tokenizer")),
    "generate": (
        "megatron_ext.generation.command:generate_command",
        ("checkpoint", "prompt", "template", "max_tokens", "temperature", "top_p", "top_k", "samples", "seed", "device", "bos"),
    ),
    "convert check": ("megatron_ext.conversion.check:check_command", ("checkpoint", "folder", "prompt", "tensors_only")),
}


def open_for(name: str, folder: Path, permissions: Permissions = NO_PERMISSIONS) -> Run | None:
    """Open a run folder for a verb, in the processes its plan asks for; None, and a word about it, where the run is done.

    `RunError` where the folder holds another kind of stage, or one that other code began.
    """
    verb, run = RUN_VERBS[name], open_run(folder)
    if run.stage.kind != verb.kind:
        raise RunError(
            f"{run.path}: stage '{run.name}' is of kind '{run.stage.kind}', and {name} takes '{verb.kind}'; "
            f"use: megatron-ext {run.stage.kind} {folder}"
        )
    if run.is_done() and not verb.repeats:
        print(f"{run.path}: stage '{run.name}' was finished at {read_done(run)['finished_at']}; nothing to do")
        return None
    check_own_snapshot()
    if not permissions.other_code:
        check_code(run)
    become_ranks(run, None if name == verb.kind else 1, permissions)
    return run


def run_of_kind(verb: str, kind: str, folder: Path) -> Run:
    """Open a run folder for a verb that looks into one kind of stage; `RunError` where it holds another kind."""
    run = open_run(folder)
    if run.stage.kind != kind:
        raise RunError(f"{run.path}: stage '{run.name}' is of kind '{run.stage.kind}', and {verb} takes '{kind}'; name a run of that kind")
    return run


def attempt_codes(run: Run) -> dict[int, str]:
    """Attempt -> hash of the code that it ran, for the attempts that recorded one."""
    paths = {number: run.path / ATTEMPTS / str(number) / RECORD for number in attempt_numbers(run.path)}
    records = {number: read_json(path, "how an attempt began") for number, path in paths.items() if path.is_file()}
    return {number: str(record["code_hash"]) for number, record in records.items() if "code_hash" in record}


def parts_codes(run: Run) -> dict[int, str]:
    """Number 0 -> hash of the code that the newest part ran, which worked ahead of all attempts; empty where there was none."""
    path = run.path / PARTS
    return {0: str(read_json(path, "which code parts of a stage ran")["code_hash"])} if path.is_file() else {}


def check_code(run: Run, here: str | None = None) -> None:
    """`RunError` where a stage would go on with other code (hash `here`, default: this process's) than its newest attempt ran.

    What is done anew as a whole, a report, may.
    """
    codes = {**parts_codes(run), **attempt_codes(run)}
    if not codes or RUN_VERBS[run.stage.kind].repeats:
        return
    newest = max(codes)
    old, here = codes[newest], here or code_hash()
    if old == here:
        return
    snapshot = snapshot_path(run.path.parent.parent, old)
    way_back = (
        f"run the old code, whose snapshot is {snapshot}:\n  {snapshot_command(snapshot, [run.stage.kind, str(run.path)])}"
        if snapshot.is_dir()
        else f"bring the old code back yourself (there is no snapshot of it at {snapshot})"
    )
    what = f"attempt {newest}" if newest else "a part"
    raise RunError(
        f"{run.path}: {what} of stage '{run.name}' ran code {old[:12]}, and this is code {here[:12]}: the rest of its numbers "
        f"could differ from the first part. Add --other-code to go on with this code (each attempt records its own; tree, diff and "
        f"report show it), or {way_back}"
    )
