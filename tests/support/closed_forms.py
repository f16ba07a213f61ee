"""References for the closed forms: UCE's formula for one layer, and the names that the tests use."""

import torch

from more_hf_bench.methods.registry import DIFFUSION
from support.texts import tokens


CONCEPT, TARGET, RETAIN = "van gogh", "claude monet", ["pablo picasso", "andy warhol"]
MANY = {CONCEPT: ["vincent"], "kelly mckernan": []}


def run(name, pipe, remap_to=(TARGET,), retain=RETAIN, **settings):
    remap_to = None if remap_to is None else list(remap_to)
    if name == "oce":
        # Six prompts would span all four outputs of the smallest tiny layers.
        settings.setdefault("expand", None)
    return DIFFUSION[name].load()(pipe, CONCEPT, remap_to=remap_to, retain=retain, **settings)


def uce_layer(W, old, new, kept, lamb, erase, preserve):
    """The formula as a loop over embeddings, for one layer."""
    left, right = lamb * W, lamb * torch.eye(W.shape[1], dtype=W.dtype)
    for c, g in zip(old, new, strict=True):
        left, right = left + erase * torch.outer(W @ g, c), right + erase * torch.outer(c, c)
    for r in kept:
        left, right = left + preserve * torch.outer(W @ r, r), right + preserve * torch.outer(r, r)
    return left @ torch.inverse(right)


def paper_sequences(pipe, concept, target):
    (old, n_old), (new, n_new) = tokens(pipe, concept), tokens(pipe, target)
    a, b = n_old - 2, n_new - 2
    shift = max(a, b)
    return old[a : len(old) - (shift - a)], new[b : len(new) - (shift - b)]
