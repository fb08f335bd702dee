"""JSON lines read in place: lines and blank lines, problems with file and line, chunks, the cache of scans."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import src.utils.jsonl
from src.retrieval.data.rows import check_train_row
from src.utils.errors import UserError
from src.utils.jsonl import JsonLines, open_jsonl, scan_file


def number_check(row: dict) -> tuple[list[str], dict]:
    """A row check for these tests: column ``n``, and a problem for a negative one."""
    n = row.get("n", 0)
    return ([f"{n} is negative"], {}) if n < 0 else ([], {"n": n, "name": str(row.get("name", ""))})


def lines_of(path: Path, content: bytes, **options) -> JsonLines:
    path.write_bytes(content)
    return open_jsonl(str(path), number_check, "number-1", **options)


@pytest.mark.parametrize(
    ("content", "rows", "lines"),
    [
        (b'{"n": 1}\n{"n": 2}\n', [1, 2], [1, 2]),
        (b'{"n": 1}\n{"n": 2}', [1, 2], [1, 2]),  # no line end at the end
        (b'{"n": 1}\r\n{"n": 2}\r\n', [1, 2], [1, 2]),
        (b'{"n": 1}\r\n{"n": 2}', [1, 2], [1, 2]),
        (b'\n\n{"n": 1}\n\r\n  \t\n{"n": 2}\n\n', [1, 2], [3, 6]),  # blank lines count as lines, not as rows
        (b'\xef\xbb\xbf{"n": 1}\n{"n": 2}\n', [1, 2], [1, 2]),  # byte order mark
        (b'\xef\xbb\xbf{"n": 1}\r\n', [1], [1]),
        (b'  {"n": 1}  \n', [1], [1]),
        (b'{"n": 1}', [1], [1]),
    ],
)
def test_line_ends_and_blank_lines(tmp_path, content, rows, lines):
    opened = lines_of(tmp_path / "rows.json", content)
    assert [row["n"] for row in opened] == rows
    assert opened.scan.columns["n"].tolist() == rows
    assert [opened.where(i) for i in range(len(opened))] == [f"{tmp_path}/rows.json:{line}" for line in lines]


def test_byte_order_mark_before_a_blank_line(tmp_path):
    """A mark alone on the first line is no row."""
    opened = lines_of(tmp_path / "rows.json", b'\xef\xbb\xbf\r\n{"n": 1}\r\n')
    assert [row["n"] for row in opened] == [1]


def test_unicode_stays(tmp_path):
    """Signs that str.splitlines would cut at, ends of lines in escapes, and signs beyond the first plane."""
    rows = [
        {"name": "é東\u2028\u0085\x0c\U0001f600"},
        {"name": "a\nb\r\n"},
        {"name": ""},
        {"ключ": [1, None, {"a": 2.5}]},
    ]
    content = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))
    opened = lines_of(tmp_path / "rows.json", content.encode())
    assert list(opened) == rows


def test_rows_as_a_sequence(tmp_path):
    opened = lines_of(tmp_path / "rows.json", b"".join(b'{"n": %d, "kept": "x"}\n' % i for i in range(5)))
    assert len(opened) == 5
    assert opened[3] == {"n": 3, "kept": "x"}
    assert opened[-1]["n"] == 4
    assert [row["n"] for row in opened[1:4]] == [1, 2, 3]
    assert [row["n"] for row in opened[::-2]] == [4, 2, 0]
    with pytest.raises(IndexError):
        opened[5]


def test_pickled_rows_are_read_again(tmp_path):
    """As a worker process gets them: with a memory map of its own, whether or not one was open."""
    opened = lines_of(tmp_path / "rows.json", b'{"n": 1}\n{"n": 2}\n')
    before = pickle.dumps(opened)
    assert opened[1] == {"n": 2}
    for data in (before, pickle.dumps(opened)):
        assert list(pickle.loads(data)) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("content", [b"", b"\n", b"  \r\n\n"])
def test_file_without_rows(tmp_path, content):
    with pytest.raises(UserError, match=r"rows\.json is empty"):
        lines_of(tmp_path / "rows.json", content)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"n": 1', "not valid JSON"),
        (b'{"n": 1} {"n": 2}', "not valid JSON"),
        (b"[1, 2]", "must be a JSON object, found list"),
        (b"1", "must be a JSON object, found int"),
        (b'{"n": "\xff"}', "not valid UTF-8"),
        (b'{"n": -7}', "-7 is negative"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_problems_are_told_with_file_and_line(tmp_path, line, message):
    with pytest.raises(UserError) as caught:
        lines_of(tmp_path / "rows.json", b'{"n": 1}\n\n' + line + b'\n{"n": 2}\n')
    assert str(caught.value).startswith(f"{tmp_path}/rows.json:3: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("chunk", [50, 1 << 20])
def test_all_problems_are_counted_and_ten_shown(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(src.utils.jsonl, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(src.utils.jsonl, "available_cores", lambda: 1)
    with pytest.raises(UserError) as caught:
        lines_of(tmp_path / "rows.json", b"".join(b'{"n": %d}\n' % (-i) for i in range(30)))
    first, *shown, last = str(caught.value).splitlines()
    assert first.startswith("29 problems in ")
    assert [text.strip() for text in shown] == [f"{tmp_path}/rows.json:{i + 1}: {-i} is negative" for i in range(1, 11)]
    assert last.strip() == "(+19 more)"


def assert_same_scan(found, expected) -> None:
    np.testing.assert_array_equal(found.places, expected.places)
    assert found.columns.keys() == expected.columns.keys()
    for name, values in expected.columns.items():
        assert found.columns[name].tolist() == values.tolist()
    assert found.problems == expected.problems
    assert found.problem_count == expected.problem_count


parts = st.lists(
    st.one_of(
        st.sampled_from([b"", b" ", b"\r", b"{broken"]),
        st.builds(
            lambda n, name: json.dumps({"n": n, "name": name}, ensure_ascii=False).encode(),
            st.integers(-1, 10**6),
            st.text(st.characters(codec="utf-8"), max_size=8),
        ),
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.integers(1, 60))
def test_chunks_find_what_one_pass_finds(tmp_path, monkeypatch, lines, end, ended, chunk):
    """Chunks of any size, smaller than a line too; problems have the line number of the whole file."""
    path = tmp_path / "rows.json"
    path.write_bytes(end.join(lines) + (end if ended else b""))
    monkeypatch.setattr(src.utils.jsonl, "available_cores", lambda: 1)
    monkeypatch.setattr(src.utils.jsonl, "CHUNK_BYTES", 1 << 20)
    whole = scan_file(str(path), number_check)
    monkeypatch.setattr(src.utils.jsonl, "CHUNK_BYTES", chunk)
    chunked = scan_file(str(path), number_check)
    # Columns of a file with problems are never used.
    if whole.problem_count:
        whole.columns, chunked.columns = {}, {}
    assert_same_scan(chunked, whole)
    expected = [
        (number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith(b"{broken")
    ]
    rows = JsonLines(str(path), chunked)
    good = {rows.scan.places[i, 2]: i for i in range(len(rows))}
    for number, line in expected:
        assert rows[good[number]] == json.loads(line)


def test_parallel_scan(tmp_path, monkeypatch):
    """Several processes for a file of 40 chunks: rows, columns of different width and line numbers as in one pass."""
    path = tmp_path / "rows.json"
    rows = [
        {"query": "é" * i, "pos": ["p"] * (i % 3), "neg": ["n"], "task": "qa" if i < 100 else "convsearch"}
        for i in range(200)
    ]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    whole = scan_file(str(path), check_train_row)
    monkeypatch.setattr(src.utils.jsonl, "CHUNK_BYTES", path.stat().st_size // 40)
    monkeypatch.setattr(src.utils.jsonl, "available_cores", lambda: 2)
    chunked = scan_file(str(path), check_train_row)
    # NaN is no equal of itself.
    for scan in (whole, chunked):
        assert all(np.isnan(scan.columns.pop(name)).all() for name in ("score_max", "score_spread"))
    assert_same_scan(chunked, whole)
    assert list(JsonLines(str(path), chunked)) == rows
    assert chunked.places[:, 2].tolist() == list(range(1, 400, 2))
    assert chunked.columns["task"].tolist() == [row["task"] for row in rows]


class CountingCheck:
    """`number_check` that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, row: dict) -> tuple[list[str], dict]:
        self.calls += 1
        return number_check(row)


