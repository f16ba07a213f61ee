"""`erase_classes` and `forget_samples` under the names of the tables, the paper's MoRE and its ablations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from more_hf.classification.erase import erase_classes, get_erasure

from ...splits import Splits
from .forget_samples import forget_samples
from .head_features import attach, class_means, find_head, remaining_class
from .router_training import train_router
from .training import Batch, batches, taking


@dataclass(frozen=True)
class Erasing:
    """What every variant of ours is told: the settings of `more_hf.erase_classes`. `name` is the method's."""

    name: str
    remap_to: str | int | list[int] | None = "remain"
    num_experts: int | None = None
    router: str | None = "random"
    solver: str = "auto"
    batch_size: int = 500
    seed: int = 0

    def __call__(self, model: nn.Module, splits: Splits, **further: Any) -> nn.Module:
        """Erase the forgotten classes, at any cost: a benchmark shows it."""
        told = {name: value for name, value in vars(self).items() if name not in ("name", "batch_size")}
        forget, data = splits.f.labels.unique().tolist(), _all_batches(model, splits, self.batch_size)
        return erase_classes(model, data, forget, most_lost=100, **told, **further).eval()


@taking(Erasing)
def more(model: nn.Module, splits: Splits, erasing: Erasing) -> nn.Module:
    """MoRE: every forgotten class goes to several remaining ones. All settings as in
    `more_hf.erase_classes`."""
    return erasing(model, splits)


more_hash = partial(more, router="hash")
more_prototype = partial(more, router="prototype")
remap = partial(more, router=None, num_experts=1)  # the paper's: one target
erase = partial(more, router=None, remap_to=None)


def more_paper(
    model: nn.Module, splits: Splits, *, seed: int = 0, num_experts: int | None = None, batch_size: int = 500
) -> nn.Module:
    """MoRE as the paper prints it: D = P⁺, and a random router over experts with drawn targets.

    Source: Algorithms 1 and 2. Each expert sends each forgotten class to a remaining one, drawn uniformly:
    two experts may draw the same.

    Args:
        num_experts (`int`, *optional*): by default one for each remaining class (Table 12 has fewer, too).
    """
    remain = splits.r.labels.unique()
    generator = torch.Generator().manual_seed(seed)
    data: Any = _all_batches(model, splits, batch_size)
    for forgotten in splits.f.labels.unique().tolist():  # classes with targets of their own, fitted jointly
        choice = torch.randint(len(remain), (num_experts or len(remain),), generator=generator)
        erase_classes(
            model,
            data,
            forgotten,
            remap_to=remain[choice].tolist(),
            num_experts=len(choice),
            router="random",
            solver="pinv",
            seed=seed,
            most_lost=100,
        )
        data = get_erasure(model).prototypes
    return model.eval()


@taking(Erasing, router="prototype")
def more_trained(
    model: nn.Module,
    splits: Splits,
    erasing: Erasing,
    *,
    losses: str = "remain+balance",
    epochs: int = 10,
    learning_rate: float = 1e-5,
) -> nn.Module:
    """MoRE-P-T-B, or with `router="prototype_random"` MoRE-R-T-B: the router is trained on all of D_f and
    D_r.

    Source: appendix D, where `-T` is the remain loss alone and `-T-B` adds the balance of forgotten samples.

    Args:
        losses (`str`, defaults to `"remain+balance"`): one or more of remain, forget and balance, joined by
            `+`, as in Table 15.
        epochs (`int`), learning_rate (`float`): as in `train_router`.
    """
    model = erasing(model, splits)
    data = _all_batches(model, splits, erasing.batch_size)
    options = {"epochs": epochs, "learning_rate": learning_rate, "seed": erasing.seed}
    train_router(model, data, losses=losses.split("+"), **options)
    return model


