"""What our trainer costs over a bare Megatron-Core loop: same model, batch, optimizer and threads, one CPU rank.

    python -m tools.bench_overhead [--pairs 5] [--steps 20] [--threads 1]

Ours is `megatron_ext.training.trainer.train` with the hooks of a real stage (metrics.jsonl, log, progress lines) and
the loader over real shards; seconds run from the end of one step to the end of the next, so loading and recording are
in them, validation and saving are not. Bare is `get_forward_backward_func` and `get_megatron_optimizer` over batches
that lie ready in memory: nothing is loaded, checked or recorded. Both run on our stand-ins for CUDA
(cpu_megatron.activate), without which Megatron-Core does not run on a CPU at all. The model is the demo's toy.

The two take turns, each run in a fresh process; a pair's ratio is ours over bare of their median steps. The same of
the processor's seconds stands beside it, for neighbours on the machine disturb it less. After the pairs, one run of
ours is timed part by part, and pairs of bare runs compare Megatron's own attention with ours. Prints one JSON object;
exits 1 where the median ratio is over the bar.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.attempts import begin_attempt
from megatron_ext.config.base import to_json
from megatron_ext.config.budget import Budget
from megatron_ext.config.plan import TrainPlan, micro_batches
from megatron_ext.config.stages import Scratch, Source, TokenizeStage, TrainStage
from megatron_ext.data.shards import ShardWriter
from megatron_ext.metrics import read_metrics
from megatron_ext.provenance import CORPUS, CorpusIndex, SourceRecord
from megatron_ext.runs import Run, open_run, write_json, write_run
from recipes import demo

BAR = 1.03  # at most 3 % over the bare loop
WARM_UP_STEPS = 3
SEQUENCES_PER_BATCH, SEQUENCE_LENGTH = 8, 256
SOURCES = ("math_web", "general_web", "short_cot")  # of the demo's stable mixture
DOCUMENTS, MEAN_TOKENS, EOD_ID = 2000, 300, 2
TOKENIZER_HASH = "0" * 64
KINDS = ("ours", "bare", "bare_megatron_attention", "parts")


def write_corpus(folder: Path, vocab_size: int) -> Run:
    """Random documents in real shards, one source for each of the demo's stable mixture."""
    sources = tuple(Source(name=name, paths=("none.jsonl",), max_epochs=1000.0) for name in SOURCES)
    run = write_run(folder / "corpus", "bench", TokenizeStage(name="corpus", sources=sources, tokenizer="./tokenizer"), {})
    facts: dict[str, Any] = {"vocab_size": vocab_size, "eod_id": EOD_ID, "bos": False, "tokenizer_hash": TOKENIZER_HASH}
    records = {}
    for number, name in enumerate(SOURCES):
        random = np.random.default_rng(number)
        with ShardWriter(run.path / "shards" / name, "train-00000", source=name, split="train", **facts) as writer:
            for i, length in enumerate(random.integers(MEAN_TOKENS // 2, MEAN_TOKENS * 3 // 2, DOCUMENTS)):
                writer.add(f"{name}/{i}", np.append(random.integers(EOD_ID + 1, vocab_size, length), EOD_ID))
            written = writer.finish()
        assert written is not None
        records[name] = SourceRecord(
            train=(f"shards/{name}/train-00000.json",), heldout=(), tokens=written.tokens, heldout_tokens=0,
            documents=written.documents, heldout_documents=0, max_epochs=1000.0,
        )  # fmt: skip
    write_json(run.path / CORPUS, to_json(CorpusIndex(tokenizer_path="tokenizer", sources=records, **facts)))
    return run


def stage(steps: int, threads: int) -> TrainStage:
    """The demo's stable stage from random weights, for a few steps, without validation and with one save, after the last step.

    The batch is set here, so that a step takes 0.2 s at least: what is done once a step weighs more in shorter ones.
    """
    stable: TrainStage = demo.demo().stage("stable")
    budget = Budget(steps=steps, sequences_per_batch=SEQUENCES_PER_BATCH, sequence_length=SEQUENCE_LENGTH)
    plan = TrainPlan(
        device="cpu",
        threads_per_rank=threads,
        micro_batch=SEQUENCES_PER_BATCH,
        distributed_optimizer=False,  # one rank has nothing to share
        validation_sequences=0,
        validate_every_steps=10**6,
        save_every_steps=10**6,
    )
    return replace(stable, name="ours", start=Scratch(), budget=budget, plan=plan)


class _Clock:
    """Wall-clock and processor seconds between ticks."""

    def __init__(self) -> None:
        self._ticks: list[tuple[float, float]] = []

    def tick(self) -> None:
        """A step ends here, or the first begins."""
        self._ticks.append((time.perf_counter(), time.process_time()))

    def medians(self) -> dict[str, Any]:
        """Medians over the steps after the warm-up."""
        wall, processor = np.median(np.diff(self._ticks, axis=0)[WARM_UP_STEPS:], axis=0).tolist()
        return {"seconds": wall, "processor_seconds": processor}


def run_ours(folder: Path, parts: bool) -> dict[str, Any]:
    """Train a run of its own in `folder`; seconds of each step and, with `parts`, of what a step is made of."""
    from megatron_ext import device
    from megatron_ext.distributed import process_groups
    from megatron_ext.training import stage as stages
    from megatron_ext.training import trainer
    from megatron_ext.training.hooks import Context, Hook, LogHook, MetricsHook, Record

    run = open_run(folder)
    device.activate("cpu", run.stage.plan.threads_per_rank)
    clock = _Clock()

    class AtEnds(Hook):
        def start(self, context: Context) -> None:  # noqa: ARG002
            clock.tick()

        def step(self, context: Context, metrics: Record) -> None:  # noqa: ARG002
            clock.tick()
            of_steps.append(dict(seconds))
            seconds.clear()

    seconds: Counter[str] = Counter()  # of the parts of the step that runs
    of_steps: list[dict[str, float]] = []
    if parts:
        _time_parts(seconds)
    with process_groups(run.stage.plan) as groups:
        hooks = [MetricsHook(), LogHook(), stages._ProgressHook(sys.stderr), stages._Summary(), AtEnds()]
        trainer.train(run, groups, begin_attempt(run), hooks)
    medians = clock.medians()
    steps = run.stage.budget.steps - WARM_UP_STEPS
    mfu = statistics.median(record["mfu"] for record in read_metrics(run.metrics_path, "train")[-steps:])
    return {
        **medians,
        "mfu": mfu,
        "shares": {name: statistics.median(step[name] for step in of_steps[-steps:]) / medians["seconds"] for name in of_steps[-1]},
    }


def _time_parts(seconds: Counter[str]) -> None:
    """Wrap what a step calls with clocks that add to `seconds`; no part holds another."""
    from megatron_ext.data.loader import Loader
    from megatron_ext.metrics import MetricsWriter
    from megatron_ext.training import stage as stages
    from megatron_ext.training import step as steps
    from megatron_ext.training import trainer

    def timed(owner: Any, name: str, label: str) -> None:
        call = getattr(owner, name)

        def clocked(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                seconds[label] += time.perf_counter() - began  # type: ignore[assignment]

        setattr(owner, name, clocked)

    def timed_batches(self: Any) -> Any:
        batches = read(self)
        while True:
            began = time.perf_counter()
            found = next(batches, None)
            seconds["loader"] += time.perf_counter() - began  # type: ignore[assignment]
            if found is None:
                return
            yield found

    read = Loader.__iter__
    Loader.__iter__ = timed_batches  # type: ignore[method-assign]
    timed(trainer, "place", "place")
    timed(Loader, "samples_sha256", "samples_sha256")
    timed(MetricsWriter, "write", "metrics write")
    timed(stages._ProgressHook, "step", "progress")
    timed(steps, "forward", "forward and backward")
    for name in ("seed_step", "_clip", "apply_hyperparameters"):
        timed(steps, name, name.strip("_"))
    built = trainer.begin

    def begin(*arguments: Any) -> Any:
        began = built(*arguments)
        timed(began.state.wrapped[0], "zero_grad_buffer", "zero_grad_buffer")
        for name in ("zero_grad", "prepare_grads", "get_grad_norm", "step_with_ready_grads"):
            timed(began.state.optimizer, name, name)
        return began

    trainer.begin = begin  # type: ignore[assignment]


def run_bare(steps: int, threads: int, megatron_attention: bool) -> dict[str, Any]:
    """Megatron-Core's own calls over prepared batches; seconds of each step."""
    import torch

    from megatron_ext import device
    from megatron_ext.distributed import process_groups
    from megatron_ext.model import layers

    chosen = stage(steps, threads)
    device.activate("cpu", threads)
    if megatron_attention:
        from megatron.core.transformer.dot_product_attention import DotProductAttention

        layers.CoreAttention = DotProductAttention  # type: ignore[misc, assignment]
    with process_groups(chosen.plan) as groups:
        step = _bare_step(chosen, groups)
        batches = _random_batches(chosen, torch.Generator().manual_seed(1))
        clock = _Clock()
        clock.tick()
        for batch in batches:
            step(batch)
            clock.tick()
    return clock.medians()


def _bare_step(chosen: TrainStage, groups: Any) -> Callable[[Any], None]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_ext.model.build import build_model

    model_parallel_cuda_manual_seed(1)
    chunk = build_model(chosen.model, "fp32", groups, chosen.seed)[0]
    model = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
    chunk.config.finalize_model_grads_func = finalize_model_grads
    numbers = chosen.optimizer
    settings = OptimizerConfig(
        optimizer="adam", lr=chosen.schedule.peak, weight_decay=numbers.weight_decay, adam_beta1=numbers.beta1,
        adam_beta2=numbers.beta2, adam_eps=numbers.epsilon, clip_grad=numbers.clip_norm,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, [model])
    forward_backward = get_forward_backward_func()

    def loss(losses: Any) -> Any:
        total = losses.float().sum()
        return total, losses.new_tensor(losses.numel()).int(), total.detach()

    def forward_step(batches: Any, model: Any) -> Any:
        tokens, labels, positions = next(batches)
        return model(tokens, positions, None, labels=labels), loss

    def step(batch: Any) -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(
            forward_step_func=forward_step, data_iterator=iter(batch), model=model, num_microbatches=len(batch),
            seq_length=chosen.budget.sequence_length, micro_batch_size=chosen.plan.micro_batch, forward_only=False,
        )  # fmt: skip
        optimizer.step()

    return step


def _random_batches(chosen: TrainStage, generator: Any) -> list[Any]:
    """For every step its micro-batches: inputs, labels, positions."""
    import torch

    size, length = chosen.plan.micro_batch, chosen.budget.sequence_length
    positions = torch.arange(length).repeat(size, 1)

    def micro_batch() -> Any:
        text = torch.randint(chosen.model.vocab_size, (size, length + 1), generator=generator)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous(), positions

    return [[micro_batch() for _ in range(micro_batches(chosen.plan, chosen.budget))] for _ in range(chosen.budget.steps)]


def one_run(kind: str, corpus: Path, folder: Path, steps: int, threads: int) -> dict[str, Any]:
    """One run of a kind, in a fresh process."""
    if kind in ("ours", "parts"):
        write_run(folder, "bench", stage(steps, threads), {"corpus": corpus})
    command = [sys.executable, "-m", "tools.bench_overhead", "--run", kind, "--folder", str(folder)]
    command += ["--steps", str(steps - WARM_UP_STEPS), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class Bench:
    """Runs in fresh processes, two kinds in turns."""

    def __init__(self, folder: Path, steps: int, threads: int) -> None:
        self.folder, self.steps, self.threads = folder, steps + WARM_UP_STEPS, threads
        self.corpus = write_corpus(folder, demo.DEMO.model.vocab_size).path
        self.runs = 0

    def run(self, kind: str) -> dict[str, Any]:
        """One run."""
        self.runs += 1
        found = one_run(kind, self.corpus, self.folder / f"run_{self.runs}", self.steps, self.threads)
        print(f"run {self.runs}, {kind}: {found['seconds']:.4f} s a step", file=sys.stderr, flush=True)
        return found

    def pairs(self, one: str, other: str, count: int) -> dict[str, Any]:
        """`one` over `other`: medians of each run, and the ratios of the pairs."""
        found: dict[str, list[dict[str, Any]]] = {one: [], other: []}
        for number in range(count):
            for kind in (one, other) if number % 2 == 0 else (other, one):  # whoever runs first has no steady advantage
                found[kind].append(self.run(kind))
        result: dict[str, Any] = {f"{kind}_seconds": [round(run["seconds"], 4) for run in runs] for kind, runs in found.items()}
        for clock, name in (("seconds", "ratio"), ("processor_seconds", "processor_ratio")):
            ratios = [a[clock] / b[clock] for a, b in zip(found[one], found[other], strict=True)]
            result |= {f"{name}s": [round(ratio, 4) for ratio in ratios], f"median_{name}": round(statistics.median(ratios), 4)}
        return result


def compare(pairs: int, steps: int, threads: int) -> dict[str, Any]:
    """All runs, and what comes of them."""
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), steps, threads)
        overhead = bench.pairs("ours", "bare", pairs)
        parts = bench.run("parts")
        attention = bench.pairs("bare_megatron_attention", "bare", max(1, pairs // 2))
    chosen = stage(steps, threads)
    return {
        "model": chosen.model.name,
        "tokens_per_batch": chosen.budget.tokens_per_batch,
        "micro_batches": micro_batches(chosen.plan, chosen.budget),
        "threads": threads,
        "steps": steps,
        "ours_over_bare": overhead,
        "bar": BAR,
        "passed": overhead["median_ratio"] <= BAR,
        "tokens_per_second": round(chosen.budget.tokens_per_batch / statistics.median(overhead["ours_seconds"])),
        "mfu": round(parts["mfu"], 4),
        "shares_of_a_step": {name: round(share, 5) for name, share in parts["shares"].items()},
        "megatron_attention_over_ours": attention,
    }


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of ours and bare; half as many of the attentions (default 5)")
    parser.add_argument("--steps", type=int, default=20, help=f"timed steps of each run, after {WARM_UP_STEPS} that are not (default 20)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default 1)")
    parser.add_argument("--run", choices=KINDS, help="one run in this process, as the tool starts them itself")
    parser.add_argument("--folder", type=Path, help="with --run: the run folder of 'ours' and 'parts'")
    arguments = parser.parse_args()
    if arguments.run is None:
        result = compare(arguments.pairs, arguments.steps, arguments.threads)
        print(json.dumps(result, indent=2))
        sys.exit(0 if result["passed"] else 1)
    sys.stdout.flush()
    if arguments.run in ("ours", "parts"):
        result = run_ours(arguments.folder, parts=arguments.run == "parts")
    else:
        megatron_attention = arguments.run == "bare_megatron_attention"
        result = run_bare(arguments.steps + WARM_UP_STEPS, arguments.threads, megatron_attention)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
