"""The encoder against sentence-transformers, and the conversion to it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    ModernBertConfig,
    ModernBertModel,
)

from scripts import ours2st
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.encode import EncodeConfig, cut_batches, encode
from src.retrieval.models.pooling import DenseLayer, pool
from src.utils.cli import run as run_entry
from src.utils.errors import UserError

TEXTS = ["hello world", "a", "what is the answer to the question of everything", "1 2 3, 4!", "b" * 300]


def embed(model, texts=TEXTS, max_length=32, **config) -> np.ndarray:
    """Query embeddings."""
    settings = EncodeConfig(max_length, torch.device("cpu"), **config)
    return encode(model.eval().embed_query, model.query_tokenizer, texts, settings)


def st_folder(base: str, folder: Path, pooling: str, dense: torch.nn.Module | None = None, normalize=True) -> str:
    """A sentence-transformers folder over a transformers one."""
    transformer = Transformer(base, max_seq_length=32)
    modules = [transformer, Pooling(32, pooling_mode=pooling)]
    if dense is not None:
        modules.append(Dense(32, 8, activation_function=dense))
    if normalize:
        modules.append(Normalize())
    SentenceTransformer(modules=modules, similarity_fn_name=None if normalize else "dot", device="cpu").save(
        str(folder)
    )
    return str(folder)


def load(path: str, **config):
    lengths = {"query_max_length": 32, "key_max_length": 32}
    return load_dense_retriever(EncoderConfig(path, **{**lengths, "new_dense": True, **config}))


@pytest.mark.parametrize("backbone", ["tiny_bert", "tiny_llama"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "weightedmean", "lasttoken"])
def test_sentence_transformers_folder_embeds_alike(backbone, pooling, tmp_path, request):
    folder = st_folder(request.getfixturevalue(backbone), tmp_path / "st", pooling)
    model = load(folder)
    expected = SentenceTransformer(folder, device="cpu").encode(TEXTS)
    assert model.metric == "cos"
    assert model.encoders["encoder"].pooling_method == ({"lasttoken": "last"}.get(pooling, pooling),)
    np.testing.assert_allclose(embed(model), expected, atol=1e-6)


@pytest.mark.parametrize("activation", [torch.nn.Tanh(), torch.nn.Identity(), torch.nn.GELU()])
def test_dense_module_of_sentence_transformers_is_kept(activation, tiny_bert, tmp_path):
    folder = st_folder(tiny_bert, tmp_path / "st", "mean", dense=activation, normalize=False)
    model = load(folder)
    assert model.metric == "ip"
    assert model.encoders["encoder"].pooling_method == ("mean", "dense")
    np.testing.assert_allclose(embed(model), SentenceTransformer(folder, device="cpu").encode(TEXTS), atol=1e-6)


def test_flags_win_over_what_the_checkpoint_says(tiny_bert, tmp_path):
    folder = st_folder(tiny_bert, tmp_path / "st", "mean")
    model = load(folder, pooling_method=("cls",), dense_metric="l2")
    assert model.encoders["encoder"].pooling_method == ("cls",)
    assert model.metric == "l2"


def test_a_plain_folder_gets_the_defaults(tiny_bert):
    """cls and cos: the state of the first token, scaled to length 1, one text at a time."""
    model = load(tiny_bert)
    tokenizer, plain = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    for text, vector in zip(TEXTS, embed(model), strict=True):
        with torch.no_grad():
            state = plain(**tokenizer(text, return_tensors="pt", truncation=True, max_length=32)).last_hidden_state[
                0, 0
            ]
        np.testing.assert_allclose(vector, (state / state.norm()).numpy(), atol=1e-6)


def test_t5_encoder_and_decoder(tiny_t5):
    """mean uses the encoder alone, decoder the state of the decoder's start token."""
    tokenizer, whole = AutoTokenizer.from_pretrained(tiny_t5), AutoModel.from_pretrained(tiny_t5).eval()
    for pooling in ("mean", "decoder"):
        vectors = embed(load(tiny_t5, pooling_method=(pooling,), dense_metric="ip"))
        for text, vector in zip(TEXTS, vectors, strict=True):
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
            with torch.no_grad():
                output = whole(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    decoder_input_ids=torch.tensor([[0]]),
                )
            mean, start = output.encoder_last_hidden_state[0].mean(0), output.last_hidden_state[0, 0]
            np.testing.assert_allclose(vector, (mean if pooling == "mean" else start).numpy(), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_by_hand(side):
    """Two tokens [1, 2] and [3, 6] and one padding place, on either side."""
    tokens = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    padding = torch.tensor([[9.0, 9.0]])
    states = torch.cat([padding, tokens] if side == "left" else [tokens, padding])[None]
    mask = torch.tensor([[0, 1, 1] if side == "left" else [1, 1, 0]])
    assert pool(states, mask, "cls").tolist() == [[1.0, 2.0]]
    assert pool(states, mask, "mean").tolist() == [[2.0, 4.0]]
    torch.testing.assert_close(pool(states, mask, "weightedmean"), torch.tensor([[7.0, 14.0]]) / 3)
    assert pool(states, mask, "last").tolist() == [[3.0, 6.0]]


def test_batching_does_not_change_embeddings(tiny_bert):
    model = load(tiny_bert)
    texts = TEXTS * 7
    alone = np.concatenate([embed(model, [text]) for text in texts])
    np.testing.assert_allclose(embed(model, texts, batch_tokens=64), alone, atol=1e-6)
    np.testing.assert_allclose(embed(model, texts, batch_size=3), alone, atol=1e-6)


def test_cut_batches_stays_within_the_budget():
    lengths = [3, 10, 1, 7, 7, 30, 2]
    batches = cut_batches(lengths, batch_size=3, batch_tokens=20)
    assert sorted(np.concatenate(batches).tolist()) == list(range(7))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or (len(batch) <= 3 and len(batch) * longest <= 20)


def test_untied_encoders_save_and_load(tiny_bert, tiny_llama, tmp_path):
    config = {"tie_encoders": False, "pooling_method": ("mean", "dense"), "dense_dim": 8, "dense_metric": "ip"}
    model = load(tiny_bert, key_encoder=tiny_llama, **config)
    model.save(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key_encoder", "query_encoder"]
    again = load(str(tmp_path), key_encoder=str(tmp_path), tie_encoders=False)
    np.testing.assert_array_equal(embed(again), embed(model))
    settings = EncodeConfig(32, torch.device("cpu"))
    keys = [encode(m.eval().embed_key, m.key_tokenizer, TEXTS, settings) for m in (model, again)]
    np.testing.assert_array_equal(*keys)


def convert(monkeypatch, *arguments: str) -> int:
    """Run ours2st in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["ours2st.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_entry(ours2st.main)
    return int(stop.value.code or 0)


@pytest.mark.parametrize("metric", ["cos", "ip"])
@pytest.mark.parametrize("pooling", [("cls",), ("mean",), ("weightedmean",), ("last",), ("mean", "dense")])
def test_ours2st(pooling, metric, tiny_bert, tmp_path, monkeypatch):
    model = load(tiny_bert, pooling_method=pooling, dense_metric=metric, dense_dim=8 if "dense" in pooling else None)
    if "dense" in pooling:
        model.encoders["encoder"].dense.activation = torch.nn.Tanh()
    model.save(str(tmp_path))
    encoder = str(tmp_path / "encoder")
    assert convert(monkeypatch, "--encoder", encoder) == 0
    converted = SentenceTransformer(encoder, device="cpu")
    converted.max_seq_length = 32
    np.testing.assert_allclose(converted.encode(TEXTS), embed(model), atol=1e-5)
    assert converted.similarity_fn_name == {"cos": "cosine", "ip": "dot"}[metric]
    np.testing.assert_array_equal(embed(load(encoder)), embed(model))


def test_ours2st_refuses_what_it_cannot_express(tiny_t5, tmp_path, monkeypatch, capsys):
    load(tiny_t5, pooling_method=("decoder",)).save(str(tmp_path))
    before = sorted(path.name for path in (tmp_path / "encoder").iterdir())
    assert convert(monkeypatch, "--encoder", str(tmp_path / "encoder")) == 2
    assert "cannot express the pooling 'decoder'" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_ours2st_notices_a_difference(tiny_bert, tmp_path, monkeypatch, capsys):
    """A converter that forgets the dense layer's activation must not pass."""
    model = load(tiny_bert, pooling_method=("mean", "dense"), dense_dim=8, dense_metric="ip")
    model.encoders["encoder"].dense.activation = torch.nn.Tanh()
    model.save(str(tmp_path))
    monkeypatch.setattr(ours2st, "Dense", lambda i, o, bias, activation: Dense(i, o, bias, torch.nn.Identity()))
    assert convert(monkeypatch, "--encoder", str(tmp_path / "encoder"), "--output_dir", str(tmp_path / "st")) == 2
    assert "the converted model embeds differently" in capsys.readouterr().err
    assert not (tmp_path / "st").exists()


def test_ours2st_loads_pickles_and_code_only_when_asked_to(tiny_bert, tmp_path, monkeypatch, capsys):
    """The code renames BERT, and registers what it makes of it."""
    model = load(tiny_bert, pooling_method=("mean",))
    model.save(str(tmp_path))
    encoder, wanted = tmp_path / "encoder", embed(model)
    torch.save(load_file(encoder / "model.safetensors"), encoder / "pytorch_model.bin")
    (encoder / "model.safetensors").unlink()
    config = json.loads((encoder / "config.json").read_text())
    own = {"AutoConfig": "named.NamedConfig", "AutoModel": "named.NamedModel"}
    (encoder / "config.json").write_text(json.dumps({**config, "model_type": "named", "auto_map": own}))
    (encoder / "named.py").write_text(
        "from transformers import BertConfig, BertModel\n"
        "class NamedConfig(BertConfig):\n    model_type = 'named'\n"
        "class NamedModel(BertModel):\n    config_class = NamedConfig\n"
        "    def __init__(self, config):\n        super().__init__(config, add_pooling_layer=False)\n"
    )
    flags = ["--encoder", str(encoder), "--output_dir", str(tmp_path / "st")]
    assert convert(monkeypatch, *flags, "--trust_remote_code") == 2
    assert "give --allow_pickle" in capsys.readouterr().err
    assert convert(monkeypatch, *flags, "--allow_pickle") == 2
    assert "give --trust_remote_code" in capsys.readouterr().err
    assert convert(monkeypatch, *flags, "--allow_pickle", "--trust_remote_code") == 0
    converted = SentenceTransformer(str(tmp_path / "st"), device="cpu", trust_remote_code=True)
    converted.max_seq_length = 32
    np.testing.assert_allclose(converted.encode(TEXTS), wanted, atol=1e-5)


def test_ours2st_names_the_encoder_that_may_be_meant(tiny_bert, tmp_path, monkeypatch, capsys):
    for step in (500, 1000):
        shutil.copytree(tiny_bert, tmp_path / f"checkpoint-{step}" / "encoder")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    newest = tmp_path / "checkpoint-1000" / "encoder"
    for wrong in ("", "checkpoint-1000", "checkpoint-2000/encoder", "encoder"):
        assert convert(monkeypatch, "--encoder", str(tmp_path / wrong)) == 2
        assert f"did you mean {newest}?" in capsys.readouterr().err
    newest.rename(tmp_path / "checkpoint-1000" / ".encoder.replaced")
    assert convert(monkeypatch, "--encoder", str(newest)) == 2
    assert "a killed conversion left it as" in capsys.readouterr().err


def test_pickled_dense_weights_are_refused(tmp_path):
    layer = DenseLayer(4, 2)
    layer.save(str(tmp_path / "dense"))
    shutil.move(tmp_path / "dense/model.safetensors", tmp_path / "dense/pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin keeps the weights of a dense layer in a pickle.*--allow_p"
    ):
        DenseLayer.load(str(tmp_path / "dense"))


def test_unsupported_modules_are_named(tiny_bert, tmp_path):
    folder = st_folder(tiny_bert, tmp_path / "st", "max")
    with pytest.raises(UserError, match="pooling max of sentence-transformers is not supported"):
        load(folder)
    modules = json.loads((tmp_path / "st/modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.models.CNN"
    (tmp_path / "st/modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=r"modules Transformer, CNN, Normalize .* only Transformer, Pooling"):
        load(folder)


def test_leading_dimensions_are_those_of_sentence_transformers(tiny_bert, tmp_path):
    """Cut and of unit length again, like SentenceTransformer(truncate_dim=…) with normalized embeddings."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(tiny_bert)
    theirs = SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="mean")], truncate_dim=12, device="cpu")
    model = load_dense_retriever(EncoderConfig(tiny_bert, pooling_method=("mean",), truncate_dim=12)).eval()
    texts = ["a text", "and another one"]
    with torch.no_grad():
        ours = model.embed_key(model.key_tokenizer(texts, padding=True, return_tensors="pt"))
    expected = theirs.encode(texts, normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_untied_encoders_of_different_width_are_refused(tiny_bert, tmp_path):
    config = BertConfig.from_pretrained(tiny_bert, hidden_size=16)
    BertModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="vectors of queries have 32 dimensions, those of keys 16"):
        load_dense_retriever(EncoderConfig(tiny_bert, str(tmp_path), tie_encoders=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", [("mean",), ("cls", "dense")])
def test_weights_in_half_precision_are_used_as_they_are(tiny_llama: str, dtype, pooling):
    config = EncoderConfig(
        tiny_llama, pooling_method=pooling, new_dense=True, dense_dim=8 if len(pooling) > 1 else None
    )
    model = load_dense_retriever(config).eval()
    texts = ["a", "hello world", "x" * 200, "one two three"]
    exact, (encoder,) = model.encode_keys(texts), model.encoders.values()
    fingerprint = encoder.fingerprint
    assert encoder.halve(dtype)
    assert {weight.dtype for weight in encoder.parameters()} == {dtype}
    assert encoder.fingerprint == fingerprint
    found = model.encode_keys(texts)
    assert 0 < np.abs(found - exact).max() < 32 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        np.testing.assert_array_equal(model.encode_keys(texts), found)


def test_weights_of_architectures_that_need_fp32_stay(tiny_t5: str):
    (encoder,) = load_dense_retriever(EncoderConfig(tiny_t5, pooling_method=("mean",))).eval().encoders.values()
    assert not encoder.halve(torch.float16)
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}


def test_weights_that_half_precision_spoils_stay(tiny_bert: str):
    model = load_dense_retriever(EncoderConfig(tiny_bert)).eval()
    (encoder,) = model.encoders.values()
    with torch.no_grad():
        # Beyond fp16's range, and back.
        encoder.backbone.encoder.layer[0].intermediate.dense.weight.mul_(1e6)
        encoder.backbone.encoder.layer[0].output.dense.weight.mul_(1e-6)
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    assert not encoder.halve(torch.float16)
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.state_dict().items())


SMALL = {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "bert": lambda: None,
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**SMALL, dim=32, n_layers=2, n_heads=2, hidden_dim=64)),
    "gpt2": lambda: GPT2Model(GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=2)),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(
            **SMALL,
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
            **{"embedding_dropout": 0.1, "mlp_dropout": 0.1, "attention_dropout": 0.1},
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
    "t5": lambda: None,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_what_the_flag_says(family, tiny_bert, tiny_t5, tmp_path):
    """Without any a model in training computes as in evaluation; the saved configuration stays as it was."""
    folder = {"bert": tiny_bert, "t5": tiny_t5}.get(family)
    if folder is None:
        torch.manual_seed(0)
        FAMILIES[family]().save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
        folder = str(tmp_path)
    model = load_dense_retriever(EncoderConfig(folder, pooling_method=("mean",)))
    before = model.backbones[0].config.to_dict()
    tokens = dict(model.query_tokenizer(["hello world", "the question"], return_tensors="pt", padding=True))
    tokens.pop("token_type_ids", None)
    still = model.eval().embed_query(tokens)
    model.train()
    for share, alike in ((None, False), (0.0, True), (0.5, False)):
        if share is not None:
            model.set_dropout(share)
        difference = (model.embed_query(tokens) - still).abs().max().item()
        assert (difference < 1e-6) == alike, share
    assert model.backbones[0].config.to_dict() == before
