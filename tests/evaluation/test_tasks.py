"""The evaluations with a language model: against the protocols spelled out, over processes, methods and bad input."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from evaluation import eval_lrlm, eval_tool
from evaluation.eval_icl import ICL
from evaluation.report import read_results
from evaluation.runner.args import EvalRetrievalArgs, default_flags, read_table, with_corpus
from evaluation.runner.run import run_task
from evaluation.runner.text_metrics import binary_f1, contains_answer, exact_match, rouge_l, token_f1
from evaluation.self_retrieval.chunks import Integration, plan_chunks, windows
from scripts.sample import eval as sample_eval
from scripts.sample import lm as sample_lm
from src.lm.args import LMArgs
from src.lm.generate import Decoding, end_tokens, generate, newline_tokens
from src.lm.model import LanguageModel, LMConfig, load_lm
from src.lm.prompts import Prompt, PromptEncoder, Request
from src.utils.cli import run as run_entry
from src.utils.errors import UserError
from src.utils.files import path_name
from tests.conftest import make_tokenizer
from tests.helpers import environment, evaluation_class, read_rows, write_rows
from tests.lm.test_score import models  # noqa: F401  (a fixture)
from tests.reference import evaluation as reference
from tests.reference.lm_score import decoder_likelihood
from tests.workers.forked import Runs

TASKS = ("popqa", "qa", "mmlu", "icl", "qrecc", "msc", "lrlm", "tool")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Small data of every evaluation; tools, dialogues and plays only where their packages are installed."""
    root = tmp_path_factory.mktemp("eval")
    files = sample_eval.town_questions(rows=8, seed=0)
    files["tool/toolbench/corpus.json"] = [{"text": f"tool number {n} does thing {n % 7}"} for n in range(30)]
    files["tool/toolbench/test.json"] = [{"query": f"do thing {n}", "pos_index": [n]} for n in range(5)]
    past = [f"Speaker 1: word {n} of it?\nSpeaker 2: it is number {n}." for n in range(6)]
    files["chat/msc/test.json"] = [
        {"query": f"What was word {n}?", "answers": [f"It was number {n}."], "history": past} for n in range(4)
    ]
    text = " ".join(f"In year {n} the king of land {n % 5} had {n * 7 % 11} ships." for n in range(40))
    files["lrlm/books3/test.json"] = [{"text": text}, {"text": text[::-1]}, {"text": "short"}]
    for name, rows in files.items():
        write_rows(root / name, rows)
    return root


@pytest.fixture
def evaluate(monkeypatch, capsys, caplog, data_root, models, tiny_bert, tmp_path):  # noqa: F811
    """Run an evaluation in this process; its outputs, its line of the log, and what it printed."""
    caplog.set_level("INFO")

    def call(task: str, *flags, expect: int = 0, lm: str = models["llama"]):
        log = tmp_path / "log" / f"{task}.log"
        command = ["--data_root", data_root, "--cpu", "--output_dir", tmp_path / "out", "--log_path", log]
        command += [
            "--query_encoder",
            tiny_bert,
            "--add_instruction",
            "False",
            "--query_max_length",
            48,
            "--key_max_length",
            100,
        ]
        if task != "tool":
            command += ["--model_name_or_path", lm]
        monkeypatch.setattr(sys, "argv", [f"eval_{task}", *map(str, [*command, *flags])])
        module = importlib.import_module(f"evaluation.eval_{task}")
        with pytest.raises(SystemExit) as stop:
            run_entry((lambda: run_task(evaluation_class(module))) if task != "tool" else module.main)
        printed = capsys.readouterr().err + caplog.text
        assert int(stop.value.code or 0) == expect, printed
        if expect:
            return printed
        record = read_rows(log.with_suffix(".jsonl"))[-1]
        outputs = read_rows(Path(record["outputs"])) if "outputs" in record else []
        return outputs, record, printed

    return call


