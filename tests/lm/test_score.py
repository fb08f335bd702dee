"""run_lm_score.py against a slow reference, on tiny models and real rows; resume, processes, bad input."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import run_lm_score
from scripts.sample import lm as sample_lm
from src.lm.args import LMScoreArgs
from src.lm.likelihood import collect_work, cut_work
from src.lm.model import LanguageModel
from src.lm.prompts import LLAMA_INST, PromptEncoder, PromptTokens, score_request
from src.lm.response_store import Response, ResponseStore
from src.lm.score import ScoreData, score_units, write_scored
from src.retrieval.data.rows import check_lm_row
from src.utils.cli import run as run_entry
from src.utils.errors import UserError
from src.utils.jsonl import open_jsonl
from tests.conftest import VOCABULARY, make_tokenizer
from tests.helpers import TASKS, TOY_ROWS, read_rows, run, write_rows
from tests.reference import lm_score as reference

SIZE = {"vocab_size": len(VOCABULARY)}
KINDS = ("llama", "gpt2", "opt", "t5")


def make_model(kind: str):
    torch.manual_seed(1)
    if kind == "llama":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**SIZE, **sizes, intermediate_size=64, max_position_embeddings=4096))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=4096))
    elif kind == "opt":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
        config = OPTConfig(**SIZE, **sizes, word_embed_proj_dim=32, max_position_embeddings=4096)
        model = OPTForCausalLM(config)
    else:
        config = T5Config(**SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
        model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Random weights of the usual size hardly tell one prompt from another.
            if parameter.dim() > 1:
                parameter.mul_(8 if kind != "t5" else 1.5)
    return model.eval()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny random LMs with a tokenizer of characters."""
    folders = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        make_model(kind).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


def load(folder):
    cls = AutoModelForSeq2SeqLM if Path(folder).name.startswith("t5") else AutoModelForCausalLM
    return cls.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def toy(task: str, candidates: int = 3, rows: int = 2) -> list[dict]:
    """Short real rows of a task, with answers where the data has none."""
    found = read_rows(TOY_ROWS / f"{task}.json")[:rows]
    for row in found:
        row.setdefault("answers", ["yes, it is so"])
        row["query"] = row["query"][:150]
        for field in ("pos", "neg", "history"):
            if field in row:
                row[field] = [text[:100] for text in row[field][:candidates]]
        row["answers"] = [answer[:60] for answer in row["answers"]]
        row.pop("teacher_scores", None)
    return found


def encode(encoder, task, query, keys, answer) -> list:
    """Tokens of the prompt with each key."""
    found = encoder.encode([score_request(task, query, key, answer) for key in keys])
    return [own[0] if own is not None else None for own in found]


def own_candidates(row: dict) -> list[str]:
    return row.get("history") or [*row["pos"], *row["neg"]]


