"""Where real benchmark files are, for tests marked `shared`: MEGATRON_EXT_BENCHMARKS, or ../shared/benchmarks beside the project."""

from __future__ import annotations

import os
from pathlib import Path

BENCHMARKS = Path(os.environ.get("MEGATRON_EXT_BENCHMARKS") or Path(__file__).resolve().parents[2] / "shared" / "benchmarks")
