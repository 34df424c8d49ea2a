"""Small checkpoints for tests: manifests, files that fit one, and one tensor and one byte entry saved through `save_checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.verify import verify
from megatron_ext.config.base import content_hash
from megatron_ext.provenance import Manifest, file_sha256, read_manifest, write_manifest

TOKENS_PER_STEP = 128
CONTENT = {".metadata": b"m" * 300, "common.pt": b"c" * 20, "metadata.json": b"{}", "__0_0.distcp": b"0" * 999, "__1_0.distcp": b"1" * 500}


def manifest(iteration: int, **changes: Any) -> Manifest:
    """A manifest of `iteration` steps; `changes` override its values."""
    values: dict[str, Any] = {
        "stage": "stable", "graph": "test", "attempt": 1, "iteration": iteration, "tokens": iteration * TOKENS_PER_STEP,
        "lineage_tokens": iteration * TOKENS_PER_STEP, "learning_rate": 1e-3, "science_hash": content_hash("s"),
        "mixture_hash": content_hash("m"), "tokenizer_hash": content_hash("t"), "code_hash": content_hash("c"), "parent": None,
        "ledger": (), "optimizer_layout": "dp_reshardable", "plan": {}, "model": {}, "files": {},
    }  # fmt: skip
    return Manifest(**{**values, **changes})


def write_files(folder: Path, iteration: int, **changes: Any) -> Path:
    """A checkpoint under `folder` that is whole by its manifest; its files are nobody's format, so nothing can load it."""
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    for name, content in CONTENT.items():
        (path / name).write_bytes(content)
    files = {name: (len(content), file_sha256(path / name)) for name, content in CONTENT.items()}
    write_manifest(path, manifest(iteration, **{"files": files, **changes}))
    return path


def small_state(entry: Any = None) -> dict[str, Any]:
    """A sharded tensor `weight` of 0..7, a sharded object `entry`, and a plain value."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return {
        "weight": ShardedTensor.from_rank_offsets("weight", torch.arange(8.0)),
        "entry": ShardedObject("entry", entry, (1,), (0,)),
        "plain": 3,
    }


def extra_state(value: Any = None) -> dict[str, Any]:
    """What a layer of Transformer Engine adds to a state: a sharded object under Megatron's name for it."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return {"extra": ShardedObject("decoder.layers.self_attention.linear_qkv._extra_state", value, (1,), (0,))}


def save_small(folder: Path, entry: Any = None, **more: Any) -> Path:
    """Save `small_state` and `more` as iteration 1 under `folder`; one rank's process group must run."""
    from megatron_ext.checkpoint.save import Target, save_checkpoint

    return save_checkpoint({**small_state(entry), **more}, Target(folder, 1, 1, lambda digests: manifest(1, files=digests)))


def sign_again(checkpoint: Path) -> None:
    """Make the manifest true of the files as they are now: who alters a file can alter the manifest."""
    old = read_manifest(checkpoint)
    files = {name: ((checkpoint / name).stat().st_size, file_sha256(checkpoint / name)) for name in old.files}
    write_manifest(checkpoint, manifest(old.iteration, files=files))


def data_digests(checkpoint: Path) -> dict[str, str]:
    """Digests of a checkpoint's data files, read from the disk: weights and moments of all ranks, bit for bit."""
    return {name: digest for name, digest in verify(checkpoint).files.items() if name.endswith(".distcp")}
