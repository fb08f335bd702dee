"""Model cards: what they say is true, and the code in them runs and gives what the toolkit gives."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCardData

import run_dense
from scripts import ours2st
from src.retrieval.data.tasks import Instruction
from src.retrieval.models.cross_encoder import RankerConfig, load_cross_encoder
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, load_dense_retriever
from src.retrieval.models.lora import LoraSettings
from src.retrieval.report import training_record
from src.retrieval.report.model_card import KEYS, QUERY, DataFile, TrainingRecord, ancestor, converted_card, model_card
from src.retrieval.report.training_record import encoder_uses
from src.utils import jsonl
from src.utils.files import file_hash
from tests.helpers import write_rows

#: Short enough to cut the keys of the examples.
LENGTHS = (40, 20)
INSTRUCTION = Instruction("find: ", "text: ")


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def executed(block: str, folder: Path, monkeypatch) -> torch.Tensor:
    """What a block of code prints as scores, run in the card's folder."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(block, "card", "exec"), names)
    return torch.as_tensor(names["scores"]).float().flatten()


def expected(model: DenseRetriever, instruction: Instruction, lengths=LENGTHS) -> torch.Tensor:
    """Scores of the examples by the toolkit's own embeddings."""

    def tokens(tokenizer, texts, length):
        return tokenizer(texts, max_length=length, truncation=True, padding=True, return_tensors="pt")

    model.eval()
    with torch.no_grad():
        query = model.embed_query(tokens(model.query_tokenizer, [instruction.query + QUERY], lengths[0]))
        keys = model.embed_key(tokens(model.key_tokenizer, [instruction.key + key for key in KEYS], lengths[1]))
    if model.metric == "l2":
        return -(query - keys).square().sum(1)
    return (query * keys).sum(1)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {"pooling_method": ("cls",), "dense_metric": "ip"}),
        ("bert", {"pooling_method": ("mean", "dense"), "dense_dim": 5, "new_dense": True}),
        ("bert", {"pooling_method": ("mean",), "dense_metric": "l2", "tie_encoders": False}),
        ("llama", {"pooling_method": ("last",)}),
        ("llama", {"pooling_method": ("weightedmean",)}),
        ("llama", {"pooling_method": ("last",), "lora": LoraSettings(2, 4.0), "attention": "bidirectional"}),
        ("t5", {"pooling_method": ("mean",)}),
        ("t5", {"pooling_method": ("decoder",), "dense_metric": "ip"}),
    ],
)
def test_code_of_an_encoder(kind, settings, tmp_path, request, monkeypatch):
    torch.manual_seed(1)
    model = load_dense_retriever(EncoderConfig(request.getfixturevalue(f"tiny_{kind}"), **settings))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights)
    if not model.encoders.keys() & {"encoder"}:
        torch.nn.init.normal_(next(model.encoders["key_encoder"].parameters()))
    model.save(str(tmp_path))
    wanted = expected(model, INSTRUCTION)
    uses = encoder_uses(model, *LENGTHS)
    folders = [*model.encoders, *(["adapters/encoder"] if "lora" in settings else [])]
    assert list(uses) == folders
    for name, (_, use) in uses.items():
        card = model_card(use, {"qa": INSTRUCTION})
        found = executed(code_blocks(card)[0], tmp_path / name, monkeypatch)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        # sentence-transformers has neither adapters alone nor a decoder's start token.
        assert len(code_blocks(card)) == (1 if "adapters" in name or "decoder" in settings["pooling_method"] else 2)


