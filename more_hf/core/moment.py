"""Σ, the uncentered second moment of n features of width d; in O(n d) when n < d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PrototypeError


@dataclass(frozen=True)
class Moment:
    """
    The mean of z zᵀ over features, and the metric it defines. Frozen.

    Args:
        matrix (`Tensor`):
            Σ itself, `(d, d)`, float64; or thin: a matrix G `(n, d)` with n < d and Gᵀ G = Σ, such as the
            features divided by √n. A product with Σ then takes O(n d), and nothing is ever `(d, d)`.
        count (`float`):
            How many features the mean is over, or its weight when moments are added.

    Example:

        >>> import torch
        >>> from more_hf.core.moment import Moment
        >>> moment = Moment(torch.tensor([[3.0, 4.0]]).double(), 1)
        >>> moment.trace, moment.dense
        (tensor(25., dtype=torch.float64), tensor([[ 9., 12.],
                [12., 16.]], dtype=torch.float64))
    """

    matrix: Tensor
    count: float

    @property
    def is_thin(self) -> bool:
        """Whether the matrix is `(n, d)` with n < d."""
        return len(self.matrix) < self.matrix.shape[1]

    @property
    def dense(self) -> Tensor:
        """Σ, `(d, d)`."""
        return self.matrix.T @ self.matrix if self.is_thin else self.matrix

    @property
    def trace(self) -> Tensor:
        """tr Σ, the mean of ‖z‖²."""
        return self.matrix.square().sum() if self.is_thin else self.matrix.trace()

    def seen_by(self, readers: Tensor) -> Tensor:
        """D Σ Dᵀ, `(f, f)`, for readers D `(f, d)`."""
        seen = readers @ self.matrix.T
        return seen @ seen.T if self.is_thin else seen @ readers.T

    def __add__(self, other: Moment) -> Moment:
        """The moment of both samples together; thin if both are thin and together have fewer than d rows."""
        count, rows = self.count + other.count, len(self.matrix) + len(other.matrix)
        # a mean of means, weighted by how many features each is over
        shares = [(part, part.count / count) for part in (self, other)]
        if self.is_thin and other.is_thin and rows < self.matrix.shape[1]:
            return Moment(torch.cat([share**0.5 * part.matrix for part, share in shares]), count)
        return Moment(sum(share * part.dense for part, share in shares), count)

    def __sub__(self, part: Moment) -> Moment:
        """The moment of this sample without `part`, which belongs to it."""
        count = self.count - part.count
        if not self.is_thin:
            return Moment((self.count * self.matrix - part.count * part.dense) / count, count)
        # In an orthonormal basis of the features, the difference is (n, n), and its root is thin again.
        basis, own = torch.linalg.qr(self.matrix.T)  # (d, n), (n, n)
        left = (self.count * own @ own.T - part.count * part.seen_by(basis.T)) / count
        values, vectors = torch.linalg.eigh(left)
        return Moment((basis @ (vectors * values.clamp_min(0).sqrt())).T.contiguous(), count)

    def solve(self, X: Tensor, shrinkage: float) -> Tensor:
        """(Σ + aI)⁻¹ X for X `(d, k)`, with a as in `inverse_root`, whose errors it raises."""
        if not self.is_thin:
            shrunk = self.matrix.clone()
            shrunk.diagonal().add_(shrinkage * self.trace / len(shrunk))
            # d³/3 multiplications, where the eigenvalues behind a root take about thirty times as many
            factor, failed = torch.linalg.cholesky_ex(shrunk)
            if not failed and factor.isfinite().all():
                return torch.cholesky_solve(X, factor)
        root = self.inverse_root(shrinkage)
        return root(root(X))

    def inverse_root(self, shrinkage: float) -> Callable[[Tensor], Tensor]:
        """
        The map X → (Σ + aI)^(−1/2) X for X `(d, k)`, where a is `shrinkage` times the mean eigenvalue of Σ.

        Raises:
            `PrototypeError`: Σ is not finite, or it is singular and the shrinkage is 0.
        """
        if not self.matrix.isfinite().all():
            raise PrototypeError("The second moment is not finite. Check the features it was fitted on.")
        G, added = self.matrix, shrinkage * self.trace / self.matrix.shape[1]
        values, vectors = torch.linalg.eigh(G @ G.T if self.is_thin else G)
        shrunk = values.clamp_min(0) + added
        if not (added if self.is_thin else shrunk.min()) > 0:
            raise PrototypeError(
                "The second moment is singular, and the shrinkage adds nothing to it. Pass a larger "
                "`shrinkage`."
            )
        if not self.is_thin:
            root = (vectors * shrunk.rsqrt()) @ vectors.T
            return lambda X: root @ X
        # (aI + Gᵀ G)^(−1/2) = (I − Gᵀ φ(G Gᵀ) G) / √a with φ(λ) = (1 − √(a / (a + λ))) / λ, written here as
        # 1 / (√(a + λ) (√(a + λ) + √a)), which never divides by anything small.
        scales = shrunk.sqrt() * (shrunk.sqrt() + added.sqrt())
        inner = (vectors / scales) @ vectors.T  # (n, n)
        return lambda X: (X - G.T @ (inner @ (G @ X))) / added.sqrt()
