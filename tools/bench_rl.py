"""Measure a step of GRPO on the CPU: our loop against TRL's `GRPOTrainer`, same weights, prompts, groups, caps and grader.

    python -m tools.bench_rl --trl DIR [--rounds N] [--steps N] [--cap N] [--folder DIR]

A step is sampling, grading, one update and the hand-over of the weights; the number is responses a second. The model is the toy of
recipes/models.py with a vocabulary of 1,024, FP32. It is first trained for `--policy-steps` on the demo's worked problems, half of them
short and half of them long, so that its responses end by themselves, at ragged lengths, or at the cap. `--policy-steps 0` takes
weights that know nothing, whose responses nearly all run to the cap.

Every step of both sides asks the same problems and learns at the paper's rate, 1e-6, so that the lengths stay what they were;
they are sampled, not equal, and printed for both sides. Each measurement is a process of its own on two cores: ours as one rank of two
threads and as two data-parallel ranks of one, TRL with two threads. Sides alternate; each one's first steps warm up and are
dropped. Ours is `step_seconds` of metrics.jsonl, TRL's the time from one step's end to the next one's. Printed are medians of rounds
and medians of the rounds' ratios.

TRL is no dependency of this project. DIR holds it beside this environment's own packages:

    pip install --no-deps --target DIR trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 pandas==3.1.1 pyarrow==26.0.1 xxhash==4.1.0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

VOCAB_SIZE = 1024
GROUP = 8
LEARNING_RATE = 1e-6
MAX_PROMPT_TOKENS = 64
LAYOUTS = {"ours, 1 rank x 2 threads": (1, 2), "ours, 2 ranks x 1 thread": (2, 1)}  # ranks and threads of each
TRL = "TRL, 2 threads"
THREADS = 2  # of TRL
BEGINNING, END = "<|begin_of_text|>", "<|end_of_text|>"
LEARNT_PROBLEMS = 128  # those of a step among them: few enough to be learnt in part, so that rewards differ within most groups
SEED = 1
BATCH, POLICY_RATE, INITIAL_DEVIATION = 16, 2e-3, 0.08  # the last as in recipes/demo.py: a toy learns sooner from it
TRL_SETTINGS: dict[str, Any] = {
    "num_generations": GROUP, "num_iterations": 1, "beta": 0.0, "epsilon": 0.2, "loss_type": "dapo", "scale_rewards": "group",
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "generation_kwargs": {"use_cache": True}, "use_vllm": False,
    "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused", "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "dataloader_num_workers": 0,
    "report_to": "none", "logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


# --- the same start for both sides ------------------------------------------------------------------------


def make_start(folder: Path, policy_steps: int, prompts: int) -> None:
    """Weights and tokenizer as a Hugging Face folder, the same weights as a converted run, and the problems; what is there stays."""
    policy = folder / "policy"
    if not (policy / "model.safetensors").is_file():
        shutil.rmtree(policy, ignore_errors=True)
        make_tokenizer(policy)
        make_policy(policy, policy_steps)
    from megatron_ext.config.stages import ConvertStage
    from megatron_ext.conversion.stage import run_convert
    from megatron_ext.runs import write_run
    from recipes.models import toy

    run = write_run(folder / "runs" / "policy", "bench", ConvertStage(name="policy", model_id=str(policy), model=toy(VOCAB_SIZE)), {})
    if not run.is_done():
        run_convert(run)
    write_problems(folder / "problems.jsonl", prompts)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of the worked problems, digits apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[BEGINNING, END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(worked_problems(), trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BEGINNING, "eos_token": END, "pad_token": BEGINNING, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def problems(count: int) -> list[Any]:
    """The first of a seeded sequence of different problems."""
    from megatron_ext.data import arithmetic

    draw, found = random.Random(SEED), {}
    while len(found) < count:
        problem = arithmetic.training_problem(draw)
        found[problem.question] = problem
    return list(found.values())


def worked_problems() -> list[str]:
    """Each problem that the policy learns, in its short and in its long rendering."""
    from megatron_ext.data import arithmetic

    return [rendering(problem) for problem in problems(LEARNT_PROBLEMS) for rendering in (arithmetic.short, arithmetic.long)]


def make_policy(folder: Path, steps: int) -> None:
    """The toy in transformers, trained on the worked problems, saved in `folder` beside its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_ext.config.hugging_face import config_from_model
    from megatron_ext.tokenizer import load_tokenizer
    from recipes.models import toy

    torch.set_num_threads(1)  # the same weights every time
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(folder)
    config = config_from_model(toy(VOCAB_SIZE), "float32", None)
    config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id, "initializer_range": INITIAL_DEVIATION}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    rows = [[*ids, tokenizer.eod_id] for ids in tokenizer.encode_batch(worked_problems())]
    optimizer = torch.optim.AdamW(model.parameters(), lr=POLICY_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    draw = random.Random(SEED)
    for step in range(steps):
        chosen = draw.sample(rows, BATCH)
        longest = max(map(len, chosen))
        ids = torch.tensor([row + [tokenizer.eod_id] * (longest - len(row)) for row in chosen])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in chosen])
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"policy: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)


