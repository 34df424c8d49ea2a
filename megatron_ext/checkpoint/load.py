"""Loading a checkpoint: sidecar and sizes first, then Megatron's resharding load through the guards."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from megatron_ext.checkpoint import safe_reading
from megatron_ext.checkpoint.failures import first_failure
from megatron_ext.errors import CheckpointError
from megatron_ext.provenance import MANIFEST, Manifest, file_sha256, read_manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Every file the manifest lists is there, inside the checkpoint, and has its size."""
    for name, (size_bytes, _) in manifest.files.items():
        path = folder / name
        if Path(name).name != name or name in ("", ".."):
            raise CheckpointError(f"{folder}: the manifest names a file outside the checkpoint: {name!r}; it was altered")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the manifest lists it; use another checkpoint of the run")
        if path.stat().st_size != size_bytes:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, the manifest says {size_bytes:,}; it was cut short or altered")


def verify(folder: Path) -> Manifest:
    """Read every file and compare digests, and see that no other lies beside them; never unpickles."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    unlisted = sorted({path.name for path in folder.iterdir()} - {*manifest.files, MANIFEST})
    if unlisted:
        raise CheckpointError(f"{folder}: holds {', '.join(unlisted)}, which the manifest does not list; it was altered")
    for name, (_, sha256) in manifest.files.items():
        if file_sha256(folder / name) != sha256:
            raise CheckpointError(f"{folder / name}: its bytes do not hash to what the manifest says; use another checkpoint of the run")
    return manifest


def load_state(state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state dict from a checkpoint under any layout; `CheckpointError` names what does not fit."""
    check_files(folder, read_manifest(folder))
    safe_reading.install()
    safe_reading.read_metadata(folder)  # torch would bury a refusal under a retry and two tracebacks
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state_dict, str(folder))
    except (CheckpointException, CheckpointingException, KeyError, AssertionError, TypeError, ValueError) as error:
        raise _explained(folder, first_failure(error)) from error
    return loaded


def _explained(folder: Path, cause: BaseException) -> CheckpointError:
    """What a failed load means: refused by a guard, of another shape, or damaged."""
    if isinstance(cause, CheckpointError):
        return cause if str(folder) in str(cause) else CheckpointError(f"{folder}: {cause}")
    if isinstance(cause, CheckpointingException | KeyError | AssertionError | TypeError | ValueError):
        return CheckpointError(f"{folder}: does not fit the model or optimizer of this stage: {cause}")
    what = "a tensor holds other than plain numbers" if isinstance(cause, pickle.UnpicklingError) else str(cause)
    return CheckpointError(f"{folder}: could not be read: {what}; it was damaged or altered, use another checkpoint of the run")
