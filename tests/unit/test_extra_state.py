"""Transformer Engine's extra state: real contents pass, and a pickle that asks for anything else is refused by name and not run."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ext.checkpoint import extra_state
from megatron_ext.checkpoint.extra_state import refuse_extra_state
from megatron_ext.errors import CheckpointError, DamagedCheckpointError

NAME = "decoder.layers.0.self_attention.linear_qkv._extra_state/shard_0_1"
DATA = "__0_0.distcp"
BEFORE = b"another entry"


class Evil:
    """Unpickling it makes a folder, the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


class Storage:
    """Pickles as a tensor's storage does: a call of torch's loader on bytes that are a pickle of their own."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.content,)


def look(folder: Path, value: Any, name: str = NAME, **changes: Any) -> None:
    """Store a value as torch's writer does, behind another entry, and look into it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    (folder / DATA).write_bytes(BEFORE + stream.getvalue())
    info = dataclasses.replace(_StorageInfo(DATA, len(BEFORE), len(stream.getvalue())), **changes)
    refuse_extra_state(
        folder, Metadata({}, storage_data={MetadataIndex("weight"): _StorageInfo("absent", 0, 9), MetadataIndex(name): info})
    )


def as_bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.fixture
def recipe(monkeypatch):
    """A module of Transformer Engine's name with classes as its own, so that pickles ask for what real ones ask for."""
    module = types.ModuleType("transformer_engine.common.recipe")
    helper = types.new_class("_FormatHelper", (tuple,))
    made = enum.Enum("Format", {"HYBRID": helper((448, 57344))}, module=module.__name__)
    fields = [("margin", int, 0), ("fp8_format", Any, made.HYBRID), ("amax_compute_algo", str, "max")]
    scaling = dataclasses.make_dataclass("DelayedScaling", fields)
    unknown = dataclasses.make_dataclass("CustomRecipe", [("qfactory", Any, None)])
    for kind in (helper, made, scaling, unknown):
        kind.__module__ = module.__name__
        setattr(module, kind.__name__, kind)
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def fp8_state(recipe: Any) -> dict[str, Any]:
    """What Transformer Engine 2 saves of a layer under delayed scaling."""
    return {
        "recipe": recipe.DelayedScaling(),
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.zeros(1024, 3),
        "scale_bwd": torch.ones(2, dtype=torch.bfloat16),
        "amax_history_bwd": torch.zeros(1024, 2),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "fp8_max_fwd": 448.0},
    }


@pytest.mark.parametrize("protocol", [4, 5])
def test_what_transformer_engine_saves_passes(tmp_path, recipe, protocol):
    tensor = as_bytes(pickle.dumps(fp8_state(recipe), protocol))
    for stored in ([tensor], [tensor, tensor], tensor, tensor.reshape(1, -1)):
        look(tmp_path, stored)


def test_states_that_hold_nothing_to_unpickle_pass(tmp_path):
    for nothing in (None, torch.empty(0, dtype=torch.uint8), {"amax": torch.ones(2)}, as_bytes(pickle.dumps(None))):
        look(tmp_path, [nothing])


def test_the_older_form_passes(tmp_path):
    saved = io.BytesIO()
    torch.save({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}, saved)
    look(tmp_path, [saved])


def evil_states(canary: Path) -> dict[str, Any]:
    """Ways to hide a call that makes the canary, and how each is opened by those who trust it."""
    evil = Evil(canary)
    hidden = io.BytesIO()
    torch.save({"scale_fwd": evil}, hidden)
    inner = pickle.dumps(evil)
    return {
        "plain": as_bytes(inner),
        "inside": as_bytes(pickle.dumps({"recipe": [OrderedDict(a=evil)]})),
        "protocol 0": as_bytes(pickle.dumps(evil, 0)),
        "numbers": torch.frombuffer(bytearray(inner + b"." * (-len(inner) % 4)), dtype=torch.float32),
        "older form": hidden,
        "inside a tensor's storage": as_bytes(pickle.dumps(Storage(pickle.dumps(evil, 2)))),
    }


CASES = ("plain", "inside", "protocol 0", "numbers", "older form", "inside a tensor's storage")


@pytest.mark.parametrize("case", CASES)
def test_a_call_is_refused_by_name_and_not_run(tmp_path, case):
    canary = tmp_path / "canary"
    value = evil_states(canary)[case]
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: entry '.*_extra_state/shard_0_1': refused.*posix\.mkdir") as refusal:
        look(tmp_path, [value])
    assert "nothing was run" in str(refusal.value)
    assert not isinstance(refusal.value, DamagedCheckpointError)
    assert not canary.exists()
    if isinstance(value, io.BytesIO):  # the fault: as Transformer Engine's layers open it
        value.seek(0)
        torch.load(value, weights_only=False)
    else:
        with contextlib.suppress(RuntimeError):  # torch finds no storage in what it has just run
            pickle.loads(value.numpy().tobytes())
    assert canary.exists()


def test_every_case_is_tested(tmp_path):
    assert tuple(evil_states(tmp_path)) == CASES


