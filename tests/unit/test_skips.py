"""tests/conftest.py: where all is required, a skipped test fails the session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = "import pytest\n\n\n@pytest.mark.skip(reason='no file')\ndef test_a():\n    pass\n\n\ndef test_b():\n    pass\n"


@pytest.mark.parametrize(
    ("text", "require", "code"),
    [(SKIPPED, "", 0), (SKIPPED, "0", 0), (SKIPPED, "1", 1), ("def test_b():\n    pass\n", "1", 0)],
)
def test_a_skip_fails_where_all_is_required(tmp_path: Path, text: str, require: str, code: int) -> None:
    (tmp_path / "test_it.py").write_text(text)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = {**os.environ, "MEGATRON_EXT_REQUIRE_ALL": require}
    done = subprocess.run([*words, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("1 tests were skipped" in done.stdout) is (code == 1)


@pytest.mark.parametrize(("folder", "code"), [("there", 1), ("not there", 0)])
def test_a_test_of_shared_files_may_be_skipped_only_where_they_are_not(tmp_path: Path, folder: str, code: int) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "test_it.py").write_text(SKIPPED.replace("@pytest.mark.skip", "@pytest.mark.shared\n@pytest.mark.skip"))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = {**os.environ, "MEGATRON_EXT_REQUIRE_ALL": "1", "MEGATRON_EXT_BENCHMARKS": str(tmp_path / folder)}
    done = subprocess.run([*words, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
