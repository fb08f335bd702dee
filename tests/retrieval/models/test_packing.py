"""Packed batches: whatever model, a text has the states that transformers computes for it alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification

from src.retrieval.args import RankerArgs
from src.retrieval.models import packed_attention, packing, trainable
from src.retrieval.models.cross_encoder import RankerConfig, load_cross_encoder
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.encode import EncodeConfig, cut_batches
from src.retrieval.models.packed_attention import (
    PACKED,
    PackingError,
    enable,
    enable_head,
    packed_logits,
    packed_states,
)
from src.retrieval.models.packing import FILLERS, LONGEST, STARTS, Packer, join, packs, pool_packed
from src.retrieval.models.pooling import pool
from src.utils.errors import UserError

SIZE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**SIZE, "intermediate_size": 64, "max_position_embeddings": 64}
ROBERTA = {**BERT, "pad_token_id": 1, "max_position_embeddings": 66}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0}
MODERN = {**SIZE, "num_hidden_layers": 3, "intermediate_size": 64, "pad_token_id": 0, "local_attention": 8}
MODERN |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
#: What can be packed, with settings of a small model.
FAMILIES = {
    "BertModel": BERT,
    "ElectraModel": {**BERT, "embedding_size": 16},
    "RobertaModel": ROBERTA,
    "XLMRobertaModel": ROBERTA,
    "CamembertModel": ROBERTA,
    "DistilBertModel": {"vocab_size": 40, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "ModernBertModel": MODERN,
    "LlamaModel": LLAMA,
    "MistralModel": {**LLAMA, "sliding_window": 6},
    "Qwen2Model": {**LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3Model": {**LLAMA, "head_dim": 8},
    "GemmaModel": {**LLAMA, "head_dim": 8},
    "Gemma3TextModel": {**LLAMA, "head_dim": 8, "sliding_window": 6, "layer_types": None},
    "GPT2Model": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPTModel": {**BERT, "ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1},
}
#: What cannot, with a part of the reason.
OTHERS = {
    "MPNetModel": (ROBERTA, "cannot be chosen"),
    "Gemma2Model": ({**LLAMA, "head_dim": 8}, "softcap"),
    "LongformerModel": ({**ROBERTA, "attention_window": [8, 8]}, "cannot be chosen|something|fails"),
    "T5EncoderModel": (
        {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "bias",
    ),
    "DebertaV2Model": (BERT, "cannot be chosen"),
    # Positions are counted otherwise, or attention does more than its name says.
    "StableLmModel": (LLAMA, "something else"),
    "NemotronModel": ({**LLAMA, "head_dim": 8}, "something else"),
    "DogeModel": (LLAMA, "something else"),
    # Local attention is done by the mask alone, whatever it reaches.
    "PhimoeModel": ({**LLAMA, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1}, "something else"),
    "PhimoeModel of long reach": (
        {**LLAMA, "sliding_window": 600, "num_local_experts": 2, "num_experts_per_tok": 1},
        "how far they attend",
    ),
    "Qwen2MoeModel of long reach": (
        {**LLAMA, "use_sliding_window": True, "sliding_window": 600, "max_window_layers": 2, "num_experts": 2}
        | {"num_experts_per_tok": 1},
        "how far they attend",
    ),
}
#: Of texts: one of a single token, one as long as the model takes.
LENGTHS = (5, 1, 64, 17, 2, 17)


def build(name: str, settings: dict) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, name.split()[0])
    model = model_class(model_class.config_class(**settings))
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    return model.eval()


def rows(lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 40, (length,), generator=generator).tolist() for length in lengths]


def alone(model, texts: list[list[int]]) -> list[torch.Tensor]:
    """States of each text by transformers' eager attention."""
    return [model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in texts]


