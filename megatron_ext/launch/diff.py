"""What differs between two runs or checkpoints: science, plan, data and code apart, and where their lineages part.

Read from run folders, manifests, sidecars and code snapshots alone; unfinished runs are read as far as they are.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.attempts import RECORD
from megatron_ext.config.base import Json, content_hash, to_json
from megatron_ext.config.stages import TokenizeStage, TrainStage, science
from megatron_ext.errors import RunError
from megatron_ext.launch.joints import Joint, checkpoint_path, joint_of, latest_iteration, rate_words, readable_manifest
from megatron_ext.launch.verbs import attempt_codes
from megatron_ext.metrics import attempt_steps, read_metrics
from megatron_ext.provenance import CORPUS, MANIFEST, CorpusIndex, Manifest, file_sha256, read_corpus, read_manifest, read_sidecar
from megatron_ext.runs import ATTEMPTS, PROVENANCE, RECIPE, Run, attempt_numbers, differences, open_run, read_json
from megatron_ext.snapshot import Files, code_words, snapshot_path, source_files

PACKAGE_NAME = "megatron_ext"
SHORT = 12  # characters of a hash


@dataclass(frozen=True)
class Side:
    """One of the two: a run, or a checkpoint, which may stand alone."""

    path: Path
    run: Run | None
    manifest: Manifest | None  # of the checkpoint, or of the run's newest
    is_checkpoint: bool

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.run.name if self.run else self.manifest.stage if self.manifest else ""

    @property
    def stage(self) -> Any:
        """The stage's config, where the run is there."""
        return self.run.stage if self.run else None

    @property
    def runs_dir(self) -> Path:
        """The folder beside which code snapshots stand: RUNS of RUNS/graph/stage[/checkpoints/iter_0000001]."""
        run_path = self.run.path if self.run else self.path.parents[1]
        return run_path.parent.parent


def open_side(path: Path) -> Side:
    """Open a run or checkpoint folder; `RunError` where it is neither, `CheckpointError` where its manifest is missing or damaged."""
    path = path.resolve()
    if (path / RECIPE).is_file():
        run = open_run(path)
        newest = latest_iteration(run)
        return Side(path, run, None if newest is None else read_manifest(checkpoint_path(path, newest)), is_checkpoint=False)
    if not path.name.startswith("iter_") and not (path / MANIFEST).is_file():
        raise RunError(f"{path}: neither a run folder (no {RECIPE}) nor a checkpoint (no {MANIFEST}); name one of either")
    home = path.parent.parent
    return Side(path, open_run(home) if (home / RECIPE).is_file() else None, read_manifest(path), is_checkpoint=True)


def difference(path_a: Path, path_b: Path, with_code: bool = False) -> Json:
    """Everything that differs, as JSON: `science`, `plan`, `data` and `code` are lists of lines, `files` counts changed lines.

    `plans` says of either side, where there are such, which standing steps its attempts trained under another plan than `plan` compares.
    """
    a, b = open_side(path_a), open_side(path_b)
    return {
        "a": _label(a),
        "b": _label(b),
        "science": differences(*_sciences(a, b)),
        "plan": differences(_plan(a), _plan(b)),
        "plans": {side: found for side, one in (("a", a), ("b", b)) if (found := _other_plans(one))},
        "data": differences(_data(a), _data(b)),
        "code": differences(_code(a), _code(b)),
        "attempts": {side: words for side, one in (("a", a), ("b", b)) if one.run and (words := code_words(attempt_codes(one.run)))},
        **_files(a, b, with_code),
        "lineage": {"a": [_point_words(p) for p in _chain(a)], "b": [_point_words(p) for p in _chain(b)], "common": _common(a, b)},
    }


def _label(side: Side) -> Json:
    manifest = side.manifest
    at = {"iteration": manifest.iteration, "tokens": manifest.tokens} if manifest else {"iteration": None, "tokens": None}
    return {"path": _shown(side.path), "stage": side.name, **at}


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _sciences(a: Side, b: Side) -> tuple[Json, Json]:
    """Resolved values where both recipes are there; otherwise what every manifest says of them."""
    if a.run and b.run:
        return _recipe(a.run), _recipe(b.run)
    return _recipe_hashes(a), _recipe_hashes(b)


