"""The Convert stage: a Hugging Face model becomes iteration 0 of a run folder, which training stages start from by `weights`."""

from __future__ import annotations

from megatron_ext.attempts import Attempt, attempting
from megatron_ext.checkpoint import folder as folders
from megatron_ext.config.base import to_json
from megatron_ext.config.stages import ConvertStage
from megatron_ext.conversion.hub import Found, find_source
from megatron_ext.conversion.to_megatron import Imported, import_model
from megatron_ext.provenance import Manifest, environment, write_manifest
from megatron_ext.runs import PROVENANCE, Run, force_to_disk, mark_done, write_json
from megatron_ext.snapshot import code_hash
from megatron_ext.tracker import published

ITERATION = 0


def run_convert(run: Run) -> None:
    """Do the work of a convert run: fetch or find the model, convert it, publish, mark it done.

    A conversion that was killed goes on with the files that it had finished. Raises what `find_source` and `import_model` do.
    """
    stage: ConvertStage = run.stage
    with attempting(run) as attempt:
        found = find_source(stage.model_id, stage.revision, stage.allow_pickle)
        if not published(run.checkpoints_path):
            _convert(run, attempt, found)
        mark_done(run, {"revision": found.revision, "parameters": stage.model.num_parameters})


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
