"""A check by hand on a machine with one GPU (FP8 needs Ada, Hopper or newer): does what a CPU cannot show hold?

    python -m tools.gpu_check                     # everything
    python -m tools.gpu_check --parts speed       # one part; --precisions bf16 for one precision
    python -m tools.gpu_check --rehearse          # the same code on a CPU with a toy model in FP32, to try the tool itself

It was written for Python 3.12, torch 2.11.0+cu130, Transformer Engine 2.11.0 and Megatron-Core 0.16.1. The parts, each
precision in a process of its own, all through the code that trains (`training.state`, `training.step`, `checkpoint`):

    speed        Llama 3.2 1B from random weights, the same random tokens at every step, sequences of 8,192: tokens/s,
                 model FLOP/s, MFU with the assumed peak, peak memory beside config.memory's prediction, the loss at
                 every step, which must be finite and fall
    checkpoint   two layers of it: save, load into a new model, and one step more must give the same loss, gradient
                 norm and weights as the step that the first model takes, bit for bit (Transformer Engine is told to
                 use deterministic kernels for this)
    nan          a gradient that is not a number, and weights that are not, must each stop the step before it moves a weight
    parity       a toy from the same seed on the GPU and on the CPU: losses and gradient norm within a tolerance
    rl           a toy learns from rewards: packed responses against one a micro-batch, the engine's log-probabilities against
                 the trainer's, three steps of GRPO (tools/gpu_check_rl.py)

Prints one JSON object. Exit status: 0 all parts passed, 1 some did not, 2 they could not run here.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from megatron_ext.config.base import content_hash, to_json
from megatron_ext.config.budget import Budget
from megatron_ext.config.memory import memory
from megatron_ext.config.mixture import Mixture, Row
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import Device, Precision, TrainPlan, micro_batches
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Scratch, TrainStage
from megatron_ext.errors import MegatronExtError
from megatron_ext.provenance import Manifest, environment
from recipes import models
from tools.gpu_check_rl import rl

PARTS = ("speed", "checkpoint", "nan", "parity", "rl")
WARM_UP_STEPS = 3  # kernels are compiled and chosen in the first
CHECKPOINT_STEPS, PARITY_STEPS = 3, 5
LEARNING_RATE = 3e-4
# What a precision may differ by from FP32 on a CPU: loss (nats per token), gradient norm (share). FP32 products on a
# GPU are TF32 inside Transformer Engine. Chosen before any run: to be set from measurement.
TOLERANCES = {"fp32": (2e-3, 1e-2), "bf16": (2e-2, 5e-2), "fp8": (1e-1, 2e-1)}


def stage_of(model: ModelConfig, budget: Budget, precision: Precision, micro_batch: int, rehearse: bool) -> TrainStage:
    """A stage of one rank on the GPU, or in a rehearsal on the CPU; its corpus is never opened."""
    return TrainStage(
        name="gpu_check",
        start=Scratch(),
        corpus="none",
        model=model,
        mixture=Mixture(rows=(Row(source="random", weight=1.0),)),
        budget=budget,
        schedule=Schedule(shape="constant", peak=LEARNING_RATE),
        precision=precision,
        plan=TrainPlan(device="cpu" if rehearse else "gpu", micro_batch=micro_batch),
    )


def large_stage(arguments: argparse.Namespace) -> TrainStage:
    """The stage whose speed is measured."""
    model = models.toy(vocab_size=1024) if arguments.rehearse else models.llama_3_2_1b()
    length = 64 if arguments.rehearse else arguments.sequence_length
    budget = Budget(steps=arguments.steps + WARM_UP_STEPS, sequences_per_batch=arguments.sequences_per_batch, sequence_length=length)
    return stage_of(model, budget, arguments.precisions[0], arguments.micro_batch, arguments.rehearse)


def small_stage(arguments: argparse.Namespace) -> TrainStage:
    """Two layers of the same model and shorter sequences, for what is about exactness."""
    large = large_stage(arguments)
    budget = replace(large.budget, steps=CHECKPOINT_STEPS, sequence_length=min(1024, large.budget.sequence_length))
    return replace(large, model=replace(large.model, num_layers=2), budget=budget)


def toy_stage(precision: Precision, on_cpu: bool) -> TrainStage:
    """A toy whose sizes suit FP8 (multiples of 16) and fused attention (64 channels a head)."""
    model = replace(models.toy(vocab_size=1024), hidden_size=256, ffn_hidden_size=768)
    budget = Budget(steps=PARITY_STEPS, sequences_per_batch=4, sequence_length=128)
    return stage_of(model, budget, precision, 2, on_cpu)


def random_batches(stage: TrainStage, device: Any) -> list[dict[str, Any]]:
    """A step's micro-batches of random tokens, the same for every call."""
    import torch

    budget, size = stage.budget, stage.plan.micro_batch
    generator = torch.Generator().manual_seed(stage.seed)
    batches: list[dict[str, Any]] = []
    for _ in range(micro_batches(stage.plan, budget)):
        text = torch.randint(stage.model.vocab_size, (size, budget.sequence_length + 1), generator=generator)
        batch = {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "loss_mask": torch.ones(size, budget.sequence_length),
            "position_ids": torch.arange(budget.sequence_length).repeat(size, 1),
        }
        batches.append({**{name: value.to(device) for name, value in batch.items()}, "attention_mask": None})
    return batches


