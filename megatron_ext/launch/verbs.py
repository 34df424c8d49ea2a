"""The verbs that take a run folder: which kind of stage each takes, and which function does its work."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_ext.errors import RunError
from megatron_ext.launch.ranks import become_ranks
from megatron_ext.runs import Run, open_run, read_done


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
    "train": Verb("train", "megatron_ext.training.stage:run_train", "train: every rank of the plan, on this machine"),
    "prepare": Verb("train", "megatron_ext.data.prepare:prepare", "build the data indices of a train run ahead of it"),
    "report": Verb("report", "megatron_ext.reports.page:run_report", "draw figures and a page from run folders", repeats=True),
}
STAGE_KINDS = tuple(dict.fromkeys(verb.kind for verb in RUN_VERBS.values()))


def open_for(name: str, folder: Path) -> Run | None:
    """Open a run folder for a verb, in the processes its plan asks for; None, and a word about it, where the run is done."""
    verb, run = RUN_VERBS[name], open_run(folder)
    if run.stage.kind != verb.kind:
        raise RunError(
            f"{run.path}: stage '{run.name}' is of kind '{run.stage.kind}', and {name} takes '{verb.kind}'; "
            f"use: megatron-ext {run.stage.kind} {folder}"
        )
    if run.is_done() and not verb.repeats:
        print(f"{run.path}: stage '{run.name}' was finished at {read_done(run)['finished_at']}; nothing to do")
        return None
    become_ranks(run, num_ranks=None if name == verb.kind else 1)
    return run
