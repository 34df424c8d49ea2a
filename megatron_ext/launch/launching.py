"""`megatron-ext launch`: what its words say is run here, handed to Slurm, or shown."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.errors import LaunchError
from megatron_ext.launch.load import load_graph
from megatron_ext.launch.ranks import Permissions


def launch_command(
    recipe: str, overrides: list[str], cluster: str | None, runs: Path, local: bool, dry_run: bool, first: str | None,
    doctor: bool, other_code: bool, take_over: bool,
) -> None:  # fmt: skip
    """Show a recipe's stages (`dry_run`), run them here (`local`), or submit them to the Slurm of `cluster`, from the stage `first` on."""
    graph, facts = load_graph(recipe, overrides, cluster)
    permissions = Permissions(other_code=other_code, take_over=take_over)
    if dry_run:
        from megatron_ext.launch.dry_run import print_dry_run

        print_dry_run(graph, facts, runs)
    elif local:
        from megatron_ext.launch.local import launch_local

        if first:
            raise LaunchError("launch: --from chooses among jobs; --local runs what is missing anyway, so leave it out")
        launch_local(graph, runs, facts, permissions, doctor)
    elif facts is not None:
        from megatron_ext.launch.submit import launch_cluster

        launch_cluster(graph, runs, facts, permissions, first, doctor)
    else:
        raise LaunchError(
            "launch: say where: --cluster NAME submits to its Slurm, --local runs here, --dry-run shows what would run and writes nothing"
        )
