"""The figure of what training logged."""

from __future__ import annotations

import json
import logging
import struct
import sys
from pathlib import Path

import pytest

from src.retrieval.report.plot import draw, main, panels_of, read_history
from src.retrieval.report.training_record import draw_training
from src.utils.errors import UserError

pytest.importorskip("matplotlib")

HISTORY = [
    {"step": 5, "epoch": 0.5, "loss": 2.0, "contrastive": 1.5, "learning_rate": 0.1, "grad_norm": 3.0},
    {"step": 10, "epoch": 1.0, "loss": 1.0, "contrastive": 0.5, "learning_rate": 0.2, "grad_norm": 2.0},
    {"step": 10, "epoch": 1.0, "eval_ndcg@5": 0.5, "eval_ndcg@10": 0.6, "eval_mrr@5": 0.4},
    {"step": 10, "epoch": 1.0, "train_runtime": 9.0, "train_loss": 1.5, "total_flos": 0.0},
]


def write_checkpoint(folder: Path, step: int, history) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    return checkpoint


def size(path: Path) -> tuple[int, int]:
    """Width and height out of the header of a PNG file."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_values_go_to_their_panels():
    """In the same order of lines, whatever that of the names in the log."""
    wanted = {
        "loss": {"loss": [(5, 2.0), (10, 1.0)], "contrastive": [(5, 1.5), (10, 0.5)]},
        "learning rate": {"learning_rate": [(5, 0.1), (10, 0.2)]},
        "gradient norm": {"grad_norm": [(5, 3.0), (10, 2.0)]},
        "ndcg": {"ndcg@5": [(10, 0.5)], "ndcg@10": [(10, 0.6)]},
        "mrr": {"mrr@5": [(10, 0.4)]},
    }
    for history in (HISTORY, [dict(sorted(entry.items())) for entry in HISTORY]):
        found = panels_of(history)
        assert found == wanted
        assert [list(series) for series in found.values()] == [list(wanted[panel]) for panel in found]


def test_several_evaluation_sets_are_lines_of_one_panel():
    names = ("nq_recall@5", "nq_nq_recall@5", "my_set_recall@5", "mean_recall@5", "nq_ndcg@10", "mean_ndcg@10")
    history = [{"step": 0, **{f"eval_{name}": 0.5 for name in names}}]
    panels = {panel: list(series) for panel, series in panels_of(history).items()}
    assert panels == {"recall@5": ["mean", "my_set", "nq"], "nq_recall@5": ["nq"], "ndcg@10": ["mean", "nq"]}
    # Alone, it is the metric of answers.
    assert panels_of([{"step": 0, "eval_nq_recall@5": 0.5}]) == {"nq_recall": {"nq_recall@5": [(0, 0.5)]}}


def test_a_run_is_drawn_again_from_its_newest_checkpoint(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 5, HISTORY[:1])
    newest = write_checkpoint(tmp_path, 10, HISTORY)
    assert read_history(str(tmp_path)) == read_history(str(newest)) == HISTORY
    main([str(tmp_path)])
    # Five panels, three in a row.
    assert size(tmp_path / "training.png") == (1650, 792)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_several_runs_are_compared_in_one_figure(tmp_path, monkeypatch):
    for name in ("one", "two"):
        write_checkpoint(tmp_path / name, 10, HISTORY[:2])
    folders = [str(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(UserError, match="--output is needed"):
        main(folders)
    with pytest.raises(UserError, match=r"data.json: the figure is a PNG"):
        main([*folders, "--output", str(tmp_path / "data.json")])
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: figures.append(figure))
    main([*folders, "--output", str(tmp_path / "both.png")])
    first = figures[0].axes[0]
    assert first.get_title() == "loss"
    labels = [text.get_text() for text in first.get_legend().get_texts()]
    assert labels == ["one loss", "one contrastive", "two loss", "two contrastive"]
    assert [list(line.get_ydata()) for line in first.get_lines()] == [[2.0, 1.0], [1.5, 0.5]] * 2


@pytest.mark.parametrize(
    "state",
    [
        *("[]", "{}", '{"log_history": []}', '{"global_step": "four", "log_history": []}'),
        *('{"global_step": 5}', '{"global_step": 5, "log_history": [1]}', '{"log_history": ['),
    ],
)
def test_a_damaged_log_is_told(tmp_path, state):
    checkpoint = write_checkpoint(tmp_path, 5, HISTORY)
    (checkpoint / "trainer_state.json").write_text(state)
    with pytest.raises(UserError, match=r"is damaged: it has no|is not valid JSON|must hold an object"):
        read_history(str(checkpoint))


def test_the_only_part_of_a_loss_is_drawn_once():
    """Whatever the log's rounding; with a weight, or beside another part, it is a line of its own."""
    history = [{"step": step, "loss": 1.0 / step, "contrastive": 1.0 / step + 4e-5} for step in (5, 10, 20)]
    assert panels_of(history) == {"loss": {"loss": [(5, 0.2), (10, 0.1), (20, 0.05)]}}
    # An epoch's last batch may be smaller than others.
    history[1]["contrastive"] = 0.5
    assert list(panels_of(history)["loss"]) == ["loss"]
    history[2]["contrastive"] = 0.4
    assert list(panels_of(history)["loss"]) == ["loss", "contrastive"]


