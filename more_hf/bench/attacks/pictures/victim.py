"""A pipeline that forgot a concept, and what its attackers have beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ....core.files import replacing
from ...artists.grid import to_pil
from ...artists.prompts import PromptRow
from ..result import Result
from .studio import Studio


SHOWN = 8  # pictures that are kept of each attack


@dataclass(frozen=True)
class Victim:
    """A pipeline under attack.

    Attributes:
        pipe (`StableDiffusionPipeline`): erased; attacks work on copies of what they change.
        studio (`Studio`): the original, its pictures, the prompts and the judges.
        concept (`str`): what was forgotten.
        other (`str`): a concept of the same kind that was not.
        seed (`int`): of the attack.
        folder (`Path`, *optional*): where the first pictures of each attack go; `None` keeps none.
    """

    pipe: StableDiffusionPipeline
    studio: Studio
    concept: str
    other: str
    seed: int = 0
    folder: Path | None = None

    @property
    def rows(self) -> list[PromptRow]:
        """The test prompts that name the concept."""
        return self.studio.tests(self.concept)

    @property
    def seeds(self) -> list[int]:
        """Their seeds."""
        return [row.evaluation_seed for row in self.rows]

    def prompts(self, name: str) -> list[str]:
        """The test prompts with a name in the place of the concept's."""
        return [row.prompt.replace(self.concept, name) for row in self.rows]

    def own_denoiser(self) -> StableDiffusionPipeline:
        """The pipeline with a denoiser that an attack may change."""
        pipe = copy.copy(self.pipe)
        pipe.register_modules(unet=copy.deepcopy(self.pipe.unet))
        return pipe

    def drawn(
        self, pipe: StableDiffusionPipeline, texts: Sequence[str] | Tensor, attack: str, **facts: Any
    ) -> Result:
        """Draw the test pictures and count those that show the concept; other arguments as in `judged`."""
        return self.judged(self.studio.draw(pipe, texts, self.seeds), attack, **facts)

    def judged(self, images: Tensor, attack: str, **facts: Any) -> Result:
        """The percent of pictures, one of each test prompt, that show the concept.

        Args:
            images (`Tensor`): uint8 `(n, 3, H, W)`.
            attack (`str`): the attack's name, for the file of its first pictures.
            facts: the other fields of the result.
        """
        hits = self.studio.shows(images, self.rows, self.concept)
        return self.counted(hits, images, attack, **facts)

    def counted(self, hits: Sequence[bool], images: Tensor, attack: str, **facts: Any) -> Result:
        """The percent of hits, and the pictures of the first of them in a file."""
        if self.folder is not None:
            strip = torch.cat(list(images[:SHOWN]), dim=2)
            words = [attack, facts.get("variant", ""), f"{facts.get('budget', 0):g}"]
            with replacing(self.folder / f"{'_'.join(filter(None, words))}.png") as draft:
                to_pil(strip).save(draft, "png")
        return Result.of_hits(sum(hits), len(hits), **facts)
