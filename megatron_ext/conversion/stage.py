"""The Convert stage: a Hugging Face model becomes iteration 0 of a run folder, which training stages start from by `weights`."""

from __future__ import annotations

from megatron_ext.attempts import Attempt, attempting
from megatron_ext.checkpoint import folder as folders
from megatron_ext.config.base import to_json
from megatron_ext.config.stages import ConvertStage
from megatron_ext.conversion.hub import Found, find_source
from megatron_ext.conversion.to_megatron import Imported, import_model
from megatron_ext.errors import CheckpointError
from megatron_ext.provenance import Manifest, environment, read_manifest, write_manifest
from megatron_ext.runs import PROVENANCE, Run, atomic_write, force_to_disk, mark_done, write_json
from megatron_ext.snapshot import code_hash
from megatron_ext.tracker import TRACKER, iteration_path, published

ITERATION = 0


def run_convert(run: Run) -> None:
    """Do the work of a convert run: fetch or find the model, convert it, publish, mark it done.

    A conversion that was killed goes on with the files that it had finished. `CheckpointError` where the disk refuses;
    else as `find_source` and `import_model`.
    """
    stage: ConvertStage = run.stage
    with attempting(run) as attempt:
        try:
            if ITERATION not in published(run.checkpoints_path):
                _convert(run, attempt, find_source(stage.model_id, stage.revision, stage.allow_pickle))
            _tidy(run, attempt)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or run.path}: could not be written: {error.strerror or error}; make room on its disk, if that is full, "
                f"and start the stage again: it goes on from what is finished"
            ) from error
        manifest = read_manifest(iteration_path(run.checkpoints_path, ITERATION))
        mark_done(run, {"revision": manifest.hugging_face["revision"], "parameters": stage.model.num_parameters})


def _convert(run: Run, attempt: Attempt, found: Found) -> None:
    stage: ConvertStage = run.stage
    folders.adopt(run.checkpoints_path, attempt.number)
    aside = folders.aside_path(run.checkpoints_path, ITERATION, attempt.number)
    aside.mkdir(parents=True, exist_ok=True)
    imported = import_model(
        found.folder,
        aside,
        name=stage.model.name,
        expected=stage.model,
        allow_pickle=stage.allow_pickle,
        resize_vocabulary=stage.resize_vocabulary,
        say=lambda text: print(text, flush=True),
    )
    record = {"source": found.name, "revision": found.revision, **imported.record}
    write_json(run.path / PROVENANCE, {**environment(), "tokenizer_hash": imported.tokenizer_hash, "hugging_face": record})
    write_manifest(aside, _manifest(run, attempt, imported, record))
    force_to_disk(aside)
    path = folders.publish(run.checkpoints_path, ITERATION, attempt.number, attempt.check_owner)
    print(f"published {path}", flush=True)


def _tidy(run: Run, attempt: Attempt) -> None:
    """What an attempt leaves undone that is killed right after its publish: the tracker, and what it had staged."""
    tracker = run.checkpoints_path / TRACKER
    if not tracker.exists():
        attempt.check_owner()
        atomic_write(tracker, f"{ITERATION}\n")
    folders.revoke(run.checkpoints_path, attempt.number)
    force_to_disk(run.checkpoints_path)


def _manifest(run: Run, attempt: Attempt, imported: Imported, record: dict[str, object]) -> Manifest:
    return Manifest(
        stage=run.name,
        graph=run.graph,
        attempt=attempt.number,
        iteration=ITERATION,
        tokens=0,
        lineage_tokens=0,
        learning_rate=0.0,
        science_hash=run.science_hash,
        mixture_hash="",
        tokenizer_hash=imported.tokenizer_hash,
        code_hash=code_hash(),
        parent=None,
        ledger=(),
        optimizer_layout="none",
        plan=to_json(run.stage.plan),
        model=to_json(imported.model),
        files=imported.files,
        pinned=True,
        hugging_face=record,
    )
