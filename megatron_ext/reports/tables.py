"""The report's numbers: pure functions from what the run folders say to rows.

The page's tables and summary.json print these same rows.
"""

from __future__ import annotations

from datetime import datetime
from statistics import fmean, median
from typing import Any

from megatron_ext.config.stages import Scratch, TrainStage
from megatron_ext.metrics import Record
from megatron_ext.reports.format import is_number
from megatron_ext.reports.read import Reading, StageData
from megatron_ext.reports.rows import (
    AttemptRow,
    CodeRow,
    CorpusRow,
    JointRow,
    MixtureRow,
    Point,
    SourceLossRow,
    SourceTokensRow,
    StageRow,
    ThroughputRow,
    TrainingRow,
    TreeRow,
)

END_SHARE, END_LEAST = 0.1, 10  # the last training loss is the mean of so many records: single batches scatter


def stage_rows(reading: Reading) -> list[StageRow]:
    """Every stage, in order."""
    rows = []
    for s in reading.stages:
        learns = s.is_training or s.is_rl
        rows.append(
            StageRow(
                stage=s.name,
                kind=s.kind,
                state=s.state,
                attempts=len(s.attempts),
                steps=steps_done(s) if learns else None,
                steps_planned=s.config.num_steps if learns else None,
                tokens=_reached(s, "tokens") if learns else None,
                tokens_planned=s.config.budget.tokens if s.is_training else None,
                seconds=_seconds(s),
                science_hash=s.science_hash,
            )
        )
    return rows


def attempt_rows(reading: Reading) -> list[AttemptRow]:
    """Every attempt of every stage."""
    rows = []
    for s in reading.stages:
        for a in s.attempts:
            standing = sum(r["attempt"] == a.number for r in s.steps)
            ranks = a.plan["nodes"] * a.plan["ranks_per_node"] if {"nodes", "ranks_per_node"} <= a.plan.keys() else None
            start = s.starts.get(a.number)
            rows.append(AttemptRow(s.name, a.number, a.started_at, a.ended_at, a.reason, a.error, start, standing, ranks))
    return rows