def test_cache_spares_the_scan(tmp_path):
    """An unchanged file is not scanned again; a changed one, or another check, is."""
    path, cache, check = tmp_path / "rows.json", str(tmp_path / "cache"), CountingCheck()
    path.write_bytes(b'\xef\xbb\xbf{"n": 1, "name": "one"}\r\n\r\n{"n": 2, "name": "two"}\r\n')
    first = open_jsonl(str(path), check, "a", cache)
    assert check.calls == 2
    second = open_jsonl(str(path), check, "a", cache)
    assert check.calls == 2
    assert list(second) == list(first) == [{"n": 1, "name": "one"}, {"n": 2, "name": "two"}]
    assert_same_scan(second.scan, first.scan)
    assert second.where(1) == f"{path}:3"
    open_jsonl(str(path), check, "b", cache)
    assert check.calls == 4
    path.write_bytes(b'{"n": 3}\n')
    assert list(open_jsonl(str(path), check, "a", cache)) == [{"n": 3}]
    assert check.calls == 5
    open_jsonl(str(path), check, "a", None)
    assert check.calls == 6


def test_cache_notices_a_change_of_the_same_size(tmp_path):
    path, cache = tmp_path / "rows.json", str(tmp_path / "cache")
    for number, content in enumerate((b'{"n": 11}\n{"n": 2}\n', b'{"n": 1}\n{"n": 22}\n')):
        path.write_bytes(content)
        os.utime(path, (1000 + number, 1000 + number))
        opened = open_jsonl(str(path), number_check, "a", cache)
    assert [row["n"] for row in opened] == [1, 22]