@pytest.fixture
def score(monkeypatch, capsys, caplog):
    """Run the entry point in this process and return what it printed."""
    caplog.set_level("INFO")

    def call(*flags, expect: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["run_lm_score", "--cpu", "--save_name", "x", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            run_entry(run_lm_score.main)
        printed = capsys.readouterr().err + caplog.text
        assert int(stop.value.code or 0) == expect, printed
        return printed

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_the_slow_reference_on_rows_of_all_tasks(kind, models, score, tmp_path, caplog):
    model, tokenizer = load(models[kind])
    rows = [row for task in TASKS for row in toy(task)]
    data = write_rows(tmp_path / "rows.json", rows)
    ways = [("left", 1, "auto"), ("left", 64, "auto"), ("right", 64, "auto")]
    ways += [("left", 64, True), ("right", 1, True)] if kind != "t5" else []
    for side, batch, packed in ways:
        flags = ["--padding_side", side, "--lm_batch_size", batch, "--answer_select", "first"]
        caplog.clear()
        printed = score("--eval_data", data, "--model_name_or_path", models[kind], *flags, "--padding_free", packed)
        assert ("reads texts without padding" in printed) == (packed is True)
        for row, scored in zip(rows, read_rows(tmp_path / "rows.scored.x.json"), strict=True):
            assert {name: value for name, value in scored.items() if name != "teacher_scores"} == row
            wanted = [
                reference.score(model, tokenizer, row["task"], row, key, row["answers"][0])
                for key in own_candidates(row)
            ]
            np.testing.assert_allclose(scored["teacher_scores"], wanted, atol=1e-5, err_msg=f"{row['task']} {side}")
    assert not (tmp_path / "rows.scored.x.json.parts").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("select", ["best", "mean"])
def test_several_answers_share_their_prompt(kind, select, models, score, tmp_path):
    model, tokenizer = load(models[kind])
    rows = toy("qa", rows=3)
    answers = ["a", "the second answer", "42!"]
    for row in rows[:2]:
        row["answers"] = answers
    flags = ["--eval_data", write_rows(tmp_path / "rows.json", rows), "--model_name_or_path", models[kind]]
    score(*flags, "--answer_select", select)
    for row, scored in zip(rows, read_rows(tmp_path / "rows.scored.x.json"), strict=True):
        table = [
            [reference.score(model, tokenizer, "qa", row, key, answer) for answer in row["answers"]]
            for key in own_candidates(row)
        ]
        wanted = np.max(table, 1) if select == "best" else np.mean(table, 1)
        np.testing.assert_allclose(scored["teacher_scores"], wanted, atol=1e-5)


def test_a_tokenizer_without_padding_scores_alike(models, score, tmp_path):
    folder = tmp_path / "lm"
    make_model("llama").save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    data = write_rows(tmp_path / "rows.json", toy("qa"))
    found = []
    for model in (models["llama"], folder):
        score("--eval_data", data, "--model_name_or_path", model)
        found.append([row["teacher_scores"] for row in read_rows(tmp_path / "rows.scored.x.json")])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_instruction_marks_go_around_the_prompt():
    encoder = PromptEncoder(make_tokenizer(), 400, 100, frame=LLAMA_INST)
    text = [make_tokenizer().decode(tokens.prompt) for tokens in encode(encoder, "icl", "q", ["k"], "w")]
    assert text == ["[CLS] [ inst ] k q [ / inst ]"]
    (plain,) = encode(encoder, "lrlm", "q", ["k"], "w")
    assert "inst" not in make_tokenizer().decode(plain.prompt)


def test_random_answer_depends_on_seed_and_row_only(models, score, tmp_path):
    rows = [{"query": "q", "pos": ["k"], "neg": [], "answers": [f"answer {i}" for i in range(9)], "task": "qa"}] * 12
    data = write_rows(tmp_path / "rows.json", rows)
    found = []
    for seed in (1, 1, 2):
        score("--eval_data", data, "--model_name_or_path", models["llama"], "--seed", seed)
        found.append([row["teacher_scores"][0] for row in read_rows(tmp_path / "rows.scored.x.json")])
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) > 3


def test_rows_with_tokens_are_scored_by_them(models, score, tmp_path):
    model, _ = load(models["gpt2"])
    row = {"query": "", "pos": [], "neg": ["ab", "c"], "task": "lrlm", "answers": []}
    # A field that is null is not there.
    plain = {**row, "score_inputs": None, "query": "q", "answers": ["a"]}
    score("--eval_data", write_rows(tmp_path / "plain.json", [plain]), "--model_name_or_path", models["gpt2"])
    row |= {
        "score_inputs": [[9, 8, 7, 6], [5]],
        "context_inputs": [11, 12],
        "query_inputs": [13],
        "answer_inputs": [14, 15],
    }
    flags = ["--eval_data", write_rows(tmp_path / "rows.json", [row]), "--model_name_or_path", models["gpt2"]]
    score(*flags, "--key_max_length", 3)
    (scored,) = read_rows(tmp_path / "rows.scored.x.json")
    assert scored.keys() == {"query", "pos", "neg", "task", "answers", "teacher_scores"}
    found = scored["teacher_scores"]
    wanted = [
        reference.likelihood_of(model, [9, 8, 7, 11, 12, 13, 14, 15], 6),
        reference.likelihood_of(model, [5, 11, 12, 13, 14, 15], 4),
    ]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    score(*flags, "--key_max_length", 3, "--truncation_side", "left")
    found = read_rows(tmp_path / "rows.scored.x.json")[0]["teacher_scores"]
    assert found[0] == pytest.approx(reference.likelihood_of(model, [8, 7, 6, 11, 12, 13, 14, 15], 6), abs=1e-5)
    score(*flags, "--context_max_length", 4)
    assert read_rows(tmp_path / "rows.scored.x.json") == [row], "what is not scored can be scored anew"


def test_a_long_key_is_cut_and_nothing_else():
    tokenizer = make_tokenizer()
    key = " ".join(map(str, range(10, 60)))
    for side, start, end in (("right", "1011", ""), ("left", "", "5859")):
        encoder = PromptEncoder(tokenizer, 40, 30, side)
        (tokens,) = encode(encoder, "chat", "qqq", [key], "www")
        assert len(tokens) <= 40
        text = tokenizer.decode([*tokens.prompt, *tokens.answer], skip_special_tokens=True).replace(" ", "")
        assert text.endswith("speaker1:qqqspeaker2:www")
        kept = text.removesuffix("speaker1:qqqspeaker2:www")
        assert kept in key.replace(" ", "")
        assert kept.startswith(start)
        assert kept.endswith(end)
    assert encode(PromptEncoder(tokenizer, 20, 30), "chat", "qqq", [key], "www") == [None]
    (short,) = encode(PromptEncoder(tokenizer, 400, 5), "icl", "q", [key], "w")
    assert len(short.prompt) == 1 + 5 + 1


def test_a_token_that_spans_the_end_of_the_prompt_belongs_to_the_answer():
    class Pairs:
        """Two letters a token, spaces kept."""

        def __call__(self, texts, add_special_tokens=True):
            if isinstance(texts, str):
                return {"input_ids": [ord(texts[0])]}
            return {"input_ids": [[hash(text[i : i + 2]) for i in range(0, len(text), 2)] for text in texts]}

    (tokens,) = encode(PromptEncoder(Pairs(), 100, 100), "lrlm", "abc", ["k"], "xyz")
    assert tokens == PromptTokens(tuple(map(hash, ("ka", "bc"))), tuple(map(hash, ("xy", "z"))))
    (tokens,) = encode(PromptEncoder(Pairs(), 100, 100), "lrlm", "abcd", ["k"], "xyz")
    assert tokens == PromptTokens(tuple(map(hash, ("ka", "bc"))), tuple(map(hash, ("dx", "yz"))))


def test_work_is_collected_once_and_cut_to_the_budget():
    rng = np.random.default_rng(0)
    pairs = [
        PromptTokens(tuple(rng.integers(0, 3, rng.integers(1, 6))), tuple(rng.integers(0, 2, rng.integers(1, 4))))
        for _ in range(300)
    ]
    work = collect_work(pairs)
    assert sum(len(own.answers) for own in work) == len(set(pairs))
    for side in ("left", "right"):
        batches = list(cut_work(work, 64, 200, 4, side))
        numbers = [number for batch in batches for own in batch for each in own.numbers for number in each]
        assert sorted(numbers) == list(range(300))
        for batch in batches:
            answers = {len(own.answers) for own in batch}
            assert len(answers) == 1
            longest = max(own.longest for own in batch)
            # Padded on the right, answers end at different columns, each of which has logits.
            longest += max(own.width for own in batch) - min(own.width for own in batch) if side == "right" else 0
            if len(batch) > 1:
                count = len(batch) * answers.pop()
                assert count * max(len(own.prompt) + own.longest for own in batch) <= 64
                assert count * longest * 4 <= 200


class Counted(np.ndarray):
    """Counts the elements that arithmetic on it goes through."""

    seen = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        Counted.seen += self.size
        plain = [np.asarray(value) if isinstance(value, Counted) else value for value in inputs]
        return getattr(ufunc, method)(*plain, **kwargs)


@pytest.mark.parametrize("answer_select", ["first", "mean"])
def test_work_grows_with_the_rows_and_no_faster(answer_select, models, tmp_path, monkeypatch):
    model = LanguageModel(*load(models["gpt2"]))
    encoder = PromptEncoder(model.tokenizer, 100, 100)
    monkeypatch.setattr("src.lm.score.UNIT_PAIRS", 8)
    monkeypatch.setattr("src.lm.likelihood.score_batch", lambda model, batch: instant(batch))

    def instant(batch):
        return {number: 0.0 for work in batch for own in work.numbers for number in own}

    def elements(size: int) -> int:
        folder = tmp_path / str(size)
        path = write_rows(folder / "rows.json", [GOOD] * size)
        data = ScoreData(open_jsonl(str(path), check_lm_row, "x"), None, answer_select)
        columns = data.rows.scan.columns
        columns.update({name: values.view(Counted) for name, values in columns.items() if values.dtype.kind == "i"})
        Counted.seen = 0
        store = ResponseStore(folder / "parts")
        store.open({})
        score_units(model, encoder, data, store, 100)
        write_scored(data, store, "teacher_scores", str(folder / "out.json"))
        seen = Counted.seen
        assert sum("teacher_scores" in row for row in read_rows(folder / "out.json")) == size
        return seen

    few = elements(40)
    assert few > 0
    assert elements(400) <= 10 * few


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_and_scores_nothing_twice(models, score, tmp_path, monkeypatch):
    rows = [row for task in ("qa", "chat", "icl") for row in toy(task, candidates=4, rows=4)]
    # The same pair twice in a row is scored once.
    rows[0]["neg"] = [*rows[0]["neg"], rows[0]["neg"][0]]
    data = write_rows(tmp_path / "rows.json", rows)
    flags = ["--eval_data", data, "--model_name_or_path", models["llama"], "--lm_batch_size", 1]
    score(*flags, "--save_name", "whole")
    seen: list[tuple] = []
    plain = LanguageModel.answer_scores

    def counted(self, prompts, answers):
        if len(seen) > 14 and not done:
            raise KilledError
        seen.extend((tuple(prompt), tuple(answer)) for prompt, answer in zip(prompts, answers, strict=True))
        return plain(self, prompts, answers)

    monkeypatch.setattr(LanguageModel, "answer_scores", counted)
    done: list[int] = []
    monkeypatch.setattr(sys, "argv", ["run_lm_score", "--cpu", "--save_name", "x", *map(str, flags)])
    with pytest.raises(KilledError):
        run_lm_score.main()
    parts = tmp_path / "rows.scored.x.json.parts"
    kept = sorted(parts.glob("*.jsonl"))
    assert kept
    assert not (tmp_path / "rows.scored.x.json").exists()
    before = len(seen)
    with open(kept[-1], "a") as file:
        file.write('\n{"responses": {"0": {"texts": [], "log_like')
    assert "stopped before them" in score(*flags, "--load_score")
    part = read_rows(tmp_path / "rows.scored.x.json")
    assert len(part) == len(rows)
    done.append(1)
    score(*flags)
    assert len(seen) > before
    assert len(seen) == len(set(seen))
    assert read_rows(tmp_path / "rows.scored.x.json") == read_rows(tmp_path / "rows.scored.whole.json")
    scored = read_rows(tmp_path / "rows.scored.x.json")[0]["teacher_scores"]
    assert scored[-1] == scored[len(rows[0]["pos"])]


def test_two_processes_give_what_one_gives(models, score, tmp_path, monkeypatch):
    rows = [row for task in TASKS for row in toy(task)]
    data = write_rows(tmp_path / "rows.json", rows * 30)
    flags = ["--eval_data", data, "--model_name_or_path", models["opt"], "--answer_select", "mean"]
    score(*flags)
    done = run(["run_lm_score.py", "--cpu", *map(str, flags), "--save_name", "two"], 2)
    assert done.returncode == 0, done.stderr
    one, two = (read_rows(tmp_path / f"rows.scored.{name}.json") for name in ("x", "two"))
    assert [row["query"] for row in one] == [row["query"] for row in two]
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(first["teacher_scores"], second["teacher_scores"], atol=1e-5)


def test_rows_that_do_not_fit_are_kept_unscored_or_stop_the_run(models, score, tmp_path):
    rows = toy("qa", rows=3)
    rows[1]["query"] = "q w " * 450
    rows[1]["teacher_scores"] = [0.0] * len(own_candidates(rows[1]))
    flags = ["--eval_data", write_rows(tmp_path / "rows.json", rows), "--model_name_or_path", models["llama"]]
    flags += ["--context_max_length", 600]
    printed = score(*flags, "--score_name", "llama")
    assert "1 rows are unscored" in printed
    assert "rows.json:2" in printed
    found = read_rows(tmp_path / "rows.scored.x.json")
    assert ["llama" in row for row in found] == [True, False, True]
    assert "teacher_scores" in found[1]
    score(*flags)
    assert "teacher_scores" not in read_rows(tmp_path / "rows.scored.x.json")[1]
    printed = score(*flags, "--strict", expect=2)
    assert "rows.json:2" in printed
    assert "--context_max_length" in printed


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_long_row_is_scored_as_it_is_unless_told_otherwise(kind, models, score, tmp_path):
    """As many tokens as the LM takes: 4,096, or any number where positions are relative."""
    model, tokenizer = load(models[kind])
    rows = [{**GOOD, "query": "q w " * 300, "pos": ["k " * 400]}, {**GOOD, "query": "q w " * 2500}]
    flags = ["--eval_data", write_rows(tmp_path / "rows.json", rows), "--model_name_or_path", models[kind]]
    score(*flags)
    found = read_rows(tmp_path / "rows.scored.x.json")
    wanted = [reference.score(model, tokenizer, "qa", rows[0], key, "c") for key in own_candidates(rows[0])]
    np.testing.assert_allclose(found[0]["teacher_scores"], wanted, atol=1e-5)
    assert ("teacher_scores" in found[1]) == (kind == "t5")
    score(*flags, "--context_max_length", 1024)
    cut, unfit = read_rows(tmp_path / "rows.scored.x.json")
    assert "teacher_scores" not in unfit
    assert abs(cut["teacher_scores"][0] - wanted[0]) > 1e-4
    assert cut["teacher_scores"][1] == pytest.approx(wanted[1], abs=1e-5)


TOKENS = {"score_inputs": [[1], [2]], "context_inputs": [], "query_inputs": [], "answer_inputs": [1]}
GOOD = {"query": "q", "pos": ["a"], "neg": ["b"], "answers": ["c"], "task": "qa"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": None}, "rows.json:2: field 'answers' is missing or empty"),
        ({"answers": []}, "rows.json:2: field 'answers' is missing or empty"),
        ({"answers": ["x", " "]}, "field 'answers'[1] is blank"),
        ({"task": "cooking"}, "rows.json:2: unknown task 'cooking'"),
        ({"task": None}, "rows.json:2: neither row nor path names a task"),
        ({"history": ["h"]}, "field 'pos' stands beside 'history'"),
        ({"neg": None}, "field 'neg' is missing"),
        ({"score_inputs": [[1]], "query_inputs": [1]}, "field 'context_inputs' is missing"),
        (TOKENS | {"score_inputs": [[1], ["x"]]}, "'score_inputs'[1][0] must be a token number"),
        (TOKENS | {"answer_inputs": []}, "field 'answer_inputs' is empty"),
        (TOKENS, "field 'score_inputs' stands in a row of task 'qa'"),
        (TOKENS | {"task": "lrlm", "score_inputs": [[1]]}, "'score_inputs' has 1 lists for 2 candidates"),
    ],
)
def test_bad_rows(row, message, score, tmp_path):
    data = write_rows(tmp_path / "rows.json", [GOOD, {**GOOD, **row}])
    assert message in score("--eval_data", data, expect=2)


