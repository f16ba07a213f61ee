"""`find_aliases`: which of some words and descriptions the text encoder reads as a concept's name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..core.errors import PrototypeError
from ..core.prototypes import Prototypes
from ..core.request import read_names
from .encoder import column, fit_prototypes, kinds_of
from .sites import find_denoiser, text_of


TOKENS = "last+end"  # where a prompt has been read as far as its name, and whole


def find_aliases(
    pipe: DiffusionPipeline,
    concept: str,
    candidates: Sequence[str],
    *,
    others: Sequence[str],
    least: float = 0.5,
) -> list[str]:
    """
    Find the candidates that the text encoder reads as a concept: misspellings, other names, descriptions. In
    closed form, without a picture; the pipeline is not modified.

    With the prototypes P of the concept, of other names, of the begin token and of the empty prompt, and
    their dual D = P⁺, the coordinates D c of a candidate's prototype c say how much of each is in it. It is
    an alias if the concept's coordinate is the largest and at least `least`.

    Args:
        pipe (`DiffusionPipeline`):
            A pipeline whose text encoder knows the concept.
        concept (`str`):
            Its name.
        candidates (`Sequence[str]`):
            What to choose from, such as a list of descriptions, or of all words of one's captions.
        others (`Sequence[str]`):
            What the concept is told from, at least one name: the other artists, or other things of its kind.
            A candidate that describes one of them is no alias.
        least (`float`, *optional*, defaults to 0.5):
            The smallest coordinate of an alias; the concept's own name has 1, a prompt that has nothing to do
            with it about as much as with each of the others.

    Returns:
        `list[str]`: the aliases, nearest first; without the concept's own name.

    Raises:
        `PrototypeError`: there are no other names, or a name or candidate has no tokens or too many.
        `SiteNotFoundError`: the pipeline's way to encode prompts is not known.

    Example:

        >>> import more_hf
        >>> pipe = more_hf.load_emoji_sd()
        >>> said = ["plump crooked lumps", "blobmojy", "a rainy day"]
        >>> found = more_hf.find_aliases(pipe, "Blobmoji", said, others=["Noto", "Fluent", "Twemoji"])
        >>> pipe = more_hf.erase_concept(pipe, {"Blobmoji": found}, remap_to="Noto")
    """
    told_from = [name for name in dict.fromkeys(read_names("others", others)) if name != concept]
    if not told_from:
        raise PrototypeError(
            f"`others` names nothing but {concept!r} itself, so that there is nothing to tell it from. Name "
            "other concepts of its kind."
        )
    own = concept.casefold()
    said = [name for name in dict.fromkeys(read_names("candidates", candidates)) if name.casefold() != own]
    if not said:
        return []

    names = [concept, *told_from]
    prototypes = fit_prototypes(pipe, [*names, *said], TOKENS, sigma_prompts={})["tokens"]
    kinds = kinds_of(text_of(pipe, find_denoiser(pipe)), TOKENS)["tokens"]
    of_names = {column(name, kind) for name in (*names, *said) for kind in kinds}
    constants = [name for name in prototypes.names if name not in of_names]

    # Of each kind of position its own dual; a candidate's coordinates are their mean over the kinds.
    coordinates = torch.zeros(len(names), len(said), dtype=torch.float64)
    for kind in kinds:
        P = _matrix(prototypes, [*(column(name, kind) for name in names), *constants])
        C = _matrix(prototypes, [column(name, kind) for name in said])
        coordinates += (torch.linalg.pinv(P) @ C)[: len(names)] / len(kinds)

    most, nearest = coordinates.max(0)
    order = most.argsort(descending=True).tolist()
    return [said[j] for j in order if nearest[j] == 0 and most[j] >= least]


def _matrix(prototypes: Prototypes, names: Sequence[str]) -> Tensor:
    """Prototypes as columns, `(d, len(names))`."""
    return torch.stack([prototypes[name] for name in names], dim=1)
