"""Convert one of our encoders to a sentence-transformers checkpoint, and check that both embed alike.

python scripts/ours2st.py --encoder data/outputs/my-retriever/checkpoint-2000/encoder
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.retrieval.args import ConvertArgs
from src.utils.cli import answer_early, parse_args, run

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early([ConvertArgs])

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import ModalityConfig
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from src.retrieval.data.tasks import ANY, Instruction
from src.retrieval.models.checkpoint_folders import beside, complete_checkpoints, replace_folder
from src.retrieval.models.checks import position_limit
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, load_dense_retriever
from src.retrieval.models.encode import EncodeConfig
from src.retrieval.models.loading import loading
from src.retrieval.models.lora import is_adapter_folder
from src.retrieval.report.model_card import CARD_FILE, converted_card, model_card
from src.retrieval.report.training_record import encoder_uses
from src.utils import locks
from src.utils.errors import UserError
from src.utils.files import atomic_write, check_writable
from src.utils.manifest import record_checksums

logger = logging.getLogger("scripts.ours2st")

TOLERANCE = 1e-5
#: The file that every sentence-transformers folder has.
ST_FILE = "modules.json"
ST_POOLING = {"cls": "cls", "mean": "mean", "weightedmean": "weightedmean", "last": "lasttoken"}
ST_SIMILARITY = {"cos": "cosine", "ip": "dot", "l2": "euclidean"}
#: Without this, texts of models that were tuned to chat are put into their template.
PLAIN_TEXTS: ModalityConfig = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
SENTENCES = (
    "Which function converts a temperature from Celsius to Fahrenheit?",
    "a",
    "Ein Satz mit Umlauten: größer, schöner, älter – und «Zeichen».",
    "The retriever embeds queries and keys; the language model reads what it finds. " * 12,
)


def _hint(encoder: str) -> str:
    """Name the encoder that may be meant: in the folder, or in the newest checkpoint of it or of those around it."""
    path = Path(encoder).absolute()
    for folder in (path, path.parent, path.parent.parent):
        for place in (folder, *reversed(complete_checkpoints(str(folder)))):
            if inside := sorted(str(file.parent) for file in Path(place).glob("*encoder/config.json")):
                return f"; did you mean {inside[0]}?"
    return ""


def check_encoder(args: ConvertArgs) -> str:
    """The encoder to convert, of which a folder must be complete; a UserError names the one that may be meant."""
    assert args.encoder is not None
    encoder = args.encoder
    where, is_folder = f"--encoder {encoder}", os.path.isdir(encoder)
    if is_adapter_folder(encoder):
        if not args.output_dir:
            raise UserError(f"{where} holds adapters alone: give --output_dir for the merged model")
    elif is_folder and not os.path.isfile(os.path.join(encoder, "config.json")):
        raise UserError(f"{where}: no encoder folder (it has no config.json){_hint(encoder)}")
    elif not is_folder and os.path.isdir(aside := beside(encoder, "replaced")):
        raise UserError(f"{where}: a killed conversion left it as {aside}: rename it back")
    elif not is_folder and not args.output_dir:
        hint = _hint(encoder)
        raise UserError(f"{where}: no such folder; to convert a model of the hub give --output_dir{hint}")
    return encoder


def st_modules(folder: str, model: DenseRetriever, max_length: int, trust_remote_code: bool) -> list[torch.nn.Module]:
    """The sentence-transformers modules that embed as `model` does; `folder` holds its transformer."""
    encoder = model.encoders["encoder"]
    method = encoder.pooling_method[0]
    if method not in ST_POOLING:
        raise UserError(f"--encoder {folder}: sentence-transformers cannot express the pooling {method!r}")
    options = {"trust_remote_code": trust_remote_code}
    with loading(folder, "encoder"):
        transformer = Transformer(
            folder,
            **dict.fromkeys(("model_kwargs", "processor_kwargs", "config_kwargs"), options),
            modality_config=dict(PLAIN_TEXTS),
            module_output_name="token_embeddings",
        )
    # The folder's tokenizer may lack a padding token.
    transformer.processor = model.query_tokenizer
    transformer.max_seq_length = max_length
    modules: list[torch.nn.Module] = [transformer, Pooling(encoder.pooled_width, pooling_mode=ST_POOLING[method])]
    if encoder.dense is not None:
        linear = encoder.dense.linear
        dense = Dense(linear.in_features, linear.out_features, linear.bias is not None, encoder.dense.activation)
        dense.linear.load_state_dict(linear.state_dict())
        modules.append(dense)
    if model.metric == "cos":
        modules.append(Normalize())
    return modules


def st_prompts(instructions: Mapping[str, Instruction]) -> dict[str, str]:
    """Instructions by task as prompts: those of each task, and for queries and documents those of the first one."""
    prompts = {}
    for task, instruction in instructions.items():
        own = {"query": instruction.query, "document": instruction.key}
        prompts = {**own, **prompts, **({f"{task}_{side}": text for side, text in own.items()} if task != ANY else {})}
    if len(instructions) > 1:
        names = ", ".join(name for name in prompts if name not in ("query", "document"))
        logger.info(
            "encode_query and encode_document take the prompts of task %s; by name: %s", next(iter(instructions)), names
        )
    return prompts


def largest_difference(model: DenseRetriever, saved: SentenceTransformer, max_length: int) -> float:
    """How far vectors of texts as they are, of queries and of keys are from each other in both models."""
    texts, config = list(SENTENCES), EncodeConfig(max_length, torch.device("cpu"))
    first = next(iter((model.instructions or {ANY: Instruction()}).values()))
    pairs = []
    for encode, prefix in ((saved.encode, ""), (saved.encode_query, first.query), (saved.encode_document, first.key)):
        ours = model.encode_queries([prefix + text for text in texts], config)
        pairs.append((ours, encode(texts, convert_to_numpy=True, batch_size=len(texts))))
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


def check_target(source: str, target: str) -> None:
    """Refuse an output folder that holds the encoder, or files that are no earlier conversion; paths are absolute."""
    if is_adapter_folder(source) and os.path.realpath(target) == os.path.realpath(source):
        raise UserError(
            f"--output_dir {target} holds the adapters themselves: name another folder for the merged model"
        )
    if target == source:
        return
    if os.path.commonpath([target, os.path.abspath(source)]) == target:
        raise UserError(f"--output_dir {target} holds the encoder itself: name another folder, or none")
    if os.path.isdir(target) and os.listdir(target) and not os.path.isfile(os.path.join(target, ST_FILE)):
        raise UserError(f"--output_dir {target} holds other files: name a new folder, or an earlier conversion")


def write_card(source: str, model: DenseRetriever, max_length: int, folder: str) -> None:
    """Write the encoder's card, converted, into `folder`; a short one when it has none.

    The card of sentence-transformers knows neither training nor lengths.
    """
    existing = Path(source, CARD_FILE)
    if existing.is_file() and not is_adapter_folder(source):
        card = existing.read_text(encoding="utf-8")
    else:
        ((_, use),) = encoder_uses(model, max_length, max_length).values()
        card = model_card(use, model.instructions or {})
    with atomic_write(os.path.join(folder, CARD_FILE)) as file:
        file.write(converted_card(card))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, keep other runs away, and convert."""
    (args,), given = parse_args([ConvertArgs], argv)
    encoder = check_encoder(args)
    source = os.path.abspath(encoder) if os.path.isdir(encoder) else encoder
    target = os.path.abspath(args.output_dir or encoder)
    check_target(source, target)
    check_writable(os.path.dirname(target), "output_dir" if args.output_dir else "encoder")
    with locks.hold(target):
        convert(args, given, source, target)


