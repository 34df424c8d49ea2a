"""torchrun for ranks that stop on request: `python -m megatron_ext.training.torchrun ARGUMENTS`.

As `torch.distributed.run`, but where its ranks end with `EXIT_AGAIN`, so does it, without a traceback. SIGUSR1 and SIGUSR2 are
passed on to the ranks. So is SIGTERM, by torchrun itself, which gives them 30 seconds (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from megatron_ext.errors import EXIT_AGAIN

PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)


def main(arguments: Sequence[str]) -> int:
    """The exit code of the ranks where they agree to be started again, or of a shell whose work was ended by a signal."""
    for number in PASSED_ON:
        signal.signal(number, _pass_on)
    try:
        torchrun(list(arguments))
    except ChildFailedError as failed:
        if any(one.exitcode != EXIT_AGAIN for one in failed.failures.values()):
            raise
        return EXIT_AGAIN
    except SignalException as asked:
        return EXIT_AGAIN if asked.sigval == signal.SIGTERM else 128 + asked.sigval
    return 0


def _pass_on(number: int, _: FrameType | None) -> None:
    for rank in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