def write_problems(path: Path, prompts: int) -> None:
    """As many problems as a step asks: every step asks them all."""
    rows = [{"id": str(number), "question": one.question, "answer": one.answer} for number, one in enumerate(problems(prompts))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- ours -------------------------------------------------------------------------------------------------


def run_ours(folder: Path, layout: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """The steps of a run of the loop, as `megatron-ext rl` does it."""
    from megatron_ext.metrics import read_metrics
    from megatron_ext.runs import write_run

    shutil.rmtree(folder / "runs" / "rl", ignore_errors=True)
    run = write_run(folder / "runs" / "rl", "bench", our_stage(folder, layout, arguments), {"start": folder / "runs" / "policy"})
    _checked([sys.executable, "-m", "megatron_ext", "rl", str(run.path)], os.environ)
    records = read_metrics(run.metrics_path, "rl")[arguments.warm_up :]
    parts = {f"{name}_seconds": [record[f"{name}_seconds"] for record in records] for name in ("rollout", "grading", "update")}
    return {
        "seconds": [record["step_seconds"] for record in records],
        "tokens": statistics.mean(record["response_tokens_mean"] for record in records),
        "truncated": statistics.mean(record["truncated_share"] for record in records),
        "right": statistics.mean(record["accuracy"] for record in records),
        "informative": statistics.mean(record["informative_share"] for record in records),
        **parts,
    }


def our_stage(folder: Path, layout: tuple[int, int], arguments: argparse.Namespace) -> Any:
    """One update a step, no validation, a save at the end alone."""
    from megatron_ext.config.rl import CapFrom, ProgressLengths, Rollouts
    from megatron_ext.config.rl_plan import RLPlan
    from megatron_ext.config.stages import RLStage, Weights
    from megatron_ext.config.tasks import ProblemSet, Validation
    from recipes.models import toy

    steps = arguments.warm_up + arguments.steps
    ranks, threads = layout
    return RLStage(
        name="rl",
        start=Weights(stage="policy"),
        model=toy(VOCAB_SIZE),
        problems=ProblemSet(name="arithmetic", path=str(folder / "problems.jsonl"), form="arithmetic"),
        validation=Validation(),
        lengths=ProgressLengths(caps=(CapFrom(after=0, cap_tokens=arguments.cap),)),
        steps=steps,
        template="plain",
        rollouts=Rollouts(
            prompts_per_step=arguments.prompts,
            responses_per_prompt=GROUP,
            prompts_per_update=arguments.prompts,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
        ),
        learning_rate=LEARNING_RATE,
        precision="fp32",
        plan=RLPlan(
            device="cpu",
            ranks_per_node=ranks,
            threads_per_rank=threads,
            tokens_per_micro_batch=arguments.micro_batch_tokens,
            skip_uninformative=not arguments.all_samples,
            grading_workers=1,
            save_every_steps=steps,
            validate_every_steps=steps,
        ),
    )


# --- TRL --------------------------------------------------------------------------------------------------


def run_trl(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of TRL's."""
    names = ("prompts", "cap", "warm_up", "steps", "trl_micro_batch")
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    command = [sys.executable, "-m", "tools.bench_rl", "--trl", str(arguments.trl), "--folder", str(folder), *words, "--work"]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(THREADS))
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, Any] = json.loads(_checked(command, environment).splitlines()[-1])
    return found


def work(folder: Path, arguments: argparse.Namespace) -> None:
    """Train with TRL, and print what it took."""
    sys.path.append(str(arguments.trl))  # behind this environment's packages
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from megatron_ext.tasks.grading import grade
    from megatron_ext.tasks.problems import read_problems
    from megatron_ext.tasks.reward import REWARDS
    from megatron_ext.tasks.templates import template

    torch.set_num_threads(THREADS)
    asked, plain = read_problems(folder / "problems.jsonl", "arithmetic"), template("plain")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    prompts = [plain.prompt(problem.question) for problem in asked]
    check_prompts(folder, tokenizer, prompts)
    lengths: list[list[int]] = []
    rights: list[float] = []
    truncated: list[float] = []
    informative: list[float] = []

    def reward(completions: list[str], completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        """Our grader, in this process: that is faster than sending an answer to another."""
        verdicts = [grade(asked[one], text) for one, text in zip(number, completions, strict=True)]
        lengths.append([len(ids) for ids in completion_ids])
        rights.append(statistics.mean(verdict.is_correct for verdict in verdicts))
        truncated.append(statistics.mean(ids[-1] != tokenizer.eos_token_id for ids in completion_ids))
        earned = {(one, verdict.is_correct) for one, verdict in zip(number, verdicts, strict=True)}
        informative.append(len(earned) / len(asked) - 1)
        return [REWARDS["correct"](verdict, text) for verdict, text in zip(verdicts, completions, strict=True)]

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    responses = arguments.prompts * GROUP
    size = arguments.trl_micro_batch or responses
    steps = arguments.warm_up + arguments.steps
    with tempfile.TemporaryDirectory() as output:
        settings = GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=responses // size,
            max_completion_length=arguments.cap,
            max_steps=steps,
            **TRL_SETTINGS,
        )
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32, attn_implementation="sdpa"),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts, "number": list(range(len(asked)))}),
            processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()
    assert len(ends) == len(lengths) == steps, "one generation a step"
    assert all(len(row) == responses for row in lengths), "all responses of a step at once"
    found = {
        "seconds": [later - earlier for earlier, later in pairwise(ends)][arguments.warm_up - 1 :],
        "tokens": statistics.mean(length for row in lengths[arguments.warm_up :] for length in row),
        "truncated": statistics.mean(truncated[arguments.warm_up :]),
        "right": statistics.mean(rights[arguments.warm_up :]),
        "informative": statistics.mean(informative[arguments.warm_up :]),
    }
    print(json.dumps(found), flush=True)


