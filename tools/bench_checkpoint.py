"""Measure what saving a checkpoint costs: the digests, the stall of an asynchronous save, and hashing afterwards.

    python tools/bench_checkpoint.py [--bytes N] [--pairs N] [--folder DIR]

One rank saves FP32 tensors of N bytes in all (default 1.5 GB) through the product's own writer, forced
to the disk. Compared in alternating runs, medians of ratios:

    digests      a save with digests / the same with hashing switched off
    beside       seconds until an asynchronous save lets training go on / seconds of the synchronous save
    afterwards   hashing the written files again, serially on one rank, as Megatron-LM's --verify-integrity
                 does after its save / the synchronous save with digests
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ext import device
from megatron_ext.checkpoint import hashing
from megatron_ext.checkpoint.save import Save, Target, begin_save
from megatron_ext.checkpoint.writing import Buffers
from megatron_ext.config.plan import TrainPlan
from megatron_ext.distributed import process_groups
from megatron_ext.provenance import Manifest, read_manifest

PLAN = TrainPlan(device="cpu")
TENSORS = 24  # of equal size; a layer's weight and its moments are such


class _Unhashed(hashing.HashingStream):
    """Writes and hashes nothing."""

    def write(self, data: Any) -> int:
        """Pass the bytes on."""
        self.size_bytes += memoryview(data).nbytes
        return int(self._file.write(data))


class Bench:
    """One rank that saves the same state again and again."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder, self.number = folder, 0
        self.buffers: Buffers = {}
        self.tensors = [torch.randn(size_bytes // 4 // TENSORS) for _ in range(TENSORS)]
        self.size_bytes = sum(tensor.nbytes for tensor in self.tensors)

    def _save(self, beside: bool) -> Save:
        from megatron.core.dist_checkpointing import ShardedTensor

        self.number += 1
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        os.sync()
        state = {f"tensor{i}": ShardedTensor.from_rank_offsets(f"tensor{i}", tensor) for i, tensor in enumerate(self.tensors)}
        save = begin_save(state, Target(self.folder / "checkpoints", self.number, 1, self._manifest), self.buffers if beside else None)
        self.path = save.finish()
        return save

    def _manifest(self, files: hashing.Digests) -> Manifest:
        return Manifest(
            stage="bench", graph="bench", attempt=1, iteration=self.number, tokens=0, lineage_tokens=0, learning_rate=0.0,
            science_hash="", mixture_hash="", tokenizer_hash="", code_hash="", parent=None, ledger=(), optimizer_layout="none",
            plan={}, model={}, files=files,
        )  # fmt: skip

    def with_digests(self) -> float:
        """Seconds of a synchronous save."""
        return self._save(beside=False).seconds

    def without_digests(self) -> float:
        """Seconds of the same save with hashing switched off."""
        true = hashing.HashingStream
        hashing.HashingStream = _Unhashed  # type: ignore[misc]
        try:
            return self._save(beside=False).seconds
        finally:
            hashing.HashingStream = true  # type: ignore[misc]

    def stall(self) -> float:
        """Seconds for which an asynchronous save keeps training waiting."""
        return self._save(beside=True).stall_seconds

    def afterwards(self) -> float:
        """Seconds of a serial SHA-256 over the files just written."""
        self.with_digests()
        started = time.perf_counter()
        for name in read_manifest(self.path).files:
            with (self.path / name).open("rb") as file:
                hashlib.file_digest(file, "sha256")
        return time.perf_counter() - started


def ratios(pairs: int, one: Callable[[], float], other: Callable[[], float]) -> dict[str, Any]:
    """Alternating runs of two measurements: the ratio of each pair, and the medians."""
    rows = []
    for i in range(pairs):
        first, second = (one, other) if i % 2 == 0 else (other, one)
        a, b = first(), second()
        rows.append((a, b) if i % 2 == 0 else (b, a))
    quotients = sorted(a / b for a, b in rows)
    return {
        "ratio_median": round(statistics.median(quotients), 3),
        "ratio_range": [round(quotients[0], 3), round(quotients[-1], 3)],
        "seconds_medians": [round(statistics.median(column), 3) for column in zip(*rows, strict=True)],
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_500_000_000, help="of all tensors (default 1.5e9)")
    parser.add_argument("--pairs", type=int, default=7, help="alternating pairs of each comparison (default 7)")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure (default: the temporary folder)")
    arguments = parser.parse_args()
    device.activate("cpu", 1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, process_groups(PLAN):
        bench = Bench(Path(folder), arguments.bytes)
        bench.with_digests()  # imports and caches
        bench.stall()  # makes the buffers, as a run's first save does
        result = {
            "bytes": bench.size_bytes,
            "digests": ratios(arguments.pairs, bench.with_digests, bench.without_digests),
            "beside": ratios(arguments.pairs, bench.stall, bench.with_digests),
            "afterwards": ratios(arguments.pairs, bench.afterwards, bench.with_digests),
        }
    seconds = result["digests"]["seconds_medians"][0]
    result["save_megabytes_per_second"] = round(bench.size_bytes / seconds / 1e6)
    result["hash_megabytes_per_second"] = round(bench.size_bytes / result["afterwards"]["seconds_medians"][0] / 1e6)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