def test_code_of_a_ranker(tiny_bert, tmp_path, monkeypatch):
    torch.manual_seed(1)
    model = load_cross_encoder(RankerConfig(tiny_bert, 60, 60)).eval()
    model.save(str(tmp_path))
    pairs = model.pairs([(INSTRUCTION.query + QUERY, INSTRUCTION.key + key) for key in KEYS])
    with torch.no_grad():
        wanted = model.score(model.pairs.tokenizer.pad(pairs, return_tensors="pt"))
    for block in code_blocks(model_card(model.pairs, {"qa": INSTRUCTION})):
        torch.testing.assert_close(executed(block, tmp_path / "ranker", monkeypatch), wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def trained(tiny_bert, tmp_path_factory):
    """Output folder of a short run over two files, one of them named twice, evaluated on the way."""
    folder = tmp_path_factory.mktemp("card")
    rows = [{"query": f"q {n}", "pos": [f"p {n}"], "neg": ["a", "b", "c"]} for n in range(6)]
    files = [write_rows(folder / "root" / "qa" / "a.json", rows), write_rows(folder / "tool" / "b.json", rows[:3])]
    rows.append({"query": "of no use", "pos": ["p"], "neg": []})
    write_rows(files[1], [*rows[:3], rows[-1]])
    write_rows(folder / "corpus.json", [{"text": f"p {n}"} for n in range(6)])
    write_rows(folder / "qa" / "eval.json", [{"query": f"q {n}", "pos_index": [n]} for n in range(6)])
    line = [
        *("--train_data", "llm-embedder:qa/a.json", files[1], files[1], "--data_root", folder / "root"),
        *("--eval_data", folder / "qa" / "eval.json", "--corpus", folder / "corpus.json", "--key_template", "{text}"),
        *("--query_encoder", tiny_bert, "--pooling_method", "mean", "--version", "llm-embedder", "--metrics", "mrr"),
        *("--cutoffs", 1, 5, "--output_dir", folder / "out", "--log_path", folder / "log", "--use_cpu"),
        *("--query_max_length", 100, "--key_max_length", 90, "--train_group_size", 3, "--logging_steps", 1),
        *("--max_steps", 4, "--save_steps", 2, "--per_device_train_batch_size", 4, "--matryoshka_dims", 16, 8),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_dense.py", *map(str, line)])
        hashed = []
        patch.setattr(jsonl, "file_hash", lambda path, digest: hashed.append(path) or file_hash(path, digest))
        steps = []
        patch.setattr(
            training_record,
            "model_card",
            lambda *args: steps.append(args[3] if args[3:] else None) or model_card(*args),
        )
        run_dense.main()
    # Once before training too, so that what cannot be written is known before it.
    assert steps == [None, 2, 4]
    # Once each, though there are two checkpoints and one of the files counts twice.
    assert sorted(hashed) == sorted(map(str, files))
    return folder, files


def test_card_of_a_checkpoint(trained, tiny_bert, monkeypatch):
    folder, files = trained
    checkpoint = folder / "out" / "checkpoint-4"
    card = (checkpoint / "encoder" / "README.md").read_text(encoding="utf-8")
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    twice = f"| `{files[1]}` | tool | 4 | 3 | `{hashes[1]}` |"
    assert f"| `llm-embedder:qa/a.json` | qa | 6 | 6 | `{hashes[0]}` |\n{twice}\n{twice}\n" in card
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert f"4 steps from `{tiny_bert}`. Loss logged last, at step 4: {losses[4]:.4f}." in card
    mrr = [(entry["eval_mrr@1"], entry["eval_mrr@5"]) for entry in history if "eval_mrr@1" in entry]
    table = "".join(f"| {step} | {one:.4f} | {five:.4f} |\n" for step, (one, five) in zip((0, 2, 4), mrr, strict=True))
    assert f"| step | mrr@1 | mrr@5 |\n| --- | --- | --- |\n{table}" in card
    assert "first 16, 8 numbers" in card
    assert "\n--query_max_length 100\n--save_steps 2\n" in card
    assert "--output_dir" not in card
    assert "--seed" not in card
    earlier = (folder / "out" / "checkpoint-2" / "encoder" / "README.md").read_text(encoding="utf-8")
    assert "2 steps from" in earlier
    assert "\n| 2 |" in earlier
    assert "\n| 4 |" not in earlier
    model = load_dense_retriever(EncoderConfig(str(checkpoint)))
    instruction = Instruction(
        "Represent this query for retrieving relevant documents: ", "Represent this document for retrieval: "
    )
    found = executed(code_blocks(card)[0], checkpoint / "encoder", monkeypatch)
    torch.testing.assert_close(found, expected(model, instruction, (100, 90)), atol=1e-5, rtol=1e-5)
    assert (folder / "out" / "training.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_card_of_a_converted_model(trained, tmp_path, monkeypatch):
    """The code of both libraries gives the same there; without a card of ours there is a short one."""
    encoder = trained[0] / "out" / "checkpoint-4" / "encoder"
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in encoder.iterdir():
        if file.name != "README.md":
            (bare / file.name).write_bytes(file.read_bytes())
    cards = []
    for source, target in ((encoder, tmp_path / "st"), (bare, bare)):
        monkeypatch.setattr(sys, "argv", ["ours2st.py", "--encoder", str(source), "--output_dir", str(target)])
        ours2st.main()
        cards.append((target / "README.md").read_text(encoding="utf-8"))
        ours, theirs = (executed(block, target, monkeypatch) for block in code_blocks(cards[-1]))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert "ours2st" not in cards[-1]
        assert "library_name: sentence-transformers\n" in cards[-1]
    assert "## Training" in cards[0]
    assert "## Training" not in cards[1]
    # The bare folder tells the instructions all the same, by its embedder.json.
    (row,) = (line for line in cards[0].splitlines() if line.startswith("| qa |") and "Represent" in line)
    assert row in cards[1]
    (bare / "README.md").write_text("A user's own.")
    ours2st.main()
    assert (bare / "README.md").read_text() == "A user's own."


def test_cards_of_two_encoders_are_true_once_both_are_converted(tiny_bert, tmp_path, monkeypatch):
    model = load_dense_retriever(EncoderConfig(tiny_bert, pooling_method=("mean",), tie_encoders=False))
    torch.nn.init.normal_(next(model.encoders["key_encoder"].parameters()))
    model.save(str(tmp_path))
    wanted, uses = expected(model, INSTRUCTION), encoder_uses(model, *LENGTHS)
    for name, (_, use) in uses.items():
        (tmp_path / name / "README.md").write_text(model_card(use, {"qa": INSTRUCTION}), encoding="utf-8")
        assert "to the folders of both encoders" in (tmp_path / name / "README.md").read_text(encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["ours2st.py", "--encoder", str(tmp_path / name)])
        ours2st.main()
    for name in uses:
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert "once both encoders' folders are converted" in card
        for block in code_blocks(card):
            found = executed(block, tmp_path / name, monkeypatch)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_instructions_of_several_lines_and_values_with_blanks(tiny_bert, tmp_path, monkeypatch):
    """A table's row stays one line, the code says the same text, and a shell reads the arguments as they were."""
    model = load_dense_retriever(EncoderConfig(tiny_bert, pooling_method=("mean",)))
    model.save(str(tmp_path))
    ((name, (_, use)),) = encoder_uses(model, *LENGTHS).items()
    instruction = Instruction("Task:\nfind it\n", "a\r\n")
    arguments = {"key_template": "{title} {text}", "train_data": ["a b.json", "c'd.json"]}
    card = model_card(use, {"qa": instruction}, record(arguments=arguments))
    assert "\n| qa | `Task:\\nfind it\\n` | `a\\r\\n` |\n" in card
    typed = shlex.split(re.search(r"```text\n(.*?)```", card, re.DOTALL)[1])
    assert typed == ["--key_template", "{title} {text}", "--train_data", "a b.json", "c'd.json"]
    found = executed(code_blocks(card)[0], tmp_path / name, monkeypatch)
    torch.testing.assert_close(found, expected(model, instruction), atol=1e-5, rtol=1e-5)


def record(**changed) -> TrainingRecord:
    facts = {"base": "BAAI/bge-base-en", "on_hub": True, "data": (), "arguments": {}, "versions": {"torch": "2"}}
    return TrainingRecord(**{**facts, **changed})


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


@pytest.mark.parametrize("on_hub", [True, False])
def test_front_matter(tiny_bert, on_hub):
    """As the hub reads it; a folder is no base model that it could link."""
    model = load_dense_retriever(EncoderConfig(tiny_bert))
    ((_, use),) = encoder_uses(model, 8, 8).values()
    card = model_card(use, {"any": Instruction()}, record(on_hub=on_hub))
    matter = front_matter(card)
    assert matter["tags"] == ["sentence-similarity", "feature-extraction"]
    assert matter["library_name"] == "transformers"
    assert matter.get("base_model") == ("BAAI/bge-base-en" if on_hub else None)
    assert ModelCardData(**matter).to_dict() == matter
    assert ("https://huggingface.co/BAAI/bge-base-en" in card) == on_hub
    assert "Texts stand alone" in card


def test_a_folder_leads_back_to_what_it_was_made_from(tiny_bert, tmp_path):
    """By its own card, as our checkpoints have one, else by its configuration; other names are no hub names."""
    config = tmp_path / "config.json"
    for named, wanted in {"BAAI/bge-base-en": "BAAI/bge-base-en", "../other/model": None, "model": None}.items():
        config.write_text(json.dumps({"_name_or_path": named}))
        assert ancestor(str(tmp_path)) == wanted
    (tmp_path / "README.md").write_text("---\nbase_model: intfloat/e5-base\n---\n# Card\n")
    assert ancestor(str(tmp_path)) == "intfloat/e5-base"
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert ancestor(str(tmp_path)) is None
    assert ancestor(str(tmp_path / "none")) is None
    model = load_dense_retriever(EncoderConfig(tiny_bert))
    ((_, use),) = encoder_uses(model, 8, 8).values()
    card = model_card(use, {}, record(on_hub=False, ancestor="intfloat/e5-base", key_template="{title}: {text}"))
    assert front_matter(card)["base_model"] == "intfloat/e5-base"
    assert "becomes a key by `--key_template`: `{title}: {text}`." in card
    assert "becomes a key" not in model_card(use, {}, record())


def test_long_histories_are_cut_and_bars_are_escaped(tiny_bert):
    model = load_dense_retriever(EncoderConfig(tiny_bert))
    ((_, use),) = encoder_uses(model, 8, 8).values()
    history = [{"step": step, "eval_ndcg@10": step / 100} for step in range(1, 13)]
    data = (DataFile("a|b.json", "qa", 3, 2, "0f"),)
    card = model_card(use, {"qa": Instruction("a|b: ")}, record(data=data), 12, history)
    assert "the last 10 of 12" in card
    assert re.findall(r"^\| (\d+) \| ([\d.]+) \|$", card, re.MULTILINE) == [
        (str(step), f"{step / 100:.4f}") for step in range(3, 13)
    ]
    assert "| `a\\|b.json` | qa | 3 | 2 | `0f` |" in card
    assert "| qa | `a\\|b: ` |  |" in card


def test_other_cards_stay_as_they_are():
    assert converted_card("library_name: transformers\n") == "library_name: transformers\n"
