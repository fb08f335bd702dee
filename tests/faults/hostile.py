"""Damage the folders of models, and put code into them: each gives its vectors or one line, and nothing is executed.

    python -m tests.faults.hostile --folders 2000 --seed 7

Some folders are made by hand, the others by giving a value of a JSON file another value, or cutting a file.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from scripts.ours2st import st_modules
from src.lm.args import LMArgs
from src.lm.model import LMConfig, empty_lm, load_lm, load_lm_tokenizer
from src.lm.prompts import make_frame
from src.retrieval.models.cross_encoder import RankerConfig, load_cross_encoder
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.lora import LoraSettings
from src.retrieval.models.padding import pad
from src.utils.errors import UserError, is_out_of_memory
from tests.conftest import VOCABULARY, make_bert, make_tokenizer

CPU = torch.device("cpu")
SIZE = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZE |= {"intermediate_size": 64, "max_position_embeddings": 64}
#: What stands in place of a value. Numbers of layers are not among them: so many would be made.
ODD: tuple[Any, ...] = (None, "x", -1, 0, 7, 1.5, True, [], {}, ["a"], {"a": 1}, "", "torch.nn.Tanh", [[]])
#: Quantisation whose packages are not installed here.
QUANTISED = ("bitsandbytes_8bit", "gptq", "awq", "aqlm", "hqq", "eetq", "quanto", "compressed-tensors", "torchao", "x")
#: Attention by kernels that are not here either.
KERNELS = ("flash_attention_2", "flash_attention_3", "flex", "x", 3, "kernels-community/flash-attn")
TEMPLATES = (
    b"{{ raise_exception('no') }}",
    b"{% for %}",
    b"{{ messages[7].x.y }}",
    b"{{ 1 / 0 }}",
    b"{{ ''.__class__.__mro__ }}",
    b"\xff\xfe{{",
)
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], Any]


@dataclass(frozen=True)
class Hostile:
    """One damaged folder.

    Attributes:
        name: what is wrong with it.
        base: the good folder that it was (see `make_bases`).
        damage: does it to a copy.
    """

    name: str
    base: str
    damage: Damage


def make_bases(folder: Path) -> dict[str, Path]:
    """Good folders: an encoder, ours with a dense layer, one of sentence-transformers, adapters, a ranker, an LM."""
    torch.manual_seed(0)
    bases = {name: folder / name for name in ("encoder", "own", "st", "adapters", "ranker", "lm", "gguf")}
    make_bert(bases["encoder"])
    dense = EncoderConfig(str(bases["encoder"]), pooling_method=("mean", "dense"), new_dense=True)
    load_dense_retriever(dense).save(str(folder / "trained"))
    (folder / "trained" / "encoder").rename(bases["own"])
    shutil.copytree(bases["own"], bases["st"])
    (bases["st"] / "dense").rename(bases["st"] / "2_Dense")
    (bases["st"] / "embedder.json").unlink()
    (bases["st"] / "1_Pooling").mkdir()
    names = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (path, kind) in enumerate(names.items())]  # fmt: skip
    write(bases["st"] / "modules.json", modules)
    write(bases["st"] / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 32})
    write(bases["st"] / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    settings = {"similarity_fn_name": "cosine", "prompts": {"query": "q: "}, "default_prompt_name": None}
    write(bases["st"] / "config_sentence_transformers.json", settings)
    lora = EncoderConfig(str(bases["encoder"]), lora=LoraSettings(2, 4))
    load_dense_retriever(lora).save(str(folder / "lora"))
    (folder / "lora" / "adapters" / "encoder").rename(bases["adapters"])
    BertForSequenceClassification(BertConfig(**SIZE, num_labels=1)).save_pretrained(bases["ranker"])
    LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2)).save_pretrained(bases["lm"])
    for name in ("ranker", "lm"):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{{ messages[0]['content'] }}" if name == "lm" else None
        tokenizer.save_pretrained(bases[name])
    bases["gguf"].mkdir()
    writer = gguf.GGUFWriter(bases["gguf"] / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_tensor("token_embd.weight", np.zeros((len(VOCABULARY), 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return bases


def write(path: Path, value: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value), encoding="utf-8")


def changed(path: Path, **values: Any) -> None:
    """Give an object in a JSON file other values."""
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **values})


class Trap:
    """Makes a folder when it is unpickled by somebody who does whatever pickles say."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def setting(file: str, **values: Any) -> Damage:
    """Other values in a JSON file."""
    return lambda folder: changed(folder / file, **values)


