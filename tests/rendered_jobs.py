"""Jobs whose scripts are kept in tests/golden/slurm: `python -m tests.rendered_jobs` writes them anew, and git shows what changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.config.base import to_json
from megatron_ext.config.cluster import Cluster, Container
from megatron_ext.launch.graph import with_overrides
from megatron_ext.launch.render import PARTS_SCRIPT, Job, job_of, joints_of, script_text, scripts_of
from recipes import ablations, clusters, octothinker

GOLDEN = Path(__file__).parent / "golden" / "slurm"
RUNS, DIRECTORY = Path("/shared/me/runs"), Path("/home/me/project")
SNAPSHOT = RUNS / ".code" / "0123456789abcdef"
ONE_JOB = ("corpus.plan.workers=32", "corpus.plan.parts=1")
STRANGE = Path('/shared/a b/it\'s 100%/"x" #z;&')  # a folder of runs


def ours(**changes: Any) -> Cluster:
    """The h100 with some of a site's own words."""
    site: dict[str, Any] = {"partition": "batch", "cpu_partition": "cpu", "account": "project_42", "qos": "long", "constraint": "h100&ib"}
    base = replace(clusters.SLURM, **{**site, "secrets": ("HF_TOKEN",), "excluded_nodes": ("node007", "node013"), **changes})
    return replace(clusters.h100(), name="ours", slurm=base)


def job(recipe: Any, stage: str, cluster: Cluster, runs: Path = RUNS, overrides: tuple[str, ...] = ()) -> Job:
    """The job of one stage of a recipe."""
    graph = with_overrides(recipe(), list(overrides))
    folder, one = runs / graph.name, graph.stage(stage)
    return job_of(folder / stage, graph.name, one, cluster, SNAPSHOT, joints_of(graph, one, folder), DIRECTORY)


def jobs() -> dict[str, Job]:
    """Name of a golden file -> its job."""
    pyxis = Container(runtime="pyxis", image="/shared/images/megatron_ext.sqsh", mounts=("/shared:/shared", "/data/llama:/llama:ro"))
    apptainer = Container(runtime="apptainer", image="/shared/images/megatron ext.sif", mounts=("/home/me:/home/me",))
    modules = ("module load cuda/13.0", "ulimit -l unlimited")
    secrets_file = "/home/me/.config/megatron_ext/secrets"
    typed = ours(gpus_option="gres=gpu:h100:{gpus}", exclusive=False, host_python="/opt/my python/bin/python3", excluded_nodes=())
    return {
        "no_container": job(octothinker.llama_3b, "stable", ours(setup=modules)),
        "joint": job(ablations.decay_qa, "stable", clusters.h100()),
        "pyxis": job(octothinker.llama_3b, "decay_long", ours(container=pyxis)),
        "apptainer": job(octothinker.llama_3b, "rl_long", ours(container=apptainer, secrets_file=secrets_file)),
        "cpu_only": job(octothinker.llama_3b, "corpus", ours(cpu_memory_bytes=64 * 2**30), overrides=ONE_JOB),
        "array": job(octothinker.llama_3b, "corpus", ours(container=pyxis), overrides=("corpus.plan.parts=8",)),
        "scale": job(octothinker.llama_8b, "stable", ours(max_nodes=128), overrides=("stable.plan.nodes=128",)),
        "strange_names": job(octothinker.llama_3b, "decay_short", typed, STRANGE),
    }


def texts() -> dict[str, str]:
    """File name -> what stands in it, for every golden file."""
    found = {f"{name}.sbatch": script_text(one) for name, one in jobs().items()}
    found["array.parts.sbatch"] = scripts_of(jobs()["array"])[PARTS_SCRIPT]
    return found | {f"{name}.json": json.dumps(to_json(one), indent=2) + "\n" for name, one in jobs().items()}


def main() -> None:
    """Write the golden files."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        (GOLDEN / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