def end_records(num_records: int) -> int:
    """How many records the last loss is the mean of: a tenth, but at least 10, but no more than a quarter where they are few."""
    return max(1, round(END_SHARE * num_records), min(END_LEAST, num_records // 4))


def training_rows(reading: Reading) -> list[TrainingRow]:
    """Every training stage, begun or not."""
    rows = []
    for s in reading.training:
        losses = [v for r in s.train if (v := number(r, "loss")) is not None]
        rates = [v for r in s.train if (v := number(r, "learning_rate")) is not None]
        last = losses[-end_records(len(losses)) :]
        rows.append(
            TrainingRow(
                stage=s.name,
                start=s.config.start.kind,
                parent=parent_name(s),
                num_parameters=s.config.model.num_parameters,
                steps=steps_done(s),
                steps_planned=s.config.budget.steps,
                tokens=_reached(s, "tokens") or 0,
                lineage_tokens=_reached(s, "lineage_tokens"),
                first_loss=losses[0] if losses else None,
                last_loss=fmean(last) if last else None,
                last_loss_steps=len(last),
                first_learning_rate=rates[0] if rates else None,
                last_learning_rate=rates[-1] if rates else None,
            )
        )
    return rows


def joint_rows(reading: Reading) -> list[JointRow]:
    """Every start from another stage, by the child's manifest or, before it has one, by the records."""
    rows = []
    for s in reading.learning:
        name = parent_name(s)
        if name is None:
            continue
        recorded = s.manifest.parent if s.manifest else None
        parent = reading.find(name)
        tokens = recorded.tokens if recorded else _start_tokens(s, parent)
        before = (recorded.learning_rate if recorded.iteration else None) if recorded else _learning_rate_at(parent, tokens)
        first = s.steps[0] if s.steps else {}
        after = number(first, "learning_rate")
        rows.append(JointRow(s.name, name, s.config.start.kind, tokens, origin(s), before, after, first.get("step")))
    return rows


def tree_rows(reading: Reading) -> list[TreeRow]:
    """Every training and RL stage under the one it starts from; children by the point where they leave it, then in the report's order."""
    at = {row.stage: row.parent_tokens or 0 for row in joint_rows(reading)}
    names = [s.name for s in reading.learning]
    parents = {s.name: parent_name(s) for s in reading.learning}

    def below(parent: str, lead: str) -> list[TreeRow]:
        children = sorted((name for name in names if parents[name] == parent), key=lambda name: at[name])
        rows = []
        for child in children:
            last = child == children[-1]
            rows += [TreeRow(child, lead + ("└─ " if last else "├─ ")), *below(child, lead + ("   " if last else "│  "))]
        return rows

    roots = [name for name in names if parents[name] not in names]
    return [row for root in roots for row in (TreeRow(root, ""), *below(root, ""))]


def mixture_row(stage: StageData) -> MixtureRow:
    """A training stage's held-out loss on its own mixture; a step counts only if every source was measured."""
    rows = stage.config.mixture.rows
    steps: dict[int, dict[str, Record]] = {}
    for record in stage.validation:
        steps.setdefault(record["step"], {})[record["source"]] = record
    points = []
    for step, of_source in sorted(steps.items()):
        losses = [number(of_source.get(row.source, {}), "loss") for row in rows]
        if None not in losses:
            first = of_source[rows[0].source]
            total = sum(row.weight * value for row, value in zip(rows, losses, strict=True) if value is not None)
            points.append(Point(step, first["tokens"], first["lineage_tokens"], total))
    measured = {r["source"] for r in stage.validation if number(r, "loss") is not None}
    start = points[0].loss if points and points[0].step == 0 else None
    end = points[-1] if points and points[-1].step > 0 else None
    return MixtureRow(
        stage=stage.name,
        is_branch=stage.config.start.kind == "branch",
        points=tuple(points),
        start=start,
        end=end.loss if end else None,
        end_step=end.step if end else None,
        change=end.loss - start if end and start is not None else None,
        unmeasured_sources=tuple(row.source for row in rows if row.source not in measured),
    )


def source_loss_rows(reading: Reading) -> list[SourceLossRow]:
    """Held-out loss of each source at the end of each stage, the stage's own measurement first."""
    rows = []
    for s in reading.training:
        own = {r["source"]: (s.name, r) for r in s.validation if r["step"] > 0}
        by_children = {
            r["source"]: (child.name, r)
            for child in reading.training
            if s.state == "done" and _starts_at_end_of(child, s)
            for r in child.validation
            if r["step"] == 0
        }
        for source, (by, record) in {**by_children, **own}.items():
            loss = number(record, "loss")
            if loss is not None:
                step = record["step"] if by == s.name else steps_done(s)
                rows.append(SourceLossRow(s.name, source, loss, step, record.get("valid_tokens"), by))
    return rows


def source_tokens_rows(reading: Reading) -> list[SourceTokensRow]:
    """What each stage drew from each source, with the planned weight beside it."""
    rows = []
    for s in reading.training:
        if s.manifest is None:
            continue
        weights = {row.source: row.weight for row in s.config.mixture.rows}
        corpus = reading.find(s.config.corpus)
        sources = corpus.corpus.sources if corpus and corpus.corpus else {}
        total = sum(line.stage_tokens for line in s.manifest.ledger)
        order = list(weights)
        for line in sorted(s.manifest.ledger, key=lambda c: order.index(c.source) if c.source in weights else len(order)):
            if line.stage_tokens or line.source in weights:
                rows.append(
                    SourceTokensRow(
                        stage=s.name,
                        source=line.source,
                        step=s.manifest.iteration,
                        planned_weight=weights.get(line.source, 0.0),
                        measured_share=line.stage_tokens / total if total else 0.0,
                        stage_tokens=line.stage_tokens,
                        lineage_tokens=line.tokens,
                        epochs=line.epochs,
                        max_epochs=sources[line.source].max_epochs if line.source in sources else None,
                    )
                )
    return rows


def throughput_rows(reading: Reading) -> list[ThroughputRow]:
    """Medians of each training stage that has records."""
    rows = []
    for s in reading.training:
        if not s.train:
            continue
        peaks = [r["model_flops_per_second"] / r["mfu"] for r in s.train if number(r, "mfu") and number(r, "model_flops_per_second")]
        rows.append(
            ThroughputRow(
                stage=s.name,
                device=s.config.plan.device,
                precision=s.config.precision,
                num_ranks=s.config.plan.num_ranks,
                steps=len(s.train),
                step_seconds=_median(s.train, "step_seconds"),
                tokens_per_second=_median(s.train, "tokens_per_second"),
                model_flops_per_second=_median(s.train, "model_flops_per_second"),
                mfu=_median(s.train, "mfu"),
                peak_flops_per_second=median(peaks) if peaks else None,
                peak_source=str(s.provenance.get("peak", {}).get("source", "")),
                peak_memory_bytes=number(s.done, "peak_memory_bytes"),
            )
        )
    return rows


def corpus_rows(reading: Reading) -> list[CorpusRow]:
    """Every source of every corpus that the report names."""
    return [
        CorpusRow(s.name, name, r.documents, r.tokens, r.heldout_documents, r.heldout_tokens, r.max_epochs, r.licence, r.provenance)
        for s in reading.stages
        if s.corpus
        for name, r in s.corpus.sources.items()
    ]


def code_rows(reading: Reading) -> list[CodeRow]:
    """Code hash and package versions of each stage, from its provenance record or else its newest checkpoint."""
    rows = []
    for s in reading.stages:
        by_checkpoint = s.manifest.code_hash if s.manifest else ""
        rows.append(
            CodeRow(s.name, s.kind, s.science_hash, str(s.provenance.get("code_hash", by_checkpoint)), s.provenance.get("packages", {}))
        )
    return rows


def number(values: dict[str, Any], key: str) -> float | None:
    """A finite number, or None where there is none."""
    value = values.get(key)
    return value if is_number(value) else None


def parent_name(stage: StageData) -> str | None:
    """The stage that a training or RL stage starts from; None from scratch."""
    return None if isinstance(stage.config.start, Scratch) else str(stage.config.start.stage)


def steps_done(stage: StageData) -> int:
    """The last finished step: recorded, or of the newest checkpoint where only every so many steps are recorded."""
    recorded = int(stage.steps[-1]["step"]) if stage.steps else 0
    return max(recorded, stage.manifest.iteration if stage.manifest else 0)


def origin(stage: StageData) -> int | None:
    """Lineage tokens at which the stage began; None before it recorded anything."""
    for record in (*stage.steps[:1], *stage.validation[:1]):
        return int(record["lineage_tokens"] - record["tokens"])
    return stage.manifest.lineage_tokens - stage.manifest.tokens if stage.manifest else None


def _reached(stage: StageData, key: str) -> int | None:
    """`tokens` or `lineage_tokens` at the last finished step; of RL, tokens are those of its responses."""
    recorded = int(stage.steps[-1][key]) if stage.steps else 0
    kept = int(getattr(stage.manifest, key)) if stage.manifest else 0
    return max(recorded, kept) if stage.steps or stage.manifest else None


def _seconds(stage: StageData) -> float | None:
    """Time of all attempts that recorded their end."""
    ended = [a for a in stage.attempts if a.started_at and a.ended_at]
    times = [(datetime.fromisoformat(a.ended_at) - datetime.fromisoformat(a.started_at)).total_seconds() for a in ended]
    return sum(times) if times else None


def _median(records: tuple[Record, ...], key: str) -> float | None:
    values = [v for r in records if (v := number(r, key)) is not None]
    return median(values) if values else None


def _start_tokens(stage: StageData, parent: StageData | None) -> int | None:
    if stage.config.start.tokens is None and parent is not None and isinstance(parent.config, TrainStage):
        return parent.config.budget.tokens
    return None if stage.config.start.tokens is None else int(stage.config.start.tokens)


def _learning_rate_at(parent: StageData | None, tokens: int | None) -> float | None:
    if parent is None:
        return None
    return number(next((r for r in parent.train if r["tokens"] == tokens), {}), "learning_rate")


def _starts_at_end_of(child: StageData, parent: StageData) -> bool:
    at = getattr(child.config.start, "tokens", None)
    return parent_name(child) == parent.name and at in (None, parent.config.budget.tokens)
