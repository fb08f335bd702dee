"""The leaderboard out of logs, and the comparison of two runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evaluation.report import compare, leaderboard, main, read_results, to_csv, to_markdown, to_text
from src.retrieval.report.plot import draw
from src.utils.errors import UserError
from src.utils.result_log import log_result
from tests.helpers import write_rows


def record(task, retriever, time, model="lm", **metrics):
    return {"task": task, "retriever": retriever, "time": time, "metrics": metrics} | (
        {"model": model} if model else {}
    )


RECORDS = [
    record("mmlu", "no", "2026-01-01", accuracy=0.3),
    record("mmlu", "no", "2026-01-02", accuracy=0.4),
    record("mmlu", "some/where/model", "2026-01-01", accuracy=0.5),
    record("msc", "no", "2026-01-01", perplexity=20.0),
    record("msc", "some/where/model", "2026-01-01", perplexity=15.0),
    record("tool", "some/where/model", "2026-01-01", None, **{"ndcg@1": 0.5, "ndcg@5": 0.75, "recall@5": 0.9}),
]


def test_newest_results_in_columns_with_blanks():
    board = leaderboard(RECORDS)
    lines = to_csv(board).splitlines()
    assert lines[0] == "retriever,MMLU,PopQA,NQ EM,ICL avg,MSC ppl,LRLM ppl,ToolBench ndcg@5,QReCC ndcg@3"
    assert lines[1:] == ["no · lm,0.4,,,,20.0,,,", "where/model · lm,0.5,,,,15.0,,0.75,"]
    shown = to_markdown(board).splitlines()
    assert shown[2] == "| no · lm | 0.4000 |  |  |  | 20.0000 |  |  |  |"
    # Less is better of perplexity.
    assert shown[3] == "| where/model · lm | **0.5000** |  |  |  | **15.0000** |  | **0.7500** |  |"
    assert "0.4000" in to_text(board)


def retrieved(retriever, eval_data="data/nq/test.json", **metrics):
    arguments = {"arguments": {"eval_data": eval_data}}
    return record("retrieval", retriever, "2026", None, **metrics) | arguments


def at(cutoffs, **values):
    return {f"{name}@{cutoff}": value + cutoff / 1000 for name, value in values.items() for cutoff in cutoffs}


def test_metrics_of_retrieval_have_columns():
    dense = at([1, 5, 10, 100], mrr=0.3, ndcg=0.4, recall=0.5, nq_recall=0.6)
    runs = [retrieved("bm25", **at([1, 5, 10, 100], mrr=0.1, ndcg=0.2)), retrieved("some/where/model", **dense)]
    lines = to_csv(leaderboard(runs)).splitlines()
    assert (
        lines[0]
        == "retriever,nq/test.json ndcg@10,nq/test.json mrr@10,nq/test.json recall@100,nq/test.json nq_recall@10"
    )
    assert lines[1] == "bm25,0.21000000000000002,0.11,,"
    assert [float(value) for value in lines[2].split(",")[1:]] == pytest.approx([0.41, 0.31, 0.6, 0.61])
    # Beside other evaluations, of several data, and at the cutoffs that most runs have.
    more = [*RECORDS, *runs, retrieved("bm25", **at([3, 7], ndcg=0.2)), retrieved("no", **at([7], ndcg=0.0))]
    more += [retrieved("random", "data/msmarco/test.json", **at([7, 50], ndcg=0.1))]
    header, *lines = (line.split(",") for line in to_csv(leaderboard(more)).splitlines())
    assert header[:3] == ["retriever", "MMLU", "PopQA"]
    assert header[9:11] == ["nq/test.json ndcg@7", "msmarco/test.json ndcg@7"]
    of = {line[0]: line for line in lines}
    assert [of[f"{name} · lm"][9][:5] for name in ("no", "random", "bm25")] == ["0.007", "", "0.207"]
    assert of["random · lm"][10][:5] == "0.107"


def test_own_data_have_columns_of_their_own_name():
    """The released data keep theirs; rows are counted but for those left out, and empty outputs told."""

    def on(task, eval_data, retriever="no", **facts):
        arguments = {"eval_data": eval_data, **facts.pop("arguments", {})}
        values = facts.pop("metrics", {"exact_match": 0.5})
        return {**record(task, retriever, "2026", **values), "arguments": arguments, **facts}

    own = [
        on("qa", "my/squad/test.json", rows=8, skipped=1, empty=7),
        on("qa", "my/squad/test.json", "bm25", rows=8, skipped=0, empty=0),
        on("mmlu", "my/squad/test.json", metrics={"accuracy": 0.25}, rows=5),
        on("popqa", "my/squad/test.json", metrics={"accuracy": 0.75}),
    ]
    board = leaderboard(own)
    header = to_csv(board).splitlines()[0].split(",")
    columns = ["mmlu accuracy (n=5)", "popqa accuracy", "EM (n=7 to 8)"]
    assert header == ["retriever", *(f"squad/test.json {column}" for column in columns)]
    assert board.values() == {"no · lm": [0.25, 0.75, 0.5], "bm25 · lm": [None, None, 0.5]}
    assert [note for note in board.notes if "empty" in note] == [
        "qa squad/test.json: 7 of 8 outputs of no · lm are empty and count as wrong"
    ]
    released = [on("qa", path, rows=3610) for path in ("llm-embedder:qa/nq/test.json", "/data/x/qa/nq/test.json")]
    few = on("icl", "llm-embedder:icl/icl/test.json", metrics={"average": 0.5}, arguments={"task_names": ["boolq"]})
    header = to_csv(leaderboard([*own, *released, few])).splitlines()[0].split(",")
    assert header[1:3] == ["squad/test.json mmlu accuracy (n=5)", "squad/test.json popqa accuracy"]
    assert header[3:6] == ["squad/test.json EM (n=7 to 8)", "nq/test.json EM (n=3610)", "icl/test.json boolq average"]
    assert header[6:] == []
    header = to_csv(leaderboard([*released, *own[2:3]])).splitlines()[0].split(",")
    assert header[1:4] == ["squad/test.json accuracy (n=5)", "PopQA", "NQ EM (n=3610)"]
    assert header[4:] == ["ICL avg", "MSC ppl", "LRLM ppl", "ToolBench ndcg@5", "QReCC ndcg@3"]


def test_several_language_models_have_rows_of_their_own():
    board = leaderboard([*RECORDS, record("mmlu", "no", "2026-01-03", "b/other", accuracy=0.1)])
    assert list(board.results) == ["no · b/other", "no · lm", "where/model · b/other", "where/model · lm"]
    # Retrieval metrics depend on no LM.
    assert board.results["where/model · b/other"]["tool"] == board.results["where/model · lm"]["tool"]


def test_files_are_read_at_any_depth_and_the_report_is_written(tmp_path, capsys):
    for number, own in enumerate(RECORDS):
        facts = {name: value for name, value in own.items() if name not in ("metrics", "time")}
        log_result(str(tmp_path / f"{own['task']}/{number}.log"), own["metrics"], {"seed": 1}, **facts)
    (tmp_path / "other.jsonl").write_text('{"query": "no result"}\n{"half of a li')
    assert len(read_results(str(tmp_path))) == len(RECORDS)
    main([str(tmp_path)])
    assert "ToolBench ndcg@5" in capsys.readouterr().out
    assert (tmp_path / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "leaderboard.md").read_text().count("\n") == 4
    assert (tmp_path / "leaderboard.csv").is_file()


def test_comparison_by_example(tmp_path, capsys):
    rng = np.random.default_rng(0)
    first = {str(n): float(rng.random() < 0.4) for n in range(200)}
    second = {key: max(value, float(rng.random() < 0.2)) for key, value in first.items()}
    found = compare(first, {**second, "else": 1.0})
    wins = sum(second[key] > first[key] for key in first)
    assert (found["examples"], found["wins"], found["losses"], found["ties"]) == (200, wins, 0, 200 - wins)
    assert found["difference"] == pytest.approx(wins / 200)
    # The normal approximation of the same interval.
    error = 1.96 * np.std([second[key] - first[key] for key in first]) / np.sqrt(200)
    assert found["low"] == pytest.approx(found["difference"] - error, abs=0.01)
    assert found["high"] == pytest.approx(found["difference"] + error, abs=0.01)
    paths = []
    for name, values in (("a", first), ("b", second)):
        rows = [{"query_id": key, "values": {"f1": 0.0, "accuracy": value}} for key, value in values.items()]
        paths.append(str(write_rows(tmp_path / f"{name}.json", rows)))
    main(["--compare", *paths, "--metric", "accuracy"])
    shown = capsys.readouterr().out
    assert f"second wins {wins}, loses 0, ties {200 - wins}" in shown
    assert f"95 % interval {found['low']:+.4f} to {found['high']:+.4f}" in shown


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match="no result of an evaluation below"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="is no folder"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="give either a folder"):
        main([])
    path = str(write_rows(tmp_path / "a.json", [{"query_id": 1, "values": {"f1": 1.0}}]))
    other = str(write_rows(tmp_path / "b.json", [{"query_id": 2, "values": {"f1": 1.0}}]))
    with pytest.raises(UserError, match="no query_id in common"):
        main(["--compare", path, other])
    with pytest.raises(UserError, match="has f1"):
        main(["--compare", path, other, "--metric", "bleu"])
    (tmp_path / "b.json").write_text(json.dumps({"query": "x"}) + "\n")
    with pytest.raises(UserError, match=r"b\.json:1 is no line"):
        main(["--compare", path, other])


def test_of_likelihoods_less_wins_and_rows_have_their_own_metrics(tmp_path, capsys):
    first = [{"query_id": n, "values": {"nll": 5.0, "tokens": 3.0}} for n in range(4)]
    second = [{"query_id": n, "values": {"nll": 4.0 + n, "tokens": 3.0}} for n in range(4)]
    paths = [str(write_rows(tmp_path / f"{name}.json", rows)) for name, rows in (("a", first), ("b", second))]
    main(["--compare", *paths])
    shown = capsys.readouterr().out
    assert "nll (less is better): 5.0000 → 5.5000" in shown
    assert "second wins 1, loses 2, ties 1" in shown
    assert "difference +0.5000, too few examples for an interval: 20 or more tell a difference from chance" in shown
    first = [{"query_id": 1, "values": {"accuracy": 0.0}}, {"query_id": 2, "values": {"correct": 1.0, "chosen": 0.0}}]
    second = [{"query_id": 1, "values": {"accuracy": 1.0}}, {"query_id": 2, "values": {"correct": 1.0, "chosen": 1.0}}]
    paths = [str(write_rows(tmp_path / f"{name}.json", rows)) for name, rows in (("a", first), ("b", second))]
    main(["--compare", *paths])
    shown = capsys.readouterr().out
    assert "accuracy, correct: 0.5000 → 1.0000 on 2 examples" in shown
    assert "second wins 1, loses 0, ties 1" in shown


def test_models_and_data_of_like_names_are_told_apart():
    records = [
        record("lrlm", f"outputs/{run}/checkpoint-10/encoder", "2026", perplexity=float(number))
        | {"arguments": {"eval_data": f"lrlm/{data}/test.json"}}
        for number, (run, data) in enumerate([("a", "books3"), ("b", "books3"), ("a", "arxiv")])
    ]
    lines = to_csv(leaderboard(records)).splitlines()
    assert "books3/test.json ppl,arxiv/test.json ppl" in lines[0]
    assert lines[1:] == ["a/checkpoint-10/encoder · lm,0.0,2.0", "b/checkpoint-10/encoder · lm,1.0,"]


def test_results_that_do_not_compare_are_noted():
    records = [
        record("lrlm", "no", "2026-01-01", perplexity=40.0, tokens=128) | {"arguments": {"target_length": 64}},
        record("lrlm", "bm25", "2026-01-01", perplexity=30.0, tokens=256) | {"arguments": {"target_length": 128}},
        record("mmlu", "no", "2026-01-01", accuracy=0.3) | {"rows": 4},
        record("mmlu", "bm25", "2026-01-01", accuracy=0.3) | {"rows": 4},
    ]
    notes = [
        "lrlm: results differ in tokens (128, 256) and do not compare",
        "lrlm: results differ in target_length (128, 64) and do not compare",
    ]
    board = leaderboard(records)
    assert list(board.notes) == notes
    assert to_text(board).splitlines()[-2:] == [f"note: {note}" for note in notes]
    assert to_markdown(board).splitlines()[-2:] == [f"- {note}" for note in notes]


def test_added_tasks_have_a_column_and_names_of_runs_a_row():
    first = record("claims", "bm25", "2026-01-01", f1=0.5, other=1.0)
    second = record("claims", "bm25", "2026-01-02", f1=0.25) | {"arguments": {"save_name": "longer"}}
    lines = to_csv(leaderboard([first, second])).splitlines()
    assert lines[0].endswith(",claims f1")
    assert [line.split(",")[0] + line.split(",")[-1] for line in lines[1:]] == [
        "bm25 · lm0.5",
        "bm25 (longer) · lm0.25",
    ]


def test_lines_that_are_no_results_are_counted(tmp_path, caplog):
    good = record("mmlu", "no", "2026-01-01", accuracy=0.3)
    bad = [{**good, "metrics": {"accuracy": value}} for value in ("x", float("nan"), None)]
    path = write_rows(tmp_path / "a.jsonl", [*bad, {"metrics": {}}, good])
    path.write_text(path.read_text() + "[1]\n" + "[" * 20_000 + '\n{"half')
    assert [own["metrics"] for own in read_results(str(tmp_path))] == [{"accuracy": 0.3}]
    assert f"6 lines are no results and left out; the first is {path}:1" in caplog.text


def test_outputs_of_different_evaluations_are_not_compared(tmp_path, caplog):
    def outputs(name, *rows):
        written = [{"query_id": key, "gold": gold, "values": {"f1": value}} for key, gold, value in rows]
        return str(write_rows(tmp_path / name, written))

    one = outputs("a.json", (1, "x", 0.0), (2, "y", 1.0))
    with pytest.raises(UserError, match=r"of 1 rows in common the right answers differ \(query_id 2 \(1\)\)"):
        main(["--compare", one, outputs("b.json", (1, "x", 1.0), (2, "z", 1.0))])
    main(["--compare", one, outputs("c.json", (1, "x", 1.0), (3, "z", 1.0))])
    assert "2 rows have a value in one of the files only" in caplog.text
    with pytest.raises(UserError, match="has no values"):
        main(["--compare", one, outputs("d.json")])


ODD = [10**400, [0.5], None, "0.5", {"a": 1}, True]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
def test_odd_values_are_left_out(tmp_path, odd):
    """Of a log as of outputs: one line says how many, or which."""
    good = record("mmlu", "no", "2026", accuracy=0.5)
    parts = {"metrics": odd} if not isinstance(odd, dict) else {"metrics": {"accuracy": odd}}
    write_rows(tmp_path / "a.jsonl", [good, {**good, "metrics": {"accuracy": odd}}, {**good, **parts}])
    assert read_results(str(tmp_path)) == [{**good, "arguments": {}}]
    path = write_rows(tmp_path / "out.json", [{"query_id": 1, "values": {"accuracy": odd}}])
    with pytest.raises(UserError, match=r"out\.json:1 is no line of an evaluation's outputs"):
        main(["--compare", str(path), str(path)])


@pytest.mark.parametrize(
    "part", [{"model": ["a"]}, {"arguments": [1]}, {"arguments": {"task_names": [1]}}, {"arguments": {"task_names": 5}}]
)
def test_results_of_odd_parts_are_left_out(tmp_path, part):
    good = record("mmlu", "no", "2026", accuracy=0.5)
    write_rows(tmp_path / "a.jsonl", [good, {**good, **part}])
    assert len(leaderboard(read_results(str(tmp_path))).results) == 1


def test_names_that_look_like_mathematics_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    odd = r"a/$\frac{$"
    rows = [record(odd, odd, "2026", accuracy=0.5), record("tool", odd, "2026", **{"ndcg@1": 0.1, "ndcg@5": 0.2})]
    write_rows(tmp_path / "a.jsonl", rows)
    main([str(tmp_path)])
    assert (tmp_path / "leaderboard.png").stat().st_size > 1000
    draw({odd: [{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}]}, str(tmp_path / "training.png"))
