"""The identity of this program's source."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def code_hash() -> str:
    """One hash over this package's source files: names and bytes."""
    root = Path(__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()
