"""All attacks, one line each, in the order of the tables.

Importing this module imports neither torch nor diffusers; `Attack.load` imports the attack's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from .store import Result


Kind = Literal["classes", "pictures"]


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        place (`str`): `"module:function"` in this package. The function takes a victim, an erased model with
            what the attacker has beside it, and settings that all have defaults; it yields `Result`s.
        access (`str`): what the attacker needs, in the words of the tables.
        on_request (`bool`): whether it is run only where it is named.
    """

    place: str
    access: str
    on_request: bool = False

    @property
    def of(self) -> Kind:
        """The victims: classifiers, which forgot classes, or pipelines, which draw pictures."""
        return "classes" if self.place.startswith("classes.") else "pictures"

    def load(self) -> Callable[..., Iterator[Result]]:
        """Import the function."""
        return resolve_name(f"{__package__}.{self.place}")

    def run(self, victim: Any, **settings: Any) -> list[Result]:
        """Attack a victim."""
        return list(self.load()(victim, **settings))


ATTACKS: dict[str, Attack] = {
    "probes": Attack("classes.features:probes", "features, labelled images"),
    "queries": Attack("classes.queries:queries", "several answers to one image"),
    "jitter": Attack("classes.queries:jitter", "answers to shifted images"),
    "shots": Attack("classes.shots:shots", "features, a few forgotten images"),
    "fine-tuning": Attack("classes.shots:fine_tuning", "weights, a few forgotten images"),
    "layers": Attack("classes.features:layers", "weights, labelled images"),
    "ridge": Attack("classes.features:ridge", "the original, remaining images"),
    "similarity": Attack("classes.features:similarity", "features, Retrain"),
    "membership": Attack("classes.membership:membership", "logits, shadow models", on_request=True),
    "name": Attack("pictures.prompts:name", "prompts"),
    "description": Attack("pictures.prompts:description", "prompts", on_request=True),
    "others": Attack("pictures.prompts:others", "nothing: what the others pay", on_request=True),
    "noise": Attack("pictures.sampling:noise", "prompts, the sampler, a judge"),
    "closed-form": Attack("pictures.weights:closed_form", "weights, the base's"),
    "base": Attack("pictures.weights:base", "weights, the base's"),
    "ring-a-bell": Attack("pictures.prompts:ring_a_bell", "the text encoder"),
    "latent": Attack("pictures.sampling:latent", "weights, pictures"),
    "text-free": Attack("pictures.wordless:text_free", "weights, pictures", on_request=True),
    "image-to-image": Attack("pictures.wordless:image_to_image", "pictures", on_request=True),
    "inpainting": Attack("pictures.wordless:inpainting", "pictures", on_request=True),
    "inversion": Attack("pictures.training:inversion", "weights, pictures"),
    "relearning": Attack("pictures.training:relearning", "weights, pictures"),
    "prompt-search": Attack("pictures.prompts:prompt_search", "weights, the base's, pictures"),
}


def attacks_of(kind: Kind) -> dict[str, Attack]:
    """The attacks on classifiers, or those on pipelines."""
    return {name: attack for name, attack in ATTACKS.items() if attack.of == kind}