def _recipe(run: Run) -> Json:
    hashes = {role: found[:SHORT] for role, found in run.input_hashes.items()}
    return {**_by_name(science(run.stage)), "inputs": hashes}


def _recipe_hashes(side: Side) -> Json:
    if side.manifest:
        m = side.manifest
        return {"name": m.stage, "science_hash": m.science_hash[:SHORT], "mixture_hash": m.mixture_hash[:SHORT], "model": m.model}
    assert side.run is not None  # a side without a run is a checkpoint
    mixture, model = (to_json(getattr(side.stage, key)) if hasattr(side.stage, key) else None for key in ("mixture", "model"))
    return {"name": side.name, "science_hash": side.run.science_hash[:SHORT], "mixture_hash": content_hash(mixture)[:SHORT], "model": model}


def _by_name(value: Any) -> Any:
    """Lists of named things as dicts, as overrides address them: rows that moved or were added do not shift the others."""
    if isinstance(value, dict):
        return {key: _by_name(one) for key, one in value.items()}
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        for key in ("name", "source"):
            names = [one.get(key) for one in value]
            if None not in names and len(set(names)) == len(names):
                return {one[key]: {k: _by_name(v) for k, v in one.items() if k != key} for one in value}
    return value


def _plan(side: Side) -> Json:
    """Of the checkpoint, or of the run's newest attempt, or before there is one of its recipe."""
    if side.is_checkpoint and side.manifest:
        return side.manifest.plan
    assert side.run is not None
    records = [side.run.path / ATTEMPTS / str(number) / RECORD for number in attempt_numbers(side.run.path)]
    begun = [path for path in records if path.is_file()]
    plan: Json = read_json(begun[-1], "how an attempt began")["plan"] if begun else to_json(side.stage.plan)
    return plan


def _other_plans(side: Side) -> list[Json]:
    """Which steps that stand (of a checkpoint: up to it) had another plan than the side's, and what was other; like attempts together."""
    if side.run is None:
        return []
    end_step = side.manifest.iteration if side.is_checkpoint and side.manifest else None
    newest = _plan(side)
    found: list[Json] = []
    for attempt, first, last in _standing(side.run, end_step):
        path = side.run.path / ATTEMPTS / str(attempt) / RECORD
        then: Json = read_json(path, "how an attempt began")["plan"] if path.is_file() else newest
        other = {key: value for key, value in then.items() if key not in newest or value != newest[key]}
        if found and found[-1]["plan"] == other:
            found[-1].update(last_attempt=attempt, last_step=last)
        else:
            found.append({"first_attempt": attempt, "last_attempt": attempt, "first_step": first, "last_step": last, "plan": other})
    return [row for row in found if row["plan"]]


def _standing(run: Run, end_step: int | None) -> list[tuple[int, int, int]]:
    """Attempt, first and last of its steps that no later attempt did again, up to `end_step` or the last one that is recorded."""
    records = read_metrics(run.metrics_path)
    done = max((one["step"] for one in records if one["kind"] != "stop"), default=0)  # a step that stopped the stage was not done
    return attempt_steps(records, 0, done if end_step is None else end_step)


def _data(side: Side) -> Json:
    """Mixture, ledger and corpus."""
    found: Json = {}
    if isinstance(side.stage, TrainStage):
        found["mixture"] = {row.source: row.weight for row in side.stage.mixture.rows}
    if side.manifest:
        found["tokenizer_hash"] = side.manifest.tokenizer_hash[:SHORT]
        found["ledger"] = {
            line.source: {
                "tokens": line.tokens,
                "stage_tokens": line.stage_tokens,
                "position": line.position,
                "epochs": round(line.epochs, 4),
            }
            for line in side.manifest.ledger
        }
    folder = side.run.path if isinstance(side.stage, TokenizeStage) and side.run else side.run.inputs.get("corpus") if side.run else None
    if folder is not None:
        found["corpus"] = _corpus(folder) if (folder / CORPUS).is_file() else "not tokenized yet"
    return found


def _corpus(folder: Path) -> Json:
    index = read_corpus(folder)
    facts = {key: value for key, value in to_json(index).items() if key not in ("sources", "tokenizer_path", "format")}
    return {**facts, "sources": {name: _source(folder, index, name) for name in index.sources}}