def test_a_model_that_needs_padding_is_refused_when_told_to_do_without(models, score, tmp_path):
    data = write_rows(tmp_path / "rows.json", toy("qa"))
    flags = ("--eval_data", data, "--model_name_or_path", models["t5"], "--padding_free", True)
    assert "has a decoder beside the encoder: leave the flag out" in score(*flags, expect=2)


def test_bad_flags_and_models(models, score, tmp_path):
    data = write_rows(tmp_path / "rows.json", [GOOD])
    flags = ["--eval_data", data, "--model_name_or_path", models["llama"]]
    assert "--eval_data is needed" in score(expect=2)
    assert "choose from random, first" in score(*flags, "--answer_select", "last", expect=2)
    assert "is no name for scores" in score(*flags, "--score_name", "query", expect=2)
    assert "--load_score: there are no scores" in score(*flags, "--load_score", expect=2)
    assert "cannot load the language model" in score("--eval_data", data, "--model_name_or_path", tmp_path, expect=2)
    broken = tmp_path / "broken"
    broken.mkdir()
    make_tokenizer().save_pretrained(broken)
    LlamaConfig(**SIZE).save_pretrained(broken)
    assert "model.safetensors" in score("--eval_data", data, "--model_name_or_path", broken, expect=2)
    assert "--metrics has no effect" in score(*flags, "--metrics", "mrr")


