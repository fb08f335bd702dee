"""From files to training examples: filters, tasks, settings, instructions, drawing of negatives."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from torch.utils.data import DataLoader

from src.retrieval.data.tasks import instruction_for, no_instruction, task_from_path
from src.retrieval.training.answers import answered
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.collator import batch_names, positive_counts
from src.retrieval.training.dataset import SourceSettings, TrainDataset, TrainExample, load_train_sources
from src.retrieval.training.losses import LossConfig
from src.retrieval.training.select import SelectionPolicy
from src.utils.errors import UserError
from tests.helpers import TASKS, write_rows

# ------------------------------------------------------------------------------------------------ sources and filters


def source_settings(
    positive: str = "first", negative: str = "random", group_size: int = 3, loss: LossConfig | None = None, **filters
) -> SourceSettings:
    return SourceSettings(SelectionPolicy(positive, negative, group_size), loss or LossConfig(), **filters)


def load(files, chosen: SourceSettings | None = None, task=None, seed=0, settings_of=None, instruction_of=None):
    """Sources of `files` with the same settings for every task, no instruction and no cache unless given."""
    return load_train_sources(
        [str(file) for file in files],
        settings_of or (lambda task: chosen or source_settings()),
        instruction_of or no_instruction,
        task,
        seed,
        None,
    )


def row_of(query: str, negatives: int = 2, **more) -> dict:
    return {"query": query, "pos": ["p"], "neg": [f"n{i}" for i in range(negatives)], **more}


def queries_in_use(source) -> list[str]:
    return [source.rows[int(row)]["query"] for row in source.kept]


def log_of(caplog, files, chosen) -> tuple[list, str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "src.retrieval.training.dataset"):
        sources = load(files, chosen)
    return sources, "\n".join(record.getMessage() for record in caplog.records)


SCORED = [
    row_of("spread 0.3, best 1.0", teacher_scores=[1.0, 0.9, 0.7]),
    row_of("spread 0.05, best 1.0", teacher_scores=[1.0, 0.98, 0.95]),
    row_of("spread 0.5, best -2", teacher_scores=[-2.5, -2, -2.25]),
    row_of("spread 0, best 5", teacher_scores=[5, 5, 5]),
    row_of("no scores"),
]


@pytest.mark.parametrize(
    ("filters", "dropped", "counts"),
    [
        ({}, [], []),
        ({"teacher_scores_margin": 0.1}, [1, 3], ["2 dropped: teacher_scores_margin"]),
        ({"teacher_scores_margin": 0.25}, [1, 3], ["2 dropped: teacher_scores_margin"]),
        ({"teacher_scores_margin": 0.5}, [0, 1, 3], ["3 dropped: teacher_scores_margin"]),  # 0.5 is not smaller
        ({"teacher_scores_margin": 0.0}, [], []),
        ({"teacher_scores_min": 0.0}, [2], ["1 dropped: teacher_scores_min"]),
        ({"teacher_scores_min": 1.0}, [2], ["1 dropped: teacher_scores_min"]),
        ({"teacher_scores_min": 1.5}, [0, 1, 2], ["3 dropped: teacher_scores_min"]),
        ({"teacher_scores_min": -3}, [], []),
        (
            {"teacher_scores_margin": 0.1, "teacher_scores_min": 0.0},
            [1, 2, 3],
            ["2 dropped: teacher_scores_margin", "1 dropped: teacher_scores_min"],
        ),
    ],
)
def test_filters_by_teacher_scores(tmp_path, caplog, filters, dropped, counts):
    """Spread is the highest minus the lowest score; rows without scores stay."""
    file = write_rows(tmp_path / "train.json", SCORED)
    sources, log = log_of(caplog, [file], source_settings(**filters))
    assert queries_in_use(sources[0]) == [row["query"] for i, row in enumerate(SCORED) if i not in dropped]
    assert f"{5 - len(dropped)} of 5 rows in use" in log
    assert log.count("dropped") == len(counts)
    assert all(count in log for count in counts)


def test_scores_of_another_field_are_taken(tmp_path):
    row = row_of("q", negatives=2, teacher_scores=[0.0, 5.0, 1.0], reranker=[0.0, 1.0, 5.0])
    path = write_rows(tmp_path / "rows.json", [row])
    best = source_settings("teacher", "first")
    for field, wanted in (("teacher_scores", [5.0, 0.0, 1.0]), ("reranker", [5.0, 0.0, 1.0])):
        sources = load_train_sources([str(path)], lambda _: best, no_instruction, None, 0, None, field)
        example = TrainDataset(sources, 0)[0, 0]
        scores = dict(zip([*row["pos"], *row["neg"]], row[field], strict=True))
        assert example.scores == [scores[key] for key in example.keys]
        assert example.scores[0] == max(wanted)
    write_rows(path, [{**row, "reranker": [1.0]}])
    with pytest.raises(UserError, match="field 'reranker' has 1 numbers for 1 positives"):
        load_train_sources([str(path)], lambda _: best, no_instruction, None, 0, None, "reranker")


def test_a_named_field_of_scores_is_no_column_to_move(tmp_path):
    row = {"question": "q", "pos": ["p"], "neg": ["n", "m"], "scores": [0.5, 2.0, 1.0]}
    path = write_rows(tmp_path / "rows.json", [row])
    settings = source_settings("teacher", "first")
    (source,) = load_train_sources([str(path)], lambda _: settings, no_instruction, None, 0, None, "scores")
    assert source.scored == 1
    example = TrainDataset([source], 0)[0, 0]
    assert dict(zip(example.keys, example.scores, strict=True)).items() <= {"p": 0.5, "n": 2.0, "m": 1.0}.items()
    assert example.keys[0] == "n"


def test_rows_without_negatives_are_dropped_and_counted(tmp_path, caplog):
    file = write_rows(tmp_path / "train.json", [row_of("a"), row_of("b", 0), row_of("c", 1), row_of("d", 0)])
    sources, log = log_of(caplog, [file], source_settings())
    assert queries_in_use(sources[0]) == ["a", "c"]
    assert "2 of 4 rows in use (2 dropped: no negative" in log
    assert len(TrainDataset(sources, 0)) == 2


def test_rows_that_a_policy_cannot_use_are_dropped_and_counted(tmp_path, caplog):
    """`teacher` needs scores, and a negative beside the best candidate; `first` needs a positive."""
    history = {"query": "chat", "history": ["h0", "h1"], "teacher_scores": [1, 2]}
    one_negative = row_of("negative wins", 1, teacher_scores=[0, 1])
    file = write_rows(tmp_path / "train.json", [row_of("unscored"), SCORED[0], history, one_negative])
    sources, log = log_of(caplog, [file], source_settings("teacher"))
    assert queries_in_use(sources[0]) == ["spread 0.3, best 1.0", "chat"]
    assert "1 dropped: no teacher_scores" in log
    assert "1 dropped: no negative" in log
    sources, log = log_of(caplog, [file], source_settings("first"))
    assert queries_in_use(sources[0]) == ["unscored", "spread 0.3, best 1.0", "negative wins"]
    assert "1 dropped: no positive" in log


def test_a_row_with_two_faults_is_counted_once(tmp_path, caplog):
    file = write_rows(tmp_path / "train.json", [row_of("a", 0, teacher_scores=[1]), row_of("b")])
    sources, log = log_of(caplog, [file], source_settings(teacher_scores_margin=0.1, teacher_scores_min=2))
    assert len(sources[0]) == 1
    assert log.count("dropped") == 1


def test_max_sample_num(tmp_path, caplog):
    """Drawn from the rows that pass the filters, by seed; the dropped rows are counted."""
    rows = [row_of(f"q{i}", 0 if i % 2 else 2) for i in range(40)]
    file = write_rows(tmp_path / "train.json", rows)
    sources, log = log_of(caplog, [file], source_settings(max_sample_num=8))
    drawn = queries_in_use(sources[0])
    assert len(set(drawn)) == 8
    assert set(drawn) <= {f"q{i}" for i in range(0, 40, 2)}
    assert "8 of 40 rows in use (20 dropped: no negative; 12 dropped: max_sample_num)" in log
    assert queries_in_use(load([file], source_settings(max_sample_num=8))[0]) == drawn
    assert queries_in_use(load([file], source_settings(max_sample_num=8), seed=1)[0]) != drawn
    assert len(load([file], source_settings(max_sample_num=20))[0]) == 20
    assert len(load([file], source_settings(max_sample_num=500))[0]) == 20


def test_max_sample_num_is_a_fair_draw(tmp_path):
    """5 of 10 rows by 400 seeds: each is expected 200 times, with a standard deviation of 10."""
    file = write_rows(tmp_path / "train.json", [row_of(f"q{i}") for i in range(10)])
    counts = Counter(
        query
        for seed in range(400)
        for query in queries_in_use(load([file], source_settings(max_sample_num=5), seed=seed)[0])
    )
    assert all(abs(counts[f"q{i}"] - 200) < 50 for i in range(10))


def test_max_sample_num_holds_for_each_file(tmp_path):
    files = [write_rows(tmp_path / f"{n}.json", [row_of(f"{n}{i}") for i in range(10)]) for n in "ab"]
    sources = load(files, source_settings(max_sample_num=4))
    assert TrainDataset(sources, 0).sizes == [4, 4]


def test_nothing_left_is_an_error(tmp_path):
    file = write_rows(tmp_path / "train.json", [row_of("a", 0), row_of("b", 0)])
    with pytest.raises(UserError, match=r"train\.json.*2 dropped: no negative"):
        load([file])


def test_neither_loss_active_is_an_error(tmp_path):
    """Contrastive weight 0 and no scores to distil from; with scores in one file, or a weight, training starts."""
    plain = write_rows(tmp_path / "plain.json", [row_of("a")])
    scored = write_rows(tmp_path / "scored.json", SCORED)
    distil = source_settings(loss=LossConfig(contrastive_weight=0, distill_weight=1))
    with pytest.raises(UserError, match="teacher_scores"):
        load([plain], distil)
    assert len(load([plain, scored], distil)) == 2
    assert len(load([plain], source_settings(loss=LossConfig(0.2, 1)))) == 1
    assert len(load([plain], source_settings(loss=LossConfig(0.2, 0)))) == 1


def test_file_named_twice_weighs_twice(tmp_path):
    """Two sources of the same rows; the second copy of a row draws negatives of its own."""
    a = write_rows(tmp_path / "a.json", [row_of(f"a{i}", 30) for i in range(3)])
    b = write_rows(tmp_path / "b.json", [row_of("b", 30)])
    dataset = TrainDataset(load([a, b, a], source_settings(group_size=6)), 0)
    assert dataset.sizes == [3, 1, 3]
    assert len(dataset) == 7
    examples = [dataset[0, i] for i in range(7)]
    assert [example.query for example in examples] == ["a0", "a1", "a2", "b", "a0", "a1", "a2"]
    assert [example.source for example in examples] == [0, 0, 0, 1, 2, 2, 2]
    assert examples[0].keys != examples[4].keys


# ------------------------------------------------------------------------------------------------- tasks and settings


def tasks_seen(files, task=None) -> list:
    """For which task the settings of each file are asked."""
    seen = []

    def settings_of(name):
        seen.append(name)
        return source_settings()

    load(files, task=task, settings_of=settings_of)
    return seen


@pytest.mark.parametrize(
    ("folder", "in_row", "flag", "task"),
    [
        ("data", "icl", None, "icl"),
        ("data", "icl", "tool", "icl"),  # the row's own word first
        ("qa", "icl", "tool", "icl"),
        ("qa", None, "tool", "tool"),  # then the flag
        ("qa", None, None, "qa"),  # then the folder
        ("chat/small", None, None, "chat"),
        ("conversation", None, None, "convsearch"),
        ("convsearch", None, None, "convsearch"),
        ("lrlm/arxiv", None, None, "lrlm"),
        ("icl", None, None, "icl"),
        ("tool", None, None, "tool"),
        ("toolbox", None, None, None),  # a folder of that name, not a part of it
        ("data", None, None, None),
    ],
)
def test_task_of_a_file(tmp_path, folder, in_row, flag, task):
    row = row_of("q") if in_row is None else row_of("q", task=in_row)
    file = write_rows(tmp_path / "rows" / folder / "train.json", [row])
    assert tasks_seen([file], flag) == [task]


def test_the_name_of_the_file_is_no_folder():
    assert task_from_path("data/qa.json") is None
    assert task_from_path("data/qa") is None
    assert task_from_path("data/qa/train.json") == "qa"
    assert task_from_path("beir:data/tool:test") == "tool"
    assert task_from_path("beir:qa/nq") == "qa"
    assert task_from_path("beir:data/scifact:qa") is None
    assert task_from_path("/data/conversation/qrecc/train.json") == "convsearch"


def test_no_task_where_one_is_needed_is_an_error(tmp_path):
    file = write_rows(tmp_path / "train.json", [row_of("q")])
    for version in ("llm-embedder", "instructor"):
        with pytest.raises(UserError, match="--task"):
            load([file], instruction_of=partial(instruction_for, version))
        with pytest.raises(UserError, match="searching"):
            load([file], task="searching", instruction_of=partial(instruction_for, version))
    for version in ("bge", "e5"):
        assert len(load([file], instruction_of=partial(instruction_for, version))[0]) == 1


def test_rows_of_several_tasks_in_one_file(tmp_path):
    """Fine when they are trained alike: each gets its own instruction. An error when they are not."""
    file = write_rows(tmp_path / "qa" / "train.json", [row_of("q", task="tool"), row_of("q")])
    sources = load([file], instruction_of=partial(instruction_for, "llm-embedder"))
    dataset = TrainDataset(sources, 0)
    assert dataset[0, 0].query == "Transform this user request for fetching helpful tool descriptions: q"
    assert dataset[0, 1].query == "Represent this query for retrieving relevant documents: q"
    with pytest.raises(UserError, match="qa, tool"):
        load([file], settings_of=lambda task: source_settings("first" if task == "qa" else "random"))


#: Contract, section 4: version, task, query, key.
INSTRUCTIONS = [
    (
        "llm-embedder", "qa",
        "Represent this query for retrieving relevant documents: ",
        "Represent this document for retrieval: ",
    ),
    (
        "llm-embedder", "convsearch",
        "Encode this query and context for searching relevant passages: ",
        "Encode this passage for retrieval: ",
    ),
    (
        "llm-embedder", "chat",
        "Embed this dialogue to find useful historical dialogues: ",
        "Embed this historical dialogue for retrieval: ",
    ),
    (
        "llm-embedder", "lrlm",
        "Embed this text chunk for finding useful historical chunks: ",
        "Embed this historical text chunk for retrieval: ",
    ),
    (
        "llm-embedder", "icl",
        "Convert this example into vector to look for useful examples: ",
        "Convert this example into vector for retrieval: ",
    ),
    (
        "llm-embedder", "tool",
        "Transform this user request for fetching helpful tool descriptions: ",
        "Transform this tool description for retrieval: ",
    ),
    *[("bge", task, "Represent this sentence for searching relevant passages: ", "") for task in TASKS],
    *[("e5", task, "query: ", "passage: ") for task in TASKS],
    (
        "instructor", "qa",
        "Represent the query for retrieving supporting documents: ",
        "Represent the document for retrieval: ",
    ),
    (
        "instructor", "convsearch",
        "Represent the query and context for retrieving supporting passages: ",
        "Represent the passage for retrieval: ",
    ),
    (
        "instructor", "chat",
        "Represent the dialogue for retrieving useful historical dialogues: ",
        "Represent the historical dialogue for retrieval: ",
    ),
    (
        "instructor", "lrlm",
        "Represent the text chunk for retrieving useful historical chunks: ",
        "Represent the historical text chunk for retrieval: ",
    ),
    (
        "instructor", "icl",
        "Represent the example for retrieving duplicate examples: ",
        "Represent the example for retrieval: ",
    ),
    (
        "instructor", "tool",
        "Represent the user request for retrieving duplicate examples: ",
        "Represent the tool description for retrieval: ",
    ),
]  # fmt: skip


def test_every_version_and_task_is_listed():
    assert len(INSTRUCTIONS) == 4 * 6
    assert {(version, task) for version, task, _, _ in INSTRUCTIONS} == {
        (version, task) for version in ("llm-embedder", "bge", "e5", "instructor") for task in TASKS
    }


@pytest.mark.parametrize(("version", "task", "query", "key"), INSTRUCTIONS)
def test_instructions_come_first(tmp_path, version, task, query, key):
    """Before the query and before each key, positive or not, and nothing in between."""
    rows = [row_of(" what?", task=task)]
    if task == "chat":
        rows = [{"query": " what?", "history": ["p", "n0", "n1"], "teacher_scores": [3, 2, 1], "task": task}]
    file = write_rows(tmp_path / "train.json", rows)
    chosen = source_settings("teacher" if task == "chat" else "first", "first")
    example = TrainDataset(load([file], chosen, instruction_of=partial(instruction_for, version)), 0)[0, 0]
    assert example.query == query + " what?"
    assert example.keys == [key + "p", key + "n0", key + "n1"]


def test_no_instruction_leaves_texts_alone(tmp_path):
    file = write_rows(tmp_path / "train.json", [row_of("what?", teacher_scores=[0.5, 2, 1])])
    example = TrainDataset(load([file], source_settings(negative="first")), 0)[0, 0]
    assert replace(example, names=None) == TrainExample(0, "what?", ["p", "n0", "n1"], [0.5, 2, 1])


def test_names_are_those_of_the_texts_without_instruction(tmp_path):
    """A text is the same under each task's instruction; labels count in their file; a query with its instruction."""
    first = [row_of("q", task="qa", pos_index=[3]), row_of("q", task="tool", pos_index=[3], pos=["other"])]
    files = [write_rows(tmp_path / "a.json", first), write_rows(tmp_path / "b.json", first[:1])]
    chosen = source_settings(negative="first")
    dataset = TrainDataset(load(files, chosen, instruction_of=partial(instruction_for, "llm-embedder")), 0)
    keys, answers = batch_names([dataset[0, i] for i in range(3)])
    # Groups of three; the positives of rows 0 and 2 are one text, those of 0 and 1 have one number in one file.
    found = answered(keys, answers).nonzero().tolist()
    assert found == [[0, 0], [0, 3], [0, 6], [1, 0], [1, 3], [2, 0], [2, 6]]
    off = source_settings(negative="first", loss=LossConfig(mask_same_text=False))
    assert batch_names([TrainDataset(load(files, off), 0)[0, 0]]) is None


