"""
The proof by run: call the real model before and after an edit, and let its outputs decide whether it holds.
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
    Measure the original now, and return a function that measures the edited model and compares the two.

    On a feature z, the edited model must give what the original gives on E z. For an exact edit, that is what
    the original gives on the target.

    Args:
        run (`Callable`):
            Returns the model's flattened outputs `(trials, ...)`. Called with `True` before the edit, it
            returns three: on features z that hold forget prototypes, on E z, and on E z' for z' with the
            targets in their place. Called with `False` after the edit, it returns two: on z and on z'.
        current (`Erasure`, *optional*):
            An earlier erasure of the model, which is switched off while the original is measured.
        tolerance (`float`):
            The largest error, as a share of the distance between the original's outputs on z and E z.
        cause (`str`):
            For the error message: what else may decide the output, and what to do.

    Returns:
        `Callable`: returns `forget_vs_target` and `target_changed` (0 for a correct edit), `forget_changed`
        (1 for a correct edit) and the `tolerance`; raises `SiteNotFoundError` beyond the tolerance.
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
        # every comparison is written so that a NaN fails
        gone = proof["forget_vs_target"] < tolerance and proof["target_changed"] < tolerance
        if not (gone and proof["forget_changed"] > 0.5):
            measured = ", ".join(f"{key} {value:.2g}" for key, value in proof.items())
            raise SiteNotFoundError(f"The proof by run failed ({measured}): {cause}")
        return proof

    return prove