def test_tokens_of_another_tokenizer_and_scores_that_are_no_numbers(models, score, tmp_path, monkeypatch):
    data = write_rows(
        tmp_path / "rows.json", [{**GOOD, "task": "lrlm"}, {**GOOD, **TOKENS, "query_inputs": [9999], "task": "lrlm"}]
    )
    flags = ["--eval_data", data, "--model_name_or_path", models["llama"]]
    assert f"rows.json:2: token 9999 is beyond the vocabulary of {len(VOCABULARY)}" in score(*flags, expect=2)
    write_rows(tmp_path / "rows.json", [GOOD])
    monkeypatch.setattr(LanguageModel, "answer_scores", lambda *_: np.array([np.nan, 1.0]))
    assert "rows.json:1: the language model gives a score that is no number" in score(*flags, expect=2)


def test_answers_after_prompts_of_several_lengths_in_one_batch(models):
    for kind in KINDS:
        model, tokenizer = load(models[kind])
        prompts = [[7, 8, 9], [10, 11, 12, 13, 14, 15, 16], [17]]
        answers = [[[20], [21, 22, 23]], [[24, 25], [26]], [[27, 28], [29, 30, 31]]]
        for side in ("left", "right"):
            found = LanguageModel(model, tokenizer, side).shared_answer_scores(prompts, answers)
            for prompt, own, scores in zip(prompts, answers, found, strict=True):
                if kind == "t5":
                    wanted = [reference.decoder_likelihood(model, prompt, answer) for answer in own]
                else:
                    wanted = [reference.likelihood_of(model, [*prompt, *answer], len(prompt)) for answer in own]
                np.testing.assert_allclose(scores, wanted, atol=1e-5)


