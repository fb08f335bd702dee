"""python -m src.validate: every problem with its line, and statistics counted by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.retrieval.data.rows import check_train_row
from src.utils.cli import run as run_entry
from src.validate import __main__ as validate
from src.validate.report import Repeats
from tests.helpers import ROOT, environment, run, write_rows


@pytest.fixture
def check(capsys, tmp_path):
    """Run the command in this process; exit code, printed lines, report."""

    def call(*flags) -> tuple[int, str, dict]:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        with pytest.raises(SystemExit) as stop:
            run_entry(lambda: validate.main([*map(str, flags), "--json", str(report)]))
        printed = capsys.readouterr()
        found = json.loads(report.read_text()) if report.exists() else {}
        return int(stop.value.code or 0), printed.out + printed.err, found

    return call


def messages(report: dict, path, kind: str = "warnings") -> dict[str, list[int]]:
    return {own["message"]: own["lines"] for own in report["files"][str(path)][kind]}


def test_tasks_of_the_user(check, tmp_path):
    config = tmp_path / "tasks.yaml"
    config.write_text("claims: {lm_prompt: qa}\nbare: {}\n")
    rows = [
        {"query": f"q{n}", "pos": ["a"], "neg": ["b"], "answers": ["c"], "task": task}
        for n, task in enumerate(("bare", "", "other"))
    ]
    path = write_rows(tmp_path / "claims" / "rows.json", rows)
    unknown = "task 'other' is unknown: choose from qa, convsearch, chat, lrlm, icl, tool, claims, bare"
    code, _, report = check(path, "--task_config", config)
    assert (code, messages(report, path)) == (0, {unknown: [3]})
    assert report["files"][str(path)]["tasks"] == {"bare": 1, "claims": 1, "other": 1}
    code, _, report = check(path, "--task_config", config, "--kind", "lm")
    found = messages(report, path, "errors")
    assert code == 1
    assert [(message.partition(":")[0], lines) for message, lines in found.items()] == [
        ("--task_config gives 'bare' no lm_prompt", [1]),
        ("unknown task 'other'", [3]),
    ]
    assert check(path, "--task_config", config, "--task", "bare")[0] == 0
    code, printed, _ = check(path, "--task", "bare")
    assert (code, printed.count("--task 'bare' is unknown: choose from qa, ")) == (2, 1)


def test_statistics_of_training_rows(check, tmp_path):
    rows = [
        {"query": "one two", "pos": ["a b c"], "neg": ["d", "ee ff"], "teacher_scores": [1, 0, -1.5], "task": "qa"},
        {"query": "three", "pos": ["g"], "neg": [], "teacher_scores": [2]},
        {"query": "four five six", "pos": [], "neg": ["h", "i"], "teacher_scores": [0.25, 0.5]},
        {"query": "seven", "pos": ["j"], "neg": ["k"]},
        {"query": "eight", "pos": [], "neg": ["l"]},
    ]
    path = write_rows(tmp_path / "tool" / "train.json", rows)
    code, printed, report = check(path)
    assert code == 0
    assert f"{path}: checked as train (guessed from its first row" in printed
    own = report["files"][str(path)]
    assert (own["kind"], own["rows"], own["tasks"]) == ("train", 5, {"qa": 1, "tool": 4})
    assert own["lengths"]["query characters"] == {"count": 5, "min": 5, "median": 5, "p95": 13, "max": 13}
    assert own["lengths"]["query words"] == {"count": 5, "min": 1, "median": 1, "p95": 3, "max": 3}
    assert own["lengths"]["key characters"] == {"count": 9, "min": 1, "median": 1, "p95": 5, "max": 5}
    assert own["lengths"]["negatives a row"] == {"count": 5, "min": 0, "median": 1, "p95": 2, "max": 2}
    assert own["score_spread"] == {"count": 3, "min": 0, "median": 0.25, "p95": 2.5, "max": 2.5}
    # first: row 2 (no negative), 3 and 5 (no positive); teacher: 2, and 4 and 5 (no scores); teacher-pos: all these.
    assert own["untrainable_rows"] == {"first": 3, "teacher": 3, "teacher-pos": 4}
    assert messages(report, path) == {"no --select_positive can train on the row: it lacks candidates": [2, 5]}
    assert "rows that cannot be trained on, by --select_positive: first 3, teacher 3, teacher-pos 4" in printed


def test_warnings_name_their_lines(check, tmp_path):
    rows = [
        {"query": "Where is it?", "pos": ["here"], "neg": ["there"]},
        {"query": " ", "pos": ["x"], "neg": ["y", ""]},
        {"query": "other", "pos": ["Same, text"], "neg": ["same text!", "z"]},
        {"query": "where is IT", "pos": ["x"], "neg": ["y", "Y."], "task": "cooking"},
        {"query": "where is it", "pos": ["x"], "neg": ["y"]},
    ]
    path = write_rows(tmp_path / "train.json", rows)
    code, printed, report = check(path, "--shown", 1)
    assert code == 0
    assert messages(report, path) == {
        "the query is empty": [2],
        "a key is empty": [2],
        "a positive is among the negatives": [3],
        "a key comes twice": [4],
        "task 'cooking' is unknown: choose from qa, convsearch, chat, lrlm, icl, tool": [4],
        "the query repeats that of an earlier row": [4, 5],
    }
    assert report["files"][str(path)]["first_lines_of_repeats"] == {"4": 1, "5": 1}
    assert f"{path}:4: warning: the query repeats that of an earlier row (line 1)" in printed
    assert f"{path}: warning: the query repeats that of an earlier row (+1 more)" in printed
    assert "files: 1, errors: 0, warnings: 7" in printed


def test_names_of_fields_that_may_be_misspelt(check, tmp_path):
    row = {"query": "q", "pos": ["a"], "neg": ["b"]}
    odd = [{"teacher_score": [1, 0]}, {"answer": ["c"]}, {"title": "t"}, {"teacher_scores_b": [1, 0]}]
    odd += [{"answer": ["c"], "answers": ["c"]}, {"doc_index": 1, "contents": "c"}, {"Task_": "qa"}]
    rows = [{**row, "query": f"q{n}", **more} for n, more in enumerate(odd)]
    rows.append({"query": "last", "pos": ["a"], "negs": ["b"], "history": None})
    path = write_rows(tmp_path / "qa" / "rows.json", rows)
    code, _, report = check(path)
    assert code == 0
    assert messages(report, path) == {
        "field 'teacher_score' is not read: is 'teacher_scores' meant?": [1],
        "field 'answer' is not read: is 'answers' meant?": [2],
        "field 'contents' is not read: is 'context' meant?": [6],
        "field 'Task_' is not read: is 'task' meant?": [7],
        "field 'negs' is not read: is 'neg' meant?": [8],
        "no --select_positive can train on the row: it lacks candidates": [8],
    }


def test_names_of_scores_and_tokens_that_may_be_misspelt(check, tmp_path):
    row = {"query": "q", "pos": ["a"], "neg": ["b"]}
    rows = [{**row, "query": "r", "answer_s": [1, 0]}, {**row, "answer": ["c"]}, {**row, "llm_score": [1, 0]}]
    path = write_rows(tmp_path / "qa" / "rows.json", rows)
    _, _, report = check(path, "--teacher_score_field", "answer_s")
    assert "field 'answer_s' is not read: is 'answers' meant?" not in messages(report, path)
    _, _, report = check(path, "--teacher_score_field", "llm_scores")
    assert messages(report, path)["field 'llm_score' is not read: is 'llm_scores' meant?"] == [3]
    tokens = write_rows(
        tmp_path / "lm.json", [{"query": "q", "history": ["a"], "answers": ["c"], "score_input": [[1]]}]
    )
    _, _, report = check(tokens, "--kind", "lm", "--task", "lrlm")
    assert messages(report, tokens)["field 'score_input' is not read: is 'score_inputs' meant?"] == [1]


def test_all_errors_are_shown(check, tmp_path):
    """More than the ten that training shows, each with what the row's check says; blank lines hold no row."""
    path = tmp_path / "train.json"
    good = {"query": "q", "pos": ["p"], "neg": ["n"]}
    bad = [{"query": number, "pos": ["p"], "neg": ["n"]} for number in range(25)]
    lines = [json.dumps(good), "", *map(json.dumps, bad), "{broken", "[1]"]
    path.write_text("\n".join(lines) + "\n")
    code, printed, report = check(path)
    assert code == 1
    ((problem,), _) = check_train_row(bad[0])
    for line in range(3, 28):
        assert f"{path}:{line}: error: {problem}\n" in printed
    assert f"{path}:28: error: not valid JSON" in printed
    assert f"{path}:29: error: a row must be a JSON object, found list" in printed
    assert messages(report, path, "errors")[problem] == list(range(3, 28))
    assert report["errors"] == 27
    assert report["files"][str(path)]["rows"] == 28


