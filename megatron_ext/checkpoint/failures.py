"""What really failed when torch saves or loads a checkpoint on many ranks."""

from __future__ import annotations

from torch.distributed.checkpoint import CheckpointException


def first_failure(error: BaseException) -> BaseException:
    """The error of the first rank that failed; `error` itself where torch did not pack it up.

    torch gathers the ranks' errors into a CheckpointException, which is no `Exception` and so slips
    through every `except` that names the real one.
    """
    if not isinstance(error, CheckpointException) or not error.failures:
        return error
    rank = min(error.failures)
    cause, _ = error.failures[rank]
    return cause
