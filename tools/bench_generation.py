"""Measure how fast responses are sampled: the Megatron engine against transformers' `generate`, same weights, ragged lengths.

    python -m tools.bench_generation [--pairs N] [--slots N] [--samples N] [--threads N] [--vllm PYTHON]

The toy of recipes/models.py with a vocabulary of 1,024, FP32, on the CPU. Prompts have 8 to 48 tokens and responses 8 to 160, both
drawn evenly; nothing ends a response but its own length, which neither side is told before. The engine gets all requests at once and
runs `--slots` of them at a time. `generate` gets them in the same order in batches of as many, left-padded, and each batch runs until
its longest response ends, as it must. Both sample at temperature 1 from all tokens. Counted are the tokens of the responses, none that
`generate` computes behind their ends. Runs alternate; printed are the medians and the median of the ratios.

`--vllm PYTHON` measures vLLM beside them, in the interpreter of an environment that has it.

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_TOKENS, RESPONSE_TOKENS = (8, 48), (8, 160)
VOCAB_SIZE = 1024
LEAST_ID = 3  # the smaller ones are special
AGREEMENT = 1e-4  # of the two models' logits, before anything is measured


@dataclass(frozen=True)
class Work:
    """A prompt, and how long its response is."""

    prompt: tuple[int, ...]
    response_tokens: int


def make_work(requests: int, samples: int, seed: int = 0) -> list[Work]:
    """`samples` responses of different lengths to each prompt, one behind the other."""
    draw = random.Random(seed)
    work = []
    for _ in range(requests // samples):
        prompt = tuple(draw.randrange(LEAST_ID, VOCAB_SIZE) for _ in range(draw.randint(*PROMPT_TOKENS)))
        work += [Work(prompt, draw.randint(*RESPONSE_TOKENS)) for _ in range(samples)]
    return work


def make_models(groups: Any, folder: Path) -> tuple[Any, Any, Any]:
    """Megatron's chunks, the model's config, and the same weights in transformers, also saved in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_ext.config.hugging_face import config_from_model
    from megatron_ext.distributed import seed_step
    from megatron_ext.model.build import build_model
    from megatron_ext.model.handover import hugging_face_buckets
    from megatron_ext.model.logits import logits_BSV
    from recipes.models import toy

    model = toy(VOCAB_SIZE)
    seed_step(groups, 0, 0)
    chunks = build_model(model, "fp32", groups, 0)
    (folder / "config.json").write_text(json.dumps(config_from_model(model, "float32", None)))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa").eval()
    weights = {name: tensor for bucket in hugging_face_buckets(chunks, model, groups, 1 << 30) for name, tensor in bucket.tensors}
    lost = theirs.load_state_dict(weights, strict=False)
    assert not lost.unexpected_keys, lost
    assert set(lost.missing_keys) <= {"lm_head.weight"}, lost
    theirs.tie_weights()
    theirs.save_pretrained(folder)
    tokens = torch.arange(LEAST_ID, LEAST_ID + 64).unsqueeze(0)
    with torch.no_grad():
        apart = float((logits_BSV(chunks, tokens, groups, VOCAB_SIZE) - theirs(tokens).logits).abs().max())
    assert apart < AGREEMENT, f"the two models are not the same: {apart}"
    return chunks, model, theirs


def run_engine(chunks: Any, model: Any, groups: Any, tokenizer: Any, work: list[Work], slots: int) -> float:
    """Seconds of the engine for all of the work."""
    from megatron_ext.config.rl import Sampling
    from megatron_ext.generation.engine import Request, generate_all
    from megatron_ext.generation.megatron_engine import MegatronEngine

    requests = [Request(number, one.prompt, one.response_tokens, Sampling(), seed=1) for number, one in enumerate(work)]
    start = time.perf_counter()
    found = generate_all(MegatronEngine(chunks, model, groups, tokenizer, slots), requests)
    seconds = time.perf_counter() - start
    assert [len(one.tokens) for one in found] == [one.response_tokens for one in work]
    return seconds


