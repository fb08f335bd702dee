"""Whole weights and copies of models, by one process; what engines divide is in test_deepspeed.py and test_fsdp.py."""

from __future__ import annotations

import torch

from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.training.sharding import filled, full_state, meta_copy, offloaded
from tests.helpers import ROOT

CPU = torch.device("cpu")


def test_a_filled_copy_embeds_like_the_model(tiny_llama):
    """Llama has buffers that no state dictionary holds, and the dense layer is no part of the transformer."""
    config = EncoderConfig(tiny_llama, tie_encoders=False, pooling_method=("last", "dense"), new_dense=True)
    model = load_dense_retriever(config).eval()
    on_meta = meta_copy(model)
    assert all(weight.is_meta for weight in on_meta.parameters())
    tokens = model.key_tokenizer(["a text", "b"], padding=True, return_tensors="pt")
    with torch.no_grad():
        before = model.embed_key(tokens)
        copy = filled(on_meta, full_state(model, CPU), CPU)
        assert torch.equal(copy.embed_key(tokens), before)
        # Other weights need another copy: the first keeps its own, and the on_meta one stays on_meta.
        for weight in model.parameters():
            weight.mul_(0.5)
        assert not torch.equal(filled(on_meta, full_state(model, CPU), CPU).embed_key(tokens), before)
    assert all(weight.is_meta for weight in on_meta.parameters())
    assert not copy.training


def test_shared_weights_stay_shared_and_half_precision_becomes_fp32(tiny_bert):
    model = load_dense_retriever(EncoderConfig(tiny_bert))
    embeddings = model.backbones[0].embeddings
    embeddings.token_type_embeddings.weight = embeddings.position_embeddings.weight
    state = full_state(model.half().requires_grad_(False), CPU)
    prefix = "modules_by_name.encoder.backbone.embeddings"
    shared = [state[f"{prefix}.{name}_embeddings.weight"] for name in ("token_type", "position")]
    assert shared[0] is shared[1]
    assert all(tensor.dtype == torch.float32 for tensor in state.values() if tensor.is_floating_point())
    assert state.keys() == model.state_dict().keys()
    assert full_state(model, None) == {}


def test_what_settings_offload():
    for name, wanted in (
        ("stage3", set()),
        ("stage2_offload", {"optimizer"}),
        ("stage3_offload", {"optimizer", "weights"}),
    ):
        assert offloaded(str(ROOT / "data" / "deepspeed" / f"{name}.json")) == wanted
    assert offloaded({"zero_optimization": {"offload_optimizer": {"device": "none"}}}) == set()
