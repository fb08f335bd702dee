"""Adapters: trained, merged, saved alone, loaded by peft and sentence-transformers, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model

from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.loading import Checkpoint
from src.retrieval.models.lora import LoraSettings, add_adapters, load_adapters
from src.retrieval.training import args as training_args
from src.utils.errors import UserError
from tests.conftest import VOCABULARY, make_tokenizer
from tests.helpers import run, write_rows

FLAGS = ["--lora_r", 3, "--lora_alpha", 12, "--learning_rate", 0.01, "--use_cpu", "--add_instruction", False]
FLAGS += ["--query_max_length", 24, "--key_max_length", 24, "--per_device_train_batch_size", 4, "--seed", 1]
TEXTS = ["a query", "some longer text of a key", "x"]


def rows(folder):
    texts = [f"text number {n} of {n * 7}" for n in range(40)]
    made = [{"query": f"query {n}", "pos": [texts[n]], "neg": texts[20:30]} for n in range(16)]
    return write_rows(folder / "train.json", made)


def train(data, encoder, output, steps, *more, processes=1):
    command = ["run_dense.py", "--train_data", data, "--query_encoder", encoder, "--output_dir", output, *FLAGS]
    command += ["--max_steps", steps, "--save_steps", 2, "--train_group_size", 3, *more]
    done = run(list(map(str, command)), processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def trained(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return train(rows(folder), tiny_llama, folder / "out", 4, "--pooling_method", "last", "--lora_dropout", 0.1)


def embed(encoder) -> torch.Tensor:
    model = load_dense_retriever(EncoderConfig(str(encoder))).eval()
    with torch.no_grad():
        return model.embed_key(model.key_tokenizer(TEXTS, padding=True, return_tensors="pt"))


def test_merged_and_alone_embed_alike_and_as_peft_does(trained, tiny_llama):
    checkpoint = trained / "checkpoint-4"
    merged, alone = embed(checkpoint / "encoder"), embed(checkpoint / "adapters" / "encoder")
    torch.testing.assert_close(merged, alone, atol=1e-5, rtol=0)
    assert float((merged - embed(trained / "checkpoint-2" / "encoder")).abs().max()) > 1e-3
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_llama), checkpoint / "adapters" / "encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "adapters" / "encoder")
    for text, vector in zip(TEXTS, merged, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(torch.nn.functional.normalize(states[-1], dim=0), vector, atol=1e-5, rtol=0)
    # The plain folder needs no peft.
    names = set(AutoModel.from_pretrained(checkpoint / "encoder").state_dict())
    assert names == set(AutoModel.from_pretrained(tiny_llama).state_dict())


def test_only_adapters_train(tiny_bert):
    model = load_dense_retriever(EncoderConfig(tiny_bert, lora=LoraSettings(2, 4)))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    # Before the first step adapters change nothing.
    with torch.no_grad():
        tokens = model.key_tokenizer(TEXTS, padding=True, return_tensors="pt")
        torch.testing.assert_close(model.eval().embed_key(tokens), embed(tiny_bert))


def test_both_folders_convert_to_sentence_transformers(trained, tmp_path):
    vectors = []
    for folder in ("encoder", "adapters/encoder"):
        output = tmp_path / folder.replace("/", "-")
        source = str(trained / "checkpoint-4" / folder)
        done = run(["scripts/ours2st.py", "--encoder", source, "--output_dir", str(output)])
        assert done.returncode == 0, done.stderr
        vectors.append(torch.tensor(SentenceTransformer(str(output), device="cpu").encode(TEXTS)))
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=0)


def test_adapters_find_a_base_that_was_named_by_a_relative_path(tiny_bert, tmp_path, monkeypatch):
    base = Path(tiny_bert)
    monkeypatch.chdir(base.parent)
    model = load_dense_retriever(EncoderConfig(base.name, lora=LoraSettings(2, 4)))
    model.save(str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    # Before the first step adapters change nothing.
    torch.testing.assert_close(embed("out/adapters/encoder"), embed(tiny_bert))


def test_adapters_of_layers_that_lie_the_other_way_round(tmp_path):
    """GPT-2 has Conv1D in place of linear layers, some of them square."""
    torch.manual_seed(0)
    base = GPT2Model(GPT2Config(vocab_size=len(VOCABULARY), n_positions=64, n_embd=16, n_layer=1, n_head=2))
    base.save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    config = EncoderConfig(str(tmp_path / "gpt2"), pooling_method=("mean",), lora=LoraSettings(2, 4))
    model = load_dense_retriever(config).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    model.save(str(tmp_path / "out"))
    with torch.no_grad():
        wanted = model.embed_key(model.key_tokenizer(TEXTS, padding=True, return_tensors="pt"))
    assert float((wanted - embed(tmp_path / "gpt2")).abs().max()) > 0.01
    for folder in ("encoder", "adapters/encoder"):
        torch.testing.assert_close(embed(tmp_path / "out" / folder), wanted, atol=1e-5, rtol=0)


def test_a_folder_of_adapters_can_be_trained_on(trained):
    model = load_dense_retriever(EncoderConfig(str(trained / "checkpoint-4" / "adapters" / "encoder")))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_equals_an_undisturbed_one(trained, tiny_llama, tmp_path, processes):
    data, flags = trained.parent / "train.json", ("--pooling_method", "last", "--lora_dropout", 0.1)
    whole = trained
    if processes == 2:
        whole = train(data, tiny_llama, tmp_path / "whole", 4, *flags, processes=2)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    train(data, tiny_llama, tmp_path / "out", 4, *flags, "--resume_from_checkpoint", True, processes=processes)
    torch.testing.assert_close(
        embed(tmp_path / "out" / "checkpoint-4" / "encoder"), embed(whole / "checkpoint-4" / "encoder"), atol=0, rtol=0
    )


def test_adapters_that_cannot_be_loaded(trained, tmp_path):
    source = trained / "checkpoint-4" / "adapters" / "encoder"
    moved = shutil.copytree(source, tmp_path / "moved")
    config = json.loads((source / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/where"}))
    with pytest.raises(UserError, match="holds adapters of another encoder, /no/where: cannot load"):
        embed(moved)
    damaged = shutil.copytree(source, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="cannot load the adapters"):
        embed(damaged)
    with pytest.raises(UserError, match="cannot load the adapters"):
        load_adapters(torch.nn.Linear(1, 1), str(damaged))


def test_what_cannot_be_is_said(trained, tiny_llama, tiny_bert, tmp_path):
    model = load_dense_retriever(EncoderConfig(tiny_bert))
    with pytest.raises(UserError, match="its linear layers are dense, key, query, value"):
        add_adapters(model.backbones[0], LoraSettings(2, 4, target_modules=("q_proj",)))
    with pytest.raises(UserError, match=r"word_embeddings of the encoder is no linear layer \(Embedding\)"):
        add_adapters(model.backbones[0], LoraSettings(2, 4, target_modules=("word_embeddings",)))
    data = trained.parent / "train.json"
    command = ["run_dense.py", "--train_data", data, "--query_encoder", tiny_llama, "--output_dir", tmp_path, *FLAGS]
    command += ["--pooling_method", "last", "--max_steps", 4, "--train_group_size", 3]
    done = run([*map(str, command), "--lora_r", "5", "--resume_from_checkpoint", str(trained / "checkpoint-2")])
    assert done.returncode == 2
    assert "its adapters are of another size or place" in done.stderr
    command = [
        "run_dense.py",
        "--train_data",
        data,
        "--query_encoder",
        tiny_llama,
        "--output_dir",
        tmp_path,
        *FLAGS[4:],
    ]
    command += ["--pooling_method", "last", "--train_group_size", 3]
    done = run([*map(str, command), "--max_steps", "6", "--resume_from_checkpoint", str(trained / "checkpoint-4")])
    assert done.returncode == 2
    assert "was trained with --lora_r: give the same --lora_ flags again" in done.stderr
    adapters = str(trained / "checkpoint-4" / "adapters" / "encoder")
    done = run(["scripts/ours2st.py", "--encoder", adapters, "--output_dir", adapters])
    assert "holds the adapters themselves" in done.stderr
    for flags in (["--lora_alpha", "4"], ["--lora_target_modules", "query"]):
        done = run(["run_dense.py", "--train_data", str(data), *flags])
        assert "need --lora_r" in done.stderr
    done = run(["run_ranker.py", "--train_data", str(data), "--lora_r", "4"])
    assert "adapters are for run_dense.py" in done.stderr


# --- weights in 4 bits -----------------------------------------------------------------------------------------------


@pytest.fixture
def rounding(monkeypatch):
    """In place of bitsandbytes and a GPU: what is loaded in 4 bits has rounded weights. Return what was asked."""
    asked, load = [], Checkpoint.load_complete

    def rounded(self, auto_class, config, quantization_config=None, device_map=None, **options):
        model = load(self, auto_class, config, **options)
        if quantization_config is not None:
            asked.append((quantization_config.to_dict(), device_map))
            for part in model.modules():
                if isinstance(part, torch.nn.Linear):
                    part.weight.data = (part.weight * 50).round() / 50
                    part.compute_dtype = quantization_config.bnb_4bit_compute_dtype
        return model

    monkeypatch.setattr(Checkpoint, "load_complete", rounded)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return asked


def test_adapters_over_weights_of_4_bits_are_merged_into_whole_ones(tiny_llama, rounding, tmp_path):
    torch.manual_seed(0)
    config = EncoderConfig(tiny_llama, attention="bidirectional", lora=LoraSettings(2, 4, four_bit=torch.bfloat16))
    model = load_dense_retriever(config)
    ((settings, device_map),) = rounding
    assert device_map == {"": 3}
    assert settings["load_in_4bit"]
    assert settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["bnb_4bit_use_double_quant"]
    # Trials were in fp32, training is not.
    assert settings["bnb_4bit_compute_dtype"] == "float32"
    layers = {name: part for name, part in model.backbones[0].named_modules() if hasattr(part, "lora_A")}
    assert {layer.base_layer.compute_dtype for layer in layers.values()} == {torch.bfloat16}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.save(str(tmp_path))
    whole = AutoModel.from_pretrained(tiny_llama).state_dict()
    saved = AutoModel.from_pretrained(tmp_path / "encoder")
    assert saved.config.is_causal is False
    assert not hasattr(saved.config, "quantization_config")
    assert len(layers) == 14
    for name, weights in saved.state_dict().items():
        expected = whole[name]
        if (layer := layers.get(name.removesuffix(".weight"))) is not None:
            assert not torch.equal(layer.base_layer.weight, expected)
            expected = expected + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(embed(tmp_path / "adapters" / "encoder"), embed(tmp_path / "encoder"), atol=1e-5, rtol=0)
    again = load_dense_retriever(config)
    again.load_weights(str(tmp_path))
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    alone = EncoderConfig(str(tmp_path / "adapters" / "encoder"), lora=config.lora)
    with pytest.raises(UserError, match="cannot be merged into 4 bits"):
        load_dense_retriever(alone)


@pytest.mark.parametrize(
    ("missing", "flags", "message"),
    [
        ("", {}, "it needs --lora_r"),
        ("GPU", {"lora_r": 2}, "--load_in_4bit needs a GPU"),
        ("", {"lora_r": 2, "use_cpu": True}, "--load_in_4bit needs a GPU"),
        ("bitsandbytes", {"lora_r": 2}, r"pip install -e '.\[qlora\]'"),
        ("", {"lora_r": 2, "deepspeed": "data/deepspeed/stage3.json"}, "divided over processes"),
    ],
)
def test_where_weights_cannot_be_held_in_4_bits(missing, flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing != "GPU")
    monkeypatch.setattr(training_args, "find_spec", lambda name: None if name == missing else name)
    monkeypatch.setattr(training_args.distributed, "is_launched", lambda: True)
    with pytest.raises(UserError, match=message):
        training_args.RetrievalTrainingArgs(str(tmp_path), load_in_4bit=True, **flags)
