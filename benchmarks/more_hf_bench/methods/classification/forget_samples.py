"""Forget single samples of all classes (MoRE, section 4.3).

A class's mean over the forgotten samples is sent to its mean over the others, and the edit is absorbed into
the head's weight. Algorithm 3, which has another last term, is `as_printed`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from more_hf.classification.features import collect, plain_model
from more_hf.classification.heads import evaluating
from more_hf.core.errors import AlreadyErasedError, PrototypeError, SiteNotFoundError
from more_hf.core.interrupts import unless_completed
from more_hf.core.prototypes import Prototypes
from more_hf.core.registry import find_erasure
from more_hf.core.site import Site, check_unshared


# How much of the way from the forgotten means to the others may drown in the rounding of the head's weight.
DROWNED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


@dataclass(frozen=True)
class SampleErasure:
    """
    What `forget_samples` did: E = I + shift · read, near the identity.

    Args:
        forget (`Prototypes`):
            P_f, the class means of the forgotten samples.
        remain (`Prototypes`):
            P_r, the class means of the others.
        shift (`Tensor`):
            `(d, r)`, float64: P_r − P_f with r = k; as printed [−P_f, P_r] with r = 2k.
        read (`Tensor`):
            `(r, d)`, float64: P_f⁺; as printed [P_f⁺; P_r⁺].
        facts (`dict[str, float]`):
            What `measure` measures, `weight_changed` (‖ΔW‖ / ‖W‖) and the proof by run, `proof`.
    """

    forget: Prototypes
    remain: Prototypes
    shift: Tensor
    read: Tensor
    facts: dict[str, float]
    _site: Site = field(repr=False)
    _original: Tensor = field(repr=False)

    def restore(self) -> None:
        """Put the head's original weight back, bit for bit. It is kept here, not with the model."""
        self._site.write(self._original)


def forget_samples(
    model: nn.Module,
    forget: Iterable[Any],
    remain: Iterable[Any],
    *,
    head: str | None = None,
    as_printed: bool = False,
) -> SampleErasure:
    """
    Make a classifier treat some of its training samples like the others of their classes, in place and in
    closed form.

    E = I + (P_r − P_f) P_f⁺, and the head's weight W becomes W E; no hook. Only E p_f = p_r is promised: the
    remain means are not in the dual, so E is no projection and E z still shows P_f⁺ z. As the two means of a
    class are close, E is close to the identity.

    Args:
        model (`nn.Module`):
            A classifier as in `erase_classes`.
        forget (`Iterable`):
            Batches of the forgotten samples as in `erase_classes`, some of every class.
        remain (`Iterable`):
            Batches of the other samples, some of every class.
        head (`str`, *optional*):
            Name of the head, where running the model does not find it.
        as_printed (`bool`, *optional*, defaults to `False`):
            Algorithm 3 to the letter, E = I − P_f P_f⁺ + P_r P_r⁺, for comparison. It sends p_f to its
            projection on the span of P_r, not to p_r.

    Returns:
        `SampleErasure`: factors and measurements, and `restore`.

    Raises:
        `PrototypeError`: a class has no sample on one side, or the forgotten means are linearly dependent.
        `AlreadyErasedError`: classes were erased from the model. `SiteNotFoundError`: there is not one head
        that can be edited, or the edit drowns in the rounding of its dtype. The model is unchanged then.
    """
    plain = plain_model(model)
    if find_erasure(plain) is not None:
        raise AlreadyErasedError(
            "Classes were erased from this model. Forget samples first, or `more_hf.restore` it."
        )

    # 1. The class means on both sides, and the head.
    heads, P_f = collect(plain, forget, head=head, at=None, second_moment=False)
    _, P_r = collect(plain, remain, head=head, at=None, second_moment=False)
    if len(heads) != 1:
        raise SiteNotFoundError(
            f"The edit is absorbed into one head, and this model has {', '.join(heads)}. Name one with "
            "`head`."
        )
    ((name, module),) = heads.items()
    site = Site(name, module)
    check_unshared({name: site}, plain)

    # 2. The edit, in float64.
    shift, read = factors(P_f.matrix, P_r.matrix, as_printed)
    weight = site.read()
    change = (weight.double() @ shift.to(weight.device)) @ read.to(weight.device)
    facts = measure(P_f.matrix, P_r.matrix, shift, read)
    facts["weight_changed"] = float(change.norm() / weight.double().norm())
    original = weight.to("cpu", copy=True)

    # 3. Written, and proved by a run: afterwards the head treats P_f as it treated E P_f before.
    expected = P_f.matrix + shift @ (read @ P_f.matrix)
    with evaluating(plain):
        source = _outputs(module, P_f.matrix, weight)
        target = _outputs(module, expected, weight)
        with unless_completed(partial(site.write, original)):
            site.write((original.to(weight.device).double() + change).to(weight.dtype))
            error = (_outputs(module, P_f.matrix, weight) - target).norm() / (source - target).norm()
            missed = float(error)
            if not missed < DROWNED[weight.dtype]:
                raise SiteNotFoundError(
                    f"`{name}` does not treat the forgotten means as the others after the edit (off by "
                    f"{missed:.2g} of their difference): the change, {facts['weight_changed']:.1e} of the "
                    f"weight, drowns in the rounding of {weight.dtype}, or something other than the weight "
                    "decides. The model is as it was. Use `model.float()`, and take adapters off the head."
                )
    return SampleErasure(P_f, P_r, shift, read, {**facts, "proof": missed}, site, original)


