"""The report: its numbers against hand-counted records, its page against its files, its behaviour on unfinished graphs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.attempts import begin_attempt
from megatron_ext.config.base import to_json
from megatron_ext.config.budget import Budget
from megatron_ext.config.mixture import Mixture, Row
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.schedule import Schedule, learning_rate
from megatron_ext.config.stages import Branch, ReportStage, Scratch, Source, TokenizeStage, TrainStage, Weights, inputs
from megatron_ext.errors import RunError
from megatron_ext.metrics import MetricsWriter
from megatron_ext.provenance import (
    Consumed,
    CorpusIndex,
    Manifest,
    Parent,
    SourceRecord,
    environment,
    file_sha256,
    write_manifest,
)
from megatron_ext.reports import format as show
from megatron_ext.reports import lineage_figure, markup, rows, style, tables
from megatron_ext.reports.page import run_report
from megatron_ext.reports.read import Reading, StageData, gather
from megatron_ext.runs import Run, mark_done, write_json, write_run

TOKENS = 4 * 64  # of one step
MODEL = ModelConfig(name="toy", num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
                    vocab_size=500, max_positions=64)  # fmt: skip
CORPUS = TokenizeStage(
    name="corpus", sources=tuple(Source(name=n, paths=("x",), max_epochs=4.0) for n in ("web", "cot")), tokenizer="/tokenizer"
)


def mix(**weights: float) -> Mixture:
    return Mixture(rows=tuple(Row(source=s, weight=w) for s, w in weights.items()))


def stage(name: str, start: Any, steps: int, mixture: Mixture, shape: Any = "constant") -> TrainStage:
    budget = Budget(steps=steps, sequences_per_batch=4, sequence_length=64)
    return TrainStage(name=name, start=start, corpus="corpus", model=MODEL, mixture=mixture, budget=budget, precision="fp32",
                      schedule=Schedule(shape=shape, peak=1e-3), plan=TrainPlan(device="cpu"))  # fmt: skip


BASE = stage("base", Scratch(), 6, mix(web=1.0))
STABLE = stage("stable", Weights(stage="base"), 8, mix(web=0.75, cot=0.25))
LONG = stage("long", Branch(stage="stable"), 4, mix(web=0.5, cot=0.5), "cosine")
SHORT = replace(LONG, name="short", mixture=mix(web=0.25, cot=0.75))
STAGES = (CORPUS, BASE, STABLE, LONG, SHORT)
BEFORE = {"base": 0, "stable": 6 * TOKENS, "long": 14 * TOKENS, "short": 14 * TOKENS}  # lineage tokens at the start


def loss_of(name: str, step: int) -> float:
    return {"base": 6.0, "stable": 5.0, "long": 3.0, "short": 2.0}[name] - 0.1 * step


def heldout_of(name: str, source: str, step: int) -> float:
    return loss_of(name, step) + {"web": 0.5, "cot": -0.5}[source]


def write_train(writer: MetricsWriter, config: TrainStage, step: int, loss: float, seconds: float = 2.0) -> None:
    here = {"tokens": step * TOKENS, "lineage_tokens": BEFORE[config.name] + step * TOKENS}
    rate = learning_rate(config.schedule, (step - 1) * TOKENS, config.budget.tokens)
    speed = {"step_seconds": seconds, "tokens_per_second": TOKENS / seconds, "model_flops_per_second": 4e9, "mfu": 0.25}
    writer.write("train", step, {"loss": loss, "learning_rate": rate, "grad_norm": 1.0, "samples_sha256": "0", **here, **speed})


def write_heldout(writer: MetricsWriter, config: TrainStage, step: int) -> None:
    here = {"tokens": step * TOKENS, "lineage_tokens": BEFORE[config.name] + step * TOKENS, "valid_tokens": 100}
    for source in config.mixture.sources:
        writer.write("validation", step, {"source": source, "loss": heldout_of(config.name, source, step), **here})


def manifest_of(run: Run) -> Path:
    """The manifest of a finished stage's last checkpoint."""
    return run.checkpoints_path / f"iter_{run.stage.budget.steps:07d}" / "manifest.json"