def test_ids_of_a_corpus(check, tmp_path):
    """Ids are compared as text, letter by letter; a corpus without any is as good."""
    rows = [
        {"text": f"t{n}"} | ({"_id": name} if name is not None else {})
        for n, name in enumerate((7, "a", "7", "A", None))
    ]
    path = write_rows(tmp_path / "corpus.json", rows)
    code, _, report = check(path, "--key_template", "{text}")
    assert code == 0
    assert messages(report, path) == {
        "the id is that of an earlier row: no label can go by it": [3],
        "the row has no id, and other rows have one": [5],
    }
    path = write_rows(tmp_path / "corpus.json", ({"text": row["text"]} for row in rows))
    assert messages(check(path, "--key_template", "{text}")[2], path) == {}


def test_corpus(check, tmp_path):
    rows = [{"title": "T", "text": "x"}, {"title": "", "text": None}, {"text": "y"}, {"title": "t", "text": "X"}]
    path = write_rows(tmp_path / "corpus.json", rows)
    code, printed, report = check(path)
    assert code == 1
    assert "checked as corpus (guessed from its first row" in printed
    assert f"{path}:3: error: column 'title' of --key_template is missing (this row has: text)" in printed
    assert messages(report, path) == {
        "the passage is empty": [2],
        "the passage repeats that of an earlier row": [4],
    }
    assert report["files"][str(path)]["lengths"]["passage characters"]["count"] == 3
    code, _, report = check(path, "--key_template", "{text}")
    assert code == 0
    assert messages(report, path)["the passage is empty"] == [2]


