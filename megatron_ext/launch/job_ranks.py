"""The surroundings of a job's ranks: the values that they find in their environment, secrets among them, and where they meet.

Standard library alone (Python 3.9), as all of the supervisor.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.errors import LaunchError
from megatron_ext.redaction import SECRETS

FIRST_PORT, NUM_PORTS = 15_000, 16_000  # below the ports that Linux hands out by itself (32768 and up)


def rank_environment(job: dict[str, Any], nodes: list[str], meeting_number: int, secrets: Mapping[str, str]) -> dict[str, str]:
    """What srun hands to every rank: this process's environment, the cluster's values, the secrets, and the meeting place.

    The port differs from one meeting of the job to the next, so that what a killed one left bound is not met again.
    """
    port = FIRST_PORT + (int(os.environ["SLURM_JOB_ID"]) * 31 + meeting_number) % NUM_PORTS
    meeting = {"MASTER_ADDR": nodes[0], "MASTER_PORT": str(_free_port(port))}
    values = {name: str(value) for name, value in job["environment"].items()}
    return {**os.environ, **values, **secrets, **meeting, SECRETS: ",".join(secrets)}


def _free_port(port: int) -> int:
    """The first port from here on that nothing on this host, where rank 0 runs too, listens at."""
    for candidate in range(port, port + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", candidate))
            except OSError:
                continue
            return candidate
    raise LaunchError(
        f"ports {port} to {port + 99} of {socket.gethostname()} are all in use; see what listens there, or leave the node out"
    )


def read_secrets(job: dict[str, Any]) -> dict[str, str]:
    """The secrets that a job may see, by name; `LaunchError` where their file can be read by others or lacks one.

    Without a file they have come in this process's environment, or are missing.
    """
    names = job.get("secrets", [])
    found = _from_file(Path(job["secrets_file"])) if names and job.get("secrets_file") else os.environ
    missing = [name for name in names if name not in found]
    if missing:
        where = job.get("secrets_file") or "the environment of who submitted the job"
        raise LaunchError(
            f"secrets {', '.join(missing)} are not in {where}; put them there, or take them out of slurm.secrets of the cluster"
        )
    return {name: found[name] for name in names}


def _from_file(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read().splitlines()
    except OSError as cause:
        raise LaunchError(f"{path}: the secrets file cannot be read ({cause.strerror}); write KEY=value lines into it, mode 0600") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise LaunchError(f"{path}: others may read the secrets in it (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}")
    pairs = (line.partition("=") for line in lines if "=" in line and not line.lstrip().startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}
