"""A small model that can add a little, and runs of reinforcement learning from it; everything that must be equal bit for bit."""

from __future__ import annotations

import functools
import json
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.rl import CapFrom, ProgressLengths, Rollouts
from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.stages import ConvertStage, RLStage, Weights
from megatron_ext.config.tasks import ProblemSet, Validation
from megatron_ext.errors import MegatronExtError
from megatron_ext.generation.engine import collect
from megatron_ext.runs import Run, open_run, write_run
from tests import ranks, training_runs
from tests.small_models import VOCAB_SIZE, random_model
from tests.unit import small_tokenizers

MODEL = ModelConfig(
    name="adder", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=2, num_query_groups=2,
    vocab_size=VOCAB_SIZE, max_positions=128, tied_embeddings=True, norm_epsilon=1e-6,
)  # fmt: skip
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip
CPU = RLPlan(
    device="cpu", tokens_per_micro_batch=256, logits_chunk_tokens=32, engine_slots=16, save_every_steps=3, validate_every_steps=3,
    grading_workers=1,
)  # fmt: skip
STEPS, BATCH, RATE = 60, 64, 3e-3


def question(a: int, b: int) -> str:
    """A sum."""
    return f"{a}+{b}="


def document(a: int, b: int) -> str:
    """A sum with its answer, as the template `plain` shows it."""
    return f"{question(a, b)}\nso \\boxed{{{a + b}}}"


