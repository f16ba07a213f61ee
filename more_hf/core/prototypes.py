"""Prototypes: means of features over a concept, collected in one pass with O(dk) memory."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import PrototypeError


@dataclass(frozen=True)
class Prototypes:
    """Named means of features, one column each.

    Attributes:
        matrix (`Tensor`): `(num_features, num_prototypes)`, float64.
        names (`tuple[str, ...]`): one unique name per column.
        counts (`Tensor`): `(num_prototypes,)`, int64, how many features each mean is over.
        second_moment (`Tensor`, *optional*): `(num_features, num_features)`, float64, the uncentred mean of z zᵀ over all
            features that the fitter saw with `update_moment`.
        moment_count (`int`): how many features that mean is over.

    Example:

        >>> import torch
        >>> from more_hf.core.prototypes import Prototypes
        >>> here = Prototypes(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(), ("cat", "dog"), torch.tensor([1, 1]))
        >>> there = Prototypes(torch.tensor([[4.0], [0.0]]).double(), ("cat",), torch.tensor([2]))
        >>> here.merge(there)["cat"]
        tensor([3., 0.], dtype=torch.float64)
    """

    matrix: Tensor
    names: tuple[str, ...]
    counts: Tensor
    second_moment: Tensor | None = None
    moment_count: int = 0

    def index(self, name: str) -> int:
        """Column of a prototype. Raises `PrototypeError` for a name that was never fitted."""
        if name not in self.names:
            raise PrototypeError(f"There is no prototype {name!r}. Fitted: {', '.join(map(repr, self.names))}.")
        return self.names.index(name)

    def __getitem__(self, name: str) -> Tensor:
        return self.matrix[:, self.index(name)]

    def without(self, names: Collection[str]) -> Prototypes:
        """The other prototypes, with the same second moment."""
        kept = [i for i, name in enumerate(self.names) if name not in names]
        return replace(self, matrix=self.matrix[:, kept], names=tuple(self.names[i] for i in kept), counts=self.counts[kept])

    def merge(self, other: Prototypes) -> Prototypes:
        """The prototypes of both samples together: names of both, means weighted by their counts. Raises `PrototypeError` for
        another width, or where only one of the two has a second moment."""
        if len(other.matrix) != len(self.matrix) or (other.second_moment is None) != (self.second_moment is None):
            raise PrototypeError(
                f"Only prototypes of the same features can be merged, both with a second moment or both without; got widths "
                f"{len(self.matrix)} and {len(other.matrix)}, second moment {self.second_moment is not None} and "
                f"{other.second_moment is not None}."
            )
        fitter = PrototypeFitter(len(self.matrix), dict.fromkeys(self.names + other.names))
        for part in (self, other):
            columns = [fitter.names.index(name) for name in part.names]
            fitter.sums[columns] += (part.matrix * part.counts).T
            fitter.counts[columns] += part.counts
            if part.second_moment is not None:
                fitter.moment = fitter.moment + part.second_moment * part.moment_count
                fitter.moment_count += part.moment_count
        return fitter.prototypes

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file. Whoever has it has a template of every class, the forgotten ones too."""
        tensors = {"matrix": self.matrix, "counts": self.counts}
        if self.second_moment is not None:
            tensors["second_moment"] = self.second_moment
        facts = {"names": self.names, "moment_count": self.moment_count}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"more_hf": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Prototypes:
        """Read what `save` wrote, bit for bit."""
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["more_hf"])
            moment = file.get_tensor("second_moment") if "second_moment" in file.keys() else None
            return cls(file.get_tensor("matrix"), tuple(facts["names"]), file.get_tensor("counts"), moment, facts["moment_count"])


class PrototypeFitter:
    """Collects the means of features, batch by batch, in float64. Changed in place by `update`, `update_moment`, `merge`.

    The sums are additive: any batch size, order and sharding gives the same prototypes to float64 rounding.

    Args:
        num_features (`int`): width d of a feature.
        names (`Iterable[str]`): one unique name per prototype; label i belongs to `names[i]`.
        device (*optional*): where the sums live, the CPU if not given.

    Example:

        >>> import torch
        >>> from more_hf.core.prototypes import PrototypeFitter
        >>> fitter = PrototypeFitter(2, ["cat", "dog"])
        >>> fitter.update(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1])).prototypes.matrix
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
    """

    def __init__(self, num_features: int, names: Iterable[str], *, device: torch.device | str | None = None):
        self.names = tuple(names)
        if len(set(self.names)) != len(self.names):
            raise PrototypeError(f"Prototype names must be unique, got {list(self.names)}.")
        self.sums = torch.zeros(len(self.names), num_features, dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(self.names), dtype=torch.int64, device=device)
        self.moment = torch.zeros((), dtype=torch.float64, device=device)  # (d, d) once it is fed: most users never need it
        self.moment_count = 0

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> PrototypeFitter:
        """Add features `(..., d)` of any float dtype under integer labels `(...)`; a negative label leaves a feature out.

        Raises `PrototypeError` for a label without a name, before anything is added.
        """
        features = features.reshape(-1, self.sums.shape[1]).to(self.sums)
        labels = labels.reshape(-1).to(self.sums.device)
        if len(labels) and labels.max() >= len(self.names):
            raise PrototypeError(f"Label {int(labels.max())} has no name: the fitter knows {len(self.names)} prototypes.")
        features, labels = features[labels >= 0], labels[labels >= 0]
        self.sums.index_add_(0, labels, features)
        self.counts += torch.bincount(labels, minlength=len(self.names))
        return self

    @torch.no_grad()
    def update_moment(self, features: Tensor) -> PrototypeFitter:
        """Add features `(..., d)` of any float dtype to the second moment alone."""
        features = features.reshape(-1, self.sums.shape[1]).to(self.sums)
        self.moment = self.moment + features.T @ features
        self.moment_count += len(features)
        return self

    def merge(self, other: PrototypeFitter) -> PrototypeFitter:
        """Add what another fitter with the same names has seen, another shard of the data for instance."""
        if other.names != self.names:
            raise PrototypeError(f"Only fitters with the same names can be merged, got {self.names} and {other.names}.")
        self.sums += other.sums.to(self.sums)
        self.counts += other.counts.to(self.counts)
        self.moment = self.moment + other.moment.to(self.moment)
        self.moment_count += other.moment_count
        return self

    @property
    def prototypes(self) -> Prototypes:
        """The means so far, on the CPU. Raises `PrototypeError` naming the prototypes that have seen no feature."""
        empty = [name for name, count in zip(self.names, self.counts.tolist(), strict=True) if count == 0]
        if empty:
            raise PrototypeError(f"No feature was seen for {', '.join(map(repr, empty))}: a mean needs at least one.")
        return Prototypes(
            matrix=(self.sums / self.counts[:, None]).T.cpu().contiguous(),
            names=self.names,
            counts=self.counts.cpu().clone(),
            second_moment=(self.moment / self.moment_count).cpu() if self.moment_count else None,
            moment_count=self.moment_count,
        )