def test_many_answers_are_split_over_batches():
    answers = [PromptTokens(tuple(range(10)), (n, n)) for n in range(40)]
    batches = list(cut_work(collect_work(answers), 60, 10**6, 50, "left"))
    assert [len(batch[0].answers) for batch in batches] == [5] * 8


def test_an_encoder_is_no_language_model(score, tmp_path):
    data = write_rows(tmp_path / "rows.json", [GOOD])
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    model.save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    assert "looks at later tokens" in score("--eval_data", data, "--model_name_or_path", tmp_path / "bert", expect=2)


def test_an_answer_without_tokens_leaves_its_row_unscored(models, score, tmp_path):
    data = write_rows(tmp_path / "rows.json", [GOOD, {**GOOD, "answers": ["\u200b"]}])
    for kind in ("llama", "t5"):
        printed = score("--eval_data", data, "--model_name_or_path", models[kind])
        assert "the answer has no tokens" in printed
        assert ["teacher_scores" in row for row in read_rows(tmp_path / "rows.scored.x.json")] == [True, False]


def test_scores_without_a_manifest_are_not_trusted(models, score, tmp_path):
    data = write_rows(tmp_path / "rows.json", [GOOD])
    parts = tmp_path / "rows.scored.x.json.parts"
    parts.mkdir()
    store = ResponseStore(parts)
    store.add(0, {str(pair): Response((), (-123.0,), (1,)) for pair in range(2)})
    store.manifest.unlink()
    score("--eval_data", data, "--model_name_or_path", models["llama"])
    assert -123.0 not in read_rows(tmp_path / "rows.scored.x.json")[0]["teacher_scores"]