def content(file: str, new: bytes) -> Damage:
    """Another content of a file."""
    return lambda folder: folder.joinpath(file).write_bytes(new)


def cut_at(file: str, fraction: float) -> Damage:
    """A file cut off."""
    return lambda folder: cut(folder / file, fraction)


def by_hand(sprung: Path) -> Iterator[Hostile]:
    """Folders that were thought of; what they hold makes `sprung` when it is executed."""
    code = f"import os; os.makedirs({str(sprung)!r}, exist_ok=True)\n"
    for method, base in product(QUANTISED, ("encoder", "lm")):
        settings = {"quant_method": method, "bits": 4, "load_in_8bit": True}
        yield Hostile(f"quantised by {method}", base, setting("config.json", quantization_config=settings))
    for attention, name in product(KERNELS, ("attn_implementation", "_attn_implementation")):
        yield Hostile(f"{name} {attention}", "encoder", setting("config.json", **{name: attention}))
    everywhere: dict[str, Damage] = {
        "weights cut": cut_at("model.safetensors", 0.9),
        "weights of zeros": content("model.safetensors", bytes(1000)),
        "a pickle called safetensors": lambda folder: trap(folder / "model.safetensors", sprung),
        "a weight is missing": lambda folder: weights(folder, lambda own: own.pop(sorted(own)[0])),
        "a weight of another shape": lambda folder: weights(folder, reshape),
        "weights are integers": lambda folder: weights(folder, to_integers),
        "a pickle with code": lambda folder: only_pickle(folder, sprung),
        "an index that names a pickle": lambda folder: index(folder, "pytorch_model.bin", sprung),
        "an index that names a file elsewhere": lambda folder: index(folder, "../../none.safetensors", None),
        "an index that names numbers": lambda folder: index(folder, 3, None),
        "an index of another kind": content(INDEX, b"[1]"),
        "transformers_weights names a pickle": lambda folder: explicit(folder, sprung),
        "code for the configuration": lambda folder: own_code(folder, code, "config.json", "AutoConfig"),
        "code for the tokenizer": lambda folder: own_code(folder, code, "tokenizer_config.json", "AutoTokenizer"),
        "no configuration": lambda folder: (folder / "config.json").unlink(),
        "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "adapters beside the model": lambda folder: adapters_beside(folder, sprung),
    }
    for base, (name, damage) in product(("encoder", "ranker", "lm", "own"), everywhere.items()):
        yield Hostile(name, base, damage)
    for template, base in product(TEMPLATES, ("lm", "encoder")):
        yield Hostile(f"chat template {template!r}", base, content("chat_template.jinja", template))
    for fraction in (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999, 1):
        yield Hostile(f"GGUF cut at {fraction}", "gguf", cut_at("model.gguf", fraction))
    yield Hostile("GGUF of noise", "gguf", content("model.gguf", b"GGUF" + random.Random(1).randbytes(999)))
    for kind in ("trap.Transformer", "os.system", "sentence_transformers.models.CNN", "sentence_transformers", 3, None):
        modules = json.dumps([{"type": kind, "path": ""}]).encode()
        yield Hostile(f"module {kind}", "st", both(content("trap.py", code.encode()), content("modules.json", modules)))
    for base, dense in (("st", "2_Dense"), ("own", "dense")):
        yield Hostile("dense layer cut", base, cut_at(f"{dense}/model.safetensors", 0.5))
        yield Hostile("dense layer gone", base, lambda folder, dense=dense: shutil.rmtree(folder / dense))
        yield Hostile("dense layer in a pickle", base, lambda folder, dense=dense: only_pickle(folder / dense, sprung))
        yield Hostile("dense layer of another width", base, lambda folder, dense=dense: narrow(folder / dense))
        for activation in ("os.system", "torch.nn.Module", "torch.nn.Linear", "torch.nn.Softmax", ""):
            damage = setting(f"{dense}/config.json", activation_function=activation)
            yield Hostile(f"activation {activation}", base, damage)
    yield Hostile("adapters of code", "adapters", lambda folder: only_pickle(folder, sprung, "adapter_model"))
    yield Hostile("adapters cut", "adapters", cut_at("adapter_model.safetensors", 0.5))
    yield Hostile("adapters of themselves", "adapters", lambda folder: changed(
        folder / "adapter_config.json", base_model_name_or_path=str(folder)))  # fmt: skip
    yield Hostile(
        "the original's dense layer is code", "encoder", lambda folder: trap(folder / "dense_pooler.bin", sprung)
    )


