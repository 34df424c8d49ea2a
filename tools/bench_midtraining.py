"""Does mid-training matter? The demo's graph over several seeds: reinforcement learning from base, stable and every branch.

    python -m tools.bench_midtraining [--seeds 3] [--size demo|smoke] [--samples 32] [--folder DIR] [--threads 2]

Every seed trains base, stable and the branches anew and then does the same RL from each: initial weights, order of the documents, order
of the prompts and draws differ; text, tokenizer and held-out problems are one. All of it is one graph in DIR, run as `launch`
does: stopped, it goes on where it was, and with more seeds only the new ones are trained. Before RL, `--samples` answers to every
held-out problem are sampled at temperature 1, under the template and the cap of the validation, by the Megatron engine from each
stage that RL starts from: pass@1 and pass@k (unbiased, k = --samples). They are kept in DIR too. Scores before and after RL
are those of the runs: greedy, at one cap for all.

The intervals are Student's over seeds, 95 %: with three of them 2.5 standard deviations of the seeds to each side. They are not cut
at 0 and 1. Differences are taken within seeds. Prints Markdown for docs/benchmarks.md; progress goes to stderr, what stages print to
stdout before the tables. Three seeds of the demo take about as long as three demos and some minutes; `--size smoke` two minutes a seed,
and means nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.config.rl import Sampling
from megatron_ext.config.stages import Branch, RLStage, TrainStage, Weights
from megatron_ext.errors import MegatronExtError
from megatron_ext.estimators import Estimate, Tally, mean_at_k, mean_interval, pass_at_k
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.local import launch_local
from megatron_ext.launch.ranks import THREAD_VARIABLES
from megatron_ext.metrics import read_metrics
from megatron_ext.provenance import MANIFEST, file_sha256
from megatron_ext.runs import Run, open_run, read_json, write_json
from recipes import demo

SIZES: dict[str, Callable[[], Graph]] = {"demo": demo.demo, "smoke": demo.smoke}
PASSES = "passes"  # folder of what was sampled before RL, a file a start
SLOTS = 256  # responses sampled at a time


# ---- the graph of all seeds


def graph_of_seeds(graph: Graph, seeds: int) -> Graph:
    """The graph's text once, and its training and RL once a seed; the first seed is the graph's own."""
    trained = [stage for stage in graph.stages if isinstance(stage, TrainStage | RLStage)]
    shared = [stage for stage in graph.stages if stage.kind in ("text", "tokenizer", "tokenize")]
    copies = [_of_seed(stage, number) for number in range(seeds) for stage in trained]
    return Graph(name=f"midtraining_{graph.name}", stages=(*shared, *copies))


def named(stage: str, number: int) -> str:
    """A stage's name in the graph of all seeds."""
    return f"{stage}_seed{number}"


def _of_seed(stage: Any, number: int) -> Any:
    start = stage.start
    if isinstance(start, Weights | Branch):
        start = replace(start, stage=named(start.stage, number))
    plan = replace(stage.plan, export_last=False)  # nothing here reads an export
    return replace(stage, name=named(stage.name, number), start=start, seed=stage.seed + number, plan=plan)


# ---- before RL: many answers


