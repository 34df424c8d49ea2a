"""The tokenize stage: exact ids, equal shards whatever the workers and interruptions, every line accounted for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config.stages import Source, TextStage, TokenizePlan, TokenizerStage, TokenizeStage
from megatron_ext.data import tokenize_workers
from megatron_ext.data.shard_checks import verify_shard
from megatron_ext.data.shards import open_split
from megatron_ext.data.text_lines import cut, find_files, is_heldout
from megatron_ext.data.tokenize import run_tokenize
from megatron_ext.data.tokenize_slice import SliceTask, framed, tokenize_slice
from megatron_ext.errors import DataError, RunError
from megatron_ext.provenance import read_corpus
from megatron_ext.runs import mark_done, open_run, read_json, write_run
from megatron_ext.tokenizer import load_tokenizer
from tests.unit.small_tokenizers import END, TEXTS, hugging_face, sentence_piece

SLICE_BYTES = 4000
STAGE = TokenizeStage(
    name="corpus", sources=(Source(name="web", paths=("*.jsonl",), max_epochs=2.0, heldout_fraction=0.2),), tokenizer="./unused"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(hugging_face(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def text(tmp_path):
    """Two files of documents, with one empty and one blank line."""
    folder = tmp_path / "text"
    folder.mkdir()
    for part in range(2):
        rows = [{"id": f"{part}/{i}", "text": f"{i} " + TEXTS[i % 3][: 20 + 37 * i % 300]} for i in range(60)]
        rows[7]["text"] = " \n"
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder


def stage_of(text, tokenizer_folder, workers=1, **facts):
    source = replace(STAGE.sources[0], paths=(str(text / "*.jsonl"),), **facts.pop("source", {}))
    return replace(STAGE, sources=(source,), tokenizer=str(tokenizer_folder), plan=TokenizePlan(workers=workers), **facts)


def tokenize(path, text, tokenizer, slice_bytes=SLICE_BYTES, **facts):
    """Run the stage in `path`."""
    tokenizer.copy_to(text.parent / "tokenizer_files")
    run = write_run(path, "test", stage_of(text, text.parent / "tokenizer_files", **facts), {})
    run_tokenize(run, slice_bytes)
    return run


def slice_of(folder, content, tokenizer, **facts):
    """Tokenize one slice that holds the whole of `content`, in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_bytes(content)
    stage = stage_of(folder, "./unused", **facts)
    part = cut(find_files(stage.sources[0], folder), 1 << 20)[0]
    return tokenize_slice(SliceTask(part, stage.sources[0], folder / "shards", {}), stage, tokenizer, lambda _record: None)


def shard_bytes(run):
    """All files of a run that must not depend on how it was run."""
    paths = sorted([*run.path.glob("shards/*/[th]*"), *run.path.glob("tokenizer/*"), run.path / "corpus.json"])
    return {str(path.relative_to(run.path)): path.read_bytes() for path in paths}


def documents(run, split):
    shards = open_split(run.path, read_corpus(run.path), "web", split)
    return [(shards.document_id(i), shards[i].tolist()) for i in range(len(shards))]


@pytest.mark.parametrize(("make", "bos"), [(hugging_face, False), (hugging_face, True), (sentence_piece, True)])
def test_documents_are_encoded_framed_and_split_by_hash(tmp_path, text, make, bos):
    tokenizer = load_tokenizer(make(tmp_path / "made"))
    run = tokenize(tmp_path / "run", text, tokenizer, bos=bos)
    begin = [tokenizer.bos_id] if bos else []
    expected = {"train": [], "heldout": []}
    for path in sorted(text.glob("*.jsonl")):
        for line in filter(None, path.read_text().splitlines()):
            row = json.loads(line)
            if row["text"].strip():
                split = "heldout" if is_heldout("web", row["id"], 0.2) else "train"
                expected[split].append((row["id"], [*begin, *tokenizer.encode(row["text"]), tokenizer.eod_id]))
    for split, rows in expected.items():
        assert documents(run, split) == rows
    record = read_corpus(run.path).sources["web"]
    assert len(record.train) > 5
    assert (record.documents, record.heldout_documents) == (len(expected["train"]), len(expected["heldout"]))
    assert record.tokens == sum(len(ids) for _, ids in expected["train"])
    assert (record.skipped_lines, record.max_epochs) == (2, 2.0)
    for name in record.train + record.heldout:
        assert verify_shard(run.path / name).bos is bos
    account = read_json(run.path / "provenance.json", "")["sources"]["web"]["lines"]
    assert account == {"lines": 122, "blank": 2, "empty": 2, "bad": 0, "train": record.documents, "heldout": record.heldout_documents}
    assert load_tokenizer(run.path / "tokenizer").identity_hash == read_corpus(run.path).tokenizer_hash == tokenizer.identity_hash


