"""All attacks, one line each.

Importing this module imports neither torch nor diffusers; `Attack.load` imports the attack's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from .result import Result


Kind = Literal["classes", "pictures"]


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name (`str`): what the command line and the tables call it.
        place (`str`): `"module:function"` in this package. The function takes a victim, an erased model with
            what the attacker has beside it, and settings that all have defaults; it yields `Result`s.
        of (`str`): the victims: classifiers, which forgot `"classes"`, or pipelines, which draw `"pictures"`.
        access (`str`): what the attacker needs, in the words of the tables.
        on_request (`bool`): whether it trains so much that it is run only where it is named.
    """

    name: str
    place: str
    of: Kind
    access: str
    on_request: bool = False

    def load(self) -> Callable[..., Iterator[Result]]:
        """Import the function."""
        module, function = self.place.split(":")
        return getattr(import_module(module, __package__), function)

    def run(self, victim: Any, **settings: Any) -> list[Result]:
        """Attack a victim."""
        return list(self.load()(victim, **settings))


_PICTURES = (
    Attack("name", ".pictures.name:name", of="pictures", access="prompts"),
    Attack("noise", ".pictures.noise:noise", of="pictures", access="prompts, the sampler, a judge"),
    Attack("closed-form", ".pictures.closed_form:closed_form", of="pictures", access="weights, the base's"),
    Attack("base", ".pictures.base:base", of="pictures", access="weights, the base's"),
    Attack("ring-a-bell", ".pictures.ring_a_bell:ring_a_bell", of="pictures", access="the text encoder"),
    Attack("latent", ".pictures.latent:latent", of="pictures", access="weights, pictures"),
    Attack("inversion", ".pictures.inversion:inversion", of="pictures", access="weights, pictures"),
    Attack("relearning", ".pictures.relearning:relearning", of="pictures", access="weights, pictures"),
    Attack(
        "prompt-search",
        ".pictures.prompt_search:prompt_search",
        of="pictures",
        access="weights, the base's, pictures",
    ),
)
_ATTACKS = (
    Attack("probes", ".classes.probes:probes", of="classes", access="features, labelled images"),
    Attack("queries", ".classes.queries:queries", of="classes", access="several answers to one image"),
    Attack("jitter", ".classes.queries:jitter", of="classes", access="answers to shifted images"),
    Attack("shots", ".classes.shots:shots", of="classes", access="features, a few forgotten images"),
    Attack(
        "fine-tuning", ".classes.shots:fine_tuning", of="classes", access="weights, a few forgotten images"
    ),
    Attack("layers", ".classes.layers:layers", of="classes", access="weights, labelled images"),
    Attack("ridge", ".classes.layers:ridge", of="classes", access="the original, remaining images"),
    Attack("similarity", ".classes.similarity:similarity", of="classes", access="features, Retrain"),
    Attack(
        "membership",
        ".classes.membership:membership",
        of="classes",
        access="logits, shadow models",
        on_request=True,
    ),
    *_PICTURES,
)

ATTACKS: dict[str, Attack] = {attack.name: attack for attack in _ATTACKS}
"""Name to attack, in the order of the tables."""


def attacks_of(kind: Kind) -> dict[str, Attack]:
    """The attacks on classifiers, or those on pipelines."""
    return {name: attack for name, attack in ATTACKS.items() if attack.of == kind}
