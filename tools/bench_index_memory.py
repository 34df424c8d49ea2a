"""Memory of the index: writing a shard of many tiny documents, and building what training reads of it.

Writing must stay under the bar over the imported process whatever the number of documents. Training's index
(Megatron-Core's GPTDataset: document, sample and shuffle orders) is reported beside it. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS_PER_DOCUMENT = 4
BATCH_DOCUMENTS = 10_000
SEQUENCE_LENGTH = 64
VOCAB_SIZE, EOD = 1000, 0
BAR_MEBIBYTES = 300


def peak_mebibytes() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write(folder: Path, documents: int) -> dict[str, float]:
    """Write the shard; seconds and memory above what the imports took."""
    import numpy as np

    from megatron_ext.data.shards import ShardWriter

    imported, began = peak_mebibytes(), time.perf_counter()
    tokens = np.tile(np.array([1, 2, 3, EOD], dtype=np.int32), BATCH_DOCUMENTS)
    facts = {"source": "tiny", "split": "train", "vocab_size": VOCAB_SIZE, "eod_id": EOD, "bos": False, "tokenizer_hash": "none"}
    with ShardWriter(folder, "train-00000", **facts) as writer:
        for start in range(0, documents, BATCH_DOCUMENTS):
            count = min(BATCH_DOCUMENTS, documents - start)
            ids = [f"document-{i}" for i in range(start, start + count)]
            writer.extend(ids, np.full(count, TOKENS_PER_DOCUMENT), tokens[: count * TOKENS_PER_DOCUMENT])
        writer.finish()
    return _facts(imported, began)


def build(folder: Path) -> dict[str, float]:
    """Build GPTDataset's orders over the shard, one epoch; seconds and memory above what the imports took."""
    import numpy as np
    from megatron.core.datasets import helpers  # noqa: F401 - its import belongs to the imports
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    from megatron_ext.data.shards import Shards

    class Identity:
        """All that the dataset asks of a tokenizer."""

        vocab_size, eod = VOCAB_SIZE, EOD
        unique_identifiers: dict[str, str] = {}

    config = GPTDatasetConfig(
        random_seed=0, sequence_length=SEQUENCE_LENGTH, blend=([str(folder)], None), split="1,0,0", tokenizer=Identity(),
        path_to_cache=str(folder / "cache"), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    imported, began = peak_mebibytes(), time.perf_counter()
    shards = Shards([folder / "train-00000.json"])
    GPTDataset(shards, str(folder), np.arange(len(shards), dtype=np.int32), None, Split.train, config)
    return _facts(imported, began)


def _facts(imported: float, began: float) -> dict[str, float]:
    rise = peak_mebibytes() - imported
    return {"imported_mebibytes": round(imported, 1), "rise_mebibytes": round(rise, 1), "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000_000, help="documents of 4 tokens each (default: 20 million)")
    parser.add_argument("--folder", type=Path, help="a folder that --one works in")
    parser.add_argument("--one", choices=("write", "build"), help="measure one part in --folder (the benchmark calls itself so)")
    arguments = parser.parse_args()
    if arguments.one:
        facts = write(arguments.folder, arguments.documents) if arguments.one == "write" else build(arguments.folder)
        (arguments.folder / f"{arguments.one}.facts").write_text(json.dumps(facts))
        return
    with tempfile.TemporaryDirectory(prefix="bench_index_memory_") as name:
        folder, facts = Path(name), {}
        for part in ("write", "build"):
            command = [sys.executable, __file__, "--one", part, "--folder", name, "--documents", str(arguments.documents)]
            subprocess.run(command, check=True, stdout=sys.stderr)
            facts[part] = json.loads((folder / f"{part}.facts").read_text())
        passed = facts["write"]["rise_mebibytes"] <= BAR_MEBIBYTES
        print(json.dumps({"documents": arguments.documents, **facts, "bar_mebibytes": BAR_MEBIBYTES, "passed": passed}, indent=2))


if __name__ == "__main__":
    main()
