"""What every baseline is told, and what it reads from the text encoder: names, last tokens, whole prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from ....core.errors import TargetNotFoundError
from ....diffusion.encoder import BATCH, Encoder
from ....diffusion.plan import make_request, surfaces_of
from ....diffusion.prompts import everyday_prompts, names_in


Concepts = str | Sequence[str] | Mapping[str, Sequence[str]]

EXPANSIONS = {
    "art": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}
"""The prompts that UCE and OCE add to a name (UCE, `--expand_prompts`)."""


class Asked(NamedTuple):
    """Names in their roles: forgotten surface forms, targets, and what must stay (the targets first)."""

    forget: list[str]
    targets: list[str]
    keep: list[str]


def names_asked(concepts: Concepts, remap_to: str | Sequence[str] | None, retain: Sequence[str] | None) -> Asked:
    """Check the arguments exactly as `erase_concept` does. Raises `PrototypeError`."""
    request = make_request(concepts, remap_to, retain, None, None, "auto", "positions", 0)
    forget = surfaces_of(request)
    targets = next(iter(request["remap_to"].values()))
    return Asked(forget, targets, list(dict.fromkeys([*targets, *request["retain"]])))


def require_stable_diffusion(pipe: DiffusionPipeline) -> None:
    """Raises `TargetNotFoundError` for a pipeline of another class: the method makes this one's calls itself."""
    if not isinstance(pipe, StableDiffusionPipeline):
        raise TargetNotFoundError(
            f"This method runs inside StableDiffusionPipeline (Stable Diffusion 1.x and 2.x), and {type(pipe).__name__} makes other calls. "
            "Take such a pipeline (of a sister pipeline, `StableDiffusionPipeline.from_pipe(pipe)`), or `erase_concept`, which knows "
            "the other families."
        )


def guides(asked: Asked, guide: str | None, default: str) -> list[str]:
    """What the concepts become: `guide` if it is given, else the targets, else the method's published default."""
    return [guide] if guide is not None else asked.targets or [default]


def expanded(name: str, kind: str | None) -> list[str]:
    """The name, and its prompts of `EXPANSIONS` unless `kind` is `None`."""
    return [name, *(template.format(name) for template in EXPANSIONS.get(kind, ()))]


def ordinary_prompts(pipe: DiffusionPipeline, asked: Asked) -> list[str]:
    """The everyday prompts of the package that name nothing of what is forgotten."""
    return [prompt for prompt in everyday_prompts(pipe.tokenizer) if not any(names_in(prompt, name) for name in asked.forget)]


class Texts:
    """CLIP's text features in float64 on the CPU, as the denoiser's cross-attention reads them."""

    def __init__(self, pipe: DiffusionPipeline):
        """Raises `TargetNotFoundError` for a denoiser that reads T5: it has no keys and values of text alone, which the methods edit."""
        self.encoder = Encoder(pipe)
        if not all(segment.clip for segment in self.encoder.text.segments):
            raise TargetNotFoundError(
                f"{type(pipe).__name__} reads text through no keys and values of CLIP features, which this method edits. Take a pipeline "
                "of Stable Diffusion 1.x, 2.x or XL, or `erase_concept`, which knows this family."
            )

    def last(self, prompt: str) -> int:
        """Position of the last content token; 0, the begin token, for a prompt that has none (UCE's convention)."""
        return min(len(self.encoder.token_ids(prompt)), self.encoder.length - 2)

    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """`(n, tokens, d)`: every position of every prompt, padding included."""
        batches = [self.encoder.encode(prompts[first : first + BATCH]) for first in range(0, len(prompts), BATCH)]
        return torch.cat(batches).double().cpu()

    def last_tokens(self, prompts: Sequence[str]) -> Tensor:
        """`(n, d)`: the feature of each prompt's last content token."""
        return self.prompts(prompts)[torch.arange(len(prompts)), [self.last(prompt) for prompt in prompts]]

    def content(self, prompts: Sequence[str]) -> Tensor:
        """`(tokens of all prompts, d)`: content tokens alone, without begin, end and padding."""
        features = self.prompts(prompts)
        return torch.cat([feature[1 : 1 + self.last(prompt)] for feature, prompt in zip(features, prompts, strict=True)])