def both(first: Damage, second: Damage) -> Damage:
    """One damage after the other."""
    return lambda folder: (first(folder), second(folder))


def own_base(folder: Path) -> None:
    """Adapters that belong to themselves."""
    changed(folder / "adapter_config.json", base_model_name_or_path=str(folder))


def to_integers(own: dict[str, torch.Tensor]) -> None:
    """Weights of another kind."""
    own.update({name: weight.int() for name, weight in own.items()})


def narrow(folder: Path) -> None:
    """A dense layer for other vectors."""
    changed(folder / "config.json", in_features=5)
    save_file({"linear.weight": torch.zeros(32, 5)}, folder / "model.safetensors")


def cut(path: Path, fraction: float) -> None:
    """Leave the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


def trap(path: Path, sprung: Path) -> None:
    """Put code in place of weights."""
    path.write_bytes(pickle.dumps({"weight": Trap(sprung)}))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of a folder."""
    own = load_file(folder / "model.safetensors")
    change(own)
    save_file(own, folder / "model.safetensors", {"format": "pt"})


def reshape(own: dict[str, torch.Tensor]) -> None:
    """Give a weight one row more."""
    name = max(own, key=lambda name: own[name].dim())
    own[name] = torch.cat([own[name], own[name][:1]])


def only_pickle(folder: Path, sprung: Path, name: str = "model") -> None:
    """Code in place of all weights."""
    (folder / f"{name}.safetensors").unlink()
    trap(folder / f"{'pytorch_model' if name == 'model' else name}.bin", sprung)


def index(folder: Path, named: Any, sprung: Path | None) -> None:
    """Weights in one file that an index names."""
    names = sorted(load_file(folder / "model.safetensors"))
    if sprung is not None:
        trap(folder / named, sprung)
    (folder / "model.safetensors").unlink()
    write(folder / INDEX, {"metadata": {}, "weight_map": dict.fromkeys(names, named)})


def explicit(folder: Path, sprung: Path) -> None:
    """The name of the file with weights in the configuration."""
    trap(folder / "adapter_model.bin", sprung)
    changed(folder / "config.json", transformers_weights="adapter_model.bin")


def own_code(folder: Path, code: str, file: str, auto_class: str) -> None:
    """Python code that a configuration asks to run."""
    (folder / "trap.py").write_text(code)
    value = ["trap.Trap", "trap.Trap"] if auto_class == "AutoTokenizer" else "trap.Trap"
    more = {"model_type": "trap"} if file == "config.json" else {"tokenizer_class": "Trap"}
    changed(folder / file, auto_map={auto_class: value}, **more)