@pytest.mark.slow
def test_shards_do_not_depend_on_the_number_of_workers(tmp_path, text, tokenizer):
    one = tokenize(tmp_path / "one", text, tokenizer)
    two = tokenize(tmp_path / "two", text, tokenizer, workers=2)
    assert one.science_hash == two.science_hash
    assert shard_bytes(one) == shard_bytes(two)
    other = tokenize(tmp_path / "other", text, tokenizer, bos=True)
    assert shard_bytes(one) != shard_bytes(other)


def test_a_finished_slice_is_not_done_again_unless_its_files_or_text_changed(tmp_path, text, tokenizer):
    run = tokenize(tmp_path / "run", text, tokenizer)
    whole = shard_bytes(run)
    folder = run.path / "shards" / "web"
    records = sorted(folder.glob("slice-*.json"))
    before = [path.stat().st_mtime_ns for path in records]
    shard = folder / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])  # a lost block
    (folder / ".train-00000.1.bin.tmp").write_bytes(b"half")  # a killed writer's
    (folder / "train-00099.bin").write_bytes(b"of a text that was longer")
    (folder / "notes.txt").write_text("not ours")
    run_tokenize(run, SLICE_BYTES)
    assert [i for i, path in enumerate(records) if path.stat().st_mtime_ns != before[i]] == [1]
    assert shard_bytes(run) == whole
    assert (folder / "notes.txt").exists()
    os.utime(text / "0.jsonl")  # touched: what it holds may be other text
    run_tokenize(run, SLICE_BYTES)
    first_file = len([1 for path in records if read_json(path, "")["identity"]["file"] == "0.jsonl"])
    changed = [i for i, path in enumerate(records) if path.stat().st_mtime_ns != before[i]]
    assert changed == list(range(first_file))
    assert first_file < len(records)
    assert shard_bytes(run) == whole


def test_another_tokenizer_at_the_same_path_does_everything_again(tmp_path, text, tokenizer):
    run = tokenize(tmp_path / "run", text, tokenizer)
    other = load_tokenizer(hugging_face(tmp_path / "other", vocab_size=300))
    again = tokenize(tmp_path / "run", text, other)
    assert again.science_hash == run.science_hash
    assert load_tokenizer(again.path / "tokenizer").identity_hash == other.identity_hash != tokenizer.identity_hash
    assert documents(again, "train")[0][1] == [
        *other.encode(json.loads((text / "0.jsonl").read_text().splitlines()[0])["text"]),
        other.eod_id,
    ]


@pytest.mark.slow
def test_kill_9_in_the_middle_then_rerun_gives_the_same_bytes(tmp_path, tokenizer):
    text = tmp_path / "text"
    text.mkdir()
    rows = [{"id": str(i), "text": TEXTS[i % 3] * (1 + i % 40)} for i in range(800)]
    (text / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    slice_bytes = 1 << 18
    whole = tokenize(tmp_path / "whole", text, tokenizer, slice_bytes, workers=2)
    run = write_run(tmp_path / "killed", "test", whole.stage, {})
    folder = run.path / "shards" / "web"
    code = (
        "import sys; from pathlib import Path\n"
        "from megatron_ext.runs import open_run; from megatron_ext.data.tokenize import run_tokenize\n"
        "if __name__ == '__main__': run_tokenize(open_run(Path(sys.argv[1])), int(sys.argv[2]))\n"
    )
    (tmp_path / "go.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "go.py"), str(run.path), str(slice_bytes)], env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    deadline = time.monotonic() + 60
    while not (list(folder.glob("slice-*.json")) and list(folder.glob(".train*.tmp"))):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it finished before it could be killed"
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):  # its workers end with it
        assert time.monotonic() < deadline
        time.sleep(0.02)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("slice-*.json")}
    assert 0 < len(finished) < len(list(whole.path.glob("shards/web/slice-*.json")))
    assert not (run.path / "corpus.json").exists()
    run_tokenize(open_run(run.path), slice_bytes)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert shard_bytes(run) == shard_bytes(whole)
    assert not list(folder.glob(".*"))


