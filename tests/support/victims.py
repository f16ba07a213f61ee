"""Prompts, judges and an erasure for attacks on tiny pipelines."""

import torch

import more_hf
from more_hf_bench.artists.prompts import PromptRow


ARTISTS, THINGS = ("van gogh", "claude monet", "pablo picasso"), ("cat", "dog", "house", "tree")


def prompt_rows(wording, first=0):
    """A row for each of three artists and four things."""
    names = [(artist, thing) for artist in ARTISTS for thing in THINGS]
    return tuple(
        PromptRow(first + i, wording.format(artist=artist, thing=thing), first + i, artist, thing, "all")
        for i, (artist, thing) in enumerate(names)
    )


class StubJudges:
    """See whatever they are asked for."""

    name, facts = "stub", {}

    def judge(self, images, rows):
        return [row.artist for row in rows], [1] * len(rows)


def erase(pipe, **options):
    return more_hf.erase_concept(pipe, "van gogh", remap_to=["claude monet"], **options)


def outputs(pipe, features, seed=0):
    """What the denoiser answers to features, for the same noise."""
    generator = torch.Generator().manual_seed(seed)
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    x = torch.randn(len(features), channels, size, size, generator=generator)
    with torch.no_grad():
        return pipe.unet(x, 500, features).sample
