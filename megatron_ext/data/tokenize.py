"""The tokenize stage: JSONL text to Megatron shards, slice by slice over several processes, resumable after a kill.

    RUN/tokenizer/                                 a copy of the tokenizer's files
    RUN/shards/<source>/{train,heldout}-NNNNN.*    shards of slice NNNNN
    RUN/shards/<source>/slice-NNNNN.json           what became of the slice's lines; written after its shards
    RUN/corpus.json                                what training reads; written last

Shards depend on the text, the recipe and the tokenizer; not on the number of workers, nor on interruptions. Processes on other
machines may do some of the slices ahead (`run_part`): the stage finds them finished.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megatron_ext.attempts import attempting, live_attempt
from megatron_ext.config.base import Json, content_hash, to_json
from megatron_ext.config.stages import Source, TokenizeStage
from megatron_ext.data.shards import SUFFIXES, Split
from megatron_ext.data.text_lines import cut, find_files
from megatron_ext.data.tokenize_slice import MOST_EXAMPLES, SliceRecord, SliceTask
from megatron_ext.data.tokenize_workers import tokenize_slices
from megatron_ext.errors import ConfigError, DataError, RunError
from megatron_ext.provenance import CORPUS, CorpusIndex, SourceRecord, environment
from megatron_ext.runs import PARTS, PROVENANCE, Run, mark_done, open_run, read_done, write_json
from megatron_ext.snapshot import code_hash
from megatron_ext.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1  # of shards and slice records; another one does finished slices again
SLICE_BYTES = 1 << 26  # 64 MiB: half a minute of work for one worker, so a kill costs little and workers end about together
TOKENIZER, SHARDS = "tokenizer", "shards"
OURS = re.compile(r"(train|heldout)-\d{5,}(-\d{3,})?\.(bin|idx|ids|json)|slice-\d{5,}\.json|\..*\.tmp")
OF_SLICE = re.compile(r"\.?(?:train|heldout|slice)-(\d{5,})\b.*")
SPLITS: tuple[Split, ...] = ("train", "heldout")
SOURCE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def run_tokenize(run: Run, slice_bytes: int = SLICE_BYTES) -> None:
    """Do the work of a tokenize run: shards of every source, corpus.json, provenance, the mark.

    `DataError` where text or tokenizer cannot be used, `RunError` where a worker dies. Finished slices are kept.
    """
    stage: TokenizeStage = run.stage
    with attempting(run):
        inputs = _inputs(run)
        tokenizer = _tokenizer(run)
        (run.path / CORPUS).unlink(missing_ok=True)
        shutil.rmtree(run.path / TOKENIZER, ignore_errors=True)  # an earlier attempt's may be of another kind
        tokenizer.copy_to(run.path / TOKENIZER)
        tasks = _all_tasks(run, inputs, tokenizer, slice_bytes)
        records = {task.record_path: record for task in tasks if (record := task.finished())}
        _remove_unfinished(run, records)
        records |= tokenize_slices(run, tasks, records, run.path / TOKENIZER)
        by_source = {s.name: [(t, records[t.record_path]) for t in tasks if t.source.name == s.name] for s in stage.sources}
        index = CorpusIndex(
            tokenizer_hash=tokenizer.identity_hash, tokenizer_path=TOKENIZER, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id,
            bos=stage.bos, sources={s.name: _source_record(s, [record for _, record in by_source[s.name]]) for s in stage.sources},
        )  # fmt: skip
        account = {name: _account(done) for name, done in by_source.items()}
        hashes = {role: parent.science_hash for role, parent in inputs.items()}
        write_json(
            run.path / PROVENANCE, {**environment(), "inputs": hashes, "tokenizer_hash": tokenizer.identity_hash, "sources": account}
        )
        write_json(run.path / CORPUS, to_json(index))
        mark_done(run, {name: {"tokens": r.tokens, "heldout_tokens": r.heldout_tokens} for name, r in index.sources.items()})


def run_part(run: Run, part: int, parts: int, slice_bytes: int = SLICE_BYTES) -> None:
    """Do slices `part`, `part + parts`, ... of a tokenize run ahead of the stage itself, which finds them finished.

    Slices of other parts are not touched, so parts may run side by side, on any machines that see the run folder. `ConfigError`
    where there is no such part, `RunError` where the stage itself is at work, otherwise as `run_tokenize`.
    """
    if not 0 <= part < parts:
        raise ConfigError(f"part {part} of {parts}: parts count from 0 to {parts - 1}")
    owner = live_attempt(run.path)
    if owner is not None:
        raise RunError(f"{run.path}: {owner.describe()} is at work on stage '{run.name}' itself, and does all that is missing; wait for it")
    inputs, tokenizer = _inputs(run), _tokenizer(run)
    write_json(run.path / PARTS, {"code_hash": code_hash()})
    tasks = _all_tasks(run, inputs, tokenizer, slice_bytes)[part::parts]
    records = {task.record_path: record for task in tasks if (record := task.finished())}
    _remove_unfinished(run, records, tasks)
    tokenize_slices(run, tasks, records, _tokenizer_path(run))
    print(f"part {part} of {parts}: {len(tasks)} slices, {len(records)} of them done before", flush=True)


def _inputs(run: Run) -> dict[str, Run]:
    """The runs that a tokenize run reads, all of them done."""
    inputs = {role: open_run(folder) for role, folder in run.inputs.items()}
    for parent in inputs.values():
        read_done(parent)
    return inputs


def _tokenizer_path(run: Run) -> Path:
    return run.inputs[TOKENIZER] / TOKENIZER if TOKENIZER in run.inputs else Path(run.stage.tokenizer)


def _tokenizer(run: Run) -> Tokenizer:
    stage = run.stage
    tokenizer = load_tokenizer(_tokenizer_path(run))
    if stage.bos and tokenizer.bos_id is None:
        raise DataError(f"stage {stage.name}: bos=true, but tokenizer {stage.tokenizer} has no beginning-of-sequence id; set bos=false")
    return tokenizer


def _all_tasks(run: Run, inputs: dict[str, Run], tokenizer: Tokenizer, slice_bytes: int) -> list[SliceTask]:
    """The slices of every source."""
    base = inputs["text"].path / "text" if "text" in inputs else Path.cwd()
    return [task for source in run.stage.sources for task in _tasks(run, source, base, tokenizer, slice_bytes)]


def _tasks(run: Run, source: Source, base: Path, tokenizer: Tokenizer, slice_bytes: int) -> list[SliceTask]:
    """The slices of a source, each with what its shards depend on."""
    if not SOURCE_NAME.fullmatch(source.name):
        raise DataError(f"source '{source.name}': its name becomes a folder's name; use letters, digits, '-', '_' and '.', no '.' first")
    depends_on = {"format": FORMAT, "science_hash": run.science_hash, "tokenizer_hash": tokenizer.identity_hash}
    tasks = []
    for part in cut(find_files(source, base), slice_bytes):
        where = {"file": part.file.name, "file_bytes": part.file.size_bytes, "modified_ns": part.file.modified_ns}
        identity = {**depends_on, **where, "start": part.start, "end": part.end}
        tasks.append(SliceTask(part, source, run.path / SHARDS / source.name, identity))
    return tasks


def _remove_unfinished(run: Run, records: dict[Path, SliceRecord], only: list[SliceTask] | None = None) -> None:
    """Remove shards and records that no finished slice names: half-written ones, and those of other text. `only`: of these slices."""
    kept = set(records)
    for path, record in records.items():
        for name in (*record.shards["train"], *record.shards["heldout"]):
            kept |= {path.with_name(name + suffix) for suffix in (*SUFFIXES, ".json")}
    wanted = None if only is None else {(task.folder, task.part.number) for task in only}
    for path in (run.path / SHARDS).glob("*/*"):
        if OURS.fullmatch(path.name) and path not in kept and (wanted is None or (path.parent, _slice_number(path)) in wanted):
            path.unlink()


def _slice_number(path: Path) -> int | None:
    found = OF_SLICE.fullmatch(path.name)
    return int(found[1]) if found else None


def _source_record(source: Source, records: list[SliceRecord]) -> SourceRecord:
    """A source's line in corpus.json; `DataError` where nothing is left to train on."""

    def total(key: str, split: Split) -> int:
        return sum(getattr(record, key)[split] for record in records)

    def sidecars(split: Split) -> tuple[str, ...]:
        return tuple(f"{SHARDS}/{source.name}/{name}.json" for record in records for name in record.shards[split])

    lines, empty, bad = (sum(getattr(record, key) for record in records) for key in ("lines", "empty", "bad"))
    if not total("documents", "train"):
        raise DataError(
            f"source '{source.name}': no training documents: of {lines} lines {empty} are empty, {bad} bad and "
            f"{total('documents', 'heldout')} held out; add text, or lower its heldout_fraction of {source.heldout_fraction}"
        )
    return SourceRecord(
        train=sidecars("train"), heldout=sidecars("heldout"), tokens=total("tokens", "train"), heldout_tokens=total("tokens", "heldout"),
        documents=total("documents", "train"), heldout_documents=total("documents", "heldout"), max_epochs=source.max_epochs,
        skipped_lines=empty + bad, licence=source.licence, provenance=source.provenance,
    )  # fmt: skip


def _account(done: list[tuple[SliceTask, SliceRecord]]) -> Json:
    """What became of a source's lines, and the files that they came from; printed as well."""
    records = [record for _, record in done]
    counts = {key: sum(getattr(record, key) for record in records) for key in ("lines", "blank", "empty", "bad")}
    counts |= {split: sum(record.documents[split] for record in records) for split in SPLITS}
    assert counts["lines"] == sum(counts.values()) - counts["lines"], f"lines that are not accounted for: {counts}"
    examples = [example for record in records for example in record.examples][:MOST_EXAMPLES]
    digests: dict[Path, list[str]] = {}
    for task, record in done:
        digests.setdefault(task.part.file.path, []).append(record.sha256)
    files = [{"path": str(path), "sha256_of_slices": content_hash(values)} for path, values in digests.items()]
    name, tokens = done[0][0].source.name, sum(sum(record.tokens.values()) for record in records)
    print(
        f"{name}: {tokens:,} tokens; " + ", ".join(f"{key} {value:,}" for key, value in counts.items()), *examples, sep="\n  ", flush=True
    )
    return {"lines": counts, "bad_line_examples": examples, "files": files}