def take_step(state: Any, stage: TrainStage, batches: list[dict[str, Any]], step: int, **options: Any) -> Any:
    """One step of the trainer's own."""
    from megatron_ext.training.step import train_step

    return train_step(state, batches, LEARNING_RATE, stage.seed, stage.budget.tokens_before(step), **options)


def weights_sha256(state: Any) -> str:
    """One digest over all weights of a model."""
    import torch

    total = hashlib.sha256()
    for chunk in state.chunks:
        for name, weight in sorted(chunk.named_parameters()):
            total.update(name.encode())
            total.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def speed(stage: TrainStage, groups: Any) -> dict[str, Any]:
    """Tokens/s, FLOP/s, MFU, memory beside its prediction, and the losses."""
    from megatron_ext import device
    from megatron_ext.training.state import build_state

    kind = stage.plan.device
    state = build_state(stage, groups, stage.seed)
    batches = random_batches(stage, groups.device)
    seconds, losses, norms = [], [], []
    for step in range(stage.budget.steps):
        device.synchronize(kind)
        began = time.perf_counter()
        result = take_step(state, stage, batches, step)
        device.synchronize(kind)
        seconds.append(time.perf_counter() - began)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    step_seconds = statistics.median(seconds[WARM_UP_STEPS:])
    flops = stage.budget.tokens_per_batch * stage.model.flops_per_token(stage.budget.sequence_length) / step_seconds
    peak = device.peak(kind, stage.precision)
    predicted = memory(stage.model, stage.budget, stage.precision, stage.plan)
    measured_bytes = device.peak_memory_bytes(kind)
    return {
        "model": stage.model.name,
        "sequence_length": stage.budget.sequence_length,
        "sequences_per_batch": stage.budget.sequences_per_batch,
        "micro_batch": stage.plan.micro_batch,
        "step_seconds": step_seconds,
        "slowest_over_median": max(seconds[WARM_UP_STEPS:]) / step_seconds,
        "tokens_per_second": stage.budget.tokens_per_batch / step_seconds,
        "model_flops_per_second": flops,
        "mfu": None if peak.flops_per_second is None else flops / peak.flops_per_second,
        "peak": vars(peak),
        "peak_memory_bytes": measured_bytes,
        "predicted_memory_bytes": {**asdict(predicted), "total_bytes": predicted.total_bytes},
        "measured_over_predicted_memory": measured_bytes / predicted.total_bytes,
        "losses": losses,
        "grad_norms": norms,
        "passed": all(map(math.isfinite, (*losses, *norms))) and losses[-1] < losses[0],
    }


