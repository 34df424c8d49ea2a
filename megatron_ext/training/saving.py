"""A stage's checkpoints: what the manifest says of the training, when one is written, which are kept.

One save is under way at a time. A synchronous one is settled before the next step; an asynchronous
one when its publish is seen at a step's end, on all ranks at the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_ext.attempts import Attempt
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.hashing import Digests
from megatron_ext.checkpoint.save import Save, Target, begin_save
from megatron_ext.checkpoint.writing import Buffers
from megatron_ext.config.base import content_hash, to_json
from megatron_ext.conversion.assets import carried, has_tokenizer
from megatron_ext.data.prepare import Prepared
from megatron_ext.distributed import Groups, any_rank
from megatron_ext.errors import CheckpointError, DataError, MegatronExtError
from megatron_ext.provenance import Manifest
from megatron_ext.runs import Run
from megatron_ext.snapshot import code_hash
from megatron_ext.tokenizer import TOKENIZER_FILES, load_tokenizer
from megatron_ext.training.guard import GuardState
from megatron_ext.training.hooks import Saved
from megatron_ext.training.start import Began, layout_of
from megatron_ext.training.state import Progress, TrainState, sharded_state


def travelling_files(run: Run, prepared: Prepared, began: Began) -> dict[str, bytes]:
    """Configs and tokenizer that every checkpoint of an attempt carries: those of the checkpoint it began from, else the corpus' tokenizer.

    None where neither has any, which the log says. `DataError` where the corpus' copy is not the tokenizer of its shards.
    """
    assets = carried(began.path) if began.path else {}
    if has_tokenizer(assets):
        return assets
    corpus, folder = prepared.corpus, run.inputs["corpus"] / prepared.corpus.tokenizer_path
    tokenizer = {name: data for name, data in carried(folder).items() if name in TOKENIZER_FILES}
    if not has_tokenizer(tokenizer):
        print(f"WARNING: {folder}: holds no tokenizer, so checkpoints carry none; an export from them will ask for it", flush=True)
        return assets
    found = load_tokenizer(folder).identity_hash
    if found != corpus.tokenizer_hash:
        raise DataError(
            f"{folder}: is tokenizer {found[:12]}, the corpus' shards were made with {corpus.tokenizer_hash[:12]}: the copy was changed; "
            f"bring it back, or run the tokenize stage again"
        )
    return {**assets, **tokenizer}


@dataclass
class Saver:
    """Saves the state of a stage; every rank calls it at the same steps."""

    run: Run
    groups: Groups
    attempt: Attempt
    state: TrainState
    files: Mapping[str, bytes]  # rank 0's: what every checkpoint carries
    _under_way: tuple[Save, Progress] | None = None
    _buffers: Buffers = field(default_factory=dict)

    def begin(self, progress: Progress, layout: str, manifest: Callable[[Digests], Manifest]) -> None:
        """Begin a save of the state as it is; the one before must be settled."""
        assert self._under_way is None, "two saves at a time"
        plan = self.run.stage.plan
        target = Target(
            checkpoints=self.run.checkpoints_path,
            iteration=progress.step,
            attempt=self.attempt.number,
            manifest=manifest,
            may_publish=self.attempt.check_owner,
            files=self.files,
            tidy=partial(folders.prune, self.run.checkpoints_path, plan.keep_checkpoints, self.attempt.number),
        )
        state = sharded_state(self.state, layout)
        self._under_way = begin_save(state, target, self._buffers if plan.asynchronous_saves else None), progress

    def settle(self, wait: bool) -> Saved | None:
        """How the save under way ended, once all ranks know; None where there is none, or where it goes on and `wait` is not set.

        Raises `RunError` where this attempt lost the run folder, and `CheckpointError` for a failed write,
        unless plan.on_failed_save=go_on and it was not the stage's last.
        """
        if self._under_way is None:
            return None
        save, progress = self._under_way
        if not wait and any_rank(not save.is_over(), self.groups):
            return None
        self._under_way = None
        try:
            path = save.finish()
        except CheckpointError as error:
            plan, last = self.run.stage.plan, progress.step == self.run.stage.num_steps
            if plan.on_failed_save == "stop" or last:
                raise
            return Saved(progress, None, save.seconds, save.stall_seconds, f"{error}. Training goes on (plan.on_failed_save=go_on)")
        return Saved(progress, path, save.seconds, save.stall_seconds, save.warning)

    def close(self) -> Saved | None:
        """How a save ended that was under way when training stopped, whatever stopped it."""
        if self._under_way is None:
            return None
        (save, progress), self._under_way = self._under_way, None
        try:
            return Saved(progress, save.finish(), save.seconds, save.stall_seconds, save.warning)
        except MegatronExtError as error:
            return Saved(progress, None, save.seconds, save.stall_seconds, str(error))


def training_manifest(
    run: Run, attempt: Attempt, prepared: Prepared, began: Began, progress: Progress, rate: float, pinned: bool, guard: GuardState,
    files: Digests,
) -> Manifest:  # fmt: skip
    """What a checkpoint of a training stage says of itself."""
    return Manifest(
        **lineage(run, attempt, began, progress, rate, pinned),
        mixture_hash=content_hash(to_json(run.stage.mixture)),
        tokenizer_hash=prepared.corpus.tokenizer_hash,
        ledger=prepared.ledger(progress.step),
        files=files,
        skipped=guard.skipped,
        guard=guard.to_json(),
    )


def lineage(run: Run, attempt: Attempt, began: Began, progress: Progress, rate: float, pinned: bool) -> dict[str, Any]:
    """What the manifests of all stages with weights say alike."""
    stage = run.stage
    return {
        "stage": run.name,
        "graph": run.graph,
        "attempt": attempt.number,
        "iteration": progress.step,
        "tokens": progress.tokens,
        "lineage_tokens": progress.lineage_tokens,
        "learning_rate": rate,
        "science_hash": run.science_hash,
        "code_hash": code_hash(),
        "parent": began.parent,
        "optimizer_layout": layout_of(run, pinned),
        "plan": to_json(stage.plan),
        "model": to_json(stage.model),
        "pinned": pinned,
        "hugging_face": _origin(began.manifest),
    }


def _origin(manifest: Manifest | None) -> dict[str, Any]:
    """The model that a lineage began with, if it was converted: where it came from, and at which commit."""
    found = manifest.hugging_face if manifest else {}
    return {key: found[key] for key in ("source", "revision") if key in found}
