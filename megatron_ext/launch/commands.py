"""The words of the command line: every verb, its arguments and its one line of help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from megatron_ext import __version__
from megatron_ext.config.base import nearest
from megatron_ext.config.plan import Device
from megatron_ext.config.tasks import TemplateName
from megatron_ext.launch.ranks import Permissions
from megatron_ext.launch.verbs import RUN_VERBS

TEMPLATES = ("none", *get_args(TemplateName))
DEFAULT_PROMPT = "The sum of the first ten odd numbers is"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """What a command's words (None: this process's) ask for; `overrides` holds a recipe's `stage.key=value` words."""
    given = list(sys.argv[1:] if words is None else words)
    parser, verbs = command_parser()
    if " ".join(given[:2]) in verbs:  # a verb of two words
        given[:2] = [" ".join(given[:2])]
    elif given[:1] == ["convert"] and len(given) > 2 and not given[1].startswith("-") and not Path(given[1]).exists():
        parser.error(f"no verb 'convert {given[1]}'{nearest(' '.join(given[:2]), [verb for verb in verbs if ' ' in verb])}")
    arguments, rest = parser.parse_known_args(given)
    arguments.overrides = rest
    if arguments.verb == "generate":
        arguments.template = None if arguments.template == "none" else arguments.template
    if rest and ("recipe" not in arguments or any(word.startswith("-") for word in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return arguments


def command_parser() -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The whole parser, and the verbs that it knows. What it does not know of `launch` and `plan` are overrides."""
    parser = argparse.ArgumentParser(
        prog="megatron-ext", description="OctoThinker's mid-training and reinforcement learning, from raw text to report, on Megatron-Core."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_recipe_verbs(verbs)
    _add_looking_verbs(verbs)
    _add_checkpoint_verbs(verbs)
    _add_generate(verbs)
    _add_replay(verbs)
    _add_conversion_verbs(verbs)
    for name, row in RUN_VERBS.items():
        verb = _add(verbs, name, row.text, "RUN [options]")
        verb.add_argument("run", type=Path, metavar="RUN", help="a run folder")
        _add_permissions(verb)
    _add_tokenize_part(verbs)
    return parser, list(verbs.choices)


def _add(verbs: Any, name: str, text: str, usage: str) -> argparse.ArgumentParser:
    """A verb without arguments yet."""
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, usage=f"megatron-ext {name} {usage}")
    return verb


def _add_recipe_verbs(verbs: Any) -> None:
    launch = _add(verbs, "launch", "run a recipe's stages here or by Slurm, or show them", "RECIPE [stage.key=value ...] [options]")
    plan = _add(verbs, "plan", "what a recipe costs", "RECIPE [stage.key=value ...] [options]")
    doctor = _add(verbs, "doctor", "what would fail, before anything runs", "RECIPE [stage.key=value ...] [options]")
    for verb in (launch, plan, doctor):
        verb.add_argument("recipe", metavar="RECIPE", help="octothinker:llama_3b, or ./my.py:run; overrides follow as stage.key=value")
        verb.add_argument("--cluster", metavar="C", help="h100, or ./site.py:h100")
    launch.add_argument("--local", action="store_true", help="run every stage on this machine; finished ones are skipped")
    launch.add_argument("--dry-run", action="store_true", help="print the resolved recipe, its plan and a cluster's scripts; write nothing")
    launch.add_argument("--from", dest="first", metavar="STAGE", help="submit this stage and what comes of it, of what is missing")
    launch.add_argument("--no-doctor", action="store_false", dest="doctor", help="start although doctor's quick checks find an error")
    for verb in (launch, doctor):
        verb.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where run folders go (default: runs)")
    _add_permissions(launch)
    plan.add_argument("--json", action="store_true", dest="as_json", help="as JSON")
    doctor.add_argument("--deep", action="store_true", help="build the real model, optimizer and checkpoint plan, without memory or GPUs")
    doctor.add_argument("--rank", type=int, metavar="N", help="the rank that --deep builds (default: first, middle and last)")
    doctor.add_argument("--stage", metavar="NAME", help="the stage that --deep builds (default: all that differ)")


def _add_looking_verbs(verbs: Any) -> None:
    tree = _add(verbs, "tree", "lineage, states, tokens and checkpoints of run folders", "RUNS")
    tree.add_argument("runs", type=Path, metavar="RUNS")
    status = _add(verbs, "status", "jobs, attempts, progress, time left and what failed", "RUNS [--watch]")
    status.add_argument("runs", type=Path, metavar="RUNS", help="a folder of run folders, or one of them")
    status.add_argument("--watch", action="store_true", help="draw it again every few seconds, until all is done")
    cancel = _add(verbs, "cancel", "cancel the jobs of run folders", "RUNS")
    cancel.add_argument("runs", type=Path, metavar="RUNS", help="a folder of run folders, or one of them")
    logs = _add(verbs, "logs", "the newest log of a run", "RUN [--first-failure] [--follow]")
    logs.add_argument("run", type=Path, metavar="RUN")
    logs.add_argument("--first-failure", action="store_true", help="the newest fault, and the traceback behind it")
    logs.add_argument("--follow", action="store_true", help="go on printing, over to the next attempt's log")
    diff = _add(verbs, "diff", "what differs between two runs or checkpoints: science, plan, data, code, lineage", "A B [options]")
    for side in ("a", "b"):
        diff.add_argument(side, type=Path, metavar=side.upper(), help="a run folder, or a checkpoint folder in one")
    diff.add_argument("--code", action="store_true", help="print the changed lines of code too, where both snapshots are there")
    diff.add_argument("--json", action="store_true", dest="as_json", help="as JSON")
    why = _add(verbs, "why", "what was in one training step: documents, loss by source, gradient by layer", "RUN --step N [--json]")
    why.add_argument("run", type=Path, metavar="RUN", help="the run folder of a training stage")
    why.add_argument("--step", type=int, required=True, metavar="N", help="the first is 1; it is computed again, and nothing is written")
    why.add_argument("--json", action="store_true", help="as JSON, with every sequence")


def _add_checkpoint_verbs(verbs: Any) -> None:
    verify = _add(verbs, "verify", "whether checkpoints are whole: reads every byte, opens nothing", "CKPT|RUN|RUNS... [--jobs N]")
    verify.add_argument("paths", type=Path, nargs="+", metavar="CKPT|RUN|RUNS", help="checkpoints, or folders that hold some")
    verify.add_argument("--jobs", type=int, default=4, metavar="N", help="files read at a time (default: 4)")
    gc = _add(verbs, "gc", "remove what dead writers left and checkpoints beyond the plan's number", "RUNS [--dry-run] [--thin]")
    gc.add_argument("runs", type=Path, metavar="RUNS", help="a run folder, or a folder of them")
    gc.add_argument("--dry-run", action="store_true", help="say what would be done and why; touch nothing")
    gc.add_argument("--thin", action="store_true", help="also remove the optimizer state of pinned checkpoints that nothing branches from")


def _add_generate(verbs: Any) -> None:
    text = "what a checkpoint says to a prompt"
    verb = _add(verbs, "generate", text, "CKPT --prompt TEXT [options]")
    verb.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint folder, or a run folder for its newest")
    verb.add_argument("--prompt", required=True, metavar="TEXT", help="the text to go on from, or with a template the question")
    verb.add_argument("--template", choices=TEMPLATES, default="none", help="how the question is put (default: none, as it is)")
    verb.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of a response, at most (default: 256)")
    verb.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token, always (default); the paper: 1")
    verb.add_argument("--top-p", type=float, default=1.0, metavar="P", help="the fewest likeliest tokens that hold this much (default: 1)")
    verb.add_argument("--top-k", type=int, metavar="K", help="the K likeliest tokens (default: all)")
    verb.add_argument("--samples", type=int, default=1, metavar="N", help="responses, each with a stream of its own (default: 1)")
    verb.add_argument("--seed", type=int, default=1, metavar="S", help="the same words with the same seed say the same (default: 1)")
    verb.add_argument("--bos", action="store_true", help="begin with the tokenizer's BOS, where the documents of the training did")
    verb.add_argument("--device", choices=get_args(Device), default="cpu", help="where the model runs (default: cpu)")


def _add_replay(verbs: Any) -> None:
    text = "compute a reinforcement learning step again from its recorded rollouts, as it was or with changes"
    verb = _add(verbs, "replay", text, "RUN --step N [--set key=value ...] [--json]")
    verb.add_argument("run", type=Path, metavar="RUN", help="the run folder of an rl stage")
    verb.add_argument("--step", type=int, required=True, metavar="N", help="the rollout step; the first is 1. Nothing is written")
    verb.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="key=value", help="what if: objective.clip_high=0.28; may be repeated"
    )
    verb.add_argument("--json", action="store_true", help="as JSON")


def _add_conversion_verbs(verbs: Any) -> None:
    into = _add(verbs, "convert hf-to-megatron", "a Hugging Face model into a checkpoint", "DIR_OR_HUB_ID CKPT [options]")
    into.add_argument("source", metavar="DIR_OR_HUB_ID", help="a folder, or an id as meta-llama/Llama-3.2-1B")
    into.add_argument("target", type=Path, metavar="CKPT", help="the checkpoint folder to make; it must not exist, or be empty")
    into.add_argument(
        "--revision", metavar="R", help="of a hub id: a commit, branch or tag (default: its main branch); the commit is recorded"
    )
    into.add_argument("--allow-pickle", action="store_true", help="read .bin files, plain tensors only, where there are no safetensors")
    into.add_argument("--resize-vocabulary", action="store_true", help="give rows to ids that the tokenizer has and the embedding lacks")
    out = _add(verbs, "convert megatron-to-hf", "a checkpoint into a Hugging Face folder", "CKPT DIR [options]")
    out.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint folder, or a run folder for its newest")
    out.add_argument("target", type=Path, metavar="DIR", help="the folder to make; it must not exist, or be empty")
    out.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (default: as they are stored)")
    out.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer files for a checkpoint that carries none")
    check = _add(verbs, "convert check", "whether a checkpoint and a Hugging Face folder are the same model", "CKPT DIR [options]")
    check.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint folder, or a run folder for its newest")
    check.add_argument("folder", type=Path, metavar="DIR", help="a Hugging Face folder")
    check.add_argument(
        "--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help=f"the text whose logits are compared (default: {DEFAULT_PROMPT})"
    )
    check.add_argument("--tensors-only", action="store_true", help="compare the weights only; no model is built")


def _add_tokenize_part(verbs: Any) -> None:
    verb = _add(verbs, "tokenize-part", "do a part of a tokenize run's slices, ahead of it", "RUN --part I --of N")
    verb.add_argument("run", type=Path, metavar="RUN", help="the run folder of a tokenize stage")
    verb.add_argument("--part", type=int, required=True, metavar="I", help="the first is 0")
    verb.add_argument("--of", type=int, required=True, dest="parts", metavar="N", help="into how many parts the slices are dealt out")
    _add_permissions(verb)


def _add_permissions(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--other-code", action="store_true", help="go on with a begun stage although other code began it")
    verb.add_argument("--take-over", action="store_true", help="begin although another attempt seems to be at work; that one is fenced off")


def permissions(arguments: argparse.Namespace) -> Permissions:
    """What the flags allow."""
    return Permissions(other_code=arguments.other_code, take_over=arguments.take_over)
