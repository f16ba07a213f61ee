"""The names of one erasure in their roles, and the pipelines that a method can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline, StableDiffusionPipeline

from more_hf.core.errors import SiteNotFoundError
from more_hf.core.request import ConceptRequest
from more_hf.diffusion.plan import check_names
from more_hf.diffusion.prompts import everyday_prompts, names_in


Concepts = str | Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Roles:
    """Names in their roles.

    Attributes:
        forget (`list[str]`): concepts and their aliases.
        targets (`list[str]`): what they are sent to.
        keep (`list[str]`): what must stay: the targets, then the retained names.
    """

    forget: list[str]
    targets: list[str]
    keep: list[str]


def name_roles(
    concepts: Concepts, remap_to: str | Sequence[str] | None, retain: Sequence[str] | None
) -> Roles:
    """Check the arguments exactly as `erase_concept` does. Raises `PrototypeError`."""
    request = ConceptRequest.of(concepts, remap_to=remap_to, retain=retain)
    check_names(request)
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


def require_stable_diffusion(pipe: DiffusionPipeline) -> None:
    """Raise `SiteNotFoundError` for another class of pipeline: the method makes this one's calls itself."""
    if not isinstance(pipe, StableDiffusionPipeline):
        raise SiteNotFoundError(
            "This method runs inside StableDiffusionPipeline (Stable Diffusion 1.x and 2.x), and "
            f"{type(pipe).__name__} makes other calls. Take such a pipeline (of a sister pipeline, "
            "`StableDiffusionPipeline.from_pipe(pipe)`), or `erase_concept`, which knows the other families."
        )