#: A command line unlike any default and any task's settings.
COMMAND_LINE = {
    "select_positive": "teacher-pos",
    "select_negative": "teacher-",
    "contrastive_weight": 0.7,
    "distill_weight": 0.6,
    "teacher_temperature": 0.5,
    "max_sample_num": 77,
    "teacher_scores_margin": 0.03,
    "teacher_scores_min": -4.0,
}
#: Contract, section 4: what each task puts in its place.
TASK_SETTINGS = {
    "qa": {"select_positive": "first", "select_negative": "random", "contrastive_weight": 0, "stable_distill": True},
    "convsearch": {
        "select_positive": "first", "select_negative": "random", "distill_weight": 0, "stable_distill": False,
    },
    "chat": {
        "select_positive": "teacher", "select_negative": "random", "contrastive_weight": 0, "distill_weight": 1.0,
        "teacher_temperature": 0.1, "stable_distill": False,
    },
    "lrlm": {
        "select_positive": "teacher", "select_negative": "random", "contrastive_weight": 0, "distill_weight": 1.0,
        "teacher_temperature": 0.1, "stable_distill": False, "max_sample_num": 10000, "teacher_scores_margin": 0.1,
    },
    "icl": {"select_positive": "random", "select_negative": "random", "contrastive_weight": 0, "stable_distill": True},
    "tool": {"select_positive": "first", "select_negative": "random", "distill_weight": 0, "stable_distill": False},
}  # fmt: skip


