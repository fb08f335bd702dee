"""What a model's folder holds, by libraries that raise anything: each failure is one line for the user."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator

from transformers import PretrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file

from src.utils.errors import UserError, first_line, is_out_of_memory
from src.utils.files import read_object
from src.utils.manifest import check_recorded


def find_file(checkpoint: str, name: str, cache_dir: str | None) -> str | None:
    """A file of a local folder or of a hub repository, None when it is not there."""
    if os.path.isdir(checkpoint):
        path = os.path.join(checkpoint, name)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(
            checkpoint,
            name,
            cache_dir=cache_dir,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:
        return None


def safe_only(allow_pickle: bool) -> bool | None:
    """What transformers is told of the formats of weights: safetensors only, or whatever there is."""
    return None if allow_pickle else True


def check_weights(checkpoint: str, config: PretrainedConfig, allow_pickle: bool, cache_dir: str | None = None) -> None:
    """Look for weights that are damaged or only in a pickle, and for adapters that transformers would load unasked.

    Raises:
        UserError: there are such and nobody asked for them, or the folder holds a model and adapters.
    """
    names = sorted(os.listdir(checkpoint)) if os.path.isdir(checkpoint) else []
    if CONFIG_NAME in names and ADAPTER_CONFIG_NAME in names:
        raise UserError(
            f"{checkpoint!r} holds a model ({CONFIG_NAME}) and adapters ({ADAPTER_CONFIG_NAME}): give each a folder"
        )
    check_recorded(checkpoint)
    if allow_pickle:
        return
    pickles = [name for name in names if name.startswith("pytorch_model")]
    if pickles and any(name.endswith((".safetensors", ".gguf")) for name in names):
        pickles = []
    # An index may name files of any format.
    indexes = [os.path.join(checkpoint, name) for name in names if name.endswith(".safetensors.index.json")]
    for index in indexes or filter(None, [find_file(checkpoint, SAFE_WEIGHTS_INDEX_NAME, cache_dir)]):
        shards = read_object(index, "index of weights").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{index} is damaged: 'weight_map' must name the file of each weight")
        pickles += sorted({shard for shard in shards.values() if not shard.endswith(".safetensors")})
    if (named := getattr(config, "transformers_weights", None)) and ".safetensors" not in str(named):
        pickles.append(str(named))
    if pickles:
        raise UserError(
            f"{checkpoint!r} keeps its weights in a pickle ({pickles[0]}), a format that can carry code: convert it to "
            "model.safetensors, or give --allow_pickle if you trust where it comes from"
        )


def load_error(checkpoint: str, error: BaseException, what: str, part: str) -> UserError:
    """One line about an exception of a library; see `loading`."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"the {what} {checkpoint!r} brings Python code of its own, which is not run unasked: read it, and give "
            "--trust_remote_code if you trust it"
        )
    if isinstance(error, pickle.UnpicklingError):
        return UserError(f"cannot load the {what} {checkpoint!r}: its pickle holds more than weights")
    advice = (
        "the folder must hold config.json, model.safetensors and the tokenizer's files"
        if os.path.isdir(checkpoint)
        else "no such folder here; as a hub name it must be in the cache already when there is no network, "
        "see --model_cache_dir; weights in another format than safetensors need --allow_pickle"
    )
    reason = first_line(error)
    if isinstance(error, ImportError):
        advice = "install what is missing, or take a model that does without"
    elif os.path.isabs(checkpoint) and not os.path.exists(checkpoint):
        # What the hub's client says of a path is about names of repositories.
        reason = "no such folder"
    elif not isinstance(error, OSError | ValueError | RuntimeError):
        # The messages of these alone say little.
        reason = f"{type(error).__name__}: {reason}"
        advice = "a file is damaged, or has a value of another kind than it should: fetch or save the model anew"
    where = f" ({part})" if part and os.path.isdir(checkpoint) else ""
    return UserError(f"cannot load the {what} {checkpoint!r}{where}: {reason} ({advice})")


@contextlib.contextmanager
def loading(checkpoint: str, what: str, part: str = "") -> Iterator[None]:
    """Tell in one line why something of a checkpoint cannot be used, whatever it makes a library raise.

    Only for calls of libraries on what a checkpoint holds: mistakes of our own must stay visible.

    Args:
        checkpoint: folder or hub name.
        what: kind of model that was wanted.
        part: of it, that is read.

    Raises:
        UserError: in place of any exception but want of memory.
    """
    try:
        yield
    except BaseException as error:
        # A panic of the tokenizers library is none of Python's exceptions, and can be imported from nowhere.
        expected = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not expected or isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise load_error(checkpoint, error, what, part) from error
