"""Decoder-only models that see both ways, and texts that end in an end token: the same padded, packed and converted."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder as TheirCrossEncoder
from sentence_transformers import SentenceTransformer
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer

from scripts import ours2st
from scripts.merge_models import check_alike
from src.retrieval.models.cross_encoder import RankerConfig, load_cross_encoder
from src.retrieval.models.decoders import append_eos
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, load_dense_retriever
from src.retrieval.models.encode import EncodeConfig
from src.retrieval.models.lora import LoraSettings
from src.utils.cli import run as run_entry
from src.utils.errors import UserError
from tests.conftest import VOCABULARY, make_tokenizer
from tests.reference import decoder

TEXTS = ["hello world", "a", "The Answer to the question", "1 2 3, 4!", "b" * 90]
SIZE = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
#: Of Llama's kind, which the reference computes.
LLAMAS = {
    "LlamaModel": LLAMA,
    "Qwen2Model": LLAMA,
    "Qwen3Model": {**LLAMA, "head_dim": 16},
    "MistralModel": {**LLAMA, "sliding_window": 5},
}
FAMILIES = {
    **LLAMAS,
    "GemmaModel": {**LLAMA, "head_dim": 8},
    "Gemma3TextModel": {**LLAMA, "head_dim": 8, "sliding_window": 6, "layer_types": None},
    "GPT2Model": {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "OPTModel": {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
}
LENGTH = 32


def decoder_tokenizer(begins: bool = True, **more):
    """A tokenizer as decoders have it: maybe a token that begins texts, none that ends them."""
    tokenizer = make_tokenizer()
    first = "[CLS] " if begins else ""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A", pair=f"{first}$A {first}$B:1", special_tokens=[("[CLS]", 2)] if begins else []
    )
    for name, token in {"eos_token": "[SEP]", "bos_token": "[CLS]", **more}.items():
        setattr(tokenizer, name, token)
    return tokenizer


def build(folder: Path, name: str, tokenizer=None) -> str:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    settings = FAMILIES.get(name, LLAMA)
    model_class(model_class.config_class(**settings)).save_pretrained(folder)
    (tokenizer or decoder_tokenizer()).save_pretrained(folder)
    return str(folder)


def load(path: str, **config) -> DenseRetriever:
    return load_dense_retriever(EncoderConfig(path, **config)).eval()


def embed(model: DenseRetriever, texts=TEXTS, packs: bool = False) -> np.ndarray:
    return model.encode_keys(texts, EncodeConfig(LENGTH, torch.device("cpu"), packs=packs))


def convert(monkeypatch, folder) -> SentenceTransformer:
    monkeypatch.setattr(sys, "argv", ["ours2st.py", "--encoder", str(folder)])
    with pytest.raises(SystemExit) as stop:
        run_entry(ours2st.main)
    assert not stop.value.code
    converted = SentenceTransformer(str(folder), device="cpu")
    converted.max_seq_length = LENGTH
    return converted


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "packed"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", LLAMAS)
def test_states_are_those_of_loops_over_tokens(name, attention, implementation, tmp_path):
    folder = build(tmp_path, name)
    packs = implementation == "packed"
    options = {"padding_free": "true"} if packs else {"attn_implementation": implementation}
    model = load(folder, attention=attention, pooling_method=("mean",), dense_metric="ip", **options)
    plain = AutoModel.from_pretrained(folder)
    weights = {key: value.numpy() for key, value in plain.state_dict().items()}
    expected = [
        decoder.states(weights, plain.config, model.key_tokenizer(text)["input_ids"], attention == "bidirectional")
        for text in TEXTS[:4]
    ]
    found = embed(model, TEXTS[:4], packs)
    np.testing.assert_allclose(found, [states.mean(0) for states in expected], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_later_token_changes_an_earlier_state(name, tmp_path, monkeypatch):
    folder = build(tmp_path / "base", name)
    own, model = (load(folder, attention=attention, append_eos=True) for attention in (None, "bidirectional"))
    tokens = {"input_ids": torch.tensor([[5, 6, 7, 8]] * 2)}
    tokens["input_ids"][1, -1] = 9
    changes = []
    for each in (own, model):
        (encoder,) = each.encoders.values()
        with torch.no_grad():
            states = encoder.backbone(**tokens).last_hidden_state
        changes.append((states[0, :3] - states[1, :3]).norm(dim=-1))
    assert changes[0].max() < 1e-6
    assert changes[1].min() > 1e-4
    # The same packed, in batches, alone, saved and loaded without the flags, and by sentence-transformers.
    vectors = embed(model)
    assert np.abs(vectors - embed(own)).max() > 1e-3
    packed = load(folder, attention="bidirectional", append_eos=True, padding_free="true")
    np.testing.assert_allclose(embed(packed, packs=True), vectors, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([embed(model, [text]) for text in TEXTS]), vectors, atol=1e-6)
    model.save(str(tmp_path))
    again = load(str(tmp_path / "encoder"))
    assert again.encoders["encoder"].pooling_method == ("last",)
    np.testing.assert_array_equal(embed(again), vectors)
    theirs = convert(monkeypatch, tmp_path / "encoder")
    np.testing.assert_allclose(theirs.encode(TEXTS), vectors, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([theirs.encode([text]) for text in TEXTS]), vectors, atol=1e-5)
    np.testing.assert_allclose(embed(load(str(tmp_path / "encoder"))), vectors, atol=1e-6)


def test_a_flag_wins_over_the_folder_and_that_is_said(tmp_path, caplog):
    folder = build(tmp_path / "base", "LlamaModel")
    load(folder, attention="bidirectional").save(str(tmp_path))
    assert json.loads((tmp_path / "encoder" / "embedder.json").read_text())["attention"] == "bidirectional"
    caplog.set_level(logging.INFO)
    np.testing.assert_array_equal(embed(load(str(tmp_path / "encoder"), attention="causal")), embed(load(folder)))
    assert "attention causal, in place of bidirectional" in caplog.text


def test_adapters_alone_see_both_ways(tmp_path):
    folder = build(tmp_path / "base", "Qwen3Model")
    model = load(folder, attention="bidirectional", append_eos=True, lora=LoraSettings(2, 4))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights)
    model.save(str(tmp_path))
    for name in ("encoder", "adapters/encoder"):
        np.testing.assert_allclose(embed(load(str(tmp_path / name))), embed(model), atol=1e-5)


def test_gradients_are_the_same_when_layers_are_computed_again(tmp_path):
    folder, gradients = build(tmp_path, "LlamaModel"), []
    for again in (False, True):
        model = load(folder, attention="bidirectional").train()
        if again:
            model.activation_checkpointing_enable()
        tokens = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
        model.embed_key(tokens).sum().backward()
        gradients.append(next(model.parameters()).grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("name", "settings", "attention"),
    [("StableLmModel", {}, "bidirectional"), ("MambaModel", {"layer_norm_epsilon": 1e-5}, "bidirectional")],
)
def test_code_that_does_not_heed_the_flag_is_refused(name, settings, attention, tmp_path):
    folder = build(tmp_path, name)
    with pytest.raises(UserError, match=rf"--attention bidirectional: .*\({name.removesuffix('Model').lower()}\)"):
        load(folder, attention=attention)


def test_an_encoder_sees_both_ways_by_itself(tiny_bert, tmp_path):
    np.testing.assert_array_equal(embed(load(tiny_bert, attention="bidirectional")), embed(load(tiny_bert)))
    with pytest.raises(UserError, match=r"--attention causal: .*\(bert\)"):
        load(tiny_bert, attention="causal")


@pytest.mark.parametrize("changed", [{"attention": "bidirectional"}, {"append_eos": True}])
def test_going_on_otherwise_is_refused(changed, tmp_path):
    folder = build(tmp_path / "base", "LlamaModel")
    load(folder, **changed).save(str(tmp_path))
    load(folder, **changed).check_reads_alike(str(tmp_path))
    with pytest.raises(UserError, match=f"--{next(iter(changed))}"):
        load(folder).check_reads_alike(str(tmp_path))


# --- an end token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [True, False])
def test_each_text_ends_in_the_end_token(begins, tmp_path):
    tokenizer = decoder_tokenizer(begins)
    before = {text: tokenizer(text)["input_ids"] for text in TEXTS}
    first = [2] if begins else []
    append_eos(tokenizer, "here")
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text, ids in before.items():
            assert each(text)["input_ids"] == [*ids, 3]
            assert each(text, truncation=True, max_length=4)["input_ids"] == [*ids[:3], 3]
        pair = each("ab", "c")
        query, key = (tokenizer.convert_tokens_to_ids(tokens) for tokens in (["a", "##b"], ["c"]))
        assert pair["input_ids"] == [*first, *query, 3, *first, *key, 3]
        # Of what comes before the second text the tokenizer says nothing.
        assert pair.encodings[0].type_ids == [0] * (len(first) + 3) + [0] * len(first) + [1] * 2


def test_texts_that_end_already_and_tokenizers_without_an_end_token(caplog):
    caplog.set_level(logging.INFO)
    tokenizer = make_tokenizer()
    before = tokenizer("ab", "c")["input_ids"]
    append_eos(tokenizer, "here")
    assert tokenizer("ab", "c")["input_ids"] == before
    assert "here: texts end in '[SEP]' already" in caplog.text
    with pytest.raises(UserError, match="names no end token"):
        append_eos(decoder_tokenizer(eos_token=None), "here")


# --- rankers --------------------------------------------------------------------------------------------------------

PAIRS = [("a query", "a key"), ("b", "the answer to all of the questions"), ("c d e", "f"), ("g", "h" * 50)]


@pytest.mark.parametrize("attention", [None, "bidirectional"])
@pytest.mark.parametrize(("name", "padding"), [("LlamaModel", "[PAD]"), ("Qwen3Model", None), ("GPT2Model", None)])
def test_scores_of_a_decoder_are_read_at_the_end_token(name, padding, attention, tmp_path):
    folder = build(tmp_path / "base", name, decoder_tokenizer(pad_token=padding))
    torch.manual_seed(0)
    settings = {"append_eos": True, "attention": attention}
    ranker = load_cross_encoder(RankerConfig(folder, 60, 60, **settings)).eval()
    if attention is not None:
        assert ranker.backbone.base_model.config.is_causal is False
    ranker.save(str(tmp_path))
    saved = tmp_path / "ranker"
    scores = ranker.score_pairs(PAIRS)
    # By transformers, one pair at a time: the head reads the state of the last token, which ends the key.
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(saved).eval()
    tokenizer = AutoTokenizer.from_pretrained(saved)
    for (query, key), score in zip(PAIRS, scores, strict=True):
        tokens = tokenizer(query, key, return_tensors="pt")
        assert tokens["input_ids"][0, -1] == tokenizer.eos_token_id != tokenizer.pad_token_id
        with torch.no_grad():
            state = plain.base_model(**tokens).last_hidden_state[0, -1]
            np.testing.assert_allclose(plain.score(state).item(), score, atol=1e-5)
    again = load_cross_encoder(RankerConfig(str(saved), 60, 60), new_head=False).eval()
    np.testing.assert_allclose(again.score_pairs(PAIRS), scores, atol=1e-6)
    packed = load_cross_encoder(RankerConfig(str(saved), 60, 60, padding_free="true"), new_head=False).eval()
    config = EncodeConfig(packed.pairs.max_length, torch.device("cpu"), packs=True)
    np.testing.assert_allclose(packed.score_pairs(PAIRS, config), scores, atol=1e-5)
    np.testing.assert_allclose(TheirCrossEncoder(str(saved), device="cpu").predict(PAIRS), scores, atol=1e-5)
    with pytest.raises(UserError, match="give it as then" if attention else "give --append_eos as then"):
        load_cross_encoder(RankerConfig(folder, 60, 60, append_eos=attention is not None)).check_reads_alike(
            str(tmp_path)
        )


def test_a_ranker_without_another_token_to_pad_with(tmp_path):
    only = decoder_tokenizer(False, pad_token=None, unk_token=None, bos_token=None)
    folder = build(tmp_path, "LlamaModel", only)
    with pytest.raises(UserError, match="which is also to end texts"):
        load_cross_encoder(RankerConfig(folder, append_eos=True))


@pytest.mark.parametrize("changed", [{"attention": "bidirectional"}, {"append_eos": True}])
def test_models_that_read_texts_otherwise_are_not_merged(changed, tmp_path):
    folder = build(tmp_path, "LlamaModel")
    with pytest.raises(UserError, match=f"cannot be merged: .*--{next(iter(changed))}"):
        check_alike(load(folder), load(folder, **changed), ["A", "B"])