@pytest.mark.parametrize(
    "other",
    [
        {"context_max_length": 500},
        {"key_max_length": 7},
        {"truncation_side": "left"},
        {"add_llama_inst": True},
        {"answer_select": "first"},
        {"seed": 1},
        {"lm_dtype": "bf16"},
        {"eval_data": "other rows"},
        {"model_name_or_path": "other weights"},
        {"columns": ["neg=hard"]},
    ],
)
def test_scores_made_with_other_settings_are_not_mixed_in(other, models, tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(models["llama"], folder)
    data = write_rows(tmp_path / "rows.json", [{**GOOD, "hard": ["x"]}])

    def made(**changed) -> dict:
        args = LMScoreArgs(eval_data=str(data), model_name_or_path=str(folder), **changed)
        return run_lm_score.identity(args, args.lm_dtype, run_lm_score.load_data(args), args.context_max_length)

    changed = dict(other)
    store = ResponseStore(tmp_path / "parts")
    store.open(made(lm_dtype="fp32"))
    assert store.claim(0)
    if changed.pop("eval_data", None):
        write_rows(data, [GOOD, GOOD])
    if changed.pop("model_name_or_path", None):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"scores of another run: .* was made with"):
        store.check(made(**{"lm_dtype": "fp32", **changed}))


