"""Measure conversion: memory and time, of a random model with the shape of Llama-3.2-1B, both directions.

    python -m tools.bench_convert [--layers N] [--pairs N] [--folder DIR]

Each measurement is a process of its own that imports what it needs, says so, and then works. Memory is the
largest anonymous resident memory (RssAnon: what is allocated, not mapped files) while it works, less what it was
when all was imported. Compared in alternating runs, medians of ratios: seconds of an import, and of an export,
over those of transformers loading and saving the same model; every side is then forced to the disk (sync), inside
of its time. Each one's output is deleted before the next, so that all write into the same memory of the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MIB = 1 << 20
ALLOWED_MIB = 500
SAMPLE_SECONDS = 0.002


def make_model(folder: Path, layers: int) -> None:
    """Write the random model and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.unit import small_tokenizers

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131_072, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    names = {"bos_token": small_tokenizers.BEGINNING, "eos_token": small_tokenizers.END, "tokenizer_class": "PreTrainedTokenizerFast"}
    small_tokenizers.hugging_face(folder, names=names)


def work(what: str, source: Path, target: Path) -> None:
    """One measured piece of work: import, say so, wait for the word, do it."""
    if what == "transformers":
        from transformers import AutoModelForCausalLM

        go = _ready()
        AutoModelForCausalLM.from_pretrained(str(source), dtype="auto").save_pretrained(str(target))
    elif what == "import":
        from megatron_ext.conversion.to_megatron import hf_to_megatron

        go = _ready()
        with contextlib.redirect_stdout(io.StringIO()):
            hf_to_megatron(str(source), target)
    else:
        from megatron_ext.conversion.to_hugging_face import megatron_to_hf

        go = _ready()
        with contextlib.redirect_stdout(io.StringIO()):
            megatron_to_hf(source, target)
    returned = time.perf_counter() - go
    os.sync()
    print(json.dumps({"returned": returned, "seconds": time.perf_counter() - go}), flush=True)


def _ready() -> float:
    print("ready", flush=True)
    sys.stdin.readline()
    return time.perf_counter()


def measure(what: str, source: Path, target: Path) -> dict[str, float]:
    """Seconds of the work, seconds of the whole process, and peak anonymous MiB over the imported process."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "tools.bench_convert", "--work", what, "--source", str(source), "--target", str(target)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        if process.poll() is not None:
            raise SystemExit(f"{what}: ended with code {process.returncode} before it was ready")
    imported = _anonymous_bytes(process.pid)
    peak = [imported]
    sampler = threading.Thread(target=_sample, args=(process, peak))
    sampler.start()
    print("go", file=process.stdin, flush=True)
    result = json.loads(process.stdout.readline())
    process.wait()
    sampler.join()
    return {**result, "process": time.perf_counter() - began, "mib": (peak[0] - imported) / MIB}


def _sample(process: subprocess.Popen[str], peak: list[int]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            peak[0] = max(peak[0], _anonymous_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has ended")


def main() -> None:
    """Measure, and print each round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="of the model (default: 16, as Llama-3.2-1B)")
    parser.add_argument("--pairs", type=int, default=3, help="alternating rounds (default: 3)")
    parser.add_argument("--folder", type=Path, help="where some 8 GB are written (default: the system's temporary folder)")
    for name in ("work", "source", "target"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, Path(arguments.source), Path(arguments.target))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench_convert-") as temporary:
        _rounds(Path(temporary), arguments.layers, arguments.pairs)


def _rounds(folder: Path, layers: int, pairs: int) -> None:
    source = folder / "source"
    subprocess.run([sys.executable, "-c", f"from tools.bench_convert import *; make_model(Path({str(source)!r}), {layers})"], check=True)
    largest = 128_256 * 2048 * 2
    allowed = 2 * largest / MIB + ALLOWED_MIB
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"{total / 1e9:.2f} GB of BF16; largest tensor {largest / MIB:.0f} MiB; allowed {allowed:.0f} MiB over the imported process")
    checkpoint = folder / "checkpoint"
    measure("import", source, checkpoint)
    rows: dict[str, list[dict[str, float]]] = {"transformers": [], "import": [], "export": []}
    for number in range(pairs + 1):
        for what in rows:
            os.sync()
            found = measure(what, checkpoint if what == "export" else source, folder / "made")
            shutil.rmtree(folder / "made")  # the next one finds the same memory free: new memory is several times slower to write to
            if number:  # the first round warms up
                rows[what].append(found)
                print(what, ", ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
    for what in ("import", "export"):
        for key in ("seconds", "process"):
            ratio = statistics.median(ours[key] / theirs[key] for ours, theirs in zip(rows[what], rows["transformers"], strict=True))
            print(f"{what}: {key} over transformers' {ratio:.2f}")
        print(f"{what}: peak {max(row['mib'] for row in rows[what]):.0f} MiB over the imported process, allowed {allowed:.0f}")


if __name__ == "__main__":
    main()
