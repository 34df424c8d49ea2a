"""`doctor` on Convert stages: the model's folder, or what the hub's cache holds, looked at without torch and without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from megatron_ext.config.base import to_json
from megatron_ext.config.hugging_face import config_from_model
from megatron_ext.config.stages import ConvertStage, TrainStage
from megatron_ext.conversion import source as sources
from megatron_ext.conversion.hub import find_source
from megatron_ext.errors import DataError
from megatron_ext.launch import doctor_convert, doctor_weights
from megatron_ext.launch.doctor_convert import convert_findings
from megatron_ext.launch.doctor_folders import unfinished
from megatron_ext.launch.findings import Finding
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.plan import converted_bytes
from recipes import models, octothinker
from tests.small_hub import Hub, folder_files, serving, use
from tests.unit.test_doctor import changed

ROOT = Path(__file__).parents[2]
MODEL = replace(
    models.llama_3_2_1b(), num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=1, vocab_size=129
)
NUMBERS = 129 * 8 + 2 * (8 * (8 + 4 + 4 + 8) + 3 * 8 * 16 + 2 * 8) + 8
NAME = "meta-llama/Llama-3.2-1B"
SHARDS = {"model-00001-of-00002.safetensors": ("a", "b"), "model-00002-of-00002.safetensors": ("c",)}
SECOND = "model-00002-of-00002.safetensors"
SIZES = {"a": 10, "b": 20, "c": NUMBERS - 30}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 128}}, "truncation": None}


def save(file: Path, tensors: str, dtype: Any = numpy.float32) -> None:
    save_file({tensor: numpy.ones(SIZES.get(tensor, 1), dtype) for tensor in tensors}, file)


def place(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a small model's config, two shards and a tokenizer."""
    path = tmp_path / "Llama-3.2-1B"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_from_model(MODEL, "bfloat16")))
    for name, tensors in SHARDS.items():
        save(path / name, "".join(tensors))
    place(path, {tensor: name for name, tensors in SHARDS.items() for tensor in tensors})
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return path


def graph_of(model_id: Path | str, tokenizer: str = "data/x", **values: Any) -> Graph:
    graph = octothinker.llama_1b()
    stages = [stage for stage in graph.stages if stage.kind not in ("rl", "report")]
    small = tuple(replace(stage, model=MODEL) if isinstance(stage, ConvertStage | TrainStage) else stage for stage in stages)
    graph = changed(replace(graph, stages=small), "llama", **{"model_id": str(model_id), "revision": None, **values})
    return changed(graph, "corpus", tokenizer=tokenizer)


def found(model_id: Path | str, tmp_path: Path, **values: Any) -> list[Finding]:
    graph = graph_of(model_id, **values)
    return convert_findings(graph, unfinished(graph, tmp_path / "runs"))


def test_a_whole_folder_is_fine(folder: Path, tmp_path: Path) -> None:
    (one,) = found(folder, tmp_path)
    assert (one.level, one.stage, one.found) == ("ok", "llama", f"{folder}: config, weights and tokenizer are there and fit the recipe")


def lose_a_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def cut_a_shard(folder: Path) -> None:
    os.truncate(folder / SECOND, 90)


def cut_a_header(folder: Path) -> None:
    os.truncate(folder / SECOND, 20)


def break_a_header(folder: Path) -> None:
    (folder / SECOND).write_bytes((2).to_bytes(8, "little") + b"[]")


def clone_without_lfs(folder: Path) -> None:
    (folder / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def hold_a_tensor_twice(folder: Path) -> None:
    save(folder / SECOND, "bc")
    place(folder, {"a": "model-00001-of-00002.safetensors", "b": SECOND, "c": SECOND})
    save(folder / "model-00001-of-00002.safetensors", "ab")


def place_a_tensor_elsewhere(folder: Path) -> None:
    save(folder / SECOND, "d")


def take_another_dtype(folder: Path) -> None:
    save(folder / SECOND, "c", numpy.float64)


def hold_fewer_numbers(folder: Path) -> None:
    save_file({"c": numpy.ones(SIZES["c"] - 1, numpy.float32)}, folder / SECOND)


def hold_a_wrong_shape(folder: Path) -> None:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data.replace(b'"F32"', b'"F16"'))


def put_a_single_file_beside_the_shards(folder: Path) -> None:
    save(folder / "model.safetensors", "abc")


