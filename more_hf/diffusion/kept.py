"""What text encoders made of prompts, kept on the disk, so that they need not be loaded for them again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..core.files import replacing, write_text
from .quantized import precision_of
from .text import tokenizer_in


if TYPE_CHECKING:
    from .encoder import Encoder

logger = logging.getLogger(__name__)

CACHE = Path(constants.HF_HOME) / "more_hf"
SAMPLED = 4096  # values of each tensor that tell one text encoder from another
HELD = "mean"  # what the files of moments hold; earlier ones held sums
ALL = 10**9  # more positions than any prompt has


class KeptFeatures:
    """
    The features of prompts by text encoders that are loaded when a prompt comes that they have not read yet.

    They are in the folder `more_hf` in `HF_HOME`, a file for each prompt. It may be deleted at any time, and
    other weights, settings or prompts have other names, so a stale file is never read. `source` tells these
    text encoders, their configurations and precision included, from others; `load` returns them, by
    component, to run on the device.
    """

    def __init__(self, source: str, load: Callable[[], Mapping[str, nn.Module]], device: torch.device):
        self.source, self.device = source, device
        self.precisions: dict[str, str] = {}  # see the function below; known once a feature is
        self._load: Callable[[], Mapping[str, nn.Module]] | None = load
        self._folder: Path | None = None

    def load_into(self, pipe: DiffusionPipeline) -> None:
        """Put the text encoders into the pipeline, where their stand-ins are."""
        if self._load is not None:
            logger.info("Loading the text encoders")
            pipe.register_modules(**self._load())
            self._load, self.precisions = None, precisions_of(pipe)

    def features(
        self, encoder: Encoder, prompts: Sequence[str], wanted: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """What `encoder.run` gives: from the disk, or by a run if one of the prompts is new."""
        needed = wanted if wanted is not None and encoder.causal else [ALL] * len(prompts)
        found = [self._read(encoder, *asked) for asked in zip(prompts, needed, strict=True)]
        if None not in found:
            # prompts of different runs can be padded to different lengths
            return {space: pad_sequence([one[space] for one in found], True) for space in encoder.spaces}
        # All of them run together, because how many do makes a difference in rounding.
        computed = encoder.run(prompts, wanted)
        for row, features in enumerate(found):
            if features is None:
                own = {space: values[row] for space, values in computed.items()}
                self._write(encoder, prompts[row], needed[row], own)
        return computed

    def weights(self, encoder: Encoder) -> str | None:
        """The `weights_of` the text encoders, which are loaded for it once."""
        path = self._place(encoder) / "weights"
        try:
            return path.read_text("utf-8")
        except OSError:
            self.load_into(encoder.pipe)
        found = weights_of(_text_encoders(encoder.pipe))
        if found is not None:
            with suppress(OSError):
                write_text(path, found)
        return found

    def _place(self, encoder: Encoder) -> Path:
        if self._folder is None:
            self._folder = CACHE / _sha256([*_settings(encoder), self.source])
        return self._folder

    def _path(self, encoder: Encoder, prompt: str) -> Path:
        return self._place(encoder) / f"{_sha256(prompt)}.safetensors"

    def _read(self, encoder: Encoder, prompt: str, needed: int) -> dict[str, Tensor] | None:
        try:
            with safe_open(self._path(encoder, prompt), "pt") as file:
                about = file.metadata()
                if int(about["positions"]) < needed:
                    return None
                self.precisions = json.loads(about["precisions"])
                return {space: file.get_tensor(space).to(self.device) for space in encoder.spaces}
        except (OSError, SafetensorError):  # nobody asked before, or the file is damaged
            return None

    def _write(self, encoder: Encoder, prompt: str, needed: int, features: Mapping[str, Tensor]) -> None:
        about = {"positions": str(needed), "precisions": json.dumps(self.precisions)}
        own = {space: values.cpu().contiguous() for space, values in features.items()}
        try:
            with replacing(self._path(encoder, prompt)) as draft:
                save_file(own, draft, about)
        except (OSError, SafetensorError) as error:
            logger.warning("The text encoders will be loaded for %r again next time: %s", prompt, error)


def _text_encoders(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    parts = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    return {name: unwrap_module(part) for name, part in parts.items()}


def precisions_of(pipe: DiffusionPipeline) -> dict[str, str]:
    """The precision of each text encoder, and how it is quantized."""
    return {name: precision_of(part) for name, part in _text_encoders(pipe).items()}


def key_of(encoder: Encoder, prompts: Sequence[str]) -> str | None:
    """What the features of prompts depend on, as a sha256; `None` where it cannot be told."""
    kept = encoder.kept
    weights = weights_of(_text_encoders(encoder.pipe)) if kept is None else kept.weights(encoder)
    norms = weights_of(encoder.norms)
    if weights is None or norms is None:
        return None
    return _sha256([*_settings(encoder), *prompts, weights, norms])


def _settings(encoder: Encoder) -> list[Any]:
    """What the features of a prompt depend on besides weights."""
    pipe = encoder.pipe
    facts = [HELD, type(pipe).__name__, diffusers.__version__, transformers.__version__]
    for segment in encoder.text.segments:
        facts.append(segment.length(pipe))  # a longer prompt has more padding
        facts += [] if segment.template is None else segment.template(pipe)
        facts += segment.spaces if segment.layers else []
    for name, part in pipe.components.items():
        if name.startswith("tokenizer"):
            part = tokenizer_in(part)
            facts += [name, part.model_max_length, sorted(part.get_vocab().items())]
    return facts


def weights_of(modules: Mapping[str, nn.Module]) -> str | None:
    """
    A sha256 of the modules' weights and configurations. `None` where it cannot be told: weights that are
    elsewhere, or a LoRA, whose strength is no weight.
    """
    digest = hashlib.sha256()
    for name, module in modules.items():
        if hasattr(module, "config"):
            digest.update(module.config.to_json_string().encode())
        # its strength can change without any weight changing
        if getattr(module, "peft_config", None):
            return None
        for key, tensor in module.state_dict().items():
            if tensor.is_meta:
                return None
            flat = tensor.detach().flatten()
            # Evenly spaced values tell encoders apart, and hashing all would take seconds.
            sample = flat[:: max(1, len(flat) // SAMPLED)].double().cpu()
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