def convert(args: ConvertArgs, given: frozenset[str], source: str, target: str) -> None:
    """Load, convert, compare, and only then put the result in place."""
    model = load_dense_retriever(
        EncoderConfig(
            source,
            pooling_method=tuple(args.pooling_method) if "pooling_method" in given else None,
            dense_metric=args.dense_metric if "dense_metric" in given else None,
            model_cache_dir=args.model_cache_dir,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
        )
    ).eval()
    encoder, tokenizer = model.encoders["encoder"], model.query_tokenizer
    limit = position_limit(encoder.backbone.config, encoder.backbone) or sys.maxsize
    if args.max_length is not None and args.max_length > limit:
        raise UserError(f"--max_length {args.max_length}: {source!r} takes {limit} tokens at most")
    max_length = args.max_length or min(tokenizer.model_max_length, limit, 512)
    staging = beside(target, "partial")
    shutil.rmtree(staging, ignore_errors=True)
    if target == source:
        # The encoder's other files, such as the record of its pooling, stay.
        shutil.copytree(source, staging)
    else:
        os.makedirs(staging)
    try:
        merged = os.path.join(staging, "merged")
        if is_adapter_folder(source):
            encoder.backbone.save_pretrained(merged)
            tokenizer.save_pretrained(merged)
        folder = merged if is_adapter_folder(source) else source
        modules = st_modules(folder, model, max_length, args.trust_remote_code)
        converted = SentenceTransformer(
            modules=modules,
            similarity_fn_name=ST_SIMILARITY[model.metric],
            prompts=st_prompts(model.instructions or {}),
            device="cpu",
        )
        shutil.rmtree(merged, ignore_errors=True)
        converted.save(staging)
        saved = SentenceTransformer(staging, device="cpu", trust_remote_code=args.trust_remote_code)
        difference = largest_difference(model, saved, max_length)
        if not difference <= TOLERANCE:
            raise UserError(f"the converted model embeds differently: by up to {difference:.2e}, above {TOLERANCE:.0e}")
        write_card(source, model, max_length, staging)
        record_checksums(staging)
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("%s is now a sentence-transformers model; largest difference of embeddings: %.1e", target, difference)


if __name__ == "__main__":
    run(main)
