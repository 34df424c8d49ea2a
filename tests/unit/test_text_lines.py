"""Lines of text files: every line in exactly one slice, documents and refusals, the held-out choice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.config.stages import Source
from megatron_ext.data.text_lines import BadLine, cut, find_files, is_heldout, line_number, lines, read_document
from megatron_ext.errors import DataError

SOURCE = Source(name="web", paths=("*.jsonl",), max_epochs=1.0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.binary(max_size=60).map(lambda b: b.replace(b"\r", b"\n").replace(b"\x00", b"\n")), slice_bytes=st.integers(1, 70))
def test_every_line_is_in_exactly_one_slice(tmp_path, text, slice_bytes):
    (tmp_path / "a.jsonl").write_bytes(text)
    found = [item for part in cut(find_files(SOURCE, tmp_path), slice_bytes) for item in lines(part)]
    expected = [line + b"\n" for line in text.split(b"\n")[:-1]] + ([text.split(b"\n")[-1]] if text.split(b"\n")[-1] else [])
    assert [line for _, line in found] == expected
    assert [offset for offset, _ in found] == [sum(map(len, expected[:i])) for i in range(len(expected))]
    assert [line_number(tmp_path / "a.jsonl", offset) for offset, _ in found] == list(range(1, len(expected) + 1))


def test_slices_are_numbered_through_the_files(tmp_path):
    for name, size in (("b.jsonl", 5), ("a.jsonl", 10), ("empty.jsonl", 0)):
        (tmp_path / name).write_bytes(b"x" * size)
    parts = cut(find_files(SOURCE, tmp_path), 4)
    assert [(p.file.name, p.number, p.start, p.end) for p in parts] == [
        ("a.jsonl", 0, 0, 4), ("a.jsonl", 1, 4, 8), ("a.jsonl", 2, 8, 10), ("b.jsonl", 3, 0, 4), ("b.jsonl", 4, 4, 5),
    ]  # fmt: skip


def test_files_of_several_patterns_come_once_each(tmp_path):
    for name in ("x/a.jsonl", "y/a.jsonl", "y/z/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find_files(replace(SOURCE, paths=("y/*.jsonl", str(tmp_path / "**" / "*.jsonl"))), tmp_path)
    assert [file.name for file in found] == ["y/a.jsonl", "x/a.jsonl", "y/z/b.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none*.jsonl", r"source 'web': no file matches 'none\*\.jsonl' \(looked for .*none\*\.jsonl\); correct its paths"),
        ("folder", r"no file matches 'folder'.*that is a folder: write folder/\*\.jsonl"),
        ("a.jsonl.gz", r"a\.jsonl\.gz: source 'web' reads plain JSONL; decompress"),
    ],
)
def test_paths_that_name_no_text_are_refused(tmp_path, pattern, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=message):
        find_files(replace(SOURCE, paths=(pattern,)), tmp_path)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"text": "a"', r"not JSON \(.* at character 13 of the line\)"),
        (b'{"text": "\xff"}', r"not UTF-8 \(invalid start byte at byte 110 of the file\)"),
        (b'["text"]', r"a JSON list, not an object"),
        (b'{"id": "1", "body": "a"}', r"no key 'text' \(keys: id, body\); text_key of source 'web' names the key"),
        (b'{"text": null}', r"'text' holds a NoneType, not text"),
        (b'{"text": ["a"]}', r"'text' holds a list, not text"),
        (b'{"text": "a", "id": 1.5}', r"'id' holds a float, not text or a whole number"),
        (b'{"text": "a", "id": true}', r"'id' holds a bool"),
        (b'{"text": "a\\ud800"}', r"half of a surrogate pair"),
        (b'{"text": "a", "id": "\\udc00"}', r"half of a surrogate pair"),
        (b"[" * 100_000, r"not JSON|nested too deep"),
    ],
)
def test_bad_lines_say_why(line, cause):
    with pytest.raises(BadLine, match=cause):
        read_document(line, 100, SOURCE, "a.jsonl")


@pytest.mark.parametrize(
    ("line", "offset", "name", "text"),
    [
        ({"text": "a", "id": "x"}, 5, "x", "a"),
        ({"text": "a", "id": 17}, 5, "17", "a"),
        ({"text": "a"}, 5, "a.jsonl:5", "a"),
        ({"text": "a", "id": None}, 0, "a.jsonl:0", "a"),
        ({"text": "a", "id": ""}, 0, "", "a"),
        ({"text": "smile \U0001f600", "id": "\U0001f600"}, 5, "\U0001f600", "smile \U0001f600"),
    ],
)
def test_good_lines(line, offset, name, text):
    document = read_document(json.dumps(line).encode(), offset, SOURCE, "a.jsonl")
    assert (document.id, document.text, document.offset_bytes) == (name, text, offset)


def test_a_byte_order_mark_is_no_part_of_the_first_line():
    assert read_document(b'\xef\xbb\xbf{"text": "a", "id": "x"}', 0, SOURCE, "a").text == "a"
    with pytest.raises(BadLine, match="not JSON"):
        read_document(b'\xef\xbb\xbf{"text": "a", "id": "x"}', 7, SOURCE, "a")


def test_the_held_out_choice_is_the_hash_of_source_and_id():
    names = [str(i) for i in range(4000)]
    chosen = [name for name in names if is_heldout("web", name, 0.1)]
    expected = [name for name in names if int(hashlib.sha256(f"web/{name}".encode()).hexdigest(), 16) / 2**256 < 0.1]
    assert chosen == expected
    assert 330 < len(chosen) < 470  # 400, within 3.7 standard deviations
    assert set(chosen) < {name for name in names if is_heldout("web", name, 0.2)}
    assert not any(is_heldout("web", name, 0.0) for name in names)