def adapters_beside(folder: Path, sprung: Path) -> None:
    """Adapters in the folder of a model, which transformers would load with it."""
    trap(folder / "adapter_model.bin", sprung)
    write(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 2})


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand within JSON; of long lists and large objects the first few."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(inside)[:40]:
        yield (*path, key)
        yield from _places(part, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    copy[path[0]] = _replaced(copy[path[0]], path[1:], new)
    return copy if isinstance(value, dict) else list(copy.values())


def at_random(bases: Mapping[str, Path], rng: random.Random) -> Iterator[Hostile]:
    """Without end: a value of a JSON file replaced or left out, or a file cut."""
    files = [(base, path) for base, folder in bases.items() for path in sorted(folder.rglob("*.json"))]
    while True:
        base, path = rng.choice(files)
        name = path.relative_to(bases[base])
        saved = json.loads(path.read_text(encoding="utf-8"))
        place = rng.choice(list(_places(saved)) or [()])
        kind = rng.random()
        if kind < 0.1:
            fraction = rng.random()
            yield Hostile(f"{name} cut at {fraction}", base, lambda f, n=name, x=fraction: cut(f / n, x))
            continue
        new = rng.choice(ODD) if kind < 0.95 else [[saved]]
        damaged = _replaced(saved, place, new)
        yield Hostile(f"{name} {place} = {json.dumps(new)[:30]}", base, lambda f, n=name, v=damaged: write(f / n, v))


def use(base: str, folder: Path) -> np.ndarray:
    """Load a folder as its kind is, and compute something small."""
    if base in ("lm", "gguf"):
        config = LMConfig(LMArgs(str(folder)), "fp32", CPU)
        tokenizer, settings = load_lm_tokenizer(config)
        if base == "lm":
            make_frame(tokenizer, False, bool(tokenizer.chat_template))
        empty_lm(config, settings)
        return load_lm(config).answer_scores([[5, 6, 7]], [[8, 9]])
    if base == "ranker":
        ranker = load_cross_encoder(RankerConfig(str(folder), 8, 8), new_head=False).eval()
        with torch.no_grad():
            return ranker.score(pad(ranker.pairs.tokenizer, ranker.pairs([("ab", "cd")]), [0])).numpy()
    load_dense_retriever(EncoderConfig(str(folder), empty=True))
    model = load_dense_retriever(EncoderConfig(str(folder))).eval()
    if base == "st":
        st_modules(str(folder), model, 32, False)
    with torch.no_grad():
        return model.embed_key(pad(model.key_tokenizer, model.key_tokenizer(["ab cd"]), [0])).numpy()


def outcome(hostile: Hostile, bases: Mapping[str, Path], folder: Path) -> np.ndarray | str:
    """What a damaged folder gives: numbers, or the line that tells why not.

    Raises:
        Exception: whatever else comes of it.
    """
    copy = folder / "hostile"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bases[hostile.base], copy)
    hostile.damage(copy)
    try:
        return use(hostile.base, copy)
    except UserError as error:
        return str(error)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return "out of memory"
        raise


def main() -> None:
    """Try folders until one gives a traceback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bases, random_ones = make_bases(folder), random.Random(args.seed)
        made = [*by_hand(folder / "sprung")]
        made += islice(at_random(bases, random_ones), args.folders)
        for hostile in made:
            try:
                found = outcome(hostile, bases, folder)
            except BaseException as error:
                print(f"{hostile.base}: {hostile.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                tally["tracebacks"] += 1
                continue
            tally["one line" if isinstance(found, str) else "numbers"] += 1
            if isinstance(found, str) and ("\n" in found or len(found) > 2000):
                print(f"{hostile.base}: {hostile.name}: {found[:300]!r}")
            if (folder / "sprung").exists():
                print(f"{hostile.base}: {hostile.name}: EXECUTED")
                (folder / "sprung").rmdir()
    print(dict(tally))


if __name__ == "__main__":
    main()
