"""`megatron-ext`: parses, loads a recipe or a run folder, calls one function.

Imports stand inside the verb that needs them, so that looking (help, plan, tree, dry runs) never loads torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from megatron_ext.errors import MegatronExtError


def why(arguments: argparse.Namespace) -> None:
    """Compute a training step again, on the ranks of its run's plan."""
    from megatron_ext.launch.ranks import become_ranks, is_a_rank
    from megatron_ext.training.recorded import find_step, training_run

    run, step, as_json = training_run(arguments.run), arguments.step, arguments.json
    if not is_a_rank():
        find_step(run.path, step)  # what is refused starts no ranks; these let one of them look, for all
    become_ranks(run, words=["why", str(run.path), "--step", str(step), *(["--json"] if as_json else [])])
    importlib.import_module("megatron_ext.training.why").run_why(run, step, as_json)


def replay(arguments: argparse.Namespace) -> None:
    """Compute a reinforcement learning step again from its record, on the ranks of its run's plan."""
    from megatron_ext.launch.ranks import become_ranks
    from megatron_ext.launch.verbs import run_of_kind
    from megatron_ext.rl.replay_request import check_request

    run, step, changes, as_json = run_of_kind("replay", "rl", arguments.run), arguments.step, arguments.changes, arguments.json
    check_request(run, step, changes)  # what is refused loads no torch and starts no ranks
    asked = [word for change in changes for word in ("--set", change)]
    become_ranks(run, words=["replay", str(run.path), "--step", str(step), *asked, *(["--json"] if as_json else [])])
    importlib.import_module("megatron_ext.rl.replay").run_replay(run, step, changes, as_json)


def work(arguments: argparse.Namespace) -> None:
    """Do what a run folder's recipe says."""
    from megatron_ext.launch.commands import permissions
    from megatron_ext.launch.verbs import RUN_VERBS, open_for

    run = open_for(arguments.verb, arguments.run, permissions(arguments))
    if run is not None:
        _function(RUN_VERBS[arguments.verb].function)(run)


def tokenize_part(arguments: argparse.Namespace) -> None:
    """Do one part of a tokenize run's slices."""
    from megatron_ext.launch.commands import permissions
    from megatron_ext.launch.verbs import open_for

    run = open_for("tokenize", arguments.run, permissions(arguments))
    if run is not None:
        importlib.import_module("megatron_ext.data.tokenize").run_part(run, arguments.part, arguments.parts)


CALLS: dict[str, Callable[[argparse.Namespace], None]] = {"why": why, "replay": replay, "tokenize-part": tokenize_part}


def call(arguments: argparse.Namespace) -> None:
    """Call what a verb stands for; a verb of neither table does the work of a run folder."""
    from megatron_ext.launch.verbs import FUNCTIONS

    if arguments.verb not in FUNCTIONS:
        CALLS.get(arguments.verb, work)(arguments)
        return
    name, takes = FUNCTIONS[arguments.verb]
    _function(name)(**{key: getattr(arguments, key) for key in takes})


def _function(name: str) -> Callable[..., None]:
    module, _, function = name.partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), function)
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run one command: 0 where all went well, 2 with a message where the user can put it right.

    A stage that was asked to stop raises `Interrupted`, which ends the process with 75.
    """
    from megatron_ext.launch.commands import parse

    arguments = parse(words)
    try:
        call(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except MegatronExtError as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{rank}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
