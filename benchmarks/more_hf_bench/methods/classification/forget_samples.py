"""Forget single samples of all classes (MoRE, section 4.3).

A class's mean over the forgotten samples is sent to its mean over the others, and the edit is absorbed into
the head's weight. Algorithm 3, which has another last term, is `as_printed`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from more_hf.classification.features import collect, plain_model
from more_hf.classification.heads import evaluating
from more_hf.core.errors import AlreadyErasedError, PrototypeError, SiteNotFoundError
from more_hf.core.interrupts import unless_completed
from more_hf.core.registry import find_erasure
from more_hf.core.site import Site, check_unshared


# How much of the way from the forgotten means to the others may drown in the rounding of the head's weight.
DROWNED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


def forget_samples(
    model: nn.Module, forget: Iterable[Any], remain: Iterable[Any], *, as_printed: bool = False
) -> None:
    """Make a classifier treat some of its training samples like the others of their classes, in place and in
    closed form.

    E = I + (P_r − P_f) P_f⁺, and the head's weight W becomes W E; no hook. Only E p_f = p_r is promised: the
    remain means are not in the dual, so E is no projection and E z still shows P_f⁺ z. As the two means of a
    class are close, E is close to the identity.

    Args:
        model (`nn.Module`): a classifier with one head.
        forget, remain (`Iterable`): batches as in `erase_classes` of the forgotten samples and of the others,
            some of every class.
        as_printed (`bool`, defaults to `False`): Algorithm 3 to the letter, E = I − P_f P_f⁺ + P_r P_r⁺. It
            sends p_f to its projection on the span of P_r, not to p_r.

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
    heads, P_f = collect(plain, forget, head=None, at=None, second_moment=False)
    _, P_r = collect(plain, remain, head=None, at=None, second_moment=False)
    if len(heads) != 1:
        raise SiteNotFoundError(
            f"The edit is absorbed into one head, and this model has {', '.join(heads)}. Take a model with "
            "one head."
        )
    ((name, module),) = heads.items()
    site = Site(name, module)
    check_unshared({name: site}, plain)

    # 2. The edit, in float64.
    shift, read = factors(P_f.matrix, P_r.matrix, as_printed)
    weight = site.read()
    change = (weight.double() @ shift.to(weight.device)) @ read.to(weight.device)
    original = weight.to("cpu", copy=True)

    # 3. Written, and proved by a run: afterwards the head treats P_f as it treated E P_f before.
    expected = P_f.matrix + shift @ (read @ P_f.matrix)
    with evaluating(plain):
        source = _outputs(module, P_f.matrix, weight)
        target = _outputs(module, expected, weight)
        with unless_completed(partial(site.write, original)):
            site.write((original.to(weight.device).double() + change).to(weight.dtype))
            error = (_outputs(module, P_f.matrix, weight) - target).norm() / (source - target).norm()
            if not float(error) < DROWNED[weight.dtype]:
                changed = float(change.norm() / original.double().norm())
                raise SiteNotFoundError(
                    f"`{name}` does not treat the forgotten means as the others after the edit (off by "
                    f"{float(error):.2g} of their difference): the change, {changed:.1e} of the weight, "
                    f"drowns in the rounding of {weight.dtype}, or something other than the weight decides. "
                    "The model is as it was. Use `model.float()`, and take adapters off the head."
                )


def factors(P_f: Tensor, P_r: Tensor, as_printed: bool) -> tuple[Tensor, Tensor]:
    """`shift` `(d, r)` and `read` `(r, d)` of E = I + shift · read, for class means `(d, k)`. Raises
    `PrototypeError` if P_f has dependent columns."""
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


def _outputs(head: nn.Module, P: Tensor, weight: Tensor) -> Tensor:
    z = P.T.to(weight)
    logits = head(z[..., None, None]).flatten(1) if isinstance(head, nn.Conv2d) else head(z)
    return logits.double()