def _source(folder: Path, index: CorpusIndex, name: str) -> Json:
    """One source's counts, and one digest over the digests of its shards."""
    record = to_json(index.sources[name])
    for split in ("train", "heldout"):
        shards = [read_sidecar(folder / path).sha256 for path in record[split]]
        record[split] = f"{len(shards)} shards, {content_hash(shards)[:SHORT]}"
    return dict(record)


def _code(side: Side) -> Json:
    """Hash, packages and machine: of the checkpoint, or of the newest attempt."""
    path = side.run.path / PROVENANCE if side.run else None
    written = read_json(path, "what the run was made with") if path and path.is_file() else {}
    facts = {key: written[key] for key in ("packages", "python", "platform", "container") if key in written}
    return {"code_hash": _code_hash(side)[:SHORT], **facts}


def _code_hash(side: Side) -> str:
    """'' where nothing has run yet."""
    codes = attempt_codes(side.run) if side.run and not side.is_checkpoint else {}
    return codes[max(codes)] if codes else side.manifest.code_hash if side.manifest else ""


def _files(a: Side, b: Side, with_code: bool) -> Json:
    """Lines added and removed in each source file, where both snapshots are there; `text` is a unified diff."""
    hashes = _code_hash(a), _code_hash(b)
    if hashes[0] == hashes[1] or "" in hashes:
        return {"files": {}}
    folders = [snapshot_path(side.runs_dir, found) for side, found in zip((a, b), hashes, strict=True)]
    missing = [_shown(folder) for folder in folders if not folder.is_dir()]
    if missing:
        return {"files": {}, "files_unknown": f"no code snapshot at {' and '.join(missing)}"}
    old, new = (source_files(folder / PACKAGE_NAME) for folder in folders)
    texts = {name: list(_unified(name, old, new)) for name in sorted({*old, *new}) if old.get(name) != new.get(name)}
    counts = {name: {"added": _count(lines, "+"), "removed": _count(lines, "-")} for name, lines in texts.items()}
    return {"files": counts, **({"text": [line for lines in texts.values() for line in lines]} if with_code else {})}


def _unified(name: str, old: Files, new: Files) -> Iterator[str]:
    before, after = (files.get(name, b"").decode(errors="replace").splitlines() for files in (old, new))
    return difflib.unified_diff(before, after, f"a/{name}", f"b/{name}", lineterm="")


def _count(lines: list[str], sign: str) -> int:
    return sum(line.startswith(sign) for line in lines[2:])  # the first two name the files


@dataclass(frozen=True)
class Point:
    """A place in a lineage: so many tokens into a run, and how the run after it starts from there."""

    stage: str
    folder: Path | None  # the run; None for a checkpoint that stands alone
    tokens: int | None
    manifest_sha256: str  # of the checkpoint there, as a child recorded it or as it is; '' where there is none
    joint: Joint | None  # None: the side itself


def _chain(side: Side) -> list[Point]:
    """From the side itself back to where its lineage began, as far as folders are there."""
    tokens = side.manifest.tokens if side.manifest else 0
    points = [Point(side.name, side.run.path if side.run else None, tokens, _own_sha256(side), None)]
    run, manifest = side.run, side.manifest
    if run is None and manifest and manifest.parent:
        old = manifest.parent
        return [*points, Point(old.stage, None, old.tokens, old.manifest_sha256, None)]
    while run is not None and (joint := joint_of(run, manifest)) is not None:
        points.append(Point(joint.stage, joint.folder, joint.tokens, _whole_sha256(joint), joint))
        run = open_run(joint.folder) if (joint.folder / RECIPE).is_file() else None
        newest = latest_iteration(run) if run else None
        manifest = readable_manifest(run, newest) if run and newest is not None else None
    return points


def _own_sha256(side: Side) -> str:
    if side.manifest is None:
        return ""
    path = side.path if side.is_checkpoint else checkpoint_path(side.path, side.manifest.iteration)
    return side.manifest.thinned_from or file_sha256(path / MANIFEST)


def _whole_sha256(joint: Joint) -> str:
    """Hash of the parent checkpoint's manifest as it was while it held its optimizer state: thinning makes no other checkpoint of it."""
    path = joint.checkpoint / MANIFEST if joint.checkpoint else None
    if path is None or not path.is_file() or file_sha256(path) != joint.manifest_sha256:
        return joint.manifest_sha256
    return read_manifest(path.parent).thinned_from or joint.manifest_sha256


