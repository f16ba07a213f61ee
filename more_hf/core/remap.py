"""The method: project the forget prototypes out, then send them to remain prototypes (MoRE, Eq. 4 to 6).

With prototypes P = [P_F, P_R] as columns and the dual D (D P = I), an expert is

    E z = z + (P_t − P_F) D_F z,

where D_F z says how much of each forget prototype is in z. For a linear layer that reads z this is a LoRA of
rank f: W E = W + B A with A = D_F, shared by all layers and all experts, and B = W (P_t − P_F).

The soft edit goes only part of the way to the target, so that forgetting many prototypes costs everything
else less; it exists for any number of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import PrototypeError, shown
from .moment import Moment
from .prototypes import Prototypes
from .request import EXACT_SOLVERS, SOLVERS, check_choice, check_number, read_names


EXACT = 1e-6  # an edit counts as exact while D_F P is this close to [I, 0], in units of one coordinate
REGRESSION = "regression"  # the `solver` of a remap made by `Remap.regress`
NOWHERE = -1  # the target of a prototype that is erased


class Removed(NamedTuple):
    """Directions `(d, m)` that an edit removes, and the largest share that it leaves of any of them."""

    directions: Tensor
    share: float


@dataclass(frozen=True)
class Remap:
    """
    Sends each forget prototype to a target and leaves every other prototype where it is. Frozen; float64 on
    the CPU.

    Args:
        prototypes (`Prototypes`):
            P, `(d, k)`.
        forget (`tuple[int, ...]`):
            The f columns of P that are forgotten.
        targets (`Tensor`):
            `(num_experts, f)`, int64, the column that each forget prototype is sent to; -1 erases it (sends
            it to 0).
        dual (`Tensor`):
            D, `(k, d)`.
        solver (`str`):
            `"pinv"` (the paper: D = P⁺), `"covariance"` (least change of ordinary features), `"soft"`
            (`"covariance"` with a price instead of exactness), or `REGRESSION` (made by `regress`).
        condition_number (`float`):
            Condition number of P with its columns scaled to unit norm.
        strength (`float`, *optional*, defaults to 1.0):
            Scales D_F, and with it E − I. `fit` and `regress` solve for 1, and only there an edit is exact.
    """

    prototypes: Prototypes
    forget: tuple[int, ...]
    targets: Tensor
    dual: Tensor
    solver: str
    condition_number: float
    strength: float = 1.0

    @classmethod
    def fit(
        cls,
        prototypes: Prototypes,
        forget: Sequence[str],
        targets: Sequence[Sequence[str | None]],
        *,
        solver: str = "pinv",
        shrinkage: float = 1e-4,
        softness: float = 1.0,
    ) -> Remap:
        """
        Solve for the dual.

        Args:
            prototypes (`Prototypes`):
                Forget, target and every other prototype that must stay exactly where it is.
            forget (`Sequence[str]`):
                Names of the f prototypes to forget.
            targets (`Sequence[Sequence[str | None]]`):
                For each expert, the f names that `forget` is sent to; `None` erases.
            solver (`str`, *optional*, defaults to `"pinv"`):
                The metric Σ of D = (Pᵀ Σ⁻¹ P)⁻¹ Pᵀ Σ⁻¹. `"pinv"`: the identity, so D = P⁺. `"covariance"`:
                the second moment in `prototypes`; of all exact edits, this one moves the features behind Σ
                least, in the mean square of their coordinates. `"soft"`: of all E that keep every other
                prototype where it is, the minimizer of mean_f ‖E p_f − p_t‖² / ‖p_f‖² +
                softness · tr((E − I) Σ (E − I)ᵀ) / tr Σ.
            shrinkage (`float`, *optional*, defaults to 1e-4):
                Added to the diagonal of Σ, as a fraction of its mean eigenvalue.
            softness (`float`, *optional*, defaults to 1.0):
                For `"soft"`: how much moving ordinary features weighs against stopping short of the target,
                both as relative squares. Towards 0 the edit becomes `"covariance"`.

        Raises:
            `PrototypeError`: a forget prototype is a linear combination of the others, so no exact edit
            exists; or an argument is out of range or names a prototype that was never fitted.

        Example:

            >>> import torch
            >>> from more_hf.core.prototypes import Prototypes
            >>> from more_hf.core.remap import Remap
            >>> P = Prototypes(torch.eye(3, dtype=torch.float64)[:, :2], ("cat", "dog"), torch.ones(2))
            >>> Remap.fit(P, forget=["cat"], targets=[["dog"]]).apply(torch.tensor([[5.0, 1.0, 7.0]]))
            tensor([[0., 6., 7.]])
        """
        check_choice("solver", solver, SOLVERS)
        check_number("shrinkage", shrinkage)
        forget = read_names("forget", forget)
        _check_targets(forget, targets)

        columns = tuple(prototypes.index(name) for name in forget)
        target_columns = _columns_of(prototypes, targets)
        unit = prototypes.unit
        # 1. With the columns at unit norm and whitened by Σ^(−1/2), the dual is a pseudo-inverse.
        whiten = nn.Identity() if solver == "pinv" else _moment_of(prototypes).inverse_root(shrinkage)
        whitened = whiten(unit)
        if solver == "soft":
            # 2. The soft dual is that of a ridge regression: one more row for each prototype that may move.
            ridge = _ridge_rows(prototypes, columns, target_columns, softness)
            whitened = torch.cat([whitened, ridge])
        inverse = torch.linalg.pinv(whitened, rtol=1e-12)[:, : len(unit)]
        # 3. Undo the whitening and the scaling.
        dual = whiten(inverse.T).T / prototypes.matrix.norm(dim=0)[:, None]  # (k, d)
        remap = cls(
            prototypes=prototypes,
            forget=columns,
            targets=target_columns,
            dual=dual,
            solver=solver,
            condition_number=float(torch.linalg.cond(unit)),
        )
        remap._check_exact()
        return remap

    @classmethod
    def regress(
        cls,
        prototypes: Prototypes,
        forget: Sequence[str],
        targets: Sequence[Sequence[str | None]],
        own: Moment,
        *,
        shrinkage: float = 1e-3,
        softness: float = 1.0,
    ) -> Remap:
        """
        Solve for the forgotten features themselves instead of their means alone.

        Of all E, this is the minimizer of mean_f E‖E z − (z + p_t − p_f)‖² + s E‖E z' − z'‖², where z are
        the features behind forget prototype f, z' are ordinary features and s is the softness. With weights
        w = 1/f,

            E = I + Σ_f w (p_t − p_f) p_fᵀ (C + s Σ)⁻¹.

        However the forgotten features scatter, each takes the step from its mean to its target as nearly as
        the ordinary features allow. No prototype is exact or held in place: G1 to G3 do not hold.

        Args:
            prototypes (`Prototypes`):
                Forget prototypes and targets, with the second moment Σ of ordinary features.
            forget (`Sequence[str]`), targets (`Sequence[Sequence[str | None]]`):
                As in `fit`.
            own (`Moment`):
                C, the second moment of the forgotten features, with the same weight for each prototype.
            shrinkage (`float`, *optional*, defaults to 1e-3):
                Added to the diagonal of (C + s Σ)/(1 + s), as a fraction of its mean eigenvalue.
            softness (`float`, *optional*, defaults to 1.0):
                s: how much moving an ordinary feature weighs against a forgotten one stopping short.

        Example:

            >>> import torch
            >>> from more_hf.core.moment import Moment
            >>> from more_hf.core.prototypes import Prototypes
            >>> from more_hf.core.remap import Remap
            >>> P = Prototypes(torch.eye(3, dtype=torch.float64)[:, :2], ("cat", "dog"), torch.ones(2))
            >>> own, others = torch.eye(3).double()[:1], torch.eye(3).double()[2:]
            >>> P = P.with_moment(Moment(others, 1))
            >>> remap = Remap.regress(P, ["cat"], [["dog"]], Moment(own, 1))
            >>> remap.apply(torch.tensor([[5.0, 0.0, 7.0]])).round()
            tensor([[0., 5., 7.]])
        """
        check_number("shrinkage", shrinkage)
        forget = read_names("forget", forget)
        _check_targets(forget, targets)
        columns = [prototypes.index(name) for name in forget]
        # The metric is the weighted mean of both moments, (C + s Σ) / (1 + s).
        metric = replace(own, count=1) + replace(_moment_of(prototypes), count=softness)
        dual = torch.zeros_like(prototypes.matrix.T)
        read = metric.solve(prototypes.matrix[:, columns], shrinkage)
        dual[columns] = read.T / ((1 + softness) * len(columns))
        return cls(
            prototypes=prototypes,
            forget=tuple(columns),
            targets=_columns_of(prototypes, targets),
            dual=dual,
            solver=REGRESSION,
            condition_number=float(torch.linalg.cond(prototypes.unit[:, columns])),
        )

    def _check_exact(self) -> None:
        """Raises `PrototypeError`, with the reason, unless the edit is exact."""
        names, P = self.prototypes.names, self.prototypes.matrix
        d, k = P.shape
        if set(self.forget) & set(self.targets.flatten().tolist()):
            raise PrototypeError(
                "A prototype cannot be both forgotten and a target. Remove it from one of the lists."
            )
        # D_F P must be 1 where a forget prototype reads itself, and 0 elsewhere.
        read = self.D_F @ P
        error = (read - torch.eye(k, dtype=P.dtype)[list(self.forget)]).abs()
        if self.solver == "soft":
            # A soft edit is exact only in the zeros of what stays, but it must read something of itself.
            unread = (read[:, list(self.forget)].diagonal() < EXACT).double().diag()
            error = torch.cat([error[:, self._exact], unread], dim=1)
        if error.max() < EXACT:
            return

        # Name the forget prototype that is read worst, and the prototype that it resembles most.
        column = self.forget[int(error.amax(1).argmax())]
        cosines = torch.nn.functional.cosine_similarity(P[:, [column]], P, dim=0)
        cosines[column] = 0
        nearest = int(cosines.abs().argmax())
        reason = f"{k} prototypes do not fit into {d} dimensions"
        if k <= d:
            reason = (
                f"{names[column]!r} is a linear combination of the other prototypes "
                f"(nearest: {names[nearest]!r}, cosine {float(cosines[nearest]):.4f})"
            )
        raise PrototypeError(
            f"No exact edit exists: {reason}, so it cannot be removed while the others are kept. "
            "Drop a target or a retained name, or choose one that is further away."
        )

    @property
    def is_exact(self) -> bool:
        """Whether G1 to G3 hold."""
        return self.solver in EXACT_SOLVERS and self.strength == 1

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return len(self.targets)

    @property
    def rank(self) -> int:
        """f, the rank of the change of every edited layer."""
        return len(self.forget)

    @property
    def remain(self) -> Tensor:
        """P_R, `(d, k − f)`: every prototype that is not forgotten."""
        P = self.prototypes.matrix
        return P[:, [column for column in range(P.shape[1]) if column not in self.forget]]

    @property
    def _exact(self) -> list[int]:
        """The columns that stay exactly where they are."""
        return _staying_exactly(self.prototypes.matrix, self.forget, self.targets, self.solver)

    @property
    def D_F(self) -> Tensor:
        """`(f, d)`: row i reads forget prototype i in a feature, and 0 in every other prototype."""
        return self.strength * self.dual[list(self.forget)]

    @cached_property
    def shifts(self) -> Tensor:
        """`(num_experts, d, f)`: P_t − P_F of every expert."""
        padded = self._padded
        return padded[:, self.targets].transpose(0, 1) - padded[:, list(self.forget)]

    def shift(self, expert: int | None = None) -> Tensor:
        """`(d, f)`: P_t − P_F of one expert, or of the mean expert."""
        if expert is not None:
            return self.shifts[expert]
        # P̄_t = P times each target's share of the experts: `shifts` of a thousand experts take gigabytes.
        padded, targets = self._padded, self.targets
        shares = padded.new_zeros(padded.shape[1], targets.shape[1])  # (k + 1, f)
        # `%` turns the column `NOWHERE` into the last one
        shares.scatter_add_(0, targets % len(shares), shares.new_full(targets.shape, 1 / len(targets)))
        return padded @ shares - padded[:, list(self.forget)]

    @property
    def _padded(self) -> Tensor:
        """`(d, k + 1)`: P, followed by the target 0 as column `NOWHERE`."""
        P = self.prototypes.matrix
        return torch.cat([P, torch.zeros_like(P[:, :1])], dim=1)

    def apply(self, z: Tensor, expert: int | Tensor | None = None) -> Tensor:
        """
        E z for features `(..., d)`, in the dtype of z.

        Args:
            z (`Tensor`):
                The features.
            expert (`int` or `Tensor`, *optional*):
                One expert for all, or `(batch,)` int64 for z `(batch, ..., d)`; `None` for the mean expert.
        """
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

    @property
    def ordinary_moved(self) -> float:
        """√(E‖E z − z‖² / E‖z‖²) over the features behind Σ, for the expert that moves them most."""
        return float(torch.stack([self._ordinary_moved(M) for M in self.shifts]).max())

    def _ordinary_moved(self, M: Tensor) -> Tensor:
        # E‖M D_F z‖² = tr(Mᵀ M D_F Σ D_Fᵀ)
        moment = self.prototypes.moment
        squared = ((M.T @ M) * moment.seen_by(self.D_F)).sum().clamp_min(0)
        return (squared / moment.trace).sqrt()

    def removed(self, most: float = 0.0) -> Removed:
        """
        The directions that the mean expert sends to zero, or nearly.

        For an exact edit, these are all of M = P̄_t − P_F, of which it leaves |1 − strength|. For a soft one,
        they are the directions in the span of M of which the edit leaves at most the share `most`; if there
        are none, the one of which it leaves least.
        """
        if self.solver in EXACT_SOLVERS:
            return Removed(self.shift(), abs(1 - self.strength))  # D_F M = −strength · I
        # With M = U S Vᵀ the edit sends U to U (I + S Vᵀ D_F U), so the span of M stays in itself.
        directions, sizes, combinations = torch.linalg.svd(self.shift(), full_matrices=False)
        # a direction of M that is only rounding is not one that the edit removes
        span = sizes > 1e-9 * sizes.max()
        directions = directions[:, span]
        read = sizes[span, None] * (combinations[span] @ self.D_F @ directions)
        left = torch.eye(len(read), dtype=read.dtype) + read
        _, shares, rotation = torch.linalg.svd(left)  # from the largest share to the smallest
        removed = shares <= shares.min().clamp_min(most)
        return Removed(directions @ rotation[removed].T, float(shares[removed].max()))

    def delta(self, weight: Tensor, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """
        The change of a linear layer that reads the features: `weight` becomes `weight + lora_B @ lora_A`.

        Args:
            weight (`Tensor`):
                `(out, d)`.
            expert (`int`, *optional*):
                Which expert; `None` for the mean.

        Returns:
            `tuple[Tensor, Tensor]`: `lora_A` `(f, d)`, the same for every layer and expert, and `lora_B`
            `(out, f)`, float64 on the weight's device.
        """
        return self.D_F.to(weight.device), weight.double() @ self.shift(expert).to(weight.device)

    def merged(self, weight: Tensor, expert: int | None = None) -> Tensor:
        """The edited weight `(out, d)` as a new tensor of the same dtype. Computed in float64, cast once."""
        lora_A, lora_B = self.delta(weight, expert)
        return torch.addmm(weight.double(), lora_B, lora_A).to(weight.dtype)

    def verify(self, *, mean_only: bool = False) -> dict[str, float]:
        """
        Measure the method's guarantees, as relative errors of the worst expert (float64: about 1e-12 for a
        good P).

        Args:
            mean_only (`bool`, *optional*, defaults to `False`):
                Measure only the mean expert, the only one that acts without a router.

        Returns:
            `dict[str, float]`:

            - `forget_to_target` (G1): ‖E p_f − p_t‖ / ‖p_f − p_t‖; called `way_left` for a soft edit and
              at a strength other than 1, which do not promise to end at the target
            - `remain_fixed` (G1): ‖E p_r − p_r‖ / ‖p_r‖ over every other prototype; a soft edit with too many
              targets to keep them all reports those as `targets_moved`
            - `idempotent` (G2): ‖E² − E‖ / ‖E − I‖, for an exact edit
            - `nothing_left` (G3): ‖D_F E‖ / ‖D_F‖, how much an edited feature can still show of a forget
              prototype, for an exact edit
            - `ordinary_moved`: √(E‖E z − z‖² / E‖z‖²) over the features behind Σ, if there are any: what the
              edit costs them
            - `rank` (G2): the rank of I − E, the smallest over the experts
        """
        D_F, moment = self.D_F, self.prototypes.moment
        remain, exact = self.remain, self.prototypes.matrix[:, self._exact]
        forget = self.prototypes.matrix[:, list(self.forget)]
        # Everything is measured in the f dimensions of the edit: E itself, (d, d), is never formed.
        shifts = [self.shift()] if mean_only else self.shifts
        experts = []
        for M in shifts:  # E = I + M D_F
            left = D_F + (D_F @ M) @ D_F  # D_F E
            way_left = _worst_ratio(M @ (D_F @ forget) - M, M)
            measured = {"remain_fixed": _worst_ratio(M @ (D_F @ exact), exact)}
            if exact.shape != remain.shape:
                measured["targets_moved"] = _worst_ratio(M @ (D_F @ remain), remain)
            if not self.is_exact:
                measured["way_left"] = way_left
            else:
                measured["forget_to_target"] = way_left
                thin = torch.linalg.qr(M).R  # ‖M X‖ = ‖R X‖, and R is (f, f)
                measured["idempotent"] = (thin @ left).norm() / (thin @ D_F).norm()
                measured["nothing_left"] = left.norm() / D_F.norm()
            if moment is not None:
                measured["ordinary_moved"] = self._ordinary_moved(M)
            experts.append(measured)
        worst = {}
        for key in experts[0]:
            worst[key] = float(torch.stack([measured[key] for measured in experts]).max())  # keeps a NaN
        ranks = [torch.linalg.matrix_rank(factor) for factor in (D_F, *shifts)]
        return {**worst, "rank": int(min(ranks))}


def _columns_of(prototypes: Prototypes, targets: Sequence[Sequence[str | None]]) -> Tensor:
    """`(num_experts, f)`: the column of each target."""
    columns = []
    for expert in targets:
        # a column that no prototype has stands for the target 0
        columns.append([NOWHERE if name is None else prototypes.index(name) for name in expert])
    return torch.tensor(columns)


def _check_targets(forget: Sequence[str], targets: Sequence[Sequence[str | None]]) -> None:
    if not forget or len(set(forget)) != len(forget):
        raise PrototypeError(f"`forget` must name at least one prototype, and each once, got {list(forget)}.")
    listed = isinstance(targets, list | tuple) and all(isinstance(expert, list | tuple) for expert in targets)
    if not listed or not targets or any(len(expert) != len(forget) for expert in targets):
        raise PrototypeError(
            f"Each expert needs one target (or None) for each of the {len(forget)} forget prototypes, got "
            f"{shown(targets)}."
        )


def _worst_ratio(change: Tensor, reference: Tensor) -> Tensor:
    """The largest ‖change‖ / ‖reference‖ over columns; 0 if there are none."""
    ratios = change.norm(dim=0) / reference.norm(dim=0)
    return ratios.max() if len(ratios) else ratios.new_zeros(())


def _staying_exactly(P: Tensor, forget: Sequence[int], targets: Tensor, solver: str) -> list[int]:
    """
    The columns that stay exactly where they are: all that are not forgotten. If they would fill more than
    half of the dimensions, a soft edit spares its targets only as it spares ordinary features. A regression
    holds no column.
    """
    d, k = P.shape
    if solver == REGRESSION:
        return []
    moving = set(forget)
    if solver == "soft" and k - len(moving) > d // 2:
        moving.update(targets.flatten().tolist())
    return [column for column in range(k) if column not in moving]


def _ridge_rows(prototypes: Prototypes, forget: Sequence[int], targets: Tensor, softness: float) -> Tensor:
    """
    `(rows, k)`: for each prototype that may move, a row with √(f · softness / tr Σ) in its column. Appended
    to the whitened prototypes of unit norm, they make the pseudo-inverse that of the soft dual.
    """
    exact = set(_staying_exactly(prototypes.matrix, forget, targets, "soft"))
    k = prototypes.matrix.shape[1]
    moving = [column for column in range(k) if column not in exact]
    rows = prototypes.matrix.new_zeros(len(moving), k)
    rows[range(len(moving)), moving] = (len(forget) * softness / prototypes.moment.trace).sqrt()
    return rows


def _moment_of(prototypes: Prototypes) -> Moment:
    if prototypes.moment is None:
        raise PrototypeError(
            'solver="covariance" needs a second moment. Feed the fitter with `update_moment` too.'
        )
    return prototypes.moment


def draw_experts(
    options: Sequence[Sequence[str | None]], num_experts: int | None, *, max_distinct: int, seed: int = 0
) -> list[list[str | None]]:
    """
    Draw each concept's target in each expert: all its options once, in random order, then again.

    Args:
        options (`Sequence[Sequence[str | None]]`):
            For each concept, the names it may be sent to; `[None]` erases it.
        num_experts (`int`, *optional*):
            Number of experts. `None` takes the fewest that use every option of every concept equally often,
            so that the mean expert sends a concept to the plain mean of its options.
        max_distinct (`int`):
            The largest number of different targets, unless the concepts need more to have one each. Beyond
            it, experts share targets.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order of the options.

    Returns:
        `list[list[str | None]]`: for each expert, one target per concept.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = []
    for names in options:
        order = torch.randperm(len(names), generator=generator)
        shuffled.append([names[i] for i in order])

    # 1. Give each concept one target by a greedy cover: allow the option that most of the concepts without a
    # target share, until every concept has one. Erasing (`None`) takes no room.
    allowed: dict[str | None, None] = {None: None}  # an ordered set
    while uncovered := [names for names in shuffled if allowed.keys().isdisjoint(names)]:
        shared = Counter(chain.from_iterable(uncovered))
        allowed[max(shared, key=shared.get)] = None

    # 2. Fill the remaining room in turns: every concept's first option, then every concept's second, ...
    for turn in zip_longest(*shuffled):
        for name in turn:
            if name not in allowed and len(allowed) <= max_distinct:
                allowed[name] = None
    for i, names in enumerate(shuffled):
        shuffled[i] = [name for name in names if name in allowed]

    # 3. Expert e takes each concept's e-th allowed option, starting again after the last.
    if num_experts is None:
        num_experts = math.lcm(*map(len, shuffled))
    experts = []
    for expert in range(num_experts):
        experts.append([names[expert % len(names)] for names in shuffled])
    return experts