def checkpoint(stage: TrainStage, groups: Any) -> dict[str, Any]:
    """Whether a saved and loaded model's next step is that of the model that was saved, for each form of checkpoint."""
    from megatron_ext.checkpoint.load import load_state
    from megatron_ext.checkpoint.save import Target, save_checkpoint
    from megatron_ext.checkpoint.verify import verify
    from megatron_ext.training.state import build_state, load_model, load_optimizer, sharded_state

    batches = random_batches(stage, groups.device)
    first = build_state(stage, groups, stage.seed)
    for step in range(CHECKPOINT_STEPS - 1):
        take_step(first, stage, batches, step)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths, saving = {}, {}
        for layout in ("dp_reshardable", "fully_reshardable"):
            began = time.perf_counter()
            manifest = functools.partial(_manifest, stage, layout)
            paths[layout] = save_checkpoint(sharded_state(first, layout), Target(Path(folder) / layout, 1, 1, manifest))
            saving[layout] = time.perf_counter() - began
        straight = take_step(first, stage, batches, CHECKPOINT_STEPS - 1)
        straight_sha256 = weights_sha256(first)
        for layout, path in paths.items():
            verify(path)
            second = build_state(stage, groups, None)
            began = time.perf_counter()
            loaded = load_state(sharded_state(second, layout, is_loading=True), path)
            load_model(second, loaded)
            load_optimizer(second, loaded)
            loading = time.perf_counter() - began
            resumed = take_step(second, stage, batches, CHECKPOINT_STEPS - 1)
            found[layout] = {
                "save_seconds": saving[layout],
                "load_seconds": loading,
                "bytes": sum(p.stat().st_size for p in path.iterdir()),
                "loss": [straight.loss, resumed.loss],
                "grad_norm": [straight.grad_norm, resumed.grad_norm],
                "same_loss": straight.loss == resumed.loss,
                "same_grad_norm": straight.grad_norm == resumed.grad_norm,
                "same_weights": straight_sha256 == weights_sha256(second),
            }
    same = ("same_loss", "same_grad_norm", "same_weights")
    return {**found, "passed": all(one[name] for one in found.values() for name in same)}


def _manifest(stage: TrainStage, layout: str, files: dict[str, tuple[int, str]]) -> Manifest:
    values = to_json(stage)
    return Manifest(
        stage=stage.name,
        graph="gpu_check",
        attempt=1,
        iteration=1,
        tokens=stage.budget.tokens_before(CHECKPOINT_STEPS - 1),
        lineage_tokens=stage.budget.tokens_before(CHECKPOINT_STEPS - 1),
        learning_rate=LEARNING_RATE,
        science_hash=content_hash(values),
        mixture_hash=content_hash(values["mixture"]),
        tokenizer_hash=content_hash("none"),
        code_hash=environment()["code_hash"],
        parent=None,
        ledger=(),
        optimizer_layout=layout,  # type: ignore[arg-type]
        plan=values["plan"],
        model=values["model"],
        files=files,
    )


def nan(stage: TrainStage, groups: Any) -> dict[str, Any]:
    """Whether a step stops at what is not a number before it moves a weight."""
    from megatron_ext.errors import TrainingError
    from megatron_ext.training.state import build_state

    state = build_state(stage, groups, stage.seed)
    batches = random_batches(stage, groups.device)
    take_step(state, stage, batches, 0)
    weight = next(p for name, p in state.chunks[0].named_parameters() if name.endswith("linear_proj.weight"))

    def stopped(spoil: Callable[[], None], **options: Any) -> dict[str, Any]:
        spoil()
        before = weights_sha256(state)
        try:
            take_step(state, stage, batches, 1, **options)
        except TrainingError as error:
            return {"stopped_by": str(error).partition(";")[0], "weights_unmoved": weights_sha256(state) == before}
        return {"stopped_by": None, "weights_unmoved": weights_sha256(state) == before}

    gradient = stopped(lambda: None, tamper=lambda: weight.main_grad.view(-1)[:1].fill_(math.nan))
    weights = stopped(lambda: weight.data.view(-1)[:1].fill_(math.nan))
    found = {"gradient": gradient, "weights": weights}
    return {**found, "passed": all(one["stopped_by"] is not None and one["weights_unmoved"] for one in found.values())}


def trace(stage: TrainStage, groups: Any) -> dict[str, Any]:
    """Losses and gradient norms of a few steps, for `parity`."""
    from megatron_ext.training.state import build_state

    state = build_state(stage, groups, stage.seed)
    batches = random_batches(stage, groups.device)
    results = [take_step(state, stage, batches, step) for step in range(stage.budget.steps)]
    return {"losses": [r.loss for r in results], "grad_norms": [r.grad_norm for r in results]}


def compare(found: dict[str, Any], reference: dict[str, Any], precision: str) -> dict[str, Any]:
    """A trace beside the CPU's: the losses of all steps and the first gradient norm, within the precision's tolerances."""
    loss, norm = TOLERANCES[precision]
    loss_difference = max(abs(a - b) for a, b in zip(found["losses"], reference["losses"], strict=True))
    norm_difference = abs(found["grad_norms"][0] / reference["grad_norms"][0] - 1)
    return {
        **found,
        "largest_loss_difference": loss_difference,
        "first_grad_norm_difference": norm_difference,
        "tolerances": [loss, norm],
        "passed": loss_difference <= loss and norm_difference <= norm,
    }


