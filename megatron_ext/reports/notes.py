"""What a reader must know before believing the page: what is missing, unfinished or odd. Pure."""

from __future__ import annotations

from megatron_ext.provenance import Parent
from megatron_ext.reports.format import listed, many
from megatron_ext.reports.read import Reading, StageData
from megatron_ext.reports.rl_notes import rl_findings
from megatron_ext.reports.tables import mixture_row, number, parent_name, steps_done
from megatron_ext.snapshot import code_words


def notes(reading: Reading) -> list[str]:
    """One line a finding, with all stages that it is true of; empty where all is finished and measured."""
    stages_of: dict[str, list[str]] = {}
    for findings in (_state, _measurement, rl_findings):
        for stage in reading.stages:
            for line in findings(stage):
                stages_of.setdefault(line, []).append(stage.name)
    for stage in reading.learning:
        for line in _parent(reading, stage):
            stages_of.setdefault(line, []).append(stage.name)
    lines = [f"{listed(stages)}: {line}" for line, stages in stages_of.items()]
    if reading.training and not any(s.config.start.kind == "branch" for s in reading.training):
        lines.append("No stage here branches from another; where the page would compare branches, it shows every training stage.")
    if not reading.learning:
        lines.append("No training stage is among the stages of this report.")
    return lines


def _state(stage: StageData) -> list[str]:
    lines = []
    if stage.state == "missing":
        lines.append("the run folder is missing, so nothing of it is shown.")
    elif stage.state == "not begun":
        lines.append("not begun.")
    elif stage.state == "begun":
        learns = stage.is_training or stage.is_rl
        reach = f" (step {steps_done(stage):,} of {stage.config.num_steps:,})" if learns else ""
        lines.append(f"not finished{reach}; the numbers are of what was done so far.")
    if stage.tracker_damage:
        lines.append(f"its newest checkpoint is taken from the folders' names, because the tracker is damaged: {stage.tracker_damage}.")
    for attempt in stage.attempts:
        if attempt.reason not in ("", "done"):
            cause = f": {attempt.error}" if attempt.error else ""
            lines.append(f"attempt {attempt.number} ended as '{attempt.reason}'{cause}.")
        if attempt.fallback:
            back = f"{attempt.fallback['from'] or 'a damaged tracker'} to {attempt.fallback['to']}: {attempt.fallback['reason']}"
            lines.append(f"attempt {attempt.number} fell back from {back}.")
    if codes := code_words({a.number: a.code_hash for a in stage.attempts if a.code_hash}):
        lines.append(f"ran under more than one code: {codes}.")
    plans = [a.plan for a in stage.attempts if a.plan]
    if (stage.is_training or stage.is_rl) and any(plan != plans[0] for plan in plans):
        lines.append("ran under more than one plan; the throughput is the median over all steps.")
    return lines


def _measurement(stage: StageData) -> list[str]:
    if not stage.is_training or stage.state not in ("done", "begun"):
        return []
    lines = []
    row = mixture_row(stage)
    if not stage.validation:
        lines.append("no held-out measurement.")
    elif row.unmeasured_sources:
        names = listed(list(row.unmeasured_sources))
        lines.append(f"no held-out loss of {names}, so the held-out loss of the mixture is not known.")
    elif stage.state == "done" and row.end_step != steps_done(stage):
        lines.append(f"the last held-out measurement is of step {row.end_step or 0:,}, not of the last step ({steps_done(stage):,}).")
    recorded = stage.train[-1]["step"] if stage.train else 0
    if stage.manifest is None:
        lines.append("no checkpoint yet, so the token ledger is not shown.")
    elif stage.manifest.iteration < recorded:
        behind = many(recorded - stage.manifest.iteration, "step")
        lines.append(f"the newest checkpoint, and so the token ledger, is {behind} behind the metrics.")
    if stage.train and not any(number(r, "mfu") for r in stage.train):
        lines.append("no MFU, because the peak of the device is not known.")
    return lines


def _parent(reading: Reading, stage: StageData) -> list[str]:
    parent = reading.find(parent_name(stage) or "")
    recorded = stage.manifest.parent if stage.manifest else None
    if parent is None or recorded is None or not parent.science_hash:
        return []
    if parent.science_hash == recorded.science_hash:
        return _parent_checkpoint(stage, recorded)
    return [f"made from a '{parent.name}' of science {recorded.science_hash[:12]}, but the one shown here is {parent.science_hash[:12]}."]


def _parent_checkpoint(stage: StageData, recorded: Parent) -> list[str]:
    name = f"the checkpoint of '{recorded.stage}' at {recorded.tokens:,} tokens that it started from"
    if not stage.parent_sha256:
        return [f"{name} is gone."]
    if recorded.manifest_sha256 in (stage.parent_sha256, stage.parent_thinned_from):
        return []
    return [f"{name} was changed since: its manifest hashes to {stage.parent_sha256[:12]}, recorded is {recorded.manifest_sha256[:12]}."]