def loaded(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# --- each protocol, spelled out -------------------------------------------------------------------------------------


def test_popqa(evaluate, data_root, models):  # noqa: F811
    outputs, record, _ = evaluate("popqa", "--retrieval_method", "oracle", "--key_num", 1)
    rows = read_rows(data_root / "qa/popqa/test.json")
    corpus = read_rows(data_root / "qa/nq/corpus.json")
    for output, row in zip(outputs, rows, strict=True):
        assert output["retrieved"] == row["pos_index"]
    model, tokenizer = loaded(models["llama"])
    # Which example of a relation is drawn is the evaluation's choice: the reference tries them all.
    row, output = rows[0], outputs[0]
    of_relation = {
        relation: [other for other in rows if other["prop_id"] == relation]
        for relation in sorted({other["prop_id"] for other in rows} - {row["prop_id"]})
    }
    knowledge = " " + corpus[row["pos_index"][0]]["text"]
    found = []
    for choice in np.ndindex(*map(len, of_relation.values())):
        shots = [own[place] for own, place in zip(of_relation.values(), choice, strict=True)]
        text = f"Knowledge: {knowledge}\n\n"
        text += "".join(f"Q: {shot['query']} A: {shot['obj']}\n\n" for shot in shots)
        found.append(reference.greedy(model, tokenizer, text + f"Q: {row['query']} A: ", 16))
    assert output["output"][0] in found
    values = [
        contains_answer(own["output"][0], row["possible_answers"]) for own, row in zip(outputs, rows, strict=True)
    ]
    assert record["metrics"]["accuracy"] == pytest.approx(sum(values) / len(values))
    assert (record["task"], record["retriever"], record["rows"], record["skipped"]) == ("popqa", "oracle", 8, 0)
    assert record["versions"]["torch"]
    assert record["seconds"] > 0


def test_qa_with_bm25(evaluate, data_root, models):  # noqa: F811
    outputs, record, _ = evaluate("qa", "--retrieval_method", "bm25", "--few_shot", 0, "--key_num", 2)
    rows = read_rows(data_root / "qa/nq/test.json")
    corpus = read_rows(data_root / "qa/nq/corpus.json")
    model, tokenizer = loaded(models["llama"])
    for output, row in list(zip(outputs, rows, strict=True))[:3]:
        keys = "\n".join(" " + corpus[index]["text"] for index in output["retrieved"])
        assert len(output["retrieved"]) == 2
        text = f"Knowledge: {keys}\n\nQuestion: {row['query']}\nAnswer: "
        assert output["output"] == [reference.greedy(model, tokenizer, text, 32)]
        assert output["values"]["exact_match"] == exact_match(output["output"][0], row["answers"])
    assert set(record["metrics"]) == {"exact_match", "f1"}


def test_mmlu(evaluate, data_root, models):  # noqa: F811
    outputs, record, _ = evaluate("mmlu", "--retrieval_method", "oracle", "--few_shot", 2, "--key_num", 1)
    rows, dev = (read_rows(data_root / f"qa/mmlu/{name}.json") for name in ("test", "dev"))
    corpus = read_rows(data_root / "qa/msmarco/corpus.json")
    model, tokenizer = loaded(models["llama"])

    def shown(row, answer):
        return (
            row["query"]
            + "".join(f"\n{x}. {c}" for x, c in zip("ABCD", row["choices"], strict=True))
            + "\nAnswer: "
            + answer
        )

    for output, row in list(zip(outputs, rows, strict=True))[:3]:
        shots = [other for other in dev if other["subject"] == row["subject"]][:2]
        text = f"Knowledge:\n {corpus[row['pos_index'][0]]['text']}\n\n"
        name = row["subject"].replace("_", " ")
        text += f"The following are multiple choice questions (with answers) about {name}.\n\n"
        text += "".join(shown(shot, "ABCD"[shot["answer"]]) + "\n\n" for shot in shots) + shown(row, "")
        wanted = [reference.option_likelihood(model, tokenizer, text, letter)[0] for letter in "ABCD"]
        np.testing.assert_allclose(output["response"]["log_likelihoods"], wanted, atol=1e-5)
        assert output["output"] == int(np.argmax(wanted))
    right = {subject: [] for subject in {row["subject"] for row in rows}}
    for output, row in zip(outputs, rows, strict=True):
        right[row["subject"]].append(output["output"] == row["answer"])
    metrics = record["metrics"]
    for subject, values in right.items():
        assert metrics[subject] == pytest.approx(np.mean(values))
    assert metrics["Others"] == metrics["miscellaneous"]
    assert metrics["Social Sciences"] == metrics["high_school_geography"]
    assert metrics["accuracy"] == pytest.approx((metrics["Others"] + metrics["Social Sciences"]) / 2)


def test_icl(evaluate, data_root, models):  # noqa: F811
    outputs, record, _ = evaluate("icl", "--retrieval_method", "same-task-random", "--few_shot", 2)
    rows = read_rows(data_root / "icl/icl/test.json")
    corpus = read_rows(data_root / "icl/icl/corpus.json")
    model, tokenizer = loaded(models["llama"])
    for output, row in list(zip(outputs, rows, strict=True))[:4]:
        examples = [corpus[index] for index in output["retrieved"]]
        assert [example["task_name"] for example in examples] == [row["task_name"]] * 2
        text = f"{examples[1]['contents']}\n{examples[0]['contents']}\n{row['query']}\n "
        if row["options"]:
            wanted = [reference.option_likelihood(model, tokenizer, text, option)[0] for option in row["options"]]
            np.testing.assert_allclose(output["response"]["log_likelihoods"], wanted, atol=1e-5)
        else:
            assert output["output"] == [reference.greedy(model, tokenizer, text, 64)]
    accuracy = [
        o["output"] == r["options"].index(r["answers"][0]) for o, r in zip(outputs, rows, strict=True) if r["options"]
    ]
    assert record["metrics"]["boolq"] == pytest.approx(np.mean(accuracy))
    assert record["metrics"]["average"] == pytest.approx(
        (record["metrics"]["boolq"] + record["metrics"]["natural_questions"]) / 2
    )
    assert record["metrics"]["reading"] == record["metrics"]["boolq"]
    some, record, _ = evaluate("icl", "--retrieval_method", "no", "--task_names", "boolq")
    assert len(some) == sum(bool(row["options"]) for row in rows)
    assert set(record["metrics"]) == {"boolq", "reading", "average"}


def test_icl_f1_and_rouge_by_hand():
    chosen, right = [1, 1, 0, 1], [1, 0, 1, 1]
    rows = [
        ({"task_name": "multirc"}, {"chosen": float(c), "right": float(r)}) for c, r in zip(chosen, right, strict=True)
    ]
    rows += [({"task_name": "aeslc"}, {"rouge_l": 0.5}), ({"task_name": "aeslc"}, {"rouge_l": 1.0})]
    found = ICL.summarize(None, rows)
    # Two true positives, one false positive, one false negative.
    assert found["multirc"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["aeslc"] == found["summarisation"] == 0.75


def test_qrecc(evaluate, data_root, models):  # noqa: F811
    outputs, record, _ = evaluate("qrecc", "--retrieval_method", "bm25", "--hits", 100)
    assert outputs == []
    assert set(record["metrics"]) == {f"{name}@{cutoff}" for name in ("ndcg", "recall") for cutoff in (3, 10, 100)}
    assert "model" not in record
    outputs, record, _ = evaluate(
        "qrecc", "--retrieval_method", "oracle", "--do_generate", "--max_new_tokens", 8, "--key_num", 1
    )
    assert record["metrics"]["ndcg@3"] == record["metrics"]["recall@100"] == 1
    row, corpus = (
        read_rows(data_root / "convsearch/qrecc/test.concat.json")[0],
        read_rows(data_root / "qa/nq/corpus.json"),
    )
    text = f"Knowledge: {corpus[row['pos_index'][0]]['text']}\n\nContext and Question: {row['query']}\nAnswer: "
    model, tokenizer = loaded(models["llama"])
    assert outputs[0]["output"] == [reference.greedy(model, tokenizer, text, 8)]
    values = [rouge_l(output["output"][0], output["gold"][0]) for output in outputs]
    assert record["metrics"]["rouge_l"] == pytest.approx(np.mean(values))


@pytest.mark.parametrize("method", ["no", "random", "recent", "bm25", "dense", "oracle"])
def test_msc(evaluate, data_root, models, method):  # noqa: F811
    outputs, record, _ = evaluate("msc", "--retrieval_method", method, "--key_num", 2, "--order_method", "relevance")
    rows = read_rows(data_root / "chat/msc/test.json")
    model, tokenizer = loaded(models["llama"])
    nll = tokens = 0.0
    for output, row in zip(outputs, rows, strict=True):
        chosen = output["retrieved"]
        assert len(chosen) == (0 if method == "no" else 2)
        if method == "recent":
            # The best one stands last.
            assert chosen == [4, 5]
        turns = "".join(row["history"][index] + "\n" for index in chosen)
        question = f"Speaker 1: {row['query']}\nSpeaker 2: "
        mean, size = reference.option_likelihood(model, tokenizer, turns + question, row["answers"][0])
        assert output["response"]["log_likelihoods"] == pytest.approx([mean], abs=1e-5)
        nll -= mean * size
        tokens += size
        if method == "oracle":
            single = [
                reference.option_likelihood(model, tokenizer, f"{turn}\n{question}", row["answers"][0])[0]
                for turn in row["history"]
            ]
            assert chosen[::-1] == sorted(range(6), key=lambda key: -single[key])[:2]
    assert record["metrics"]["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


LRLM = ("--context_window_size", 96, "--target_length", 48, "--chunk_size", 16, "--key_num", 3)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("no", ()),
        ("random", ("--order_method", "relevance", "--add_sep", 9, 10)),
        ("bm25", ("--integrate_method", "replace")),
        ("dense", ("--add_key_continuation",)),
        ("oracle", ("--context_max_length", 200, "--key_num", 1)),
    ],
)
def test_lrlm(evaluate, data_root, models, method, flags):  # noqa: F811
    outputs, record, printed = evaluate("lrlm", "--retrieval_method", method, *LRLM, *flags)
    model, tokenizer = loaded(models["llama"])
    nll = tokens = 0.0
    for output, row in list(zip(outputs, read_rows(data_root / "lrlm/books3/test.json"), strict=True))[:2]:
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        ids = ids[-200:] if "--context_max_length" in flags else ids
        keys = [list(own) for own in output["retrieved"]]
        assert [len(own) for own in keys] == [{"no": 0, "oracle": 1}.get(method, 3)] * 3
        order = "relevance" if "relevance" in flags else "sequential"
        separator = [9, 10] if "--add_sep" in flags else []
        parts = reference.chunk_windows(ids, 48, 96, 16, keys, order, "replace" in flags, separator)
        total = 0.0
        for prompt, target in parts:
            whole = [*prompt, *target]
            total -= reference.likelihood_of(model, whole, len(whole) - len(target)) * len(target)
        assert output["values"]["nll"] == pytest.approx(total, rel=1e-5)
        nll, tokens = nll + total, tokens + 48
    assert record["metrics"]["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert record["skipped"] == 1
    assert "1 of 3 rows are left out, since they are not longer than --target_length" in printed


def test_questions_without_answers_are_left_out_of_rouge(evaluate, data_root, tmp_path):
    first, *others = read_rows(data_root / "convsearch/qrecc/test.concat.json")
    path = write_rows(tmp_path / "rows.json", [{**first, "answers": [" "]}, *others])
    flags = ("--retrieval_method", "oracle", "--do_generate", "--max_new_tokens", 4, "--key_num", 1)
    outputs, record, printed = evaluate("qrecc", "--eval_data", path, *flags)
    assert outputs[0]["values"] == {}
    assert record["skipped"] == 1
    assert record["metrics"]["rouge_l"] == pytest.approx(np.mean([own["values"]["rouge_l"] for own in outputs[1:]]))
    assert f"1 of {len(outputs)} rows are left out, since they have no answers" in printed


def test_padding_behind_the_end_of_a_text_does_not_show(models, monkeypatch):  # noqa: F811
    model = load_lm(LMConfig(LMArgs(models["llama"]), "fp32", torch.device("cpu")))
    one, other = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("abc", "xyz"))
    end = end_tokens(model)[0]
    written = torch.tensor(
        [[*other, *one, end, *other], [*other, *one, *one, end, end, end][: 2 * len(other) + len(one) + 1]]
    )
    monkeypatch.setattr(model.model, "generate", lambda **inputs: written)
    texts = model.continuations([other, other], GenerationConfig(eos_token_id=end_tokens(model)))
    assert texts == [model.tokenizer.decode(one), model.tokenizer.decode([*one, *one])]


def test_own_subjects_are_groups_of_their_own(evaluate, data_root, tmp_path):
    """With as many options as a question has; a name that may be a misspelt one of MMLU's is asked about."""
    rows = read_rows(data_root / "qa/mmlu/test.json")[:4]
    own = {"subject": "Town History", "choices": ["yes", "no"], "answer": 1}
    rows = [{**rows[0], **own}, {**rows[1], **own, "answer": 0}, {**rows[2], "subject": "anatomys"}, rows[3]]
    path = write_rows(tmp_path / "own" / "test.json", rows)
    flags = ("--eval_data", path, "--retrieval_method", "no", "--few_shot", 0)
    outputs, record, printed = evaluate("mmlu", *flags)
    metrics = record["metrics"]
    right = [float(output["output"] == row["answer"]) for output, row in zip(outputs, rows, strict=True)]
    assert [len(output["response"]["log_likelihoods"]) for output in outputs] == [2, 2, 4, 4]
    assert metrics["town_history"] == (right[0] + right[1]) / 2
    assert metrics["anatomys"] == right[2]
    assert metrics["accuracy"] == pytest.approx((metrics["town_history"] + right[2] + right[3]) / 3)
    assert "form groups of their own: anatomys (1 row; is anatomy meant?), town_history (2 rows)" in printed


def test_own_tasks_of_icl(evaluate, data_root, tmp_path):
    """Chosen with options, generated without, or by the metric that the rows name; all in the average."""
    chosen = [row for row in read_rows(data_root / "icl/icl/test.json") if row.get("options")][:2]
    rows = [{**row, "task_name": "chess"} for row in chosen]
    rows += [{"query": "What is the town?", "answers": ["x"], "task_name": "towns"}]
    rows += [{"query": "Tell of it.", "answers": ["x y"], "task_name": "tales", "metric": "rouge_l"}]
    path = write_rows(tmp_path / "own" / "test.json", rows)
    flags = ("--eval_data", path, "--retrieval_method", "no")
    outputs, record, printed = evaluate("icl", *flags)
    assert [[*output["values"]] for output in outputs] == [["accuracy"], ["accuracy"], ["exact_match"], ["rouge_l"]]
    values = {name: record["metrics"][name] for name in ("chess", "tales", "towns")}
    assert record["metrics"]["average"] == pytest.approx(sum(values.values()) / 3)
    assert "groups of their own: chess (2 rows), tales (1 row), towns (1 row)" in printed
    outputs, _, _ = evaluate("icl", *flags, "--task_names", "towns")
    assert len(outputs) == 1
    printed = evaluate("icl", *flags, "--task_names", "town", expect=2)
    assert "--task_names 'town' is unknown" in printed
    mixed = write_rows(tmp_path / "mixed.json", [rows[0], {**rows[2], "task_name": "chess"}])
    printed = evaluate("icl", "--eval_data", mixed, "--retrieval_method", "no", expect=2)
    assert "rows of task 'chess' differ in their metric (accuracy, exact_match)" in printed


def test_empty_outputs_are_counted_and_told(evaluate, data_root, tmp_path, monkeypatch):
    """An LM that ends at once scores 0: the log, and the result, say of how many rows."""
    monkeypatch.setattr(
        "src.lm.ask.generate",
        lambda model, prompts, *_: iter(
            [{number: ("",) if number % 2 else (" \n",) if number == 2 else ("x",) for number in range(len(prompts))}]
        ),
    )
    path = write_rows(tmp_path / "own" / "test.json", read_rows(data_root / "qa/nq/test.json")[:6])
    _, record, printed = evaluate("qa", "--eval_data", path, "--retrieval_method", "no", "--few_shot", 0)
    assert (record["empty"], record["rows"]) == (4, 6)
    assert f"4 of 6 outputs are empty and count as wrong; the first is of {path}:2" in printed
    _, record, printed = evaluate("mmlu", "--retrieval_method", "no")
    assert record["empty"] == 0
    assert "outputs are empty" not in printed.split("mmlu")[-1]


def test_groups_of_mmlu():
    assert {group: len(subjects) for group, subjects in read_table("groups")["mmlu"].items()} == {
        "STEM": 18,
        "Social Sciences": 12,
        "Humanities": 13,
        "Others": 14,
    }
    assert "anatomy" in read_table("groups")["mmlu"]["Others"]


def test_tool_is_retrieval_with_its_own_defaults(evaluate):
    _, record, _ = evaluate("tool", "--retrieval_method", "bm25", "--hits", 20)
    assert set(record["metrics"]) == {f"{name}@{cutoff}" for name in ("mrr", "recall", "ndcg") for cutoff in (1, 3, 5)}
    assert record["task"] == "tool"


def test_logs_have_a_place_of_their_own(data_root, models, tmp_path, monkeypatch):  # noqa: F811
    """Each of several data sets in a folder, and each log beside the others; a folder is good for any evaluation."""
    monkeypatch.chdir(tmp_path)
    common = ["--data_root", str(data_root), "--cpu", "--output_dir", "out"]
    lrlm = [*map(str, LRLM), "--model_name_or_path", models["llama"], "--retrieval_method", "no"]
    for log in ((), ("logs/lrlm.no",), ("logs/lrlm.bm25",), ("logs/lrlm.log",), ("logs",), ("new/lrlm",)):
        run_task(eval_lrlm.LRLM, [*common, *lrlm, *(("--log_path", *log) if log else ())])
    for log in ("logs", "tools/"):
        flags = [*common, "--retrieval_method", "bm25", "--hits", "20", "--log_path", log]
        monkeypatch.setattr(sys, "argv", ["eval_tool", *flags])
        eval_tool.main()
    logs = ["data/results/lrlm/books3.log", "logs/lrlm.no", "logs/lrlm.bm25", "logs/lrlm.log", "logs/books3.log"]
    logs += ["new/lrlm/books3.log", "logs/toolbench.log", "tools/toolbench.log"]
    lines = [f"{name.removesuffix('.log')}.jsonl" for name in logs]
    assert all(len(read_rows(tmp_path / name)) == 1 for name in lines)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in made if not name.startswith("out/")} == {*logs, *lines}
    assert len(read_results(".")) == len(logs)


