"""Σ, the second moment of ordinary text; that of everyday prompts is computed once for each text encoder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.files import replacing
from ..core.moment import Moment
from ..core.prototypes import Prototypes
from ..core.request import ConceptRequest, names_in
from . import kept
from .encoder import Encoder, fit_prototypes
from .kept import key_of
from .prompts import everyday_prompts


logger = logging.getLogger(__name__)

LARGEST = 2**27  # values of moments that are kept: a file of a gigabyte


def with_ordinary_moment(
    prototypes: Mapping[str, Prototypes], encoder: Encoder, request: ConceptRequest
) -> dict[str, Prototypes]:
    """
    The prototypes of each space with Σ: the moment of everyday prompts, less that of those which hold a
    forgotten name, and with that of retained names' prompts, which the prototypes bring along.
    """
    everyday = request.everyday or everyday_prompts(encoder.pipe.tokenizer)
    left_out = holding(everyday, request.surfaces)
    staying = [prompt for prompt in everyday if prompt not in set(left_out)]
    # Encode the smaller part: the moment of all prompts is cached, and a moment can be subtracted.
    if len(left_out) < len(staying):
        moments = everyday_moments(encoder, everyday)
        if left_out:
            less = compute_moments(encoder, left_out)
            moments = {space: moment - less[space] for space, moment in moments.items()}
    else:
        moments = compute_moments(encoder, staying)
    found = {}
    for space, own in prototypes.items():
        moment = moments[space] if own.moment is None else moments[space] + own.moment
        found[space] = own.with_moment(moment)
    return found


def holding(prompts: Iterable[str], names: Iterable[str]) -> list[str]:
    """The prompts that hold one of the names."""
    return [prompt for prompt in prompts if any(names_in(prompt, name) for name in names)]


def everyday_moments(encoder: Encoder, prompts: Sequence[str]) -> dict[str, Moment]:
    """
    The moment of prompts in each space: from the cache, if the same text encoders have seen the same prompts.

    The cache is the folder `more_hf` in `HF_HOME`. It may be deleted at any time.
    """
    # Different weights or prompts have another key, so a stale file is never read.
    key = key_of(encoder, prompts)
    if key is None:
        return compute_moments(encoder, prompts, keep=False)
    path = kept.CACHE / f"{key}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            return {space: Moment(file.get_tensor(space), int(n)) for space, n in file.metadata().items()}
    except (OSError, SafetensorError):  # nobody asked before, or the file is damaged
        logger.info("Everyday prompts go through the text encoder, once: %s is not there yet", path)
    moments = compute_moments(encoder, prompts, keep=False)
    tensors = {space: moment.matrix for space, moment in moments.items()}
    if sum(map(Tensor.numel, tensors.values())) <= LARGEST:
        try:
            with replacing(path) as draft:
                save_file(tensors, draft, {space: str(moment.count) for space, moment in moments.items()})
        except (OSError, SafetensorError) as error:
            logger.warning("Everyday prompts will go through the text encoder again next time: %s", error)
    return moments


def compute_moments(encoder: Encoder, prompts: Sequence[str], *, keep: bool = True) -> dict[str, Moment]:
    """
    The moment of prompts in each space; every token but begin tokens counts. See `fit_prototypes` for `keep`.
    """
    everyday = dict.fromkeys(prompts, 1)
    found = fit_prototypes(encoder, (), "last", sigma_prompts=everyday, keep=keep)
    return {space: prototypes.moment for space, prototypes in found.items()}


def encode_ahead(encoder: Encoder, request: ConceptRequest, names: Sequence[str]) -> None:
    """Keep on the disk what text encoders make of names, for later requests about them."""
    if not names:
        return
    everyday = request.everyday or everyday_prompts(encoder.pipe.tokenizer)
    prompts = encoder.prompts_of(names) | dict.fromkeys([*names, *holding(everyday, names)], 1)
    fit_prototypes(encoder, names, request.tokens, sigma_prompts=prompts)