def write_checkpoint(run: Run, parent: Run | None) -> None:
    config, steps = run.stage, run.stage.budget.steps
    ledger = tuple(
        Consumed(source=r.source, position=steps, tokens=9_999, stage_tokens=round(r.weight * steps * TOKENS), epochs=0.5)
        for r in config.mixture.rows
    )
    origin = None
    if parent:
        at = parent.stage.budget
        rate = learning_rate(parent.stage.schedule, at.tokens - TOKENS, at.tokens)
        origin = Parent(stage=parent.name, start=config.start.kind, iteration=at.steps, tokens=at.tokens, learning_rate=rate,
                        lineage_tokens=BEFORE[run.name], science_hash=parent.science_hash,
                        manifest_sha256=file_sha256(manifest_of(parent)))  # fmt: skip
    folder = run.checkpoints_path / f"iter_{steps:07d}"
    folder.mkdir(parents=True)
    manifest = Manifest(stage=run.name, graph=run.graph, attempt=1, iteration=steps, tokens=config.budget.tokens, learning_rate=1e-3,
                        lineage_tokens=BEFORE[run.name] + config.budget.tokens, science_hash=run.science_hash, mixture_hash="0",
                        tokenizer_hash="0", code_hash="c0de", parent=origin, ledger=ledger, optimizer_layout="none", plan={}, model={},
                        files={})  # fmt: skip
    write_manifest(folder, manifest)
    (run.checkpoints_path / f"iter_{steps + 5:07d}").mkdir()  # a save that was cut short: no manifest, no checkpoint


def train(run: Run, runs: dict[str, Run]) -> None:
    """Write what a finished training stage leaves; `stable` needs two attempts, the first one's steps 6 and 7 are done again."""
    config = run.stage
    steps = config.budget.steps
    attempt = begin_attempt(run)
    writer = MetricsWriter(run.metrics_path, attempt.number, 0)
    write_heldout(writer, config, 0)
    first = 0
    if run.name == "stable":
        for step in range(1, 8):
            write_train(writer, config, step, loss=99.0 if step > 5 else loss_of(run.name, step), seconds=50.0)
        writer.close()
        attempt.finish("failed", error="killed <here>")
        attempt, first = begin_attempt(run), 5
        writer = MetricsWriter(run.metrics_path, attempt.number, first)
    for step in range(first + 1, steps + 1):
        write_train(writer, config, step, loss_of(run.name, step))
    write_heldout(writer, config, steps)
    writer.close()
    write_checkpoint(run, runs.get(inputs(config).get("start", "")))
    write_json(run.path / "provenance.json", environment())
    attempt.finish("done")
    mark_done(run, {"peak_memory_bytes": 2**30})


def build(root: Path, finished: int = len(STAGES), stages: tuple[Any, ...] = STAGES, title: str = "Title <b>") -> dict[str, Run]:
    """Run folders of a small graph, of which the first `finished` stages are done; the report is written, not run."""
    report = ReportStage(name="report", stages=tuple(s.name for s in stages if s.kind == "train"), title=title)
    runs: dict[str, Run] = {}
    for place, config in enumerate((*stages, report)):
        run = write_run(root / config.name, "small", config, {role: runs[name].path for role, name in inputs(config).items()})
        runs[config.name] = run
        if place >= finished or config is report:
            continue
        if config is CORPUS:
            record = SourceRecord(train=(), heldout=(), tokens=5_000, heldout_tokens=50, documents=10, heldout_documents=1, max_epochs=4.0)
            index = CorpusIndex(tokenizer_hash="0", tokenizer_path="t", vocab_size=500, eod_id=0, bos=False,
                                sources={"web": record, "cot": record})  # fmt: skip
            write_json(run.path / "corpus.json", to_json(index))
            mark_done(run, {})
        else:
            train(run, runs)
    return runs


def draw(runs: dict[str, Run]) -> tuple[str, dict[str, Any]]:
    run_report(runs["report"])
    folder = runs["report"].path
    return (folder / "index.html").read_text(encoding="utf-8"), json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[dict[str, Run], str, dict[str, Any]]:
    runs = build(tmp_path_factory.mktemp("runs"))
    return runs, *draw(runs)