def run_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """One part of one precision, in this process."""
    if arguments.run == "checkpoint":
        os.environ.update(NVTE_ALLOW_NONDETERMINISTIC_ALGO="0", CUBLAS_WORKSPACE_CONFIG=":4096:8")  # read when kernels are chosen
    if arguments.run == "reference":
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # or Megatron takes its optimizer, which needs a GPU
    import megatron_ext.training  # noqa: F401 - quiets Megatron-Core, so before it
    from megatron_ext import device
    from megatron_ext.distributed import process_groups

    precision = arguments.precisions[0]
    stages: dict[str, tuple[Callable[[TrainStage, Any], dict[str, Any]], TrainStage]] = {
        "speed": (speed, large_stage(arguments)),
        "checkpoint": (checkpoint, small_stage(arguments)),
        "nan": (nan, small_stage(arguments)),
        "parity": (trace, toy_stage(precision, arguments.rehearse)),
        "reference": (trace, toy_stage("fp32", True)),
        "rl": (rl, toy_stage(precision, arguments.rehearse)),
    }
    part, stage = stages[arguments.run]
    device.activate(stage.plan.device, stage.plan.threads_per_rank)
    with process_groups(stage.plan) as groups:
        return part(stage, groups)


def in_a_process(part: str, precision: str, options: list[str]) -> dict[str, Any]:
    """A part in a fresh process; one that fails shows its error and has not passed."""
    command = [sys.executable, "-m", "tools.gpu_check", "--run", part, "--precisions", precision, *options]
    print(f"{part}, {precision} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"error": f"exit status {done.returncode}; what it said stands above", "passed": False}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every part that was asked for."""
    import megatron_ext.training  # noqa: F401 - quiets Megatron-Core, so before it
    from megatron_ext import device

    precisions: list[Precision] = ["fp32"] if arguments.rehearse else arguments.precisions
    if not arguments.rehearse:
        device.require_gpu()
        from megatron_ext.model.build import check_precision

        for precision in precisions:
            check_precision(precision, TrainPlan())
    options = [f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in NUMBERS]
    options += ["--rehearse"] if arguments.rehearse else []
    kind: Device = "cpu" if arguments.rehearse else "gpu"
    result: dict[str, Any] = {"environment": environment(), "device": device.peak(kind, precisions[0]).source}
    for part in arguments.parts:
        chosen = precisions if part != "parity" or arguments.rehearse else ["fp32", *precisions]
        found = {precision: in_a_process(part, precision, options) for precision in dict.fromkeys(chosen)}
        if part == "parity":
            reference = in_a_process("reference", "fp32", options)
            found = {p: one if "error" in {**one, **reference} else compare(one, reference, p) for p, one in found.items()}
            result["reference"] = reference
        result[part] = found
    failed = [f"{part} {precision}" for part in arguments.parts for precision, one in result[part].items() if not one.get("passed")]
    return {**result, "failed": failed, "passed": not failed}


NUMBERS = {
    "steps": (20, f"timed steps of 'speed', after {WARM_UP_STEPS} that are not"),
    "sequence-length": (8192, "tokens of a sequence of 'speed'"),
    "sequences-per-batch": (4, "sequences of a step"),
    "micro-batch": (1, "sequences of a micro-batch"),
}


def main() -> None:
    """Parse, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to check (default: all)")
    names = get_args(Precision)
    parser.add_argument("--precisions", nargs="+", choices=names, default=["bf16", "fp8"], help="default: bf16 fp8")
    for name, (default, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with a toy, in FP32")
    parser.add_argument("--run", choices=(*PARTS, "reference"), help="one part in this process, as the tool starts them itself")
    arguments = parser.parse_args()
    try:
        result = run_part(arguments) if arguments.run else check(arguments)
    except MegatronExtError as error:
        print(f"gpu_check: {error}\nTo try the tool itself on a CPU: python -m tools.gpu_check --rehearse", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result, indent=None if arguments.run else 2))
    sys.exit(0 if arguments.run or result["passed"] else 1)


if __name__ == "__main__":
    main()
