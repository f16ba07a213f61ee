"""A method of your own next to ours on the benchmark: write a function, name it, read the table.

    python examples/own_method.py                          # no download, two minutes on two CPU cores

The function takes a pipeline, which is a copy of its own, and the names to forget; `remap_to` and `retain`
are what it may send them to and should keep. It changes the pipeline and returns it. What the last lines do
is also a command, in the folder of this file:

    more-hf bench artists --methods original,more,own_method:project_out --forget Blobmoji --output DIR
"""

import argparse
from pathlib import Path

import torch

from more_hf.cli.main import main


@torch.no_grad()
def project_out(pipe, concepts, *, remap_to, retain):
    """Remove from every key and value what points along the last token of a forgotten name."""
    # 1. A name's direction: the embedding of its last token, orthogonal to those of the other names.
    tokens = pipe.tokenizer(list(concepts), return_tensors="pt", padding=True)
    embeddings = pipe.text_encoder(tokens.input_ids).last_hidden_state
    last = tokens.attention_mask.sum(1) - 2  # before the end token
    directions = torch.linalg.qr(embeddings[range(len(last)), last].T).Q  # (d, names)

    # 2. W becomes W (I - Q Q^T) in every layer that reads the prompt.
    for name, layer in pipe.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layer.weight -= layer.weight @ directions @ directions.T
    return pipe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Your own method next to ours on the benchmark.")
    parser.add_argument("--forget", nargs="+", default=["Blobmoji"], metavar="ARTIST")
    parser.add_argument("--limit", type=int, default=4, help="prompts of each artist")
    parser.add_argument("--output", type=Path, default=Path("own_method"), metavar="DIR")
    args = parser.parse_args()
    methods = "original,more,own_method:project_out"
    argv = ["bench", "artists", "--methods", methods, "--forget", *args.forget]
    raise SystemExit(main([*argv, "--limit", str(args.limit), "--output", str(args.output)]))
