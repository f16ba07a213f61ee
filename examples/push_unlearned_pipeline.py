"""Erase two styles, draw before and after for the model card, and publish the pipeline.

    python examples/push_unlearned_pipeline.py --dry_run to_push       # look at what would be pushed
    python examples/push_unlearned_pipeline.py me/emoji-sd-without-two-styles
    python examples/push_unlearned_pipeline.py me/sd14-without-van-gogh \\
        --model CompVis/stable-diffusion-v1-4 \\
        --concept "Van Gogh" --remap_to "Claude Monet" "Johannes Vermeer"

Whoever loads the result needs diffusers only:
`DiffusionPipeline.from_pretrained("me/emoji-sd-without-two-styles")`.
"""

import argparse
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline

import more_hf


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("repo_id", nargs="?", default="me/emoji-sd-without-two-styles", metavar="NAME/REPO")
parser.add_argument("--model", help="a folder or a Hub id (the embedded pipeline)")
parser.add_argument("--concept", nargs="+", default=["High Contrast", "Monotone"], metavar="NAME")
parser.add_argument("--remap_to", nargs="+", default=["Fluent"], metavar="NAME")
parser.add_argument("--private", action="store_true", default=None)
parser.add_argument(
    "--dry_run", type=Path, metavar="DIR", help="write to this folder what would be pushed, and push nothing"
)
args = parser.parse_args()


# 1. Erase, all names together.
pipe = more_hf.load_emoji_sd() if args.model is None else DiffusionPipeline.from_pretrained(args.model)
more_hf.erase_concept(pipe, args.concept, remap_to=args.remap_to)

# 2. Draw before and after for the card: every erased style twice, and one picture that must stay as it is.
prompts = [f"a {thing} in the style of {name}" for name in args.concept for thing in ("rocket", "cat face")]
settings = {"num_inference_steps": 10, "guidance_scale": 4.0} if args.model is None else {}
picture = more_hf.compare(pipe, [*prompts, "a house"], **settings)

# 3. Check the very files that go up, write a card under the original model's licence, make one commit.
with tempfile.TemporaryDirectory() as folder:
    grid = Path(folder) / "before_after.png"
    picture.save(grid)
    done = more_hf.push_to_hub(pipe, args.repo_id, private=args.private, grid=grid, dry_run=args.dry_run)

if args.dry_run is None:
    print(f"Pushed to https://huggingface.co/{args.repo_id}")
else:
    print(f"Nothing was pushed. Read {done / 'README.md'}, then check the files with: more-hf verify {done}")
