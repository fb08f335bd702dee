"""Bars where there is a terminal, lines of the log elsewhere."""

from __future__ import annotations

import logging

from tqdm import tqdm

import src.utils.progress as module
from src.utils.progress import progress


def run(monkeypatch, caplog, seconds: float) -> list[str]:
    """Lines of a hundred steps of so many seconds each."""
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO), progress(100, "encoding", mininterval=0, miniters=1) as bar:
        for _ in range(100):
            clock[0] += seconds
            bar.update(1)
    return [record.getMessage() for record in caplog.records]


def test_a_long_job_tells_every_tenth(monkeypatch, caplog, capsys):
    lines = run(monkeypatch, caplog, 2)
    assert [line.partition(",")[0] for line in lines] == [f"encoding: {tenth}0%" for tenth in range(1, 11)]
    assert lines[2].startswith("encoding: 30%, 30 of 100, ")
    assert capsys.readouterr().err == ""


def test_a_very_long_job_tells_every_tenth_and_a_short_one_nothing(monkeypatch, caplog, capsys):
    assert len(run(monkeypatch, caplog, 3600)) == 10
    caplog.clear()
    assert run(monkeypatch, caplog, 0.01) == []
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch, caplog, capsys):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True)
    assert run(monkeypatch, caplog, 2) == []
    assert "encoding: 100%" in capsys.readouterr().err
    assert type(progress(1, "x", shown=False)) is tqdm


def test_items_pass_through(capsys):
    assert list(progress(3, "checking", items=iter("abc"))) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
