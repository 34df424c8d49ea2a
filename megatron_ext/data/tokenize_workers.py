"""The processes that tokenize slices: started, watched and ended here. Each has one thread and its own tokenizer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from megatron_ext.config.stages import TokenizeStage
from megatron_ext.data.tokenize_slice import SliceRecord, SliceTask, tokenize_slice
from megatron_ext.errors import RunError
from megatron_ext.progress import Meter, progress
from megatron_ext.runs import Run
from megatron_ext.tokenizer import load_tokenizer

SHOW_EVERY_SECONDS = 0.5
COUNTS = 3  # documents, tokens, bytes; after them in the shared array stands the word to stop


def tokenize_slices(
    run: Run, all_tasks: list[SliceTask], finished: dict[Path, SliceRecord], tokenizer_folder: Path
) -> dict[Path, SliceRecord]:
    """Do the slices that are not finished, in `plan.workers` processes; their records by path.

    Raises the first failure of a slice; `RunError` where a worker is killed or a file cannot be written.
    """
    tasks = [task for task in all_tasks if task.record_path not in finished]
    if not tasks:
        return {}
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", COUNTS + 1)
    done_bytes = sum(record.bytes for record in finished.values())
    total_bytes = done_bytes + sum(task.part.end - task.part.start for task in tasks)
    workers = min(run.stage.plan.workers, len(tasks))
    with (
        progress(f"Tokenize {run.name}", total=total_bytes, unit="bytes", done=done_bytes) as bar,
        ProcessPoolExecutor(workers, context, _start_worker, (run.stage, tokenizer_folder, counts)) as pool,
    ):
        futures: dict[Future[SliceRecord], SliceTask] = {}
        try:  # a worker may die while its tasks are still being handed out
            futures.update((pool.submit(_do_slice, task), task) for task in tasks)
            _watch(futures, counts, bar)
        except BrokenProcessPool:
            raise RunError(
                f"{run.path}: a worker process was killed, perhaps for want of memory; finished slices are kept: "
                f"run the stage again, with fewer plan.workers than {workers} if memory was short"
            ) from None
        except OSError as cause:
            raise RunError(f"{run.path}: {cause}; finished slices are kept: put this right and run the stage again") from cause
        finally:
            counts[COUNTS] = 1
            pool.shutdown(cancel_futures=True)
    return {task.record_path: future.result() for future, task in futures.items()}


def _watch(futures: dict[Future[SliceRecord], SliceTask], counts: Any, bar: Meter) -> None:
    """Wait for all futures and show what the workers report; raises the first failure."""
    waiting, shown_bytes, began = set(futures), 0, time.monotonic()
    while waiting:
        finished, waiting = wait(waiting, timeout=SHOW_EVERY_SECONDS, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
        documents, tokens, size_bytes = counts[:COUNTS]
        speed = f"{size_bytes / 1e6 / (time.monotonic() - began):.2f} MB/s"
        bar.update(size_bytes - shown_bytes, documents=documents, tokens=tokens, speed=speed)
        shown_bytes = size_bytes


class _Stopped(Exception):
    """Another slice failed, so this one need not go on."""


class _Worker:
    """One worker process: the tokenizer it has loaded, and the counts it shares with the others."""

    def __init__(self, stage: TokenizeStage, tokenizer_folder: Path, counts: Any) -> None:
        self.stage, self.tokenizer, self.counts = stage, load_tokenizer(tokenizer_folder), counts
        self._told, self._told_at = [0] * COUNTS, 0.0

    def do(self, task: SliceTask) -> SliceRecord:
        self._told = [0] * COUNTS
        record = tokenize_slice(task, self.stage, self.tokenizer, self.report)
        self._told_at = 0.0
        self.report(record)
        return record

    def report(self, record: SliceRecord) -> None:
        """Add what is new in a record to the shared counts, now and then; `_Stopped` where the work was called off."""
        if time.monotonic() - self._told_at < SHOW_EVERY_SECONDS:
            return
        self._told_at = time.monotonic()
        now = [sum(record.documents.values()), sum(record.tokens.values()), record.bytes]
        with self.counts.get_lock():
            for i, (new, old) in enumerate(zip(now, self._told, strict=True)):
                self.counts[i] += new - old
        self._told = now
        if self.counts[COUNTS]:
            raise _Stopped


_worker: list[_Worker] = []  # the one of this process, once it has started as a worker


def _start_worker(stage: TokenizeStage, tokenizer_folder: Path, counts: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are the parallelism: one thread each
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker.append(_Worker(stage, tokenizer_folder, counts))


def _die_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would write beside those of the next attempt."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do_slice(task: SliceTask) -> SliceRecord:
    return _worker[0].do(task)
