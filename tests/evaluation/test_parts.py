"""Parts of the LM evaluations: prompts and their examples, where answers end, and what processes do of one another."""

# ruff: noqa: F811 (arguments are fixtures, some of them imported)
from __future__ import annotations

import json
import signal
import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    BartConfig,
    BartForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from src.lm.model import LanguageModel
from tests.conftest import VOCABULARY, make_tokenizer
from tests.evaluation.test_tasks import data_root, evaluate, forked, loaded  # noqa: F401  (three fixtures)
from tests.helpers import read_rows, write_rows
from tests.lm.test_score import models  # noqa: F401  (a fixture)
from tests.reference import evaluation as reference


def save(model, folder) -> None:
    """Save a random LM, with weights so large that it tells one prompt from another."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def writer(tmp_path_factory):
    """Folder of a random LM that writes lines; its tokens, characters and those beside a newline, keep a text as it is.

    Token 0 ends a text.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = [f"{letter}\n" for letter in string.ascii_lowercase + ".?"]
    ends += [f"\n{letter}" for letter in string.ascii_uppercase + "\n"]
    trainer = trainers.BpeTrainer(min_frequency=2, max_token_length=2, special_tokens=["<end>"])
    tokenizer.train_from_iterator([string.printable, *ends, *ends], trainer)
    folder = tmp_path_factory.mktemp("writer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 4096}
    config = LlamaConfig(**sizes, bos_token_id=None, eos_token_id=0)
    save(LlamaForCausalLM(config), folder)
    return str(folder)


@pytest.fixture
def asked(monkeypatch):
    """Prompts that the LM is asked to continue, with what it writes, before anything is cut off."""
    real = LanguageModel.continuations
    seen: list[tuple[str, str]] = []

    def watched(self, prompts, *rest):
        texts = real(self, prompts, *rest)
        seen.extend(zip(map(self.tokenizer.decode, prompts), texts, strict=True))
        return texts

    monkeypatch.setattr(LanguageModel, "continuations", watched)
    return seen


# --- where an answer ends -------------------------------------------------------------------------------------------

ALONE = ("--retrieval_method", "no", "--few_shot", 0)


def questions(data_root) -> list[str]:
    """The prompts of eval_qa with a question alone."""
    return [f"Question: {row['query']}\nAnswer:" for row in read_rows(data_root / "qa/nq/test.json")]


# 13 is the newline's number in the vocabulary of Llama 2 alone; here it is a dash's.
@pytest.mark.parametrize("flags", [(), ("--eos_token_id", 13)])
def test_an_answer_ends_with_its_line(evaluate, asked, data_root, writer, flags):
    outputs, _, _ = evaluate("qa", *ALONE, *flags, lm=writer)
    model, tokenizer = loaded(writer)
    assert tokenizer.decode([13]) == "-"
    lines = set()
    for text, output in zip(questions(data_root), outputs, strict=True):
        ids = reference.written(model, tokenizer, text, 32, lambda ids: ids[-1] == 0 or "\n" in tokenizer.decode(ids))
        line = tokenizer.decode(ids, skip_special_tokens=True)
        # Nothing is written after it that would only be cut off.
        assert dict(asked)[text] == line
        assert output["output"] == [line.split("\n")[0].strip()]
        lines.add(line)
    assert len(lines) > 3
    # Some end in a token that begins the next line, and some go on behind a dash.
    assert any("\n" in line[:-1] for line in lines)
    assert any("-" in line.split("\n")[0] for line in lines)


def test_an_answer_ends_with_a_token_of_ones_own(evaluate, data_root, writer):
    model, tokenizer = loaded(writer)
    texts = questions(data_root)

    def written(*ends: int) -> list[list[int]]:
        return [reference.written(model, tokenizer, text, 32, lambda ids: ids[-1] in ends) for text in texts]

    # It comes in a later line of some answer for the first time.
    end = next(
        token
        for ids in written(0)
        for place, token in enumerate(ids[:20])
        if "\n" in tokenizer.decode(ids[:place]) and "\n" not in tokenizer.decode([token]) and token not in ids[:place]
    )
    outputs, _, _ = evaluate("qa", *ALONE, "--eos_token_id", end, lm=writer)
    found = [output["output"] for output in outputs]
    assert found == [[tokenizer.decode(ids, skip_special_tokens=True).strip()] for ids in written(0, end)]
    assert any("\n" in text and text.endswith(tokenizer.decode([end])) for (text,) in found)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BartForCausalLM, BartConfig(d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64)),
        (RwkvForCausalLM, RwkvConfig(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)),
    ],
)
def test_models_that_read_padding_on_the_left_write_what_they_write_alone(evaluate, data_root, tmp_path, kind, config):
    folder = tmp_path / "lm"
    torch.manual_seed(0)
    config.update({"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3})
    save(kind(config), folder)
    make_tokenizer().save_pretrained(folder)
    outputs, _, _ = evaluate("qa", *ALONE, "--max_new_tokens", 12, "--lm_batch_size", 64, lm=str(folder))
    model, tokenizer = loaded(str(folder))
    wanted = [[reference.greedy(model, tokenizer, text, 12)] for text in questions(data_root)]
    assert [output["output"] for output in outputs] == wanted
    assert len({text for (text,) in wanted}) > 3


# --- examples -------------------------------------------------------------------------------------------------------


def test_examples_of_qa_are_drawn_by_seed(evaluate, asked, data_root, writer, tmp_path):
    dev = [{**row, "answers": [*row["answers"], "else"]} for row in read_rows(data_root / "qa/nq/dev.json")]
    halves = [write_rows(tmp_path / f"{name}.json", rows) for name, rows in (("a", dev[:20]), ("b", dev[20:]))]
    corpus = read_rows(data_root / "qa/nq/corpus.json")
    pool = [f"Question: {row['query']}\nAnswer: {row['answers'][0]}" for row in dev]

    def shots(*flags) -> list[str]:
        asked.clear()
        given = ("--retrieval_method", "oracle", "--key_num", 1, "--few_shot", 4, "--train_data", *halves)
        evaluate("qa", *given, "--max_new_tokens", 1, *flags, lm=writer)
        prompts = [prompt for prompt, _ in asked]
        _, *found, _ = prompts[0].split("\n\n")
        wanted = [
            "\n\n".join(
                [f"Knowledge:  {corpus[row['pos_index'][0]]['text']}", *found, f"Question: {row['query']}\nAnswer:"]
            )
            for row in read_rows(data_root / "qa/nq/test.json")
        ]
        assert sorted(prompts) == sorted(wanted)
        return found

    found, other = shots(), shots("--seed", 7)
    for own in (found, other):
        assert len(set(own)) == 4
        assert set(own) <= set(pool)
    # Of both files, and not in their order.
    places = sorted(pool.index(shot) for shot in [*found, *other])
    assert places[0] < 20 <= places[-1]
    assert set(found) != set(other)
    assert shots("--save_name", "again") == found


RELATIONS = [22, 91, 97, 106, 164, 182, 218, 257, 292, 422, 472, 484, 526, 533, 560, 639]
FOREIGN = 1


def test_examples_of_popqa_are_of_all_other_relations(evaluate, asked, writer, tmp_path):
    rows = []
    for relation in (*RELATIONS[::-1], FOREIGN):
        for number in range(3):
            row = {"query": f"Who is {number} of {relation}?", "prop_id": relation}
            # As a list, or as PopQA has them; the first is right where there is no 'obj'.
            row["possible_answers"] = [f"No {number}.", "another"] if number else json.dumps(["No 0.", "another"])
            rows.append({**row, "obj": "No 2 it is"} if number == 2 else row)
    path = write_rows(tmp_path / "rows.json", rows)
    shown = {f"Q: {row['query']} A: {row.get('obj', 'No 1.')}": row for row in rows if row["query"][7] != "0"}
    shown |= {f"Q: {row['query']} A: No 0.": row for row in rows if row["query"][7] == "0"}

    def examples(*flags) -> dict[str, list[str]]:
        asked.clear()
        evaluate("popqa", "--eval_data", path, "--retrieval_method", "no", "--max_new_tokens", 1, *flags, lm=writer)
        parts = [prompt.split("\n\n") for prompt, _ in asked]
        return {question: own for *own, question in parts}

    found = examples()
    assert found.keys() == {f"Q: {row['query']} A:" for row in rows}
    for row in rows:
        relations = [shown[example]["prop_id"] for example in found[f"Q: {row['query']} A:"]]
        assert relations == [relation for relation in RELATIONS if relation != row["prop_id"]][:15]
    drawn = {example for own in found.values() for example in own}
    assert len(drawn) == 16
    # Any of a relation's rows may be drawn.
    assert {shown[example]["query"][7] for example in drawn} == {"0", "1", "2"}
    assert examples("--save_name", "again") == found
    assert examples("--seed", 7) != found
    assert all(own == found[question][:2] for question, own in examples("--few_shot", 2).items())
    # As many of each as go into the number.
    for number, each in ((29, 1), (30, 2), (45, 3)):
        many = examples("--few_shot", number, "--context_max_length", 4000)
        for row in rows:
            own = many[f"Q: {row['query']} A:"]
            assert len(set(own)) == len(own)
            others = [relation for relation in RELATIONS if relation != row["prop_id"] for _ in range(each)]
            assert [shown[example]["prop_id"] for example in own] == others[:number]


def test_examples_of_own_relations(evaluate, asked, writer, tmp_path):
    """Where no row is of a relation of PopQA's: those of the other relations, in the order of their numbers."""
    rows = [{"query": f"Who is of {n}?", "prop_id": n, "possible_answers": [f"No {n}."]} for n in (9, 7, 8)]
    path = write_rows(tmp_path / "rows.json", rows)
    flags = ("--eval_data", path, "--retrieval_method", "no", "--max_new_tokens", 1, "--few_shot", 2)
    evaluate("popqa", *flags, lm=writer)
    found = {own[-1]: own[:-1] for own in (prompt.split("\n\n") for prompt, _ in asked)}
    shown = {n: f"Q: Who is of {n}? A: No {n}." for n in (7, 8, 9)}
    wanted = {f"Q: Who is of {n}? A:": [text for other, text in shown.items() if other != n] for n in shown}
    assert found == wanted


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(forked, data_root, models, tiny_bert, tmp_path):
    """Run a script like an evaluation of its own, with the flags that `evaluate` gives."""

    def call(source: str, processes: int, *flags):
        script = tmp_path / "eval_own.py"
        script.write_text(source)
        command = ["--data_root", data_root, "--cpu", "--query_encoder", tiny_bert, "--add_instruction", "False"]
        command += ["--query_max_length", 48, "--key_max_length", 100, "--model_name_or_path", models["llama"]]
        command += ["--output_dir", tmp_path / "out", "--log_path", tmp_path / "log" / "own.log"]
        return forked(str(script), [*command, *flags], processes, timeout=60, grace=20)

    return call


REFUSES = """
from evaluation.eval_msc import MSC
from evaluation.runner.run import start
from src.utils import distributed
from src.utils.errors import UserError


class Refused(MSC):
    def request(self, row, found, examples):
        # The oracle asks with it too, while it retrieves.
        if distributed.rank() == 1:
            raise UserError("rows.json: a row is refused")
        return super().request(row, found, examples)

    def retrieve(self):
        print("retrieving", flush=True)
        retrieved = super().retrieve()
        print("answering", flush=True)
        return retrieved


if __name__ == "__main__":
    start(Refused)
"""


@pytest.mark.parametrize(("method", "reached"), [("oracle", "retrieving"), ("recent", "answering")])
def test_an_error_of_one_process_ends_all(start, tmp_path, method, reached):
    codes, printed = start(REFUSES, 2, "--retrieval_method", method)
    assert codes == [2, 2], printed
    assert printed.count("error: rows.json: a row is refused") == printed.count("error:") == 1
    assert (("retrieving" in printed), ("answering" in printed)) == (True, reached == "answering")
    assert not list((tmp_path / "out").glob("*.json"))


KILLED = """
import os
import signal

from evaluation.runner.run import start
from evaluation.eval_qa import QA
from src.lm.model import LanguageModel

write = LanguageModel.continuations
batches = []


def continuations(self, prompts, *rest):
    batches.append(len(prompts))
    if len(batches) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, prompts, *rest)


LanguageModel.continuations = continuations
if __name__ == "__main__":
    start(QA)
"""


def test_what_two_killed_processes_were_told_one_does_not_ask_again(evaluate, asked, start, tmp_path):
    flags = ("--retrieval_method", "random", "--key_num", 1, "--few_shot", 1, "--lm_batch_size", 1)
    flags += ("--context_max_length", 400)
    whole, record, _ = evaluate("qa", *flags)
    codes, printed = start(KILLED, 2, *flags, "--save_name", "again")
    assert codes == [-signal.SIGKILL] * 2, printed
    kept = [path.read_text().split("\n") for path in (tmp_path / "out").rglob("*.parts/*.jsonl")]
    told = [sum(len(json.loads(line)["responses"]) for line in lines if line) for lines in kept]
    total = len(asked)
    assert len(told) == 2
    assert 0 < sum(told) < total
    asked.clear()
    resumed, other, _ = evaluate("qa", *flags, "--save_name", "again")
    assert len(asked) == total - sum(told)
    assert resumed == whole
    assert other["metrics"] == record["metrics"]


@pytest.mark.parametrize("task", ["msc", "lrlm"])
def test_random_keys_are_the_same_over_processes(evaluate, start, tmp_path, task):
    flags = ("--retrieval_method", "random", "--context_window_size", 96, "--target_length", 48, "--chunk_size", 16)
    wanted = [output["retrieved"] for output in evaluate(task, *flags)[0]]
    source = f"from evaluation.runner.run import start\nfrom evaluation.eval_{task} import {task.upper()} as kind\n\n"
    source += "start(kind)\n"
    codes, printed = start(source, 2, *flags, "--save_name", "two")
    assert codes == [0, 0], printed
    (path,) = (tmp_path / "out").rglob("*.two.json")
    assert [output["retrieved"] for output in read_rows(path)] == wanted
