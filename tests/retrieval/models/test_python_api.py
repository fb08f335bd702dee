"""The models in a few lines of Python, as the README shows them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from src.retrieval import CrossEncoder, DenseRetriever
from src.retrieval.data.tasks import ANY, Instruction
from src.retrieval.models.cross_encoder import RankerConfig, load_cross_encoder
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.encode import EncodeConfig
from src.utils.errors import UserError
from tests.helpers import ROOT

QUERIES = ["who keeps the lighthouse", "when is bread baked"]
KEYS = ["the lighthouse is kept by ada brand", "bread is baked before dawn", "a"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_retriever_from_a_checkpoint(tied, tiny_bert, tmp_path):
    model = load_dense_retriever(EncoderConfig(tiny_bert, tie_encoders=tied, pooling_method=("mean",)))
    torch.nn.init.normal_(next(model.encoders[model.key_name].parameters()))
    model.save(str(tmp_path))
    retriever = DenseRetriever.from_pretrained(str(tmp_path))
    queries, keys = retriever.encode_queries(QUERIES), retriever.encode_keys(KEYS)
    assert (queries.shape, keys.shape, keys.dtype) == ((2, 32), (3, 32), np.float32)
    with torch.no_grad():
        for encode, texts, vectors in ((model.embed_query, QUERIES, queries), (model.embed_key, KEYS, keys)):
            tokens = model.eval().key_tokenizer(texts, padding=True, return_tensors="pt")
            np.testing.assert_allclose(vectors, encode(tokens).numpy(), atol=1e-5)
    np.testing.assert_allclose(retriever.similarity(queries, keys), queries @ keys.T, atol=1e-6)
    short = retriever.encode_keys(KEYS, EncodeConfig(4, torch.device("cpu")))
    assert not np.allclose(short, keys)


def test_the_example_of_the_readme_runs(tiny_bert, tmp_path, capsys):
    retriever = load_dense_retriever(EncoderConfig(tiny_bert))
    retriever.instructions = {ANY: Instruction("ask: ", "tell: ")}
    retriever.save(str(tmp_path / "retriever"))
    load_cross_encoder(RankerConfig(tiny_bert, 60, 60)).save(str(tmp_path / "ranker"))
    (code,) = re.findall(r"^```python\n(from .*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for kind in ("retriever", "ranker"):
        code = code.replace(f"data/outputs/my-{kind}/checkpoint-2000", str(tmp_path / kind))
    exec(code, {})
    vectors, scores = capsys.readouterr().out.splitlines()
    assert vectors.startswith("[[")
    assert len(scores.strip("[]").split()) == 2


def test_similarity_is_that_of_the_checkpoint(tiny_bert):
    retriever = DenseRetriever.from_pretrained(tiny_bert, dense_metric="l2")
    queries, keys = retriever.encode_queries(QUERIES), retriever.encode_keys(KEYS)
    distances = -np.square(queries[:, None] - keys[None]).sum(-1)
    np.testing.assert_allclose(retriever.similarity(queries, keys), distances, atol=1e-4)


def test_a_ranker_from_a_checkpoint(tiny_bert, tmp_path):
    torch.manual_seed(0)
    load_cross_encoder(RankerConfig(tiny_bert, 60, 60)).save(str(tmp_path))
    ranker = CrossEncoder.from_pretrained(str(tmp_path), query_max_length=60, key_max_length=60)
    scores = ranker.score_pairs([(QUERIES[0], key) for key in KEYS])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ranker").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ranker")
    with torch.no_grad():
        expected = [float(model(**tokenizer(QUERIES[0], key, return_tensors="pt")).logits) for key in KEYS]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert ranker.score_pairs([]).shape == (0,)
    with pytest.raises(UserError, match="has no head to score with"):
        CrossEncoder.from_pretrained(tiny_bert, query_max_length=60)
