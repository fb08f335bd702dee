"""Padding against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from src.retrieval.padding import pad
from tests.conftest import make_tokenizer

TEXTS = ["a", "some longer text of a key", "", "words and words", "x y"]


@pytest.fixture(params=["masks and types", "no types", "no mask", "other padding"])
def tokenizer(request) -> PreTrainedTokenizerBase:
    made = make_tokenizer()
    if request.param == "masks and types":
        made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    if request.param == "no types":
        made.model_input_names = ["input_ids", "attention_mask"]
    if request.param == "no mask":
        made.model_input_names = ["input_ids"]
    if request.param == "other padding":
        made.pad_token = "[MASK]"
        made._pad_token_type_id = 3
        made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


@pytest.mark.parametrize("positions", [[0], [2], [3, 0, 1], range(5)])
@pytest.mark.parametrize("more", [{}, {"return_special_tokens_mask": True}], ids=["plain", "further field"])
@pytest.mark.parametrize("without_mask", [False, True])
def test_as_the_tokenizer_pads(tokenizer, positions, more, without_mask):
    encoded = dict(tokenizer(TEXTS, list(reversed(TEXTS)), **more))
    if without_mask:
        encoded.pop("attention_mask", None)
    rows = {name: [values[i] for i in positions] for name, values in encoded.items()}
    wanted = tokenizer.pad(rows, return_tensors="pt")
    found = pad(tokenizer, encoded, positions)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, wanted[name]), name
