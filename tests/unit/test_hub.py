"""Where a model to convert comes from: folders, and a hub on this machine that the real client fetches from."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_ext.config.model_source import HubModel, absent_files, read_source, weight_files
from megatron_ext.conversion import hub as hubs
from megatron_ext.conversion.hub import Found, find_source, wanted_files
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.progress import LINE_EVERY_SECONDS
from tests.small_hub import Hub, folder_files, serving, use

NAME = "meta-llama/Llama-3.2-1B"
ROOT = Path(__file__).parents[2]
TOKEN = "hf_abcdefghijklmnop"
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}).encode()
SHARD = bytes(range(256)) * 400
FILES = {
    "config.json": b'{"auto_map": {"AutoConfig": "evil.Config"}}',
    "generation_config.json": b'{"do_sample": false}',
    "model.safetensors.index.json": INDEX,
    "model-00001-of-00002.safetensors": SHARD,
    "model-00002-of-00002.safetensors": SHARD[::-1],
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
}
OTHERS = {
    "evil.py": b"raise SystemExit",
    "README.md": b"",
    "pytorch_model.bin": b"x",
    "consolidated.safetensors": b"x",
    "original/tokenizer.model": b"x",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub(tokens=(TOKEN,))) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield hub


def test_only_what_a_conversion_reads_is_fetched_at_the_commit_of_the_moment(hub: Hub) -> None:
    first = hub.add(NAME, {**FILES, **OTHERS})
    found = find_source(NAME, None)
    assert (found.name, found.revision, found.folder.name) == (NAME, first, first)
    assert folder_files(found.folder) == FILES
    assert hub.fetched() == set(FILES)


def test_a_branch_moves_and_a_commit_does_not(hub: Hub) -> None:
    first = hub.add(NAME, FILES)
    second = hub.add(NAME, {**FILES, "config.json": b"{}"})
    other = hub.add(NAME, FILES, branch="refs/pr/1")
    assert find_source(NAME, None).revision == second
    assert find_source(NAME, "main").revision == second
    assert find_source(NAME, "refs/pr/1").revision == other
    assert find_source(f"{NAME}@{first}", None) == find_source(NAME, first)
    assert find_source(NAME, first).revision == first


def test_a_second_time_nothing_is_fetched(hub: Hub) -> None:
    commit = hub.add(NAME, FILES)
    found = find_source(NAME, None)
    hub.requests.clear()
    assert find_source(NAME, commit) == find_source(NAME, None) == found
    assert hub.fetched() == set()


def test_pickles_only_where_they_are_allowed_and_nothing_better_is_there(hub: Hub) -> None:
    hub.add("a/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x", "training_args.bin": b"y"})
    with pytest.raises(DataError, match=r"has its weights as pickles only \(pytorch_model\.bin\).*allow_pickle"):
        find_source("a/pickles", None)
    assert sorted(folder_files(find_source("a/pickles", None, allow_pickle=True).folder)) == ["config.json", "pytorch_model.bin"]
    both = ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors", "model.safetensors"]
    assert wanted_files(both, allow_pickle=False) == ["config.json", "model.safetensors"]
    assert "pytorch_model.bin" not in wanted_files(sorted({**FILES, **OTHERS}), allow_pickle=True)


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"model.gguf": b""}, "has no config.json, so it is no model in Hugging Face's format; it has model.gguf"),
        (
            {"config.json": b"{}", "original/model.safetensors": b""},
            "has neither model.safetensors nor model.safetensors.index.json; it has config.json, original/",
        ),
        ({}, "it has no files"),
    ],
)
def test_a_repository_without_a_model(hub: Hub, files: dict[str, bytes], part: str) -> None:
    hub.add(NAME, files)
    with pytest.raises(DataError) as caught:
        find_source(NAME, None)
    assert part in str(caught.value)
    assert hub.fetched() == set()


def test_a_gated_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    hub.repositories[NAME].gated = True
    with pytest.raises(DataError) as caught:
        find_source(NAME, None)
    assert str(caught.value) == (
        f"{NAME}: its owner lets in only those who accepted its licence, not a visitor without a token (401). Accept it at "
        f"{hub.endpoint}/{NAME}, then log in with `hf auth login` or set HF_TOKEN to that of an account that did"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    hub.tokens = (TOKEN, "hf_of_a_stranger")
    hub.members = (TOKEN,)
    with pytest.raises(DataError, match=r"not the account of this token \(403\)"):
        find_source(NAME, None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert folder_files(find_source(NAME, None).folder) == FILES


@pytest.mark.parametrize(
    ("token", "error", "part"),
    [("hf_wrong", DataError, "refuses the account of this token (401)"), ("hf_sécret", ConfigError, "holds a character that no token has")],
)
def test_a_token_is_never_shown(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token: str, error: type[Exception], part: str
) -> None:
    hub.add(NAME, FILES)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error) as caught:
        find_source(NAME, None)
    assert part in str(caught.value)
    assert token not in str(caught.value) + "".join(capsys.readouterr())


def test_an_unknown_repository_or_revision(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.add(NAME, FILES)
    (tmp_path / "assets" / "Llama-3.2-1B").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        find_source("assets/Llama-3.2-1b", None)
    assert "there is no folder assets/Llama-3.2-1b (from " in str(caught.value)
    assert "; near: assets/Llama-3.2-1B), and " in str(caught.value)
    assert "shows a visitor without a token no such model (401)" in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(DataError, match=r"shows the account of this token no such model \(404\)"):
        find_source("a/b", None)
    for revision in ("mian", "0" * 40):
        with pytest.raises(DataError, match=f"it has no revision '{revision}'; .*/commits/main lists"):
            find_source(NAME, revision)


def test_a_connection_that_dies_half_way_is_taken_up_by_the_next_call(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what has come is written in pieces of this; 10 MB to spare small files
    commit = hub.add(NAME, FILES)
    shard = "model-00002-of-00002.safetensors"
    hub.cut[shard] = 60_000
    with pytest.raises(DataError, match=r"answered 503 Service Unavailable\. Files that have come whole are kept in .*: do the same again"):
        find_source(NAME, None)
    assert any(one.startswith("GET") and one.endswith(f"{shard} bytes=60000-") for one in hub.requests)  # the client's own next try
    with pytest.raises(DataError, match="answered 503"):
        find_source(NAME, commit)  # what has come is not taken for the whole
    hub.broken.clear()
    hub.requests.clear()
    assert folder_files(find_source(NAME, commit).folder) == FILES
    assert [one.split("/")[-1] for one in hub.requests if one.startswith("GET") and "/resolve/" in one] == [
        f"{shard}"
    ]  # the others are there


def test_what_another_program_left_in_the_cache_is_not_taken_for_the_whole(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(NAME, FILES)
    left = tmp_path / "cache" / "models--meta-llama--Llama-3.2-1B" / "snapshots" / commit
    left.mkdir(parents=True)
    (left / "config.json").write_bytes(FILES["config.json"])
    hub.broken.add("tree")
    with pytest.raises(DataError, match=r"did not hand over generation_config\.json, .*model-00001-of-00002\.safetensors"):
        find_source(NAME, None)
    hub.broken.clear()
    assert folder_files(find_source(NAME, None).folder) == FILES


def test_a_hub_that_is_down(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.is_down = True
    with pytest.raises(DataError, match="answered 503 Service Unavailable"):
        find_source(NAME, None)


def test_a_network_that_answers_for_the_hub(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.is_portal = True
    with pytest.raises(DataError, match=r"cannot be reached \(JSONDecodeError: .*Where there is a network, run"):
        find_source(NAME, None)


def test_a_cache_that_cannot_note_what_a_branch_was(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.add(NAME, FILES)
    (tmp_path / "cache" / "models--meta-llama--Llama-3.2-1B").mkdir(parents=True)
    (tmp_path / "cache" / "models--meta-llama--Llama-3.2-1B" / "refs").touch()
    assert find_source(NAME, None).revision == commit
    assert f"the cache could not note that 'main' is {commit} (" in capsys.readouterr().out


def test_a_log_is_not_filled_with_progress_bars() -> None:
    assert hubs._Bar(total=1).mininterval == LINE_EVERY_SECONDS


def test_a_full_disk(hub: Hub) -> None:
    full = hubs._stopped(HubModel(NAME, None), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert f"the disk of {constants.HF_HUB_CACHE} is full; make room, or set HF_HUB_CACHE" in str(full)


def test_offline_and_not_in_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        find_source(NAME, None)
    text = str(caught.value)
    assert f"{NAME} at main: HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold it." in text
    assert "--local-dir assets/Llama-3.2-1B\n" in text
    assert f"carry that folder here and name it (assets/Llama-3.2-1B) instead of {NAME}, without a revision. It must hold" in text
    assert "config.json, model.safetensors (or model.safetensors.index.json and every shard" in text
    assert hub.requests == []


def test_the_command_that_the_message_shows_fetches_a_folder_that_can_be_named(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(NAME, {**FILES, **OTHERS})
    command = hubs._by_hand(HubModel(NAME, commit)).splitlines()[1].strip()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    places = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PATH": path}
    environment = {**os.environ, **places, "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = find_source("assets/Llama-3.2-1B", None)
    assert found == Found(Path("assets/Llama-3.2-1B"), "assets/Llama-3.2-1B", None)
    assert absent_files(found.folder, allow_pickle=False) == []
    assert not (found.folder / "evil.py").exists()


def test_offline_with_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    old = hub.add(NAME, {**FILES, "config.json": b"{}"})
    find_source(NAME, old)
    commit = hub.add(NAME, FILES)
    online = find_source(NAME, None)
    hub.add(NAME, OTHERS)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_source(NAME, None) == find_source(NAME, "main") == find_source(NAME, commit) == online
    assert find_source(NAME, old).revision == old
    assert f"{NAME} at main: offline, commit {commit} of the cache" in capsys.readouterr().out
    (online.folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DataError, match=r"lacks model-00002-of-00002\.safetensors\. Fetch the rest with a network"):
        find_source(NAME, commit)
    for tree in (online.folder.parent.parent / "trees").iterdir():  # an older client's cache has no list of files
        tree.unlink()
    with pytest.raises(DataError, match=r"lacks model-00002-of-00002\.safetensors"):
        find_source(NAME, commit)
    assert hub.requests == []


def test_no_network_and_no_word_about_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add(NAME, FILES)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        DataError,
        match=r"a/b at main: http\S+ cannot be reached \(ConnectError.*\)\. \(there is no folder a/b .*\) Where there is a network, run",
    ):
        find_source("a/b", None)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    found = find_source(NAME, None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_source(NAME, commit) == found  # the hub could say nothing else of a commit
    with pytest.raises(DataError, match=f"what 'main' stands for now is not known. The cache holds commit {commit}"):
        find_source(NAME, None)


def test_the_environment_decides_in_a_process_of_its_own(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(NAME, FILES)
    program = f"import sys; from megatron_ext.conversion.hub import find_source; print(find_source({NAME!r}, None).folder); "
    program += "assert 'torch' not in sys.modules"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint}
    folder = tmp_path / "home" / "hub" / "models--meta-llama--Llama-3.2-1B" / "snapshots" / commit
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", program], env={**environment, **more}, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(folder)
        hub.is_down = True


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    assert find_source("a/b", None) == Found(Path("a/b"), "a/b", None)  # an existing folder wins over an id
    assert find_source(str(tmp_path), None).revision is None
    with pytest.raises(
        ConfigError, match=r"source a/b: it is a folder, which has no revision 'main'\. Leave the revision out \(revision=null;"
    ):
        find_source("a/b", "main")
    with pytest.raises(ConfigError, match=r"there is no folder a/file .*, and it is a file"):
        find_source("a/file", None)
    for name in ("gpt2", "a/b/c", "/a/c", "./c", "a--b/c", "https://huggingface.co/a/b", ""):
        with pytest.raises(
            ConfigError, match=r"there is no folder .* and it is no owner/name of the hub\. Name a folder with config\.json"
        ):
            find_source(name, None)
    with pytest.raises(ConfigError, match="the revision beside it is 'v2', another one"):
        read_source("x/y@v1", "v2")


def test_which_files_hold_the_weights(tmp_path: Path) -> None:
    needed = ["config.json", "model.safetensors (or model.safetensors.index.json and what it names)", "tokenizer.json (or tokenizer.model)"]
    assert absent_files(tmp_path, allow_pickle=False) == needed
    for name in ("config.json", "pytorch_model.bin", "tokenizer.model"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path, allow_pickle=False) == {}
    assert weight_files(tmp_path, allow_pickle=True) == {"pytorch_model.bin": ()}
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path, allow_pickle=True) == {"model.safetensors": ()}
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(INDEX)
    with pytest.raises(DataError, match="two sets of weights; delete one of them"):
        weight_files(tmp_path, allow_pickle=False)
    (tmp_path / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": ("a",), "model-00002-of-00002.safetensors": ("b",)}
    assert weight_files(tmp_path, allow_pickle=True) == shards
    assert absent_files(tmp_path, allow_pickle=True) == list(shards)
    for broken in ("", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}'):
        index.write_text(broken)
        with pytest.raises(DataError, match="fetch it again"):
            weight_files(tmp_path, allow_pickle=False)
