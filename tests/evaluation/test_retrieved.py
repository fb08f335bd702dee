"""What eval_msc and eval_lrlm retrieve from a row's past, by every method: against scores computed one by one."""

# ruff: noqa: F811 (arguments are fixtures, some of them imported)
from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModel

from src.retrieval.search.bm25.analyzer import EnglishAnalyzer
from tests.conftest import make_bert
from tests.evaluation.test_tasks import data_root, evaluate, loaded  # noqa: F401  (two fixtures)
from tests.helpers import write_rows
from tests.lm.test_score import models  # noqa: F401  (a fixture)
from tests.reference import evaluation as reference
from tests.reference.lm_score import likelihood_of

#: Most tokens that the retriever reads: the characters of an instruction, and some more.
QUERY_LENGTH, KEY_LENGTH = 110, 100
#: Instructions of a query and of a key.
INSTRUCTIONS = {
    "chat": (
        "Embed this dialogue to find useful historical dialogues: ",
        "Embed this historical dialogue for retrieval: ",
    ),
    "lrlm": (
        "Embed this text chunk for finding useful historical chunks: ",
        "Embed this historical text chunk for retrieval: ",
    ),
}
#: A case: the flag --retrieval_method and others.
METHODS = [
    pytest.param("bm25", (), id="bm25"),
    pytest.param("bm25", ("--add_key_continuation",), id="bm25, continued"),
    pytest.param("bm25", ("--k1", 3, "--b", 0.1), id="bm25, other constants"),
    pytest.param("dense", (), id="dense"),
    pytest.param("dense", ("--add_key_continuation",), id="dense, continued"),
    pytest.param("dense", ("--version", "llm-embedder", "--add_instruction", "True"), id="dense, instructed"),
    pytest.param("oracle", (), id="oracle"),
    # What retrievers are shown is no matter of the oracle's.
    pytest.param("oracle", ("--add_key_continuation",), id="oracle, continued"),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Folder of a random BERT that tells texts apart, as one with weights of the usual size hardly does."""
    folder = tmp_path_factory.mktemp("sharp")
    model = AutoModel.from_pretrained(make_bert(folder), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    return str(folder)


def cosines(folder: str, task: str, flags: tuple, query: str, keys: list[str]) -> list[float]:
    """What the retriever makes of texts without instruction."""
    before_query, before_key = INSTRUCTIONS[task] if "--add_instruction" in flags else ("", "")
    keys = [before_key + key for key in keys]
    return reference.cosines(folder, before_query + query, keys, QUERY_LENGTH, KEY_LENGTH)


def constants(flags: tuple) -> tuple[float, ...]:
    """BM25's, k1 and b, where flags give them."""
    return flags[1::2] if "--k1" in flags else ()


# --- dialogues ------------------------------------------------------------------------------------------------------

LONG = "We spoke of ships. " * 12 + "The bicycle was not forgotten."
TURNS = [
    "Speaker 1: I ride a bicycle to work.\nSpeaker 2: In the rain too?",
    "Speaker 1: My sister paints old ships.\nSpeaker 2: Does she sell them?",
    "Speaker 1: The bicycle is red.\nSpeaker 2: Mine is green.",
    LONG,
    "Speaker 1: The bicycle is red.\nSpeaker 2: Mine is green.",
    "Speaker 1: We ate noodles.\nSpeaker 2: With a fork?",
    "Speaker 1: She sold two ships, and a ship in a bottle.\nSpeaker 2: To whom?",
]
DIALOGUES = [
    {"query": "What colour is your bicycle, red or green?", "answers": ["It is red."], "history": TURNS},
    {"query": "Did the ship sell? Who bought ships?", "answers": ["A sailor."], "history": TURNS[::-1]},
    # No word in common, so that all turns are as good.
    {"query": "Hm?", "answers": ["Oh."], "history": TURNS[:5]},
    {"query": "Is the bicycle old?", "answers": ["No, new."], "history": TURNS[:2]},
]


@pytest.mark.parametrize(("method", "flags"), METHODS)
def test_turns_of_a_dialogue(evaluate, models, bert, tmp_path, method, flags):
    path = write_rows(tmp_path / "rows.json", DIALOGUES)
    retriever = ("--query_encoder", bert, "--query_max_length", QUERY_LENGTH, "--key_max_length", KEY_LENGTH)
    given = ("--eval_data", path, "--retrieval_method", method, "--key_num", 6, *retriever, *flags)
    outputs, _, _ = evaluate("msc", *given, "--order_method", "relevance")
    model, tokenizer = loaded(models["llama"])
    analyze = EnglishAnalyzer()
    wanted = []
    for row in DIALOGUES:
        turns = shown = row["history"]
        if "--add_key_continuation" in flags:
            shown = [f"{turn}\n{after}" for turn, after in pairwise(turns)] + turns[-1:]
        if method == "bm25":
            scores = reference.bm25_scores(analyze(row["query"]), [analyze(turn) for turn in shown], *constants(flags))
        elif method == "dense":
            scores = cosines(bert, "chat", flags, row["query"], shown)
        else:
            question = f"Speaker 1: {row['query']}\nSpeaker 2: "
            scores = [
                reference.option_likelihood(model, tokenizer, f"{turn}\n{question}", row["answers"][0])[0]
                for turn in turns
            ]
        wanted.append(reference.best(scores, 6))
    # The best one stands last.
    assert [output["retrieved"][::-1] for output in outputs] == wanted
    if method == "bm25":
        assert wanted[2] == [4, 3, 2, 1, 0]
        outputs, _, _ = evaluate("msc", *given, "--save_name", "sequential")
        assert [output["retrieved"] for output in outputs] == [sorted(own) for own in wanted]


def test_recent_turns_are_the_last(evaluate, tmp_path):
    path = write_rows(tmp_path / "rows.json", DIALOGUES)
    flags = ("--eval_data", path, "--retrieval_method", "recent", "--key_num", 3)
    assert [output["retrieved"] for output in evaluate("msc", *flags)[0]] == [[4, 5, 6], [4, 5, 6], [2, 3, 4], [0, 1]]


# --- long texts -----------------------------------------------------------------------------------------------------

TARGET, WINDOW, CHUNK = 40, 96, 16
LRLM = ("--target_length", TARGET, "--context_window_size", WINDOW, "--chunk_size", CHUNK, "--key_num", 3)
STORY = (
    "The king of the north had seven ships, and his sister had none. In spring he sailed to the isle of birds, where "
    "an old woman sold him a map. In autumn the ships came back without him: six of them were empty, and in the last "
    "one a bird sat on the map. His sister sailed in spring with the bird, the map and the six ships to find him."
)
TEXTS = [
    {"text": STORY},
    {"text": STORY[:280][::-1]},
    # Chunks that are all alike.
    {"text": "a b c d e f g h i j k l m n o p " * 12},
    # Nothing before the window, and nothing before the target.
    {"text": "just as long as a window is at most, so that it has no past"},
    {"text": "short"},
]


@pytest.mark.parametrize(
    ("method", "flags"), [*METHODS, pytest.param("oracle", ("--integrate_method", "replace"), id="oracle, replacing")]
)
def test_chunks_of_a_text(evaluate, models, bert, tmp_path, method, flags):
    path = write_rows(tmp_path / "rows.json", TEXTS)
    retriever = ("--query_encoder", bert, "--query_max_length", QUERY_LENGTH, "--key_max_length", KEY_LENGTH)
    outputs, record, _ = evaluate("lrlm", "--eval_data", path, "--retrieval_method", method, *LRLM, *retriever, *flags)
    model, tokenizer = loaded(models["llama"])
    wanted = []
    for row in TEXTS:
        tokens = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        targets = range(len(tokens) - TARGET, len(tokens), CHUNK)
        starts = reference.key_starts(len(tokens), WINDOW, CHUNK, "replace" in flags)
        size = 2 * CHUNK if "--add_key_continuation" in flags else CHUNK
        keys = [tokens[max(0, start) : start + size] for start in starts]
        wanted.append([])
        for number, target in enumerate(targets if targets.start > 0 else ()):
            query = tokens[max(0, target - CHUNK) : target]
            if method == "bm25":
                scores = reference.bm25_scores(query, keys, *constants(flags))
            elif method == "dense":
                texts = [tokenizer.decode(key) for key in keys]
                scores = cosines(bert, "lrlm", flags, tokenizer.decode(query), texts)
            else:
                scores = []
                for key in range(len(keys)):
                    alone = [[key]] * len(targets)
                    windows = reference.chunk_windows(
                        tokens, TARGET, WINDOW, CHUNK, alone, "sequential", "replace" in flags, []
                    )
                    prompt, answer = windows[number]
                    whole = [*prompt, *answer]
                    scores.append(likelihood_of(model, whole, len(whole) - len(answer)))
            wanted[-1].append(reference.best(scores, 3))
    assert [output["retrieved"] for output in outputs] == wanted
    # The last target is half a chunk.
    assert [len(own) for own in wanted] == [3, 3, 3, 3, 0]
    assert wanted[3] == [[]] * 3
    if method != "oracle" and "--add_key_continuation" not in flags:
        last = len(reference.key_starts(12 * CHUNK, WINDOW, CHUNK)) - 1
        assert wanted[2] == [[last, last - 1, last - 2]] * 3
    assert record["skipped"] == 1


def test_only_so_many_characters_of_a_text_are_read(evaluate, tmp_path):
    found = {}
    for name, text, flags in (
        ("whole", STORY, ()),
        ("anchored", STORY, ("--anchor_length", 250)),
        ("cut", STORY[:250], ()),
    ):
        path = write_rows(tmp_path / f"{name}.json", [{"text": text}])
        ((output,), _, _) = evaluate("lrlm", "--eval_data", path, "--retrieval_method", "bm25", *LRLM, *flags)
        found[name] = [output[part] for part in ("prompt_hash", "retrieved", "values")]
    assert found["anchored"] == found["cut"]
    assert found["anchored"][0] != found["whole"][0]


# --- random ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "row"), [("msc", DIALOGUES[0]), ("lrlm", TEXTS[0])])
def test_random_keys_go_by_seed_and_row(evaluate, tmp_path, task, row):
    path = write_rows(tmp_path / "rows.json", [row] * 6)
    flags = ("--eval_data", path, "--retrieval_method", "random", "--order_method", "relevance", *LRLM)

    def retrieved(*more):
        return [output["retrieved"] for output in evaluate(task, *flags, *more)[0]]

    found = retrieved()
    assert retrieved("--save_name", "again") == found
    assert retrieved("--save_name", "other", "--seed", 7) != found
    # Rows that are alike, and the targets of a text, each get keys of their own.
    drawn = [tuple(keys) for own in found for keys in (own if task == "lrlm" else [own])]
    assert len(set(drawn)) == len(drawn) == (18 if task == "lrlm" else 6)
    assert all(len(set(keys)) == 3 for keys in drawn)
    number = len(TURNS) if task == "msc" else max(max(keys) for keys in drawn) + 1
    assert {key for keys in drawn for key in keys} == set(range(number))
