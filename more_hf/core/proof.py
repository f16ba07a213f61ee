"""
The proof by run: the real model is called before and after an edit, and its outputs decide whether the edit
stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import Tensor

from .erasure import Erasure
from .errors import SiteNotFoundError
from .views import original_shown


def proof_by_run(
    run: Callable[[bool], Sequence[Tensor]], current: Erasure | None, tolerance: float, cause: str
) -> Callable[[], dict[str, float]]:
    """
    Measure the original now, and return the function that measures the edited model and compares.

    The edited model must make of a feature z what the original makes of E z. For an exact edit that is what
    the original makes of the target.

    Args:
        run (`Callable`):
            Gives the outputs `(trials, ...)` of the model, flattened: before the edit (its argument is true)
            on features z that hold forget prototypes, on E z, and on E z of the same with their targets;
            after it on the first and on those with the targets.
        current (`Erasure`, *optional*):
            An earlier erasure of the model, which the measurement of the original leaves out.
        tolerance (`float`):
            What may be left, as a share of the distance between the original's two outputs.
        cause (`str`):
            For the error: what else may decide the output, and what to do.

    Returns:
        `Callable`: gives `forget_vs_target` and `target_changed` (0 for a correct edit), `forget_changed` (1)
        and the `tolerance`, and raises `SiteNotFoundError` if they are not within the tolerance.
    """
    with nullcontext() if current is None else original_shown(current):
        source, moved, target = run(True)
    apart = (source - moved).norm(dim=1)

    def prove() -> dict[str, float]:
        new_source, new_target = run(False)
        proof = {
            "forget_vs_target": float(((new_source - moved).norm(dim=1) / apart).max()),
            "target_changed": float(((new_target - target).norm(dim=1) / apart).max()),
            "forget_changed": float(((new_source - source).norm(dim=1) / apart).min()),
            "tolerance": tolerance,
        }
        # written so that a NaN fails
        gone = proof["forget_vs_target"] < tolerance and proof["target_changed"] < tolerance
        if not (gone and proof["forget_changed"] > 0.5):
            measured = ", ".join(f"{key} {value:.2g}" for key, value in proof.items())
            raise SiteNotFoundError(f"The proof by run failed ({measured}): {cause}")
        return proof

    return prove
