"""Opening an altered checkpoint runs nothing: every pickle in it is refused by name, and torch's own reader would have run it."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import re
import shutil
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.base import to_json
from megatron_ext.config.plan import TrainPlan
from megatron_ext.errors import CheckpointError, DamagedCheckpointError, DataError
from megatron_ext.provenance import CORPUS, read_corpus, read_manifest, read_sidecar, write_manifest
from megatron_ext.runs import write_json
from tests import ranks
from tests.small_checkpoints import extra_state, save_small, sign_again, small_state
from tests.small_corpus import write_corpus

ONE_RANK = TrainPlan(device="cpu")
EVIL = ("metadata", "metadata inside", "byte entry", "common", "extra state")  # checkpoints that make a canary when they are unpickled
REFUSED = (
    "metadata of another type", "byte entry damaged", "tensor damaged", "common damaged", "format", "path outside",
    "entry before the file", "file without a digest", "manifest outside",
)  # fmt: skip
DAMAGED = ("metadata cut", "metadata missing")  # no guard is asked: an older checkpoint may be whole
Outcome = tuple[str, str, bool]  # kind of error ('' for none), its message, whether the canary was made


class Evil:
    """Unpickling it makes a folder, the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def canary(folder: Path, case: str) -> Path:
    return folder / f"{case}.canary"


def checkpoint(folder: Path, case: str) -> Path:
    return folder / case / "iter_0000001"


def write_all(folder: Path) -> None:
    """The good checkpoint, and its altered copies; every manifest fits its files."""
    import torch
    from torch.distributed.checkpoint import Metadata

    save_small(folder / "good", entry={"amax": torch.ones(2)})
    save_small(folder / "byte entry", entry=Evil(canary(folder, "byte entry")))
    pickled = pickle.dumps({"recipe": Evil(canary(folder, "extra state"))})
    save_small(folder / "extra state", **extra_state(torch.frombuffer(bytearray(pickled), dtype=torch.uint8)))
    for case in (*EVIL, *REFUSED, *DAMAGED):
        if case not in ("byte entry", "extra state"):
            shutil.copytree(checkpoint(folder, "good"), checkpoint(folder, case))
        path, at = checkpoint(folder, case), canary(folder, case)
        metadata, common = path / ".metadata", path / "common.pt"
        data = next(path.glob("*.distcp"))
        real: Metadata = pickle.loads(metadata.read_bytes())
        entries = {index.fqn: info for index, info in (real.storage_data or {}).items()}
        match case:
            case "metadata":
                metadata.write_bytes(pickle.dumps(Evil(at)))
            case "metadata inside":
                real.planner_data = Evil(at)
                metadata.write_bytes(pickle.dumps(real))
            case "common":
                torch.save({"plain": Evil(at)}, common)
            case "metadata cut":
                metadata.write_bytes(metadata.read_bytes()[:-100])
            case "metadata of another type":
                metadata.write_bytes(pickle.dumps({"state_dict_metadata": {}}))
            case "byte entry damaged" | "tensor damaged":
                info = entries["entry/shard_0_1" if case.startswith("byte") else "weight"]
                content = bytearray(data.read_bytes())
                content[info.offset : info.offset + info.length] = b"x" * info.length
                data.write_bytes(content)
            case "common damaged":
                common.write_bytes(b"x" * 50)
            case "format":
                (path / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 9}')
            case "entry before the file":
                entries["weight"].offset = -entries["weight"].offset
                metadata.write_bytes(pickle.dumps(real))
            case "file without a digest":
                shutil.copy(data, path / "__7_0.distcp")
                for info in entries.values():
                    info.relative_path = "__7_0.distcp"
                metadata.write_bytes(pickle.dumps(real))
            case "metadata missing":
                metadata.unlink()
                continue
            case "path outside":
                data.replace(path.parent / "elsewhere.distcp")
                data.write_bytes(b"not read")
                for info in entries.values():
                    info.relative_path = "../elsewhere.distcp"
                metadata.write_bytes(pickle.dumps(real))
        sign_again(path)
        if case == "manifest outside":
            (path.parent / "secret").write_bytes(b"x")
            old = read_manifest(path)
            write_manifest(path, replace(old, files={**old.files, "../secret": (1, "0" * 64)}))