# --- the parts ------------------------------------------------------------------------------------------------------


def test_plan_of_the_paper_and_of_tiny_texts():
    plan = plan_chunks(32768, 1024, 2048, 128)
    assert plan.window == 30720
    assert len(plan.targets) == len(plan.queries) == 8
    assert plan.targets[0] == range(31744, 31872)
    assert plan.queries[0] == range(31616, 31744)
    assert len(plan.keys) == 239
    assert (plan.keys[0], plan.values[0]) == (range(128), range(256))
    # Nothing that is retrieved reaches into the window.
    assert (plan.keys[-1], plan.values[-1]) == (range(30464, 30592), range(30464, 30720))
    # What is to be replaced may stay instead.
    replaced = plan_chunks(32768, 1024, 2048, 128, replace=True)
    assert len(replaced.keys) == 241
    assert (replaced.keys[-1], replaced.values[-1]) == (range(30720, 30848), range(30720, 30976))
    tiny = plan_chunks(15, 5, 8, 2)
    assert tiny.targets == (range(10, 12), range(12, 14), range(14, 15))
    # Chunks are counted from the window, so that the first one may be short.
    assert tiny.keys == (range(0, 1), range(1, 3), range(3, 5))
    assert tiny.values[0] == range(0, 3)
    assert plan_chunks(5, 5, 8, 2) is None
    assert plan_chunks(6, 5, 8, 2).keys == plan_chunks(6, 5, 8, 2, replace=True).keys == ()


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 300), st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.booleans(), st.randoms())
def test_windows_hold_every_target_once_and_stay_in_their_budget(length, target, more, chunk, replace, random):
    plan = plan_chunks(length, target, target + more, chunk, replace)
    if plan is None:
        assert length <= target
        return
    tokens = list(range(length))
    wanted = min(3, len(plan.keys))
    retrieved = [random.sample(range(len(plan.keys)), wanted) for _ in plan.targets]
    found = windows(plan, retrieved, tokens, Integration("sequential", replace))
    assert [token for each in found for token in each.answer] == tokens[-target:]
    for each in found:
        assert each.prompt
        assert each.prompt[-1] == each.answer[0] - 1
        assert len(each) <= target + more + (0 if replace else wanted * 2 * chunk)


