"""Tiny models made on the spot, so that no test needs the network or a package of weights."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On one GPU two processes cannot talk, and results differ in rounding: test_gpu.py alone is for GPUs.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import string
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> None:
    """What is made of data files lies in a folder of the tests, also in processes that they start."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = SPECIAL + list(string.ascii_lowercase + string.digits + string.punctuation)
VOCABULARY += ["##" + letter for letter in string.ascii_lowercase + string.digits]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A character-level WordPiece tokenizer: every ASCII text has tokens, none is unknown."""
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
    )


def _save(model, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_bert(folder: Path) -> str:
    """Save a random BERT: 2 layers, 32 dimensions, dropout on, 128 positions."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    return _save(BertModel(config, add_pooling_layer=False), folder)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    """Folder of the BERT of `make_bert`."""
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """Folder of a random Llama, a decoder-only backbone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    return _save(LlamaModel(config), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory) -> str:
    """Folder of a random T5, encoder and decoder."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return _save(T5Model(config), tmp_path_factory.mktemp("t5"))
