"""Models of many families, as others save them: each compared with transformers or sentence-transformers itself."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, T5EncoderModel

import run_dense
import run_ranker
from scripts import ours2st
from src.lm.args import LMArgs
from src.lm.model import LMConfig, empty_lm, lm_max_length, load_lm, load_lm_tokenizer
from src.retrieval.models.checks import position_limit
from src.retrieval.models.cross_encoder import RankerConfig, load_cross_encoder
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, load_dense_retriever
from src.retrieval.models.encode import EncodeConfig, encode
from src.retrieval.models.padding import pad
from src.utils.cli import run as run_entry
from src.utils.errors import UserError
from tests.conftest import VOCABULARY, make_tokenizer
from tests.helpers import read_rows, write_rows

TEXTS = ["hello world", "a", "The Answer to the question", "1 2 3, 4!", "b" * 60]
SIZE = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
T5 = {"vocab_size": len(VOCABULARY), "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "eos_token_id": 3}


def build(folder: Path, name: str, tokenizer=None, **settings) -> str:
    """Save a random model of transformers' class `name`; its tokenizer is `make_tokenizer`'s when None."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model_class(model_class.config_class(**settings)).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def without_padding():
    """A tokenizer that has an end token and nothing to pad with."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    return tokenizer


def run(monkeypatch, main, *flags, expect: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", ["main", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        run_entry(main)
    assert int(stop.value.code or 0) == expect


def embed(folder: str | DenseRetriever, texts=TEXTS, length=32, **config) -> np.ndarray:
    if isinstance(folder, str):
        folder = load_dense_retriever(EncoderConfig(folder, **config))
    settings = EncodeConfig(length, torch.device("cpu"))
    return encode(folder.eval().embed_key, folder.key_tokenizer, texts, settings)


def one_by_one(model, tokenizer, pool, texts=TEXTS, length=32) -> np.ndarray:
    """Unit vectors by transformers; `pool` takes the states ``(length, D)`` of one text."""
    vectors = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=length))
        vectors.append(torch.nn.functional.normalize(pool(states.last_hidden_state[0]), dim=0))
    return torch.stack(vectors).numpy()


POOL = {"mean": lambda states: states.mean(0), "last": lambda states: states[-1]}

# --- an encoder of an encoder-decoder model -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pooling", "more", "names"),
    [
        ("mean", (), ["encoder"]),
        ("last", ("--lora_r", 2), ["adapters/encoder", "encoder"]),
        ("mean", ("--tie_encoders", False), ["key_encoder", "query_encoder"]),
    ],
)
def test_an_encoder_saved_alone_is_evaluated_converted_and_trained_on(
    pooling, more, names, tiny_t5, tmp_path, monkeypatch
):
    rows = [{"query": f"query {n}", "pos": [f"text {n}"], "neg": [f"other {n}"]} for n in range(8)]
    data = write_rows(tmp_path / "train.json", rows)
    corpus = write_rows(tmp_path / "corpus.json", [{"text": row["pos"][0]} for row in rows])
    asked = write_rows(tmp_path / "eval.json", [{"query": "query 1", "pos_index": [1]}])
    common = ["--use_cpu", "--log_path", tmp_path / "log", "--query_max_length", 32, "--key_max_length", 32]
    train = [*common, "--train_data", data, "--train_group_size", 2, "--learning_rate", 1e-2, "--seed", 1]
    train += ["--per_device_train_batch_size", 4, *more]
    start = ("--query_encoder", tiny_t5, "--key_encoder", tiny_t5, "--pooling_method", pooling)
    run(monkeypatch, run_dense.main, *train, *start, "--output_dir", tmp_path / "one", "--max_steps", 2)
    checkpoint = tmp_path / "one" / "checkpoint-2"
    found = {name: embed(str(checkpoint / name)) for name in names}
    for name, vectors in found.items():
        # Of adapters alone transformers reads the base; merged they are beside them.
        plain = T5EncoderModel.from_pretrained(checkpoint / name.rpartition("/")[2]).eval()
        expected = one_by_one(plain, AutoTokenizer.from_pretrained(checkpoint / name), POOL[pooling])
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        assert np.abs(vectors - embed(tiny_t5, pooling_method=(pooling,))).max() > 1e-3
    both = ("--query_encoder", checkpoint, "--key_encoder", checkpoint)
    evaluation = ["--eval_data", asked, "--corpus", corpus, "--key_template", "{text}", "--cpu"]
    tied = ("--tie_encoders", False) if "key_encoder" in names else ()
    run(monkeypatch, run_dense.main, *common, *both, *evaluation, *tied, "--output_dir", tmp_path / "evaluated")
    run(monkeypatch, ours2st.main, "--encoder", checkpoint / names[-1])
    theirs = SentenceTransformer(str(checkpoint / names[-1]), device="cpu")
    np.testing.assert_allclose(
        theirs.encode(TEXTS, convert_to_numpy=True), embed(str(checkpoint / names[-1]), length=512), atol=1e-6
    )
    run(monkeypatch, run_dense.main, *train, *both, "--output_dir", tmp_path / "two", "--max_steps", 2)
    assert np.abs(embed(str(tmp_path / "two" / "checkpoint-2" / names[-1])) - found[names[-1]]).max() > 1e-4


@pytest.mark.parametrize("family", ["MT5", "UMT5"])
def test_siblings_of_t5_saved_alone(family, tmp_path):
    folder = build(tmp_path / "whole", f"{family}Model", **T5)
    load_dense_retriever(EncoderConfig(folder, pooling_method=("mean",))).save(str(tmp_path))
    plain = getattr(transformers, f"{family}EncoderModel").from_pretrained(folder).eval()
    expected = one_by_one(plain, AutoTokenizer.from_pretrained(folder), POOL["mean"])
    np.testing.assert_allclose(embed(str(tmp_path / "encoder")), expected, atol=1e-6)
    with pytest.raises(UserError, match="saved without its decoder"):
        load_dense_retriever(EncoderConfig(str(tmp_path / "encoder"), pooling_method=("decoder",)))


def test_decoder_pooling_of_a_model_without_decoder_is_its_first_token(tiny_bert):
    found = embed(tiny_bert, pooling_method=("decoder",))
    np.testing.assert_array_equal(found, embed(tiny_bert, pooling_method=("cls",)))


# --- decoder-only models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LlamaModel", LLAMA),
        ("GPT2Model", {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
        ("Qwen2Model", LLAMA),
        ("MambaModel", {**SIZE, "state_size": 4}),
    ],
)
def test_a_decoder_only_model_is_pooled_at_its_last_token_and_that_is_said(name, settings, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = build(tmp_path, name, without_padding(), **settings)
    found = embed(folder)
    assert "pooling last (default of decoder-only models)" in caplog.text
    plain = getattr(transformers, name).from_pretrained(folder).eval()
    np.testing.assert_allclose(found, one_by_one(plain, AutoTokenizer.from_pretrained(folder), POOL["last"]), atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 1e-2
    assert np.abs(embed(folder, pooling_method=("cls",)) - found).max() > 1e-2


def test_an_encoder_and_a_decoder_made_to_look_both_ways_are_pooled_at_the_first(tiny_bert, tmp_path, caplog):
    caplog.set_level("INFO")
    embed(tiny_bert)
    settings = {**LLAMA, "head_dim": 16, "use_bidirectional_attention": True}
    embed(build(tmp_path, "Gemma3TextModel", **settings))
    assert caplog.text.count("pooling cls (default)") == 2


def test_vectors_as_wide_as_the_model_makes_them(tmp_path, monkeypatch):
    """OPT-350m projects its states to another width than that of its layers."""
    settings = {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 128}
    folder = build(tmp_path / "opt", "OPTModel", without_padding(), **settings)
    assert embed(folder).shape[1] == load_dense_retriever(EncoderConfig(folder)).width == 16
    assert load_dense_retriever(EncoderConfig(folder, empty=True)).width == 16
    layer = load_dense_retriever(EncoderConfig(folder, pooling_method=("last", "dense"), new_dense=True))
    assert layer.encoders["encoder"].dense.linear.weight.shape == (16, 16)
    corpus = write_rows(tmp_path / "corpus.json", [{"text": text} for text in TEXTS])
    data = write_rows(tmp_path / "eval.json", [{"query": "hello", "pos_index": [0]}])
    flags = ["--eval_data", data, "--corpus", corpus, "--key_template", "{text}", "--query_encoder", folder, "--cpu"]
    flags += ["--output_dir", tmp_path / "out", "--log_path", tmp_path / "log", "--query_max_length", 32]
    flags += ["--key_max_length", 32, "--add_instruction", False]
    run(monkeypatch, run_dense.main, *flags, "--save_encode")
    hits = read_rows(tmp_path / "out" / "eval.result.json")
    run(monkeypatch, run_dense.main, *flags, "--load_encode")
    assert read_rows(tmp_path / "out" / "eval.result.json") == hits


# --- sentence-transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaModel", "GPT2Model", "OPTModel"])
def test_models_without_padding_are_converted(name, tmp_path, monkeypatch):
    settings = {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    settings |= {"intermediate_size": 64, "max_position_embeddings": 128}
    settings = (
        {name: value for name, value in settings.items() if name != "hidden_size"} if "GPT2" in name else settings
    )
    folder = build(tmp_path / "base", name, without_padding(), **settings)
    run(monkeypatch, ours2st.main, "--encoder", folder, "--output_dir", tmp_path / "st")
    theirs = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert theirs.tokenizer.pad_token == "[SEP]"
    np.testing.assert_allclose(theirs.encode(TEXTS), embed(folder, length=128), atol=1e-6)


TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("in_place", [True, False])
def test_texts_of_a_model_tuned_to_chat_stay_plain(in_place, tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    base = build(tmp_path / "base", "LlamaModel", tokenizer, **LLAMA)
    wanted = embed(base, pooling_method=("last",))
    load_dense_retriever(EncoderConfig(base, pooling_method=("last",))).save(str(tmp_path))
    # Our own folder in sentence-transformers, with a pooling put after it by hand.
    modules = [Transformer(str(tmp_path / "encoder")), Pooling(32, pooling_mode="lasttoken"), Normalize()]
    np.testing.assert_allclose(
        SentenceTransformer(modules=modules, device="cpu").encode(TEXTS[:4]), wanted[:4], atol=1e-6
    )
    target = Path(base) if in_place else tmp_path / "st"
    run(monkeypatch, ours2st.main, "--encoder", base, "--output_dir", target, "--pooling_method", "last")
    theirs = SentenceTransformer(str(target), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS[:4]), wanted[:4], atol=1e-6)
    np.testing.assert_allclose(embed(str(target)), wanted, atol=1e-6)


def st_folder(base: str, folder: Path, *, edit=None, **options) -> str:
    """A sentence-transformers folder; `edit` is (file, settings to change)."""
    modules = [Transformer(base, max_seq_length=32, **options), Pooling(32, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    for name, settings in edit or ():
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return str(folder)


TEXT_FILE, MODEL_FILE = "sentence_bert_config.json", "config_sentence_transformers.json"


@pytest.fixture(scope="module")
def cased_bert(tiny_bert, tmp_path_factory) -> str:
    """A BERT whose tokenizer knows lower case only and does not make it."""
    folder = tmp_path_factory.mktemp("cased")
    shutil.copytree(tiny_bert, folder, dirs_exist_ok=True)
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "normalizer": {**saved["normalizer"], "lowercase": False}}))
    return str(folder)


def test_do_lower_case_is_heeded_and_kept(cased_bert, tmp_path, monkeypatch):
    folder = st_folder(cased_bert, tmp_path / "st", edit=[(TEXT_FILE, {"do_lower_case": True})])
    expected = SentenceTransformer(folder, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(embed(folder), expected, atol=1e-6)
    assert np.abs(embed(cased_bert, pooling_method=("mean",)) - expected).max() > 1e-2
    load_dense_retriever(EncoderConfig(folder)).save(str(tmp_path))
    np.testing.assert_allclose(embed(str(tmp_path / "encoder")), expected, atol=1e-6)


def test_what_is_pooled_with_an_instruction(tiny_bert, tmp_path):
    folder = st_folder(tiny_bert, tmp_path / "st", edit=[("1_Pooling/config.json", {"include_prompt": False})])
    expected = SentenceTransformer(folder, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(embed(folder), expected, atol=1e-6)
    with pytest.raises(UserError, match=r"include_prompt false.*--add_instruction False, or --pooling_method"):
        load_dense_retriever(EncoderConfig(folder, add_instruction=True))
    embed(folder, add_instruction=True, pooling_method=("mean",))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ((MODEL_FILE, {"similarity_fn_name": "manhattan"}), "similarity 'manhattan' is not supported"),
        (
            (TEXT_FILE, {"processing_kwargs": {"text": {"truncation_side": "left"}}}),
            "processing_kwargs .* not supported",
        ),
        ((TEXT_FILE, {"modality_config": {"message": {"method": "forward"}}}), "modality_config .* not supported"),
        ((TEXT_FILE, {"query_length": 8}), "query_length 8 is not supported"),
        ((TEXT_FILE, {"config_kwargs": {"hidden_act": "relu"}}), "config_kwargs .* not supported"),
        (("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}), r"pooling \['cls', 'mean'\] of"),
        (("1_Pooling/config.json", {"pooling_mode": "max"}), "pooling max of"),
    ],
)
def test_settings_that_would_change_vectors_are_refused_by_name(edit, said, tiny_bert, tmp_path):
    if edit[0] == MODEL_FILE:
        modules = [Transformer(tiny_bert, max_seq_length=32), Pooling(32, pooling_mode="mean")]
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path))
        (tmp_path / MODEL_FILE).write_text(json.dumps({**json.loads((tmp_path / MODEL_FILE).read_text()), **edit[1]}))
        folder = str(tmp_path)
    else:
        folder = st_folder(tiny_bert, tmp_path, edit=[edit])
    with pytest.raises(UserError, match=said):
        load_dense_retriever(EncoderConfig(folder))


def test_modules_in_another_order_are_refused_and_a_flag_does_without(tiny_bert, tmp_path):
    folder = st_folder(tiny_bert, tmp_path)
    path = tmp_path / "modules.json"
    modules = json.loads(path.read_text())
    path.write_text(json.dumps([modules[0], modules[2], modules[1]]))
    with pytest.raises(UserError, match=r"modules Transformer, Normalize, Pooling .* in this order"):
        load_dense_retriever(EncoderConfig(folder))
    found = embed(folder, pooling_method=("mean",), dense_metric="cos")
    np.testing.assert_allclose(found, embed(tiny_bert, pooling_method=("mean",)), atol=1e-6)


def test_flags_win_over_the_length_of_sentence_transformers_and_that_is_said(tiny_bert, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = st_folder(tiny_bert, tmp_path, edit=[(TEXT_FILE, {"max_seq_length": 16})])
    embed(folder, query_max_length=16, key_max_length=16)
    assert "max_seq_length" not in caplog.text
    found = embed(folder, query_max_length=16, key_max_length=32)
    assert "cuts texts to 16 tokens (max_seq_length), here they are cut to 32" in caplog.text
    np.testing.assert_allclose(found, embed(tiny_bert, pooling_method=("mean",)), atol=1e-6)


# --- positions and vocabularies -------------------------------------------------------------------------------------

POSITIONS = {**SIZE, "intermediate_size": 64, "max_position_embeddings": 40}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("RobertaModel", {**POSITIONS, "pad_token_id": 1}),
        ("XLMRobertaModel", {**POSITIONS, "pad_token_id": 5}),
        ("CamembertModel", POSITIONS),
        ("Data2VecTextModel", POSITIONS),
        ("RobertaPreLayerNormModel", POSITIONS),
        ("XLMRobertaXLModel", POSITIONS),
        ("MPNetModel", POSITIONS),
        ("EsmModel", {**POSITIONS, "pad_token_id": 1, "position_embedding_type": "absolute"}),
        ("BertModel", POSITIONS),
        ("OPTModel", {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 40}),
        ("GPT2Model", {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}),
    ],
)
def test_as_many_tokens_as_the_model_takes_and_not_one_more(name, settings):
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**settings)).eval()
    limit = position_limit(model.config, model)
    ids = torch.full((1, limit + 1), 9)
    model(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids)[:, :-1])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_a_model_without_a_limit():
    config = transformers.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=64)
    assert position_limit(config, transformers.XLNetModel(config)) is None


def test_limits_of_positions_hold_everywhere(tmp_path, monkeypatch, capsys):
    folder = build(
        tmp_path / "base", "RobertaModel", **{**POSITIONS, "pad_token_id": 0, "max_position_embeddings": 130}
    )
    assert load_cross_encoder(RankerConfig(folder, 100, 100)).pairs.max_length == 129
    with pytest.raises(UserError, match=r"--key_max_length 130: .* takes 129 tokens at most"):
        load_dense_retriever(EncoderConfig(folder, key_max_length=130))
    run(monkeypatch, ours2st.main, "--encoder", folder, "--output_dir", tmp_path / "st")
    assert SentenceTransformer(str(tmp_path / "st"), device="cpu").max_seq_length == 129
    run(monkeypatch, ours2st.main, "--encoder", folder, "--max_length", 130, "--output_dir", tmp_path / "no", expect=2)
    assert "--max_length 130: " in capsys.readouterr().err


def test_prompts_are_as_long_as_the_language_model_takes(tmp_path):
    settings = {**POSITIONS, "pad_token_id": 1, "is_decoder": True}
    folder = build(tmp_path / "base", "RobertaForCausalLM", **settings)
    config = LMConfig(LMArgs(folder), "fp32", torch.device("cpu"))
    empty = empty_lm(config, load_lm_tokenizer(config)[1])
    model = load_lm(config)
    limits = [lm_max_length(each, requested) for each in (empty, model.model) for requested in (None, 20, 1024)]
    assert limits == [38, 20, 38] * 2
    model.answer_scores([[9] * 37], [[9]])
    with pytest.raises((IndexError, RuntimeError)):
        model.answer_scores([[9] * 38], [[9]])


@pytest.mark.parametrize("kind", ["encoder", "ranker", "language model"])
def test_a_tokenizer_with_more_tokens_than_the_model(kind, tmp_path):
    load = {
        "encoder": lambda folder: load_dense_retriever(EncoderConfig(folder)),
        "ranker": lambda folder: load_cross_encoder(RankerConfig(folder, 8, 8)),
        "language model": lambda folder: load_lm(LMConfig(LMArgs(folder), "fp32", torch.device("cpu"))),
    }[kind]
    name = {"encoder": "BertModel", "ranker": "BertForSequenceClassification"}.get(kind, "LlamaForCausalLM")
    settings = {**LLAMA, "num_labels": 1} if kind == "ranker" else LLAMA
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    # A larger model is padded to a round number, as many are.
    load(build(tmp_path / "padded", name, tokenizer, **{**settings, "vocab_size": 200}))
    with pytest.raises(UserError, match=rf"tokenizer {len(VOCABULARY) + 1} tokens, model {len(VOCABULARY)}.*'<new>'"):
        load(build(tmp_path / "small", name, tokenizer, **settings))


# --- rankers --------------------------------------------------------------------------------------------------------

PAIRS = [("alpha", "a"), ("b", "the second text, which is longer"), ("what is it", "gamma 3"), ("x", "y" * 20)]


@pytest.mark.parametrize(
    ("name", "settings", "padding"),
    [
        ("LlamaModel", {**LLAMA, "pad_token_id": 0}, False),
        ("LlamaModel", {**LLAMA, "pad_token_id": 7}, True),
        ("Qwen2Model", LLAMA, True),
        ("GPT2Model", {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 2, "n_head": 2}, False),
        ("RobertaModel", {**POSITIONS, "pad_token_id": 1}, True),
        ("T5Model", T5, True),
        ("BartModel", {"vocab_size": len(VOCABULARY), "d_model": 32, "eos_token_id": 3, "pad_token_id": 0}, True),
    ],
)
def test_scores_do_not_depend_on_the_batch(name, settings, padding, tmp_path):
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    settings = settings if name != "BartModel" else {**settings, **small, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    folder = build(tmp_path / "base", name, None if padding else without_padding(), **settings)
    ranker = load_cross_encoder(RankerConfig(folder, 32, 32)).eval()
    ranker.save(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ranker")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ranker").eval()
    with torch.no_grad():
        together = ranker.score(pad(ranker.pairs.tokenizer, ranker.pairs(PAIRS), range(len(PAIRS))))
        alone = [float(model(**tokenizer(*pair, return_tensors="pt")).logits) for pair in PAIRS]
    np.testing.assert_allclose(together.numpy(), alone, atol=1e-6)
    if name != "RobertaModel":
        assert model.config.pad_token_id == tokenizer.pad_token_id


def test_scores_of_a_decoder_are_the_same_in_batches_of_any_size(tmp_path, monkeypatch):
    folder = build(
        tmp_path / "base", "LlamaForSequenceClassification", without_padding(), **LLAMA, pad_token_id=0, num_labels=1
    )
    rows = [{"query": query, "pos": [key], "neg": ["a much longer negative text"]} for query, key in PAIRS]
    found = {}
    for size in (1, 1000):
        data = write_rows(tmp_path / f"{size}.json", rows)
        flags = ["--eval_data", data, "--ranker", folder, "--metrics", "collate_score", "--save_name", "x", "--cpu"]
        flags += ["--query_max_length", 32, "--key_max_length", 32, "--output_dir", tmp_path / "out"]
        run(monkeypatch, run_ranker.main, *flags, "--batch_size", size, "--log_path", tmp_path / "log")
        found[size] = [row["teacher_scores"] for row in read_rows(tmp_path / f"{size}.scored.x.json")]
    np.testing.assert_allclose(found[1], found[1000], atol=1e-6)


def unigram():
    """A tokenizer whose vocabulary holds the special tokens as pieces of text, as SentencePiece's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in "▁abcdefghijklmnopq</s>")]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("tokenizer", [unigram, partial(make_tokenizer)])