def guarded(groups: Any, folder: Path) -> dict[str, Outcome]:
    """Write all checkpoints and load each as the product does."""
    from megatron_ext.checkpoint.load import load_state

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # a user's setting that would switch torch's own guard off
    write_all(folder)
    found = {}
    for case in ("good", *EVIL, *REFUSED, *DAMAGED):
        try:
            loaded = load_state(small_state(), checkpoint(folder, case))
            error = ("", f"{loaded['weight'].tolist()} {loaded['entry']} {loaded['plain']}")
        except CheckpointError as refusal:
            error = (type(refusal).__name__, str(refusal))
        except BaseException as other:  # noqa: BLE001 - the test shows what it was
            error = (type(other).__name__, str(other))
        found[case] = (*error, canary(folder, case).exists())
    return found


def other_models(groups: Any, folder: Path) -> list[str]:
    """What is said where the good checkpoint is loaded into something else."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_ext.checkpoint.load import load_state

    said = []
    for name, size in (("weight", 9), ("other", 8)):
        with pytest.raises(CheckpointError) as refusal:
            load_state({"weight": ShardedTensor.from_rank_offsets(name, torch.zeros(size))}, checkpoint(folder, "good"))
        said.append(str(refusal.value))
    return said


def unguarded(groups: Any, folder: Path) -> dict[str, bool]:
    """Load the evil ones with Megatron-Core and torch as they are; whether the canary was made."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import CheckpointException

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    made = {}
    for case in EVIL:
        assert not canary(folder, case).exists()
        with contextlib.suppress(AttributeError, CheckpointException, TypeError):  # it fails, if at all, after the code has run
            asked = {**small_state(), **(extra_state() if case == "extra state" else {})}
            loaded = dist_checkpointing.load(asked, str(checkpoint(folder, case)))
            if case == "extra state":
                pickle.loads(loaded["extra"].numpy().tobytes())  # as Transformer Engine's layers do
        made[case] = canary(folder, case).exists()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("safe")


@pytest.fixture(scope="module")
def outcomes(folder):
    return ranks.run(guarded, ONE_RANK, folder)[0]


def test_an_unaltered_checkpoint_loads(outcomes):
    assert outcomes["good"] == ("", "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0] {'amax': tensor([1., 1.])} 3", False)


MESSAGES = {
    "metadata": r"metadata/iter_0000001/\.metadata: refused: it asks for posix\.mkdir, .*nothing was run",
    "metadata inside": r"\.metadata: refused: it asks for posix\.mkdir",
    "byte entry": r"byte entry/iter_0000001: .*'entry/shard_0_1': refused, nothing was run: .*posix\.mkdir",
    "common": r"common/iter_0000001/common\.pt: refused, nothing was run: .*posix\.mkdir",
    "extra state": r"\.distcp: entry 'decoder\..*\.linear_qkv\._extra_state/shard_0_1': refused: it asks for posix\.mkdir",
    "entry before the file": r"\.metadata: entry 'weight' lies at -\d+, \d+ bytes long",
    "file without a digest": r"\.metadata: points to '__7_0\.distcp', which manifest\.json does not list",
    "manifest outside": r"manifest outside/iter_0000001: the manifest names a file outside the checkpoint: '\.\./secret'",
    "metadata missing": r"\.metadata: missing, though the manifest lists it",
    "metadata cut": r"\.metadata: not readable: .*damaged, use another checkpoint",
    "metadata of another type": r"\.metadata: holds a dict, not checkpoint metadata",
    "byte entry damaged": r"byte entry damaged/iter_0000001: .*'entry/shard_0_1': refused, nothing was run: .*damaged",
    "tensor damaged": r"tensor damaged/iter_0000001: could not be read: a tensor holds other than plain numbers; it was damaged",
    "common damaged": r"common damaged/iter_0000001/common\.pt: refused, .*damaged",
    "format": r"format/iter_0000001: .*\('load_sharded', 'zarr', 9\)",
    "path outside": r"\.metadata: points to a file outside the checkpoint: '\.\./elsewhere\.distcp'",
}


@pytest.mark.parametrize("case", [*EVIL, *REFUSED, *DAMAGED])
def test_an_altered_checkpoint_is_refused_and_runs_nothing(outcomes, case):
    kind, message, ran = outcomes[case]
    assert kind == ("DamagedCheckpointError" if case in DAMAGED else "CheckpointError"), message  # none falls back from an attack
    assert re.search(MESSAGES[case], message), message
    assert not ran