def test_kinds_are_told_by_the_first_row(check, tmp_path):
    train = {"query": "q", "pos": ["p"], "neg": ["n"]}
    tokens = {f"{name}_inputs": [1] for name in ("context", "query", "answer")} | {"score_inputs": [[1]]}
    rows = {
        "train": train,
        "chat": {"query": "q", "history": ["h"]},
        "eval": {"query": "q", "pos_index": [0]},
        "corpus": {"contents": "c"},
        "lm": {"query": "q", "pos": ["p"], "neg": [], "task": "lrlm", **tokens},
    }
    wanted = {name: "train" if name == "chat" else name for name in rows}
    files = {name: write_rows(tmp_path / f"{name}.json", [row]) for name, row in rows.items()}
    _, _, report = check(*files.values(), "--key_template", "{contents}")
    assert {name: report["files"][str(path)]["kind"] for name, path in files.items()} == wanted
    assert not report["errors"]


def test_rows_for_an_lm_need_answers_and_a_task(check, tmp_path):
    rows = [{"query": "q", "pos": ["p"], "neg": [], "answers": ["a"]}, {"query": "q", "pos": ["p"], "neg": []}]
    path = write_rows(tmp_path / "rows.json", rows)
    assert check(path)[0] == 0
    code, printed, _ = check(path, "--kind", "lm")
    assert code == 1
    assert f"{path}:1: error: neither row nor path names a task (see --task)" in printed
    assert f"{path}:2: error: field 'answers' is missing or empty" in printed
    assert messages(check(path, "--kind", "lm", "--task", "qa")[2], path, "errors").keys() == {
        "field 'answers' is missing or empty: the LM is scored by how likely it finds an answer"
    }


