"""An export as a process of its own, beside a training: `python -m megatron_ext.conversion.beside CKPT DIR`.

It gives way to the training on the processor, sees no GPU, and ends when the process that started it does, so
that the next attempt never meets a writer of the last one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_ext.interruption import leave_to_parent

PARENT = "MEGATRON_EXT_EXPORT_PARENT"
LAUNCHERS = ("TORCHELASTIC_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_")
VERIFIED = "verified"
POLITENESS = 10
PR_SET_PDEATHSIG = 1


def start_export(checkpoint: Path, target: Path, log: Path, is_verified: bool) -> subprocess.Popen[Any]:
    """Start an export of a published checkpoint into `target`; what it prints goes to `log`. `OSError` where it cannot be.

    `is_verified`: its digests need not be checked, this very attempt having written it.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", PARENT: str(os.getpid())}
    command = [sys.executable, "-m", "megatron_ext.conversion.beside", str(checkpoint), str(target), *([VERIFIED] if is_verified else [])]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux); end at once if it already has."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):
        sys.exit(1)


def main() -> int:
    """Export argument 1, a checkpoint, into argument 2; 2 with a message where it cannot be."""
    _end_with_parent()
    leave_to_parent()
    os.nice(POLITENESS)
    from megatron_ext.conversion.to_hugging_face import megatron_to_hf
    from megatron_ext.errors import MegatronExtError

    try:
        megatron_to_hf(Path(sys.argv[1]), Path(sys.argv[2]), is_verified=VERIFIED in sys.argv[3:])
    except MegatronExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
