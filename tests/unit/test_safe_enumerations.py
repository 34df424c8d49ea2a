"""Members of enumerations in a checkpoint's metadata, as some versions of Python write them: read, and nothing else by the same way."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from megatron_ext.checkpoint.safe_reading import read_metadata
from megatron_ext.errors import CheckpointError


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 do a member of an enumeration: getattr(owner, name)."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_a_member_written_by_python_3_11_2_is_read(tmp_path: Path) -> None:
    held = ByName(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=held)))
    assert read_metadata(tmp_path).planner_data is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT


@pytest.mark.parametrize(("owner", "name"), [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), ("", "format")])
def test_nothing_else_is_had_that_way(tmp_path: Path, owner: Any, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=ByName(owner, name))))
    with pytest.raises(CheckpointError, match=r"getattr"):
        read_metadata(tmp_path)
