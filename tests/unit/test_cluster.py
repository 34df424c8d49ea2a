"""What a cluster says of its Slurm and containers: refusals with their way out, and a page that explains every field."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.base import field_names, from_json, to_json
from megatron_ext.config.cluster import Cluster, Container, Slurm
from megatron_ext.errors import ConfigError
from megatron_ext.launch.graph import with_joints
from megatron_ext.launch.plan import plan_text
from recipes import clusters

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "/shared/images/megatron_ext.sqsh"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"partition": "a b"}, r"partition is 'a b'; Slurm takes one word"),
    ({"account": "x\n#SBATCH --uid=0"}, r"account is 'x\\n.*one word"),
    ({"excluded_nodes": ("n1", "n 2")}, r"excluded_nodes is 'n 2'"),
    ({"gpus_option": "--gres=gpu:{gpus}"}, r"without dashes"),
    ({"gpus_option": "gres=gpu:8"}, r"with \{gpus\} for the number"),
    ({"time_limit_seconds": 30}, r"time_limit_seconds is 30; Slurm counts minutes"),
    ({"time_limit_seconds": 300}, r"signal_seconds 300 before a limit of time_limit_seconds 300 .* raise the limit"),
    ({"signal_seconds": 70_000}, r"signal_seconds is 70000, and sbatch takes at most 65535"),
    ({"signal_seconds": 0}, r"signal_seconds is 0, must be at least 1"),
    ({"hang_seconds": 0}, r"hang_seconds is 0"),
    ({"max_idle_attempts": 0}, r"max_idle_attempts is 0"),
    ({"write_bytes_per_second": 0.0}, r"write_bytes_per_second is 0.0, must be positive"),
    ({"exports": ("A=b",)}, r"exports: 'A=b' is no name of a variable"),
    ({"exports": ("A", "A")}, r"exports: A stands there twice"),
    ({"environment": {"NCCL IB": "1"}}, r"environment: 'NCCL IB' is no name"),
    ({"environment": {"OMP_NUM_THREADS": "4"}}, r"OMP_NUM_THREADS is set by the job itself"),
    ({"exports": ("PYTHONPATH",)}, r"PYTHONPATH is set by the job itself"),
    ({"environment": {"A": "one\ntwo"}}, r"'one\\ntwo' has a line break"),
    ({"environment": {"WANDB_API_KEY": "x"}}, r"looks like a secret, and its value would be written into run folders"),
    ({"environment": {"HF_HOME": "/x"}, "secrets": ("HF_HOME",)}, r"HF_HOME is one of secrets and stands in environment too"),
    ({"exports": ("HF_TOKEN",), "secrets": ("HF_TOKEN",)}, r"HF_TOKEN is one of secrets and stands in exports too"),
    ({"secrets": ("HF_TOKEN",), "secrets_file": "secrets"}, r"secrets_file is 'secrets', relative .* from / on"),
    ({"secrets_file": "/home/me/secrets"}, r"secrets is empty; list the names"),
    ({"scratch": "tmp"}, r"scratch is 'tmp', relative"),
    ({"scratch": ""}, r"scratch is empty"),
    ({"setup": ("module load a\nmodule load b",)}, r"slurm.setup: .* has a line break"),
    ({"setup": ("#SBATCH --mem=1G",)}, r"would be ignored: options of sbatch have fields of their own"),
    ({"host_python": ""}, r"host_python is empty; name an interpreter"),
]
REFUSED_CONTAINERS: list[tuple[dict[str, Any], str]] = [
    ({"image": IMAGE}, r"runtime is none; set runtime to pyxis or apptainer"),
    ({"runtime": "pyxis"}, r"image is empty; name the file, for pyxis as /shared/images/megatron_ext.sqsh"),
    ({"runtime": "apptainer"}, r"for apptainer as /shared/images/megatron_ext.sif"),
    ({"runtime": "docker", "image": IMAGE}, r"runtime: .*'pyxis'"),
    *[({"runtime": "pyxis", "image": IMAGE, "mounts": (bad,)}, "write /host:/inside or /host:/inside:ro") for bad in (
        "/shared", "shared:/shared", "/a:b", "/a:/b:rx", "/a:/b,/c:/d", "/a:/b:ro:z",
    )],
    ({"runtime": "pyxis", "image": "a\nb"}, "has a line break"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_a_mistake_is_refused_with_its_way_out(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Slurm(**values)


@pytest.mark.parametrize(("values", "words"), REFUSED_CONTAINERS)
def test_a_mistake_about_the_container_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Container(**values)


def test_the_words_of_real_sites_are_taken() -> None:
    Slurm(
        gpus_option="gres=gpu:h100:{gpus}",
        constraint="h100&(ib|roce)",
        environment={"NCCL_IB_PKEY": "0x1", "TOKENIZERS_PARALLELISM": "false", "EMPTY": ""},
        secrets=("HF_TOKEN", "WANDB_API_KEY"),
        setup=("source /etc/profile.d/modules.sh", "\tmodule load cuda"),
    )
    Container(runtime="pyxis", image="nvcr.io#nvidia/pytorch:25.01-py3", mounts=("/a:/b", "/a b/é:/c:ro", "/d:/d:rw"))


def test_a_cluster_goes_to_json_and_back_and_older_ones_still_read() -> None:
    cluster = clusters.h100()
    assert from_json(Cluster, to_json(cluster)) == cluster
    values = to_json(cluster)
    del values["slurm"]
    assert from_json(Cluster, values) == dataclasses.replace(cluster, slurm=None)


@pytest.mark.parametrize("kind", [Slurm, Container])
def test_the_page_explains_every_field_and_its_default(kind: type) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    rows = dict(re.findall(rf"^\| `{kind.__name__.lower()}\.(\w+)` \| (.*?) \|", page, flags=re.MULTILINE))
    assert list(rows) == field_names(kind)
    for one in dataclasses.fields(kind):
        default = one.default if one.default is not dataclasses.MISSING else {}
        if isinstance(default, str | int | float) and default != "" and one.name != "write_bytes_per_second":
            assert f"`{default}`" in rows[one.name].replace(",", ""), one.name


def test_the_pages_own_recipes_and_cluster_work() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for text in re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        exec(text, names)
    early = names["early"]()  # the page's branch of its own: a point of the stable stage, pinned there
    assert early.stage("decay_long_early").start.tokens == 33_280 * 4_194_304
    mixed = names["more_qa"]()
    for graph in (early, mixed):
        assert graph.stages[-2].name in graph.stage("report").stages
        assert graph.stages[-2].name in plan_text(with_joints(graph), clusters.h100())
    found = names["ours"]()
    assert isinstance(found, Cluster)
    assert (found.name, found.slurm.account, found.slurm.container.runtime) == ("ours", "project_42", "pyxis")


def test_every_value_that_a_site_changes_is_marked() -> None:
    text = (ROOT / "recipes" / "clusters.py").read_text(encoding="utf-8")
    (call,) = re.findall(r"^SLURM = Slurm\(\n(.*?)^\)", text, flags=re.MULTILINE | re.DOTALL)
    assert [line for line in call.splitlines() if "# SITE" not in line] == []
