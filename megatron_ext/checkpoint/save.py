"""Saving a checkpoint: every rank writes its own part aside, rank 0 publishes the whole.

    begin (all ranks)    plan together; copy, where the writing is to go on beside the training
    write (each rank)    data files, hashed and forced to the disk; the outcome goes to the group's store
    publish (rank 0)     wait for all outcomes; metadata, manifest; one rename, then the tracker
    finish (all ranks)   wait for rank 0's word: published, or why not

Only `begin` takes part in collectives. Ranks hear of each other through the process group's key-value
store, so that a rank whose disk is full can say so while the others train on, write or wait.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.distributed_c10d import _get_default_store

from megatron_ext.attempts import pulse
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.failures import first_failure
from megatron_ext.checkpoint.hashing import Digests, HashingFileSystem
from megatron_ext.checkpoint.stream_writing import write_bytes
from megatron_ext.checkpoint.writing import Buffers, Planned, Written, plan_write
from megatron_ext.distributed import TIMEOUT_SECONDS
from megatron_ext.errors import CheckpointError, MegatronExtError
from megatron_ext.provenance import Manifest, write_manifest
from megatron_ext.runs import force_to_disk

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.005, 0.5
WRITTEN, OUTCOME, HEARD = "written", "outcome", "heard"
HEARD_SECONDS = 30.0


@dataclass(frozen=True)
class Target:
    """Where a checkpoint goes, what its manifest says, and who may publish it."""

    checkpoints: Path
    iteration: int
    attempt: int
    manifest: Callable[[Digests], Manifest]  # from the digests of all files
    may_publish: Callable[[], None] = lambda: None  # raises where this writer has lost the right to the run folder
    files: Mapping[str, bytes] = field(default_factory=dict)  # what rank 0 writes beside the tensors, by name
    tidy: Callable[[], str] = lambda: ""  # what rank 0 does after it has published, such as removing old ones; what to warn of

    @property
    def aside(self) -> Path:
        """Where it is written."""
        return folders.aside_path(self.checkpoints, self.iteration, self.attempt)


def _own_store() -> Any:
    """A connection to the process group's key-value store that no other thread uses."""
    store: Any = _get_default_store()
    return store.clone()


@dataclass
class Save:
    """A save under way on this rank."""

    target: Target
    planned: Planned | None  # None: it could not even be planned, as `failure` says on every rank
    prefix: str
    started: float
    failure: str = ""  # of this rank
    stall_seconds: float = 0.0  # how long training waited for `begin`
    seconds: float = 0.0  # from begin to publish, once finished
    warning: str = ""  # what went wrong after the publish
    _thread: threading.Thread | None = None
    _store: Any = field(default_factory=_own_store)  # a thread needs one of its own
    _writers_store: Any = field(default_factory=_own_store)

    def is_over(self) -> bool:
        """Whether it is known how it ended; never waits."""
        return self.planned is None or bool(self._store.check([self.prefix + OUTCOME]))

    def finish(self) -> Path:
        """Wait for the end. The published folder; `CheckpointError` or `RunError`, the same on every rank, where there is none."""
        if self._thread is not None:
            self._thread.join()
        self.seconds = time.perf_counter() - self.started
        if self.planned is None:
            raise CheckpointError(self.failure)
        outcome = json.loads(_wait(self._store, self.prefix + OUTCOME))
        self.seconds = time.perf_counter() - self.started
        self.warning = outcome.get("warning", "")
        if outcome["error"]:
            self._hear_all()
            kind = next((kind for kind in _family(MegatronExtError) if kind.__name__ == outcome["kind"]), CheckpointError)
            raise kind(outcome["error"])
        return folders.iteration_path(self.target.checkpoints, self.target.iteration)

    def _hear_all(self) -> None:
        """Let no rank miss why: rank 0, which keeps the store, may be about to end."""
        self._store.set(f"{self.prefix}{HEARD}/{dist.get_rank()}", "")
        if dist.get_rank() == 0:
            deadline = time.monotonic() + HEARD_SECONDS
            keys = [f"{self.prefix}{HEARD}/{rank}" for rank in range(dist.get_world_size())]
            while not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def run(self, buffers: Buffers | None) -> None:
        """Copy, if there are buffers, and go on in a thread; else write here."""
        assert self.planned is not None
        if buffers is None:
            self._write()
            return
        try:
            self.planned.copy(buffers)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            self.failure = _line(error)
        self._thread = threading.Thread(target=self._write, name=f"save {self.target.iteration}")
        self._thread.start()

    def _write(self) -> None:
        """Write this rank's part, tell the others, and on rank 0 publish. Failures go to the store, never past it."""
        assert self.planned is not None
        told = ""
        try:
            told = "" if self.failure else self.planned.write().to_json()
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - torch's own is no Exception; the others must hear of any
            self.failure = _line(first_failure(error))
        store = self._writers_store
        store.set(f"{self.prefix}{WRITTEN}/{dist.get_rank()}", json.dumps({"failure": self.failure, "written": told}))
        if dist.get_rank() == 0:
            store.set(self.prefix + OUTCOME, json.dumps(self._publish(self.planned, store)))

    def _publish(self, planned: Planned, store: Any) -> dict[str, str]:
        try:
            _publish(self.target, planned, _gather(store, self.prefix))
        except Exception as error:  # noqa: BLE001 - whatever it is, every rank must hear of it
            cause = _cause(self.target, error)
            return {"kind": type(cause).__name__, "error": str(cause)}
        try:
            return {"error": "", "warning": self.target.tidy()}
        except (OSError, MegatronExtError) as error:
            return {"error": "", "warning": f"{self.target.checkpoints}: old checkpoints could not be removed: {error}"}