def test_the_same_keys_are_read_in_one_pass():
    plan = plan_chunks(200, 48, 96, 16)
    found = windows(plan, [[0, 1]] * 2 + [[2, 1]], list(range(200)), Integration("sequential", False))
    assert [len(each.answer) for each in found] == [32, 16]


TEXT = st.text(alphabet="abc xyz.?é\n", max_size=60)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXT, max_size=4), st.lists(TEXT, max_size=5), TEXT, st.integers(1, 200), st.booleans())
def test_prompts_stay_in_their_budget_and_keep_the_question(knowledge, examples, question, budget, cut_first):
    tokenizer = make_tokenizer()

    def length(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = Prompt(question, tuple(knowledge), tuple(examples), "header", cut_first=cut_first)
    # One more for the token that begins a text.
    encoder = PromptEncoder(tokenizer, budget + 1)
    found = prompt if length(prompt.text) <= budget else encoder.fit(prompt, prompt.knowledge, ())
    fits = length(Prompt(question, header="header").text) <= budget
    assert (encoder.encode([Request(prompt)]) != [None]) == (length(found.text) <= budget) == fits
    if not fits:
        return
    assert found.question == question
    assert found.examples == prompt.examples[len(examples) - len(found.examples) :]
    whole = [key for key in found.knowledge if key in prompt.knowledge]
    if len(found.knowledge) < len(prompt.knowledge):
        # Whole keys stay in their order, from the side that is kept, and at most one is cut.
        kept = prompt.knowledge[len(knowledge) - len(whole) :] if cut_first else prompt.knowledge[: len(whole)]
        assert len(found.knowledge) - len(whole) <= 1
        assert tuple(whole) == kept or len(set(knowledge)) < len(knowledge)
    if found.examples != prompt.examples:
        # Knowledge goes before any example does, and no more examples than must.
        assert not found.knowledge
        more = prompt.examples[len(examples) - len(found.examples) - 1 :]
        assert length(Prompt(question, (), more, "header").text) > budget


def test_text_metrics_by_hand():
    assert exact_match("  Eiffel-Tower!", ["x", "eiffeltower"]) == 1
    # The authors' own normalisation keeps articles, SQuAD's does not.
    assert exact_match("The Tower", ["tower"]) == 0
    assert exact_match("The Tower", ["tower"], articles=False) == 1
    assert token_f1("the big red house", ["red house", "x"]) == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert token_f1("x", ["y"]) == 0
    assert token_f1("the", ["a"]) == 1
    assert binary_f1([0, 0], [0, 0]) == 0
    # Longest common subsequence a c d of 4 and 3 words.
    assert rouge_l("a b c d", "a c d") == pytest.approx(2 * (3 / 4) / (3 / 4 + 1))
    assert contains_answer("It is PARIS, paris.", ["Paris"]) == 1
    assert contains_answer("It is PARIS.", ["Paris"]) == 0


@pytest.mark.parametrize(
    ("output", "answer", "wanted"),
    [
        ("北京", "北京", 1),
        ("the cat sat", "The cat sat on it", 0.5),
        ("a b. c d", "a b. d c.", 0.666667),
        ("a a a b", "a b b", 1),
        ("", "x", 0),
        ("x.y z", "z x.y.", 0.857143),
        ("b a c. a b", "a b c. b. a", 1),
        ("one\ntwo three", "one two. three", 1),
    ],
)
def test_rouge_l_is_that_of_the_package_rouge(output, answer, wanted):
    """Recorded from rouge 1.0.1, a newline put behind either text that has none, as the authors do."""
    assert rouge_l(output, answer) == pytest.approx(wanted, abs=1e-6)


# --- the runner -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forked():
    runs = Runs(environment(), ["evaluation.runner.run", "evaluation.runner.text_metrics"])
    yield runs
    runs.close()


#: Flags that make each evaluation small.
SMALL = {
    "popqa": ("--hits", 10),
    "qa": ("--few_shot", 2),
    "mmlu": ("--few_shot", 2),
    "icl": ("--few_shot", 2, "--max_new_tokens", 8),
    "qrecc": ("--do_generate", "--max_new_tokens", 4),
    "msc": (),
    "lrlm": (*LRLM,),
    "tool": ("--hits", 10),
}


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_give_the_result_of_one(evaluate, forked, data_root, models, tiny_bert, tmp_path, task):  # noqa: F811
    flags = ("--retrieval_method", "dense", *SMALL[task])
    outputs, record, _ = evaluate(task, *flags)
    log = tmp_path / "two" / "log.log"
    command = [*flags, "--data_root", data_root, "--cpu", "--query_encoder", tiny_bert]
    command += ["--output_dir", tmp_path / "two", "--log_path", log]
    command += () if task == "tool" else ("--model_name_or_path", models["llama"])
    command += ["--add_instruction", "False", "--query_max_length", "48", "--key_max_length", "100"]
    codes, printed = forked(f"evaluation/eval_{task}.py", command, 2)
    assert codes == [0, 0], printed
    other = read_rows(log.with_suffix(".jsonl"))[-1]
    assert other["metrics"] == pytest.approx(record["metrics"], rel=1e-5)
    if task != "tool":
        compared = ("output", "retrieved", "prompt_hash")
        for one, two in zip(outputs, read_rows(Path(other["outputs"])), strict=True):
            assert [one[name] for name in compared] == [two[name] for name in compared]


METHODS = ("no", "random", "bm25", "dense", "oracle")


@pytest.mark.parametrize(
    ("task", "method"),
    [
        *((task, method) for task in ("popqa", "qa", "mmlu", "icl", "qrecc") for method in METHODS),
        *(("tool", method) for method in METHODS[:-1]),
    ],
)
def test_all_methods_of_retrieval(evaluate, data_root, task, method):
    outputs, record, _ = evaluate(task, "--retrieval_method", method, *SMALL[task])
    assert record["retriever"].endswith("bert0" if method == "dense" else method)
    assert record["metrics"]
    rows = read_rows(data_root / "icl/icl/test.json" if task == "icl" else data_root / "qa/nq/test.json")
    for output, row in zip(outputs, rows, strict=False):
        wanted = {"no": 0, "oracle": len(row.get("pos_index", ()))}.get(method, 2 if task == "icl" else 3)
        assert len(output["retrieved"]) == len(set(output["retrieved"])) == wanted


class Killed(BaseException):
    """What ends a run that nobody catches."""


@pytest.fixture
def batches(monkeypatch):
    """Numbers of prompts in the batches that the LM gets, one prompt at a time; dies where a test says."""
    seen: list[int] = []
    state = {"left": math.inf}

    def watch(name):
        real = getattr(LanguageModel, name)

        def watched(self, prompts, *rest):
            if state["left"] < 1:
                raise Killed
            state["left"] -= 1
            seen.append(len(prompts))
            return real(self, prompts, *rest)

        monkeypatch.setattr(LanguageModel, name, watched)

    for name in ("answer_scores", "shared_answer_scores", "continuations"):
        watch(name)

    def after(number: float) -> list[int]:
        seen.clear()
        state["left"] = number
        return seen

    return after


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("qa", ("--retrieval_method", "no", "--few_shot", 1, "--lm_batch_size", 1)),
        ("mmlu", ("--retrieval_method", "no", "--few_shot", 0)),
        # Most of the work of an oracle is in finding out which key helps.
        ("msc", ("--retrieval_method", "oracle")),
        ("lrlm", ("--retrieval_method", "oracle", *LRLM, "--key_num", 1)),
    ],
)
def test_a_killed_run_asks_nothing_again(evaluate, batches, tmp_path, task, flags):
    counts = batches(math.inf)
    flags = (*flags, "--context_max_length", 512)
    whole, record, _ = evaluate(task, *flags)
    total = sum(counts)
    assert len(counts) > 1
    counts = batches(len(counts) // 2)
    with pytest.raises(Killed):
        evaluate(task, *flags, "--save_name", "again")
    done = sum(counts)
    assert 0 < done < total
    counts = batches(math.inf)
    resumed, other, _ = evaluate(task, *flags, "--save_name", "again")
    assert sum(counts) == total - done
    assert resumed == whole
    assert other["metrics"] == record["metrics"]
    assert not list((tmp_path / "out").rglob("*.parts*"))


def test_a_finished_run_can_be_taken_over(evaluate, batches):
    flags = ("--retrieval_method", "no", "--few_shot", 1)
    whole, record, _ = evaluate("qa", *flags)
    counts = batches(math.inf)
    again, other, _ = evaluate("qa", *flags, "--load_prev_result")
    assert (again, other["metrics"], counts) == (whole, record["metrics"], [])
    evaluate("qa", *flags, "--load_prev_result", "--max_new_tokens", 3)
    assert sum(counts) == 8


def test_a_run_that_fails_leaves_earlier_outputs_alone(evaluate):
    flags = ("--retrieval_method", "no", "--few_shot", 0)
    whole, record, _ = evaluate("qa", *flags)
    evaluate("qa", *flags, "--context_max_length", 20, expect=2)
    path = Path(record["outputs"])
    assert read_rows(path) == whole
    assert not path.with_name(f"{path.name}.parts").exists()


def test_outputs_of_other_models_tasks_and_data_have_other_names(evaluate, data_root, models, tmp_path):  # noqa: F811
    """Folders that are called alike, too: as many LMs are by their last parts."""
    lms = [shutil.copytree(models["llama"], tmp_path / place / "org/lm") for place in ("a", "b")]
    other = shutil.copytree(data_root / "qa/nq", tmp_path / "web")
    runs = [("qa", lm, "--retrieval_method", method) for lm in lms for method in ("no", "bm25")]
    runs += [("qa", lms[0], "--retrieval_method", "no", "--eval_data", other / "test.json")]
    icl = ("icl", lms[0], "--retrieval_method", "no")
    runs += [icl, (*icl, "--task_names", "boolq"), (*icl, "--task_names", "boolq", "natural_questions")]
    found = []
    for task, lm, *flags in runs:
        flags += ["--few_shot", 0, "--max_new_tokens", 1]
        found.append(Path(evaluate(task, *flags, lm=str(lm))[1]["outputs"]))
    assert len(set(found)) == len(runs)
    assert all(path.is_file() for path in found)
    assert found[1] == tmp_path / "out/bm25" / f"nq-test.output.{path_name(str(lms[0]), 80)}.json"
    found[0].unlink()
    found[0].mkdir()
    printed = evaluate("qa", "--retrieval_method", "no", "--few_shot", 0, lm=str(lms[0]), expect=2)
    assert f"{found[0]} is a folder" in printed


def test_rows_may_bring_their_own_keys(evaluate, data_root, tmp_path):
    rows = [{**row, "key": ["one", "two"], "key_index": [3, 4]} for row in read_rows(data_root / "qa/nq/test.json")]
    path = write_rows(tmp_path / "rows.json", rows)
    flags = ("--eval_data", path, "--corpus", "", "--few_shot", 0, "--key_num", 1, "--debug_retrieval")
    outputs, _, _ = evaluate("qa", *flags)
    assert outputs[0]["retrieved"] == [3]
    assert outputs[0]["retrieved_texts"] == ["one"]


def test_a_ninth_task_is_one_short_file(evaluate, data_root, tmp_path, monkeypatch):
    source = '''
"""Does a passage hold the answer? A task of one's own."""

from evaluation.runner.args import QuestionArgs
from evaluation.runner.task import EvalTask
from src.lm.prompts import Prompt, Request


class Ninth(EvalTask):
    name = "ninth"
    flags = QuestionArgs
    defaults = {"eval_data": "llm-embedder:qa/nq/test.json", "corpus": "llm-embedder:qa/nq/corpus.json", "metrics": []}

    def request(self, row, found, examples):
        return Request(Prompt(row["query"], found.texts), ("Yes", "No"))

    def score(self, row, response):
        return {"yes": float(response.choice == 0)}

    def gold(self, row):
        return "Yes"
'''
    (tmp_path / "eval_ninth.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "evaluation.eval_ninth", importlib.import_module("eval_ninth"))
    outputs, record, _ = evaluate("ninth", "--retrieval_method", "bm25")
    assert len(outputs) == 8
    assert 0 <= record["metrics"]["yes"] <= 1


def test_newlines_are_found_in_the_tokenizer(small_lm):
    _, tokenizer = loaded(small_lm)
    found = set(newline_tokens(tokenizer))
    assert set(tokenizer("a\nb\n\nc", add_special_tokens=False)["input_ids"]) & found
    for token in found:
        assert "\n" in tokenizer.decode([token])
    assert tokenizer("word", add_special_tokens=False)["input_ids"][0] not in found
    # The number that was hard-wired is another token here.
    assert 13 not in found
    assert newline_tokens(make_tokenizer()) == []


@pytest.fixture(scope="session")
def small_lm(tmp_path_factory):
    """The sample LM, real and trained."""
    folder = tmp_path_factory.mktemp("lm") / "lm"
    sample_lm.build(sample_lm.find_gguf(), folder)
    return str(folder)


def test_knowledge_that_tells_the_answer_helps_a_real_model(evaluate, small_lm):
    flags = ("--few_shot", 4, "--max_new_tokens", 8)
    without = evaluate("mmlu", "--retrieval_method", "no", "--few_shot", 4, lm=small_lm)[1]["metrics"]
    told = evaluate("mmlu", "--retrieval_method", "oracle", "--few_shot", 4, "--key_num", 1, lm=small_lm)[1]["metrics"]
    print("MMLU-like", without, told)
    without = evaluate("qa", "--retrieval_method", "no", *flags, lm=small_lm)[1]["metrics"]
    told = evaluate("qa", "--retrieval_method", "oracle", "--key_num", 1, *flags, lm=small_lm)[1]["metrics"]
    print("QA", without, told)
    assert told["f1"] > without["f1"]


def test_chat_template_and_marks_stand_around_the_prompt(evaluate, data_root, small_lm):
    model, tokenizer = loaded(small_lm)
    texts = [f"Question: {row['query']}\nAnswer:" for row in read_rows(data_root / "qa/nq/test.json")]

    def chat(text):
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )

    # In batches of their own, as rounding decides between two tokens that are as likely.
    frames = {"--use_chat_template": chat, "--add_llama_inst": "[INST] {} [/INST]".format}
    plain = [[reference.greedy(model, tokenizer, f"{text} ", 4)] for text in texts]
    for flag, frame in frames.items():
        flags = ("--retrieval_method", "no", "--few_shot", 0, flag, "--max_new_tokens", 4, "--lm_batch_size", 1)
        found = [row["output"] for row in evaluate("qa", *flags, lm=small_lm)[0]]
        assert found == [[reference.greedy(model, tokenizer, frame(text), 4)] for text in texts]
        assert found != plain


def test_an_encoder_decoder_model(evaluate, data_root, models):  # noqa: F811
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(models["t5"]).eval(), make_tokenizer()
    outputs, _, _ = evaluate("qa", "--retrieval_method", "no", "--few_shot", 0, "--max_new_tokens", 4, lm=models["t5"])
    rows = read_rows(data_root / "qa/nq/test.json")
    for output, row in zip(outputs, rows, strict=True):
        text = f"Question: {row['query']}\nAnswer: "
        assert output["output"] == [reference.decoded_greedily(model, tokenizer, text, 4)]
    outputs, _, _ = evaluate("mmlu", "--retrieval_method", "no", "--few_shot", 0, lm=models["t5"])
    for output, row in zip(outputs, read_rows(data_root / "qa/mmlu/test.json"), strict=True):
        name = row["subject"].replace("_", " ")
        text = f"The following are multiple choice questions (with answers) about {name}.\n\n{row['query']}"
        text += "".join(f"\n{x}. {c}" for x, c in zip("ABCD", row["choices"], strict=True)) + "\nAnswer:"
        prompt = tokenizer(text)["input_ids"]
        letters = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ABCD"]
        wanted = [decoder_likelihood(model, prompt, letter) for letter in letters]
        np.testing.assert_allclose(output["response"]["log_likelihoods"], wanted, atol=1e-5)
        assert output["output"] == int(np.argmax(wanted))


def test_sampling_is_repeatable(evaluate):
    flags = ("--retrieval_method", "no", "--do_sample", "--num_return_sequences", 2, "--max_new_tokens", 6)
    first = evaluate("qa", *flags)[0]
    again = evaluate("qa", *flags, "--save_name", "again")[0]
    other = evaluate("qa", *flags, "--seed", 7)[0]
    assert [row["output"] for row in first] == [row["output"] for row in again]
    assert [row["output"] for row in first] != [row["output"] for row in other]
    assert all(len(row["output"]) == 2 for row in first)


def test_a_sample_depends_on_its_own_prompt_alone(models):  # noqa: F811
    model = load_lm(LMConfig(LMArgs(models["llama"]), "fp32", torch.device("cpu")))
    prompts = model.tokenizer(["one two", "three", "four five six", "seven"])["input_ids"]
    decoding = Decoding(8, do_sample=True, num_return_sequences=2, first_line=False)

    def written(chosen):
        texts = dict(item for batch in generate(model, chosen, decoding, 10_000) for item in batch.items())
        return [texts[number] for number in range(len(chosen))]

    together = written(prompts)
    assert together == [written([prompt])[0] for prompt in prompts]
    assert len({text for texts in together for text in texts}) > 4


def test_chosen_tasks_of_icl_get_the_examples_they_get_among_all(evaluate):
    flags = ("--retrieval_method", "same-task-random", "--few_shot", 2)
    everything = {row["query_id"]: row["retrieved"] for row in evaluate("icl", *flags)[0]}
    some = evaluate("icl", *flags, "--task_names", "natural_questions")[0]
    assert some
    assert all(row["retrieved"] == everything[row["query_id"]] for row in some)


def test_random_retrieval_gives_a_row_the_same_whatever_the_others(evaluate, data_root, tmp_path):
    everything = evaluate("qa", "--retrieval_method", "random")[0]
    rows = read_rows(data_root / "qa/nq/test.json")
    path = write_rows(tmp_path / "some.json", rows[3:5])
    some = evaluate("qa", "--retrieval_method", "random", "--eval_data", path)[0]
    assert [row["retrieved"] for row in some] == [row["retrieved"] for row in everything[3:5]]
    assert len({tuple(row["retrieved"]) for row in everything}) == len(everything)
    other = evaluate("qa", "--retrieval_method", "random", "--seed", 7)[0]
    assert [row["retrieved"] for row in other] != [row["retrieved"] for row in everything]


def test_keys_are_cut_on_the_side_that_one_asks_for(evaluate, data_root, models, tmp_path):  # noqa: F811
    row = {**read_rows(data_root / "qa/nq/test.json")[0], "key": ["first " + "word " * 200 + "last"]}
    path = write_rows(tmp_path / "rows.json", [row])
    model, tokenizer = loaded(models["llama"])
    for side, kept in (("right", slice(None, -1)), ("left", slice(1, None))):
        flags = ("--eval_data", path, "--corpus", "", "--few_shot", 0, "--key_num", 1, "--max_new_tokens", 8)
        flags += ("--context_max_length", 300, "--truncation_side", side)
        (output,), _, _ = evaluate("qa", *flags)
        ids = tokenizer(row["key"][0], add_special_tokens=False)["input_ids"]
        while True:
            text = f"Knowledge: {tokenizer.decode(ids)}\n\nQuestion: {row['query']}\nAnswer: "
            if len(reference.head_tokens(tokenizer, text)) + 8 <= 300:
                break
            ids = ids[kept]
        assert output["output"] == [reference.greedy(model, tokenizer, text, 8)]


@pytest.mark.parametrize("task", ["qa", "mmlu", "popqa", "icl", "qrecc", "msc", "lrlm", "tool"])
def test_instructions_need_no_folder_of_a_known_name(evaluate, data_root, tmp_path, task):
    rows = read_rows(data_root / default_flags(task)["eval_data"].removeprefix("llm-embedder:"))[:2]
    path = write_rows(tmp_path / "anywhere.json", rows)
    flags = ("--eval_data", path, "--version", "llm-embedder", "--add_instruction", "True", *SMALL[task])
    _, record, _ = evaluate(task, *flags, "--query_max_length", 110)
    assert record["arguments"]["task"] in ("qa", "icl", "convsearch", "chat", "lrlm", "tool")


def test_rows_without_a_past_are_counted(evaluate, data_root, tmp_path):
    first, *others = read_rows(data_root / "chat/msc/test.json")
    path = write_rows(tmp_path / "rows.json", [{**first, "history": []}, *others])
    outputs, record, printed = evaluate("msc", "--eval_data", path, "--retrieval_method", "bm25")
    assert (outputs[0]["retrieved"], record["skipped"]) == ([], 0)
    assert "1 of 4 rows have no history to retrieve from" in printed


def test_training_rows_of_the_sample_have_scores_that_put_the_positive_first(data_root):
    """By hand: of the five words of the question one negative holds none, the other three."""
    for name in ("qa/nq/train.json", "convsearch/qrecc/train.concat.json"):
        for row in read_rows(data_root / name):
            positive, *others = row["teacher_scores"]
            assert len(others) == len(row["neg"]) >= 6
            assert positive == 0 > -1 >= max(others) >= min(others) >= -2
    negatives = ["It falls into the lake.", "No river flows through it."]
    assert sample_eval._scores("Which river flows through Isterelund?", negatives) == [0, -2, -1.4]


def test_hits_are_loaded_for_the_retriever_that_found_them(evaluate):
    found = evaluate("qa", "--retrieval_method", "bm25")[0]
    again = evaluate("qa", "--retrieval_method", "bm25", "--load_result")[0]
    assert [row["retrieved"] for row in again] == [row["retrieved"] for row in found]
    assert "no such file" in evaluate("qa", "--retrieval_method", "oracle", "--load_result", expect=2)
    printed = evaluate("qa", "--retrieval_method", "bm25", "--k1", 1.5, "--load_result", expect=2)
    assert "was made with another retriever (k1 0.82, not 1.5)" in printed
    more = ("--hits", 20, "--key_num", 15)
    assert "was made with --hits 10, and 20 are asked for" in evaluate(
        "qa", "--retrieval_method", "bm25", "--load_result", *more, expect=2
    )


def test_hits_of_a_dense_retriever_are_known_by_its_settings_and_files(evaluate, tiny_bert, tmp_path):
    own = shutil.copytree(tiny_bert, tmp_path / "own")
    flags = ("--query_encoder", own, "--load_result")
    evaluate("qa", *flags[:2])
    evaluate("qa", *flags)
    assert "(query_max_length 48, not 40)" in evaluate("qa", *flags, "--query_max_length", 40, expect=2)
    (own / "config.json").touch()
    assert "(other files of the encoder)" in evaluate("qa", *flags, expect=2)
    (tmp_path / "out" / path_name(str(own)) / "test.result.json.origin").unlink()
    assert "may be of any retriever" in evaluate("qa", *flags, expect=2)
    missing = ("--query_encoder", tmp_path / "none" / "such")
    assert "cannot load the encoder" in evaluate("qa", *missing, expect=2)


def test_new_hits_are_never_taken_for_the_old_ones(evaluate, monkeypatch, tmp_path):
    """Whenever writing them ends early: the old ones and what they are of stay together, or nobody knows them."""
    evaluate("qa", "--retrieval_method", "random")
    result, origin = (tmp_path / f"out/random/test.result.json{end}" for end in ("", ".origin"))
    old = result.read_bytes(), origin.read_bytes()

    def fail(*args, **_):
        raise UserError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("src.retrieval.ranking.evaluate.result_lines", fail)
        evaluate("qa", "--retrieval_method", "random", "--seed", 7, expect=2)
    assert (result.read_bytes(), origin.read_bytes()) == old
    with monkeypatch.context() as patch:
        patch.setattr("src.utils.files.os.replace", fail)
        evaluate("qa", "--retrieval_method", "random", "--seed", 7, expect=2)
    assert (result.read_bytes(), origin.exists()) == (old[0], False)


def test_hits_are_loaded_for_the_data_that_they_were_found_in(evaluate, data_root, tmp_path):
    flags = ("--retrieval_method", "bm25", "--load_result")
    evaluate("qa", "--retrieval_method", "bm25")
    corpus = read_rows(data_root / "qa/nq/corpus.json")
    path = write_rows(tmp_path / "corpus.json", corpus[::-1])
    assert "was made with another corpus" in evaluate("qa", *flags, "--corpus", path, expect=2)
    rows = [{**row, "query": "else?"} for row in read_rows(data_root / "qa/nq/test.json")]
    path = write_rows(tmp_path / "test.json", rows)
    assert "was made with other queries" in evaluate("qa", *flags, "--eval_data", path, expect=2)


def test_metrics_of_retrieval_need_a_corpus(evaluate, data_root, tmp_path):
    rows = [{**row, "key": ["a passage"]} for row in read_rows(data_root / "convsearch/qrecc/test.concat.json")]
    path = write_rows(tmp_path / "rows.json", rows)
    flags = ("--eval_data", path, "--corpus", "", "--do_generate", "--max_new_tokens", 2, "--key_num", 1)
    _, record, _ = evaluate("qrecc", *flags)
    assert set(record["metrics"]) == {"rouge_l"}
    assert record["retriever"] == "given-keys"


def test_texts_of_retrieved_chunks_are_saved(evaluate):
    outputs, _, _ = evaluate("lrlm", "--retrieval_method", "bm25", *LRLM, "--debug_retrieval")
    for output in outputs[:2]:
        assert len(output["retrieved_texts"]) == sum(map(len, output["retrieved"])) > 0
        assert all(output["retrieved_texts"])


# --- bad input ------------------------------------------------------------------------------------------------------


def changed(rows, **fields):
    """Rows with other fields; None takes a field away."""
    return [{name: value for name, value in {**row, **fields}.items() if value is not None} for row in rows]


@pytest.mark.parametrize(
    ("task", "file", "fields", "said"),
    [
        ("popqa", "qa/popqa/test.json", {"possible_answers": None}, "'possible_answers' is missing"),
        ("popqa", "qa/popqa/test.json", {"prop_id": "22"}, "'prop_id' must be the number of the relation, found '22'"),
        ("qa", "qa/nq/test.json", {"answers": []}, "'answers' needs 1 or more strings, found none"),
        ("mmlu", "qa/mmlu/test.json", {"subject": " "}, "'subject' is ' ': name a subject"),
        ("mmlu", "qa/mmlu/test.json", {"subject": "Accuracy"}, "'subject' is 'Accuracy': name a subject"),
        ("mmlu", "qa/mmlu/test.json", {"choices": ["a"]}, "'choices' needs 2 or more strings, found 1"),
        ("mmlu", "qa/mmlu/test.json", {"choices": ["a"] * 27}, "'choices' has 27 options, and there are 26 letters"),
        ("mmlu", "qa/mmlu/test.json", {"choices": ["a", "b"], "answer": 2}, "right option, 0 to 1, found 2"),
        ("mmlu", "qa/mmlu/test.json", {"answer": 4}, "the number of the right option, 0 to 3, found 4"),
        (
            "icl",
            "icl/icl/test.json",
            {"task_name": "sentiment"},
            "task_name 'sentiment' is no name of a task, or that of",
        ),
        ("icl", "icl/icl/test.json", {"task_name": "average"}, "task_name 'average' is no name of a task"),
        (
            "icl",
            "icl/icl/test.json",
            {"task_name": "chess", "metric": "bleu"},
            "'metric' is 'bleu': choose from accuracy",
        ),
        ("icl", "icl/icl/test.json", {"options": ["x", "y"]}, "is none of the options ['x', 'y']"),
        ("msc", "chat/msc/test.json", {"history": None}, "'history' must be a list of past turns, found NoneType"),
        ("lrlm", "lrlm/books3/test.json", {"text": None}, "'text' is missing"),
        ("msc", "chat/msc/test.json", {"answers": [" "]}, "'answers'[0] is blank"),
        ("popqa", "qa/popqa/test.json", {"possible_answers": ["x", ""]}, "'possible_answers'[1] is blank"),
        ("icl", "icl/icl/test.json", {"options": ["x", ""], "answers": ["x"]}, "'options'[1] is blank"),
        (
            "icl",
            "icl/icl/test.json",
            {"task_name": "multirc", "options": ["x", "y", "z"], "answers": ["x"]},
            "'options' needs two, of which the second is the positive class, found 3",
        ),
    ],
)
def test_rows_with_problems_are_named(evaluate, data_root, tmp_path, task, file, fields, said):
    path = write_rows(tmp_path / "bad.json", changed(read_rows(data_root / file), **fields))
    printed = evaluate(task, "--eval_data", path, "--retrieval_method", "no", expect=2)
    assert f"{path}:1" in printed
    assert said in printed


@pytest.mark.parametrize(
    ("task", "flags", "said"),
    [
        ("qa", ("--model_name_or_path", "/nowhere"), "/nowhere"),
        ("qa", ("--retrieval_method", "recent"), "--retrieval_method 'recent' is unknown: choose from dense"),
        ("qa", ("--top_p", 0.5), "--top_p changes nothing unless answers are sampled: add --do_sample"),
        ("qa", ("--train_data", "/nowhere.json"), "no such file: /nowhere.json"),
        ("qa", ("--key_num", 11), "only --hits 10 keys are retrieved"),
        ("qa", ("--eos_token_id", 9999), "--eos_token_id 9999: the LM's tokenizer has the tokens 0 to"),
        ("qa", ("--metrics", "collate_score"), "--metrics collate_score scores candidates of training"),
        ("qa", ("--save_name", "../x"), "--save_name '../x' becomes a part of file names"),
        ("qa", ("--log_path", "/proc/none/x.log"), "--log_path: cannot write to /proc"),
        ("qa", ("--use_chat_template",), "--use_chat_template: the tokenizer has none"),
        ("qa", ("--context_max_length", 20), "no row can be asked, since they do not fit into --context_max_length"),
        ("icl", ("--task_names", "chess"), "--task_names 'chess' is unknown"),
        ("icl", ("--task_names", "rte"), "has no row of these"),
        ("lrlm", (*LRLM, "--add_sep", 5, 9999), "--add_sep 9999: the LM's tokenizer has the tokens 0 to"),
        ("lrlm", ("--context_window_size", 100), "must be above --target_length 1024"),
        ("lrlm", ("--context_window_size", 4000), "the LM takes 4096 tokens, and windows need"),
        ("lrlm", (*LRLM, "--target_length", 5000, "--context_window_size", 6000), "lower --context_window_size"),
    ],
)
def test_flags_that_cannot_be(evaluate, task, flags, said):
    assert said in evaluate(task, *flags, expect=2)


def test_a_row_that_does_not_fit_is_left_out_and_counted(evaluate, data_root, tmp_path):
    rows = read_rows(data_root / "qa/nq/test.json")
    rows[2]["query"] = "long " * 500
    path = write_rows(tmp_path / "rows.json", rows)
    outputs, record, printed = evaluate("qa", "--eval_data", path, "--retrieval_method", "no", "--few_shot", 0)
    assert record["skipped"] == 1
    assert outputs[2]["output"] is None
    assert (
        f"1 of 8 rows are left out, since they do not fit into --context_max_length; the first is {path}:3" in printed
    )


def test_a_beir_folder_brings_its_corpus_in_place_of_the_default_one(tmp_path, monkeypatch):
    (tmp_path / "qrels").mkdir()
    write_rows(tmp_path / "corpus.jsonl", [{"_id": "a", "text": "one"}, {"_id": "b", "text": "two"}])
    write_rows(tmp_path / "queries.jsonl", [{"_id": "q", "text": "which?"}])
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tb\t1\n")
    flags = ["--eval_data", f"beir:{tmp_path}", "--retrieval_method", "random", "--key_template", "{text}"]
    flags += ["--metrics", "recall", "--cutoffs", "2", "--output_dir", tmp_path / "out", "--hits", 2]
    flags += ["--log_path", tmp_path / "log.jsonl"]
    monkeypatch.setattr(sys, "argv", ["eval_tool", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        run_entry(eval_tool.main)
    assert not stop.value.code
    (result,) = read_rows(tmp_path / "log.jsonl")
    assert result["metrics"] == {"recall@2": 1.0}
    args = EvalRetrievalArgs(eval_data=f"beir:{tmp_path}", corpus="default.json")
    assert with_corpus(args, frozenset(["eval_data"])).searched_corpus == f"beir:{tmp_path}"
    assert with_corpus(args, frozenset(["eval_data", "corpus"])).searched_corpus == "default.json"