def add_a_token(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "added_tokens": [{"id": 129}]}))


def break_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def break_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def lose_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def mix_experts(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}))


def describe_another_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_from_model(replace(MODEL, rope_base=1e4), "bfloat16")))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lose_a_shard, "lacks model-00002-of-00002.safetensors"),
        (cut_a_shard, "model-00002-of-00002.safetensors: not a whole safetensors file: it has 90 bytes, its header speaks of"),
        (cut_a_header, "model-00002-of-00002.safetensors: not a whole safetensors file: it has 20 bytes, and ends within its header"),
        (break_a_header, "not a whole safetensors file: its header is none (TypeError"),
        (clone_without_lfs, "a Git LFS pointer, not the file; run `git lfs pull`"),
        (hold_a_tensor_twice, "b stands in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"),
        (hold_fewer_numbers, f"its weights are {NUMBERS - 1:,} numbers, those of config.json's model {NUMBERS:,}"),
        (hold_a_wrong_shape, f"a tensor of {SIZES['c']:,} numbers in F16 has {4 * SIZES['c']:,} bytes"),
        (put_a_single_file_beside_the_shards, "two sets of weights; delete one of them"),
        (add_a_token, "tokenizer.json has 130 ids, the embedding 129 rows"),
        (break_the_tokenizer, "is no tokenizer of the tokenizers library (KeyError: 'model')"),
        (take_another_dtype, "holds F64, and only BF16, F16, F32 are taken"),
        (break_the_index, "no index of weights (KeyError: 'weight_map')"),
        (lose_the_tokenizer, "lacks tokenizer.json (or tokenizer.model)"),
        (lose_the_config, "lacks config.json"),
        (mix_experts, "not a model that can be converted"),
        (
            describe_another_model,
            "config.json contradicts model llama_3_2_1b:\n  rope_base: 500000.0 in the recipe, 10000.0 in config.json",
        ),
    ],
)
def test_damage_is_found(folder: Path, tmp_path: Path, damage: Any, part: str) -> None:
    damage(folder)
    findings = found(folder, tmp_path)
    assert {(one.level, one.what, one.stage) for one in findings} == {("error", "source", "llama")}
    assert len(findings) == (2 if damage is hold_a_tensor_twice else 1)  # an index names only one of the two files
    assert any(part in one.found for one in findings)
    assert all(one.way_out or "again" in one.found or "delete" in one.found for one in findings)


def test_a_tensor_in_the_wrong_file_and_both_words_for_it(folder: Path, tmp_path: Path) -> None:
    place_a_tensor_elsewhere(folder)
    lacks, holds = found(folder, tmp_path)
    assert lacks.found.endswith(f"{SECOND}: lacks c, which its index places there")
    assert holds.found.endswith(f"{SECOND}: holds d, which its index does not place there")


def test_a_vocabulary_that_may_grow(folder: Path, tmp_path: Path) -> None:
    add_a_token(folder)
    (one,) = found(folder, tmp_path, resize_vocabulary=True)
    assert "vocab_size: 129 in the recipe, 130 in config.json" in one.found
    (folder / "config.json").write_text(json.dumps(config_from_model(replace(MODEL, vocab_size=128), "bfloat16")))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    save_file({"c": numpy.ones(SIZES["c"] - 8, numpy.float32)}, folder / SECOND)
    (one,) = found(folder, tmp_path, resize_vocabulary=True)
    assert one.level == "ok"
    assert {one.level for one in found(folder, tmp_path)} == {"error"}


def test_the_conversion_refuses_what_doctor_refuses(folder: Path) -> None:
    assert tuple(sorted(sources.DTYPES)) == doctor_weights.TAKEN
    assert sorted(sources.open_source(folder).names) == ["a", "b", "c"]
    for damage in (cut_a_shard, hold_a_tensor_twice, place_a_tensor_elsewhere, take_another_dtype, break_the_index):
        damage(folder)
        with pytest.raises(DataError):
            sources.open_source(folder)