def run_transformers(theirs: Any, work: list[Work], slots: int) -> float:
    """Seconds of transformers for all of the work."""
    import torch

    start = time.perf_counter()
    for first in range(0, len(work), slots):
        batch = work[first : first + slots]
        longest, new_tokens = max(len(one.prompt) for one in batch), max(one.response_tokens for one in batch)
        ids = torch.tensor([(0,) * (longest - len(one.prompt)) + one.prompt for one in batch])
        mask = torch.tensor([[0] * (longest - len(one.prompt)) + [1] * len(one.prompt) for one in batch])
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        with torch.no_grad():
            found = theirs.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, eos_token_id=None, **options)
        assert found.shape == (len(batch), longest + new_tokens)
    return time.perf_counter() - start


VLLM = """
import json, os, sys, time
os.environ.update(HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
                  VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
import torch
from vllm import LLM, SamplingParams, TokensPrompt
folder, slots, threads, runs = sys.argv[1], *map(int, sys.argv[2:5])
work = json.load(open(folder + "/work.json"))
llm = LLM(folder, dtype="float32", max_model_len=1024, max_num_seqs=slots, enforce_eager=True, skip_tokenizer_init=True, seed=0,
          distributed_executor_backend="uni")
torch.set_num_threads(threads)
prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in work]
settings = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False, logprobs=0) for _, n in work]
for _ in range(runs):
    start = time.perf_counter()
    found = llm.generate(prompts, settings, use_tqdm=False)
    print("seconds", time.perf_counter() - start)
    assert [len(one.outputs[0].token_ids) for one in found] == [n for _, n in work]
llm.llm_engine.engine_core.shutdown()
"""


def run_vllm(python: Path, folder: Path, work: list[Work], slots: int, threads: int, runs: int) -> list[float]:
    """Seconds of vLLM for all of the work, the first run left out: it warms up."""
    (folder / "work.json").write_text(json.dumps([(one.prompt, one.response_tokens) for one in work]))
    command = [str(python), "-c", VLLM, str(folder), str(slots), str(threads), str(runs + 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vLLM failed:\n{done.stderr[-3000:]}")
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds ")][1:]


def measure(arguments: argparse.Namespace, groups: Any, folder: Path) -> None:
    """Run both sides in turn and print."""
    from megatron_ext.tokenizer import load_tokenizer
    from tests.unit import small_tokenizers

    chunks, model, theirs = make_models(groups, folder)
    tokenizer = load_tokenizer(small_tokenizers.hugging_face(folder / "tokenizer"))
    tokenizer.eod_id = -1  # nothing ends a response but its length
    work = make_work(arguments.requests, arguments.samples)
    tokens = sum(one.response_tokens for one in work)
    print(
        f"{len(work)} requests, {arguments.samples} to a prompt, {tokens:,} response tokens in {arguments.slots} slots, "
        f"{arguments.threads} thread(s)",
        flush=True,
    )
    rows = []
    for pair in range(arguments.pairs + 1):
        own = tokens / run_engine(chunks, model, groups, tokenizer, work, arguments.slots)
        other = tokens / run_transformers(theirs, work, arguments.slots)
        if pair:  # the first warms up
            rows.append((own, other))
            print(f"engine {own:8,.0f} tokens/s   transformers {other:8,.0f} tokens/s   ratio {own / other:.2f}", flush=True)
    own, other = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(a / b for a, b in rows)
    print(f"median: engine {own:,.0f} tokens/s, transformers {other:,.0f} tokens/s, ratio {ratio:.2f}")
    if arguments.vllm:
        seconds = run_vllm(arguments.vllm, folder, work, arguments.slots, arguments.threads, arguments.pairs)
        print(f"median: vLLM {tokens / statistics.median(seconds):,.0f} tokens/s")


def main() -> None:
    """Parse, and measure on one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="alternating runs (default: 5)")
    parser.add_argument("--requests", type=int, default=256, help="responses in all (default: 256)")
    parser.add_argument("--samples", type=int, default=8, help="responses to a prompt (default: 8)")
    parser.add_argument("--slots", type=int, default=64, help="responses at a time (default: 64)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (default: 2)")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="an interpreter that has vLLM")
    arguments = parser.parse_args()

    from megatron_ext import device
    from megatron_ext.config.plan import TrainPlan
    from megatron_ext.distributed import process_groups

    device.activate("cpu", arguments.threads)
    with tempfile.TemporaryDirectory() as folder, process_groups(TrainPlan(device="cpu")) as groups:
        measure(arguments, groups, Path(folder))


if __name__ == "__main__":
    main()
