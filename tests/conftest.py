"""With MEGATRON_EXT_REQUIRE_ALL=1, as in .ci/run, a skipped test fails the session: nothing may go missing unseen."""

from __future__ import annotations

import os

import pytest

from tests.benchmark_files import BENCHMARKS

REQUIRE_ALL = "MEGATRON_EXT_REQUIRE_ALL"


def _skipped(config: pytest.Config) -> list[str]:
    """Tests that were skipped, but for those of files that this machine does not have."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    return [report.nodeid for report in reports if BENCHMARKS.is_dir() or "shared" not in report.keywords]


def _all_required() -> bool:
    return os.environ.get(REQUIRE_ALL, "") not in ("", "0")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn a good end with skips into a failure."""
    if _all_required() and _skipped(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say why."""
    skipped = _skipped(config)
    if _all_required() and skipped:
        terminalreporter.section(f"{REQUIRE_ALL} is set and {len(skipped)} tests were skipped", red=True)
        for name in skipped:
            terminalreporter.line(name)
