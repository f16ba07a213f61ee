"""Write an erasure as one LoRA file for ComfyUI and A1111, and check it against the erased pipeline.

    python examples/export_comfyui_lora.py --concept "Van Gogh" --remap_to "Claude Monet"
    python examples/export_comfyui_lora.py --tiny

The file is for users who keep the original model: at weight 1 it erases, at 0 it does not. It is exact,
because the change of every layer has the rank of what was erased. With it, published erased weights give the
concept back, so keep the two apart.
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
parser.add_argument("--concept", default="Van Gogh")
parser.add_argument("--remap_to", nargs="+", default=["Claude Monet"], metavar="NAME")
parser.add_argument(
    "--tiny", action="store_true", help="erase an emoji artist from the embedded pipeline instead"
)
parser.add_argument("--output", type=Path, default=Path("loras"), metavar="DIR")
args = parser.parse_args()


def load():
    return (
        more_hf.load_emoji_sd()
        if args.tiny
        else DiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    )


concept, targets = ("High Contrast", ["Fluent"]) if args.tiny else (args.concept, args.remap_to)
pipe = more_hf.erase_concept(load(), concept, remap_to=targets)
name = f"without_{concept.lower().replace(' ', '_')}"
file = more_hf.save_lora(pipe, args.output / f"{name}.safetensors", format="kohya")

# diffusers reads the file, too: the untouched pipeline then gives what the erased one gives, up to float16.
original = load()
original.load_lora_weights(file.parent, weight_name=file.name)
prompt, settings = f"a rocket in the style of {concept}", {"num_inference_steps": 10, "output_type": "pt"}
erased, with_lora = (
    p(prompt, generator=torch.Generator().manual_seed(0), **settings).images for p in (pipe, original)
)
print(f"Largest difference of a pixel to the erased pipeline: {(erased - with_lora).abs().max():.1e} of 1")

print(f"Wrote {file}")
print(
    "  ComfyUI: copy it to models/loras and add a `Load LoRA` node, strength_model 1 "
    "(strength_clip has no effect)"
)
print(f"  A1111:   copy it to models/Lora and write <lora:{name}:1> into the prompt")