@pytest.mark.parametrize(
    "name", ["torch.load", "torch.storage._load_from_bytes2", "builtins.eval", "builtins.setattr", "functools.partial", "collections.deque"]
)
def test_names_that_no_extra_state_needs_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    content = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(CheckpointError, match=rf"refused: it asks for {name}, which no extra state needs; nothing was run"):
        look(tmp_path, as_bytes(content))


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_member_of_an_enumeration_as_python_3_11_2_writes_it_passes(tmp_path, protocol):
    enumeration = b"ctransformer_engine.common.recipe\nFormat\n"
    look(tmp_path, as_bytes(b"\x80" + bytes([protocol]) + b"cbuiltins\ngetattr\n(" + enumeration + b"VHYBRID\ntR."))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(b"transformer_engine.common.recipe\nFormat", b"__subclasses__"), (b"transformer_engine.common.recipe\nFormat", b"mro"),
     (b"transformer_engine.common.recipe\nDelayedScaling", b"HYBRID"), (b"torch\nfloat32", b"HYBRID"), (b"builtins\ngetattr", b"HYBRID")],
)  # fmt: skip
def test_no_other_attribute_can_be_asked_for(tmp_path, owner, name):
    content = b"cbuiltins\ngetattr\n(c" + owner + b"\nV" + name + b"\ntR."
    with pytest.raises(CheckpointError, match=r"refused: it asks for builtins\.getattr of .*nothing was run"):
        look(tmp_path, as_bytes(content))


@pytest.mark.parametrize("state", [b"}(V_enumerations\nK\x01u", b"N}(V__defaults__\nNu\x86", b"N}(V__code__\nNu\x86"])
def test_what_stands_for_getattr_cannot_be_changed(tmp_path, state):
    getter, other = b"cbuiltins\ngetattr\n", b"ctransformer_engine.common.recipe\nDelayedScaling\n"
    with pytest.raises(CheckpointError, match="refused"):
        look(tmp_path, as_bytes(getter + b"q\x00" + state + b"b0h\x00(" + other + b"VHYBRID\ntR."))


def test_a_recipe_with_a_function_of_its_own_is_refused(tmp_path, recipe):
    state = {"recipe": recipe.CustomRecipe(qfactory=os.getcwd)}
    with pytest.raises(CheckpointError, match=r"asks for transformer_engine\.common\.recipe\.CustomRecipe"):
        look(tmp_path, as_bytes(pickle.dumps(state)))


@pytest.mark.parametrize("name", ["torch.storage\n_load_from_bytes", "collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2"])
@pytest.mark.parametrize("state", [b"}(V__call__\nK\x01u", b"N}(V__new__\nK\x01u\x86"])
def test_a_pickle_cannot_change_the_stand_ins(tmp_path, name, state):
    """Setting attributes on what it is given is refused; else it could put the guard of storages out of action."""
    with pytest.raises(CheckpointError, match="refused"):
        look(tmp_path, as_bytes(b"c" + name.encode() + b"\n" + state + b"b."))


@pytest.mark.parametrize("name", [f"{module}\n{name}" for module, names in extra_state._NAMES.items() for name in sorted(names)])
def test_state_given_to_any_name_or_to_what_it_returns_goes_nowhere(tmp_path, name):
    """BUILD sets attributes on what it is given: on a class here, and on what calling it returns."""
    kept = [vars(kind).copy() for kind in (extra_state._Inert, extra_state._Storage, extra_state._StandIns)]
    for state in (b"}(V__setstate__\nK\x01u", b"N}(V__setstate__\nK\x01u\x86"):
        with pytest.raises(CheckpointError, match="refused"):
            look(tmp_path, as_bytes(b"c" + name.encode() + b"\n" + state + b"b."))
        look(tmp_path, as_bytes(b"c" + name.encode() + b"\n)R" + state + b"b."))
        look(tmp_path, as_bytes(b"c" + name.encode() + b"\n)\x81" + state + b"b."))
    assert kept == [vars(kind) for kind in (extra_state._Inert, extra_state._Storage, extra_state._StandIns)]


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps({"a": 1})[:-3], b"\x95" + b"\xff" * 8 + b"."])
def test_what_cannot_be_followed_is_refused(tmp_path, content):
    padded = content or b"\0"
    with pytest.raises(CheckpointError, match="refused, nothing was run: not a pickle that can be followed"):
        look(tmp_path, as_bytes(padded))


def test_a_sparse_tensor_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"refused|is a tensor of layout"):
        look(tmp_path, torch.eye(2).to_sparse())


def test_an_entry_that_ends_early_is_damage(tmp_path):
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp: ends inside of entry '.*_extra_state"):
        look(tmp_path, None, length=10_000)


def test_a_packed_entry_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is packed by \['stream\.zstd'\]"):
        look(tmp_path, None, transform_descriptors=["stream.zstd"])


def test_other_entries_are_not_read(tmp_path):
    """The weights' entries cost nothing: their file is not even there."""
    look(tmp_path, as_bytes(pickle.dumps(Evil(tmp_path / "canary"))), name="decoder.layers.0.weight")
