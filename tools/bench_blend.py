"""Measures the indices of the paper's stable stage: 200B tokens from its six sources, sequences of 8,192.

    python -m tools.bench_blend [--tokens 200e9] [--folder DIR]

Cold: builds every epoch's index and the blend. Warm: opens them in a fresh process and reads one
batch's sequences. Document sizes are synthetic (log-normal), so no text is needed; imports are not
counted in seconds. Peak bytes are the process's resident set: mapped pages of the index files too.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.index_cache import IndexCache
from megatron_ext.data.streams import Blend, SourceStream
from recipes.mixtures import STABLE

SEQUENCE_LENGTH, SEQUENCES_PER_BATCH = 8192, 512
SPREAD = 0.9  # of the logarithm of document sizes: the larger half of the documents holds 82 % of the tokens
BILLION = 10**9
# Source -> (tokens, mean tokens a document). Token counts are the data sets' own; of DCLM a part. The mean of
# Web-Pro-Max is its 73.8B tokens over its 69.2M documents; the other means are assumptions.
BODIES = {
    "megamath_web_pro_max": (73.8 * BILLION, 1_066),
    "dclm_baseline": (22.0 * BILLION, 1_300),
    "megamath_text_code_block": (50.3 * BILLION, 2_000),
    "megamath_qa": (7.0 * BILLION, 1_000),
    "megamath_code": (28.1 * BILLION, 3_000),
    "megamath_translated_code": (7.2 * BILLION, 3_000),
}


@dataclass
class SyntheticTokens:
    """Document sizes without documents; every token is the same."""

    path: Path
    num_tokens: int
    digest: str

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each document, int32, memory-mapped like a shard's index."""
        lengths: np.ndarray = np.load(self.path, mmap_mode="r")
        return lengths

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """As many tokens as a shard would give."""
        return np.zeros(int(self.sequence_lengths[index]) - offset if length is None else int(length), dtype=np.int32)

    def document_id(self, index: int) -> str:
        """The document's number."""
        return str(index)


def write_sizes(folder: Path, tokens: float) -> dict[str, float]:
    """Write document sizes for a stage of `tokens` tokens; the sources' own sizes shrink with it."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = 0
    facts = {}
    for number, (source, (whole, mean)) in enumerate(BODIES.items()):
        count = round(whole * tokens / (200 * BILLION) / mean)
        sizes = np.random.default_rng(number).lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, count)
        lengths = np.clip(sizes, 16, 200_000).astype(np.int32)
        np.save(folder / f"{source}.npy", lengths)
        facts[source] = {"tokens": int(lengths.sum(dtype=np.int64)), "documents": len(lengths)}
        documents += len(lengths)
    (folder / "facts.json").write_text(json.dumps(facts))
    return {"documents": documents}


def open_blend(folder: Path, tokens: float, may_build: bool) -> Blend:
    """The stable stage's blend over the sizes in `folder`; its indices lie in `folder`/indices."""
    facts = json.loads((folder / "facts.json").read_text())
    cache = IndexCache(folder / "indices", may_build=may_build, way_out="run the cold phase first")
    streams = [
        SourceStream(
            source=row.source,
            tokens=SyntheticTokens(folder / f"{row.source}.npy", facts[row.source]["tokens"], f"synthetic {facts[row.source]}"),
            cache=cache,
            order_seed=1234,
            sequence_length=SEQUENCE_LENGTH,
            tokenizer_hash="synthetic",
        )
        for row in STABLE.rows
    ]
    size = round(tokens / (SEQUENCE_LENGTH * SEQUENCES_PER_BATCH)) * SEQUENCES_PER_BATCH
    blend = Blend(streams, [row.weight for row in STABLE.rows], size, cache)
    blend.cover()
    return blend


def measure(folder: Path, tokens: float, phase: str) -> dict[str, float]:
    """Run one phase in this process: seconds, and peak resident bytes before and after it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    blend = open_blend(folder, tokens, may_build=phase == "cold")
    opened = time.perf_counter() - start
    middle = len(blend) // 2
    read = [blend[i]["text"].shape[0] for i in range(middle, min(middle + SEQUENCES_PER_BATCH, len(blend)))]
    seconds = time.perf_counter() - start
    assert set(read) == {SEQUENCE_LENGTH + 1}
    counting = time.perf_counter()
    blend.counts(len(blend))
    return {
        "open_seconds": round(opened, 3),
        "open_and_first_batch_seconds": round(seconds, 3),
        "ledger_at_end_seconds": round(time.perf_counter() - counting, 3),
        "imports_peak_bytes": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "sequences": len(blend),
    }


def main() -> None:
    """Parse, write the sizes, run each phase in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=200e9, help="tokens of the stage (default 200e9)")
    parser.add_argument("--folder", type=Path, help="where sizes and indices go (default: a temporary folder, removed)")
    parser.add_argument("--phase", choices=("sizes", "cold", "warm"), help="run one phase in this process, in this order, on one folder")
    arguments = parser.parse_args()
    if arguments.phase:
        result: dict[str, Any] = (
            write_sizes(arguments.folder, arguments.tokens) if arguments.phase == "sizes" else measure(**vars(arguments))
        )
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        result = {"tokens": arguments.tokens}
        for phase in ("sizes", "cold", "warm"):  # each in a process of its own, for its peak memory
            command = [sys.executable, "-m", "tools.bench_blend", "--phase", phase]
            command += ["--folder", str(folder), "--tokens", str(arguments.tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result[phase] = json.loads(done.stdout.splitlines()[-1])
        result["index_bytes"] = sum(path.stat().st_size for path in (folder / "indices").rglob("*.npy"))
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
