"""The families with prompts that are a bare name: how to erase and draw it, and what the layers read."""

import diffusers
import torch

import more_hf
from support.families import MATRIX, TINY, build, denoiser_of, few_ordinary_prompts, images, set_length


FORGET, TARGET, OTHER = "gogh", "monet", "cat"  # one token each in every tokenizer here
CLIP_LENGTH = 4  # begin token, name, end token and one position of padding


def use_bare_names(monkeypatch, lengths):
    """
    Prototypes of the bare name alone, so that a prompt that is the name holds nothing else. `lengths` are
    those of the prompts of pipelines, by class.
    """
    few_ordinary_prompts(monkeypatch)
    monkeypatch.setattr("more_hf.diffusion.encoder.TEMPLATES", ("{}",))
    monkeypatch.setitem(more_hf.diffusion.encoder.TOKENS, "positions", ("last", "end", "padding"))
    for cls, length in lengths.items():
        set_length(monkeypatch, cls, length)


LENGTHS = {getattr(diffusers, TINY[family].pipeline): TINY[family].bare_length for family in MATRIX}


def shortened(pipe, family):
    """The same pipeline; CLIP pads the prompts that a denoiser reads to few positions."""
    if family.startswith("sd"):
        pipe.tokenizer_max_length = CLIP_LENGTH
        for part in ("tokenizer", "tokenizer_2"):
            if pipe.components.get(part) is not None:
                pipe.components[part].model_max_length = CLIP_LENGTH
    return pipe


def build_bare(family):
    return shortened(build(family), family)


def erase(pipe, **kwargs):
    return more_hf.erase_concept(pipe, FORGET, **{"remap_to": TARGET, "solver": "pinv", **kwargs})


def draw(pipe, family, prompt, **kwargs):
    prompt = list(prompt) if isinstance(prompt, list) else prompt  # into which Z-Image writes
    options = {"max_sequence_length": TINY[family].bare_length, **kwargs}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some pipelines draw from the global state, too
        return images(pipe, family, prompt, **options)


@torch.no_grad()
def read_by_layers(pipe, family, prompt, **kwargs):
    """What each layer that reads text is given first while the pipeline draws, `(tokens, d)`."""
    seen, hooks = {}, []
    for name in TINY[family].sites:

        def see(layer, args, name=name):
            seen.setdefault(name, args[0])

        hooks.append(denoiser_of(pipe).get_submodule(name).register_forward_pre_hook(see))
    draw(pipe, family, prompt, **kwargs)
    for hook in hooks:
        hook.remove()
    return {name: z.reshape(-1, z.shape[-1]).double() for name, z in seen.items()}