def _point_words(point: Point) -> str:
    at = "" if point.tokens is None else f" at {point.tokens:,} tokens"
    if point.joint is None:
        return f"{point.stage}{at}"
    return f"{point.joint.start} of {point.stage}{at}{rate_words(point.joint)}"


def _common(a: Side, b: Side) -> Json | None:
    """The nearest checkpoint that both come from, or are."""
    others = _chain(b)
    for point in _chain(a):
        for other in others:
            if (shared := _shared(point, other)) is not None:
                folder = point.folder or other.folder
                return {"stage": point.stage, "tokens": shared, "path": _shown(folder) if folder else None}
    return None


def _shared(one: Point, other: Point) -> int | None:
    """Tokens up to which two points go the same way: the same checkpoint, or two points of one run."""
    if one.manifest_sha256 and one.manifest_sha256 == other.manifest_sha256:
        return one.tokens
    if one.folder is None or one.folder != other.folder or one.tokens is None or other.tokens is None:
        return None
    was_trained_again = one.manifest_sha256 and other.manifest_sha256 and one.tokens == other.tokens
    return None if was_trained_again else min(one.tokens, other.tokens) or None


def diff_command(a: Path, b: Path, code: bool, as_json: bool) -> None:
    """Print what differs between two runs or checkpoints; `code` adds the changed lines."""
    found = difference(a, b, code)
    print(json.dumps(found, indent=2) if as_json else diff_text(found))


def diff_text(found: Json) -> str:
    """The difference for people, a block for each part."""
    lines = [_head(side.upper(), found[side]) for side in ("a", "b")]
    for part, more in (("science", []), ("plan", _plan_lines(found["plans"])), ("data", [])):
        lines += ["", *_block(part, [*found[part], *more])]
    lines += ["", *_block("code", [*found["code"], *_code_lines(found)]), "", *_lineage_lines(found["lineage"])]
    return "\n".join([*lines, *(["", *found["text"]] if "text" in found else [])])


def _head(letter: str, label: Json) -> str:
    at = "no checkpoint yet" if label["tokens"] is None else f"checkpoint {label['iteration']}, {label['tokens']:,} tokens"
    return f"{letter}  {label['path']}: {label['stage']}, {at}"


def _block(part: str, lines: list[str]) -> list[str]:
    return [part, *(f"  {line}" for line in lines)] if lines else [f"nothing differs in {part}"]


def _plan_lines(plans: Json) -> list[str]:
    """'A: attempt 3 (steps 101 to 200) ran ranks_per_node 2, micro_batch 4'."""
    lines = []
    for side, rows in plans.items():
        for row in rows:
            attempts, steps = (_span(name, row[f"first_{name}"], row[f"last_{name}"]) for name in ("attempt", "step"))
            values = ", ".join(f"{key} {json.dumps(value).strip(chr(34))}" for key, value in row["plan"].items())
            lines.append(f"{side.upper()}: {attempts} ({steps}) ran {values}")
    return lines


def _span(name: str, first: int, last: int) -> str:
    return f"{name} {first}" if first == last else f"{name}s {first} to {last}"


def _code_lines(found: Json) -> list[str]:
    files = [f"{name}: +{count['added']} -{count['removed']}" for name, count in found["files"].items()]
    unknown = [f"files: {found['files_unknown']}"] if "files_unknown" in found else []
    return [*files, *unknown, *(f"{side.upper()}: {words}" for side, words in found["attempts"].items())]


def _lineage_lines(lineage: Json) -> list[str]:
    same = lineage["a"][1:] == lineage["b"][1:]
    chains = ["nothing differs in lineage before the two"] if same else ["lineage"]
    for side in ("a", "b"):
        chains.append(f"  {side.upper()}: {' <- '.join(lineage[side])}")
    common = lineage["common"]
    if common is None:
        return [*chains, "  no common ancestor"]
    where = f" ({common['path']})" if common["path"] else ""
    return [*chains, f"  nearest common ancestor: {common['stage']} at {common['tokens']:,} tokens{where}"]
