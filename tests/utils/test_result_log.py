"""What metrics are appended to: a log, whole lines, and never a file of something else."""

from __future__ import annotations

import json

import pytest

from src.utils.errors import UserError
from src.utils.files import check_output
from src.utils.result_log import check_log, lines_path, log_result


def test_a_half_line_of_a_killed_run_does_not_spoil_the_next(tmp_path):
    log = str(tmp_path / "performance.log")
    log_result(log, {"mrr": 0.5}, {})
    lines = lines_path(log)
    lines.write_text(lines.read_text() + '{"time": "20')
    log_result(log, {"mrr": 0.75}, {})
    first, torn, last = lines.read_text().splitlines()
    assert torn == '{"time": "20'
    assert [json.loads(line)["metrics"]["mrr"] for line in (first, last)] == [0.5, 0.75]
    check_log(log)
    check_log(str(lines))


@pytest.mark.parametrize(
    ("name", "content", "log_path"),
    [
        ("train.json", '{"query": "q"}\n', "train.json"),
        ("README.md", "# A page\n", "README.md"),
        ("corpus.jsonl", '{"text": "k"}\n', "corpus.jsonl"),
        ("corpus.jsonl", '{"text": "k"}\n', "corpus.log"),
    ],
)
def test_what_is_no_log_is_not_appended_to(tmp_path, name, content, log_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is there, and no log of metrics"):
        check_log(str(tmp_path / log_path))


def test_a_log_needs_a_name():
    with pytest.raises(UserError, match="--log_path is empty"):
        check_log("")


def test_a_file_to_read_is_never_written(tmp_path):
    data = tmp_path / "data.json"
    data.write_text("{}\n")
    (tmp_path / "link.json").symlink_to(data)
    with pytest.raises(UserError, match=r"--json .*link.json is one of the files to read"):
        check_output(str(tmp_path / "link.json"), "json", [str(tmp_path / "other"), str(data)])
    check_output(str(tmp_path / "new.json"), "json", [str(data)])
