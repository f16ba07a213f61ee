"""The names of one erasure in their roles, and CLIP's features of them, which the closed forms edit with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from more_hf.core.errors import SiteNotFoundError
from more_hf.core.request import ConceptRequest, names_in
from more_hf.diffusion.encoder import BATCH, Encoder
from more_hf.diffusion.prompts import everyday_prompts


Concepts = str | Sequence[str] | Mapping[str, Sequence[str]]
Targets = str | Sequence[str] | None
Retained = Sequence[str] | None


@dataclass(frozen=True)
class Roles:
    """Names in their roles."""

    forget: list[str]  # concepts and their aliases
    targets: list[str]  # what they are sent to
    keep: list[str]  # what must stay: the targets, then the retained names


def name_roles(concepts: Concepts, remap_to: Targets, retain: Retained) -> Roles:
    """Check the arguments exactly as `erase_concept` does. Raises `PrototypeError`."""
    request = ConceptRequest.of(concepts, remap_to=remap_to, retain=retain)
    keep = list(dict.fromkeys([*request.targets, *request.retain]))
    return Roles(request.surfaces, request.targets, keep)


def guides(roles: Roles, guide: str | None) -> list[str]:
    """What the concepts become: `guide` if it is given, else the targets, else `"art"`, as published."""
    if guide is not None:
        return [guide]
    return roles.targets or ["art"]


def ordinary_prompts(pipe: DiffusionPipeline, forget: Sequence[str]) -> list[str]:
    """The package's everyday prompts that name nothing of what is forgotten."""
    prompts = everyday_prompts(pipe.tokenizer)
    return [prompt for prompt in prompts if not any(names_in(prompt, name) for name in forget)]


EXPANSIONS = {
    "art": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}
"""The prompts that UCE and OCE add to a name (UCE, `--expand_prompts`)."""


def expanded(name: str, kind: str | None) -> list[str]:
    """The name, and its prompts of `EXPANSIONS` unless `kind` is `None`."""
    return [name, *(template.format(name) for template in EXPANSIONS.get(kind, ()))]


class Texts:
    """CLIP's text features in float64 on the CPU, as the denoiser's cross-attention reads them."""

    def __init__(self, pipe: DiffusionPipeline):
        """Raises `SiteNotFoundError` for a denoiser that reads T5: it has no keys and values of text
        alone, which the methods edit."""
        self.encoder = Encoder(pipe)
        if not all(segment.clip for segment in self.encoder.text.segments):
            raise SiteNotFoundError(
                f"{type(pipe).__name__} reads text through no keys and values of CLIP features, which this "
                "method edits. Take a pipeline of Stable Diffusion 1.x, 2.x or XL, or `erase_concept`, which "
                "knows this family."
            )

    def last(self, prompt: str) -> int:
        """Position of the last content token; 0, the begin token, for a prompt that has none, as in UCE."""
        return min(len(self.encoder.token_ids(prompt)), self.encoder.length - 2)

    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Every position of every prompt, padding included: `(n, tokens, d)`; of no prompts `(0, tokens,
        d)`."""
        if not prompts:
            return self.prompts([""])[:0]
        batches = [self.encoder.encode(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        return torch.cat(batches).double().cpu()

    def last_tokens(self, prompts: Sequence[str]) -> Tensor:
        """The feature of each prompt's last content token: `(n, d)`."""
        last = torch.tensor([self.last(prompt) for prompt in prompts], dtype=torch.int64)
        return self.prompts(prompts)[torch.arange(len(prompts)), last]

    def content(self, prompts: Sequence[str]) -> Tensor:
        """Content tokens alone, without begin, end and padding: `(tokens of all prompts, d)`."""
        features = self.prompts(prompts)
        content = [z[1 : 1 + self.last(prompt)] for z, prompt in zip(features, prompts, strict=True)]
        return torch.cat(content) if content else features[:, 0]