def test_an_evaluation_before_training_is_the_first_point():
    history = [{"step": 0, "eval_ndcg@10": 0.5}, *HISTORY]
    assert panels_of(history)["ndcg"]["ndcg@10"] == [(0, 0.5), (10, 0.6)]


def test_runs_are_named_by_what_tells_them_apart(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("src.retrieval.report.plot.draw", lambda runs, path: drawn.update(runs))
    folders = [tmp_path / "a" / "long" / name for name in ("first", "second")]
    for folder in folders:
        write_checkpoint(folder, 5, HISTORY)
    main([*map(str, folders), "--output", str(tmp_path / "both.png")])
    assert list(drawn) == ["first", "second"]
    drawn.clear()
    write_checkpoint(tmp_path / "b" / "first", 5, HISTORY)
    main([str(folders[0]), str(tmp_path / "b" / "first"), "--output", str(tmp_path / "both.png")])
    assert list(drawn) == ["long/first", "b/first"]


def test_steps_are_whole(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **options: figures.append(figure))
    draw({"": [{"step": step, "loss": 1.0} for step in (1, 2)]}, str(tmp_path / "training.png"))
    ((axes,),) = [figure.axes for figure in figures]
    assert [place for place in axes.get_xticks() if place != int(place)] == []
    assert [(line.get_linestyle(), line.get_marker()) for line in axes.get_lines()] == [("-", ".")]


def test_entries_that_tell_nothing_are_left_out():
    odd = [{"loss": 1.0}, {"step": "5", "loss": 1.0}, {"step": 5, "loss": "low"}, {"step": 6, "loss": 2.0}]
    assert panels_of(odd) == {"loss": {"loss": [(6, 2.0)]}}


def test_errors(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="nothing was logged"):
        draw({"": HISTORY[3:]}, str(tmp_path / "training.png"))


@pytest.mark.parametrize("trouble", ["no matplotlib", "nothing logged", "no place"])
def test_training_goes_on_without_a_figure(trouble, tmp_path, monkeypatch, caplog):
    history, folder = HISTORY, tmp_path
    if trouble == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    if trouble == "nothing logged":
        history = HISTORY[3:]
    if trouble == "no place":
        folder = tmp_path / "file" / "below"
        (tmp_path / "file").write_text("")
    with caplog.at_level(logging.INFO):
        draw_training(history, str(folder))
    wanted = {"no matplotlib": "pip install -e '.[eval]'", "nothing logged": "--logging_steps", "no place": "file"}
    assert wanted[trouble] in caplog.text
    assert len(caplog.records) == 1
    assert not (folder / "training.png").exists()
    if folder.is_dir():
        # Nor does one of an earlier run stay, which would be taken for this one's.
        (folder / "training.png").write_bytes(b"old")
        draw_training(history, str(folder))
        assert not (folder / "training.png").exists()