def begin_save(state_dict: dict[str, Any], target: Target, buffers: Buffers | None = None) -> Save:
    """Start a save on all ranks (collective); with `buffers` it goes on in a thread, from a copy of the state in them.

    The buffers (empty at first) are kept for the next save, and belong to this one until it is finished.
    One save at a time: finish one before the next begins. What goes wrong is said by `finish`.
    """
    started, failure, planned = time.perf_counter(), "", None
    try:
        planned = plan_write(state_dict, target.aside)
    except CheckpointException as error:  # torch tells it to every rank
        failure = f"{target.aside}: could not be begun: {_line(first_failure(error))}; the last published checkpoint stands"
    save = Save(target, planned, f"save/{target.checkpoints}/{target.iteration}/{_number()}/", started, failure)
    if planned is not None:
        save.run(buffers)
    save.stall_seconds = time.perf_counter() - started
    return save


_begun = [0]


def _number() -> int:
    """How many saves this process has begun: the same on every rank, and never used again."""
    _begun[0] += 1
    return _begun[0]


def save_checkpoint(state_dict: dict[str, Any], target: Target) -> Path:
    """Write and publish a checkpoint and wait for it; the published folder."""
    return begin_save(state_dict, target).finish()


def _gather(store: Any, prefix: str) -> list[Written]:
    """What every rank wrote; `OSError` of the first that could not."""
    keys = [f"{prefix}{WRITTEN}/{rank}" for rank in range(dist.get_world_size())]
    told = [json.loads(_wait(store, key)) for key in keys]
    for key in keys:
        store.delete_key(key)
    for rank, one in enumerate(told):
        if one["failure"]:
            raise OSError(one["failure"] + (f" (rank {rank})" if rank else ""))
    return [Written.from_json(one["written"]) for one in told]


def _publish(target: Target, planned: Planned, ranks: list[Written]) -> None:
    digests = planned.finish(ranks)
    write_manifest(target.aside, target.manifest({**digests, **_write_files(target, digests)}))
    force_to_disk(target.aside)
    folders.publish(target.checkpoints, target.iteration, target.attempt, target.may_publish)
    force_to_disk(target.checkpoints)


def _write_files(target: Target, taken: Digests) -> Digests:
    """Write what stands beside the tensors, each file forced to the disk; their digests."""
    assert not taken.keys() & target.files.keys(), (list(taken), list(target.files))
    system = HashingFileSystem()
    for name, data in target.files.items():
        write_bytes(system, target.aside / name, data)
    return system.digests


def _cause(target: Target, error: Exception) -> MegatronExtError:
    """Why nothing was published. What was written of it is deleted, all ranks having ended theirs."""
    if isinstance(error, MegatronExtError):
        return error
    try:
        target.may_publish()  # a newer owner takes the files away, which looks like a failing disk
    except MegatronExtError as lost:
        return lost
    with contextlib.suppress(OSError):
        shutil.rmtree(folders.staging_path(target.checkpoints, target.attempt))
    return CheckpointError(
        f"{target.aside}: could not be written: {_line(error)}; make room on its disk, if that is full, and start the stage again: "
        f"the last published checkpoint stands"
    )


def _line(error: BaseException) -> str:
    """An error in a message: in the system's words where it is the system's, else with its name."""
    return str(error) if isinstance(error, OSError | MegatronExtError) else f"{type(error).__name__}: {error}"


def _wait(store: Any, key: str) -> str:
    """A key's value, once it is there."""
    deadline, pause_seconds = time.monotonic() + TIMEOUT_SECONDS, POLL_SECONDS
    while not store.check([key]):
        pulse()
        if time.monotonic() > deadline:
            raise CheckpointError(f"no word of {key} after {datetime.timedelta(seconds=TIMEOUT_SECONDS)}: a rank hangs or is lost")
        time.sleep(pause_seconds)
        pause_seconds = min(1.2 * pause_seconds, LONGEST_POLL_SECONDS)  # a thousand ranks ask one store
    value: bytes = store.get(key)
    return value.decode()


def _family(kind: type[MegatronExtError]) -> list[type[MegatronExtError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in _family(child))]
