"""Loading a checkpoint: manifest and sizes first, then Megatron's resharding load through the guards."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException, Metadata

from megatron_ext.checkpoint import safe_reading
from megatron_ext.checkpoint.extra_state import refuse_extra_state
from megatron_ext.checkpoint.failures import first_failure
from megatron_ext.checkpoint.verify import check_files
from megatron_ext.errors import CheckpointError, DamagedCheckpointError
from megatron_ext.provenance import MANIFEST, Manifest, read_manifest


def load_state(state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state dict from a checkpoint under any layout.

    `CheckpointError` names what does not fit, or what was refused; `DamagedCheckpointError` what is missing or broken.
    """
    safe_reading.install()
    open_metadata(folder)  # torch would bury a refusal under a retry and two tracebacks
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state_dict, str(folder))
    except (CheckpointException, CheckpointingException, KeyError, AssertionError, TypeError, ValueError) as error:
        raise _explained(folder, first_failure(error)) from error
    return loaded


def open_metadata(folder: Path) -> Metadata:
    """A checkpoint's metadata after every check that a load begins with: files and sizes, `.metadata`, extra states."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    metadata = safe_reading.read_metadata(folder)
    _refuse_unlisted(folder, metadata, manifest)
    refuse_extra_state(folder, metadata)
    return metadata


def _refuse_unlisted(folder: Path, metadata: Metadata, manifest: Manifest) -> None:
    """Nothing is read that the manifest has no digest of."""
    unlisted = sorted({info.relative_path for info in (metadata.storage_data or {}).values()} - set(manifest.files))
    if unlisted:
        raise CheckpointError(f"{folder / '.metadata'}: points to {unlisted[0]!r}, which {MANIFEST} does not list; it was altered")


def _explained(folder: Path, cause: BaseException) -> CheckpointError:
    """What a failed load means: refused by a guard, of another shape, or damaged."""
    if isinstance(cause, CheckpointError):
        return cause if str(folder) in str(cause) else type(cause)(f"{folder}: {cause}")
    if isinstance(cause, CheckpointingException | KeyError | AssertionError | TypeError | ValueError):
        return CheckpointError(f"{folder}: does not fit the model or optimizer of this stage: {cause}")
    if isinstance(cause, pickle.UnpicklingError):
        return CheckpointError(f"{folder}: could not be read: a tensor holds other than plain numbers; it was damaged or altered")
    return DamagedCheckpointError(f"{folder}: could not be read: {cause}; it was damaged or altered, use another checkpoint of the run")
