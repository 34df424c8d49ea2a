"""The report's tree of starts, and what it says of code, fall-backs, parents that changed and the newest checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

from megatron_ext.config.stages import Branch
from megatron_ext.provenance import file_sha256, read_manifest, write_manifest
from megatron_ext.reports.notes import notes
from megatron_ext.reports.read import gather
from megatron_ext.runs import Run, write_json
from tests.unit.test_reports import LONG, STAGES, TOKENS, build, draw, manifest_of


def test_the_tree_of_starts_stands_in_the_order_of_the_branch_points(tmp_path) -> None:
    early = replace(LONG, name="early", start=Branch(stage="stable", tokens=4 * TOKENS))
    page, summary = draw(build(tmp_path, finished=4, stages=(*STAGES, early)))
    assert [(r["mark"], r["stage"]) for r in summary["tree"]] == [
        ("", "base"), ("└─ ", "stable"), ("   ├─ ", "early"), ("   ├─ ", "long"), ("   └─ ", "short"),
    ]  # fmt: skip
    cells = page.split("Where each stage starts")[1].split("</table>")[0]
    assert "&nbsp;&nbsp;&nbsp;├─&nbsp;</code>" in cells
    assert re.search(r"early</span></td><td>stable</td><td>weights and optimizer</td><td[^>]*>1.024k<", cells), cells


def said(runs: dict[str, Run]) -> list[str]:
    """What the page says before everything else."""
    return notes(gather(runs["report"]))


def test_other_code_fall_backs_and_a_changed_parent_are_said_first(tmp_path) -> None:
    runs = build(tmp_path)
    assert not any("code" in note or "started from" in note for note in said(runs))
    second = runs["stable"].path / "attempts" / "2"
    began = json.loads((second / "plan.json").read_text())
    write_json(second / "plan.json", {**began, "code_hash": "b" * 64})
    write_json(second / "fallback.json", {"from": "iter_0000007", "to": "iter_0000005", "reason": "a byte differs"})
    manifest = read_manifest(manifest_of(runs["stable"]).parent)
    old = file_sha256(manifest_of(runs["stable"]))
    write_manifest(manifest_of(runs["stable"]).parent, replace(manifest, thinned_from=old))  # no other weights
    lines = said(runs)
    assert f"stable: ran under more than one code: attempt 1 ran code {began['code_hash'][:12]}, attempt 2 ran code bbbbbbbbbbbb." in lines
    assert "stable: attempt 2 fell back from iter_0000007 to iter_0000005: a byte differs." in lines
    assert not any("started from" in line for line in lines)
    write_manifest(manifest_of(runs["stable"]).parent, replace(manifest, learning_rate=5.0))  # trained again
    assert re.search(
        rf"long and short: the checkpoint of 'stable' at 2,048 tokens that it started from was changed since.* recorded is {old[:12]}",
        "\n".join(said(runs)),
    )
    manifest_of(runs["base"]).unlink()
    assert "stable: the checkpoint of 'base' at 1,536 tokens that it started from is gone." in said(runs)


def test_a_broken_tracker_is_noted_beside_all_that_is_known(tmp_path) -> None:
    runs = build(tmp_path, finished=3, stages=STAGES[:3])
    _, whole = draw(runs)
    (runs["base"].checkpoints_path / "latest_checkpointed_iteration.txt").write_bytes(b"\xb2\n")
    (runs["base"].checkpoints_path / "iter_old").mkdir()
    (runs["base"].checkpoints_path / "iter_old" / "manifest.json").write_text("{}")  # no name of a checkpoint
    _, found = draw(runs)
    [note] = [note for note in found["notes"] if note not in whole["notes"]]
    assert note.startswith("base: its newest checkpoint is taken from the folders' names, because the tracker is damaged: ")
    assert "latest_checkpointed_iteration.txt: holds " in note
    assert {**found, "notes": None} == {**whole, "notes": None}


def test_the_tracker_says_which_checkpoint_is_the_newest(tmp_path) -> None:
    runs = build(tmp_path, finished=2, stages=STAGES[:2])
    newer = runs["base"].checkpoints_path / "iter_0000099"
    shutil.copytree(manifest_of(runs["base"]).parent, newer)
    (runs["base"].checkpoints_path / "latest_checkpointed_iteration.txt").write_text("6\n")  # the newer one was cut off from it
    (newer / "manifest.json").write_text("{")
    assert gather(runs["report"]).stages[-1].manifest.iteration == 6
