"""Σ, the second moment of ordinary text; that of everyday prompts is computed once for each text encoder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import transformers
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.files import replacing
from ..core.moment import Moment
from ..core.prototypes import Prototypes
from ..core.request import ConceptRequest, names_in
from .encoder import Encoder, fit_prototypes
from .prompts import everyday_prompts
from .text import tokenizer_in


logger = logging.getLogger(__name__)

CACHE = Path(constants.HF_HOME) / "more_hf"
SAMPLED = 4096  # values of each tensor that tell one text encoder from another
HELD = "mean"  # what the files hold; earlier ones held sums
LARGEST = 2**27  # values of moments that are kept: a file of a gigabyte


def with_ordinary_moment(
    prototypes: Mapping[str, Prototypes], encoder: Encoder, request: ConceptRequest
) -> dict[str, Prototypes]:
    """
    The prototypes of each space with Σ: the moment of everyday prompts, less that of those which hold a
    forgotten name, and with that of retained names' prompts, which the prototypes bring along.
    """
    everyday = request.everyday or everyday_prompts(encoder.pipe.tokenizer)
    kept = [prompt for prompt in everyday if not any(names_in(prompt, name) for name in request.surfaces)]
    left_out = [prompt for prompt in everyday if prompt not in set(kept)]
    # Encode the smaller part: the moment of all prompts is cached, and a moment can be subtracted.
    if len(left_out) < len(kept):
        moments = everyday_moments(encoder, everyday)
        if left_out:
            less = compute_moments(encoder, left_out)
            moments = {space: moment - less[space] for space, moment in moments.items()}
    else:
        moments = compute_moments(encoder, kept)
    found = {}
    for space, own in prototypes.items():
        moment = moments[space] if own.moment is None else moments[space] + own.moment
        found[space] = own.with_moment(moment)
    return found


def everyday_moments(encoder: Encoder, prompts: Sequence[str]) -> dict[str, Moment]:
    """
    The moment of prompts in each space: from the cache, if the same text encoders have seen the same prompts.

    The cache is the folder `more_hf` in `HF_HOME`. It may be deleted at any time.
    """
    # Different weights or prompts have another key, so a stale file is never read.
    key = _key(encoder, prompts)
    if key is None:
        return compute_moments(encoder, prompts)
    path = CACHE / f"{key}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            return {space: Moment(file.get_tensor(space), int(n)) for space, n in file.metadata().items()}
    except (OSError, SafetensorError):  # nobody asked before, or the file is damaged
        logger.info("Everyday prompts go through the text encoder, once: %s is not there yet", path)
    moments = compute_moments(encoder, prompts)
    tensors = {space: moment.matrix for space, moment in moments.items()}
    if sum(map(Tensor.numel, tensors.values())) <= LARGEST:
        try:
            with replacing(path) as draft:
                save_file(tensors, draft, {space: str(moment.count) for space, moment in moments.items()})
        except OSError as error:
            logger.warning("Everyday prompts will go through the text encoder again next time: %s", error)
    return moments


def compute_moments(encoder: Encoder, prompts: Sequence[str]) -> dict[str, Moment]:
    """The moment of prompts in each space; every token but begin tokens counts."""
    everyday = dict.fromkeys(prompts, 1)
    found = fit_prototypes(encoder, (), "last", sigma_prompts=everyday)
    return {space: prototypes.moment for space, prototypes in found.items()}


def _key(encoder: Encoder, prompts: Sequence[str]) -> str | None:
    """
    What the features of prompts depend on, as a sha256; `None` where it cannot be told: weights that are
    elsewhere, or a LoRA on a text encoder, whose strength is no weight.
    """
    pipe, digest = encoder.pipe, hashlib.sha256()
    facts = [HELD, type(pipe).__name__, diffusers.__version__, transformers.__version__, *prompts]
    modules = dict(encoder.norms)
    for segment in encoder.text.segments:
        facts.append(segment.length(pipe))  # a longer prompt has more padding
        facts += [] if segment.template is None else segment.template(pipe)
        facts += segment.spaces if segment.layers else []
    for name, part in pipe.components.items():
        if name.startswith("tokenizer"):
            part = tokenizer_in(part)
            facts += [name, part.model_max_length, sorted(part.get_vocab().items())]
        elif name.startswith("text_encoder"):
            modules[name] = unwrap_module(part)
            facts += [name, modules[name].config.to_json_string()]
            # its strength can change without any weight changing
            if getattr(modules[name], "peft_config", None):
                return None
    digest.update(json.dumps(facts).encode())
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            if tensor.is_meta:
                return None
            flat = tensor.detach().flatten()
            # Evenly spaced values tell encoders apart, and hashing all would take seconds.
            sample = flat[:: max(1, len(flat) // SAMPLED)].double().cpu()
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
