"""Do to a real job on a throw-away Slurm what goes wrong on clusters, one fault after the other, and see what becomes of it.

    python -m tools.slurm_faults [FAULT ...] [--folder DIR] [--list]

A small model is trained by one pipeline over two nodes of tools/slurm_sandbox.sh: once undisturbed, and once for each fault. A fault is
survived where the job goes on by itself (but for what a person must do: launch again, make room) and ends with the same weights
and moments, bit for bit, and with each step once in its metrics. Prints a table in Markdown, with the seconds from the fault until
a step of training was finished again. Exits 1 where one was not survived. Needs root and Slurm's packages (tools/slurm_sandbox.sh
check); all fourteen take some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.slurm import fault_recipe, faults
from tests.slurm.faults import Fault, Outcome
from tests.slurm.faulty_stages import FaultyStage, Ground
from tests.slurm.sandbox import Sandbox

NUM_NODES = 3  # two for the stage, one to go to


def main() -> int:
    """Run the faults that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="by default all")
    parser.add_argument("--list", action="store_true", help="name the faults")
    parser.add_argument("--folder", type=Path, help="for the cluster and the run folders, outside /tmp; kept (default: a new one, removed)")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{fault.name:22}{fault.words}" for fault in faults.ALL.values()))
        return 0
    unknown = [name for name in arguments.faults if name not in faults.ALL]
    if unknown:
        parser.error(f"no fault {', '.join(unknown)}; there are: {', '.join(faults.ALL)}")
    chosen = [fault for fault in faults.ALL.values() if not arguments.faults or fault.name in arguments.faults]
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="slurm_faults_", dir="/var/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # Slurm's daemons refuse one that others cannot enter
    slurm = Sandbox.up(folder / "slurm", NUM_NODES)
    try:
        return run(slurm, folder / "runs", chosen)
    finally:
        slurm.down()
        if arguments.folder is None:
            shutil.rmtree(folder)


def run(slurm: Sandbox, runs: Path, chosen: list[Fault]) -> int:
    """Run the faults and print the table, line by line; the exit code."""
    ground = Ground.prepare(slurm, runs)
    undisturbed = ground.stage(fault_recipe.UNDISTURBED)
    ground.launch(undisturbed.name)
    undisturbed.until_done()
    print("| fault | outcome | seconds until it trains again |\n|---|---|---|", flush=True)
    survived = [tell(ground, fault, undisturbed) for fault in chosen]
    print(f"\n{sum(survived)} of {len(chosen)} survived; {os.cpu_count()} cores")
    return 0 if all(survived) else 1


def tell(ground: Ground, fault: Fault, undisturbed: FaultyStage) -> bool:
    """Print the line of one fault; whether it was survived."""
    try:
        outcome = faults.run(ground, fault, lambda: undisturbed)
    except AssertionError as problem:
        print(f"| {fault.words} | NOT SURVIVED | |", flush=True)
        print(problem, file=sys.stderr, flush=True)
        return False
    finally:
        ground.slurm.restore()
    seconds = "it never stops" if outcome.seconds is None else f"{outcome.seconds:.0f}"
    print(f"| {fault.words} | {words(outcome)} | {seconds} |", flush=True)
    return not outcome.differences


def words(outcome: Outcome) -> str:
    """The outcome in the table."""
    if outcome.differences:
        return "NOT SURVIVED: " + "; ".join(outcome.differences)
    return f"same weights and metrics, {outcome.attempts} attempt{'s' if outcome.attempts > 1 else ''}"


if __name__ == "__main__":
    sys.exit(main())
