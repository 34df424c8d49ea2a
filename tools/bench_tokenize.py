"""Speed of the tokenize stage beside datatrove's MegatronDocumentTokenizer: same text, same tokenizer, 2 processes each.

The text is the standard library's source cut into documents, the tokenizer a byte-level BPE trained on it. The two
take turns, each run in a fresh process; both token streams must be equal. CPU time stands beside the
clock: on a busy machine the clock favours whoever starts more threads. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil

WORKERS = 2
EOD = "<|endoftext|>"
SOURCE = "code"
CHARACTERS_PER_DOCUMENT = 3000  # about a web page
SEED = 0
POLL_SECONDS = 0.05
FASTER_AT_LEAST = 1.0  # the bar: not slower than datatrove


def write_text(folder: Path, megabytes: float) -> int:
    """Two JSONL files of documents, together at least `megabytes`; the number of documents."""
    documents: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        documents += [text[i : i + CHARACTERS_PER_DOCUMENT] for i in range(0, len(text), CHARACTERS_PER_DOCUMENT)]
    random.Random(SEED).shuffle(documents)
    documents = [document for document in documents if document.strip() and EOD not in document]
    folder.mkdir(parents=True)
    count = 0
    for part in range(WORKERS):
        size, chosen = 0, documents[part::WORKERS]
        with (folder / f"part-{part}.jsonl").open("w", encoding="utf-8") as file:
            while size < megabytes * 1e6 / WORKERS:
                size += file.write(json.dumps({"id": str(count), "text": chosen[count // WORKERS % len(chosen)]}) + "\n")
                count += 1
    return count


def train_tokenizer(folder: Path, text: Path, vocab_size: int) -> None:
    """A byte-level BPE of `vocab_size` ids, trained on a part of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False)
    with (text / "part-0.jsonl").open(encoding="utf-8") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line, _ in zip(file, range(1000), strict=False)), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def run_ours(work: Path, out: Path) -> float:
    """Seconds of the tokenize stage."""
    from megatron_ext.config.stages import Source, TokenizeStage, WorkersPlan
    from megatron_ext.data.tokenize import run_tokenize
    from megatron_ext.runs import write_run

    source = Source(name=SOURCE, paths=(str(work / "text" / "*.jsonl"),), max_epochs=1.0)
    stage = TokenizeStage(name="bench", sources=(source,), tokenizer=str(work / "tokenizer"), plan=WorkersPlan(workers=WORKERS))
    run = write_run(out, "bench", stage, {})
    began = time.perf_counter()
    run_tokenize(run)
    return time.perf_counter() - began


def run_datatrove(work: Path, out: Path) -> float:
    """Seconds of datatrove's pipeline: its JSONL reader and its Megatron writer, as they come."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    tokenizer = str(work / "tokenizer" / "tokenizer.json")
    steps = [
        JsonlReader(str(work / "text")),
        MegatronDocumentTokenizer(str(out / "shards"), tokenizer_name_or_path=tokenizer, eos_token=EOD),
    ]
    began = time.perf_counter()
    LocalPipelineExecutor(steps, tasks=WORKERS, workers=WORKERS, logging_dir=str(out / "logs")).run()
    return time.perf_counter() - began


SYSTEMS = {"ours": run_ours, "datatrove": run_datatrove}


def token_bytes(out: Path) -> bytes:
    """All tokens a run wrote, in order."""
    return b"".join(path.read_bytes() for path in sorted(out.glob("shards/**/*.bin")))


def measure(work: Path, system: str) -> tuple[float, float, bytes]:
    """Run one system in a fresh process: (seconds, seconds of CPU time of all its processes, its tokens)."""
    out = work / system
    shutil.rmtree(out, ignore_errors=True)
    process = psutil.Popen([sys.executable, __file__, "--one", system, "--folder", str(work)], stdout=sys.stderr)
    cpu_seconds: dict[int, float] = {}
    while process.poll() is None:  # processes that are gone keep what they had when last seen
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                cpu_seconds[one.pid] = times.user + times.system
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{system} failed with exit code {process.returncode}")
    return float((out / "seconds").read_text()), sum(cpu_seconds.values()), token_bytes(out)


def bench(work: Path, megabytes: float, rounds: int, vocab_size: int) -> dict[str, object]:
    """Alternate the two systems and compare their medians."""
    documents = write_text(work / "text", megabytes)
    train_tokenizer(work / "tokenizer", work / "text", vocab_size)
    seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    cpu: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for turn in range(rounds):
        tokens = {}
        for system in list(SYSTEMS)[:: 1 if turn % 2 == 0 else -1]:
            taken, used, tokens[system] = measure(work, system)
            seconds[system].append(round(taken, 2))
            cpu[system].append(round(used, 2))
        if tokens["ours"] != tokens["datatrove"]:
            raise SystemExit(f"the token streams differ: {len(tokens['ours'])} and {len(tokens['datatrove'])} bytes")
    wall, used_cpu = ({system: statistics.median(values) for system, values in rows.items()} for rows in (seconds, cpu))
    size = sum(path.stat().st_size for path in (work / "text").iterdir())
    ratio = wall["datatrove"] / wall["ours"]
    return {
        "documents": documents, "text_megabytes": round(size / 1e6, 1), "million_tokens": round(len(tokens["ours"]) / 2e6, 2),
        "workers": WORKERS, "cores": os.cpu_count(), "token_streams": "equal",
        "seconds": seconds, "median_seconds": wall, "cpu_seconds": cpu, "median_cpu_seconds": used_cpu,
        "ours_megabytes_per_second": round(size / 1e6 / wall["ours"], 2),
        "speed_over_datatrove": round(ratio, 3), "cpu_of_datatrove_over_ours": round(used_cpu["datatrove"] / used_cpu["ours"], 3),
        "bar": FASTER_AT_LEAST, "passed": ratio >= FASTER_AT_LEAST,
    }  # fmt: skip


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=24.0, help="text to tokenize (default: 24)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system (default: 3)")
    parser.add_argument("--vocab-size", type=int, default=8000, help="ids of the tokenizer (default: 8000)")
    parser.add_argument("--folder", type=Path, help="a folder that --one works in")
    parser.add_argument("--one", choices=list(SYSTEMS), help="run one system once in --folder (the benchmark calls itself so)")
    arguments = parser.parse_args()
    if arguments.one:
        out = arguments.folder / arguments.one
        taken = SYSTEMS[arguments.one](arguments.folder, out)
        (out / "seconds").write_text(str(taken))
        return
    with tempfile.TemporaryDirectory(prefix="bench_tokenize_") as folder:
        print(json.dumps(bench(Path(folder), arguments.megabytes, arguments.rounds, arguments.vocab_size), indent=2))


if __name__ == "__main__":
    main()