@pytest.mark.parametrize("damage", [b"", b"garbage", b"PK\x03\x04 half of an archive"])
def test_damaged_cache_is_made_anew(tmp_path, damage):
    path, cache = tmp_path / "rows.json", tmp_path / "cache"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n')
    open_jsonl(str(path), number_check, "a", str(cache))
    for file in cache.iterdir():
        file.write_bytes(damage)
    assert [row["n"] for row in open_jsonl(str(path), number_check, "a", str(cache))] == [1, 2]


def test_truncated_cache_is_made_anew(tmp_path):
    path, cache = tmp_path / "rows.json", tmp_path / "cache"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n')
    open_jsonl(str(path), number_check, "a", str(cache))
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert [row["n"] for row in open_jsonl(str(path), number_check, "a", str(cache))] == [1, 2]


def test_file_with_problems_is_not_cached(tmp_path):
    path, cache = tmp_path / "rows.json", tmp_path / "cache"
    path.write_bytes(b'{"n": -1}\n')
    for _ in range(2):
        with pytest.raises(UserError, match="negative"):
            open_jsonl(str(path), number_check, "a", str(cache))


def test_large_rows_are_read_few_at_a_time(tmp_path, monkeypatch):
    rows = [{"text": "x" * size} for size in (10, 10, 500, 10, 10, 10)]
    path = tmp_path / "rows.json"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    opened = open_jsonl(str(path), lambda row: ([], {}), "any", None)
    monkeypatch.setattr(src.utils.jsonl, "BYTES_A_TIME", 70)
    read, parts = opened._read, []
    monkeypatch.setattr(opened, "_read", lambda places: parts.append(len(places)) or read(places))
    assert list(opened) == rows
    assert parts == [2, 1, 3]
