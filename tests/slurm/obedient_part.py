"""A part of a stage that notes each of its starts, and waits, on its first one, until it is asked to stop.

    python obedient_part.py RUN WAITING I

Part I of those numbered in WAITING (as 1,2) waits; the others end at once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

run, waiting, part = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
start = os.environ.get("SLURM_RESTART_COUNT") or "0"
(run / f"part-{part}.{start}").touch()
if part in waiting and start == "0":
    signal.sigwait([signal.SIGUSR1, signal.SIGTERM])
    sys.exit(75)