def check_prompts(folder: Path, tokenizer: Any, prompts: list[str]) -> None:
    """Both sides see the same ids."""
    from megatron_ext.tokenizer import load_tokenizer

    ours, theirs = load_tokenizer(folder / "policy").encode_batch(prompts), tokenizer(text=prompts)["input_ids"]
    assert ours == theirs, "the two tokenizers make different prompts"


# --- both -------------------------------------------------------------------------------------------------


def _checked(command: list[str], environment: Any) -> str:
    """What a process printed; the end of what it said where it failed."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


class Others:
    """What the machine's other processes take from here on; Linux alone tells."""

    def __init__(self) -> None:
        self._start, self._seconds = time.perf_counter(), self._of_others()

    def cores(self) -> float:
        """Their processor seconds a second."""
        return (self._of_others() - self._seconds) / (time.perf_counter() - self._start)

    @staticmethod
    def _of_others() -> float:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system = map(int, words[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """All sides in turn, and the medians."""
    responses = arguments.prompts * GROUP
    print(f"{arguments.prompts} prompts x {GROUP} responses of at most {arguments.cap} tokens, {arguments.steps} steps a round", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in (*LAYOUTS, TRL)}
    for number in range(arguments.rounds):
        for name in rates if number % 2 == 0 else reversed(rates):
            others = Others()
            found = run_trl(folder, arguments) if name == TRL else run_ours(folder, LAYOUTS[name], arguments)
            seconds = statistics.median(found["seconds"])
            rates[name].append(responses / seconds)
            parts = {key: statistics.median(values) for key, values in found.items() if key.endswith("_seconds")}
            split = "".join(f", {key.removesuffix('_seconds')} {value:.3f}" for key, value in parts.items())
            print(
                f"round {number + 1}: {name}: {responses / seconds:7.1f} responses/s, step {seconds:.3f} s{split}; "
                f"{found['tokens']:.1f} tokens a response, {found['truncated']:.2f} cut off, {found['right']:.2f} right, "
                f"{found['informative']:.2f} of the groups differ; others took {others.cores():.2f} cores",
                flush=True,
            )
    print(f"median: {TRL} {statistics.median(rates[TRL]):.1f} responses/s")
    for name in LAYOUTS:
        ratios = [own / other for own, other in zip(rates[name], rates[TRL], strict=True)]
        print(
            f"median: {name} {statistics.median(rates[name]):.1f} responses/s, {statistics.median(ratios):.2f}x TRL "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    """Make the start, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, metavar="DIR", help="the folder that holds TRL; how to make it stands above")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default: 5)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a round (default: 8)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them, at least 1 (default: 2)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a step, 8 responses to each (default: 32)")
    parser.add_argument("--cap", type=int, default=64, help="response tokens, at most (default: 64)")
    parser.add_argument("--policy-steps", type=int, default=300, help="training of the policy before all (default: 300)")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="of our update (default: 4096, as the demo)")
    parser.add_argument("--all-samples", action="store_true", help="our update passes groups without a difference too, as TRL's does")
    parser.add_argument(
        "--trl-micro-batch", type=int, default=64, help="responses in one pass of TRL's update (default: 64; 0: all of them)"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where the policy is kept, and used again as it is (default: a temporary one)"
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.warm_up < 1:
        parser.error("--warm-up: TRL's first step has no step before it to count from; at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        if arguments.work:
            work(folder, arguments)
            return
        make_start(folder, arguments.policy_steps, arguments.prompts)
        measure(folder, arguments)


if __name__ == "__main__":
    main()