def test_pickles_need_to_be_allowed(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    (one,) = found(folder, tmp_path)
    assert one.way_out == "a model with safetensors, or llama.allow_pickle=true"
    (one,) = found(folder, tmp_path, allow_pickle=True)
    assert one.level == "ok"


def test_the_corpus_has_the_models_tokenizer(folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "tokenizer"
    corpus.mkdir()
    file = corpus / "tokenizer.json"
    for values, fits in (
        ({**TOKENIZER, "truncation": {"max_length": 1}}, True),
        (TOKENIZER, True),
        ({"model": {"vocab": {"c": 0}}}, False),
    ):
        file.write_text(json.dumps(values))
        for tokenizer in (str(corpus), str(file)):
            (one,) = found(folder, tmp_path, tokenizer=tokenizer)
            assert one.level == ("ok" if fits else "error"), values
    assert one.found.startswith(f"{folder}/tokenizer.json is another tokenizer than {file}, which makes corpus")
    assert one.way_out == f"corpus.tokenizer={folder}"
    file.write_text("{")
    assert "is not JSON" in found(folder, tmp_path, tokenizer=str(corpus))[0].found


def test_what_is_no_source_and_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (one,) = found("gpt2", tmp_path)
    assert (one.level, "it is no owner/name of the hub" in one.found) == ("error", True)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (one,) = found("a/b", tmp_path, revision="main")
    assert "it is a folder, which has no revision 'main'" in one.found
    (tmp_path / "runs" / "llama").mkdir(parents=True)
    (tmp_path / "runs" / "llama" / "DONE").touch()
    assert found("gpt2", tmp_path) == []


def test_a_hubs_model_in_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Hub()) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        commit = hub.add(NAME, folder_files(folder))
        moves, absent = found(NAME, tmp_path)
        assert [moves.level, absent.level] == ["warning", "warning"]
        assert moves.way_out == f"llama.revision=COMMIT, from {hub.endpoint}/{NAME}/commits/main"
        assert absent.found.startswith(f"{NAME}: not all of it is in {tmp_path}/cache; the stage fetches it, about 6.5 KB")
        assert hub.requests == []
        find_source(NAME, None)
        hub.requests.clear()
        moves, fine = found(NAME, tmp_path)
        assert (moves.level, moves.way_out) == ("warning", f"llama.revision={commit}")
        assert (fine.level, commit in fine.found) == ("ok", True)
        assert [one.level for one in found(NAME, tmp_path, revision=commit)] == ["ok"]
        (absent,) = found(NAME, tmp_path, revision="0" * 40)
        assert absent.level == "warning"
        part = tmp_path / "cache" / "models--meta-llama--Llama-3.2-1B" / "snapshots" / commit
        (part / SECOND).unlink()
        (absent,) = found(NAME, tmp_path, revision=commit)
        assert (absent.level, absent.found.partition(";")[0]) == ("warning", f"{NAME}: not all of it is in {tmp_path}/cache")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        (refused,) = found(NAME, tmp_path, revision="0" * 40)
        assert (refused.level, "HF_HUB_OFFLINE is set" in refused.found) == ("error", True)
        assert hub.requests == []


def test_the_command_that_fetches_a_model_before_the_stage_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Hub()) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        commit = hub.add(NAME, {**folder_files(folder), "original/consolidated.00.pth": b"x"})
        (absent,) = found(NAME, tmp_path, revision=commit)
        command = absent.way_out.partition("fetch it before: ")[2].partition(" (")[0]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        places = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "cache"), "PATH": path}
        environment = {**os.environ, **places, "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert [one.level for one in found(NAME, tmp_path, revision=commit)] == ["ok"]
        assert not any("consolidated" in one for one in hub.requests)


def test_no_room_for_what_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(doctor_convert.shutil, "disk_usage", lambda _: usage(0, 0, converted_bytes(MODEL) - 1))
    assert [one.level for one in found(NAME, tmp_path, revision="0" * 40)] == ["warning", "error"]


def test_it_needs_no_torch(folder: Path) -> None:
    block = "; ".join(f"sys.modules['{name}'] = None" for name in ("torch", "megatron", "transformers", "numpy", "safetensors"))
    graphs = [to_json(graph_of(name)) for name in (folder, NAME)]
    program = f"""import sys; {block}
from megatron_ext.config.base import from_json
from megatron_ext.launch.doctor_convert import convert_findings
from megatron_ext.launch.graph import Graph
for graph in (from_json(Graph, values) for values in {graphs!r}):
    print([one.level for one in convert_findings(graph, graph.stages)])"""
    environment = {**os.environ, "HF_HOME": str(folder / "home")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['ok']", "['warning', 'warning']"]
