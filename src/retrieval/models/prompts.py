"""A model's own instructions: what its folder says is to go before queries and keys."""

from __future__ import annotations

import logging
import re
from typing import Any

from src.retrieval.data.tasks import ANY, OWN, Instruction, read_instructions
from src.retrieval.models.loading import Checkpoint
from src.utils.errors import UserError
from src.utils.files import read_object

logger = logging.getLogger(__name__)

EMBEDDER_FILE = "embedder.json"
#: The file with the prompts of sentence-transformers.
ST_CONFIG = "config_sentence_transformers.json"
#: Names of prompts for keys; the first that is there counts, as in sentence-transformers.
KEY_PROMPTS = ("document", "passage", "corpus")
#: Prompts for queries in which an instruction stands, between what all queries of the model have around one.
_AROUND = re.compile(r"(Instruct: |task: |<instruct>).+?(\nQuery:\s*| \| query: |\n<query>)", re.DOTALL)


def own_instructions(checkpoint: Checkpoint) -> tuple[str, dict[str, Instruction]] | None:
    """Read which file of a checkpoint brings instructions, and these by task; None where there are none.

    Raises:
        UserError: the file is damaged.
    """
    if (path := checkpoint.find(EMBEDDER_FILE)) is not None:
        content = read_object(path, "encoder settings").get("instructions")
        if content is not None:
            return path, read_instructions(path, content)
    if (path := checkpoint.find(ST_CONFIG)) is not None:
        instruction = _of_prompts(path, read_object(path, "sentence-transformers settings"))
        return None if instruction is None else (path, {ANY: instruction})
    return None


def _of_prompts(path: str, settings: dict[str, Any]) -> Instruction | None:
    """The prompts for queries and for keys, where the first is a side's own, else the default one; None for none."""
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise UserError(f"{path}: 'prompts' must be a mapping from names to texts, found {prompts!r:.80}")
    if default is not None and default not in prompts:
        raise UserError(f"{path}: default_prompt_name {default!r} is none of its prompts ({', '.join(prompts)})")
    query = prompts.get("query", prompts.get(default))
    of_keys = [prompts[name] for name in KEY_PROMPTS if name in prompts]
    key = of_keys[0] if of_keys else prompts.get(default) if default != "query" else None
    if query or key:
        around = _AROUND.fullmatch(query or "")
        return Instruction(query or "", key or "", f"{around[1]}{OWN}{around[2]}" if around else OWN)
    if named := [name for name, text in prompts.items() if text]:
        unused = "%s: its prompts (%s) are for neither queries nor documents: --query_instruction takes the text of one"
        logger.info(unused, path, ", ".join(named))
    return None
