"""Prototypes: means of features over a concept, collected in one pass with O(dk) memory."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import PrototypeError, shown
from .moment import Moment
from .request import read_names


@dataclass(frozen=True)
class Prototypes:
    """
    Named means of features, one column each.

    Args:
        matrix (`Tensor`):
            `(num_features, num_prototypes)`, float64.
        names (`tuple[str, ...]`):
            One unique name per column.
        counts (`Tensor`):
            `(num_prototypes,)`, int64, the number of features behind each mean.
        second_moment (`Tensor`, *optional*):
            The uncentered mean of z zᵀ over all features that the fitter saw with `update_moment`, float64:
            `(num_features, num_features)`, or thin as in [`Moment`].
        moment_count (`int`, *optional*, defaults to 0):
            The number of features behind that mean.

    Example:

        >>> import torch
        >>> from more_hf.core.prototypes import Prototypes
        >>> Prototypes(torch.eye(2, dtype=torch.float64), ("cat", "dog"), torch.tensor([1, 1]))["cat"]
        tensor([1., 0.], dtype=torch.float64)
    """

    matrix: Tensor
    names: tuple[str, ...]
    counts: Tensor
    second_moment: Tensor | None = None
    moment_count: int = 0

    def index(self, name: str) -> int:
        """Column of a prototype. Raises `PrototypeError` for a name that was never fitted."""
        if name not in self.names:
            raise PrototypeError(
                f"There is no prototype {name!r}. Choose one of {', '.join(map(repr, self.names))}, or fit "
                "it too."
            )
        return self.names.index(name)

    def __getitem__(self, name: str) -> Tensor:
        return self.matrix[:, self.index(name)]

    @property
    def moment(self) -> Moment | None:
        """The second moment, with its operations."""
        return None if self.second_moment is None else Moment(self.second_moment, self.moment_count)

    def with_moment(self, moment: Moment) -> Prototypes:
        """The same prototypes with another second moment."""
        return replace(self, second_moment=moment.matrix, moment_count=moment.count)

    @property
    def unit(self) -> Tensor:
        """The columns scaled to unit norm. Raises `PrototypeError` for one that is zero or not finite."""
        norms = self.matrix.norm(dim=0)
        usable = norms.isfinite() & (norms > 0)
        if not usable.all():
            bad = self.names[usable.tolist().index(False)]
            raise PrototypeError(
                f"The prototype {bad!r} is zero or not finite. Check the features it was fitted on."
            )
        return self.matrix / norms

    def without(self, names: Collection[str]) -> Prototypes:
        """The other prototypes, with the same second moment."""
        kept = [i for i, name in enumerate(self.names) if name not in names]
        return replace(
            self,
            matrix=self.matrix[:, kept],
            names=tuple(self.names[i] for i in kept),
            counts=self.counts[kept],
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, which shows its reader the mean of every class, forgotten or not."""
        tensors = {"matrix": self.matrix, "counts": self.counts}
        if self.second_moment is not None:
            tensors["second_moment"] = self.second_moment
        facts = json.dumps({"names": self.names, "moment_count": self.moment_count})
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, path, metadata={"more_hf": facts})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Prototypes:
        """Read what `save` wrote, bit for bit."""
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["more_hf"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        return cls(names=tuple(facts["names"]), moment_count=facts["moment_count"], **tensors)


class Totals(NamedTuple):
    """The sums of a fitter. Unless it is thin, the totals of two samples add up to those of both together."""

    sums: Tensor  # (k, d)
    counts: Tensor  # (k,), int64
    # (d, d), the sum of z zᵀ; in a thin fitter the features themselves, (n, d), while n < d; () until the
    # first feature, since most users need no second moment
    moment: Tensor
    moment_count: Tensor  # (), int64


class PrototypeFitter:
    """
    Collects the means of features, batch by batch, in float64. `update` and `update_moment` change it in
    place.

    The totals are additive: any batch size, order and sharding gives the same prototypes up to float64
    rounding.

    Args:
        num_features (`int`):
            Width d of a feature.
        names (`Iterable[str]`):
            One unique name per prototype; label i belongs to `names[i]`.
        device (`torch.device` or `str`, *optional*):
            Where the totals are kept; `None` for the CPU.
        thin (`bool`, *optional*, defaults to `False`):
            Keep the features themselves instead of their second moment while they are fewer than d.

    Example:

        >>> import torch
        >>> from more_hf.core.prototypes import PrototypeFitter
        >>> fitter = PrototypeFitter(2, ["cat", "dog"])
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> fitter.update(features, torch.tensor([0, 0, 1])).prototypes.matrix
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
    """

    def __init__(
        self,
        num_features: int,
        names: Iterable[str],
        *,
        device: torch.device | str | None = None,
        thin: bool = False,
    ):
        self.names = read_names("names", names)
        self.thin = thin
        if len(set(self.names)) != len(self.names):
            raise PrototypeError(
                f"Prototype names must be unique, got {list(self.names)}. Rename the repeated ones."
            )
        self.totals = Totals(
            sums=torch.zeros(len(self.names), num_features, dtype=torch.float64, device=device),
            counts=torch.zeros(len(self.names), dtype=torch.int64, device=device),
            moment=torch.zeros((), dtype=torch.float64, device=device),
            moment_count=torch.zeros((), dtype=torch.int64, device=device),
        )

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> PrototypeFitter:
        """
        Add features `(..., d)` of any float dtype under integer labels `(...)`; a negative label leaves a
        feature out.

        Raises:
            `PrototypeError`: a label has no name or is not an integer, or the features have the wrong width
            or number, or values that are not finite. Nothing is added then.
        """
        features = self._rows(features)
        if not isinstance(labels, Tensor) or not is_integer(labels) or labels.numel() != len(features):
            raise PrototypeError(
                f"Labels must be a tensor of {len(features)} integers, one for each feature, got "
                f"{shown(labels)}."
            )
        labels = labels.reshape(-1).to(features.device, torch.int64)
        if len(labels) and labels.max() >= len(self.names):
            raise PrototypeError(
                f"Label {int(labels.max())} has no name: the fitter knows {len(self.names)} prototypes. "
                "Correct the labels, or name every class."
            )
        # negative labels stand for what counts for no prototype
        features, labels = features[labels >= 0], labels[labels >= 0]
        self.totals.sums.index_add_(0, labels, features)
        self.totals.counts.add_(torch.bincount(labels, minlength=len(self.names)))
        return self

    @torch.no_grad()
    def update_moment(self, features: Tensor, *, times: int = 1) -> PrototypeFitter:
        """Add features `(..., d)` to the second moment alone, each `times` times. Raises as `update` does."""
        features = times**0.5 * self._rows(features)
        few = self.thin and len(features) < features.shape[1]
        self._add_moment(features if few else features.T @ features, times * len(features))
        return self

    @property
    def prototypes(self) -> Prototypes:
        """The means so far, on the CPU. Raises `PrototypeError` naming the prototypes without any feature."""
        sums, counts, moment, moment_count = self.totals
        empty = [name for name, count in zip(self.names, counts.tolist(), strict=True) if count == 0]
        if empty:
            raise PrototypeError(
                f"No feature was seen for {', '.join(map(repr, empty))}, and a mean needs one. Add "
                "a sample of each."
            )
        # A thin total holds the features themselves, which enter the mean of z zᵀ twice: hence the root.
        scale = moment_count if moment.shape[:1] == moment.shape[1:] else moment_count.double().sqrt()
        return Prototypes(
            matrix=(sums / counts[:, None]).T.cpu().contiguous(),
            names=self.names,
            counts=counts.cpu().clone(),
            second_moment=(moment / scale).cpu() if moment_count else None,
            moment_count=int(moment_count),
        )

    def _rows(self, features: Tensor) -> Tensor:
        """Features `(..., d)` as `(n, d)`, float64, where the sums are."""
        sums = self.totals.sums
        width = sums.shape[1]
        if not isinstance(features, Tensor) or features.ndim == 0 or features.shape[-1] != width:
            raise PrototypeError(f"Features must be a tensor (..., {width}), got {shown(features)}.")
        rows = features.reshape(-1, width).to(sums)
        # A single such value would spoil its prototype and the second moment.
        if not rows.isfinite().all():
            raise PrototypeError(
                "Some features are NaN or infinite, and no mean of them exists. Check the data, or run the "
                "model in a wider dtype."
            )
        return rows

    def _add_moment(self, added: Tensor, count: int) -> None:
        """Add features `(n, d)` with n < d, or their sum of z zᵀ, `(d, d)`."""
        width = added.shape[1]
        # Keep features while they are fewer than d, since (n, d) is smaller than (d, d); then sum them up.
        parts = [part for part in (self.totals.moment, added) if part.ndim]
        if self.thin and sum(map(len, parts)) < width:
            total = torch.cat(parts)
        else:
            total = sum(part if len(part) == width else part.T @ part for part in parts)
        self.totals = self.totals._replace(moment=total, moment_count=self.totals.moment_count + count)


def is_integer(labels: Tensor) -> bool:
    """Whether labels are whole numbers: an integer dtype, not a mask."""
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