@pytest.mark.parametrize("name", FAMILIES)
def test_states_and_gradients_are_those_of_texts_alone(name: str):
    model, texts = build(name, FAMILIES[name]), rows()
    weights = torch.randn(sum(LENGTHS), 32)

    def gradients(states: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (states * weights).sum().backward()
        return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}

    expected = torch.cat(alone(model, texts))
    wanted = gradients(expected)
    packer = enable(model, tokens=range(3, 40))
    assert model.config._attn_implementation == PACKED
    states = packed_states(model, packer({"input_ids": texts}, range(len(texts))))
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    found = gradients(states)
    assert found.keys() == wanted.keys()
    for key in found:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5 * float(wanted[key].abs().max() + 1))
    # And padded batches are what they were.
    torch.testing.assert_close(torch.cat(alone(model, texts)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_rounds_no_more_than_padded_batches_do(name: str):
    model, texts = build(name, FAMILIES[name]), rows()
    exact = torch.cat(alone(model, texts))
    batch = enable(model, tokens=range(3, 40))({"input_ids": texts}, range(len(texts)))
    with torch.autocast("cpu", torch.bfloat16):
        padded = torch.cat(alone(model, texts)).float()
        packed = packed_states(model, batch).float()
    packed, padded, exact = packed.detach(), padded.detach(), exact.detach()
    assert 0 < float((packed - exact).norm()) < 1.5 * float((padded - exact).norm())


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_stay_as_they_are(name: str):
    settings, reason = OTHERS[name]
    model, texts = build(name, settings), rows()
    implementation, expected = model.config._attn_implementation, torch.cat(alone(model, texts))
    with pytest.raises(PackingError, match=reason):
        enable(model, tokens=range(3, 40))
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(torch.cat(alone(model, texts)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_classifiers_are_those_of_texts_alone(name: str):
    config = getattr(transformers, name).config_class(**FAMILIES[name])
    config.num_labels, config.pad_token_id = 1, config.pad_token_id or 0
    torch.manual_seed(0)
    classifier, texts = AutoModelForSequenceClassification.from_config(config).eval(), rows()
    expected = torch.cat([classifier(input_ids=torch.tensor([row])).logits for row in texts])
    packer = enable_head(classifier, tokens=range(3, 40))
    scores = packed_logits(classifier, packer({"input_ids": texts}, range(len(texts))))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_reads_all_tokens_stays_as_it_is():
    config = transformers.ModernBertConfig(**MODERN, classifier_pooling="mean", num_labels=1)
    classifier, texts = AutoModelForSequenceClassification.from_config(config).eval(), rows()
    expected = torch.cat([classifier(input_ids=torch.tensor([row])).logits for row in texts])
    with pytest.raises(PackingError):
        enable_head(classifier, tokens=range(3, 40))
    found = torch.cat([classifier(input_ids=torch.tensor([row])).logits for row in texts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reach", [6, 600])
def test_local_attention_that_is_handed_on_may_reach_far(reach: int):
    model = build("MistralModel", {**LLAMA, "sliding_window": reach})
    enable(model, tokens=range(3, 40))
    assert model.config._attn_implementation == PACKED


def test_a_tokenizer_that_knows_no_english_is_no_trial():
    with pytest.raises(PackingError, match="too few tokens"):
        enable(build("BertModel", BERT), tokens=[7, 7, 8])


@pytest.mark.parametrize("pooling", ["cls", "mean", "weightedmean", "last"])
def test_texts_without_tokens_are_like_no_other(pooling: str, tiny_llama: str):
    model = load_dense_retriever(EncoderConfig(tiny_llama, pooling_method=(pooling,), padding_free="true")).eval()
    model.key_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    config = EncodeConfig(32, torch.device("cpu"), packs=True)
    vectors = model.encode_keys(["", "a", "", "x y"], config)
    assert not vectors[[0, 2]].any()
    assert vectors[[1, 3]].any(1).all()
    np.testing.assert_allclose(model.encode_keys(["a", "x y"], config), vectors[[1, 3]], atol=1e-6)
    assert not model.encode_keys(["", ""], config).any()


@pytest.mark.parametrize("method", ["cls", "mean", "weightedmean", "last"])
def test_pooling_is_that_of_padded_batches(method: str):
    states, lengths = torch.randn(sum(LENGTHS), 8, requires_grad=True), torch.tensor(LENGTHS)
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    padded = torch.nn.utils.rnn.pad_sequence(states.split(LENGTHS), batch_first=True)
    mask = torch.arange(max(LENGTHS)) < lengths[:, None]
    expected, found = pool(padded, mask.long(), method), pool_packed(states, starts, method)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((vectors * weights).sum(), states)[0] for vectors in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_batches_are_joined_text_after_text():
    packer, texts = Packer(first_position=2, filler=9), rows((3, 1, 4))
    kinds = [[0] * 3, [1], [0, 1, 1, 1]]
    encoded = {"input_ids": texts, "token_type_ids": kinds}
    whole, parts = packer(encoded, [2, 0, 1]), [packer(encoded, [2]), packer(encoded, [0, 1])]
    joined = join(parts)
    assert joined.pop(LONGEST) == whole.pop(LONGEST) == 4
    for name in whole:
        torch.testing.assert_close(joined[name], whole[name])
    assert whole["position_ids"].tolist() == [[2, 3, 4, 5, 2, 3, 4, 2]]
    assert whole[STARTS].tolist() == [0, 4, 7, 8]
    # Texts without tokens, and a batch of nothing else.
    assert packer({"input_ids": [[], [7]]}, [0, 1])[STARTS].tolist() == [0, 0, 1]
    nothing = packer({"input_ids": [[], []]}, [0, 1])
    assert (nothing["input_ids"].tolist(), nothing[STARTS].tolist()) == ([[9]], [0, 0, 0, 1])


def test_saved_settings_do_not_name_it(tmp_path: Path):
    model = build("BertModel", BERT)
    enable(model, tokens=range(3, 40))
    model.save_pretrained(tmp_path)
    assert PACKED not in (tmp_path / "config.json").read_text()


def test_dropout_of_attention_acts():
    model = build("BertModel", {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5})
    batch = enable(model, tokens=range(3, 40))({"input_ids": rows()}, range(len(LENGTHS)))
    assert torch.equal(packed_states(model, batch), packed_states(model, batch))
    assert not torch.equal(packed_states(model.train(), batch), packed_states(model, batch))


TEXTS = ["a", "hello world", "x" * 200, "", "one two three", "The answer, 42!"] * 4


@pytest.mark.parametrize("tokens", [None, 7, 64])
@pytest.mark.parametrize("pooling", ["cls", "mean", "weightedmean", "last"])
def test_vectors_are_those_of_padded_batches(pooling: str, tokens: int | None, tiny_bert: str):
    found = []
    for padding_free in ("true", "false"):
        settings = EncoderConfig(tiny_bert, pooling_method=(pooling,), padding_free=padding_free)
        model = load_dense_retriever(settings).eval()
        assert (model.key_packer is not None) == (padding_free == "true")
        config = EncodeConfig(32, torch.device("cpu"), batch_tokens=tokens, packs=padding_free == "true")
        found.append(model.encode_keys(TEXTS, config))
    np.testing.assert_allclose(*found, atol=1e-6)


def test_scores_of_pairs_are_those_of_padded_batches(tiny_bert: str):
    found = []
    pairs = [(text, key) for text in TEXTS[:6] for key in TEXTS[:6]]
    for padding_free in ("true", "false"):
        torch.manual_seed(0)
        model = load_cross_encoder(RankerConfig(tiny_bert, 16, 16, padding_free=padding_free)).eval()
        config = EncodeConfig(model.pairs.max_length, torch.device("cpu"), packs=padding_free == "true")
        found.append(model.score_pairs(pairs, config))
    assert found[0].std() > 1e-4
    np.testing.assert_allclose(*found, atol=1e-7)


def test_a_batch_of_packed_texts_is_cut_by_their_tokens():
    lengths = [3, 0, 9, 2, 2, 8]
    cut = [part.tolist() for part in cut_batches(lengths, 100, 10, padded=False)]
    assert cut == [[2], [5], [0, 3, 4, 1]]
    assert [part.tolist() for part in cut_batches(lengths, 2, 10, padded=False)] == [[2], [5], [0, 3], [4, 1]]


def test_an_encoder_that_needs_padding(tiny_t5: str, caplog, monkeypatch):
    settings = EncoderConfig(tiny_t5, pooling_method=("mean",), padding_free="true")
    with pytest.raises(UserError, match=r"--padding_free True: .* cannot read texts without padding: .*position_bias"):
        load_dense_retriever(settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level("INFO"):
        model = load_dense_retriever(replace(settings, padding_free="auto"))
    assert model.key_packer is None
    assert "cannot read texts without padding" in caplog.text


def test_heads_that_flash_attention_does_not_take(monkeypatch):
    model = build("BertModel", {**BERT, "hidden_size": 36})
    enable(model, tokens=range(3, 40))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(PackingError, match="no heads of 9 and 9 dimensions"):
        enable(build("BertModel", {**BERT, "hidden_size": 36}), tokens=range(3, 40))


def test_attention_of_transformers_is_taken_as_named(tiny_bert: str):
    model = load_dense_retriever(EncoderConfig(tiny_bert, attn_implementation="eager"))
    assert model.backbones[0].config._attn_implementation == "eager"
    with pytest.raises(UserError, match="FlashAttention2"):
        load_dense_retriever(EncoderConfig(tiny_bert, attn_implementation="flash_attention_2"))
    assert RankerArgs(attn_implementation="eager").padding_free == "false"
    with pytest.raises(UserError, match="--padding_free True does not go with --attn_implementation sdpa"):
        RankerArgs(attn_implementation="sdpa", padding_free="True")
    with pytest.raises(UserError, match="--attn_implementation 'fast' is unknown"):
        RankerArgs(attn_implementation="fast")


@pytest.mark.parametrize(
    ("flag", "device", "half", "capability", "expected"),
    [
        ("auto", "cuda", True, (8, 0), True),
        ("auto", "cuda", True, (7, 5), False),
        ("auto", "cuda", False, (9, 0), False),
        ("auto", "cpu", True, (9, 0), False),
        ("true", "cpu", False, (9, 0), True),
        ("false", "cuda", True, (9, 0), False),
    ],
)
def test_when_texts_are_packed(flag, device, half, capability, expected, monkeypatch):
    monkeypatch.setattr(packing, "has_flash", packing.has_flash.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert packs(flag, torch.device(device), half) is expected


@pytest.mark.parametrize("total", [1, 100, 1000, 30_000, 400_000])
def test_batches_are_filled_up_to_few_totals(total: int):
    packer, sizes = Packer(first_position=1, filler=4, filled=True), set()
    for more in range(0, total // 10 + 1, max(1, total // 100)):
        texts = [[7] * (total + more - 1), [8]] if total > 1 else [[8]]
        batch = packer({"input_ids": texts}, range(len(texts)))
        lengths = batch[STARTS].diff().tolist()
        assert lengths[: len(texts)] == list(map(len, texts))
        assert len(lengths) == len(texts) + FILLERS
        assert min(lengths) >= 1
        assert batch[LONGEST] >= max(lengths)
        assert set(batch["position_ids"][0, sum(map(len, texts)) :].tolist()) == {1}
        sizes.add(batch["input_ids"].shape[1])
    assert len(sizes) <= 3
    assert max(sizes) <= 1.2 * total * 1.1 + 400


def test_fillers_change_no_vector():
    model, texts = build("BertModel", BERT), rows()
    packer = enable(model, tokens=range(3, 40))
    plain, filled = (each({"input_ids": texts}, range(len(texts))) for each in (packer, replace(packer, filled=True)))
    expected = packed_states(model, plain)
    torch.testing.assert_close(packed_states(model, filled)[: len(expected)], expected, rtol=1e-5, atol=1e-6)


def masked(query, key, value, view, dropout, scaling):
    """Attention over all tokens of a packed batch, with a mask: what can be compiled on a CPU."""
    tokens = torch.arange(query.shape[2])
    text, apart = torch.bucketize(tokens, view.starts[1:], right=True), tokens[:, None] - tokens
    mask = text[:, None] == text
    if view.window is not None:
        mask = mask & (apart.abs() <= view.window)
    if view.causal:
        mask = mask & (apart >= 0)
    shared = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=shared
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel", "ModernBertModel", "MistralModel"])
def test_layers_are_compiled_once_for_any_number_of_tokens(name: str, monkeypatch):
    model, texts = build(name, FAMILIES[name]), rows()
    packer = enable(model, tokens=range(3, 40))
    batches = [packer({"input_ids": texts}, range(first, len(texts))) for first in range(4)]
    expected = [packed_states(model, batch) for batch in batches]
    monkeypatch.setattr(packed_attention, "_blocks", masked)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    above = model.get_submodule(trainable._longest_list(model).rpartition(".")[0])
    above.compile(backend=backend, dynamic=True, fullgraph=True)
    for batch, states in zip(batches, expected, strict=True):
        torch.testing.assert_close(packed_states(model, batch), states, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
