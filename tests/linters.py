"""The linters that the development tools bring along, beside this Python: PATH may not name its folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def linter(name: str) -> str:
    """The program's path; AssertionError where it is not installed."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is one of the development tools: make .venv"
    return found
