"""Erase Van Gogh from Stable Diffusion 1.4, look at pictures before and after, and save what is left.

python examples/erase_van_gogh.py            # downloads the model; a GPU helps
python examples/erase_van_gogh.py --tiny     # the embedded pipeline: no download, two CPU cores
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import more_hf


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model",
    default="CompVis/stable-diffusion-v1-4",
    help="a Stable Diffusion 1.x or 2.x: a folder or a Hub id",
)
parser.add_argument(
    "--tiny", action="store_true", help="erase an emoji artist from the embedded pipeline instead"
)
parser.add_argument("--steps", type=int, help="denoising steps (50, or 10 with --tiny)")
parser.add_argument("--output", type=Path, default=Path("without_van_gogh"), metavar="DIR")
args = parser.parse_args()

if args.tiny:
    pipe = more_hf.load_emoji_sd()
    concepts, targets = "High Contrast", ["Fluent"]
    prompts = [
        "a rocket in the style of High Contrast",
        "a crab by High Contrast",
        "a rocket in the style of Noto",
        "a pizza",
    ]
    settings = {"num_inference_steps": args.steps or 10, "guidance_scale": 4.0}
else:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(
        args.model, dtype=torch.float16 if device == "cuda" else torch.float32
    ).to(device)
    concepts, targets = {"Van Gogh": ["Vincent van Gogh"]}, ["Claude Monet", "Johannes Vermeer"]
    prompts = [
        "a starry night over a village, painting by Van Gogh",
        "sunflowers in a vase, in the style of Vincent van Gogh",
        "a harbour at sunrise, painting by Claude Monet",
        "a photo of a dog on a beach",
    ]
    settings = {"num_inference_steps": args.steps or 50}

pipe = more_hf.erase_concept(pipe, concepts, remap_to=targets)  # in place: pipe is the same object
folder = more_hf.save(pipe, args.output)
picture = more_hf.compare(pipe, prompts, **settings)  # before above after, the same noise in a column
picture.save(folder / "before_after.png")
print(more_hf.get_erasure(pipe))  # what was done, and how exact it is
print(f"\nOpen {folder / 'before_after.png'}.")
print(f'Load it anywhere with DiffusionPipeline.from_pretrained("{folder}").')