def test_the_guards_are_needed(outcomes, folder):
    """The fault: without them each of these files runs its code."""
    assert ranks.run(unguarded, ONE_RANK, folder)[0] == dict.fromkeys(EVIL, True)


def test_a_checkpoint_of_another_model_is_refused(outcomes, folder):
    shape, name = ranks.run(other_models, ONE_RANK, folder)[0]
    assert re.search(r"good/iter_0000001: does not fit the model or optimizer of this stage: .*mismatch .*\[8\].*\[?9", shape), shape
    assert re.search(r"does not fit the model or optimizer of this stage: .*other from model not in state dict: .*weight", name), name


@pytest.mark.parametrize("value", [[1], "text", 3, None, OrderedDict(a=1), Path("x")])
def test_metadata_of_another_type_is_refused(tmp_path, value):
    from megatron_ext.checkpoint.safe_reading import read_metadata

    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointError, match=rf"\.metadata: holds a {type(value).__name__}, not checkpoint metadata"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("name", ["builtins\neval", "os\nsystem", "torch\nload", "torch.serialization\nload", "pathlib\nos.system"])
def test_other_names_are_refused(tmp_path, name):
    from megatron_ext.checkpoint.safe_reading import read_metadata

    global_opcode = f"c{name}\n.".encode()
    stack_global = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in name.split("\n")) + b"\x93."
    for content in (global_opcode, stack_global):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"refused: it asks for " + name.replace("\n", ".").replace(".", r"\.")):
            read_metadata(tmp_path)


STATES = (b"}(V{}\nK\x01u", b"N}(V{}\nK\x01u\x86")  # what BUILD puts into an object's dictionary, and what it sets as attributes


def allowed_names() -> list[tuple[str, str]]:
    from megatron_ext.checkpoint.safe_reading import _METADATA_CLASSES

    return [(module, name) for module, names in _METADATA_CLASSES.items() for name in sorted(names)]


@pytest.mark.parametrize("attribute", ["is_file", "exists", "cache", "__setstate__", "__init__", "_value_"])
@pytest.mark.parametrize("state", STATES)
def test_a_pickle_cannot_change_what_it_is_given(tmp_path, state, attribute):
    """Classes, functions and members of an enumeration outlive the pickle: changed, they would serve whoever wrote it."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    from megatron_ext.checkpoint.safe_reading import read_metadata

    member = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R"
    given = {f"c{module}\n{name}\n".encode(): getattr(sys.modules[module], name) for module, name in allowed_names()}
    for asked, thing in {**given, member: _MEM_FORMAT_ENCODING(0)}.items():
        before = dict(vars(thing)) if hasattr(thing, "__dict__") else {}
        (tmp_path / ".metadata").write_bytes(asked + state.replace(b"{}", attribute.encode()) + b"b.")
        with pytest.raises(CheckpointError, match=r"\.metadata: refused: it would change .*; nothing was run") as refusal:
            read_metadata(tmp_path)
        assert not isinstance(refusal.value, DamagedCheckpointError)
        assert (dict(vars(thing)) if hasattr(thing, "__dict__") else {}) == before


def test_a_changed_class_would_serve_whoever_wrote_it(tmp_path):
    """The fault: the unpickler of pickle itself sets the attribute."""
    assert not hasattr(ChangedByAPickle, "is_file")
    pickle.loads(f"c{__name__}\nChangedByAPickle\n".encode() + STATES[1].replace(b"{}", b"is_file") + b"b.")
    assert ChangedByAPickle.is_file == 1  # type: ignore[attr-defined]


class ChangedByAPickle:
    """Stands for a class that a checkpoint's metadata may name."""


def test_missing_metadata_is_named(tmp_path):
    from megatron_ext.checkpoint.safe_reading import read_metadata

    with pytest.raises(CheckpointError, match=r"\.metadata: no such file; the checkpoint is not whole"):
        read_metadata(tmp_path)


def test_damage_anywhere_in_metadata_is_our_error_or_harmless(outcomes, folder, tmp_path):
    """Cut anywhere, or one byte changed at random: an error of ours, or metadata still; never another exception."""
    from torch.distributed.checkpoint import Metadata

    from megatron_ext.checkpoint.safe_reading import read_metadata

    content = (checkpoint(folder, "good") / ".metadata").read_bytes()
    rng = random.Random(0)
    altered = [content[:length] for length in range(0, len(content), 3)]
    for _ in range(500):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] = rng.randrange(256)
        altered.append(bytes(changed))
    refused = 0
    for one in altered:
        (tmp_path / ".metadata").write_bytes(one)
        try:
            assert isinstance(read_metadata(tmp_path), Metadata)
        except CheckpointError:
            refused += 1
    assert refused > len(content) // 3 + 100


