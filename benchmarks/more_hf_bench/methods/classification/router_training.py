"""Train a prototype router on cached features (MoRE, D.2 and D.3): L = L_R + λ_F L_F + λ_FLB L_FLB, top-1.

The appendix leaves open how a loss reaches the router through a hard choice of one expert. Here it is the
straight-through estimator: the value is the chosen expert's, E_e z, and the gradient that of the mixture Σ_e
p_e E_e z. (Switch's way, E_e z times its gate p_e, asks whether more of the chosen expert would help, and not
whether another one would.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from more_hf.classification.erase import get_erasure
from more_hf.classification.features import features_of, plain_model
from more_hf.classification.names import class_names
from more_hf.core.errors import MoreError, SiteNotFoundError
from more_hf.core.hook import reset_compiled
from more_hf.core.remap import Remap
from more_hf.core.routers import PrototypeRouter
from more_hf.core.views import routing_off


LOSSES = ("remain", "forget", "balance")
T_B = ("remain", "balance")  # what the paper calls -T-B
# the seven rows that Table 15 has for each router, in its order
COMBINATIONS = (
    ("remain",), ("forget",), ("balance",), ("remain", "forget"), ("forget", "balance"), T_B, LOSSES,
)  # fmt: skip


def train_router(model: nn.Module, data: Iterable[Any], **options: Any) -> None:
    """Train the router of a model that was erased with a prototype router, in place.

    `router="prototype"` becomes MoRE-P-T-B, `"prototype_random"` MoRE-R-T-B. One pass over the data collects
    the features that the head reads; backbone, experts and head stay as they are. The trained weight is in
    memory only, as all routing is: what is saved holds the mean expert, and `more_hf.load` puts the untrained
    router back.

    Args:
        model (`nn.Module`): an erased classifier with one head.
        data (`Iterable`): batches as in `erase_classes`, the whole training set in the paper.
        options: keyword arguments of `fit_router`; the paper's by default.

    Raises:
        `MoreError`: the model is not erased, or has another router. `SiteNotFoundError`: it was erased at an
        inner module or has several heads, so there is no single head to train through.
    """
    plain, erasure = plain_model(model), get_erasure(model)
    router = None if erasure is None or erasure.hook is None else erasure.hook.router
    if not isinstance(router, PrototypeRouter):
        raise MoreError(
            'Only a prototype router has a weight to train. Erase with router="prototype" or '
            '"prototype_random" first.'
        )
    if len(erasure.sites) != 1:
        raise SiteNotFoundError(
            f"A router is trained through one head, and this model has {len(erasure.sites)} edited heads"
            f"{' (it was erased at an inner module)' if not erasure.sites else ''}. Use the untrained router."
        )
    (site,) = erasure.sites.values()
    with routing_off(erasure):
        batches = [(z.cpu(), y.cpu()) for z, y in features_of(plain, data, head=erasure.request.head)]
    features, labels = map(torch.cat, zip(*batches, strict=True))
    names = class_names(plain, erasure.facts.num_classes)
    forgotten = torch.isin(labels, torch.tensor([names.index(name) for name in erasure.concepts]))
    bias = (
        torch.zeros(len(site.read())) if site.module.bias is None else site.module.bias.detach().cpu().float()
    )
    weight, _ = fit_router(
        erasure.remap,
        (site.read().cpu().float(), bias),
        features,
        labels,
        forgotten,
        router.weight.cpu(),
        **options,
    )
    router.weight = weight.to(router.weight)
    reset_compiled()


def fit_router(
    remap: Remap,
    head: tuple[Tensor, Tensor],
    features: Tensor,
    labels: Tensor,
    forgotten: Tensor,
    weight: Tensor,
    *,
    losses: Collection[str] = T_B,
    lambda_forget: float = 0.001,
    lambda_balance: float = 1.0,
    epochs: int = 10,
    batch_size: int = 512,
    learning_rate: float = 1e-5,
    seed: int = 0,
) -> tuple[Tensor, list[dict[str, float]]]:
    """Train a router's weight on tensors; nothing else is trained.

    Args:
        remap (`Remap`): the experts.
        head (`tuple[Tensor, Tensor]`): weight `(num_classes, d)` and bias `(num_classes,)`, of the original
            head or the merged one: the logits W E_e z are the same.
        features (`Tensor`), labels (`Tensor`), forgotten (`Tensor`): `(n, d)`, not edited, `(n,)`, int64, and
            `(n,)`, bool.
        weight (`Tensor`): `(rows, d)`, what to start from: `PrototypeRouter.initial(remap)`, or draws from
            N(0, 0.1²). Algorithm 4 starts from one row per remain class; experts without one are never taken.
        losses (`Collection[str]`): which of L_R, L_F, L_FLB are minimized, from `LOSSES`: those of -T-B by
            default, all of `COMBINATIONS` in Table 15.
        lambda_forget, lambda_balance (`float`): λ_F and λ_FLB.
        epochs, batch_size (`int`), learning_rate (`float`): passes over the features, and steps of Adam.
        seed (`int`): of the order of samples.

    Returns:
        `tuple[Tensor, list[dict[str, float]]]`: W_r, `(rows, d)`, float32, and for each epoch the means over
            its batches of `loss_remain`, `loss_forget`, `loss_balance` (of the batches that have such
            samples, unweighted) and `loss`, what was minimized.

    Raises:
        `MoreError`: `losses` is empty or has an unknown loss.
    """
    if not losses or set(losses) - set(LOSSES):
        raise MoreError(f"Unknown `losses` {list(losses)}. Choose some of {', '.join(LOSSES)}.")
    factors = {"remain": 1.0, "forget": lambda_forget, "balance": lambda_balance}

    # what an expert adds to the logits: W (P_t − P_F) times D_F z
    head_weight, bias = (part.float() for part in head)
    head_shifts = (head_weight.double() @ remap.shifts).float().movedim(1, 2)  # (num_experts, f, num_classes)
    read = remap.D_F.T.float()

    features, weight = features.float(), nn.Parameter(weight.float().clone())
    optimizer = torch.optim.Adam([weight], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    log = []
    for epoch in range(epochs):
        sums = dict.fromkeys((*LOSSES, "all"), 0.0)
        counts = dict.fromkeys(sums, 0)
        for index in torch.randperm(len(features), generator=generator).split(batch_size):
            z, out = features[index], forgotten[index]
            # 1. The choice of one expert, whose gradient is that of the gates (straight-through).
            gates = (z @ weight.T).softmax(1)
            experts = gates.argmax(1)
            choice = one_hot(experts, gates.shape[1]) + gates - gates.detach()

            # 2. The logits W E_e z, through (b, rows f) rather than (b, rows, num_classes).
            chosen = (choice[:, :, None] * (z @ read)[:, None]).flatten(1)
            logits = z @ head_weight.T + bias + chosen @ head_shifts[: gates.shape[1]].flatten(0, 1)

            # 3. The losses of this batch, and a step on those that are asked for.
            entropy = cross_entropy(logits, labels[index], reduction="none")
            parts = {}
            if not out.all():
                parts["remain"] = entropy[~out].mean()
            if out.any():
                parts["forget"] = -entropy[out].mean()
                parts["balance"] = balance_loss(gates[out], experts[out], remap.num_experts)
            weighted = [factors[name] * loss for name, loss in parts.items() if name in losses]
            if weighted:
                optimizer.zero_grad()
                sum(weighted).backward()
                optimizer.step()
                parts["all"] = sum(weighted)
            for name, loss in parts.items():
                sums[name] += loss.item()
                counts[name] += 1
        means = {
            f"loss_{name}".removesuffix("_all"): total / max(counts[name], 1) for name, total in sums.items()
        }
        log.append({"epoch": epoch + 1, **means})
    return weight.detach(), log


def balance_loss(gates: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """L_FLB = N_E Σ_e I_e L_e of forgotten samples: I_e their mean gate, L_e the fraction that takes e,
    without gradient; 1 where both are even over all experts, N_E where one expert takes everything.

    `gates` are `(n, rows)`, `experts` `(n,)`, int64.
    """
    fractions = torch.bincount(experts, minlength=gates.shape[1]) / len(experts)
    return num_experts * (gates.mean(0) * fractions).sum()
