"""Progress: plain lines where nobody watches, a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from megatron_ext.progress import progress


def test_plain_lines_tell_count_share_fields_and_time():
    stream = io.StringIO()
    with progress("Tokenize corpus", total=4000, unit="documents", stream=stream, every_seconds=0.0) as bar:
        bar.update(1000, tokens=1_234_567, loss=1 / 3, learning_rate=3e-5, speed="2 MB/s")
        bar.update(3000)
    first, last = stream.getvalue().splitlines()
    assert first == (
        "Tokenize corpus: 1,000 / 4,000 documents (25%), tokens 1,234,567, loss 0.3333, learning rate 3e-05, speed 2 MB/s, 0:00:00 left"
    )
    assert last.startswith("Tokenize corpus: 4,000 / 4,000 documents (100%), tokens 1,234,567")
    assert last.endswith("0:00:00 taken")


def test_lines_come_seldom_and_the_last_one_always():
    stream = io.StringIO()

    def fail_midway() -> None:
        with progress("Train", total=10, unit="steps", done=4, stream=stream, every_seconds=1000.0) as bar:
            for _ in range(3):
                bar.update(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail_midway()
    assert stream.getvalue() == "Train: 7 / 10 steps (70%), 0:00:00 left\n"


def test_an_unknown_total_shows_the_count():
    stream = io.StringIO()
    with progress("Read", total=None, unit="lines", stream=stream) as bar:
        bar.update(12)
    assert stream.getvalue() == "Read: 12 lines, 0:00:00 taken\n"


def test_time_left_comes_from_the_work_done_here(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("megatron_ext.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with progress("Train", total=1000, unit="steps", done=900, stream=stream, every_seconds=1.0) as bar:
        now[0] += 60
        bar.update(10)  # 10 in a minute: the 90 that are left take 9
        assert stream.getvalue() == "Train: 910 / 1,000 steps (91%), 0:09:00 left\n"


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress("Train", total=10, unit="steps", stream=stream) as bar:
        bar.update(10, loss=0.5)
    assert "\x1b[" in stream.getvalue()
    assert "100% 10 steps  loss 0.5" in stream.getvalue()
