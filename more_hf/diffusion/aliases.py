"""`find_aliases`: find the words and descriptions that the text encoder reads as a concept's name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..core.errors import PrototypeError
from ..core.prototypes import Prototypes
from ..core.request import read_names
from .encoder import Encoder, column, fit_prototypes, kinds_of


TOKENS = "last+end"  # the positions at which the name has been read, and the whole prompt


def find_aliases(
    pipe: DiffusionPipeline,
    concept: str,
    candidates: Sequence[str],
    *,
    others: Sequence[str],
    least: float = 0.5,
) -> list[str]:
    """
    Find the candidates that the text encoder reads as a concept: misspellings, other names, descriptions.
    This works in closed form, without drawing a picture; the pipeline is not modified.

    P holds the prototypes of the concept, of other names, of the begin token and of the empty prompt; D = P⁺
    is its dual. The coordinates D c of a candidate's prototype c say how much of each is in it. The candidate
    is an alias if the concept's coordinate is the largest and at least `least`.

    Args:
        pipe (`DiffusionPipeline`):
            A pipeline whose text encoder knows the concept.
        concept (`str`):
            The concept's name.
        candidates (`Sequence[str]`):
            Words or descriptions to choose from, for example all words of your captions.
        others (`Sequence[str]`):
            At least one other concept of the same kind, such as the other artists. A candidate that describes
            one of them is not an alias.
        least (`float`, *optional*, defaults to 0.5):
            The smallest coordinate of an alias. The concept's own name has 1; an unrelated prompt has about
            the same coordinate for every name.

    Returns:
        `list[str]`: the aliases, nearest first; without the concept's own name.

    Raises:
        `PrototypeError`: there are no other names, or a name or candidate has no tokens or too many.
        `SiteNotFoundError`: the way this pipeline encodes prompts is unknown.

    Example:

        >>> import more_hf
        >>> pipe = more_hf.load_emoji_sd()
        >>> candidates = ["plump crooked lumps", "blobmojy", "a rainy day"]
        >>> aliases = more_hf.find_aliases(pipe, "Blobmoji", candidates, others=["Noto", "Fluent", "Twemoji"])
        >>> pipe = more_hf.erase_concept(pipe, {"Blobmoji": aliases}, remap_to="Noto")
    """
    others = [name for name in dict.fromkeys(read_names("others", others)) if name != concept]
    if not others:
        raise PrototypeError(
            f"`others` names nothing but {concept!r} itself, so there is nothing to distinguish it from. "
            "Name other concepts of its kind."
        )
    # the name itself is no alias of it
    own, candidates = concept.casefold(), dict.fromkeys(read_names("candidates", candidates))
    candidates = [name for name in candidates if name.casefold() != own]
    if not candidates:
        return []

    # 1. The prototypes of all names and candidates, and the constant ones of begin token and empty prompt.
    names = [concept, *others]
    encoder = Encoder(pipe)
    prototypes = fit_prototypes(encoder, [*names, *candidates], TOKENS, sigma_prompts={})["tokens"]
    kinds = kinds_of(encoder.text, TOKENS, pooled=False)["tokens"]
    named = {column(name, kind) for name in (*names, *candidates) for kind in kinds}
    constants = [name for name in prototypes.names if name not in named]

    # 2. Each kind of position has a dual of its own; a candidate's coordinates are the mean over the kinds.
    coordinates = torch.zeros(len(names), len(candidates), dtype=torch.float64)
    for kind in kinds:
        P = _matrix(prototypes, [*(column(name, kind) for name in names), *constants])
        C = _matrix(prototypes, [column(name, kind) for name in candidates])
        coordinates += (torch.linalg.pinv(P) @ C)[: len(names)] / len(kinds)

    # 3. An alias has more of the concept, row 0, than of any other name.
    largest, nearest = coordinates.max(0)
    order = largest.argsort(descending=True).tolist()
    return [candidates[j] for j in order if nearest[j] == 0 and largest[j] >= least]


def _matrix(prototypes: Prototypes, names: Sequence[str]) -> Tensor:
    """Prototypes as columns, `(d, len(names))`."""
    return torch.stack([prototypes[name] for name in names], dim=1)
