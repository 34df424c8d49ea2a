"""What runs a rank inside a container: options of srun for pyxis, words before the command for Apptainer. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.cluster import MOUNT, Container
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Wrapping:
    """How a rank's command is wrapped."""

    srun_options: tuple[str, ...] = ()
    command_prefix: tuple[str, ...] = ()


def wrapping(container: Container, needed: Iterable[Path], directory: Path, variables: Iterable[str], with_gpus: bool) -> Wrapping:
    """How `container` is entered: with the folders `needed` at their own paths, in `directory`.

    variables: names that must have the job's values, whatever the image sets.
    """
    if container.runtime == "none":
        return Wrapping()
    mounts = all_mounts(container.mounts, needed)
    if container.runtime == "pyxis":
        options = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={directory}"]
        return Wrapping(srun_options=(*options, f"--container-env={','.join(sorted(variables))}"))
    binds = [word for mount in mounts for word in ("--bind", mount)]
    gpus = ["--nv"] if with_gpus else []
    return Wrapping(command_prefix=("apptainer", "exec", *gpus, *binds, "--pwd", str(directory), container.image))


def all_mounts(named: tuple[str, ...], needed: Iterable[Path]) -> list[str]:
    """The named mounts, and each folder that is needed and that none of them already shows under its own path, to read and write."""
    mounts = list(named)
    for folder in needed:
        if not any(_shows(mount, folder) for mount in mounts):
            if set(",:") & set(str(folder)):
                raise ConfigError(f"{folder}: ',' and ':' in a path cannot be mounted into a container; use a folder without them")
            mounts.append(f"{folder}:{folder}")
    return mounts


def _shows(mount: str, folder: Path) -> bool:
    found = MOUNT.fullmatch(mount)
    assert found is not None, mount  # Container and all_mounts let no other pass
    host, inside, mode = found.groups()
    return host == inside and mode != ":ro" and folder.is_relative_to(host)
