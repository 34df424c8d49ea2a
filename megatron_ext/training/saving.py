"""A stage's checkpoints: what the manifest says of the training, when one is written, which are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.save import Digests, save_checkpoint
from megatron_ext.config.base import content_hash, to_json
from megatron_ext.data.prepare import Prepared
from megatron_ext.distributed import Groups
from megatron_ext.provenance import Manifest
from megatron_ext.runs import Attempt, Run
from megatron_ext.snapshot import code_hash
from megatron_ext.training.start import Began, layout_of
from megatron_ext.training.state import Progress, sharded_state


@dataclass
class Saver:
    """Saves the state of a stage; every rank calls it at the same steps."""

    run: Run
    groups: Groups
    attempt: Attempt
    prepared: Prepared
    began: Began

    def save(self, progress: Progress, rate: float, pinned: bool) -> Path:
        """Write and publish a checkpoint, then remove those that need not be kept."""
        layout = layout_of(self.run, pinned)

        def manifest(files: Digests) -> Manifest:
            return self._manifest(progress, rate, layout, pinned, files)

        state = sharded_state(self.began.state, layout)
        path = save_checkpoint(state, self.run.checkpoints_path, progress.step, self.attempt.number, manifest)
        if self.groups.rank == 0:
            folders.prune(self.run.checkpoints_path, self.run.stage.plan.keep_checkpoints)
        return path

    def _manifest(self, progress: Progress, rate: float, layout: str, pinned: bool, files: Digests) -> Manifest:
        stage = self.run.stage
        return Manifest(
            stage=self.run.name,
            graph=self.run.graph,
            attempt=self.attempt.number,
            iteration=progress.step,
            tokens=progress.tokens,
            lineage_tokens=progress.lineage_tokens,
            learning_rate=rate,
            science_hash=self.run.science_hash,
            mixture_hash=content_hash(to_json(stage.mixture)),
            tokenizer_hash=self.prepared.corpus.tokenizer_hash,
            code_hash=code_hash(),
            parent=self.began.parent,
            ledger=self.prepared.ledger(progress.step),
            optimizer_layout=layout,  # type: ignore[arg-type]
            plan=to_json(stage.plan),
            model=to_json(stage.model),
            files=files,
            pinned=pinned,
        )
