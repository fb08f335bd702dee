"""Values of flags and model folders that nobody could mean: refused in a line, before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src.retrieval.args import RetrievalArgs
from src.retrieval.jobs.train import check_comparisons
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.encode import EncodeConfig, encode
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.losses import LossConfig
from src.utils.cli import parse_args
from src.utils.config_file import read_settings
from src.utils.errors import UserError


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"learning_rate": -1.0}, "--learning_rate must be a number of 0 or more, found -1.0"),
        ({"learning_rate": float("nan")}, "--learning_rate must be a number of 0 or more, found nan"),
        ({"weight_decay": float("inf")}, "--weight_decay must be a number"),
        ({"adam_epsilon": -1.0}, "--adam_epsilon must be a number of 0 or more, found -1.0"),
        ({"max_grad_norm": float("nan")}, "--max_grad_norm must be a number of 0 or more, found nan"),
        ({"adam_beta1": -0.1}, "--adam_beta1 must be from 0 to below 1, found -0.1"),
        ({"matryoshka_dims": [8, 4, 8]}, "--matryoshka_dims 8 4 8: each only once"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr: .*min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay: .*num_decay_steps"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "--lr_scheduler_type linear with --lr_scheduler_kwargs .*'foo'"),
        ({"lr_scheduler_kwargs": '{"foo": '}, "--lr_scheduler_kwargs .* is not valid JSON"),
        ({"lr_scheduler_kwargs": " "}, "--lr_scheduler_kwargs ' ' must be a JSON object"),
        ({"lr_scheduler_kwargs": "[1]"}, r"--lr_scheduler_kwargs '\[1\]' must be a JSON object"),
        ({"lr_scheduler_kwargs": {"power": "x"}, "lr_scheduler_type": "polynomial"}, "polynomial with .*'power': 'x'"),
        (
            {"lr_scheduler_kwargs": {"num_cycles": None}, "lr_scheduler_type": "cosine"},
            "cosine with .*'num_cycles': None",
        ),
        ({"accelerator_config": '{"a": 1}'}, "--accelerator_config .*'a'"),
        ({"accelerator_config": " "}, "--accelerator_config ' ' must be a JSON object"),
        ({"accelerator_config": '{"gradient_accumulation_kwargs": {"a": 1}}'}, "--accelerator_config .*'a'"),
        ({"accelerator_config": '{"gradient_accumulation_kwargs": [1]}'}, "--accelerator_config "),
        ({"accelerator_config": '{"use_configured_state": true}'}, "--accelerator_config: use_configured_state"),
        ({"gradient_checkpointing_kwargs": {"foo": True}}, "--gradient_checkpointing_kwargs: 'foo' is True"),
        ({"activation_checkpointing_kwargs": '{"use_reentrant": "x"}'}, "'use_reentrant' is 'x': give true or false"),
        ({"deepspeed": '{"zero_optimization": []}'}, "--deepspeed: zero_optimization must hold a JSON object"),
        ({"deepspeed": '{"zero_optimization": {}, "fp16": 1}'}, "--deepspeed: fp16 must hold a JSON object"),
        ({"deepspeed": '{"zero_optimization": {"stage": []}}'}, r"--deepspeed: ZeRO stage \[\] is unknown"),
        ({"fsdp": True, "fsdp_config": '{"version": 1'}, "--fsdp_config .* is not valid JSON"),
        ({"optim": "adamw_bnb_8bit"}, "--optim adamw_bnb_8bit: "),
        ({"optim": "sgd", "optim_args": "nesterov=True"}, "--optim sgd with --optim_args nesterov=True: .*momentum"),
        ({"optim_args": "x"}, "--optim adamw_torch.* with --optim_args x: "),
        ({"optim_args": "foo=3"}, "--optim_args foo=3: .*no settings of these names"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1: .*non-negative"),
        ({"dataloader_persistent_workers": True}, "--dataloader_persistent_workers True.*num_workers > 0"),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, "--dataloader_prefetch_factor must be 1 or"),
        ({"torch_compile": True, "torch_compile_mode": "foo"}, "--torch_compile_mode 'foo' .*reduce-overhead"),
        (
            {"torch_compile_mode": "reduce-overhead", "gradient_accumulation_steps": 2},
            "--torch_compile_mode reduce-overhead does not work with --gradient_accumulation_steps 2",
        ),
        ({"torch_compile_backend": "cudagraphs", "torch_compile_mode": "max-autotune"}, "is for the backend inductor"),
        (
            {"torch_compile_backend": "cudagraphs", "gradient_accumulation_steps": 2},
            "does not work with --gradient_accumulation_steps 2",
        ),
        ({"torch_compile_backend": "ofi"}, "--torch_compile_backend 'ofi' is unknown"),
        ({"torch_compile_mode": "default", "grad_cache_chunk_size": 8}, "does not work with --torch_compile"),
        ({"use_liger_kernel": True}, "--use_liger_kernel True would have no effect"),
        ({"push_to_hub": True}, "--push_to_hub True would have no effect"),
        ({"save_steps": 0}, "--save_steps must be above 0"),
        ({"logging_steps": -1}, "--logging_steps must be above 0"),
        ({"eval_steps": 0}, "--eval_steps must be above 0"),
        ({"max_steps": 0}, "--max_steps must be above 0, or -1"),
        ({"max_steps": -5}, "--max_steps must be above 0, or -1"),
        ({"save_total_limit": -3}, "--save_total_limit must be 0 or more"),
        ({"eval_delay": -1}, "--eval_delay must be 0 or more"),
        ({"ddp_bucket_cap_mb": -1}, "--ddp_bucket_cap_mb must be 1 or more"),
        ({"torch_compile": True, "torch_compile_backend": "foo"}, "--torch_compile_backend .*inductor"),
        ({"adam_beta2": 1.0}, "--adam_beta2 must be from 0 to below 1, found 1.0"),
        ({"warmup_ratio": 7.0}, "--warmup_ratio must be a share of the steps"),
        ({"positives_per_query": 8}, "--positives_per_query 8 must be below --train_group_size 8"),
        ({"positives_per_query": 0}, "--positives_per_query must be above 0, found 0"),
        ({"mask_margin": 0.1, "in_batch": False}, "--mask_margin 0.1 is for keys of other queries, which --in_batch"),
        ({"mask_margin": float("nan")}, "--mask_margin must be a number, found nan"),
        ({"teacher_temperature": float("nan")}, "--teacher_temperature must be above 0, found nan"),
        ({"num_train_epochs": -1.0}, "--num_train_epochs -1.0: nothing would be trained"),
        ({"dropout": 1.0}, "--dropout must be from 0 to below 1, found 1.0"),
        ({"lora_r": 4, "lora_dropout": 2.0}, "--lora_dropout must be from 0 to below 1, found 2.0"),
    ],
)
def test_flags(tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        RetrievalTrainingArgs(output_dir=str(tmp_path), use_cpu=True, **flags)
    assert RetrievalTrainingArgs(output_dir=str(tmp_path), use_cpu=True, max_steps=1, num_train_epochs=0).max_steps == 1


@pytest.mark.parametrize(
    "flags",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": 2.0}'},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "ndcg@10", "eval_strategy": "steps"},
        {"optim": "adafactor"},
        {"optim": "sgd", "torch_compile": True, "torch_compile_backend": "eager"},
    ],
)
def test_schedules_and_optimizers_that_work(tmp_path, flags):
    assert RetrievalTrainingArgs(output_dir=str(tmp_path), use_cpu=True, **flags).use_cpu


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("length_split_tokens", 10**20, f"must be a whole number from -2147483648 to 4294967295, found {10**20}"),
        ("seed", 10**22, f"--seed must be a whole number from 0 to 4294967295, found {10**22}"),
        ("data_seed", -1, "--data_seed must be a whole number from 0 to 4294967295, found -1"),
        ("max_steps", -(10**12), "--max_steps must be a whole number"),
        ("hits", 2**63, "--hits must be a whole number"),
        ("ddp_timeout", 10**40, "found one of 41 digits"),
        ("num_train_epochs", "inf", "--num_train_epochs must be a number of 3.4e.38 at most, found inf"),
        ("logging_steps", "nan", "--logging_steps must be a number of 3.4e.38 at most, found nan"),
        ("cutoffs", 2**32, "--cutoffs must be a whole number"),
        ("k1", 1e300, r"--k1 must be a number of 3.4e\+38 at most"),
        *(
            (flag, " ", f"--{flag} ' ' is blank")
            for flag in ("output_dir", "log_path", "eval_data", "dataset_cache_dir")
        ),
    ],
)
def test_numbers_that_no_flag_means(tmp_path, flag, value, said):
    """On the command line and in a file of settings."""
    (tmp_path / "run.json").write_text(json.dumps({flag: [value] if flag == "cutoffs" else value}))
    for argv in ([f"--{flag}", str(value)], ["--config", str(tmp_path / "run.json")]):
        with pytest.raises(UserError, match=said):
            parse_args([RetrievalArgs, RetrievalTrainingArgs], argv)


def test_margins():
    with pytest.raises(UserError, match="--neg_margin_relative must be 0 or more, found nan"):
        RetrievalArgs(neg_margin_relative=float("nan"))


def damaged(tiny_bert: str, folder: Path, name: str, content: bytes | None) -> str:
    shutil.copytree(tiny_bert, folder)
    for path in folder.glob(name):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    if content is not None and "*" not in name:
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer*", None, "has no files of a tokenizer|cannot load the encoder"),
        ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "cannot load the encoder"),
        ("config.json", b'{"a":' * 20_000, "cannot load the encoder"),
        (
            "embedder.json",
            json.dumps({"pooling_method": ["men"], "dense_metric": "cos"}).encode(),
            "must be a list of cls",
        ),
        ("embedder.json", json.dumps({"pooling": "cls"}).encode(), "'pooling_method' must be a list of cls"),
        ("embedder.json", json.dumps({"pooling_method": ["cls"], "dense_metric": "x"}).encode(), "must be one of cos"),
    ],
)
def test_model_folders(tiny_bert, tmp_path, name, content, said):
    with pytest.raises(UserError, match=said):
        load_dense_retriever(EncoderConfig(damaged(tiny_bert, tmp_path / "model", name, content)))


@pytest.mark.parametrize(
    ("dtype", "said"), [("fp32", "training had diverged$"), ("fp16", "--dtype bf16 or fp32 would show")]
)
def test_vectors_that_are_no_numbers(tiny_bert, dtype, said):
    model = load_dense_retriever(EncoderConfig(tiny_bert)).eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    config = EncodeConfig(16, torch.device("cpu"), dtype)
    with pytest.raises(UserError, match=f"no numbers: the weights are damaged.*{said}"):
        encode(model.embed_key, model.key_tokenizer, ["a b"], config)


def test_weights_that_are_cut_off_are_found_without_loading_them(tiny_bert, tmp_path):
    whole = (Path(tiny_bert) / "model.safetensors").read_bytes()
    folder = damaged(tiny_bert, tmp_path / "model", "model.safetensors", whole[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut off"):
        load_dense_retriever(EncoderConfig(folder, empty=True))


def test_vectors_beyond_half_precision(tiny_bert):
    model = load_dense_retriever(EncoderConfig(tiny_bert)).eval()
    config = EncodeConfig(16, torch.device("cpu"), "fp16")
    with pytest.raises(UserError, match="or they leave the range of --dtype fp16"):
        encode(lambda tokens: model.embed_key(tokens) * 1e7, model.key_tokenizer, ["a b"], config)


def test_a_tokenizer_needs_something_to_pad_with(tiny_bert, tmp_path):
    folder = damaged(tiny_bert, tmp_path / "model", "no such file", None)
    path = Path(folder) / "tokenizer_config.json"
    settings = {name: value for name, value in json.loads(path.read_text()).items() if name != "pad_token"}
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has neither a token to pad with nor one that ends texts"):
        load_dense_retriever(EncoderConfig(folder))


def test_no_more_dimensions_than_there_are(tiny_bert):
    with pytest.raises(UserError, match="--truncate_dim 32: the vectors have 32 dimensions, give less"):
        load_dense_retriever(EncoderConfig(tiny_bert, truncate_dim=32))


def test_deep_settings(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("[" * 20_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_settings(str(path), "--config")


class Rows(list):
    """What `check_comparisons` looks at of a training file."""

    rows = SimpleNamespace(path="a.json")


def source(rows: int, scored: int = 0, **loss) -> Rows:
    found = Rows(range(rows))
    found.scored, found.settings = scored, SimpleNamespace(loss=LossConfig(**loss))
    return found


@pytest.mark.parametrize(
    ("sources", "flags", "processes", "said"),
    [
        ([source(9)], {"per_device_train_batch_size": 1}, 1, "a batch has 1"),
        ([source(9)], {"per_device_train_batch_size": 1}, 2, None),
        ([source(9)], {"per_device_train_batch_size": 1, "negative_cross_device": False}, 2, "a batch has 1"),
        ([source(9)], {"per_device_train_batch_size": 2, "negative_cross_device": False}, 2, None),
        ([source(1)], {}, 1, "a batch has 1"),
        ([source(1)], {}, 2, "a batch has 1"),
        ([source(2)], {"negative_cross_device": False}, 2, "a batch has 1"),
        ([source(1), source(1)], {}, 1, None),
        ([source(1), source(9)], {"inbatch_same_dataset": "epoch"}, 1, "a batch has 1"),
        ([source(9, 9, contrastive_weight=0)], {}, 1, "plain distillation compares the keys of one query"),
        ([source(9, 0, contrastive_weight=0)], {}, 1, None),  # rows without scores train contrastively
        ([source(9, 9, contrastive_weight=0, stable_distill=True)], {}, 1, None),
        ([source(9, 9)], {}, 1, None),
        (
            [source(9, 9, in_batch=False)],
            {},
            2,
            "without keys of the batch .in_batch. a query is compared with its own",
        ),
    ],
)
def test_groups_of_one_key_need_something_to_compare_with(tmp_path, monkeypatch, sources, flags, processes, said):
    monkeypatch.setattr("src.utils.distributed.world_size", lambda: processes)
    training = RetrievalTrainingArgs(output_dir=str(tmp_path), use_cpu=True, train_group_size=1, **flags)
    if said is None:
        check_comparisons(sources, training, sum(map(len, sources)))
    else:
        with pytest.raises(UserError, match=f"a.json: --train_group_size 1 leaves nothing to learn: .*{said}"):
            check_comparisons(sources, training, sum(map(len, sources)))


def test_the_corpus_of_a_beir_folder_is_not_taken_for_one_that_was_named():
    args = RetrievalArgs(eval_data="beir:some/folder:dev")
    assert (args.corpus, args.searched_corpus) == (None, "beir:some/folder")
    assert RetrievalArgs(eval_data="beir:some/folder", corpus="other.json").searched_corpus == "other.json"
    assert RetrievalArgs(eval_data="rows.json").searched_corpus is None