@taking(Erasing)
def more_inner(model: nn.Module, splits: Splits, erasing: Erasing, *, at: str | None = None) -> nn.Module:
    """MoRE at the input of the inner module `at` (Tables 7 and 13), a hook that no saved weight holds;
    without `at` as `more`."""
    return erasing(model, splits, at=at)


def remap_samples(
    model: nn.Module, splits: Splits, *, seed: int = 0, as_printed: bool = False, batch_size: int = 500
) -> nn.Module:
    """Send the mean of a class's forgotten samples to the mean of its others, P_r P_f⁺: what the text before
    Algorithm 3 asks for. With `as_printed`, Algorithm 3 to the letter, P_r P_r⁺."""
    forget, remain = (batches(part.loader(batch_size), model) for part in (splits.f, splits.r))
    forget_samples(model, forget, remain, as_printed=as_printed)
    return model.eval()


remap_samples_as_printed = partial(remap_samples, as_printed=True)


def _all_batches(model: nn.Module, splits: Splits, batch_size: int) -> Iterator[Batch]:
    for part in (splits.f, splits.r):
        yield from batches(part.loader(batch_size), model)


def erase_without_po(model: nn.Module, splits: Splits, *, seed: int = 0, batch_size: int = 500) -> nn.Module:
    """z becomes (I − P_F P_F⁺) z, P_F the class means of D_f: MoRE's ablation "Erase without PO" (Table 3).
    D_r is not read."""
    _, head = find_head(model, splits.f)
    P_F = class_means(model, splits.f, batch_size)
    return attach(model, head, torch.eye(len(P_F)).to(P_F) - P_F @ torch.linalg.pinv(P_F))


def remap_without_po(
    model: nn.Module, splits: Splits, *, seed: int = 0, target: int | None = None, batch_size: int = 500
) -> nn.Module:
    """z becomes (I + (P_t − P_F) P_F⁺) z: every forgotten class goes to one remaining class, the others are
    not spared.

    Args:
        target (`int`, *optional*): the remaining class; the first if not given.
    """
    target = remaining_class(splits, target)
    _, head = find_head(model, splits.f)
    P_F = class_means(model, splits.f, batch_size)
    P_t = class_means(model, splits.r.subset(splits.r.labels == target), batch_size)
    return attach(model, head, torch.eye(len(P_F)).to(P_F) + (P_t - P_F) @ torch.linalg.pinv(P_F))


def erase_without_complement(
    model: nn.Module, splits: Splits, *, seed: int = 0, batch_size: int = 500
) -> nn.Module:
    """z becomes P (D − diag(s) D) z, with P all class means, D = P⁺ and s the forgotten ones: MoRE, Eq. 3."""
    _, head = find_head(model, splits.f)
    P_F, P_R = (class_means(model, part, batch_size) for part in (splits.f, splits.r))
    return attach(model, head, inside_prototypes(P_F, P_R, torch.zeros_like(P_F)))


def remap_without_complement(
    model: nn.Module, splits: Splits, *, seed: int = 0, target: int | None = None, batch_size: int = 500
) -> nn.Module:
    """z becomes P (D − diag(s) D) z + P_t diag(s) D z: the same, and every forgotten class goes to one
    remaining class.

    Args:
        target (`int`, *optional*): the remaining class; the first if not given.
    """
    target = remaining_class(splits, target)
    _, head = find_head(model, splits.f)
    P_F, P_R = (class_means(model, part, batch_size) for part in (splits.f, splits.r))
    P_t = P_R[:, splits.r.labels.unique() == target]
    return attach(model, head, inside_prototypes(P_F, P_R, P_t.expand_as(P_F)))


def inside_prototypes(P_F: Tensor, P_R: Tensor, P_t: Tensor) -> Tensor:
    """The map `(d, d)` that keeps remaining coordinates, moves forgotten ones to the columns of P_t, and
    leaves nothing beside the prototypes."""
    D = torch.linalg.pinv(torch.cat([P_F, P_R], dim=1))
    return torch.cat([P_t, P_R], dim=1) @ D