def factors(P_f: Tensor, P_r: Tensor, as_printed: bool) -> tuple[Tensor, Tensor]:
    """`shift` and `read` for class means `(d, k)`. Raises `PrototypeError` if P_f has dependent columns."""
    d, k = P_f.shape
    rank = int(torch.linalg.matrix_rank(P_f))
    if rank < k:
        raise PrototypeError(
            f"The {k} forgotten class means span {rank} of {d} dimensions: they are dependent and cannot be "
            f"sent to {k} others. Forget samples at a wider layer."
        )
    dual = torch.linalg.pinv(P_f)
    if as_printed:
        return torch.cat([-P_f, P_r], 1), torch.cat([dual, torch.linalg.pinv(P_r)])
    return P_r - P_f, dual


def measure(P_f: Tensor, P_r: Tensor, shift: Tensor, read: Tensor) -> dict[str, float]:
    """
    Measure what holds of E and what does not, as relative errors of the worst class.

    - `forget_to_remain`: ‖E p_f − p_r‖ / ‖p_f − p_r‖, about 1e-13; of order 1 as printed
    - `remain_moved`: ‖E p_r − p_r‖ / ‖p_r − p_f‖, of order 1: remain means are not fixed (G1 is for forget
      means alone)
    - `idempotent`: ‖E² − E‖ / ‖E − I‖, of order 1: no projection (G2 does not hold)
    - `nothing_left`: ‖P_f⁺ E‖ / ‖P_f⁺‖, of order 1: E z still shows the forgotten means (G3 does not hold)
    - `change`: ‖E − I‖ / ‖I‖, Frobenius, small where the two means of each class are close
    """
    eye = torch.eye(len(P_f), dtype=P_f.dtype)
    E = eye + shift @ read
    dual = torch.linalg.pinv(P_f)
    apart = (P_f - P_r).norm(dim=0)
    return {
        "forget_to_remain": float(((E @ P_f - P_r).norm(dim=0) / apart).max()),
        "remain_moved": float(((E @ P_r - P_r).norm(dim=0) / apart).max()),
        "idempotent": float((E @ E - E).norm() / (E - eye).norm()),
        "nothing_left": float((dual @ E).norm() / dual.norm()),
        "change": float((E - eye).norm() / eye.norm()),
    }


def _outputs(head: nn.Module, P: Tensor, weight: Tensor) -> Tensor:
    z = P.T.to(weight)
    logits = head(z[..., None, None]).flatten(1) if isinstance(head, nn.Conv2d) else head(z)
    return logits.double()
