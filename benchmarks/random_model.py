"""Write an encoder or LM of any size with random weights and the tokenizer of another model: what it costs to run does
not depend on the weights.

python -m benchmarks.random_model OUT --tokenizer FOLDER_OR_HUB_NAME --kind encoder     # BERT-base
python -m benchmarks.random_model OUT --tokenizer FOLDER_OR_HUB_NAME --kind lm          # a Llama of 1.1 billion
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--kind", choices=("encoder", "lm"), default="encoder")
    parser.add_argument("--layers", type=int, help="12 for an encoder, 16 for an LM")
    parser.add_argument("--width", type=int, help="768 for an encoder, 2048 for an LM")
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    lm = args.kind == "lm"
    width = args.width or (2048 if lm else 768)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": args.layers or (16 if lm else 12),
        "num_attention_heads": width // 64,
    }
    torch.manual_seed(0)
    with torch.device(args.device):
        if lm:
            shape |= {"num_key_value_heads": width // 256, "max_position_embeddings": 4096}
            ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            model = LlamaForCausalLM(LlamaConfig(**shape, **ends)).to(torch.bfloat16)
        else:
            model = BertModel(BertConfig(**shape), add_pooling_layer=False)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved: {args.out}, {model.num_parameters() / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