def training_args(tmp_path, **flags) -> RetrievalTrainingArgs:
    return RetrievalTrainingArgs(output_dir=str(tmp_path), use_cpu=True, evaluation_strategy="no", **flags)


def expected_settings(values: dict, group_size: int, cos_temperature: float, student_temperature: float):
    return SourceSettings(
        SelectionPolicy(values["select_positive"], values["select_negative"], group_size, values["stable_distill"]),
        LossConfig(
            contrastive_weight=values["contrastive_weight"],
            distill_weight=values["distill_weight"],
            cos_temperature=cos_temperature,
            teacher_temperature=values["teacher_temperature"],
            student_temperature=student_temperature,
            stable_distill=values["stable_distill"],
        ),
        max_sample_num=values["max_sample_num"],
        teacher_scores_margin=values["teacher_scores_margin"],
        teacher_scores_min=values["teacher_scores_min"],
    )


@pytest.mark.parametrize("stable_distill", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_train_config_goes_over_the_command_line(tmp_path, task, stable_distill):
    given_ = {**COMMAND_LINE, "stable_distill": stable_distill}
    other = {"train_group_size": 5, "cos_temperature": 0.02, "student_temperature": 0.9}
    args = training_args(tmp_path, **given_, **other)
    assert SourceSettings.from_args(args, "llm-embedder", task) == expected_settings(given_, 5, 0.02, 0.9)
    args = training_args(tmp_path, **given_, **other, use_train_config=True)
    expected = expected_settings({**given_, **TASK_SETTINGS[task]}, 5, 0.02, 0.9)
    assert SourceSettings.from_args(args, "llm-embedder", task) == expected


def test_train_config_with_a_version_that_has_none(tmp_path):
    """The error names the versions that have one."""
    args = training_args(tmp_path, use_train_config=True)
    for version in ("bge", "e5", "instructor"):
        with pytest.raises(UserError, match=rf"{version}.*llm-embedder"):
            SourceSettings.from_args(args, version, "qa")
    with pytest.raises(UserError, match="--task"):
        SourceSettings.from_args(args, "llm-embedder", None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"margin_mse": True, "stable_distill": True}, "two ways to distil"),
        ({"margin_mse": True, "distill_weight": 0}, "--margin_mse needs --distill_weight"),
        ({"margin_mse": True, "positives_per_query": 2}, "--positives_per_query 2 does not go with --margin_mse"),
        ({"positives_per_query": 2, "select_positive": "teacher"}, "--select_positive teacher the best of all"),
    ],
)
def test_losses_that_do_not_go_together(tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        SourceSettings.from_args(training_args(tmp_path, **flags), "bge", None)


def test_several_positives_from_the_file_to_the_batch(tmp_path):
    """A group has as many keys as the row with the most fills; counts go with the batch, scores with their keys."""
    rows = [
        {"query": "a", "pos": ["p0", "p1"], "neg": ["n0", "n1"], "teacher_scores": [4, 3, 2, 1]},
        {"query": "b", "pos": ["p2"], "neg": ["n2"]},
    ]
    file = str(write_rows(tmp_path / "train.json", rows))
    args = training_args(tmp_path, positives_per_query=2, select_negative="first", margin_mse=False)
    settings_of = partial(SourceSettings.from_args, args, "bge")
    (source,) = load_train_sources([file], settings_of, no_instruction, None, 0, None, fits_groups=True)
    examples = [TrainDataset([source], 0)[0, index] for index in range(2)]
    assert examples[0].keys == ["p0", "p1", "n0", "n1"]
    assert examples[0].scores == [4, 3, 2, 1]
    assert examples[1].keys == ["p2", "n2", "n2", "n2"]
    assert positive_counts(examples).tolist() == [2, 1]
    assert positive_counts(examples[1:]) is None
    write_rows(tmp_path / "train.json", [{**row, "neg": [], "teacher_scores": None} for row in rows])
    with pytest.raises(UserError, match="--positives_per_query 2 leaves no negative in groups of 1 keys"):
        load_train_sources([file], settings_of, no_instruction, None, 0, None, fits_groups=True)


def test_margin_mse_needs_scores(tmp_path):
    file = write_rows(tmp_path / "train.json", [row_of("q")])
    with pytest.raises(UserError, match=r"--margin_mse: no row of .*train.json has teacher_scores"):
        load([file], source_settings(loss=LossConfig(margin_mse=True)))


def test_both_weights_zero_is_an_error(tmp_path):
    """By the flags, and by a flag together with a task's settings (convsearch sets the other one to 0)."""
    with pytest.raises(UserError, match="both 0"):
        SourceSettings.from_args(training_args(tmp_path, contrastive_weight=0, distill_weight=0), "bge", None)
    args = training_args(tmp_path, contrastive_weight=0, use_train_config=True)
    with pytest.raises(UserError, match="both 0"):
        SourceSettings.from_args(args, "llm-embedder", "convsearch")


def test_train_config_reaches_the_examples(tmp_path):
    """chat takes the best past turn as the positive, and drops the row without scores; qa orders its negatives."""
    chat = [
        {"query": "c", "history": ["h0", "h1", "h2"], "teacher_scores": [0.1, 0.9, 0.5]},
        {"query": "unscored", "history": ["h0", "h1"]},
    ]
    qa = [{"query": "q", "pos": ["p0", "p1"], "neg": ["n0", "n1", "n2"], "teacher_scores": [0, 9, 1, 3, 2]}]
    files = [write_rows(tmp_path / "chat" / "a.json", chat), write_rows(tmp_path / "qa" / "a.json", qa)]
    args = training_args(tmp_path, use_train_config=True, train_group_size=4)
    sources = load(files, settings_of=partial(SourceSettings.from_args, args, "llm-embedder"))
    dataset = TrainDataset(sources, 0)
    assert dataset.sizes == [1, 1]
    assert dataset[0, 0].keys[0] == "h1"
    assert set(dataset[0, 0].keys[1:]) == {"h0", "h2"}
    assert replace(dataset[0, 1], names=None) == TrainExample(1, "q", ["p0", "n1", "n2", "n0"], [0, 3, 2, 1])


# ------------------------------------------------------------------------------------------------ drawing of negatives


@pytest.fixture
def many_negatives(tmp_path) -> TrainDataset:
    """12 rows with 40 negatives each, in two files."""
    files = [write_rows(tmp_path / f"{n}.json", [row_of(f"{n}{i}", 40) for i in range(6)]) for n in "ab"]
    return TrainDataset(load(files, source_settings(group_size=8)), seed=5)


def test_negatives_are_drawn_anew_each_epoch(many_negatives):
    """7 of 40 drawn twice alike has a chance of 1 in 18 million (as a set) for each row."""
    for index in range(12):
        sets = [frozenset(many_negatives[epoch, index].keys[1:]) for epoch in range(5)]
        assert len(set(sets)) == 5
        assert all(len(chosen) == 7 for chosen in sets)
    # Over 20 epochs of 7 of 40, a negative is left out with a chance of 0.825^20 = 2 %: most come at some time.
    seen = {key for epoch in range(20) for key in many_negatives[epoch, 0].keys[1:]}
    assert len(seen) > 32


def test_rows_draw_apart_from_each_other(many_negatives):
    assert len({tuple(many_negatives[0, index].keys[1:]) for index in range(12)}) == 12


def test_seeds_draw_apart_from_each_other(many_negatives):
    other = TrainDataset(many_negatives.sources, seed=6)
    assert all(other[0, index].keys != many_negatives[0, index].keys for index in range(12))


def test_draw_depends_on_seed_epoch_and_index_alone(many_negatives):
    """Backwards, at random, twice, by a fresh object: always the same example."""
    positions = [(epoch, index) for epoch in range(3) for index in range(12)]
    expected = {position: many_negatives[position] for position in positions}
    rng = np.random.default_rng(0)
    for order in (positions[::-1], rng.permutation(positions).tolist(), positions + positions):
        fresh = TrainDataset(many_negatives.sources, seed=5)
        np.random.seed(int(rng.integers(100)))
        assert all(fresh[tuple(position)] == expected[tuple(position)] for position in order)


@pytest.mark.parametrize("workers", [1, 2])
def test_draw_is_the_same_in_worker_processes(many_negatives, workers):
    positions = [(epoch, index) for epoch in (1, 0) for index in range(12)]
    batches = [positions[i : i + 4] for i in range(0, len(positions), 4)]
    loader = DataLoader(many_negatives, batch_sampler=batches, collate_fn=list, num_workers=workers)
    assert [example for batch in loader for example in batch] == [many_negatives[position] for position in positions]


def test_scores_go_with_their_keys(tmp_path):
    """A key's score is that of its place in pos + neg, whatever is drawn; rows with and without may stand together."""
    scores = [float(i) for i in range(21)]
    file = write_rows(tmp_path / "a.json", [row_of("s", 20, teacher_scores=scores), row_of("u", 20)])
    dataset = TrainDataset(load([file], source_settings(group_size=6)), 0)
    for epoch in range(5):
        example = dataset[epoch, 0]
        places = {"p": 0.0, **{f"n{i}": i + 1.0 for i in range(20)}}
        assert example.scores == [places[key] for key in example.keys]
        assert dataset[epoch, 1].scores is None


# ------------------------------------------------------------------------------------------------------ sizes of groups


def fitted(folder, *negatives: list[int], mixes_files: bool = True, **settings) -> list:
    """Sources of a file for each list of how many negatives its rows have, when no flag gives the group size."""
    files = [
        write_rows(folder / f"{number}.json", [row_of(f"q{n}", count) for n, count in enumerate(counts)])
        for number, counts in enumerate(negatives)
    ]
    chosen = source_settings(group_size=8, **settings)
    return load_train_sources(
        list(map(str, files)),
        lambda task: chosen,
        no_instruction,
        None,
        0,
        None,
        fits_groups=True,
        mixes_files=mixes_files,
    )


@pytest.mark.parametrize(
    ("negatives", "sizes"),
    [([[0, 0, 0]], [1]), ([[1, 1]], [2]), ([[1, 4, 2]], [5]), ([[9, 7]], [8]), ([[3], [1, 1]], [4, 4])],
)
def test_groups_have_no_more_keys_than_rows(tmp_path, negatives, sizes):
    sources = fitted(tmp_path, *negatives)
    assert [source.settings.selection.train_group_size for source in sources] == sizes
    example = TrainDataset(sources, 0)[(0, 0)]
    assert len(example.keys) == sizes[0]


def test_files_of_their_own_batches_have_groups_of_their_own(tmp_path):
    sources = fitted(tmp_path, [3, 3], [0, 0], mixes_files=False)
    assert [source.settings.selection.train_group_size for source in sources] == [4, 1]
    with pytest.raises(UserError, match=r"1.json: no row can be trained on .*_size 1 compares.*epoch gives"):
        fitted(tmp_path, [3, 3], [0, 0])


def test_a_negative_that_is_the_positive_counts_no_more(tmp_path):
    rows = [row_of("a", 2, teacher_scores=[0, 1, 0])]
    file = write_rows(tmp_path / "a.json", rows)
    chosen = source_settings("teacher", group_size=8)
    (source,) = load_train_sources([str(file)], lambda task: chosen, no_instruction, None, 0, None, fits_groups=True)
    assert source.settings.selection.train_group_size == 2


def test_repeated_negatives_are_said_with_their_cost(tmp_path, caplog):
    """A group of 8 out of triplets: six of eight keys are copies."""
    file = write_rows(tmp_path / "a.json", [row_of("a", 1), row_of("b", 1)])
    (source,), log = log_of(caplog, [file], source_settings(group_size=8))
    assert source.settings.selection.train_group_size == 8
    assert "2 rows have fewer than 7 negatives, which are repeated: 75% of all keys" in log
    assert "(--train_group_size 2 repeats none)" in log
    _, log = log_of(caplog, [file], source_settings(group_size=2))
    assert "fewer than" not in log


def test_pairs_need_no_field_of_negatives(tmp_path, caplog):
    file = write_rows(tmp_path / "a.json", [{"query": "a", "pos": ["p"]}, {"query": "b", "pos": ["r"], "neg": None}])
    (source,), _ = log_of(caplog, [file], source_settings(group_size=1))
    assert len(source) == 2
    with pytest.raises(UserError, match=r"2 dropped: no negative.*--train_group_size 1 compares"):
        load([file], source_settings(group_size=2))
