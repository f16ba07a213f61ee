"""Pipelines guarded by a method that changes no weight, and what they draw."""

import torch

from more_hf_bench.methods.registry import DIFFUSION


CONCEPT = "van gogh"
NAMED, OTHER = "a cat by van gogh in the style of claude monet", "a dog"


def make(name, pipe, **settings):
    return DIFFUSION[name].load()(
        pipe, CONCEPT, remap_to=["claude monet"], retain=["pablo picasso"], **settings
    )


def draw(pipe, prompts, steps=3, **settings):
    """Latents, one seed per row."""
    generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
    ask = {"num_inference_steps": steps, "output_type": "latent", "guidance_scale": 7.5, **settings}
    return pipe(prompts, generator=generators, **ask).images
