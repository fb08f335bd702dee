"""Find, check and load what a model's folder or hub name holds; whatever a library raises is one line for the user."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from src.utils.errors import UserError, first_line, is_out_of_memory
from src.utils.files import read_object
from src.utils.manifest import check_recorded

logger = logging.getLogger(__name__)

#: The files that weights may be in, or that name them.
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


@contextlib.contextmanager
def loading(path: str, what: str, part: str = "") -> Iterator[None]:
    """Raise a UserError with the reason in place of whatever a library raises, want of memory aside.

    Only for calls of libraries on what a checkpoint holds: our mistakes must stay visible. `what` is the kind of model,
    `part` what is read of it.
    """
    try:
        yield
    except BaseException as error:
        # A panic of the tokenizers library is none of Python's exceptions, and can be imported from nowhere.
        expected = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not expected or isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise _load_error(path, error, what, part) from error


def _load_error(path: str, error: BaseException, what: str, part: str) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"the {what} {path!r} brings Python code of its own, which is not run unasked: read it, and give "
            "--trust_remote_code if you trust it"
        )
    reason = first_line(error)
    if isinstance(error, ImportError):
        advice = "install what is missing, or take a model that does without"
    elif isinstance(error, pickle.UnpicklingError):
        reason, advice = "its pickle holds more than weights", "take weights in safetensors"
    elif os.path.isabs(path) and not os.path.exists(path):
        # What the hub's client says of a path is about names of repositories.
        reason, advice = "no such folder", "name one that is there, or a model of the hub"
    elif not isinstance(error, OSError | ValueError | RuntimeError):
        # The messages of these alone say little.
        reason = f"{type(error).__name__}: {reason}"
        advice = "a file is damaged, or has a value of another kind than it should: fetch or save the model anew"
    elif os.path.isdir(path):
        advice = "the folder must hold config.json, model.safetensors and the tokenizer's files"
    else:
        advice = "no such folder here; as a hub name it must be in the cache already when there is no network, "
        advice += "see --model_cache_dir; weights in another format than safetensors need --allow_pickle"
    where = f" ({part})" if part and os.path.isdir(path) else ""
    return UserError(f"cannot load the {what} {path!r}{where}: {reason} ({advice})")


def inner_folder(path: str, names: Sequence[str]) -> str:
    """The model folder that `path` means: itself, or when it is a checkpoint-N the first of `names` inside."""
    if not os.path.isdir(path) or os.path.isfile(os.path.join(path, CONFIG_NAME)):
        return path
    inside = [os.path.join(path, name) for name in names]
    return next((folder for folder in inside if os.path.isfile(os.path.join(folder, CONFIG_NAME))), path)


@dataclass(frozen=True)
class Checkpoint:
    """A model to load with transformers; `gguf_file` is the file in the folder that holds all of it, if one does.

    Every method raises a UserError that names the model where a file is missing, damaged or of another kind.
    """

    path: str
    what: str
    model_cache_dir: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    gguf_file: str | None = None
    attn_implementation: str | None = None

    @property
    def _options(self) -> dict[str, Any]:
        gguf = {"gguf_file": self.gguf_file} if self.gguf_file is not None else {}
        return {"cache_dir": self.model_cache_dir, "trust_remote_code": self.trust_remote_code, **gguf}

    @property
    def _attention(self) -> dict[str, Any]:
        return {"attn_implementation": self.attn_implementation} if self.attn_implementation is not None else {}

    def loading(self, part: str = "") -> contextlib.AbstractContextManager[None]:
        """See `loading`."""
        return loading(self.path, self.what, part)

    def find(self, name: str) -> str | None:
        """The path of a file, fetched from the hub where need be; None when it is not there."""
        try:
            return cached_file(
                self.path,
                name,
                cache_dir=self.model_cache_dir,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except OSError:
            return None

    def config(self) -> PretrainedConfig:
        """Read the configuration."""
        with self.loading("its config.json"):
            return AutoConfig.from_pretrained(self.path, **self._options)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer as it stands there."""
        with self.loading("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.path, **self._options)
            # What is wrong with its files may show in use only.
            tokenizer("a")
            tokenizer.convert_tokens_to_ids(["a", *tokenizer.all_special_tokens])
        return tokenizer

    def padding_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer to pad on the right, by its end token where it has none for that.

        Right padding keeps absolute positions and causal attention untouched by padding; models read the mask.
        """
        tokenizer = self.tokenizer()
        # Without its files transformers makes one up that knows the special tokens only.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise UserError(
                f"{self.path!r} has no files of a tokenizer: copy them there from where the {self.what} comes from"
            )
        tokenizer.padding_side = "right"
        # sentence-transformers would put every text into it.
        tokenizer.chat_template = None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
            logger.info("%s: the tokenizer has no padding token, its end token is used (and masked)", self.path)
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"the tokenizer of {self.path!r} has neither a token to pad with nor one that ends texts: name one in "
                "its tokenizer_config.json (pad_token)"
            )
        return tokenizer

    def load(
        self, auto_class: Any, config: PretrainedConfig | None, dtype: torch.dtype = torch.float32, **options: Any
    ) -> tuple[PreTrainedModel, list[str]]:
        """Load the model with a class of transformers; return it and the names of weights that the checkpoint lacks."""
        self.check_weights(config)
        with self.loading():
            model, info = auto_class.from_pretrained(
                self.path,
                config=config,
                dtype=dtype,
                use_safetensors=None if self.allow_pickle else True,
                output_loading_info=True,
                **self._options,
                **self._attention,
                **options,
            )
        return model, sorted(info["missing_keys"])

    def load_complete(self, auto_class: Any, config: PretrainedConfig | None, **options: Any) -> PreTrainedModel:
        """Load the model as `load` does; no weight may be missing."""
        model, missing = self.load(auto_class, config, **options)
        self.refuse_missing(missing)
        return model

    def load_into(self, backbone: PreTrainedModel, **options: Any) -> None:
        """Give a transformer the weights that `PreTrainedModel.save_pretrained` wrote here of one of its kind."""
        saved = self.load_complete(type(backbone), None, **options)
        with self.loading():
            backbone.load_state_dict(saved.state_dict())

    def refuse_missing(self, missing: Sequence[str]) -> None:
        """Raise a UserError when there are names of missing weights."""
        if missing:
            raise UserError(
                f"{self.path!r} lacks {len(missing)} weights, among them {missing[0]}: take another checkpoint of the "
                f"{self.what}"
            )

    def empty(self, auto_class: Any, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """Build the model on the meta device: shapes, no weights and no memory. The files of weights are checked."""
        self.check_weights(config)
        if os.path.isdir(self.path) and self.gguf_file is None:
            if not any(os.path.isfile(os.path.join(self.path, name)) for name in _WEIGHTS):
                raise UserError(f"{self.path!r} holds no weights: one of {', '.join(_WEIGHTS)} is needed")
            for file in sorted(Path(self.path).glob("*.safetensors")):
                try:
                    # Reads the header and compares the size of the file with it.
                    with safe_open(file, "pt"):
                        pass
                except SafetensorError as error:
                    reason = first_line(error)
                    raise UserError(f"{file} is damaged or cut off ({reason}): fetch or save the model anew") from error
        with self.loading(), torch.device("meta"):
            if quantization := getattr(config, "quantization_config", None):
                AutoHfQuantizer.from_config(quantization).validate_environment()
            code = {"trust_remote_code": self.trust_remote_code}
            return auto_class.from_config(config, dtype=torch.float32, **code, **self._attention, **options)

    def check_weights(self, config: PretrainedConfig | None) -> None:
        """Refuse weights that are damaged or only in a pickle, and adapters that transformers would load unasked."""
        names = sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []
        if CONFIG_NAME in names and ADAPTER_CONFIG_NAME in names:
            raise UserError(
                f"{self.path!r} holds a model ({CONFIG_NAME}) and adapters ({ADAPTER_CONFIG_NAME}): give each a folder"
            )
        check_recorded(self.path)
        if self.allow_pickle:
            return
        pickles = [name for name in names if name.startswith("pytorch_model")]
        if pickles and any(name.endswith((".safetensors", ".gguf")) for name in names):
            pickles = []
        # An index may name files of any format.
        indexes = [os.path.join(self.path, name) for name in names if name.endswith(".safetensors.index.json")]
        for index in indexes or filter(None, [self.find(SAFE_WEIGHTS_INDEX_NAME)]):
            shards = read_object(index, "index of weights").get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError(f"{index} is damaged: 'weight_map' must name the file of each weight")
            pickles += sorted({shard for shard in shards.values() if not shard.endswith(".safetensors")})
        if (named := getattr(config, "transformers_weights", None)) and ".safetensors" not in str(named):
            pickles.append(str(named))
        if pickles:
            raise UserError(
                f"{self.path!r} keeps its weights in a pickle ({pickles[0]}), a format that can carry code: convert it "
                "to model.safetensors, or give --allow_pickle if you trust where it comes from"
            )
