"""`erase_classes` and `forget_samples` under the names of the tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from more_hf.classification.erase import erase_classes

from ...splits import Splits
from .forget_samples import forget_samples
from .router_training import train_router
from .training import Batch, batches


def more(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    remap_to: str | int | list[int] | None = "remain",
    num_experts: int | None = None,
    router: str | None = "random",
    solver: str = "auto",
    batch_size: int = 500,
) -> nn.Module:
    """MoRE: every forgotten class goes to several remaining ones. All settings as in
    `more_hf.erase_classes`."""
    return _erase(
        model,
        splits,
        batch_size,
        remap_to=remap_to,
        num_experts=num_experts,
        router=router,
        solver=solver,
        seed=seed,
    )


more_hash = partial(more, router="hash")
more_prototype = partial(more, router="prototype")
remap = partial(more, router=None, num_experts=1)  # the paper's: one target
erase = partial(more, router=None, remap_to=None)


def more_trained(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    remap_to: str | int | list[int] | None = "remain",
    num_experts: int | None = None,
    router: str = "prototype",
    solver: str = "auto",
    losses: str = "remain+forget+balance",
    epochs: int = 10,
    learning_rate: float = 1e-5,
    batch_size: int = 500,
) -> nn.Module:
    """MoRE-P-T-B, or with `router="prototype_random"` MoRE-R-T-B: the router is trained on all of D_f and D_r
    (appendix D).

    `losses` is one or more of remain, forget and balance, joined by `+`; settings of the training as in
    `train_router`.
    """
    model = more(
        model,
        splits,
        seed=seed,
        remap_to=remap_to,
        num_experts=num_experts,
        router=router,
        solver=solver,
        batch_size=batch_size,
    )
    train_router(
        model,
        _all_batches(model, splits, batch_size),
        losses=losses.split("+"),
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
    )
    return model


def more_inner(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    at: str | None = None,
    remap_to: str | int | list[int] | None = "remain",
    num_experts: int | None = None,
    router: str | None = "random",
    solver: str = "auto",
    batch_size: int = 500,
) -> nn.Module:
    """MoRE at the input of the inner module `at` (Tables 7 and 13), a hook that no saved weight holds;
    without `at` as `more`."""
    return _erase(
        model,
        splits,
        batch_size,
        at=at,
        remap_to=remap_to,
        num_experts=num_experts,
        router=router,
        solver=solver,
        seed=seed,
    )


def remap_samples(
    model: nn.Module, splits: Splits, *, seed: int = 0, as_printed: bool = False, batch_size: int = 500
) -> nn.Module:
    """Ours for single samples instead of classes (Algorithm 3); settings as in `forget_samples`."""
    forget, remain = (batches(part.loader(batch_size), model) for part in (splits.f, splits.r))
    forget_samples(model, forget, remain, as_printed=as_printed)
    return model.eval()


remap_samples_as_printed = partial(remap_samples, as_printed=True)


def _erase(model: nn.Module, splits: Splits, batch_size: int, **settings: Any) -> nn.Module:
    forget = splits.f.labels.unique().tolist()
    data = _all_batches(model, splits, batch_size)
    return erase_classes(model, data, forget, most_lost=100, **settings).eval()  # a benchmark shows the loss


def _all_batches(model: nn.Module, splits: Splits, batch_size: int) -> Iterator[Batch]:
    for part in (splits.f, splits.r):
        yield from batches(part.loader(batch_size), model)
