"""The page's sections: each function takes the drawing board and gives one section with its numbers, or None where it has none.

To add a section, write one function and name it in `SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_ext.reports import format as show
from megatron_ext.reports import markup, tables
from megatron_ext.reports.board import Board, Section, as_json
from megatron_ext.reports.figures import (
    SMOOTHING_LEAST,
    SMOOTHING_SHARE,
    draw_heldout_mixture,
    draw_heldout_sources,
    draw_source_tokens,
    draw_training,
)
from megatron_ext.reports.goodput_section import time_spent
from megatron_ext.reports.lead import descent
from megatron_ext.reports.lineage_figure import draw_lineage
from megatron_ext.reports.markup import Cell
from megatron_ext.reports.read import Reading
from megatron_ext.reports.rl_sections import reinforcement
from megatron_ext.reports.rows import AttemptRow, CodeRow, JointRow
from megatron_ext.snapshot import code_hash


def lineage(board: Board) -> Section:
    """The graph, the stages, and the tree of starts with its joints."""
    reading = board.reading
    stages, joints = tables.stage_rows(reading), tables.joint_rows(reading)
    html = markup.paragraph(text) if (text := descent(reading)) else ""
    html += board.figure(
        "lineage",
        lambda path: draw_lineage(reading, path),
        "Graph of the stages, left to right, with the tokens and learning rates of each.",
        "The stages of this run and what each was made from. Thick arrows carry weights, thin ones carry text, tokenizer or shards. "
        "What to look at: branches that are compared should leave the same checkpoint, and at a 'branch' the learning rate should "
        "go on across the joint without a step. A dashed frame marks a stage that is not finished.",
        "This report names no stage.",
    )
    html += markup.table(
        "Stages",
        ["stage", "kind", "state", "#attempts", "#steps", "#tokens", "#time"],
        [
            [
                board.name(r.stage), r.kind, r.state, show.count(r.attempts),
                _of(show.count, r.steps, r.steps_planned), _of(show.tokens, r.tokens, r.tokens_planned), show.seconds(r.seconds),
            ]
            for r in stages
        ],
    )  # fmt: skip
    tree = tables.tree_rows(reading)
    if tree:
        at = {row.stage: row for row in joints}
        html += markup.table(
            "Where each stage starts",
            ["stage", "starts from", "how", "#parent tokens", "#lineage tokens", "#LR before", "#LR of the first step"],
            [[markup.branch(r.mark, board.name(r.stage)), *_joint_cells(at.get(r.stage))] for r in tree],
        )
    return Section("lineage", "Lineage", html, {"stages": as_json(stages), "joints": as_json(joints), "tree": as_json(tree)})


def _joint_cells(row: JointRow | None) -> list[Cell]:
    if row is None:
        return ["", "random weights", "", "", "", ""]
    return [
        row.parent,
        {"branch": "weights and optimizer", "weights": "weights only"}[row.start],
        show.tokens(row.parent_tokens),
        show.tokens(row.lineage_tokens),
        show.rate(row.learning_rate_before),
        show.rate(row.learning_rate_after) + ("" if row.step_after in (None, 1) else f" (step {row.step_after})"),
    ]


def training(board: Board) -> Section:
    """Loss and learning rate over the whole lineage."""
    rows = tables.training_rows(board.reading)
    html = board.figure(
        "training",
        lambda path: draw_training(board.reading, path),
        "Training loss and learning rate of every stage over lineage tokens.",
        "Training loss (above) and learning rate (below) over the tokens of the lineage. Faint: single batches; bold: centred moving "
        f"mean over {show.percent(SMOOTHING_SHARE, 0)} of a stage's recorded steps, at least {SMOOTHING_LEAST} where there are enough. "
        "What to look at: the loss should fall, flatten where the rate is constant, and fall again as the rate decays. At a joint the "
        "mixture changes, so the level jumps with the data; levels of two branches are losses on different text and do not rank them. "
        "Learning rates that coincide are drawn as alternating dashes.",
        "No training step has been recorded yet.",
    )
    if rows:
        html += markup.table(
            "Training",
            ["stage", "#parameters", "#steps", "#tokens", "#lineage tokens", "#first loss", "#last loss", "#mean of",
             "#first LR", "#last LR"],
            [
                [
                    board.name(r.stage), show.tokens(r.num_parameters), _of(show.count, r.steps, r.steps_planned), show.tokens(r.tokens),
                    show.tokens(r.lineage_tokens), show.loss(r.first_loss), show.loss(r.last_loss),
                    show.many(r.last_loss_steps, "step"), show.rate(r.first_learning_rate), show.rate(r.last_learning_rate),
                ]
                for r in rows
            ],
        )  # fmt: skip
    return Section("training", "Training loss", html, {"training": as_json(rows)})


def heldout_mixture(board: Board) -> Section:
    """Each branch on held-out text of its own mixture."""
    rows = [tables.mixture_row(s) for s in board.reading.training]
    branches = [r for r in rows if r.is_branch] or rows
    what = "branch" if any(r.is_branch for r in rows) else "training stage"
    html = board.figure(
        "heldout_mixture",
        lambda path: draw_heldout_mixture(board.reading, branches, path),
        f"Held-out loss of each {what}'s own mixture over its tokens.",
        f"Held-out loss of each {what} on its own mixture: the sum over sources of planned weight times the loss on documents that are "
        "never trained on. At 0 tokens stands the checkpoint it starts from, measured on that mixture. What to look at: "
        "on the right, how much each gains on the text that it is trained on; on the left, the levels, which belong to different mixtures.",
        "No held-out loss of a whole mixture has been recorded yet.",
    )
    shown = [r for r in rows if r.points]
    if shown:
        html += markup.table(
            "Held-out loss of the stage's own mixture (nats per token)",
            ["stage", "#start", "#end", "#change", "#at step"],
            [[board.name(r.stage), show.loss(r.start), show.loss(r.end), show.change(r.change), show.count(r.end_step)] for r in shown],
        )
    return Section("heldout", "Held-out loss of each mixture", html, {"heldout_mixture": as_json(rows)})


def heldout_sources(board: Board) -> Section:
    """What each stage knows of each source at its end."""
    rows = tables.source_loss_rows(board.reading)
    names = [s.name for s in board.reading.training]
    html = board.figure(
        "heldout_sources",
        lambda path: draw_heldout_sources(rows, names, path),
        "Held-out loss per source at the end of each stage.",
        "Held-out loss per source (nats per token) at the end of each stage. Shades compare the stages within one row: darker is lower, "
        "bold is lowest. A dagger marks a number measured at step 0 of a stage that starts from this very checkpoint. What to look at: "
        "along a row, which stage learned that kind of text; a stage that gains on one source and loses on another has traded.",
        "No held-out loss of any source has been recorded yet.",
    )
    return Section("sources", "Held-out loss per source", html, {"heldout_sources": as_json(rows)})


def data(board: Board) -> Section:
    """What was drawn from which source, and what there was to draw from."""
    rows, corpora = tables.source_tokens_rows(board.reading), tables.corpus_rows(board.reading)
    html = board.figure(
        "source_tokens",
        lambda path: draw_source_tokens(rows, path),
        "Tokens drawn from each source in each stage.",
        "Tokens drawn from each source, by the ledger in each stage's newest checkpoint: amounts on the left, shares of the stage on the "
        "right. What to look at: two branches should differ where their mixtures do and nowhere else, and measured shares should match the "
        "planned weights of the table but for the rounding to whole sequences.",
        "No checkpoint with a token ledger has been written yet.",
    )
    if rows:
        html += markup.table(
            "Planned and measured shares",
            ["stage", "source", "#planned", "#measured", "#difference (points)", "#tokens", "#lineage tokens", "#epochs", "#most epochs"],
            [
                [
                    board.name(r.stage), r.source, show.percent(r.planned_weight, 2), show.percent(r.measured_share, 2),
                    show.points(r.measured_share - r.planned_weight), show.amount(r.stage_tokens), show.amount(r.lineage_tokens),
                    f"{r.epochs:.3f}", show.NONE if r.max_epochs is None else f"{r.max_epochs:g}",
                ]
                for r in rows
            ],
        )  # fmt: skip
    if corpora:
        html += markup.table(
            "What the shards hold",
            ["corpus", "source", "#documents", "#training tokens", "#held-out documents", "#held-out tokens"],
            [
                [
                    r.corpus, r.source, show.count(r.documents), show.amount(r.tokens), show.count(r.heldout_documents),
                    show.amount(r.heldout_tokens),
                ]
                for r in corpora
            ],
        )  # fmt: skip
    origins = [r for r in corpora if r.licence or r.provenance]
    if origins:
        html += markup.table(
            "Where the text is from",
            ["corpus", "source", "licence", "provenance"],
            [[r.corpus, r.source, r.licence or show.NONE, r.provenance or show.NONE] for r in origins],
        )
    return Section("data", "Data", html, {"source_tokens": as_json(rows), "corpus": as_json(corpora)})


def throughput(board: Board) -> Section:
    """How fast each stage ran."""
    rows = tables.throughput_rows(board.reading)
    if not rows:
        html = markup.paragraph("No training step has been recorded yet.", "muted")
    else:
        html = markup.paragraph(
            "Medians over the recorded steps that stand; rates are of all ranks together. Model FLOPs count the model's own matrices and "
            "causal attention once, without recomputation. MFU is model FLOP/s over the peak in the next column, where a peak is known."
        )
        html += markup.table(
            "Medians by stage",
            ["stage", "device", "precision", "#ranks", "#steps", "#step", "#tokens/s", "#model FLOP/s",
             "#MFU", "#peak assumed", "#peak memory"],
            [
                [
                    board.name(r.stage), r.device, r.precision, show.count(r.num_ranks), show.count(r.steps), show.seconds(r.step_seconds),
                    show.count(r.tokens_per_second), show.flops(r.model_flops_per_second), show.percent(r.mfu),
                    "not known" if r.peak_flops_per_second is None else show.flops(r.peak_flops_per_second),
                    show.memory(r.peak_memory_bytes),
                ]
                for r in rows
            ],
        )  # fmt: skip
        for source in dict.fromkeys(r.peak_source for r in rows if r.peak_source):
            stages = [r.stage for r in rows if r.peak_source == source]
            html += markup.paragraph(f"Peak of one rank, {show.listed(stages)}: {source}.", "muted")
    return Section("throughput", "Throughput", html, {"throughput": as_json(rows)})


def provenance(board: Board) -> Section:
    """Hashes, versions and attempts: what the numbers above were made with."""
    attempts = tables.attempt_rows(board.reading)
    codes = tables.code_rows(board.reading)
    html = markup.table(
        "Hashes",
        ["stage", "kind", "science", "code"],
        [[board.name(r.stage), r.kind, _hash(r.science_hash), _hash(r.code_hash)] for r in codes],
    )
    for packages, stages in _by_packages(codes).items():
        who = "all stages" if len(stages) == len(codes) else show.listed(stages)
        html += markup.paragraph(f"Packages of {who}: {packages or 'not recorded'}.")
    if attempts:
        html += markup.table(
            "Attempts",
            ["stage", "#attempt", "started", "ended", "how it ended", "#ranks", "#after step", "#steps that stand"],
            [
                [
                    board.name(r.stage), show.count(r.attempt), r.started_at, r.ended_at,
                    f"{r.reason or _wordless_end(r, board.reading)}{': ' + r.error if r.error else ''}",
                    show.count(r.num_ranks), show.count(r.from_step),
                    show.count(r.standing_steps) if r.from_step is not None else show.NONE,
                ]
                for r in attempts
            ],
        )  # fmt: skip
    html += markup.paragraph(
        "Where an attempt did a step again that an earlier one had done, only the later record stands and is counted. "
        f"This page was drawn by code {show.short_hash(code_hash())} from run folders alone; the same numbers are in summary.json.",
        "muted",
    )
    return Section("provenance", "Provenance", html, {"attempts": as_json(attempts), "code": as_json(codes)})


def _wordless_end(row: AttemptRow, reading: Reading) -> str:
    """Of an attempt that left no word: killed, where a later one exists or the stage is done; else it may still run."""
    stage = reading.find(row.stage)
    is_over = stage is not None and (stage.state == "done" or stage.attempts[-1].number != row.attempt)
    return "no word (killed)" if is_over else "no word (running, or killed)"


def _of(form: Callable[[float | None], str], done: int | None, planned: int | None) -> str:
    if planned is None or done == planned:
        return form(done)
    return f"{form(done or 0)} of {form(planned)}"


def _by_packages(codes: list[CodeRow]) -> dict[str, list[str]]:
    """Versions as text -> the stages that ran with them."""
    groups: dict[str, list[str]] = {}
    for row in codes:
        groups.setdefault(", ".join(f"{name} {version}" for name, version in row.packages.items()), []).append(row.stage)
    return groups


def _hash(value: str) -> Cell:
    return markup.code(show.short_hash(value)) if value else show.NONE


SECTIONS: tuple[Callable[[Board], Section | None], ...] = (
    reinforcement,
    lineage,
    training,
    heldout_mixture,
    heldout_sources,
    data,
    throughput,
    time_spent,
    provenance,
)
