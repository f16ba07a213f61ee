"""`erase_classes`, `restore` and `get_erasure` for classifiers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..core.errors import MoreError, PrototypeError, SiteNotFoundError
from ..core.facts import ClassFacts
from ..core.install import install, refuse_inside_block, uninstall
from ..core.prototypes import Prototypes
from ..core.record import refuse_erased_source
from ..core.registry import check_restorable, find_erasure, locked, require_editable, require_erased
from ..core.remap import Remap
from ..core.request import ClassRequest
from ..core.site import Site, check_unshared, copy_weights, fingerprint
from .erasure import ClassErasure
from .features import collect, plain_model
from .heads import example_pixels, find_heads, find_module
from .hook import make_hooks
from .names import class_names, find_classes
from .plan import check_request, make_request, solve
from .proof import prover
from .remaining import remaining_right


logger = logging.getLogger(__name__)

WARN_ABOVE = 5  # points of the remaining classes' accuracy that an edit may cost without a warning


def erase_classes(
    model: nn.Module,
    data: Iterable[Any] | Prototypes,
    forget: str | int | Sequence[str | int],
    *,
    remap_to: str | int | Sequence[str | int] | None = "remain",
    num_experts: int | None = None,
    router: str | None = None,
    solver: str = "auto",
    seed: int = 0,
    head: str | Sequence[str] | None = None,
    at: str | None = None,
    keep_originals: bool = True,
    most_lost: float = 20.0,
    resume: str | os.PathLike | None = None,
) -> nn.Module:
    """
    Make a classifier forget classes, in place, and return it: in closed form, in one pass over the data.

    The feature that the head reads goes through a remapping expert first, by a forward pre-hook, and the mean
    expert is merged into the head's weight as well; the state dict's keys and shapes stay as they are. So
    `save_pretrained` and `from_pretrained` give a model whose predictions forget. **Its features are the
    original's**: the backbone is untouched, and the feature forgets only while the hook is there
    (`more_hf.save(..., include_delta=True)` and `more_hf.load` put it back). On a model that was erased
    before, all its classes are fitted again jointly, from the kept originals and the new data. A second
    thread that erases or restores the same model meanwhile waits.

    Args:
        model (`nn.Module`):
            A Transformers classifier of images, video, sound or text, a timm model, or your own with `head`
            named, in fp16, bf16, fp32 or fp64. A model inside DDP or `torch.compile` is edited inside. With
            two heads (DeiT with its teacher's token) both are edited.
        data (`Iterable` or `Prototypes`):
            Batches as in `collect_prototypes`, of every class, or what it returned.
        forget (`str`, `int` or a sequence of them):
            Classes by name (a synonym of an ImageNet label will do) or number.
        remap_to (*optional*, defaults to `"remain"`):
            What they become: every other class is a candidate (Algorithm 1, step 3), or these classes are, or
            `None` erases only: the feature then holds nothing of the class, but sits apart from all others,
            where a new probe still finds it.
        num_experts (`int`, *optional*):
            How many experts draw targets, without replacement until all are used, then again. By default as
            many as use each target equally. One, without a router, is the paper's Remap.
        router (`str`, *optional*):
            Which expert a sample takes: `"random"` (MoRE, redrawn at every call: asking twice undoes it),
            `"hash"` (a function of the sample), `"prototype"` (MoRE-P), `"prototype_random"` (MoRE-R). By
            default the mean expert: with several targets it sends a class to their centroid, a cluster of its
            own, which a new probe can tell from every target.
        solver (`str`, *optional*, defaults to `"auto"`):
            `"pinv"` (the paper: every other prototype stays exactly), `"covariance"` (the targets stay
            exactly, the others move least), or `pinv` unless there are more classes than features or P is
            ill-conditioned.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draw of targets. No global random state is touched.
        head (`str` or `Sequence[str]`, *optional*):
            Name of the head where running the model does not find it.
        at (`str`, *optional*):
            Edit the input of this inner module instead, a block for instance. A hook only: such a model is
            **not erased at rest**, whatever saves it saves the original.
        keep_originals (`bool`, *optional*, defaults to `True`):
            Keep the head's original weight in CPU memory for `restore`.
        most_lost (`float`, *optional*, defaults to 20.0):
            How many percentage points of the remaining classes' accuracy may be lost, by an estimate from the
            prototypes and the second moment; an edit that costs more is refused, and one that costs over 5 is
            warned of. Many classes in few features are not forgotten for less; 100 allows everything.
        resume (`str` or `os.PathLike`, *optional*):
            As in `collect_prototypes`: a file from which a pass that was killed goes on.

    Returns:
        `nn.Module`: the same model.

    Raises:
        `PrototypeError`: a class is unknown, has no sample, or is on both sides; the data has no labels; an
        option is wrong; no exact edit exists, or one that costs the other classes more than `most_lost`.
        `SiteNotFoundError`: the head cannot be found, or cannot be edited as it is. `AlreadyErasedError`: the
        model was erased and its originals are not here. The model is unchanged then, as it is after an
        interruption.

    Why every remaining class is a target by default, measured on Fashion-MNIST, each class forgotten in turn
    from three classifiers: the mean of all kept the other classes within half a point and at most 0.5 % of
    the forgotten one for 25 of 30 pairs (`"pinv"`; 27 with `"covariance"`), one drawn target for 14 (16), as
    it grows by all of the forgotten class's images (`benchmarks/classifiers/ten_classes.md`).

    Source: MoRE, Eq. 4 to 6 and Algorithms 1, 2 and 4; the covariance metric and the hash router are ours.

    Example:

        >>> import torch, more_hf
        >>> images, labels = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.arange(60) % 3
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> model = more_hf.erase_classes(model, [(images, labels)], forget=[0], remap_to=[1])
        >>> more_hf.get_erasure(model).facts.sent_to
        {'0': ['1']}
    """
    plain = plain_model(model)
    if not 0 <= most_lost <= 100:
        raise PrototypeError(f"`most_lost` must be from 0 to 100 percentage points, got {most_lost}.")
    with locked(plain):
        current = require_editable(plain)
        refuse_inside_block(current)
        if head is None and current is not None:
            head = current.request.head
        options = {"num_experts": num_experts, "router": router, "solver": solver, "seed": seed}

        request: ClassRequest | None = None

        def make_checked_request(heads: Mapping[str, nn.Module]) -> None:
            """Every check that needs no feature, as soon as the number of classes is known."""
            nonlocal request
            sites = {name: Site(name, module) for name, module in heads.items()}
            check_unshared(sites, plain)
            if current is None:
                refuse_erased_source(_source_of(plain), lambda record: sites)
            names = class_names(plain, len(next(iter(heads.values())).weight))
            request = make_request(names, forget, remap_to, head=list(heads), at=at, **options)
            if current is not None:
                if (current.request.head, current.request.at) != (request.head, at):
                    raise MoreError(
                        f"Classes were erased at {current.request.at or current.request.head} and cannot be "
                        f"fitted jointly with others at {at or request.head}. Call `more_hf.restore` first, "
                        "and forget all classes at once."
                    )
                request = current.request.joined(request)
            check_request(names, request)

        if isinstance(data, Prototypes):
            heads, prototypes = find_heads(plain, example_pixels(plain) if head is None else None, head), data
            make_checked_request(heads)
        else:
            heads, prototypes = collect(
                plain,
                data,
                head=head,
                at=at,
                second_moment=solver != "pinv",
                resume=resume,
                on_heads=make_checked_request,
            )
        _fit(plain, heads, prototypes, request, keep_originals, most_lost)
    return model


def restore(model: nn.Module, classes: str | int | Sequence[str | int] | None = None) -> nn.Module:
    """`more_hf.restore` for classifiers."""
    plain = plain_model(model)
    with locked(plain):
        erasure = require_erased(plain)
        names = class_names(plain, erasure.facts.num_classes)
        dropped = erasure.concepts
        if classes is not None:
            dropped = find_classes(names, "classes", classes)
        check_restorable(erasure, dropped)
        if set(dropped) == set(erasure.concepts):
            uninstall(plain, list(edited_modules(plain, erasure).values()))
        else:
            heads = find_heads(plain, None, erasure.request.head)
            request = erasure.request.without(dropped)
            _fit(plain, heads, erasure.prototypes, request, keep_originals=True, most_lost=100)
    return model


def get_erasure(model: nn.Module) -> ClassErasure | None:
    """`more_hf.get_erasure` for classifiers."""
    return find_erasure(plain_model(model))


def check_in_place(model: nn.Module) -> None:
    """Raises `SiteNotFoundError` unless the edited modules are where they were."""
    plain = plain_model(model)
    erasure = find_erasure(plain)
    modules = edited_modules(plain, erasure)
    if replaced := [name for name, site in erasure.sites.items() if modules[name] is not site.module]:
        raise SiteNotFoundError(
            f"`{replaced[0]}` was replaced since the edit. Put the edited layer back, or erase again from "
            "the original."
        )


edited_module = plain_model  # what `api` locks


def edited_modules(model: nn.Module, erasure: ClassErasure) -> dict[str, nn.Module]:
    """The modules whose input is edited: the heads, or the inner module."""
    names = erasure.request.head if erasure.request.at is None else (erasure.request.at,)
    return {name: find_module(model, name) for name in names}


def _fit(
    model: nn.Module,
    heads: Mapping[str, nn.Module],
    prototypes: Prototypes,
    request: ClassRequest,
    keep_originals: bool,
    most_lost: float,
) -> None:
    """Dual, merge, hook, proof: all of it, or the model is what it was."""
    current = find_erasure(model)
    modules, widths = heads, [head.weight.shape[1] for head in heads.values()]
    if request.at is not None:
        modules, widths = {request.at: find_module(model, request.at)}, [len(prototypes.matrix)]
    if sum(widths) != len(prototypes.matrix):
        raise PrototypeError(
            f"The prototypes have {len(prototypes.matrix)} features, and the head reads {sum(widths)}. "
            "Collect them from this model."
        )
    solution = solve(prototypes, widths, request)
    sites = {}
    if request.at is None:
        sites = {name: Site(name, head, space=name) for name, head in heads.items()}
    originals = current.originals if current else copy_weights(sites, "cpu")
    remaps = dict(zip(modules, solution.remaps, strict=True))
    erasure = ClassErasure(
        request=request,
        facts=ClassFacts(
            solver=solution.remaps[0].solver,
            solver_reason=solution.solver_reason,
            sent_to=solution.sent_to,
            remain_moved=solution.remain_moved,
            rank=solution.remaps[0].rank,
            num_experts=solution.remaps[0].num_experts,
            condition_number=max(remap.condition_number for remap in solution.remaps),
            base=current.facts.base if current else _source_of(model),
            model=type(model).__name__,
            num_classes=len(next(iter(heads.values())).weight),
            fingerprint=current.facts.fingerprint if current else fingerprint(originals),
            spaces={name: name for name in sites},  # each head reads its own features
        ),
        sites=sites,
        remaps=remaps,
        originals=originals,
        guarantees=_guarantees(solution.remaps, mean_only=request.router is None),
        prototypes=prototypes,
    )
    if erasure.sites:
        right = remaining_right(erasure, prototypes, class_names(model, erasure.facts.num_classes))
        erasure.facts = replace(erasure.facts, remain_right=right)
        if right is not None:
            _weigh_cost(erasure, most_lost)
    erasure.hooks = make_hooks(erasure, modules, next(model.parameters()).device)
    prove = prover(model, modules, erasure)
    install(model, erasure, list(modules.values()), prove, keep_originals=keep_originals)
    if request.at is not None:
        logger.warning(
            "The classes are forgotten by a hook on `%s` only, not at rest: whatever saves this model saves "
            "the original.",
            request.at,
        )


def _weigh_cost(erasure: ClassErasure, most_lost: float) -> None:
    """Warns of what the edit costs the remaining classes; raises `PrototypeError` beyond `most_lost`."""
    before, after = erasure.facts.remain_right["before"], erasure.facts.remain_right["after"]
    cost = (
        f"Of the remaining classes' features, drawn around their means, the head recognizes {before:.1f} % "
        f"before and {after:.1f} % after forgetting {len(erasure.concepts)} of {erasure.facts.num_classes} "
        f"classes ({erasure.facts.solver_reason})"
    )
    if before - after > most_lost:
        raise PrototypeError(
            f"{cost}: more than {most_lost:g} points are lost. Nothing was changed. Forget fewer classes, or "
            "pass a larger `most_lost` to do it all the same."
        )
    if before - after > WARN_ABOVE:
        logger.warning("%s.", cost)


def _source_of(model: nn.Module) -> str:
    """Where the model was loaded from; empty if it has no configuration that says so."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))


def _guarantees(remaps: Sequence[Remap], *, mean_only: bool) -> dict[str, float]:
    """What `Remap.verify` measures, of the worst head."""
    measured = [remap.verify(mean_only=mean_only) for remap in remaps]
    worst = {}
    for key in measured[0]:
        values = [one[key] for one in measured]
        worst[key] = min(values) if key == "rank" else max(values)
    return worst