def test_scores_of_another_field(check, tmp_path):
    row = {"query": "q", "pos": ["p"], "neg": ["n"], "reranker": [1.0]}
    path = write_rows(tmp_path / "train.json", [row])
    assert check(path)[0] == 0
    code, printed, _ = check(path, "--teacher_score_field", "reranker")
    assert code == 1
    assert "field 'reranker' has 1 numbers for 1 positives + 1 negatives" in printed


def test_files_are_found_as_in_training(check, tmp_path):
    row = {"query": "q", "pos": ["p"], "neg": ["n"]}
    for name in ("a.json", "b.json"):
        write_rows(tmp_path / "root" / name, [row])
    code, _, report = check("llm-embedder:*.json", tmp_path / "root/a.json", "--data_root", tmp_path / "root")
    assert code == 0
    assert list(report["files"]) == [str(tmp_path / "root" / name) for name in ("a.json", "b.json")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none.json"], "error: FILE: no such file: none.json"),
        (["/dev/null"], "FILE: /dev/null is no regular file"),
        (["*.nothing"], "no file matches *.nothing"),
        (["{rows}", "--key_template", "text"], "names no column"),
        (["{rows}", "--kind", "training"], "invalid choice: 'training'"),
        ([], "the following arguments are required: FILE"),
    ],
)
def test_usage(check, tmp_path, flags, message):
    rows = write_rows(tmp_path / "rows.json", [{"query": "q"}])
    code, printed, _ = check(*(flag.replace("{rows}", str(rows)) if flag == "{rows}" else flag for flag in flags))
    assert code == 2
    assert message in printed


def test_an_empty_file_is_an_error(check, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n\n")
    code, printed, _ = check(path)
    assert code == 1
    assert f"{path}: error: the file is empty" in printed


@given(st.lists(st.sampled_from(["a", "b", "A.", "c d", "c  d", "e"])))
def test_repeats_are_those_of_a_dictionary(texts):
    repeats, first, wanted = Repeats(), {}, []
    for line, text in enumerate(texts, 1):
        repeats.add(text, line)
        words = " ".join(text.replace(".", "").lower().split())
        if words in first:
            wanted.append((line, first[words]))
        first.setdefault(words, line)
    assert repeats.find() == wanted


def test_as_a_command(tmp_path):
    path = write_rows(tmp_path / "rows.json", [{"query": 1}])
    done = run(["-m", "src.validate", path])
    assert done.returncode == 1
    assert f"{path}:1: error: field 'query' must be a string, found int" in done.stdout


def test_a_reader_that_has_enough_ends_the_command_quietly(tmp_path):
    """As ``| head`` does."""
    path = write_rows(tmp_path / "rows.json", [{"query": number} for number in range(20_000)])
    command = [sys.executable, "-m", "src.validate", str(path), "--kind", "train"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "checked as train" in process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(60) == 128 + signal.SIGPIPE


def test_tables_are_checked_row_by_row(check, tmp_path):
    rows = [{"anchor": "a", "positive": "p"}, {"anchor": None, "positive": "p"}, {"anchor": "a", "positive": "q"}]
    path = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    code, printed, report = check(path)
    assert code == 1
    assert f"{path}: checked as train" in printed
    assert f"{path}:row 3: warning: the query repeats that of an earlier row (row 1)" in printed
    assert report["files"][str(path)]["errors"][0]["lines"] == [2]
    assert report["files"][str(path)]["untrainable_rows"]["first"] == 0