def test_scores_of_another_model_are_not_mixed_in(models, score, tmp_path):
    data = write_rows(tmp_path / "rows.json", [GOOD])
    store = ResponseStore(tmp_path / "rows.scored.x.json.parts")
    store.open({"model_name_or_path": "another"})
    store.add(0, {})
    printed = score("--eval_data", data, "--model_name_or_path", models["llama"], expect=2)
    assert "was made with model_name_or_path 'another' (this run: " in printed
    assert "--save_name" in printed


def test_response_store(tmp_path):
    store, first, last = ResponseStore(tmp_path / "parts"), Response((), (-1.5,), (3,)), Response(("a\nb",))
    store.open({"a": 1})
    assert store.claim(3)
    assert not store.claim(3)
    store.add(3, {"0": first, "2": None})
    with open(tmp_path / "parts" / "0000003.jsonl", "ab") as file:
        file.write(b'\n{"responses": {"1": nul')
    assert store.read(3) == {"0": first, "2": None}
    store.add(3, {"1": last})
    store.add(0, {"x": last})
    assert store.read(3) == {"0": first, "1": last, "2": None}
    assert store.read() == {**store.read(3), "x": last}
    assert store.read(4) == {}
    store.open({"a": 1})
    assert store.claim(3)
    store.remove()
    assert not store.folder.exists()


@pytest.fixture(scope="session")
def small_lm(tmp_path_factory):
    """Folder of the sample language model, a trained one."""
    folder = tmp_path_factory.mktemp("lm") / "smollm2"
    sample_lm.build(sample_lm.find_gguf(), folder)
    return str(folder)


def test_a_trained_lm_scores_as_the_reference_and_finds_the_passage_that_helps(small_lm, score, tmp_path):
    rows = [
        {
            "query": "In which town is the Varnholt lighthouse?",
            "pos": ["The Varnholt lighthouse stands in Quellin, on the northern cape."],
            "neg": ["The river Asmer is 40 miles long.", "A lighthouse guides ships at night with its lamp. " * 3],
            "answers": ["Quellin"],
            "task": "qa",
        },
        {**toy("chat", rows=1)[0], "task": "chat"},
    ]
    data = write_rows(tmp_path / "rows.json", rows)
    score("--eval_data", data, "--model_name_or_path", small_lm)
    found = read_rows(tmp_path / "rows.scored.x.json")
    model, tokenizer = load(small_lm)
    model = model.float()
    for row, scored in zip(rows, found, strict=True):
        wanted = [
            reference.score(model, tokenizer, row["task"], row, key, row["answers"][0]) for key in own_candidates(row)
        ]
        np.testing.assert_allclose(scored["teacher_scores"], wanted, rtol=1e-5, atol=1e-5)
    assert int(np.argmax(found[0]["teacher_scores"])) == 0


def test_a_gguf_folder_is_scored_with(score, tmp_path):
    source = sample_lm.find_gguf()
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / source.name).symlink_to(source)
    score("--eval_data", write_rows(tmp_path / "rows.json", [GOOD]), "--model_name_or_path", tmp_path / "lm")
    assert len(read_rows(tmp_path / "rows.scored.x.json")[0]["teacher_scores"]) == 2
    (tmp_path / "lm" / "other.gguf").symlink_to(source)
    printed = score("--eval_data", tmp_path / "rows.json", "--model_name_or_path", tmp_path / "lm", expect=2)
    assert "2 .gguf files" in printed
