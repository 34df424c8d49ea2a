"""`megatron-ext`: parses, loads a recipe or a run folder, calls one function.

Imports stand inside the verb that needs them, so that looking (help, plan, tree, dry runs) never loads torch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext import __version__
from megatron_ext.errors import LaunchError, MegatronExtError


def launch(arguments: argparse.Namespace) -> None:
    """Run a recipe's stages here, or show what would run."""
    graph, cluster = _graph(arguments)
    if arguments.dry_run:
        from megatron_ext.launch.plan import plan_text, resolved

        print(json.dumps(resolved(graph), indent=2), plan_text(graph, cluster), sep="\n\n")
    elif arguments.local:
        from megatron_ext.launch.local import launch_local

        launch_local(graph, arguments.runs, cluster)
    else:
        raise LaunchError("launch: this version submits to no scheduler; add --local to run here, or --dry-run to see what would run")


def plan(arguments: argparse.Namespace) -> None:
    """Print what a recipe costs."""
    from megatron_ext.launch.plan import plan_rows, plan_text

    graph, cluster = _graph(arguments)
    print(json.dumps(plan_rows(graph, cluster), indent=2) if arguments.json else plan_text(graph, cluster))


def tree(arguments: argparse.Namespace) -> None:
    """Print the lineage of the run folders under a folder."""
    from megatron_ext.launch.tree import tree_text

    print(tree_text(arguments.runs))


def work(arguments: argparse.Namespace) -> None:
    """Do what a run folder's recipe says."""
    from megatron_ext.launch.verbs import RUN_VERBS, open_for

    run = open_for(arguments.verb, arguments.run)
    if run is not None:
        module, function = RUN_VERBS[arguments.verb].function.split(":")
        getattr(importlib.import_module(module), function)(run)


def _graph(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from megatron_ext.launch.graph import with_overrides
    from megatron_ext.launch.load import load_cluster, load_recipe

    cluster = load_cluster(arguments.cluster) if arguments.cluster else None
    return with_overrides(load_recipe(arguments.recipe), arguments.overrides), cluster


def _parser() -> argparse.ArgumentParser:
    from megatron_ext.launch.verbs import RUN_VERBS

    parser = argparse.ArgumentParser(
        prog="megatron-ext", description="OctoThinker's mid-training, from raw text to report, on Megatron-Core."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, call: Any, text: str, usage: str) -> argparse.ArgumentParser:
        verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, usage=f"megatron-ext {name} {usage}")
        verb.set_defaults(call=call)
        return verb

    for name, call, text in (("launch", launch, "run a recipe's stages, or show them"), ("plan", plan, "what a recipe costs")):
        verb = add(name, call, text, "RECIPE [stage.key=value ...] [options]")
        verb.add_argument("recipe", metavar="RECIPE", help="octothinker:llama_3b, or ./my.py:run; overrides follow as stage.key=value")
        verb.add_argument("--cluster", metavar="C", help="h100, or ./site.py:h100")
        if name == "launch":
            verb.add_argument("--local", action="store_true", help="run every stage on this machine; finished ones are skipped")
            verb.add_argument("--dry-run", action="store_true", help="print the resolved recipe, its edges and its plan; write nothing")
            verb.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where run folders go (default: runs)")
        else:
            verb.add_argument("--json", action="store_true", help="as JSON")
    add("tree", tree, "lineage, states, tokens and checkpoints of run folders", "RUNS").add_argument("runs", type=Path, metavar="RUNS")
    for name, row in RUN_VERBS.items():
        add(name, work, row.text, "RUN").add_argument("run", type=Path, metavar="RUN", help="a run folder")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run one command: 0 where all went well, 2 with a message where the user can put it right."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    arguments.overrides = rest
    if rest and ("recipe" not in arguments or any(word.startswith("-") for word in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        arguments.call(arguments)
    except MegatronExtError as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{rank}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
