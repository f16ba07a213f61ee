"""The method: prototype-orthogonal projection, then forget prototypes are sent to remain prototypes (MoRE, Eq. 4 to 6).

With prototypes P = [P_F, P_R] as columns and the dual D (D P = I), an expert is

    E z = z + (P_t − P_F) D_F z,

where D_F z says how much of each forget prototype is in z. For a linear layer that reads z this is a LoRA of rank f:
W E = W + B A with A = D_F, shared by all layers and all experts, and B = W (P_t − P_F).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import PrototypeError
from .options import SOLVERS
from .prototypes import Prototypes


EXACT = 1e-6  # how far D_F P may be from [I, 0], in units of one coordinate, before the edit is called not exact


@dataclass(frozen=True)
class Remap:
    """Sends each forget prototype to a target and leaves every other prototype where it is. Frozen; float64 on the CPU.

    Attributes:
        prototypes (`Prototypes`): P, `(d, k)`.
        forget (`tuple[int, ...]`): the f columns of P that are forgotten.
        targets (`Tensor`): `(num_experts, f)`, int64, the column that each forget prototype is sent to; -1 erases it (sends it to 0).
        dual (`Tensor`): D, `(k, d)`.
        solver (`str`): `"pinv"` (the paper: D = P⁺) or `"covariance"` (least change of ordinary features).
        condition_number (`float`): of P with its columns scaled to unit norm.
    """

    prototypes: Prototypes
    forget: tuple[int, ...]
    targets: Tensor
    dual: Tensor
    solver: str
    condition_number: float

    @classmethod
    def fit(
        cls,
        prototypes: Prototypes,
        forget: Sequence[str],
        targets: Sequence[Sequence[str | None]],
        *,
        solver: str = "pinv",
        shrinkage: float = 1e-4,
    ) -> Remap:
        """Solve for the dual.

        Args:
            prototypes (`Prototypes`): forget, target and every other prototype that must stay exactly where it is.
            forget (`Sequence[str]`): names of the f prototypes to forget.
            targets (`Sequence[Sequence[str | None]]`): for each expert, the f names that `forget` is sent to; `None` erases.
            solver (`str`, defaults to `"pinv"`): the metric Σ of D = (Pᵀ Σ⁻¹ P)⁻¹ Pᵀ Σ⁻¹. `"pinv"`: the identity, so
                D = P⁺. `"covariance"`: the second moment in `prototypes`; of all exact edits, the one that moves the features
                behind Σ least, in mean square of the coordinates that they read.
            shrinkage (`float`, defaults to 1e-4): added to the diagonal of Σ, as a fraction of its mean eigenvalue.

        Raises `PrototypeError` when a forget prototype is a linear combination of the others, so that no exact edit exists.

        Example:

            >>> import torch
            >>> from more_hf.core.prototypes import Prototypes
            >>> from more_hf.core.remap import Remap
            >>> P = Prototypes(torch.eye(3, dtype=torch.float64)[:, :2], ("cat", "dog"), torch.ones(2))
            >>> Remap.fit(P, forget=["cat"], targets=[["dog"]]).apply(torch.tensor([[5.0, 1.0, 7.0]]))
            tensor([[0., 6., 7.]])
        """
        if solver not in SOLVERS:
            raise PrototypeError(f"Unknown solver {solver!r}. Choose one of {', '.join(SOLVERS)}.")
        if not forget or len(set(forget)) != len(forget):
            raise PrototypeError(f"`forget` must name at least one prototype, and each once, got {list(forget)}.")
        if not targets or any(len(expert) != len(forget) for expert in targets):
            raise PrototypeError(f"Each expert needs one target (or None) for each of the {len(forget)} forget prototypes, got {targets}.")
        P = prototypes.matrix
        norms = P.norm(dim=0)
        if not (torch.isfinite(norms).all() and (norms > 0).all()):
            bad = prototypes.names[int((~torch.isfinite(norms) | (norms == 0)).nonzero()[0])]
            raise PrototypeError(f"The prototype {bad!r} is zero or not finite. Check the features that it was fitted on.")
        whiten = torch.eye(len(P), dtype=P.dtype) if solver == "pinv" else _inverse_root(prototypes, shrinkage)
        unit = P / norms
        dual = torch.linalg.pinv(whiten @ unit, rtol=1e-12) @ whiten / norms[:, None]  # (k, d)
        remap = cls(
            prototypes=prototypes,
            forget=tuple(prototypes.index(name) for name in forget),
            targets=torch.tensor([[-1 if t is None else prototypes.index(t) for t in expert] for expert in targets]),
            dual=dual,
            solver=solver,
            condition_number=float(torch.linalg.cond(unit)),
        )
        remap._check()
        return remap

    def _check(self) -> None:
        names, P = self.prototypes.names, self.prototypes.matrix
        d, k = P.shape
        if set(self.forget) & set(self.targets.flatten().tolist()):
            raise PrototypeError("A prototype cannot be both forgotten and a target. Remove it from one of the lists.")
        read = self.D_F @ P  # (f, k), one where a forget prototype reads itself and zero elsewhere
        error = (read - torch.eye(k, dtype=P.dtype)[list(self.forget)]).abs()
        if error.max() < EXACT:
            return
        row = int(error.amax(1).argmax())
        column = self.forget[row]
        cosines = torch.nn.functional.cosine_similarity(P[:, [column]], P, dim=0)
        cosines[column] = 0
        nearest = int(cosines.abs().argmax())
        reason = (
            f"{k} prototypes do not fit into {d} dimensions"
            if k > d
            else f"{names[column]!r} is a linear combination of the other prototypes (nearest: {names[nearest]!r}, "
            f"cosine {float(cosines[nearest]):.4f})"
        )
        raise PrototypeError(
            f"No exact edit exists: {reason}, so it cannot be removed and they be kept. Drop a target or a retained name, "
            "or choose one that is further away."
        )

    @property
    def num_experts(self) -> int:
        return len(self.targets)

    @property
    def rank(self) -> int:
        """f, the rank of the change of every edited layer."""
        return len(self.forget)

    @property
    def D_F(self) -> Tensor:
        """`(f, d)`: row i reads how much of forget prototype i is in a feature. Every other prototype reads 0."""
        return self.dual[list(self.forget)]

    @cached_property
    def shifts(self) -> Tensor:
        """`(num_experts, d, f)`: P_t − P_F of every expert."""
        P = self.prototypes.matrix
        padded = torch.cat([P, torch.zeros_like(P[:, :1])], dim=1)  # column -1 is the target 0 of an erasure
        return padded[:, self.targets].transpose(0, 1) - P[:, list(self.forget)]

    def shift(self, expert: int | None = None) -> Tensor:
        """`(d, f)`: P_t − P_F of one expert, or of the mean expert."""
        return self.shifts.mean(0) if expert is None else self.shifts[expert]

    def apply(self, z: Tensor, expert: int | Tensor | None = None) -> Tensor:
        """E z for features `(..., d)`, in the dtype of z. `expert`: one for all, `(batch,)` int64 for z `(batch, ..., d)`, or the mean."""
        read = z.double() @ self.D_F.T.to(z.device)  # (..., f)
        if isinstance(expert, Tensor):
            shift = self.shifts.to(z.device)[expert.to(z.device)]  # (batch, d, f)
            moved = torch.einsum("b...f,bdf->b...d", read, shift)
        else:
            moved = read @ self.shift(expert).T.to(z.device)
        return (z.double() + moved).to(z.dtype)

    def moved(self, z: Tensor) -> float:
        """The largest ‖E z − z‖ / ‖z‖ over features `(..., d)` under the mean expert."""
        z = z.double().cpu()
        return float(((self.apply(z) - z).norm(dim=-1) / z.norm(dim=-1)).max())

    def delta(self, weight: Tensor, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """The change of a linear layer that reads the features: `weight` `(out, d)` becomes `weight + lora_B @ lora_A`.

        Returns `lora_A` `(f, d)`, the same for every layer and expert, and `lora_B` `(out, f)`, float64 on the weight's device.
        """
        return self.D_F.to(weight.device), weight.double() @ self.shift(expert).to(weight.device)

    def merged(self, weight: Tensor, expert: int | None = None) -> Tensor:
        """`(out, d)`: the edited weight in the dtype of `weight`, which is not changed. Computed in float64, cast once."""
        lora_A, lora_B = self.delta(weight, expert)
        return torch.addmm(weight.double(), lora_B, lora_A).to(weight.dtype)

    def verify(self) -> dict[str, float]:
        """Measure what the method promises, as relative errors of the worst expert (float64: about 1e-12 for a good P).

        - `forget_to_target` (G1): ‖E p_f − p_t‖ / ‖p_f − p_t‖
        - `remain_fixed` (G1): ‖E p_r − p_r‖ / ‖p_r‖ over every other prototype
        - `idempotent` (G2): ‖E² − E‖ / ‖E − I‖
        - `nothing_left` (G3): ‖D_F E‖ / ‖D_F‖, what an edited feature can still show of a forget prototype
        - `ordinary_moved`: √(E‖E z − z‖² / E‖z‖²) over the features behind Σ, where there are any: what the edit costs them
        - `rank` (G2): of I − E, the smallest over the experts
        """
        P, D_F, forget = self.prototypes.matrix, self.D_F, list(self.forget)
        remain = P[:, [i for i in range(P.shape[1]) if i not in self.forget]]
        moment = self.prototypes.second_moment
        measured, ranks = [], []
        for M in self.shifts:
            left = D_F + (D_F @ M) @ D_F  # D_F E
            measured.append(
                [
                    _worst_ratio(M @ (D_F @ P[:, forget]) - M, M),
                    _worst_ratio(M @ (D_F @ remain), remain),
                    (M @ left).norm() / (M @ D_F).norm(),
                    left.norm() / D_F.norm(),
                ]
            )
            if moment is not None:  # E‖M D_F z‖² = tr(Mᵀ M D_F Σ D_Fᵀ)
                measured[-1].append(((M.T @ M) * (D_F @ moment @ D_F.T)).sum().clamp_min(0).sqrt() / moment.trace().sqrt())
            ranks.append(torch.linalg.matrix_rank(M))
        keys = ("forget_to_target", "remain_fixed", "idempotent", "nothing_left", "ordinary_moved")
        worst = torch.tensor(measured).amax(0).tolist()  # keeps a NaN
        return {**dict(zip(keys, worst, strict=False)), "rank": int(min(*ranks, torch.linalg.matrix_rank(D_F)))}


def _worst_ratio(change: Tensor, reference: Tensor) -> Tensor:
    """The largest ‖change‖ / ‖reference‖ over columns, 0 where there is no column."""
    ratios = change.norm(dim=0) / reference.norm(dim=0)
    return ratios.max() if len(ratios) else torch.zeros(())


def _inverse_root(prototypes: Prototypes, shrinkage: float) -> Tensor:
    """Σ^(−1/2), `(d, d)`, of the shrunk second moment."""
    if prototypes.second_moment is None:
        raise PrototypeError('solver="covariance" needs a second moment. Feed the fitter with `update_moment` too.')
    values, vectors = torch.linalg.eigh(prototypes.second_moment)
    return (vectors * (values.clamp_min(0) + shrinkage * values.mean()).rsqrt()) @ vectors.T

