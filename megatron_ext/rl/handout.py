"""A step's rollouts from rank 0, which grades them, to every rank: what an update needs of them, and no more.

Token ids, log-probabilities and weight versions travel as flat tensors, these as runs of equal ones; the rest is one small object.
What was said - a response's text, its answer, the grader's reasons - stays on rank 0, which alone measures and records it: at 2,048
responses of 8,192 tokens it would be a third of all, unpickled on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_ext.distributed import Groups, agreed, broadcast_object
from megatron_ext.rl.rollouts import Batch, Rollout

Arrays = dict[str, npt.NDArray[Any]]
KINDS = {"lengths": np.int32, "tokens": np.int32, "logprobs": np.float32, "versions": np.int32, "repeats": np.int32}
NO_IDS, NO_LOGPROBS = np.empty(0, np.int32), np.empty(0, np.float32)


def handed_out(groups: Groups, what: str, work: Callable[[], Sequence[Rollout]]) -> list[Rollout]:
    """The rollouts that `work` gives on rank 0, on every rank; its failure too, as `agreed`. Every rank calls it.

    Rank 0 has them as they are, the others as `without_words` leaves them, equal to the bit.
    """
    given: list[Rollout] = []

    def pack() -> tuple[list[Rollout], Arrays]:
        given.extend(work())
        return _packed(given)

    rows, arrays = agreed(groups, what, lambda: pack() if groups.rank == 0 else ([], {}))
    rows, sizes = broadcast_object((rows, {name: array.size for name, array in arrays.items()}))
    received = {name: _broadcast(groups, arrays.get(name), sizes[name], name) for name in KINDS}
    return given if groups.rank == 0 else _unpacked(rows, received)


def handed_out_batch(groups: Groups, what: str, work: Callable[[], Batch]) -> Batch:
    """The batch that `work` gives on rank 0, on every rank, its rollouts as `handed_out`."""
    given: list[Batch] = []

    def rollouts() -> list[Rollout]:
        given.append(work())
        return [*given[0].rollouts, *given[0].unused]

    found = handed_out(groups, what, rollouts)
    rest, used = broadcast_object((replace(given[0], rollouts=(), unused=()), len(given[0].rollouts)) if given else None)
    whole: Batch = replace(rest, rollouts=tuple(found[:used]), unused=tuple(found[used:]))
    return whole


def without_words(one: Rollout) -> Rollout:
    """A rollout without what only people and the grader read."""
    verdict = replace(one.verdict, answer=None, why="") if one.verdict else None
    return replace(one, generation=replace(one.generation, text=""), verdict=verdict, cause="")


def _packed(rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Arrays]:
    """The small object, and the arrays by `KINDS`."""
    bare = [without_words(one) for one in rollouts]
    rows = [replace(one, generation=replace(one.generation, tokens=NO_IDS, logprobs=NO_LOGPROBS, weight_versions=NO_IDS)) for one in bare]
    made = [one.generation for one in rollouts]
    assert all(len(one.tokens) == len(one.logprobs) == len(one.weight_versions) for one in made), "one of each a token"
    versions, repeats = _runs(_flat([one.weight_versions for one in made], "versions"))
    return rows, {
        "lengths": np.array([len(one.tokens) for one in made], KINDS["lengths"]),
        "tokens": _flat([one.tokens for one in made], "tokens"),
        "logprobs": _flat([one.logprobs for one in made], "logprobs"),
        "versions": versions,
        "repeats": repeats.astype(KINDS["repeats"]),
    }


def _unpacked(rows: Sequence[Rollout], arrays: Arrays) -> list[Rollout]:
    ends = np.cumsum(arrays["lengths"])[:-1]
    flat = (arrays["tokens"], arrays["logprobs"], np.repeat(arrays["versions"], arrays["repeats"]))
    parts = zip(rows, *(np.split(array, ends) for array in flat), strict=True)
    return [
        replace(one, generation=replace(one.generation, tokens=tokens, logprobs=logprobs, weight_versions=versions))
        for one, tokens, logprobs, versions in parts
    ]


def _flat(arrays: Sequence[npt.NDArray[Any]], name: str) -> npt.NDArray[Any]:
    kind = KINDS[name]
    return np.concatenate([np.empty(0, kind), *arrays]).astype(kind, copy=False)


def _runs(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Values as they change, and how often each stands: one of each where all tokens are of the same weights."""
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: values.size])
    return values[starts], np.diff(starts, append=values.size)


def _broadcast(groups: Groups, own: npt.NDArray[Any] | None, size: int, name: str) -> npt.NDArray[Any]:
    tensor = torch.from_numpy(np.empty(size, KINDS[name]) if own is None else own).to(groups.device)
    dist.broadcast(tensor, src=0)
    return tensor.cpu().numpy()
