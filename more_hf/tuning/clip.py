"""CLIP as a second judge: zero-shot, by weights of open_clip that are at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ..core.errors import MoreError
from ..core.request import CLIP


MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, which most models use
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class JudgeError(MoreError, ValueError):
    """A judge does not know a name it is asked about, or its model cannot be loaded."""


class Clip:
    """
    An open_clip model that compares pictures with sentences: it has `encode_image`, `encode_text` and
    `visual.image_size`. The pixels that it was trained on have a mean and deviation, by default OpenAI's.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        mean: Sequence[float] = MEAN,
        deviation: Sequence[float] = DEVIATION,
        name: str = "CLIP",
        device: torch.device | str = "cpu",
    ):
        self.model = model.to(device).eval().requires_grad_(False)
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.deviation = torch.tensor(deviation, device=device).view(3, 1, 1)
        self.tokenizer, self.device, self.name = tokenizer, torch.device(device), name

    @classmethod
    def load(
        cls,
        *more: object,
        model: str = CLIP[0],
        pretrained: str = CLIP[1],
        device: torch.device | str = "cpu",
    ) -> Self:
        """
        Build from open_clip's names for an architecture and its weights, which are downloaded unless cached;
        `more` goes to a subclass.

        Raises:
            `JudgeError`: open_clip does not know the model or cannot get its weights.
        """
        import open_clip

        # A name alone builds GELU, also where the weights (OpenAI's) were trained with QuickGELU.
        quick = open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False)
        try:
            clip = open_clip.create_model(model, pretrained=pretrained, force_quick_gelu=quick)
        except (RuntimeError, OSError) as error:
            raise JudgeError(
                f"No CLIP judge {model} {pretrained}: {error} Name another model, or run without it."
            ) from error
        pixels = {"mean": clip.visual.image_mean, "deviation": clip.visual.image_std}
        named = {"name": f"CLIP {model} {pretrained}", "device": device}
        return cls(clip, open_clip.get_tokenizer(model), *more, **pixels, **named)

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Unit vectors of sentences: `(n, d)`."""
        tokens = self.tokenizer(list(sentences)).to(self.device)
        return normalize(self.model.encode_text(tokens).float(), dim=1)

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """Unit vectors of uint8 pictures `(n, 3, H, W)`: `(n, d)`."""
        side = self.model.visual.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        x = pictures.to(self.device).float() / 255
        x = interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return normalize(self.model.encode_image((x - self.mean) / self.deviation).float(), dim=1)
