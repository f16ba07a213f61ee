"""Several experts instead of one: who picks them, what is lost with the router, what asking twice gives away.

    python examples/routed_experts.py

Four rows of pictures from the same noise: the original; the mean expert, which is all that the weights hold;
`random`, the paper's router, which draws an expert for every sample of every call; and `hash`, where the
prompt decides. Runs on the embedded pipeline.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

import more_hf


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--concept", default="High Contrast")
parser.add_argument("--remap_to", nargs="+", default=["Fluent", "Twemoji", "Firefox OS"], metavar="NAME")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--output", type=Path, default=Path("routed_experts"), metavar="DIR")
args = parser.parse_args()

THINGS = ["rocket", "pizza", "house", "cat face", "guitar", "crab"]


def draw(pipe):
    """One picture per thing. `routing` gives every sample its own experts: the batch size does not matter."""
    erasure, seeds = more_hf.get_erasure(pipe), range(len(THINGS))
    routed = erasure is not None and erasure.router is not None
    with more_hf.routing(pipe, seeds=list(seeds)) if routed else contextlib.nullcontext():
        return pipe(
            [f"a {thing} in the style of {args.concept}" for thing in THINGS],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=args.steps,
            guidance_scale=4.0,
        ).images


pipe = more_hf.load_emoji_sd()
rows = {"original": draw(pipe)}
for router in (None, "random", "hash"):
    more_hf.erase_concept(
        pipe, args.concept, remap_to=args.remap_to, router=router
    )  # again: fitted anew from the kept originals
    rows[router or "mean expert"] = draw(pipe)

args.output.mkdir(parents=True, exist_ok=True)
images = [image for row in rows.values() for image in row]
make_image_grid(images, rows=len(rows), cols=len(THINGS)).save(args.output / "experts.png")
print(f"Rows of {args.output / 'experts.png'}: {', '.join(rows)}")

# The router is code and lives in this process. A plain `save_pretrained` keeps the mean expert, which has
# forgotten as much; with the factors next to the weights, `load` puts the router back. Whoever has both can
# compute the original, so do not publish the factors.
folder = more_hf.save(pipe, args.output / "with_router", include_delta=True)
again = draw(more_hf.load(folder))
print(
    "Loaded with its router, it draws the same:",
    all(a.tobytes() == b.tobytes() for a, b in zip(rows["hash"], again, strict=True)),
)

print("\nWhat the routers give away:")
more_hf.erase_concept(pipe, args.concept, remap_to=args.remap_to, router="random")
print("\n".join(f"- {leak}" for leak in more_hf.get_erasure(pipe).facts.leaks))
