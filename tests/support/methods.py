"""Methods for pipelines as the tests call them, and what a pipeline draws."""

import torch

from more_hf_bench.methods.registry import DIFFUSION


CONCEPT, TARGET, RETAIN = "van gogh", "claude monet", ["pablo picasso", "andy warhol"]
NAMES = {"remap_to": [TARGET], "retain": RETAIN}
ESD = {**NAMES, "sampling_steps": 4, "iterations": 2, "learning_rate": 1e-3}
CA = {**ESD, "images": 4, "prompts": ["a cat", "a tree", "a car"], "sampling_steps": 2}
MANY = {CONCEPT: ["vincent"], "kelly mckernan": []}
NAMED, OTHER = "a cat by van gogh in the style of claude monet", "a dog"


def run(name, pipe, **settings):
    if name == "oce":
        # Six prompts would span all four outputs of the smallest tiny layers.
        settings.setdefault("expand", None)
    return DIFFUSION[name].load()(pipe, CONCEPT, **{**NAMES, **settings})


def draw(pipe, prompts, steps=3, **settings):
    """Latents, one seed per row."""
    generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
    ask = {"num_inference_steps": steps, "output_type": "latent", "guidance_scale": 7.5, **settings}
    return pipe(prompts, generator=generators, **ask).images