def test_a_killed_worker_is_an_error_that_says_what_to_do(tmp_path, text, tokenizer):
    (text / "big.jsonl").write_text((json.dumps({"text": TEXTS[0] * 50}) + "\n") * 3000)
    known, stop = set(active_children()), threading.Event()

    def kill_first_worker():
        while not stop.is_set():
            for child in set(active_children()) - known:
                os.kill(child.pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill_first_worker)
    thread.start()
    try:
        with pytest.raises(RunError, match=r"a worker process was killed.*finished slices are kept"):
            tokenize(tmp_path / "run", text, tokenizer, 1 << 20)
    finally:
        stop.set()
        thread.join()
    assert read_json(tmp_path / "run" / "attempts" / "1" / "exit.json", "")["reason"] == "failed"


def test_a_worker_killed_while_tasks_are_still_handed_out_gives_the_same_error(tmp_path, text, tokenizer, monkeypatch):
    class Broken(ProcessPoolExecutor):
        """A pool whose first worker is killed, and seen to be, before the second task is handed out."""

        def submit(self, *args, **kwargs):
            future = super().submit(*args, **kwargs)
            for process in list((self._processes or {}).values()):
                os.kill(process.pid, signal.SIGKILL)
            future.exception(timeout=60)
            return future

    monkeypatch.setattr(tokenize_workers, "ProcessPoolExecutor", Broken)
    with pytest.raises(RunError, match="a worker process was killed"):
        tokenize(tmp_path / "run", text, tokenizer, 100)


GOOD = b'{"id": "a", "text": "the fox"}\n'


def test_a_bad_line_is_refused_with_its_place(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 3 \(byte 62\): not JSON .*Mend or remove the line, or set corpus\.on_bad_line=skip"
    ):
        slice_of(tmp_path, GOOD + GOOD + b"{\n" + GOOD, tokenizer)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == []


def test_bad_lines_are_skipped_counted_and_located(tmp_path, tokenizer):
    content = GOOD + b"{\n" * 7 + b"\n" + b'{"text": ""}\n' + b'{"text": "\\ud800"}\n' + GOOD
    record = slice_of(tmp_path, content, tokenizer, on_bad_line="skip", source={"heldout_fraction": 0.0})
    assert (record.lines, record.bad, record.blank, record.empty, record.documents["train"]) == (12, 8, 1, 1, 2)
    assert len(record.examples) == 5
    assert record.examples[0].endswith(
        "a.jsonl, byte 31: not JSON (Expecting property name enclosed in double quotes at character 3 of the line)"
    )
    assert record.bytes == len(content)


class EndsInside:
    """A tokenizer that breaks the promise that text holds no end-of-document id."""

    def __init__(self, tokenizer):
        self.vocab_size, self.eod_id, self.bos_id = tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id
        self.identity_hash = tokenizer.identity_hash

    def encode_batch(self, texts):
        return [[] if text == "nothing" else [9, self.eod_id, 9] if "fox" in text else [7, 8] for text in texts]


def test_an_end_inside_a_document_is_never_written(tmp_path, tokenizer):
    content = b'{"text": "dog"}\n' + GOOD + b'{"text": "nothing"}\n{"text": "cat"}\n'
    with pytest.raises(
        DataError, match=rf"line 2 \(byte 16\): its text encodes to the id {tokenizer.eod_id}, which begins or ends documents"
    ):
        slice_of(tmp_path / "1", content, EndsInside(tokenizer), source={"heldout_fraction": 0.0})
    record = slice_of(tmp_path / "2", content, EndsInside(tokenizer), on_bad_line="skip", source={"heldout_fraction": 0.0})
    assert (record.lines, record.bad, record.empty, record.documents["train"], record.tokens["train"]) == (4, 1, 1, 2, 6)
    assert verify_shard(tmp_path / "2" / "shards" / "train-00000.json").largest_id == 8


def test_an_end_of_document_name_in_text_stays_text(tmp_path, tokenizer):
    record = slice_of(tmp_path, json.dumps({"text": f"a {END} b"}).encode(), tokenizer, source={"heldout_fraction": 0.0})
    assert record.documents["train"] == 1
    verify_shard(tmp_path / "shards" / "train-00000.json")


def test_documents_per_shard(tmp_path, tokenizer):
    content = b"".join(json.dumps({"id": str(i), "text": f"fox {i}"}).encode() + b"\n" for i in range(11))
    record = slice_of(tmp_path, content, tokenizer, documents_per_shard=4, source={"heldout_fraction": 0.0})
    assert record.shards["train"] == ["train-00000-000", "train-00000-001", "train-00000-002"]
    sizes = [verify_shard(tmp_path / "shards" / f"{name}.json").documents for name in record.shards["train"]]
    assert sizes == [4, 4, 3]


