"""A pipeline under attack: one that forgot a concept, and what its attackers have besides."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from more_hf.core.files import replacing

from ...artists.grid import to_pil
from ...artists.prompts import PromptRow
from ..store import Result
from .studio import Studio


SHOWN = 8  # pictures that are kept from each attack


@dataclass(frozen=True)
class Victim:
    """A pipeline under attack."""

    pipe: StableDiffusionPipeline  # The erased pipeline. Attacks copy what they change.
    studio: Studio  # the original, its pictures, the prompts and the judges
    concept: str  # the forgotten concept
    other: str  # a concept of the same kind that was not forgotten
    seed: int = 0  # of the attack
    folder: Path | None = None  # for the first pictures of each attack; `None` keeps none

    @property
    def rows(self) -> list[PromptRow]:
        """The test prompts that name the concept."""
        return self.studio.tests(self.concept)

    @property
    def seeds(self) -> list[int]:
        """Their seeds."""
        return [row.evaluation_seed for row in self.rows]

    def prompts(self, name: str) -> list[str]:
        """The test prompts with another name in place of the concept's."""
        return [row.prompt.replace(self.concept, name) for row in self.rows]

    def own_denoiser(self) -> StableDiffusionPipeline:
        """A copy of the pipeline with a denoiser that an attack may change."""
        pipe = copy.copy(self.pipe)
        pipe.register_modules(unet=copy.deepcopy(self.pipe.unet))
        return pipe

    def drawn(
        self, pipe: StableDiffusionPipeline, texts: Sequence[str] | Tensor, attack: str, **facts: Any
    ) -> Result:
        """Draw the test pictures and count those that show the concept; other arguments as in `judged`."""
        return self.judged(self.studio.draw(pipe, texts, self.seeds), attack, **facts)

    def judged(self, images: Tensor, attack: str, **facts: Any) -> Result:
        """
        The percentage of pictures, uint8 `(n, 3, H, W)`, one for each test prompt, that show the concept. The
        attack's name is for the file with its first pictures; the facts are the other fields of the result.
        """
        hits = self.studio.shows(images, self.rows, self.concept)
        return self.counted(hits, images, attack, **facts)

    def counted(self, hits: Sequence[bool], images: Tensor, attack: str, **facts: Any) -> Result:
        """The percentage of hits; the first pictures go to a file."""
        if self.folder is not None:
            strip = torch.cat(list(images[:SHOWN]), dim=2)
            words = [attack, facts.get("variant", ""), f"{facts.get('budget', 0):g}"]
            with replacing(self.folder / f"{'_'.join(filter(None, words))}.png") as draft:
                to_pil(strip).save(draft, "png")
        return Result.of_hits(sum(hits), len(hits), **facts)


class BestPictures:
    """
    The best picture of each test prompt over several tries: the first in which the judges see the concept.
    """

    def __init__(self, victim: Victim):
        self.victim = victim
        self.hits = [False] * len(victim.rows)
        self.images: Tensor | None = None  # the first try's until there is a hit

    def add(self, images: Tensor) -> None:
        """Add a try: one picture for each test prompt, uint8 `(n, 3, H, W)`."""
        if self.images is None:
            self.images = images.clone()
        victim = self.victim
        for i, hit in enumerate(victim.studio.shows(images, victim.rows, victim.concept)):
            if hit and not self.hits[i]:
                self.hits[i], self.images[i] = True, images[i]

    def counted(self, attack: str, **facts: Any) -> Result:
        """See `Victim.counted`."""
        return self.victim.counted(self.hits, self.images, attack, **facts)