@functools.cache
def adder() -> Path:
    """A Hugging Face folder: a Llama of 2 layers x 64 that was trained for a few seconds on sums of digits."""
    folder = Path(tempfile.mkdtemp(prefix="adder."))
    names = {"bos_token": small_tokenizers.BEGINNING, "eos_token": small_tokenizers.END, "tokenizer_class": "PreTrainedTokenizerFast"}
    small_tokenizers.hugging_face(folder, VOCAB_SIZE, names=names)
    from megatron_ext.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    rows = [[*tokenizer.encode(document(a, b)), tokenizer.eod_id] for a in range(10) for b in range(10)]
    longest = max(map(len, rows))
    filled = torch.tensor([row + [tokenizer.eod_id] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = random_model("llama", **SIZES)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        chosen = torch.randint(len(rows), (BATCH,), generator=generator)
        model(filled[chosen], labels=labels[chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    return folder


def parent(folder: Path) -> Run:
    """The converted adder as a finished run at `folder`/llama."""
    from megatron_ext.conversion.stage import run_convert

    run = write_run(folder / "llama", "test", ConvertStage(name="llama", model_id=str(adder()), model=MODEL), {})
    if not run.is_done():
        run_convert(run)
    return open_run(run.path)


def problems(folder: Path) -> tuple[Path, Path]:
    """Files of problems to learn from, and of others to be asked."""
    sums = [(a, b) for a in range(10) for b in range(10)]
    found = []
    for name, held_out in (("train", False), ("held_out", True)):
        rows = [{"id": f"{a}+{b}", "question": question(a, b), "answer": str(a + b)} for a, b in sums if ((3 * a + b) % 5 == 0) == held_out]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(path)
    return found[0], found[1]


def stage(folder: Path, **changes: Any) -> RLStage:
    """Six rollout steps of two updates, the cap rising after the second and the fourth step."""
    train, held_out = problems(folder)
    made = RLStage(
        name="rl",
        start=Weights(stage="llama"),
        model=MODEL,
        problems=ProblemSet(name="sums", path=str(train), form="arithmetic"),
        validation=Validation(sets=(ProblemSet(name="sums", path=str(held_out), form="arithmetic"),), max_prompt_tokens=32),
        lengths=ProgressLengths(caps=(CapFrom(after=0, cap_tokens=12), CapFrom(after=2, cap_tokens=16), CapFrom(after=4, cap_tokens=20))),
        steps=6,
        template="plain",
        rollouts=Rollouts(prompts_per_step=8, responses_per_prompt=4, prompts_per_update=4, max_prompt_tokens=32),
        learning_rate=1e-3,
        precision="fp32",
        plan=CPU,
    )
    return replace(made, **changes)


def rl_run(start: Run, made: RLStage, name: str = "rl") -> Run:
    """A run of the stage beside its parent."""
    return write_run(start.path.parent / name, "test", replace(made, name=name), {"start": start.path})


def trace(run: Run, kill_after: int | None = None, fault: str = "", kill_in: tuple[str, int] | None = None) -> dict[str, Any]:
    """Run it on its plan's ranks; rank 0's steps, rollouts and scores, and the digests of all ranks' weights and moments.

    `kill_after` sends SIGKILL to every rank once the checkpoint of that step is published, `kill_in` in the midst of a step's
    'sampling', 'grading' (rank 0 alone) or 'updates'.
    """
    results = ranks.run(_learn, run.stage.plan, str(run.path), kill_after, fault, kill_in)
    return {**results[0], "digests": [result["digests"] for result in results]}


EXACT = (
    "loss", "grad_norm", "updates", "tokens", "lineage_tokens", "reward_mean", "accuracy", "informative_share", "cap_tokens",
    "rollouts_sha256", "weight_version",
)  # fmt: skip


def failures(run: Run, fault: str) -> list[str]:
    """How a run with a fault ends, on each rank."""
    return ranks.run(_failure, run.stage.plan, str(run.path), fault)


def _failure(groups: Any, path: str, fault: str) -> str:
    try:
        _learn(groups, path, None, fault)
    except MegatronExtError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was amiss"


def _learn(groups: Any, path: str, kill_after: int | None, fault: str, kill_in: tuple[str, int] | None = None) -> dict[str, Any]:
    from megatron_ext.attempts import begin_attempt
    from megatron_ext.distributed import broadcast_object
    from megatron_ext.rl import begin, trainer
    from megatron_ext.rl.stage import KINDS
    from megatron_ext.training.hooks import Hook, MetricsHook

    run = open_run(Path(path))
    attempt = broadcast_object(begin_attempt(run) if groups.rank == 0 else None)
    seen: dict[str, Any] = {"steps": [], "scores": [], "start": None, "order": []}

    class Watch(Hook):
        def start(self, context: Any) -> None:
            seen["start"] = training_runs.digests(context.state)

        def step(self, context: Any, metrics: Any) -> None:
            seen["steps"].append(tuple(metrics[name] for name in EXACT))

        def validation(self, context: Any, records: Any) -> None:
            seen["scores"] += [(context.progress.step, one["num_correct"], one["cap_tokens"]) for one in records]

        def checkpoint(self, context: Any, saved: Any) -> None:
            if saved.progress.step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    begun = begin.begin_learning(run, groups, attempt)
    if fault:
        (FAULTS | ENGINE_FAULTS | FAILURES)[fault](begun)
    if kill_in:
        _kill_in(begun, *kill_in)
    _watch_order(begun, seen["order"])
    progress = trainer.learn(run, groups, attempt, begun, [MetricsHook(KINDS), Watch()])
    return {**seen, "progress": progress, "digests": training_runs.digests(begun.actor.state)}


def _kill_in(begun: Any, what: str, step: int) -> None:
    """Die at the second call of a step of what polls the engine, or updates; at the first that grades."""
    source, now, calls = begun.source, [0], [0]
    owner, name, at_call = {
        "sampling": (begun.actor.engine, "poll", 2),
        "grading": (source.pool, "grade_all", 1),
        "updates": (begun.actor, "update", 2),
    }[what]
    if owner is None:  # the pool is rank 0's
        return
    next_batch, true = source.next, getattr(owner, name)

    def counted(progress: Any) -> Any:
        now[0], calls[0] = progress.step + 1, 0
        return next_batch(progress)

    def deadly(*arguments: Any) -> Any:
        calls[0] += 1
        if (now[0], calls[0]) == (step, at_call):
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*arguments)

    source.next = counted
    setattr(owner, name, deadly)


def _watch_order(begun: Any, order: list[str]) -> None:
    """Note what the loop asks of engine and trainer, in order."""

    def noted(name: str) -> Any:
        true = getattr(begun.actor, name)

        def call(*arguments: Any) -> Any:
            order.append(name)
            return true(*arguments)

        return call

    for name in ("ask", "answers", "update"):
        setattr(begun.actor, name, noted(name))


def _forget_lengths(begun: Any) -> None:
    begun.progress = replace(begun.progress, lengths=type(begun.progress.lengths)())


def _forget_order(begun: Any) -> None:
    begun.progress = replace(begun.progress, order=replace(begun.progress.order, draws=begun.progress.order.draws + 1))


def _forget_moments(begun: Any) -> None:
    for optimizer in begun.actor.state.optimizer.chained_optimizers:
        for state in optimizer.optimizer.state.values():
            state["exp_avg"].zero_()


class _Elsewhere:
    """Stands for an engine with weights of its own: it samples with those it had when it was asked, whenever its answers are fetched."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._found = engine, []

    def submit(self, requests: Any) -> None:
        self._engine.submit(requests)
        self._found += collect(self._engine, requests)

    def poll(self) -> Any:
        found, self._found = self._found, []
        return found

    def update_weights(self, version: int, tensors: Any) -> None:
        self._engine.update_weights(version, tensors)

    def close(self) -> None:
        self._engine.close()


def _elsewhere(begun: Any) -> None:
    begun.actor.engine = _Elsewhere(begun.actor.engine)


def _refusing_disk(begun: Any) -> None:
    """Where the records should go stands a file."""
    if begun.actor.groups.rank == 0:
        (begun.source.run.path / "rollouts").write_text("")


def _defect_in_grading(begun: Any) -> None:
    if begun.source.pool is not None:
        begun.source.pool.grade_all = lambda _: [][0]


def _defect_in_sampling(begun: Any) -> None:
    """On the last rank alone."""
    if begun.actor.groups.rank == 1:
        begun.actor.engine.poll = lambda: [][0]


FAILURES = {
    "the disk refuses": _refusing_disk, "a defect in grading": _defect_in_grading, "a defect in sampling": _defect_in_sampling,
    "an engine of its own": _elsewhere,
}  # fmt: skip
FAULTS = {"length schedule begins again": _forget_lengths, "other random streams": _forget_order, "moments lost": _forget_moments}
ENGINE_FAULTS: dict[str, Any] = {}  # those that need an engine of its own