def sample_all(runs: Sequence[Run], folder: Path, samples: int, threads: int) -> None:
    """Sample and grade the answers of every start that RL's runs name, and keep them in `folder`; what is there is not done again."""
    from megatron_ext import device
    from megatron_ext.config.plan import TrainPlan
    from megatron_ext.distributed import process_groups

    missing = [run for run in runs if not _kept(run, folder, samples)]
    if not missing:
        return
    device.activate("cpu", threads)
    with process_groups(TrainPlan(device="cpu")) as groups:
        for number, run in enumerate(missing, start=1):
            began = time.monotonic()
            right = _num_right(run, groups, samples)
            write_json(folder / f"{run.name}.json", {**_asked(run, samples), "num_right": right})
            print(f"{number} of {len(missing)}: before {run.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def tallies(run: Run, folder: Path, samples: int) -> list[Tally]:
    """What was sampled from the weights that a run starts from, a tally a problem."""
    return [Tally(samples, right) for right in read_json(folder / f"{run.name}.json", "sampled answers")["num_right"]]


def _kept(run: Run, folder: Path, samples: int) -> bool:
    path = folder / f"{run.name}.json"
    return path.is_file() and read_json(path, "sampled answers").items() >= _asked(run, samples).items()


def _asked(run: Run, samples: int) -> dict[str, Any]:
    """What the answers depend on: the weights, and of the run its problems, template, cap and seed."""
    manifest = file_sha256(_start(run) / MANIFEST)
    return {"manifest_sha256": manifest, "science_hash": run.science_hash, "samples": samples}


def _start(run: Run) -> Path:
    from megatron_ext.checkpoint.folder import named_checkpoint

    return named_checkpoint(run.inputs["start"])


def _num_right(run: Run, groups: Any, samples: int) -> list[int]:
    """How many of `samples` answers to each held-out problem are right."""
    from megatron_ext.conversion.assets import read_assets
    from megatron_ext.generation.command import load_chunks
    from megatron_ext.generation.engine import Request, generate_all
    from megatron_ext.generation.megatron_engine import MegatronEngine
    from megatron_ext.rl.grading import graded, grading_pool
    from megatron_ext.tasks.problems import stage_problems
    from megatron_ext.tasks.prompts import prompts
    from megatron_ext.tasks.templates import template
    from megatron_ext.tokenizer import tokenizer_of_files

    stage: RLStage = run.stage
    validation, chosen = stage.validation, template(stage.template)
    tokenizer = tokenizer_of_files(read_assets(_start(run)))
    cap_tokens = validation.cap_tokens or stage.lengths.largest_cap_tokens
    rows = [
        row
        for one in validation.sets
        for row in prompts(
            stage_problems(one, run.inputs["text"]), chosen, tokenizer, validation.max_prompt_tokens, one.path, bos=stage.bos
        ).rows
    ]
    wanted = [row for row in rows for _ in range(samples)]
    requests = [Request(id, row.tokens, cap_tokens, Sampling(), stage.seed, chosen.stop_strings) for id, row in enumerate(wanted)]
    chunks = load_chunks(_start(run), stage.model, stage.precision, groups)
    answers = generate_all(MegatronEngine(chunks, stage.model, groups, tokenizer, SLOTS), requests)
    with grading_pool(stage.plan) as pool:
        rollouts = graded(pool, [row.problem for row in wanted], requests, answers, "correct")
    right = [one.is_correct for one in rollouts]
    return [sum(right[first : first + samples]) for first in range(0, len(right), samples)]


# ---- the tables


@dataclass(frozen=True)
class Score:
    """A run of one seed: sampled and greedy accuracy before RL, greedy after it."""

    pass_1: float
    pass_k: float
    before: float
    after: float


def score(run: Run, folder: Path, samples: int) -> Score:
    """Of several sets the unweighted mean."""
    sampled = tallies(run, folder, samples)
    points = read_metrics(run.metrics_path, "rl_validation")
    last = max(point["step"] for point in points)
    greedy = [[point["accuracy"] for point in points if point["step"] == step] for step in (0, last)]
    before, after = (sum(one) / len(one) for one in greedy)
    return Score(mean_at_k(sampled), pass_at_k(sampled, samples), before, after)


def table(scores: dict[str, list[Score]], samples: int) -> Iterator[str]:
    """One row a start: means over seeds with their intervals."""
    yield f"| RL from | pass@1 before | pass@{samples} before | greedy before | greedy after | after - before |"
    yield "|---|---|---|---|---|---|"
    for name, rows in scores.items():
        columns = [[getattr(one, key) for one in rows] for key in ("pass_1", "pass_k", "before", "after")]
        gains = [one.after - one.before for one in rows]
        yield f"| {name} | {' | '.join(shown(values) for values in (*columns, gains))} |"


def comparisons(scores: dict[str, list[Score]], branches: Sequence[str], controls: Sequence[str]) -> Iterator[str]:
    """Every branch less every control after RL, seed by seed."""
    yield "| after RL | difference of greedy accuracy | by seed | finding |"
    yield "|---|---|---|---|"
    for branch in branches:
        for control in controls:
            pairs = zip(scores[branch], scores[control], strict=True)
            differences = [one.after - other.after for one, other in pairs]
            by_seed = ", ".join(f"{value:+.3f}" for value in differences)
            yield f"| {branch} - {control} | {shown(differences)} | {by_seed} | {finding(differences)} |"


def shown(values: Sequence[float]) -> str:
    """A mean with its interval over seeds; a single seed has none."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    estimate = mean_interval(values)
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def finding(differences: Sequence[float]) -> str:
    """What the interval allows to say."""
    if len(differences) < 2:
        return "one seed: no interval"
    estimate: Estimate = mean_interval(differences)
    return "above" if estimate.low > 0 else "below" if estimate.high < 0 else "not told apart"


def report(graph: Graph, one: Graph, seeds: int, runs_dir: Path, samples: int) -> str:
    """The Markdown of all seeds; `one` is the graph of a single one, whose names stand in the tables."""
    runs = {stage.name: [open_run(runs_dir / graph.name / named(stage.name, n)) for n in range(seeds)] for stage in _rl_stages(one)}
    folder = runs_dir / graph.name / PASSES
    start = {stage.name: stage.start.stage for stage in _rl_stages(one)}
    scores = {start[name]: [score(run, folder, samples) for run in several] for name, several in runs.items()}
    branches = [name for name in scores if isinstance(one.stage(name).start, Branch)]
    num_problems = len(tallies(next(iter(runs.values()))[0], folder, samples))
    few = f"{seeds} seed{'s' if seeds > 1 else ''}, {num_problems} held-out problems, {samples} samples of each at temperature 1."
    wide = "Student's 95 % intervals over the seeds, which are few: only large differences can be told apart."
    wide += " The problems are the same for all."
    lines = [few + (f" {wide}" if seeds > 1 else ""), "", *table(scores, samples), ""]
    return "\n".join([*lines, *comparisons(scores, branches, [name for name in scores if name not in branches])])


def _rl_stages(graph: Graph) -> list[RLStage]:
    return [stage for stage in graph.stages if isinstance(stage, RLStage)]


def main() -> int:
    """Train what is missing, sample what is missing, print the tables; 1 where something a user can put right is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--samples", type=int, default=32, help="answers to each problem before RL, and the k of pass@k")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the graph's run folders lie")
    parser.add_argument("--threads", type=int, default=2, help="of the sampling before RL; the stages' plans say their own")
    words = parser.parse_args()
    for name, least in (("seeds", 1), ("samples", 1), ("threads", 1)):
        if getattr(words, name) < least:
            parser.error(f"--{name}: is {getattr(words, name)}, must be at least {least}")
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(words.threads)))  # read when torch is first imported, below
    one = SIZES[words.size]()
    graph = graph_of_seeds(one, words.seeds)
    try:
        launch_local(graph, words.folder, None)
        runs = [open_run(words.folder / graph.name / stage.name) for stage in _rl_stages(graph)]
        folder = words.folder / graph.name / PASSES
        folder.mkdir(exist_ok=True)
        sample_all(runs, folder, words.samples, words.threads)
        print("\n" + report(graph, one, words.seeds, words.folder, words.samples))
    except MegatronExtError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