def test_damage_anywhere_in_common_is_our_error_or_harmless(tmp_path):
    """torch's reader of plain values is in Python, and fails on a changed byte of the pickle in whatever way comes first."""
    import torch

    from megatron_ext.checkpoint.safe_reading import read_common

    stream = io.BytesIO()
    torch.save({"plain": 3, "nested": OrderedDict(a=[1.5, None, True], b=("text",)), "tensor": torch.ones(2)}, stream)
    content = stream.getvalue()
    begin = content.index(b"\x80\x02")  # the pickle inside the archive
    inner = range(begin, content.index(b"PK", begin))
    rng = random.Random(0)
    causes = set()
    for place in [*rng.choices(inner, k=4000), *rng.choices(range(len(content)), k=500)]:
        changed = bytearray(content)
        changed[place] = rng.randrange(256)
        (tmp_path / "common.pt").write_bytes(changed)
        try:
            read_common(tmp_path)
        except CheckpointError as refusal:
            causes.add(type(refusal.__context__))
    assert {IndexError, AttributeError, TypeError} <= causes  # the fault: it lets these through


# ---- records of a corpus


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "runs", {"web": 6}, heldout=2, num_shards=1).path


def set_value(path: Path, key: str, value: Any) -> None:
    """Change a record of ours as whoever holds the files can."""
    import json

    write_json(path, {**json.loads(path.read_text()), key: value})


@pytest.mark.parametrize("prefix", ["../train-00000", "/etc/passwd", "a/b", "..", ".", "", "x\0"])
def test_a_sidecar_that_leads_outside_is_refused(corpus, prefix):
    sidecar = corpus / "shards" / "web" / "train-00000.json"
    set_value(sidecar, "prefix", prefix)
    with pytest.raises(DataError, match=r"train-00000\.json: .*prefix .* is no file name: it would lead out of the sidecar's folder"):
        read_sidecar(sidecar)


def test_a_sidecar_whose_files_are_links_outside_is_refused(corpus, tmp_path):
    sidecar = corpus / "shards" / "web" / "train-00000.json"
    read_sidecar(sidecar)
    tokens = sidecar.with_suffix(".bin").rename(tmp_path / "elsewhere.bin")
    sidecar.with_suffix(".bin").symlink_to(tokens)
    with pytest.raises(
        DataError, match=r"train-00000\.json: 'train-00000\.bin' is a link that leads out of the folder, to .*elsewhere\.bin"
    ):
        read_sidecar(sidecar)


@pytest.mark.parametrize("name", ["../other/train-00000.json", "/etc/passwd", "shards/../../x.json", ""])
def test_a_corpus_that_leads_outside_is_refused(corpus, name):
    index = read_corpus(corpus)
    record = {**to_json(index.sources["web"]), "train": [name]}
    for key, value in (("sources", {"web": record}), ("tokenizer_path", name)):
        write_json(corpus / CORPUS, to_json(index))
        set_value(corpus / CORPUS, key, value)
        with pytest.raises(DataError, match=r"corpus\.json: .*path .* leads out of the corpus' folder"):
            read_corpus(corpus)


def test_a_corpus_whose_folder_is_a_link_outside_is_refused(corpus, tmp_path):
    (corpus / "shards" / "web").rename(tmp_path / "elsewhere")
    (corpus / "shards" / "web").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"corpus\.json: 'shards/web/train-00000\.json' is a link that leads out of the folder"):
        read_corpus(corpus)


@pytest.mark.parametrize("protocol", [0, 4])
def test_a_record_that_is_a_pickle_is_refused_and_not_run(corpus, tmp_path, protocol):
    made = tmp_path / "canary"
    for path, read in ((corpus / "shards" / "web" / "train-00000.json", read_sidecar), (corpus / CORPUS, lambda p: read_corpus(p.parent))):
        path.write_bytes(pickle.dumps(Evil(made), protocol))
        with pytest.raises(DataError, match="not valid JSON"):
            read(path)
        assert not made.exists()
    pickle.loads((corpus / CORPUS).read_bytes())  # the fault: it would have run
    assert made.exists()