def row(rows: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    [found] = [r for r in rows if all(r[k] == v for k, v in keys.items())]
    return found


def test_heldout_loss_of_a_mixture_is_the_weighted_sum_from_step_0_on(finished) -> None:
    _, page, summary = finished
    short = row(summary["heldout_mixture"], stage="short")
    # web 0.25 x (2.0 + 0.5) + cot 0.75 x (2.0 - 0.5) = 1.75 at step 0, 0.4 less after 4 steps
    assert (short["start"], short["end"], short["change"]) == pytest.approx((1.75, 1.35, -0.4))
    assert [(p["step"], p["tokens"], p["lineage_tokens"]) for p in short["points"]] == [(0, 0, 14 * TOKENS), (4, 4 * TOKENS, 18 * TOKENS)]
    assert short["unmeasured_sources"] == []
    assert all(text in page for text in ("1.750", "1.350", f"{show.MINUS}0.400"))


def test_training_joints_and_throughput_equal_the_records(finished) -> None:
    _, page, summary = finished
    long = row(summary["training"], stage="long")
    assert (long["steps"], long["tokens"], long["lineage_tokens"]) == (4, 4 * TOKENS, 18 * TOKENS)
    assert (long["first_loss"], long["last_loss"], long["last_loss_steps"]) == (2.9, 2.6, 1)  # of 4 records
    assert long["num_parameters"] == MODEL.num_parameters
    joint = row(summary["joints"], stage="long")
    assert (joint["parent"], joint["parent_tokens"], joint["lineage_tokens"]) == ("stable", 8 * TOKENS, 14 * TOKENS)
    assert (joint["learning_rate_before"], joint["learning_rate_after"], joint["step_after"]) == (1e-3, 1e-3, 1)
    speed = row(summary["throughput"], stage="long")
    assert (speed["step_seconds"], speed["tokens_per_second"], speed["mfu"]) == (2.0, TOKENS / 2.0, 0.25)
    assert speed["peak_flops_per_second"] == 4e9 / 0.25
    assert all(text in page for text in ("16 GFLOP/s", "25.0 %", "1.00 GiB"))


def test_tokens_per_source_come_from_the_ledger_of_the_newest_whole_checkpoint(finished) -> None:
    _, _, summary = finished
    web = row(summary["source_tokens"], stage="short", source="web")
    assert (web["planned_weight"], web["measured_share"], web["stage_tokens"]) == (0.25, 0.25, TOKENS)
    assert (web["lineage_tokens"], web["epochs"], web["max_epochs"], web["step"]) == (9_999, 0.5, 4.0, 4)
    assert row(summary["corpus"], source="cot")["tokens"] == 5_000


def test_a_stage_is_also_measured_at_step_0_of_those_that_start_from_its_end(finished) -> None:
    _, _, summary = finished
    base = row(summary["heldout_sources"], stage="base", source="cot")  # not in base's mixture; stable measured it before its first step
    assert (base["loss"], base["measured_by"], base["step"]) == (heldout_of("stable", "cot", 0), "stable", 6)
    own = row(summary["heldout_sources"], stage="stable", source="cot")
    assert (own["loss"], own["measured_by"]) == (pytest.approx(heldout_of("stable", "cot", 8)), "stable")


def test_a_branch_from_the_middle_does_not_measure_the_end_of_its_parent() -> None:
    record = {"step": 0, "source": "cot", "loss": 1.0, "tokens": 0, "lineage_tokens": 0}
    parent = StageData("stable", "done", STABLE)
    early = replace(LONG, start=Branch(stage="stable", tokens=4 * TOKENS))
    for child, measured in ((LONG, 1), (early, 0)):
        reading = Reading("t", "g", (parent, StageData("long", "begun", child, validation=(record,))))
        assert len(tables.source_loss_rows(reading)) == measured


def test_records_of_a_superseded_attempt_are_not_counted(finished) -> None:
    _, page, summary = finished
    stable = row(summary["training"], stage="stable")
    assert stable["last_loss"] == pytest.approx((loss_of("stable", 7) + loss_of("stable", 8)) / 2)  # 99 in the first attempt's step 7
    assert stable["steps"] == 8
    standing = [(r["attempt"], r["from_step"], r["standing_steps"], r["reason"]) for r in summary["attempts"] if r["stage"] == "stable"]
    assert standing == [(1, 0, 5, "failed"), (2, 5, 3, "done")]
    assert "killed &lt;here&gt;" in page


def test_what_a_later_attempt_took_back_is_not_counted(finished, tmp_path) -> None:
    runs, _, _ = finished
    folder = tmp_path / "runs"
    shutil.copytree(runs["report"].path.parent, folder)
    report = replace(runs["report"], inputs={"stable": folder / "stable"})
    metrics = folder / "stable" / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    cut = [r for r in records if r["attempt"] == 1 or r["step"] <= 6]  # as if the second attempt, begun after step 5, stood at step 6

    def last(records: list[dict[str, Any]]) -> tuple[int, float]:
        metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
        stable = gather(report).find("stable")
        assert stable is not None
        return stable.train[-1]["step"], max(r["loss"] for r in stable.train)

    assert last(cut) == (6, loss_of("stable", 1))
    # The deliberate fault: without the line that opens attempt 2, the first attempt's step 7 stands, and its loss of 99 is seen.
    assert last([r for r in cut if (r["attempt"], r["kind"]) != (2, "attempt")]) == (7, 99.0)


def test_the_page_stands_alone_and_shows_every_stage(finished) -> None:
    runs, page, summary = finished
    assert all(f">{s.name}</span>" in page for s in STAGES)
    sources = re.findall(r'<img src="([^"]+)"', page)
    assert sources == summary["figures"]
    assert len(sources) == 5
    for source in sources:
        assert (runs["report"].path / source).read_bytes().startswith(b"\x89PNG")
    assert "Title &lt;b&gt;" in page
    assert "<b>" not in page.split("</h1>")[0]
    assert not re.search(r"<script|https?://|<link", page)
    anchors = re.findall(r'href="#([^"]+)"', page)
    assert anchors
    assert all(f'id="{anchor}"' in page for anchor in anchors)


def test_drawing_again_changes_nothing(finished) -> None:
    runs, page, summary = finished
    assert draw(runs) == (page, summary)
    assert runs["report"].is_done()


def test_unfinished_and_missing_stages_are_said(tmp_path) -> None:
    runs = build(tmp_path, finished=4, title="Half")
    shutil.rmtree(runs["base"].path)
    (runs["long"].path / "DONE").unlink()
    page, summary = draw(runs)
    assert [(r["stage"], r["state"]) for r in summary["stages"]] == [
        ("base", "missing"), ("corpus", "done"), ("stable", "done"), ("long", "begun"), ("short", "not begun"),
    ]  # fmt: skip
    notes = "\n".join(summary["notes"])
    assert "base: the run folder is missing" in notes
    assert "long: not finished (step 4 of 4)" in notes
    assert "short: not begun" in notes
    assert "long (unfinished)" not in page  # that label is in the figure; the page's tables say it in the column of states
    assert row(summary["joints"], stage="short")["learning_rate_before"] == 1e-3  # from the parent's records, before it has any of its own


def test_nothing_begun_draws_the_lineage_only_and_leaves_no_old_figure(tmp_path) -> None:
    runs = build(tmp_path, finished=0)
    old = runs["report"].path / "figures" / "training.png"
    old.parent.mkdir()
    old.write_bytes(b"old")
    page, summary = draw(runs)
    assert summary["figures"] == ["figures/lineage.png"]
    assert not old.exists()
    assert "No training step has been recorded yet." in page


def test_a_graph_without_branches_shows_its_training_stages(tmp_path) -> None:
    page, summary = draw(build(tmp_path, finished=2, stages=STAGES[:2]))
    assert "figures/heldout_mixture.png" in summary["figures"]
    assert any("No stage here branches" in note for note in summary["notes"])
    assert "Held-out loss of each training stage on its own mixture" in page


def test_a_damaged_file_is_an_error_that_names_it(tmp_path) -> None:
    runs = build(tmp_path, finished=2, stages=STAGES[:2])
    metrics = runs["base"].metrics_path
    metrics.write_text("not json\n" + metrics.read_text().split("\n", 1)[1])
    with pytest.raises(RunError, match=re.escape(str(metrics))):
        run_report(runs["report"])
    assert not runs["report"].is_done()


def test_a_mixture_without_a_measured_source_has_no_held_out_loss() -> None:
    records = tuple({"step": s, "source": "web", "loss": 1.0, "tokens": 0, "lineage_tokens": 0} for s in (0, 4))
    found = tables.mixture_row(StageData("long", "done", LONG, validation=records))
    assert (found.points, found.start, found.change, found.unmeasured_sources) == ((), None, None, ("cot",))


def test_every_name_is_documented(finished) -> None:
    runs, _, summary = finished
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(\w+)`", text))
    kinds = [kind for kind in vars(rows).values() if dataclasses.is_dataclass(kind)]
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    metrics = {key for line in runs["long"].metrics_path.read_text().splitlines() for key in json.loads(line)}
    assert len(kinds) > 8
    assert (fields | metrics | summary.keys()) - documented == set()


def boxes_apart(layout: lineage_figure.Layout) -> bool:
    return all(
        a.right < b.left or b.right < a.left or a.bottom + a.height < b.bottom or b.bottom + b.height < a.bottom
        for a, b in itertools.combinations(layout.nodes.values(), 2)
    )


@pytest.mark.parametrize("num_branches", [3, 8, 14])
def test_boxes_of_the_lineage_never_overlap_and_hold_their_text(num_branches, tmp_path) -> None:
    names = [f"a_rather_long_branch_name_{i}" for i in range(num_branches)]
    after = [stage(f"after_{i}", Weights(stage=name), 4, mix(web=1.0)) for i, name in enumerate(names[:3])]
    configs = [CORPUS, BASE, STABLE, *(replace(LONG, name=name) for name in names), *after]
    reading = Reading("t", "g", tuple(StageData(c.name, "not begun", c, parents=inputs(c)) for c in configs))
    layout = lineage_figure.place(reading)
    assert boxes_apart(layout)
    first, second = list(layout.nodes)[:2]
    moved = replace(layout.nodes[first], left=layout.nodes[second].left, bottom=layout.nodes[second].bottom)
    assert not boxes_apart(dataclasses.replace(layout, nodes={**layout.nodes, first: moved}))  # the check sees a fault
    for parent, child in ((p, c.name) for c in configs for p in inputs(c).values()):
        assert layout.nodes[parent].right < layout.nodes[child].left
    with style.canvas(tmp_path / "ruler.png", 1, 1, layout=None) as figure:
        for node in layout.nodes.values():
            for i, text in enumerate(node.lines):
                size, weight = (lineage_figure.NAME_POINTS, "bold") if i == 0 else (lineage_figure.LINE_POINTS, "normal")
                drawn = figure.text(0, 0, text, fontsize=size, fontweight=weight).get_window_extent().width / style.DPI
                assert drawn < node.width - lineage_figure.PADDING, text


def test_smoothing_is_a_centred_mean_that_keeps_the_first_value() -> None:
    smoothed = style.smooth(np.array([9.0, 1.0, 2.0, 3.0, 4.0, 8.0]), 5)
    assert smoothed == pytest.approx([9.0, 4.0, (9 + 1 + 2 + 3 + 4) / 5, (1 + 2 + 3 + 4 + 8) / 5, (2 + 3 + 4 + 8) / 4, 5.0])


def test_the_last_loss_is_the_mean_of_a_tenth_of_the_records_or_of_10() -> None:
    assert [tables.end_records(n) for n in (1, 4, 8, 60, 300)] == [1, 1, 2, 10, 30]


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (show.tokens, 20_971_520_000, "20.97B"), (show.tokens, 512, "512"), (show.rate, 2e-5, "2e-5"), (show.rate, 0.0, "0"),
        (show.change, -0.1234, f"{show.MINUS}0.123"), (show.change, -0.0001, "0.000"), (show.percent, 0.0551, "5.5 %"),
        (show.seconds, 0.000972, "0.97 ms"), (show.seconds, 0.0677, "67.7 ms"), (show.seconds, 0.6052, "605 ms"),
        (show.seconds, 1.0608, "1.06 s"), (show.seconds, 9.0, "9 s"), (show.seconds, 0.0, "0 s"), (show.seconds, 0.9999, "1.00 s"),
        (show.seconds, 3_725.0, "1 h 02 min"), (show.seconds, 61.0, "1 min 01 s"), (show.flops, 1.5e14, "150 TFLOP/s"),
        (show.memory, 3 * 2**30, "3.00 GiB"), (show.loss, None, show.NONE), (show.amount, 123_456, "123,456"),
    ],
)  # fmt: skip
def test_numbers_read_well(form: Callable[[Any], str], value: float, text: str) -> None:
    assert form(value) == text


def test_everything_from_a_run_folder_is_escaped() -> None:
    html = markup.table("<c>", ["a", "#b"], [["<x>", "1"], ["<x>", "2"], [markup.chip('"red', "<y>"), "3"]])
    assert not re.search(r"<[cxy]>", html)
    assert html.count("&lt;x&gt;") == 1  # the second row belongs to the first one's group
    assert "background:&quot;red" in html