def test_special_tokens_spelt_out_in_texts_of_a_t5_ranker_are_text(tokenizer, tmp_path):
    tokenizer = tokenizer()
    end = tokenizer.eos_token or "[SEP]"
    number = tokenizer.convert_tokens_to_ids(end)
    ranker = load_cross_encoder(
        RankerConfig(build(tmp_path, "T5Model", tokenizer, **{**T5, "eos_token_id": number}), 32, 32)
    )
    pairs = [("a", "b"), (f"a {end} b", f"c {end}"), (end, "d")]
    encoded = ranker.pairs(pairs)
    assert [ids.count(number) for ids in encoded["input_ids"]] == [2, 2, 2]
    with torch.no_grad():
        together = ranker.eval().score(pad(tokenizer, encoded, range(3)))
        alone = [float(ranker.score(pad(tokenizer, encoded, [place]))[0]) for place in range(3)]
    np.testing.assert_allclose(together.numpy(), alone, atol=1e-6)
    # Texts without them are read as ever.
    assert encoded["input_ids"][0] == tokenizer("a", "b")["input_ids"]


@pytest.mark.parametrize(
    "load", [lambda folder: embed(folder), lambda folder: load_cross_encoder(RankerConfig(folder, 8, 8))]
)
def test_a_model_that_reads_padding_is_told_of(load, tiny_bert, tmp_path, caplog):
    """FNet mixes all places of a batch, masked or not."""
    load(tiny_bert)
    assert "reads padding" not in caplog.text
    load(build(tmp_path, "FNetModel", **{**SIZE, "intermediate_size": 64}))
    assert "(fnet) reads padding" in caplog.text


# --- the original's dense layer -------------------------------------------------------------------------------------


def test_the_dense_layer_of_the_original(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "encoder")
    weight = torch.randn(32, 32)
    torch.save({"weight": weight}, tmp_path / "encoder" / "dense_pooler.bin")
    folder = str(tmp_path / "encoder")
    with pytest.raises(UserError, match=r"dense_pooler\.bin .*pickle.*--allow_pickle"):
        load_dense_retriever(EncoderConfig(folder, pooling_method=("mean", "dense")))
    found = embed(folder, pooling_method=("mean", "dense"), dense_metric="ip", allow_pickle=True)
    expected = embed(folder, pooling_method=("mean",), dense_metric="ip") @ weight.numpy().T
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_dense_layer_nobody_trained(tiny_bert):
    config = partial(EncoderConfig, tiny_bert, pooling_method=("mean", "dense"))
    layer = load_dense_retriever(config(new_dense=True)).encoders["encoder"].dense.linear
    assert (layer.weight.shape, layer.bias) == ((32, 32), None)
    for dim in (None, 8):
        with pytest.raises(UserError, match="has no dense layer, and one that nobody has trained is of no use"):
            load_dense_retriever(config(dense_dim=dim))