@pytest.mark.parametrize("bos_id", [None, 1])
def test_framing(bos_id):
    lengths, flat = framed(np.array([2, 1]), np.array([5, 6, 7]), bos_id, 2)
    assert flat.tolist() == ([5, 6, 2, 7, 2] if bos_id is None else [1, 5, 6, 2, 1, 7, 2])
    assert lengths.tolist() == ([3, 2] if bos_id is None else [4, 3])


def test_a_refused_line_leaves_no_corpus(tmp_path, text, tokenizer):
    (text / "1.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"1\.jsonl, line 1 \(byte 0\): not JSON"):
        tokenize(tmp_path / "run", text, tokenizer)
    (tmp_path / "run" / "corpus.json").write_text("{}")  # of an attempt on other text
    with pytest.raises(DataError, match=r"1\.jsonl, line 1"):
        tokenize(tmp_path / "run", text, tokenizer)
    assert not (tmp_path / "run" / "corpus.json").exists()
    assert not (tmp_path / "run" / "DONE").exists()
    run = tokenize(tmp_path / "skipping", text, tokenizer, on_bad_line="skip")
    assert read_corpus(run.path).sources["web"].skipped_lines == 2
    examples = read_json(run.path / "provenance.json", "")["sources"]["web"]["bad_line_examples"]
    assert [Path(example.split(",")[0]).name for example in examples] == ["1.jsonl"]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": " "}\n'])
def test_a_source_without_training_documents_is_refused(tmp_path, tokenizer, content):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"source 'web': no training documents: of \d lines \d are empty, 0 bad and 0 held out"):
        tokenize(tmp_path / "run", tmp_path / "text", tokenizer)


def test_what_a_stage_cannot_start_with(tmp_path, text, tokenizer):
    tokenizer.copy_to(tmp_path / "with_bos")
    hugging_face(tmp_path / "without_bos", special=("<end>",), names={"eos_token": "<end>"})
    cases = [
        (stage_of(text / "none", tmp_path / "with_bos"), r"source 'web': no file matches '.*none/\*\.jsonl'"),
        (stage_of(text, tmp_path / "no_tokenizer"), r"no_tokenizer: no such file or folder"),
        (stage_of(text, tmp_path / "without_bos", bos=True), r"stage corpus: bos=true, but tokenizer .* has no beginning.*set bos=false"),
        (stage_of(text, tmp_path / "with_bos", source={"name": "../web"}), r"source '\.\./web': its name becomes a folder's name"),
    ]
    for number, (stage, message) in enumerate(cases):
        run = write_run(tmp_path / f"run{number}", "test", stage, {})
        with pytest.raises(DataError, match=message):
            run_tokenize(run)


def test_text_and_tokenizer_come_from_the_stages_it_names(tmp_path, tokenizer):
    counts = dict.fromkeys(
        (
            "math_prose_bytes",
            "general_prose_bytes",
            "short_problems",
            "long_problems",
            "instruction_problems",
            "rl_problems",
            "evaluation_problems",
            "seed",
        ),
        1,
    )
    text_run = write_run(tmp_path / "text", "test", TextStage(name="text", **counts), {})
    (text_run.path / "text").mkdir()
    (text_run.path / "text" / "web.jsonl").write_text(json.dumps({"id": "x", "text": "the fox"}))
    tokenizer_stage = TokenizerStage(name="pieces", text="text", vocab_size=400)
    tokenizer_run = write_run(tmp_path / "pieces", "test", tokenizer_stage, {"text": text_run.path})
    tokenizer.copy_to(tokenizer_run.path / "tokenizer")
    source = Source(name="web", paths=("web.jsonl",), max_epochs=1.0)
    stage = TokenizeStage(name="corpus", sources=(source,), tokenizer="pieces", text="text")
    run = write_run(tmp_path / "corpus", "test", stage, {"text": text_run.path, "tokenizer": tokenizer_run.path})
    with pytest.raises(RunError, match=r"stage 'text' is not finished"):
        run_tokenize(run)
    mark_done(text_run, {})
    mark_done(tokenizer_run, {})
    run_tokenize(run)
    assert documents(run, "train") == [("x", [*tokenizer.encode("the fox"), tokenizer.eod_id])]
    assert run.is_done()
    inputs = read_json(run.path / "provenance.json", "")["inputs"]
    assert inputs == {"text": text_run.science_hash, "tokenizer": tokenizer_run.science_hash}
